"""MoVE-KD's encoder adapters and adapter file: the released names in both directions, exact to the bit."""

from __future__ import annotations

import dataclasses
import pickle

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tove_jax.cli.main import main
from tove_jax.config.schema import Config
from tove_jax.errors import InputError
from tove_jax.files.weights import read_arrays
from tove_jax.hf import encoder_adapters, rules
from tove_jax.hf.export import (
    WHOLE_MODEL,
    export_encoder_adapters,
    export_mole_encoder,
    export_released,
    export_student,
    save_start,
)
from tove_jax.hf.load import import_encoder_adapters, import_mole_encoder, import_student, load_clip

WIDTH, TOKENS = 8, 9
GRIDS = {"sam_l": (4, 3), "eva02_l": (4, 5), "pix2struct_l": (2, 6), "convnext_xxl": (2, 7), "my_expert": (3, 4)}


def draw(experts=tuple(GRIDS), seed=0):
    """Method parameters of teachers of other token counts and widths."""
    rng = np.random.default_rng(seed)
    normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    return {
        name: {
            "channel": {"kernel": normal(GRIDS[name][1], WIDTH), "bias": normal(WIDTH)},
            "token": {"kernel": normal(GRIDS[name][0], TOKENS), "bias": normal(TOKENS)},
        }
        for name in experts
    }


def test_names_and_layout_are_the_released_ones():
    params = draw()
    arrays = encoder_adapters.to_arrays(params)
    shorts = ("sam", "eva", "pix2struct", "convnext", "my_expert")
    assert set(arrays) == {f"{s}_adapter_{n}.{leaf}" for s in shorts for n in (1, 2) for leaf in ("weight", "bias")}
    np.testing.assert_array_equal(arrays["sam_adapter_1.weight"], params["sam_l"]["channel"]["kernel"].T)
    np.testing.assert_array_equal(arrays["eva_adapter_2.weight"], params["eva02_l"]["token"]["kernel"].T)
    np.testing.assert_array_equal(arrays["convnext_adapter_2.bias"], params["convnext_xxl"]["token"]["bias"])
    with pytest.raises(InputError, match="experts 'eva02_l' and 'eva' are both called 'eva'"):
        encoder_adapters.to_arrays({"eva02_l": params["eva02_l"], "eva": params["eva02_l"]})
    with pytest.raises(InputError, match="no published name for 1 of them: sam_l/head"):
        encoder_adapters.to_arrays({"sam_l": {"head": np.zeros(3)}})


def test_the_adapter_computes_what_the_released_linears_do():
    torch = pytest.importorskip("torch")
    from tove_jax.adapters.encoder_adapter import EncoderAdapter

    params = draw(("sam_l",))
    arrays = {name: torch.from_numpy(a) for name, a in encoder_adapters.to_arrays(params).items()}
    x = np.random.default_rng(1).standard_normal((2, 2, 2, 3)).astype(np.float32)
    linear = torch.nn.functional.linear
    hidden = linear(torch.from_numpy(x).flatten(1, 2), arrays["sam_adapter_1.weight"], arrays["sam_adapter_1.bias"])
    hidden = torch.nn.functional.gelu(hidden.permute(0, 2, 1))
    theirs = linear(hidden, arrays["sam_adapter_2.weight"], arrays["sam_adapter_2.bias"]).permute(0, 2, 1)
    ours = EncoderAdapter(TOKENS, WIDTH).apply({"params": params["sam_l"]}, x)
    np.testing.assert_allclose(ours, theirs.numpy(), atol=1e-5)


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_round_trip_is_exact(tmp_path, assert_same, suffix):
    if suffix == ".bin":
        pytest.importorskip("torch")
    params = draw()
    export_encoder_adapters(params, tmp_path / f"encoder_adapter{suffix}")
    assert_same(import_encoder_adapters(tmp_path / f"encoder_adapter{suffix}"), params)
    # Interpolated targets have a channel linear alone.
    naive = {name: {"channel": parts["channel"]} for name, parts in params.items()}
    export_encoder_adapters(naive, tmp_path / f"naive{suffix}")
    assert_same(import_encoder_adapters(tmp_path / f"naive{suffix}"), naive)


