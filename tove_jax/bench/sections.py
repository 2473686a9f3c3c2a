"""What `tove bench` measures, by section: each is a list of cases, and a case makes a table's rows."""

from __future__ import annotations

import dataclasses
import gc
import importlib.util
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tove_jax.bench import cases, torch_hed, torch_side
from tove_jax.bench.timing import Clock, Row, Spread, alternate, figures, rows
from tove_jax.errors import InputError
from tove_jax.train.objective import DTYPES, make_student


@dataclasses.dataclass(frozen=True)
class Scale:
    """How large everything is.

    Attributes:
      students: (size, batch of pictures), in the order in which they are measured.
      dtype: of the steps.
      tolerance: relative difference up to which two sides' losses are the same.
      turns: of each side at most.
      share: seconds of a case's turns at most.
      compiled: what `torch.compile` is tried with.
      decoders: (size in `cases.DECODERS`, whether it trains too, student, rows, tokens of a row).
      generation: decoder, rows, tokens of the prompt, tokens written.
      experts: specs of the experts whose extraction is timed, with a batch.
      exports: (size, batch) of exported encoders.
      starts: (size, batch) of training runs that are started.
      records: of the input section's stores; their grid and width are CLIP ViT-L/14's at 336 pixels unless small.
    """

    students: tuple[tuple[str, int], ...]
    dtype: str
    tolerance: float
    turns: int
    share: float
    compiled: torch_side.Compiled
    decoders: tuple[tuple[str, bool, str, int, int], ...]
    generation: tuple[str, int, int, int]
    experts: tuple[tuple[str, int], ...]
    exports: tuple[tuple[str, int], ...]
    starts: tuple[tuple[str, int], ...]
    records: int


SCALES = {
    "cpu": Scale(
        students=(("B/16-224", 2),),
        dtype="float32",
        tolerance=1e-3,
        turns=5,
        share=60.0,
        compiled="whole",
        decoders=(("0.1B", False, "B/16-224", 1, 256), ("0.1B", True, "B/16-224", 1, 256)),
        generation=("0.1B", 1, 256, 17),
        experts=(("efficientnet_lite0", 4), ("hed:112", 4), ("pp_ocr_det:160", 4)),
        exports=(("B/16-224", 1), ("B/16-224", 8)),
        starts=(("B/16-224", 2), ("L/14-336", 2)),
        records=128,
    ),
    "gpu": Scale(
        students=(("L/14-336", 64), ("B/16-224", 256)),
        dtype="bfloat16",
        tolerance=1e-2,
        turns=10,
        share=8.0,
        # All of it as one would take minutes a side.
        compiled="layers",
        decoders=(("7B", False, "L/14-336", 8, 1024), ("1B", True, "L/14-336", 8, 1024)),
        generation=("7B", 8, 640, 65),
        experts=(("efficientnet_lite0", 256), ("hed", 64), ("pp_ocr_det", 64)),
        exports=(("L/14-336", 1), ("L/14-336", 64)),
        starts=(("L/14-336", 64), ("B/16-224", 256)),
        records=512,
    ),
}


def scale_of(suite: str, small: bool) -> Scale:
    """Returns a suite's scale, or the same cases in tiny shapes, in its dtype."""
    scale = SCALES["gpu" if suite == "gpu" else "cpu"]
    if not small:
        return scale
    return dataclasses.replace(
        scale,
        students=(("tiny", 2),),
        turns=2,
        share=5.0,
        compiled="none",
        decoders=tuple(("tiny", trains, "tiny", 2, 24) for _, trains, *_ in scale.decoders),
        generation=("tiny", 2, 8, 5),
        experts=tuple((f"{spec.partition(':')[0]}:64", 2) for spec, _ in scale.experts),
        exports=(("tiny", 1), ("tiny", 3)),
        starts=(("tiny", 2),),
        records=16,
    )


class Case(NamedTuple):
    """Something to measure.

    Attributes:
      name: unique in its section.
      run: gives its rows; ends in an orderly way when the clock does.
    """

    name: str
    run: Callable[[Clock], list[Row]]


class Unmeasured(Exception):
    """What keeps a case from being measured and is no fault of ours: told in a line, without a traceback.

    Args:
      why: the line.
      details: more of it, such as the end of what a process wrote.
    """

    def __init__(self, why: str, details: str = "") -> None:
        super().__init__(why)
        self.details = details


def torch_missing() -> str:
    """Returns why torch cannot stand beside us on this device; empty: it can."""
    if importlib.util.find_spec("torch") is None:
        return "torch is not installed"
    platform = jax.default_backend()
    if platform == "cpu":
        return ""
    import torch

    return "" if platform == "gpu" and torch.cuda.is_available() else f"torch does not run on this {platform}"


