"""A row of the table becomes an expert: weights found, checked, adapted, cast; the card follows the size."""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from tove_jax.data.view import View
from tove_jax.errors import InputError
from tove_jax.experts import registry
from tove_jax.experts.base import ExpertCard, ExpertFeatures
from tove_jax.experts.published import Published
from tove_jax.hf.rules import Rule, flatten, to_arrays


class Patches(nn.Module):
    size: int
    dtype: object = jnp.float32

    @nn.compact
    def __call__(self, pixels):
        x = nn.Conv(6, (4, 4), (4, 4), padding="VALID", dtype=self.dtype, name="patch_embed")(pixels)
        side = self.size // 4
        position = self.param("position", nn.initializers.normal(1.0), (side, side, 6))
        return x + position.astype(self.dtype)


def features(module, params, pixels):
    x = module.apply({"params": params}, pixels)
    return ExpertFeatures(x, x.mean((1, 2)).astype(jnp.float32))


def adapt(tree, module):
    side = module.size // 4
    return {**tree, "position": np.resize(tree["position"], (side, side, 6))}


ROW = Published(
    card=ExpertCard("patches", "Patches", "ours", "someone/patches", "MIT", View(8, resize=10), (2, 2), 6, 6,
                    parameters=48 * 6 + 6 + 24),
    build=Patches,
    rules=(Rule("stem.weight", "patch_embed/kernel", (2, 3, 1, 0)), Rule("stem.bias", "patch_embed/bias"),
           Rule("pos", "position", lead=1)),
    features=features,
    ignore=(r"head\..*",),
    canonical=lambda arrays: {name.removeprefix("visual."): array for name, array in arrays.items()},
    adapt=adapt,
    multiple=4,
    extras={"sum": lambda module, params, pixels: module.apply({"params": params}, pixels).sum(-1)},
)  # fmt: skip


@pytest.fixture(scope="module")
def arrays():
    rng = np.random.default_rng(0)
    found = {f"visual.{name}": rng.normal(size=shape) for name, shape in ROW.published_shapes().items()}
    return {name: array.astype(np.float32) for name, array in found.items()} | {"head.bias": np.zeros(3, np.float32)}


@pytest.fixture(scope="module")
def folder(arrays, tmp_path_factory):
    path = tmp_path_factory.mktemp("published")
    save_file(arrays, path / "model.safetensors")
    return path


def test_loaded(folder, arrays, monkeypatch):
    monkeypatch.setitem(registry._ENTRIES, "patches", registry.entry(ROW))
    expert = registry.load("patches", weights=folder)
    assert expert.card == ROW.card == registry.describe("patches")
    assert ROW.card.parameters == sum(leaf.size for leaf in jax.tree.leaves(expert.params))
    back = to_arrays(expert.params, ROW.rules)
    assert back.keys() == ROW.published_shapes().keys()
    for name, array in back.items():
        np.testing.assert_array_equal(array, arrays[f"visual.{name}"])
    pixels = np.random.default_rng(1).integers(0, 256, (2, 8, 8, 3), np.uint8)
    found = jax.jit(expert.apply)(expert.params, pixels)
    wanted = features(Patches(8), expert.params, ROW.card.view.normalize(pixels))
    np.testing.assert_allclose(found.patches, wanted.patches, atol=1e-5)
    np.testing.assert_allclose(expert.extras["sum"](expert.params, pixels), wanted.patches.sum(-1), atol=1e-5)
    # A single file does as well as its folder.
    assert registry.load("patches", weights=folder / "model.safetensors").weights_hash == expert.weights_hash


