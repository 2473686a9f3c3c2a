"""RoBERTa in and out of folders: exact, strict, what is fresh is told; published models fit by name and shape."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from tests.language_models import write_folder
from tests.roberta_models import CONFIG, ENCODER, PICTURES, draw, names_and_shapes, reference
from tove_jax.config.schema import MeshConfig
from tove_jax.errors import InputError
from tove_jax.files.weights import read_arrays
from tove_jax.hf import roberta as hf
from tove_jax.hf.rules import flatten, to_tree, unflatten
from tove_jax.models.roberta import abstract_params
from tove_jax.parallel import make_mesh

TOKENS = np.random.RandomState(1).randint(3, 23, (2, 8))
BASE = ENCODER | {
    "vocab_size": 50265,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 514,
}
PUBLISHED = {
    "roberta-base": (BASE, 124_697_433),
    "roberta-large": (
        BASE | {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24} | {"num_attention_heads": 16},
        355_412_057,
    ),
}


@pytest.mark.parametrize("name", list(PUBLISHED))
def test_published_models_fit(name):
    config, parameters = PUBLISHED[name]
    rules = {rule.path: rule for rule in hf.table()}
    found = {
        name: rules[path].published_shape(leaf.shape)
        for path, leaf in flatten(abstract_params(hf.from_config(config))).items()
        for name in rules[path].names(leaf.shape)
    }
    assert found == names_and_shapes(config)
    assert sum(int(np.prod(shape)) for shape in found.values()) == parameters
    torch = pytest.importorskip("torch")
    import transformers

    fields = {key: value for key, value in config.items() if key != "model_type"}
    with torch.device("meta"):
        model = transformers.RobertaForMaskedLM(transformers.RobertaConfig(**fields))
    assert found == {name: tuple(p.shape) for name, p in model.named_parameters()}


def same(params, weights, but=()):
    """The tree holds these published arrays to the bit."""
    leaves = {path: leaf for path, leaf in flatten(params).items() if path not in but}
    expected = flatten(to_tree(weights, hf.table(), {path: leaf.shape for path, leaf in leaves.items()}))
    for path, leaf in leaves.items():
        assert np.asarray(leaf).tobytes() == expected[path].tobytes(), path


def groups(paths):
    return {"/".join(path.split("/")[: 2 if path.startswith("layers/") else 1]) for path in paths}


def test_what_a_published_file_lacks_is_drawn(tmp_path):
    weights = draw(ENCODER)
    buffer = {"roberta.embeddings.position_ids": np.arange(34)[None]}
    folder = write_folder(tmp_path / "published", ENCODER, weights | buffer)
    module, params, fresh = hf.load(folder, picture_width=12, adaptor_width=6, rng=jax.random.key(1))
    assert groups(fresh) == {"layers/cross", "layers/cross_norm", "layers/adaptor", "layers/adaptor_norm"}
    same(params, weights, fresh)
    drawn = params["layers"]["cross"]["key"]["kernel"]
    assert drawn.shape == (2, 12, 16) and (drawn[0] != drawn[1]).any()
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    split = hf.load(folder, mesh=mesh, picture_width=12, adaptor_width=6, rng=jax.random.key(1), store=jnp.bfloat16)
    kernel = split.params["layers"]["cross"]["key"]["kernel"]
    assert kernel.sharding.shard_shape(kernel.shape) == (2, 6, 8)
    for ours, theirs in zip(jax.tree.leaves(split.params), jax.tree.leaves(params), strict=True):
        np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs).astype(ml_dtypes.bfloat16))


def test_a_pickled_encoder_without_prefix(tmp_path):
    torch = pytest.importorskip("torch")
    weights = {name: array for name, array in draw(ENCODER).items() if not name.startswith("lm_head")}
    state = {name.removeprefix("roberta."): torch.tensor(array) for name, array in weights.items()}
    state |= {"pooler.dense.weight": torch.zeros(16, 16), "pooler.dense.bias": torch.zeros(16)}
    state["embeddings.position_ids"] = torch.arange(34)[None]
    (tmp_path / "config.json").write_text(json.dumps(ENCODER))
    torch.save(state, tmp_path / "pytorch_model.bin")
    _, params, fresh = hf.load(tmp_path)
    assert groups(fresh) == {"head"}
    same(params, weights, fresh)


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path / "in", CONFIG, draw(CONFIG))


def logits_of_folder(folder):
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    with torch.no_grad():
        return model(torch.tensor(TOKENS), encoder_hidden_states=torch.tensor(PICTURES[:2])).logits.numpy()


def test_exports_load_in_transformers(folder, tmp_path):
    module, params, fresh = hf.load(folder)
    assert fresh == ()
    config = CONFIG | {"bos_token_id": 0, "hidden_dropout_prob": 0.2}
    hf.export(module, params, tmp_path / "out", config=config, generation={"eos_token_id": 2}, shard_bytes=4000)
    back, weights = read_arrays(tmp_path / "out"), draw(CONFIG)
    assert sorted(back) == sorted(weights) and all(back[name].tobytes() == weights[name].tobytes() for name in back)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["hidden_dropout_prob"] == 0.2 and written["model_type"] == "roberta"
    assert hf.from_config(written) == module
    torch = pytest.importorskip("torch")
    with torch.no_grad():
        theirs = reference()(torch.tensor(TOKENS), encoder_hidden_states=torch.tensor(PICTURES[:2])).logits
    np.testing.assert_array_equal(logits_of_folder(tmp_path / "out"), theirs.numpy())


def tree_of(module):
    """Numbers for every parameter, adaptors as they are fresh."""
    drawn = np.random.RandomState(0)
    leaves = flatten(abstract_params(module))
    leaves = {path: 0.5 * drawn.standard_normal(leaf.shape).astype(np.float32) for path, leaf in leaves.items()}
    leaves |= {path: np.zeros_like(leaf) for path, leaf in leaves.items() if path.startswith("layers/adaptor/up/")}
    return leaves | {f"layers/cross_norm/{part}": np.full((2, 16), number, np.float32)
                     for part, number in (("scale", 1.5), ("bias", 0.2))}  # fmt: skip


def test_adaptors_go_out_only_where_they_add_nothing(tmp_path):
    module = hf.from_config(CONFIG, adaptor_width=6)
    leaves = tree_of(module)
    hf.export(module, unflatten(leaves), tmp_path / "silent")
    loud = leaves | {"layers/adaptor/up/bias": np.ones((2, 16), np.float32)}
    with pytest.raises(InputError, match="has no adaptors, and these change the text; own=True"):
        hf.export(module, unflatten(loud), tmp_path / "refused")
    wide = module.clone(picture_width=12, adaptor_width=0)
    with pytest.raises(InputError, match="as wide as its text, 16, found 12; own=True"):
        hf.export(wide, unflatten(tree_of(wide)), tmp_path / "refused")
    assert not (tmp_path / "refused").exists()
    hf.export(module, unflatten(loud), tmp_path / "own", own=True)
    again, back, fresh = hf.load(tmp_path / "own")
    assert again == module and fresh == ()
    for path, leaf in flatten(back).items():
        np.testing.assert_array_equal(leaf, loud[path])
    assert hf.from_config(hf.to_config(wide)) == wide
    ours, _ = jax.jit(lambda p: module.apply({"params": p}, TOKENS, pictures=PICTURES[:2]))(unflatten(leaves))
    pytest.importorskip("torch")
    np.testing.assert_allclose(logits_of_folder(tmp_path / "silent"), ours, atol=1e-3)
    with pytest.raises(ValueError, match=hf.OWN):
        logits_of_folder(tmp_path / "own")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "bert"}, "model_type: expected roberta"),
        ({"hidden_act": "relu"}, "hidden_act: expected 'gelu'"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings: expected True"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type"),
        ({"num_attention_heads": 3}, "do not fit"),
    ],
)
def test_bad_configs(fields, message):
    with pytest.raises(InputError, match=message):
        hf.from_config(CONFIG | fields)


def test_bad_arrays(tmp_path):
    """A part of cross-attention alone is no cross-attention; unknown arrays are named."""
    weights = draw(CONFIG)
    lost = "roberta.encoder.layer.1.crossattention.self.key.bias"
    broken = {name: array for name, array in weights.items() if name != lost}
    broken["roberta.encoder.layer.2.output.dense.bias"] = np.ones(16, np.float32)
    folder = write_folder(tmp_path / "broken", CONFIG, broken)
    with pytest.raises(InputError, match=f"1 missing: {lost}.*1 not known: roberta.encoder.layer.2"):
        hf.load(folder)
    # Cross-attention that is not asked for is left in the file.
    module, params, _ = hf.load(write_folder(tmp_path / "whole", CONFIG, weights), picture_width=0)
    assert "cross" not in params["layers"]
    with pytest.raises(InputError, match="do not fit the language model.*head/bias"):
        hf.export(module, params | {"head": {}}, tmp_path / "out")