def release() -> None:
    """Gives back what a case's sides held, and what torch keeps of a GPU's memory for itself."""
    gc.collect()
    if "torch" in sys.modules:
        import torch

        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def step_cases(scale: Scale) -> list[Case]:
    """Returns the training steps, each beside torch; HAWAII's and ToVE's also beside a plain tower's gradient.

    In the order of what they tell, for when time runs out. ToVE has one: its CLIP is always frozen.
    """
    found = []
    for everything in (False, True):
        for size, batch in scale.students:
            for method in ("move_kd", "hawaii", "tove"):
                if method == "tove" and everything:
                    continue
                # A HAWAII step has a pass for each teacher too; as many rows go through the tower.
                rows = max(2, batch // (1 + len(cases.TEACHERS[method]))) if method == "hawaii" else batch
                trains = "everything trains" if everything else "all but CLIP" if method == "tove" else "adapters train"
                name = f"{method} {size} batch {rows} {scale.dtype}, {trains}"
                config = cases.config_of(method, size, batch=rows, dtype=scale.dtype, everything=everything)
                found.append(Case(name, bound(_step, name, config, everything, scale)))
    return found


def bound(function: Callable[..., list[Row]], *arguments: Any) -> Callable[[Clock], list[Row]]:
    """Returns a case of a function whose last argument is the clock."""
    return lambda clock: function(*arguments, clock)


def _step(name: str, config: Any, everything: bool, scale: Scale, clock: Clock) -> list[Row]:
    step = cases.Step(config)
    sides: dict[str, Callable[[], Any]] = {"tove_jax": step}
    ours, facts, notes = [step(), step()], {"tove_jax": step.facts}, []
    if missing := torch_missing():
        notes.append(f"alone: {missing}")
    else:
        labels: dict[str, torch_side.Way] = {"torch as released": "released", "torch done well": "well"}
        for label, way in labels.items():
            try:
                other = torch_side.TorchStep(
                    config, step.params, step.batch, way, everything=everything, compiled=scale.compiled
                )
                theirs = [other.first(), other()]
            except MemoryError as error:
                notes.append(f"{label}: {error}")
                continue
            # Alike in what they compute, or not timed.
            if problem := torch_side.agree(ours, theirs, scale.tolerance):
                raise InputError(f"{name}: {label} computes something else, so it is not timed: {problem}")
            sides[label] = other
            facts[label] = {"compile_s": other.compile_s, "memory_mib": other.memory_mib(), "note": other.note}
    step.params = step.batch = None
    plain = "plain tower, its gradient"
    if config.method.name != "move_kd":
        sides[plain], facts[plain], operations = _tower(cases.plain_config(config), gradient=True)
    times = alternate(sides, scale.turns, clock, share=scale.share)
    found = rows(name, times, config.train.batch, "images", facts, flops=step.flops)
    if plain in sides:
        found[-1].facts.update(figures(operations, found[-1].seconds.median))
        if config.method.name == "hawaii":
            passes = 1 + len(config.features.names)
            notes.append(f"{1 / found[-1].ratio / passes:.2f} of {passes} plain gradients")
    found[0].facts["note"] = "; ".join(notes)
    return found


def _tower(config: Any, *, gradient: bool) -> tuple[Callable[[], Any], dict[str, Any], float]:
    """Returns what runs a student once, with its gradient by all parameters or without; facts; operations."""
    from tove_jax.models.vit import encode

    student, size = make_student(config), config.student.image_size
    params = jax.jit(student.init)(jax.random.key(0), jnp.zeros((1, size, size, 3)))["params"]
    pixels = jax.random.normal(jax.random.key(1), (config.train.batch, size, size, 3))
    feature = config.student.feature

    def loss(params: Any, pixels: jax.Array) -> jax.Array:
        return jnp.square(encode(student, params, pixels, (feature,))[feature].astype(jnp.float32)).mean()

    return cases.timed_function(jax.grad(loss) if gradient else loss, params, pixels)


def adapter_cases(scale: Scale) -> list[Case]:
    """Returns MoLE and MoLA over the plain tower, forward and with the gradient by all parameters."""
    found = []
    for size, batch in scale.students:
        for gradient in (False, True):
            name = f"{size} batch {batch} {scale.dtype}, {'forward and gradient' if gradient else 'forward'}"
            found.append(Case(name, bound(_adapters, name, size, batch, gradient, scale)))
    return found


def _adapters(name: str, size: str, batch: int, gradient: bool, scale: Scale, clock: Clock) -> list[Row]:
    mole, mola = (cases.config_of(method, size, batch=batch, dtype=scale.dtype) for method in ("move_kd", "hawaii"))
    towers = {"plain tower": cases.plain_config(mole), "MoLE": mole, "MoLA": mola}
    made = {side: _tower(config, gradient=gradient) for side, config in towers.items()}
    times = alternate({side: run for side, (run, _, _) in made.items()}, scale.turns, clock, share=scale.share)
    facts = {side: told for side, (_, told, _) in made.items()}
    found = rows(name, times, batch, "images", facts)
    for row in found:
        row.facts.update(figures(made[row.side][2], row.seconds.median))
    return found


def language_cases(scale: Scale) -> list[Case]:
    """Returns steps with a decoder, and generation."""
    found = []
    for decoder, everything, size, batch, text in scale.decoders:
        stage = "stage 2, everything trains" if everything else "stage 1, projector and adapters train"
        name = f"move_kd {size} with a {decoder} decoder, {batch} x {text} tokens, {stage}"
        config = cases.config_of(
            "move_kd", size, batch=batch, dtype=scale.dtype, everything=everything, decoder=decoder, text=text
        )
        found.append(Case(name, bound(_language_step, name, config, batch * text, scale)))
    decoder, batch, prompt, new = scale.generation
    name = f"generation, {decoder} decoder, {batch} x {prompt} tokens of prompt, {new} written"
    found.append(Case(name, bound(_generation, name, scale)))
    return found


def _language_step(name: str, config: Any, tokens: int, scale: Scale, clock: Clock) -> list[Row]:
    step = cases.Step(config)
    step.params = step.batch = None
    times = alternate({"tove_jax": step}, scale.turns, clock, share=scale.share)
    return rows(name, times, tokens, "tokens", {"tove_jax": step.facts}, flops=step.flops)


def _generation(name: str, scale: Scale, clock: Clock) -> list[Row]:
    from tove_jax.language.decode import Decoding
    from tove_jax.language.generate import generate
    from tove_jax.train.language import build

    decoder, batch, prompt, new = scale.generation
    config = cases.config_of("move_kd", "tiny", batch=1, dtype=scale.dtype, decoder=decoder, text=prompt)
    model = build(config, config.language.vocabulary, read=False)
    assert model is not None
    dtype = DTYPES[scale.dtype]

    def draw(key: jax.Array) -> Any:
        params = model.decoder.init(key, tokens=jnp.zeros((1, 1), jnp.int32))["params"]
        return jax.tree.map(lambda leaf: leaf.astype(dtype), params)

    params = jax.jit(draw)(jax.random.key(0))
    tokens = np.random.default_rng(0).integers(1, model.decoder.vocabulary, (batch, prompt))

    def write(count: int) -> Callable[[], Any]:
        return lambda: jax.block_until_ready(
            generate(model.decoder, params, tokens, decoding=Decoding(new_tokens=count, min_tokens=count))
        )

    times = alternate({"one": write(1), "all": write(new)}, scale.turns, clock, share=scale.share)
    read = rows(name, {"prompt": times["one"]}, batch * prompt, "tokens")
    # What the tokens after the first took.
    rest = [whole - one for one, whole in zip(times["one"], times["all"], strict=True)]
    if min(rest) <= 0:
        read[0].facts["note"] = "too short or too disturbed to tell what decoding took"
        return read
    spread = Spread.of(rest)
    return [*read, Row(name, "decoding", spread, batch * (new - 1), "tokens", spread.median / read[0].seconds.median)]


def extraction_cases(scale: Scale) -> list[Case]:
    """Returns the embedded experts."""
    return [
        Case(f"{spec} batch {batch} float32", bound(_extraction, f"{spec} batch {batch} float32", spec, batch, scale))
        for spec, batch in scale.experts
    ]


def _extraction(name: str, spec: str, batch: int, scale: Scale, clock: Clock) -> list[Row]:
    from tove_jax.experts import registry

    expert = registry.load(spec)
    size = expert.card.view.size
    pixels = np.random.default_rng(0).integers(0, 256, (batch, size, size, 3), np.uint8)
    run: Callable[[], Any]
    if expert.card.backend == "jax":
        run, facts, flops = cases.timed_function(expert.apply, jax.device_put(expert.params), jax.device_put(pixels))
    else:
        run, facts, flops = (lambda: expert.apply(expert.params, pixels)), {"note": "on the host's processors"}, 0.0
    sides: dict[str, Callable[[], Any]] = {"tove_jax": run}
    if spec.partition(":")[0] == "hed" and not torch_missing():
        normalized = expert.card.view.normalize(pixels)
        sides["torch"], theirs = torch_hed.hed_features(jax.device_get(expert.params), normalized)
        ours = np.asarray(expert.apply(expert.params, pixels).patches, np.float32)
        # A GPU rounds products of float32 to fewer digits unless told.
        if not np.allclose(ours, theirs, rtol=2e-2, atol=2e-2 * float(np.abs(theirs).max())):
            raise InputError(f"{name}: torch computes other features, so it is not timed")
    times = alternate(sides, scale.turns, clock, share=scale.share)
    return rows(name, times, batch, "images", {"tove_jax": facts}, flops=flops)
