"""Sphinx settings: Markdown pages by MyST, the theme furo."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]

project = "tove_jax"
author = "the tove_jax authors"
copyright = author
release = re.search(r'__version__ = "(.+)"', (ROOT / "tove_jax/__init__.py").read_text())[1]

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_heading_anchors = 3
exclude_patterns = ["_build"]

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
# Docstrings name Python objects between single backticks.
default_role = "literal"

html_theme = "furo"
html_title = f"tove_jax {release}"
