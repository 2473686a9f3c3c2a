"""The whole road on eight processors: a tiny run compiled, its figures, and the searches with a compiler made up."""

import dataclasses
import importlib.metadata
import json
from pathlib import Path

import jax
import pytest

from tove_jax.cli.main import main
from tove_jax.config import from_file
from tove_jax.errors import InputError
from tove_jax.experts.flops import flops
from tove_jax.parallel import make_mesh
from tove_jax.plan import compile as compiling
from tove_jax.plan.abstract import abstract_run, on_mesh, tree_bytes
from tove_jax.plan.chips import parse
from tove_jax.plan.compile import Compiled, Memory, compiled_here, library_note, needed_memory
from tove_jax.plan.report import figures, text, trials_text
from tove_jax.plan.search import changed, changes, mend, meshes, search, sizes

ROOT = Path(__file__).parents[2]
TINY = [
    "--config.student.layers=1",
    "--config.student.image_size=32",
    "--config.features.experts=('clip', 'efficientnet_lite0:64')",
    "--config.features.standardize=none",
    "--config.mesh.data=2",
    "--config.mesh.fsdp=2",
    "--config.mesh.tensor=2",
]
EIGHT = parse("cpu:8")


def config_of(name="move_kd_vit_l.py:smoke,language=none", *more):
    return from_file(str(ROOT / "configs" / name), [*TINY, *more])


@pytest.fixture(scope="module")
def compiled():
    return compiled_here(config_of(), EIGHT)


def test_memory_is_what_the_compiler_is_given(compiled):
    config = config_of()
    run = abstract_run(config)
    state, batch, experts = on_mesh(config, run, make_mesh(config.mesh))
    memory = compiled.memory
    given = tree_bytes((state, batch, experts), sharded=True)
    kinds = memory.trainable + memory.frozen + memory.optimiser + memory.experts + memory.batch
    # The counters of step and bad step are in no kind.
    assert given - 8 == kinds and 0 <= memory.padding < 0.05 * kinds + 64
    whole = tree_bytes(run.state.trainable)
    assert whole / 8 <= memory.trainable < 0.6 * whole
    assert 2 * memory.trainable <= memory.optimiser < 2 * memory.trainable + 64
    assert memory.temporaries > 0 and memory.fits and memory.estimated


def test_operations_of_the_trace_and_of_the_program_agree(compiled):
    found = compiled.roofline
    # Eight devices; tensor parallelism leaves the routers and the small adapters whole on both.
    assert compiled.step_flops <= 8 * found["flops"] < 2.5 * compiled.step_flops
    assert compiled.model_flops <= compiled.step_flops
    assert {row["kind"] for row in found["traffic"]} >= {"all-gather", "all-reduce"}
    assert found["step_s"] >= found["busy_s"] > 0


def test_accumulation_counts_all_pieces():
    whole, pieces = (abstract_run(config_of()), abstract_run(config_of("move_kd_vit_l.py:smoke,language=none", "--config.train.accumulation=2")))  # fmt: skip
    counts = [flops(run.step, run.state, run.batch, run.experts) for run in (whole, pieces)]
    assert counts[1] == pytest.approx(counts[0], rel=0.02)


@pytest.mark.parametrize("name", ["move_kd_vit_l.py:smoke", "hawaii_vit_l.py:smoke", "tove_vit_b.py"])
def test_a_batch_of_shapes_is_the_loaders(name):
    config = from_file(str(ROOT / "configs" / name), [])
    run = abstract_run(config)
    rows = {leaf.shape[0] for leaf in jax.tree.leaves(run.batch)}
    assert rows == {config.train.batch}
    assert ("text" in run.batch) == (config.language.kind != "none")
    assert ("captions" in run.batch) == bool(getattr(config.method, "text_weight", 0))
    if config.language.kind != "none":
        assert run.batch["text"]["input_ids"].shape[1] == config.text.limit
        assert any(path.startswith("language/model/") for path in run.state.frozen)


def test_experts_in_the_step_are_planned_too():
    config = from_file(str(ROOT / "configs/move_kd_vit_l.py:language=none"), ["--config.features.online=('eva02_l',)"])
    run = abstract_run(config)
    assert set(run.experts) == {"eva02_l"} and tree_bytes(run.experts) > 6e8  # 304 M in half precision
    assert set(run.batch["features"]) == {"clip", "convnext_xxl"} and run.batch["views"]


def test_a_merge_is_not_planned():
    from tove_jax.config.schema import MergeConfig

    with pytest.raises(InputError, match="plan that run in its place"):
        abstract_run(dataclasses.replace(config_of(), method=MergeConfig()))


def test_figures_and_text(compiled):
    config = config_of()
    found = figures(config, EIGHT, compiled)
    assert json.loads(json.dumps(found)) == found or found["roofline"]["traffic"]
    assert found["mesh"] == {"data": 2, "fsdp": 2, "tensor": 2} and found["fits"]
    assert found["images_a_second"] == pytest.approx(config.train.batch / found["roofline"]["step_s"])
    assert found["chip_hours"] == pytest.approx(8 * found["hours"])
    written = text(found)
    for part in ("mesh data 2 x fsdp 2 x tensor 2", "fits", "all-reduce", "MFU", "chip-hours", "an estimate"):
        assert part in written


