"""Language models in and out of folders: exact, array by array, strict; published models fit by name and shape."""

from __future__ import annotations

import dataclasses
import json
import tracemalloc

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from tests.language_models import CONFIGS, draw, names_and_shapes, reference, write_folder
from tove_jax.config.schema import MeshConfig
from tove_jax.errors import InputError
from tove_jax.files.slices import index_arrays
from tove_jax.files.weights import read_arrays
from tove_jax.hf import llama as hf
from tove_jax.hf.rules import flatten, to_tree
from tove_jax.models.llama import abstract_params
from tove_jax.parallel import make_mesh

LLAMA_7B = {
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
# As published; Vicuna 7B and 13B v1.5 have Llama 2's shapes.
PUBLISHED = {
    "llama-2-7b": (LLAMA_7B, 6_738_415_616),
    "vicuna-13b": (
        LLAMA_7B
        | {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40}
        | {"num_attention_heads": 40, "num_key_value_heads": 40},
        13_015_864_320,
    ),
    "mistral-7b": (
        LLAMA_7B
        | {"model_type": "mistral", "intermediate_size": 14336, "num_key_value_heads": 8, "sliding_window": 4096},
        7_241_732_096,
    ),
    "qwen2.5-7b": (
        LLAMA_7B
        | {"model_type": "qwen2", "vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944}
        | {"num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4},
        7_615_616_512,
    ),
    "qwen2.5-0.5b": (
        LLAMA_7B
        | {"model_type": "qwen2", "vocab_size": 151936, "hidden_size": 896, "intermediate_size": 4864}
        | {"num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2, "tie_word_embeddings": True},
        494_032_768,
    ),
}


def published_shapes(module):
    rules = {rule.path: rule for rule in hf.table()}
    return {
        name: rules[path].published_shape(leaf.shape)
        for path, leaf in flatten(abstract_params(module)).items()
        for name in rules[path].names(leaf.shape)
    }


@pytest.mark.parametrize("name", list(PUBLISHED))
def test_published_models_fit(name):
    config, parameters = PUBLISHED[name]
    module = hf.from_config(config)
    found = published_shapes(module)
    assert found == names_and_shapes(config)
    assert sum(int(np.prod(shape)) for shape in found.values()) == parameters
    torch = pytest.importorskip("torch")
    import transformers

    fields = {key: value for key, value in config.items() if key != "model_type"}
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(
            transformers.AutoConfig.for_model(config["model_type"], **fields)
        )
    theirs = {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert found == theirs


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    """A checkpoint of 20 MB in bfloat16, in shards, with its arrays."""
    config = CONFIGS["mistral"] | {
        "hidden_size": 256,
        "head_dim": 32,
        "num_attention_heads": 8,
        "intermediate_size": 512,
        "num_hidden_layers": 16,
        "vocab_size": 1024,
    }
    weights = {name: array.astype(ml_dtypes.bfloat16) for name, array in draw(config).items()}
    folder = write_folder(tmp_path_factory.mktemp("sharded") / "model", config, weights, shard_bytes=3_000_000)
    assert len(list(folder.glob("*.safetensors"))) > 5
    return folder, weights


def same_as_whole(module, params, weights):
    shapes = {path: leaf.shape for path, leaf in flatten(abstract_params(module)).items()}
    expected = flatten(to_tree(weights, hf.table(), shapes))
    found = flatten(params)
    assert sorted(found) == sorted(expected)
    for path, leaf in found.items():
        assert leaf.dtype == expected[path].dtype and leaf.shape == expected[path].shape
        assert np.asarray(leaf).tobytes() == expected[path].tobytes(), path


def test_loading_holds_one_array_at_a_time(sharded):
    """Bytes that NumPy holds at once while a checkpoint is read; the devices' own memory is not counted."""
    folder, weights = sharded
    hf.load(folder)  # compiles
    tracemalloc.start()
    module, params = hf.load(folder)
    jax.block_until_ready(params)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    same_as_whole(module, params, weights)
    total, largest = sum(a.nbytes for a in weights.values()), max(a.nbytes for a in weights.values())
    # A chunk beside the array it goes into; Python's own objects.
    assert peak < 2 * largest + 1_000_000 < total / 8, (peak, largest, total)


def test_loading_onto_a_mesh_and_back(sharded, tmp_path):
    folder, weights = sharded
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    module, params = hf.load(folder, mesh=mesh)
    same_as_whole(module, params, weights)
    kernel = params["layers"]["attention"]["query"]["kernel"]
    assert kernel.sharding.shard_shape(kernel.shape) == (16, 128, 128)
    assert params["head"]["kernel"].sharding.shard_shape((256, 1024)) == (128, 512)
    config = json.loads((folder / "config.json").read_text())
    hf.export(
        module, params, tmp_path / "out", config=config, shard_bytes=4_000_000, generation={"eos_token_id": [2, 5]}
    )
    back = read_arrays(tmp_path / "out")
    assert sorted(back) == sorted(weights)
    for name, array in back.items():
        assert array.dtype == weights[name].dtype and array.tobytes() == weights[name].tobytes(), name
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == config | {"dtype": "bfloat16"}
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 4
    assert hf.end_tokens(tmp_path / "out") == (2, 5) and hf.end_tokens(folder) == ()

    # The same numbers from the split parameters as from whole ones.
    tokens = np.arange(12).reshape(2, 6)
    run = jax.jit(lambda params: module.apply({"params": params}, tokens)[0])
    with jax.set_mesh(mesh):
        split = np.asarray(run(params))
    np.testing.assert_allclose(split, run(jax.tree.map(np.asarray, params)), atol=1e-3)


@pytest.mark.parametrize("name", list(CONFIGS))
def test_exports_load_in_transformers(name, tmp_path):
    """Our own config.json of every kind, and the arrays, read by transformers."""
    torch = pytest.importorskip("torch")
    import transformers

    config, weights = CONFIGS[name], draw(CONFIGS[name])
    folder = write_folder(tmp_path / "in", config, weights)
    module, params = hf.load(folder, store=jnp.float32)
    hf.export(module, params, tmp_path / "out")
    assert hf.from_config(json.loads((tmp_path / "out" / "config.json").read_text())) == module
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="eager")
    tokens = torch.tensor(np.random.RandomState(1).randint(0, 23, (1, 10)))
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, reference(config, weights)(tokens).logits)


def test_configs_of_transformers_five_are_read():
    pytest.importorskip("torch")
    import transformers

    for config in CONFIGS.values():
        fields = {key: value for key, value in config.items() if key != "model_type"}
        written = transformers.AutoConfig.for_model(config["model_type"], **fields).to_dict()
        assert "rope_parameters" in written
        assert hf.from_config(written) == hf.from_config(config)


def change(config, **fields):
    return {**CONFIGS[config], **fields}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (change("llama", model_type="lama"), "model_type.*did you mean 'llama'"),
        (change("llama", hidden_act="gelu"), "hidden_act"),
        (change("llama", rope_scaling={"rope_type": "yarn", "factor": 2.0}), "yarn"),
        (change("llama", rope_scaling={"type": "linear"}), "factor"),
        (change("llama", num_key_value_heads=3), "do not fit"),
        (change("qwen2", layer_types=["sliding_attention", "full_attention", "full_attention"]), "layer_types"),
    ],
)
def test_bad_configs(config, message):
    with pytest.raises(InputError, match=message):
        hf.from_config(config)


def test_bad_arrays(tmp_path):
    config, weights = CONFIGS["llama"], draw(CONFIGS["llama"])
    head, query = "lm_head.weight", "model.layers.1.self_attn.q_proj.weight"
    broken = {name: array for name, array in weights.items() if name != head}
    broken[query] = broken[query][:3]
    broken["model.layers.2.mlp.up_proj.weight"] = weights[query]
    folder = write_folder(tmp_path / "broken", config, broken)
    with pytest.raises(
        InputError, match=f"1 missing: {head}.*1 not known: model.layers.2.*1 of another shape: {query}"
    ):
        hf.load(folder)
    # A tied head and old buffers are left out.
    tied = weights | {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(2, np.float32)}
    module, params = hf.load(write_folder(tmp_path / "tied", config | {"tie_word_embeddings": True}, tied))
    assert "head" not in params
    with pytest.raises(InputError, match="head/kernel: found nothing"):
        hf.export(module.clone(tied=False), params, tmp_path / "out")
    with pytest.raises(InputError, match="another language model"):
        hf.export(module, params, tmp_path / "out", config=config)
    assert not (tmp_path / "out").exists()
    with pytest.raises(InputError, match="no model with this window"):
        hf.to_config(dataclasses.replace(module, biases=("out",)))


def test_old_spellings(tmp_path):
    """A folder's rows stay the same whatever order and shards its index has; a lost shard is named."""
    weights = draw(CONFIGS["llama"])
    folder = write_folder(tmp_path / "model", CONFIGS["llama"], weights, shard_bytes=3000)
    arrays = index_arrays(folder)
    assert {name: stored.shape for name, stored in arrays.items()} == names_and_shapes(CONFIGS["llama"])
    next(iter(sorted(folder.glob("*-00002-*")))).unlink()
    with pytest.raises(InputError, match="00002.*is missing"):
        hf.load(folder)
