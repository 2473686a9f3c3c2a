"""What a training step costs beside plain CLIP's, by the compiler: ``python -m tove_jax.bench.cost``.

Everything is abstract: full-size settings are lowered and compiled from shapes, and no array is made. The
compiler counts the body of a loop over layers once, so operations are counted at three and at four layers,
which are unrolled, and continued to all of them: layers are alike. Memory is of the whole depth.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import math
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from tove_jax import methods
from tove_jax.config import from_file
from tove_jax.config.schema import AdapterConfig, Config, HawaiiConfig, ToVEConfig
from tove_jax.data.view import View
from tove_jax.errors import InputError, nearest
from tove_jax.experts.base import ExpertCard, ExpertFeatures
from tove_jax.files.atomic import atomic_write_bytes
from tove_jax.models.vit import encode
from tove_jax.train.initial import state_builder
from tove_jax.train.objective import DTYPES, make_student
from tove_jax.train.step import make_step

EXPERTS: dict[str, tuple[int, int, int]] = {
    "convnext_xxl": (32, 32, 3072),
    "eva02_l": (64, 64, 1024),
    "pix2struct_l": (32, 32, 1536),
    "sam_l": (64, 64, 256),
    "depth": (384, 384, 1),
    "normals": (480, 640, 3),
    "edges": (352, 352, 1),
    "dinov2_b": (16, 16, 768),
    "eva02_clip_b": (14, 14, 768),
}
"""Height, width and channels of the features of the experts that the full-size configs name, but `clip`."""

BATCH = 8


class Cost(NamedTuple):
    """A training step's cost.

    Attributes:
      flops: operations of a step, as lowered, before the compiler simplifies them.
      temporaries: bytes beside inputs and outputs; None where it was not compiled.
      state: bytes of parameters, optimiser slots and counters, in the run's own dtypes.
    """

    flops: float
    temporaries: int | None
    state: int


@dataclasses.dataclass(frozen=True)
class Row:
    """A line of a table: a config file with its argument, overrides, and whether plain CLIP stands in.

    Attributes:
      label: first cell.
      config: ``file.py:argument``.
      overrides: as on the command line.
      plain: take plain CLIP's step in its place: the same tower without adapters, all of it trained, on the
        mean square of the same feature.
    """

    label: str
    config: str
    overrides: tuple[str, ...] = ()
    plain: bool = False


# The pages' tables are of the encoder's side; a language model's cost is its own.
_MOVE_KD, _HAWAII, _TOVE = (
    f"configs/{name}.py:language=none" for name in ("move_kd_vit_l", "hawaii_vit_l", "tove_vit_b")
)
PAGES: dict[str, tuple[Row, ...]] = {
    "move_kd": (
        Row("plain CLIP", _MOVE_KD, plain=True),
        Row("v1.0, stage 1", f"{_MOVE_KD},preset=reference"),
        Row("v1.0, stage 2", f"{_MOVE_KD},preset=reference,stage=2"),
        Row("v1.1, stage 1", f"{_MOVE_KD},preset=reference,teachers=v1_1"),
        Row("v1.1, stage 2", f"{_MOVE_KD},preset=reference,teachers=v1_1,stage=2"),
    ),
    "hawaii": (
        Row("plain CLIP", _HAWAII, plain=True),
        Row("base, stage 1", _HAWAII),
        Row("base, stage 2", f"{_HAWAII},stage=2"),
        Row("dagger, stage 1", f"{_HAWAII},teachers=dagger"),
        Row("double dagger, stage 1", f"{_HAWAII},teachers=double_dagger"),
    ),
    "tove": (
        Row("plain CLIP", _TOVE, plain=True),
        Row("five experts", _TOVE),
        Row(
            "the two token experts",
            _TOVE,
            ("--config.method.attach_all=False", "--config.method.attached=('dinov2_b', 'eva02_clip_b')"),
        ),
        Row("no expert", _TOVE, ("--config.method.attach_all=False",)),
    ),
}


def step_cost(config: Config, *, plain: bool = False, batch: int = BATCH, compiled: bool = True) -> Cost:
    """Counts a training step's operations and memory; no array is made.

    Args:
      config: a whole run's settings; its experts are `clip` or in `EXPERTS`. The step is lowered in float32, since
        the CPU's compiler keeps float32 copies of bfloat16, which would be counted as memory.
      plain: see `Row`.
      batch: pictures of the step.
      compiled: also compile it, for its temporaries.

    Raises:
      InputError: an expert whose features are not known.
    """
    config = plain_clip(config) if plain else config
    state = jax.tree.leaves(_abstract(config, plain, batch)[1])
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, dtype="float32"))

    def lowered(layers: int) -> Any:
        deep = dataclasses.replace(config, student=dataclasses.replace(config.student, layers=layers))
        step, *given = _abstract(deep, plain, batch)
        return jax.jit(step, donate_argnums=0).lower(*given)

    # Not from two: a run of one layer has no gradient of its input where the tower is frozen, a longer run has.
    three, four = (lowered(layers).cost_analysis()["flops"] for layers in (3, 4))
    layers = config.student.layers
    return Cost(
        flops=three + (layers - 3) * (four - three),
        temporaries=lowered(layers).compile().memory_analysis().temp_size_in_bytes if compiled else None,
        state=sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in state),
    )


def plain_clip(config: Config) -> Config:
    """Returns the settings of the same tower without adapters, all of it trained."""
    student = dataclasses.replace(config.student, adapter=AdapterConfig(kind="none"))
    return dataclasses.replace(config, student=student, optim=dataclasses.replace(config.optim, groups=((".*", 1.0),)))


def student_passes(config: Config) -> int:
    """Returns how often a step runs the student."""
    return 1 + len(config.features.names) if isinstance(config.method, HawaiiConfig) else 1


def table(
    page: str,
    overrides: Sequence[str] = (),
    *,
    compiled: bool = True,
    told: Callable[[str], None] = lambda line: None,
) -> str:
    """Returns the Markdown table of a method's page.

    Args:
      page: ``move_kd``, ``hawaii`` or ``tove``.
      overrides: of every row's settings, as on the command line.
      compiled: fill in the temporaries, which takes minutes.
      told: called with each row's label.
    """
    lines = [
        "| step | GFLOP a picture | beside plain CLIP | the same, a pass | temporaries, MiB | beside plain CLIP | state, MiB |",
        "|---|---|---|---|---|---|---|",
    ]
    plain: Cost | None = None
    for row in PAGES[page]:
        told(f"{page}: {row.label}")
        config = from_file(row.config, [*row.overrides, *overrides])
        cost = step_cost(config, plain=row.plain, compiled=compiled)
        plain = plain or cost
        ratio = cost.flops / plain.flops
        passes = 1 if row.plain else student_passes(config)
        cells = [row.label, f"{cost.flops / BATCH / 1e9:.1f}", f"{ratio:.3f}", f"{ratio / passes:.3f}"]
        if cost.temporaries is not None and plain.temporaries is not None:
            cells += [f"{cost.temporaries / 2**20:.0f}", f"{cost.temporaries / plain.temporaries:.2f}"]
        else:
            cells += ["", ""]
        lines.append("| " + " | ".join([*cells, f"{cost.state / 2**20:.0f}"]) + " |")
    return "\n".join(lines) + "\n"


def write(folder: Path, pages: Mapping[str, str]) -> None:
    """Puts tables into their pages, between the marks that name this command.

    Raises:
      InputError: a page without the marks.
    """
    for page, text in pages.items():
        path = folder / f"{page}.md"
        changed, found = MARKS.subn(lambda match, text=text: f"{match[1]}\n{text}\n{match[3]}", path.read_text())
        if found != 1:
            raise InputError(f"{path}: expected one pair of marks {MARKS.pattern}, found {found}")
        atomic_write_bytes(path, changed.encode())


MARKS = re.compile(r"(<!-- cost: python -m tove_jax\.bench\.cost -->\n)(.*?)(<!-- /cost -->)", re.S)


def _abstract(config: Config, plain: bool, batch: int) -> tuple[Any, Any, Any]:
    """Returns the step, and its state and batch as shapes."""
    student, size = make_student(config), config.student.image_size
    params = {"student": jax.eval_shape(student.init, jax.random.key(0), jnp.zeros((1, size, size, 3)))["params"]}
    method = methods.get(config.method.name)
    read = () if plain else method.training_experts(config)
    if not plain:
        cards = {name: _card(config, name) for name in config.features.names}
        key = jax.random.key(0)
        params["method"] = jax.eval_shape(lambda: method.init_extra(config, cards, student.grid**2, key))
    view = View.of_student(config.student)

    def loss(params: Any, batch: dict[str, Any], key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        pixels = view.normalize(batch["pixels"])
        if plain:
            name = config.student.feature
            value = jnp.square(encode(student, params["student"], pixels, (name,), key)[name][:, 1:]).mean()
            return value, {"loss/total": value}
        outputs = method.forward(student, params, pixels, batch["features"], config, key)
        return method.objective(params.get("method", {}), outputs, batch["features"], batch, config)

    build, optimizer = state_builder(config, params)
    state = jax.eval_shape(build, params)
    given = {
        "pixels": jax.ShapeDtypeStruct((batch, size, size, 3), jnp.uint8),
        "mask": jax.ShapeDtypeStruct((batch,), bool),
        "features": {name: _features(config, name, batch) for name in read},
    }
    if isinstance(config.method, ToVEConfig) and config.method.text_weight:
        words = (batch, config.method.caption_words)
        given["captions"] = jax.ShapeDtypeStruct(words, jnp.int32)
        given["caption_mask"] = jax.ShapeDtypeStruct(words, bool)
    return make_step(config, loss, optimizer), state, given


def _card(config: Config, name: str) -> ExpertCard:
    student = config.student
    if name == "clip":
        side = student.image_size // student.patch_size
        shape, summary = (side, side, student.width), student.width
    elif name in EXPERTS:
        shape, summary = EXPERTS[name], None
    else:
        raise InputError(f"config.features.experts: no features are known of '{name}'; known: {', '.join(EXPERTS)}")
    return ExpertCard(
        name, name, "", "", "", View(student.image_size), shape[:2], shape[2], summary, has_cls_attention=name == "clip"
    )


def _features(config: Config, name: str, batch: int) -> ExpertFeatures:
    card, dtype = _card(config, name), DTYPES[config.train.dtype]
    patches = jax.ShapeDtypeStruct((batch, *card.grid, card.width), dtype)
    if name != "clip":
        return ExpertFeatures(patches)
    row = jax.ShapeDtypeStruct((batch, math.prod(card.grid)), jnp.float32)
    return ExpertFeatures(patches, jax.ShapeDtypeStruct((batch, card.width), jnp.float32), row, row)


def main(argv: list[str] | None = None) -> int:
    """Writes or prints the tables; returns 0."""
    parser = argparse.ArgumentParser(description="Cost of the training steps, for the pages of the methods.")
    parser.add_argument("pages", nargs="*", help="Pages of: " + ", ".join(PAGES) + "; all when left out.")
    parser.add_argument("--docs", type=Path, default=Path("docs/methods"), help="Folder of the pages.")
    parser.add_argument("--print", action="store_true", dest="only_print", help="Print and change no page.")
    parser.add_argument("--no-memory", action="store_true", help="Operations alone: do not compile. Implies --print.")
    parser.epilog = "Other settings: --config.SECTION.FIELD=VALUE, for every row. Implies --print."
    words = sys.argv[1:] if argv is None else argv
    overrides = [word for word in words if word.startswith("--config.")]
    args = parser.parse_args([word for word in words if word not in overrides])
    try:
        for page in args.pages or PAGES:
            if page not in PAGES:
                raise InputError(f"no page '{page}'{nearest(page, PAGES)}; pages: {', '.join(PAGES)}")
            tell = functools.partial(print, file=sys.stderr)
            found = table(page, overrides, compiled=not args.no_memory, told=tell)
            if args.only_print or args.no_memory or overrides:
                print(f"{page}\n\n{found}")
            else:
                write(args.docs, {page: found})
    except InputError as error:
        print(f"cost: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