def made_up(needed, rate=lambda config: 1.0):
    """Returns a compiler whose programs need `needed(config)` bytes and take ``1 / rate(config)`` seconds."""
    asked = []

    def compile(config, topology, *, length=None):
        asked.append(config)
        memory = Memory(0, 0, 0, 0, 0, 0, 0, int(needed(config)), 0, 100, False)
        roofline = {"step_s": 1 / rate(config), "traffic": []}
        return Compiled(memory, memory.total, roofline, 1.0, 1.0, 1, 1, 0.0)

    return compile, asked


def test_what_the_compiler_says_of_too_little_memory():
    all_of_it = "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 20.50G of 15.75G hbm."
    temporaries = (
        "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory required for HLO "
        "temporaries (17.91G) exceeds available HBM (15.75G). HLO module: jit_step."
    )
    assert needed_memory(all_of_it, 5) == int(20.5 * 2**30)
    assert needed_memory(temporaries, 5) == int(17.91 * 2**30) + 5
    assert needed_memory("INTERNAL: Mosaic failed", 5) == 0


@pytest.mark.parametrize(("found", "said"), [("0.0.42.1", False), ("0.0.4", True), ("0.0.52", True), (None, False)])
def test_a_compiler_of_another_release_is_named(found, said, monkeypatch):
    def version(name):
        if name == "libtpu" and found is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return {"libtpu": found, "jax": "0.10.2"}[name]

    asked = ["jaxlib<=0.10.2", 'libtpu==0.0.42.*; extra == "tpu"']
    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: asked)
    note = library_note()
    assert bool(note) == said
    if said:
        assert f"libtpu {found} is installed, jax 0.10.2 was released with 0.0.42.*" in note


def test_mending_takes_the_cheapest_that_fits():
    config = changed(config_of(), mesh=(8, 1, 1))
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, batch=32))
    cut, asked = made_up(lambda config: 150 / config.train.accumulation)
    trials = mend(config, EIGHT, compile=cut)
    assert [trial.fits for trial in trials] == [False, True]
    assert trials[-1].changes == ("--config.train.accumulation=2", "--config.student.remat=full")
    split, asked = made_up(lambda config: 700 / config.mesh.fsdp)
    trials = mend(config, EIGHT, compile=split, tries=9)
    assert trials[-1].fits and trials[-1].config.mesh.fsdp == 8
    assert "does not fit" in trials_text(trials) and "--config.mesh.fsdp=8" in trials_text(trials)
    never, asked = made_up(lambda config: 1000)
    assert not any(trial.fits for trial in mend(config, EIGHT, compile=never, tries=2)) and len(asked) == 2


def test_search_puts_the_best_first():
    quick = lambda config: config.mesh.fsdp * min(config.train.batch, 16)
    compile, asked = made_up(lambda config: 50 if config.mesh.data < 8 else 500, quick)
    trials = search(config_of(), EIGHT, tries=6, compile=compile)
    assert len(trials) == len(asked) <= 6
    rates = [trial.images_a_second for trial in trials if trial.fits]
    assert rates == sorted(rates, reverse=True) and trials[0].fits
    assert trials[0].config.train.batch > config_of().train.batch


def test_meshes_divide_devices_batch_heads_and_slices():
    config = config_of()  # 8 rows, 2 heads
    found = list(meshes(config, EIGHT))
    assert found[0] == (1, 8, 1) and (2, 2, 2) in found
    assert all(tensor in (1, 2) and 8 % (data * fsdp) == 0 for data, fsdp, tensor in found)
    two = list(meshes(changed(config, batch=16), parse("v5e:2x4", 2)))
    assert two and all(data % 2 == 0 for data, *_ in two)
    assert sizes(config, EIGHT) == (2, 2, 2)
    with pytest.raises(InputError, match="one that does: --config.mesh.data=1 --config.mesh.fsdp=8"):
        sizes(changed(config, mesh=(3, 1, 1)), EIGHT)
    with pytest.raises(InputError, match="no mesh does"):
        sizes(changed(config, batch=3), EIGHT)
    assert changes(config, mesh=(2, 2, 2), batch=8) == ()


def test_the_command(monkeypatch, capsys, compiled):
    monkeypatch.setattr(compiling, "compile_step", lambda config, topology, *, length=None: compiled)
    words = ["plan", f"--config={ROOT / 'configs/move_kd_vit_l.py'}:smoke,language=none", "--topology=cpu:8", *TINY]
    assert main(words) == 0
    assert "cpu:8: 8 chips" in capsys.readouterr().out
    assert main([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["mesh"]["tensor"] == 2
    assert main([*words, "--profile"]) == 0
    told = capsys.readouterr().out
    for part in ("where it goes", "MLP (forward", "attention, maps", "adapters", "losses and targets", "optimiser"):
        assert part in told
    assert main([*words[:2], "--topology=v9:2x2"]) == 2


def test_without_tpus_compiler_it_says_so(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'tove_jax\[plan\]'"):
        compiling.find_devices(parse("v5e:2x2"))


@pytest.mark.slow
def test_a_tpu_is_compiled_for():
    pytest.importorskip("libtpu", reason="TPU's compiler is not installed")
    found = compiling.compile_step(config_of(), parse("v5e:2x4"))
    assert found.memory is not None and not found.memory.estimated and found.roofline["traffic"]
