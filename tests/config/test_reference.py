"""The committed config reference is what the dataclasses say."""

import dataclasses
from pathlib import Path
from typing import Any, Literal

from tove_jax.config import reference
from tove_jax.config.schema import Config, option, section

ROOT = Path(__file__).parents[2]


def test_committed_page_is_up_to_date():
    committed = (ROOT / "docs/config.md").read_text()
    assert committed == reference.markdown(), "run `python -m tove_jax.config.reference`"


def test_every_field_of_every_section_has_a_sentence():
    for path, kind in reference.sections(Config, "config"):
        assert kind.__doc__ and not kind.__doc__.startswith(kind.__name__ + "("), path
        for field in dataclasses.fields(kind):
            assert field.metadata.get("doc", "").endswith((".", "]")), f"{path}.{field.name}"


@dataclasses.dataclass(frozen=True)
class _Left:
    """Left."""

    name: Literal["left"] = option("left", "Selects it.")


@dataclasses.dataclass(frozen=True)
class _Right:
    """Right."""

    name: Literal["right"] = option("right", "Selects it.")
    size: int | None = option(None, "Either `a|b`.")


@dataclasses.dataclass(frozen=True)
class _Whole:
    """Whole."""

    side: _Left | _Right = section(_Left, "A choice.")
    pairs: tuple[tuple[str, Any], ...] = option((), "Pairs.")


def test_a_choice_of_sections_gives_one_table_each():
    page = reference.markdown(_Whole, "root")
    assert page.count("## `root.side`") == 2
    assert "| `side` | section or section | see `root.side` | A choice. |" in page


@dataclasses.dataclass(frozen=True)
class _Twice:
    """Twice."""

    whole: _Whole = section(_Whole, "Whole.")
    again: _Whole = section(_Whole, "The same kind.")


def test_a_kind_of_section_in_two_places_is_written_once():
    page = reference.markdown(_Twice, "root")
    assert page.count("## `root.whole`") == 1 and "## `root.again`" not in page
    assert "| `again` | section | see `root.again` | The same kind. |" in page


def test_types_and_pipes_in_cells():
    page = reference.markdown(_Whole, "root")
    assert "| `pairs` | tuple of (str, any) | `()` | Pairs. |" in page
    assert "| `size` | int or none | `None` | Either `a\\|b`. |" in page
    assert reference.type_text(Literal["a", 1]) == "one of `'a'`, `1`"


def test_command_writes_the_page(tmp_path):
    assert reference.main([str(tmp_path / "config.md")]) == 0
    assert (tmp_path / "config.md").read_text() == reference.markdown()
