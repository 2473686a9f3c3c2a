"""What README, CONTRIBUTING and docs/ name is there: links, commands, options, files, settings, functions."""

import argparse
import ast
import dataclasses
import importlib
import re
import shlex
from pathlib import Path

import pytest

from tove_jax.cli.main import COMMANDS
from tove_jax.config.door import _field_paths
from tove_jax.config.schema import AdapterConfig, Config, MoveKDConfig
from tove_jax.experts.registry import cards
from tove_jax.methods.presets import HAWAII_PRESETS, PRESETS

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
PAGES = [page for page in PAGES if "_build" not in page.parts]
FIELDS = set(_field_paths(Config))
SECTIONS = {field.name for field in dataclasses.fields(Config)} - {"title"}
ROOMS = ("tove_jax", "tests", "configs", "docs", "launch", "requirements")
# Files that the pages tell the reader to make.
TO_MAKE = {"tests/experts/test_<name>.py"}
FENCE = re.compile(r"^```(\S*)[^\n]*\n(.*?)^```", re.M | re.S)

pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def blocks(page, *languages):
    return [text for language, text in FENCE.findall(page.read_text()) if language in languages]


def spans(page):
    """Returns what stands between single backticks, outside fenced blocks."""
    return re.findall(r"`([^`\n]+)`", FENCE.sub("", page.read_text()))


def command_lines(page):
    """Returns every shell line of the page that calls tove, joined over backslashes."""
    for block in blocks(page, "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words and words[0] == "tove":
                yield words[1:]


def function_names(module):
    """Returns the dotted names that a module's file defines, without importing it."""
    found = set()

    def walk(body, prefix):
        for node in body:
            names = []
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                names = [node.name]
            elif isinstance(node, ast.Assign):
                names = [target.id for target in node.targets if isinstance(target, ast.Name)]
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                names = [node.target.id]
            elif isinstance(node, ast.ImportFrom):
                names = [alias.asname or alias.name for alias in node.names]
            found.update(prefix + name for name in names)
            if isinstance(node, ast.ClassDef):
                walk(node.body, f"{prefix}{node.name}.")

    walk(ast.parse(module.read_text()).body, "")
    return found


def resolves(name):
    """Whether a dotted name below tove_jax is a module, or something that a module's file defines."""
    parts = name.split(".")
    for cut in range(len(parts), 0, -1):
        path = ROOT.joinpath(*parts[:cut])
        for file in (path.with_suffix(".py"), path / "__init__.py"):
            if file.is_file():
                return cut == len(parts) or ".".join(parts[cut:]) in function_names(file)
    return False


@pages
def test_relative_links_exist(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", page.read_text())):
        if "://" in target or target.startswith("#"):
            continue
        path, _, anchor = target.partition("#")
        linked = page.parent / path
        assert linked.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.+)$", linked.read_text(), re.M)
            slugs = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor in slugs, target


@pages
def test_commands_and_options_exist(page):
    for name in re.findall(r"`tove ([a-z]+)", page.read_text()):
        assert name in COMMANDS, name
    for command, *words in command_lines(page):
        assert command in COMMANDS, command
        module = importlib.import_module(f"tove_jax.cli.{COMMANDS[command]}")
        parser = argparse.ArgumentParser(allow_abbrev=False, exit_on_error=False)
        takes_config, finds_settings = getattr(module, "TAKES_CONFIG", False), hasattr(module, "settings")
        if takes_config:
            parser.add_argument("--config", required=not finds_settings)
            parser.add_argument("--workdir")
        module.add_arguments(parser)
        overrides = [word for word in words if word.startswith("--config.")]
        assert not overrides or takes_config or finds_settings, words
        for word in overrides:
            assert word.removeprefix("--config.").partition("=")[0] in FIELDS, word
        parsed = parser.parse_args([word for word in words if word not in overrides])
        if getattr(parsed, "config", None):
            assert (ROOT / parsed.config.partition(":")[0]).is_file(), parsed.config


@pages
def test_files_exist(page):
    for span in spans(page):
        word = span.split()[0] if span.startswith(ROOMS) else ""
        if not re.match(rf"({'|'.join(ROOMS)})/", word) or word in TO_MAKE:
            continue
        found = list(ROOT.glob(word)) if "*" in word else [ROOT / word.partition(":")[0]]
        assert found and all(path.exists() for path in found), span


@pages
def test_settings_exist(page):
    text = page.read_text()
    for name in re.findall(r"(?:--config\.|`config\.)([a-z][\w.]*\w)", text):
        if name != "json":
            assert name in FIELDS, name
    for block in blocks(page, "python"):
        for name in re.findall(r"^ *config\.([a-z_.]+?)(?:\.update)?(?: =|\()", block, re.M):
            assert name in FIELDS, name
    for span in spans(page):
        if re.fullmatch(rf"({'|'.join(SECTIONS)})\.[a-z_]+(\.[a-z_0-9]+)*", span):
            assert span in FIELDS or span.endswith(".json"), span


@pages
def test_functions_exist(page):
    names = set(re.findall(r"\btove_jax\.\w[\w.]*\w", page.read_text()))
    for block in blocks(page, "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module.startswith("tove_jax"):
                names |= {f"{node.module}.{alias.name}" for alias in node.names}
    for name in sorted(names):
        assert resolves(name) or name.endswith(".__call__") and resolves(name.removesuffix(".__call__")), name


@pages
def test_pages_name_no_machine(page):
    assert not re.search(r"(?<![\w.])/(work|root|home|tmp)/", page.read_text())


def test_make_targets_exist():
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M))
    for page in PAGES:
        for name in re.findall(r"(?:^|`)make ([a-z]+)", page.read_text(), re.M):
            assert name in targets, f"{page}: make {name}"