def test_another_size_and_dtype(folder):
    card = ROW.describe(size=16)
    assert card.grid == (4, 4) and card.view == dataclasses.replace(ROW.card.view, size=16, resize=20)
    assert card.parameters == ROW.card.parameters + 12 * 6
    expert = ROW.load(weights=folder, size=16, dtype="bfloat16")
    assert expert.card == card and expert.params["position"].shape == (4, 4, 6)
    found = expert.apply(expert.params, np.zeros((1, 16, 16, 3), np.uint8))
    assert found.patches.dtype == jnp.bfloat16 and {leaf.dtype.name for leaf in jax.tree.leaves(expert.params)} == {
        "float32"
    }
    with pytest.raises(ValueError, match="expert patches: the tree does not fit an input of 16 pixels"):
        dataclasses.replace(ROW, adapt=None).load(weights=folder, size=16)


def test_the_named_file_comes_first(folder, arrays, tmp_path):
    row = dataclasses.replace(ROW, file="open_clip_model.safetensors")
    save_file(arrays, tmp_path / row.file)
    assert row.load(weights=tmp_path).weights_hash == row.load(weights=folder).weights_hash


@pytest.mark.parametrize("there", [True, False])
def test_fetched_from_the_hub(arrays, tmp_path, monkeypatch, there):
    hub = pytest.importorskip("huggingface_hub")
    row, asked = dataclasses.replace(ROW, file="open_clip_model.safetensors"), []

    def snapshot_download(name, allow_patterns):
        asked.append((name, row.file in allow_patterns))
        if asked[-1][1] == there:
            save_file(arrays, tmp_path / (row.file if there else "model.safetensors"))
        return str(tmp_path)

    monkeypatch.setattr(hub, "snapshot_download", snapshot_download)
    assert row.load().params["position"].shape == (2, 2, 6)
    assert asked == [("someone/patches", True)] + [("someone/patches", False)] * (not there)


def test_other_names_of_the_same_weights(arrays, tmp_path):
    other = tuple(dataclasses.replace(rule, name=f"other.{rule.name}") for rule in ROW.rules)
    row = dataclasses.replace(ROW, also=(other,))
    renamed = {name.replace("visual.", "other."): array for name, array in arrays.items()}
    for found in (arrays, renamed):
        save_file(found, tmp_path / "model.safetensors")
        tree = row.read(tmp_path)
        np.testing.assert_array_equal(tree["position"], arrays["visual.pos"][0])
    save_file({**renamed, "other.stem.weigth": np.zeros(1, np.float32)}, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=r"1 not known: other.stem.weigth \(1,\)"):
        row.read(tmp_path)


def test_faults(folder, arrays, tmp_path, monkeypatch):
    for options, message in (
        ({"size": 10}, "expert patches: size: expected a positive multiple of 4, found 10"),
        ({"dtype": "int8"}, "expert patches: dtype: expected float32, bfloat16, float16, found 'int8'"),
    ):
        with pytest.raises(InputError, match=message):
            ROW.load(weights=folder, **options)
        with pytest.raises(InputError, match=message):
            ROW.describe(**options)
    with pytest.raises(InputError, match=r"expert patches: .*nowhere.*published weights: someone/patches"):
        ROW.load(weights=tmp_path / "nowhere")
    for name, array, message in (
        ("visual.pos", np.full((1, 2, 2, 6), np.inf, np.float32), "position: expected finite numbers"),
        ("visual.pos", np.zeros((1, 2, 2, 6), np.int32), "position has dtype int32"),
        ("visual.pos", np.zeros((1, 3, 3, 6), np.float32), r"pos found \(1, 3, 3, 6\), expected \(1, 2, 2, 6\)"),
        ("strange", np.zeros(1, np.float32), r"1 not known: strange \(1,\)"),
    ):
        save_file({**arrays, name: array}, tmp_path / "model.safetensors")
        with pytest.raises(InputError, match=message):
            ROW.load(weights=tmp_path)


def test_names_stay_unique(monkeypatch):
    class Family:
        ROWS = (ROW, ROW)

    monkeypatch.setattr(registry, "FAMILIES", (Family,))
    with pytest.raises(ValueError, match=r"two experts are called \['patches'\]"):
        registry._collect()


def test_rules_cover_the_tree():
    assert {rule.path for rule in ROW.rules} == set(flatten(ROW.shapes()))