def test_prefixes_half_precision_and_strangers(tmp_path):
    import ml_dtypes

    params = draw(("sam_l",))
    arrays = {f"model.{n}": a.astype(ml_dtypes.bfloat16) for n, a in encoder_adapters.to_arrays(params).items()}
    save_file({**arrays, "model.mm_projector.0.weight": np.zeros(3, np.float32)}, tmp_path / "whole.safetensors")
    found = import_encoder_adapters(tmp_path / "whole.safetensors")
    expected = arrays["model.sam_adapter_1.weight"].astype(np.float32).T
    np.testing.assert_array_equal(found["sam_l"]["channel"]["kernel"], expected)
    assert found["sam_l"]["token"]["bias"].dtype == np.float32


FAULTS = {
    "half a linear": (lambda a: a.pop("sam_adapter_2.bias"), r"1 missing: sam_adapter_2\.bias \(9,\)"),
    "no weight": (lambda a: a.pop("sam_adapter_1.weight"), r"sam_adapter_1\.weight: expected two axes, found nothing"),
    "wrong shape": (lambda a: a.update({"eva_adapter_1.bias": np.zeros(3)}), r"eva_adapter_1\.bias found \(3,\)"),
    "not a matrix": (lambda a: a.update({"eva_adapter_2.weight": np.zeros(9)}), r"found shape \(9,\)"),
    "twice": (lambda a: a.update({"m.sam_adapter_1.bias": np.zeros(8)}), "two arrays are called 'sam_adapter_1.bias'"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_adapters_that_are_not_whole_are_refused(tmp_path, fault):
    spoil, message = FAULTS[fault]
    arrays = encoder_adapters.to_arrays(draw())
    spoil(arrays)
    save_file(arrays, tmp_path / "encoder_adapter.safetensors")
    with pytest.raises(InputError, match=message) as caught:
        import_encoder_adapters(tmp_path / "encoder_adapter.safetensors")
    assert "encoder_adapter.safetensors" in str(caught.value)


def test_a_pickle_with_code_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return print, ("code ran",)

    (tmp_path / "encoder_adapter.bin").write_bytes(pickle.dumps({"sam_adapter_1.weight": Evil()}))
    with pytest.raises(InputError):
        import_encoder_adapters(tmp_path / "encoder_adapter.bin")


@pytest.fixture
def base(tmp_path, make_student, make_params):
    """A CLIP folder."""
    student = make_student("none")
    save_start(Config(student=student), make_params(student), tmp_path / "clip")
    return tmp_path / "clip"


def test_import_of_released_files_on_top_of_a_clip(tmp_path, base, make_student, make_params, assert_same, capsys):
    """As the authors' script writes them: MoLE and routers alone, under names of the whole language model."""
    torch = pytest.importorskip("torch")
    student = make_student()
    params = make_params(student, 1)
    export_mole_encoder(student, params, tmp_path / "all.safetensors", WHOLE_MODEL)
    kept = {
        name: torch.from_numpy(array)
        for name, array in load_file(tmp_path / "all.safetensors").items()
        if any(word in name for word in ("moe_down", "moe_up", "router"))
    }
    assert all(name.startswith("model.vision_tower.vision_tower.vision_model.encoder.layers.") for name in kept)
    torch.save(kept, tmp_path / "mole_encoder.bin")
    teachers = draw()
    export_encoder_adapters(teachers, tmp_path / "encoder_adapter.bin")
    command = ["import", str(base), "--adapter", str(tmp_path / "mole_encoder.bin"), "--output", str(tmp_path / "out")]
    assert main([*command, "--encoder-adapters", str(tmp_path / "encoder_adapter.bin")]) == 0
    assert "encoder adapters  convnext_xxl, eva02_l, my_expert, pix2struct_l, sam_l" in capsys.readouterr().out
    _, found = import_student(tmp_path / "out")
    tower = load_clip(base)[1]
    expected = {**rules.flatten(tower)}
    expected |= {path: leaf for path, leaf in rules.flatten(params).items() if "/adapter/" in path}
    assert_same(found, rules.unflatten(expected))
    assert_same(import_encoder_adapters(tmp_path / "out"), teachers)
    # An import of the import keeps them, and --plain leaves them out.
    assert main(["import", str(tmp_path / "out"), "--output", str(tmp_path / "again")]) == 0
    assert_same(import_encoder_adapters(tmp_path / "again"), teachers)
    assert main(["import", str(tmp_path / "out"), "--output", str(tmp_path / "start"), "--plain"]) == 0
    assert import_encoder_adapters(tmp_path / "start") == {}
    # The MoLE file has none, and a file that is not there is told.
    assert main([*command, "--encoder-adapters", str(tmp_path / "mole_encoder.bin")]) == 2
    assert "expected encoder adapters (sam_adapter_1.weight), found none" in capsys.readouterr().err
    assert main([*command, "--encoder-adapters", str(tmp_path / "gone.bin")]) == 2
    assert "gone.bin" in capsys.readouterr().err


def test_both_in_one_file(tmp_path, base, make_student, make_params, assert_same):
    student = make_student()
    params = make_params(student, 1)
    export_mole_encoder(student, params, tmp_path / "mole.safetensors")
    arrays = {**load_file(tmp_path / "mole.safetensors"), **encoder_adapters.to_arrays(draw())}
    save_file(arrays, tmp_path / "one.safetensors")
    assert_same(import_mole_encoder(tmp_path / "one.safetensors", base)[1], params)
    assert_same(import_encoder_adapters(tmp_path / "one.safetensors"), draw())
    out = str(tmp_path / "out")
    assert main(["import", str(base), "--adapter", str(tmp_path / "one.safetensors"), "--output", out]) == 0
    assert_same(import_encoder_adapters(out), draw())


@pytest.fixture
def stored(monkeypatch, make_student, make_params):
    """A run's checkpoint, as the commands read it."""
    from tove_jax.train import checkpoint

    student = make_student()
    config = Config(title="Run", student=student)
    params = {"student": make_params(student), "method": draw()}
    monkeypatch.setattr(checkpoint, "load_student", lambda workdir, step=None: (config, params, {"step": 5}))
    monkeypatch.setattr(checkpoint, "load_settings", lambda workdir, step=None: (config, {"step": 5}))
    return config, params


@pytest.mark.parametrize("form", ["released", "released-safetensors"])
def test_export_in_the_released_names(tmp_path, base, stored, assert_same, form):
    if form == "released":
        pytest.importorskip("torch")
    suffix = ".bin" if form == "released" else ".safetensors"
    config, params = stored
    for prefix in ("", WHOLE_MODEL):
        assert main(["export", f"--workdir={tmp_path}", f"--format={form}", f"--prefix={prefix}"]) == 0
        folder = tmp_path / "released"
        names = {path.name for path in folder.iterdir()}
        assert names == {f"mole_encoder{suffix}", f"encoder_adapter{suffix}"}
        assert set(read_arrays(folder / f"encoder_adapter{suffix}")) == set(
            encoder_adapters.to_arrays(params["method"])
        )
        assert f"{prefix}encoder.layers.0.mlp.moe_down.0.lora_A.weight" in read_arrays(folder / f"mole_encoder{suffix}")
        assert_same(import_mole_encoder(folder / f"mole_encoder{suffix}", base)[1], params["student"])
        assert_same(import_encoder_adapters(folder / f"encoder_adapter{suffix}"), params["method"])
    (folder / "thesis.tex").write_text("")
    assert main(["export", f"--workdir={tmp_path}", f"--format={form}"]) == 2
    assert (folder / "thesis.tex").exists()
    other = dataclasses.replace(config, method=dataclasses.replace(config.method))
    object.__setattr__(other.method, "name", "tove")
    with pytest.raises(InputError, match="only runs of 'move_kd' have released files"):
        export_released(other, params, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_export_with_encoder_adapters(tmp_path, stored, assert_same, make_params):
    from tove_jax.cli.export import export_run

    config, params = stored
    export_run(None, tmp_path, encoder_adapters=True)
    assert_same(import_encoder_adapters(tmp_path / "export"), params["method"])
    assert_same(import_student(tmp_path / "export")[1], params["student"])
    export_run(None, tmp_path)
    assert import_encoder_adapters(tmp_path / "export") == {}
    params["method"] = {}
    with pytest.raises(InputError, match="no encoder adapters to export"):
        export_run(None, tmp_path, encoder_adapters=True)
    # transformers and our own reader look at the model's file alone.
    export_student(config, make_params(config.student), tmp_path / "again", adapters=draw())
    assert not any("adapter_1" in name for name in read_arrays(tmp_path / "again"))