def rows(text, columns):
    """Yields the cells of table rows with this many columns, backticks taken off."""
    for line in text.splitlines():
        cells = [cell.strip().strip("`") for cell in line.strip("|").split("|")]
        if line.startswith("|") and len(cells) == columns:
            yield cells


def test_presets_are_as_written():
    text = (ROOT / "docs/methods/move_kd.md").read_text()
    values = {
        name: {**dataclasses.asdict(preset.method), **dataclasses.asdict(preset.adapter)}
        for name, preset in PRESETS.items()
    }
    differing = {
        field: [str(values[name][field]) for name in ("paper", "reference", "recommended")]
        for field in values["paper"]
        if len({str(values[name][field]) for name in values}) > 1
    }
    written = {cells[0]: cells[1:] for cells in rows(text, 4) if cells[0] in values["paper"]}
    assert written == differing


# Fields of the adapters that one kind alone reads.
MOLE_FIELDS = {"experts"}
MOLA_FIELDS = {"teacher_experts", "general_experts", "router_width", "dora"}


@pytest.mark.parametrize(
    "page,sections,left_out",
    [
        ("move_kd", (MoveKDConfig(), AdapterConfig()), MOLA_FIELDS),
        ("hawaii", (HAWAII_PRESETS["paper"].method, HAWAII_PRESETS["paper"].adapter), MOLE_FIELDS),
    ],
)
def test_every_choice_of_the_method_has_its_standing(page, sections, left_out):
    text = (ROOT / f"docs/methods/{page}.md").read_text()
    written = {cells[0]: cells[1] for cells in rows(text, 3)}
    for section in sections:
        for name, value in dataclasses.asdict(section).items():
            assert name in left_out or written.get(name) == str(value), name


def test_presets_of_hawaii_differ_as_written():
    paper, recommended = HAWAII_PRESETS["paper"], HAWAII_PRESETS["recommended"]
    assert paper.adapter == recommended.adapter
    assert recommended.method == dataclasses.replace(paper.method, clip_target="raw")


def test_readme_lists_every_expert_with_its_licence():
    readme = (ROOT / "README.md").read_text()
    for name, card in cards().items():
        # A row may name several, separated by commas.
        rows = [line for line in readme.splitlines() if re.match(rf"\| (`\w+`, )*`{name}`[,:]", line)]
        assert len(rows) == 1, name
        assert name == "clip" or rows[0].endswith(f"| {card.licence} |"), name


def test_every_command_is_in_the_readme():
    readme = (ROOT / "README.md").read_text()
    assert {name for name in COMMANDS if f"`tove {name}`" not in readme} == set()


def test_licence_is_whole():
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text and "END OF TERMS AND CONDITIONS" in text
