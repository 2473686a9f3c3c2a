"""Imports point one way, make no circle, and `import tove_jax` stays light."""

import ast
import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "tove_jax"
LEVELS = (
    {"errors", "__init__"},
    {"config", "files", "parallel", "data"},
    {"models", "adapters"},
    {"hf"},
    {"experts", "language"},
    {"methods"},
    {"train"},
    {"eval", "plan"},
    {"report", "bench"},
    {"cli"},
)
LEVEL = {room: level for level, rooms in enumerate(LEVELS) for room in rooms}


def modules():
    return {
        ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): path
        for path in PACKAGE.rglob("*.py")
        if "remote_code" not in path.parts
    }


def imported(path, known, top_level_only):
    """Yields the package's own modules that a file imports, ``from package import module`` resolved."""
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_level_only else ast.walk(tree)
    for node in nodes:
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            while name and name not in known:
                name = name.rpartition(".")[0]
            if name.startswith("tove_jax"):
                yield name


def room(name):
    return (name.split(".") + ["__init__"])[1]


def test_every_room_has_a_level():
    assert {room(name) for name in modules()} <= set(LEVEL)


def test_imports_point_down():
    known = modules()
    wrong = [
        f"{name} -> {target}"
        for name, path in known.items()
        for target in imported(path, known, top_level_only=False)
        if LEVEL[room(target)] > LEVEL[room(name)]
    ]
    assert not wrong


def test_the_ground_floor_knows_no_model():
    known = modules()
    for name, path in known.items():
        if room(name) in ("data", "parallel"):
            assert not {room(t) for t in imported(path, known, False)} - {
                "data",
                "parallel",
                "config",
                "files",
                "errors",
            }


def test_no_circles():
    known = modules()
    edges = {name: set(imported(path, known, top_level_only=True)) - {name} for name, path in known.items()}
    # A package's __init__ hands names on; a module below it may import its siblings.
    seen, stack = {}, []

    def visit(name):
        if name in stack:
            raise AssertionError(" -> ".join([*stack[stack.index(name) :], name]))
        if name in seen:
            return
        stack.append(name)
        for target in sorted(edges[name]):
            visit(target)
        stack.pop()
        seen[name] = True

    for name in sorted(edges):
        visit(name)


def test_importing_the_package_is_light():
    code = "import sys, tove_jax; print([m for m in ('torch', 'jax', 'transformers', 'flax') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_torch_is_never_imported_at_module_level():
    for path in modules().values():
        for node in ast.parse(path.read_text()).body:
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not any(name.split(".")[0] == "torch" for name in names), path


def test_no_file_is_long():
    long = {path.name: n for path in modules().values() if (n := len(path.read_text().splitlines())) > 520}
    assert not long
