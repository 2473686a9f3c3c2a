"""What LLaVA's tests share: tiny configurations, weights drawn by a rule, transformers' models of them."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path

import numpy as np

from tests.language_models import CONFIGS, draw, write_folder
from tove_jax.data.conversation import IMAGE_ID
from tove_jax.hf.llava_config import read_described
from tove_jax.hf.llava_names import TRANSFORMERS, decoder_rules, language_rules, tower_rules
from tove_jax.hf.rules import flatten, to_tree
from tove_jax.models.llava import abstract_params

IMAGE_TOKEN = 22
VISION = {
    "model_type": "clip_vision_model",
    "hidden_size": 12,
    "intermediate_size": 20,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}
LLAVA = {
    "model_type": "llava",
    "image_token_index": IMAGE_TOKEN,
    "image_seq_length": 4,
    "vision_config": VISION,
    "text_config": CONFIGS["llama"],
}
GRIDS = [[8, 16], [16, 8], [16, 16], [24, 8], [8, 24]]
NEXT = {
    **LLAVA,
    "model_type": "llava_next",
    "vision_config": {**VISION, "patch_size": 2},
    "image_grid_pinpoints": GRIDS,
}
SIZES = ((8, 30), (31, 9), (16, 16), (6, 5))
"""Height and width of pictures for `NEXT`."""


def described(config, **options):
    return read_described(config, Path("config.json"), **options)


def draw_llava(config):
    """Draws weights under the names that every release of transformers reads, by the rule of `draw`."""
    found = described(config)
    text = draw(found_text(config))
    weights = {}
    for name, array in text.items():
        weights["language_model." + name] = array
    shapes = {path: leaf.shape for path, leaf in flatten(abstract_params(found.model)).items()}
    rules = {f"student/{rule.path}": rule for rule in tower_rules(TRANSFORMERS["tower"])}
    rules |= {f"language/{rule.path}": rule for rule in language_rules(TRANSFORMERS, found.model.projector.kind)}
    names = {}
    for path, shape in shapes.items():
        if path in rules:
            names |= dict.fromkeys(rules[path].names(shape), rules[path].published_shape(shape))
    for number, name in enumerate(sorted(names)):
        drawn = np.random.RandomState(1000 + number).standard_normal(names[name])
        if "norm" in name and name.endswith("weight"):
            drawn = 1 + 0.1 * drawn
        elif len(names[name]) > 1:
            drawn = drawn * 1.5 / np.sqrt(np.prod(names[name][1:]))
        else:
            drawn = 0.3 * drawn
        weights[name] = drawn.astype(np.float32)
    if found.identity:
        width = found.model.decoder.width
        weights["multi_modal_projector.linear_2.weight"] = np.eye(width, dtype=np.float32)
        weights["multi_modal_projector.linear_2.bias"] = np.zeros(width, np.float32)
    return weights


def found_text(config):
    return {"tie_word_embeddings": False, **config["text_config"]}


def tree_of(config, arrays):
    """Our tree of arrays under the names of `draw_llava`."""
    found = described(config)
    tree = abstract_params(found.model)
    names = dict(TRANSFORMERS)
    language = {name: leaf for name, leaf in tree["language"].items() if name != "model"}

    def part(tree, rules, ignore=()):
        shapes = {path: leaf.shape for path, leaf in flatten(tree).items()}
        wanted = {name for rule in rules if rule.path in shapes for name in rule.names(shapes[rule.path])}
        return to_tree({name: array for name, array in arrays.items() if name in wanted}, rules, shapes)

    decoder = part(tree["language"]["model"], decoder_rules(names))
    beside = part(language, language_rules(names, found.model.projector.kind))
    student = part(tree["student"], tower_rules(names["tower"]))
    return {"student": student, "language": {**beside, "model": decoder}}


def in_memory(name):
    """The name of a parameter in transformers 5's module."""
    if name.startswith("language_model.lm_head"):
        return name.removeprefix("language_model.")
    if name.startswith("language_model.model."):
        return "model.language_model." + name.removeprefix("language_model.model.")
    return "model." + name.replace("vision_tower.vision_model.", "vision_tower.")


def write_llava(folder, config, weights, rename=lambda name: name, **options):
    return write_folder(folder, config, {rename(name): array for name, array in weights.items()}, **options)


def reference_llava(config, weights):
    """transformers' model with these weights."""
    import torch
    import transformers

    fields = {name: value for name, value in config.items() if name != "model_type"}
    with contextlib.redirect_stderr(io.StringIO()):
        settings = transformers.AutoConfig.for_model(config["model_type"], **json.loads(json.dumps(fields)))
        model = transformers.AutoModelForImageTextToText.from_config(settings, attn_implementation="eager").eval()
    state = {in_memory(name): torch.tensor(array) for name, array in weights.items()}
    model.load_state_dict(state, strict=not config["text_config"].get("tie_word_embeddings"))
    return model


def their_ids(input_ids):
    return np.where(input_ids == IMAGE_ID, IMAGE_TOKEN, input_ids)


def rows(pictures, tokens, *, left=True, seed=0, gap=3):
    """Token ids (B, T) of rows with so many pictures of `tokens` tokens each, text between them, and the mask."""
    random = np.random.RandomState(seed)
    made = []
    for counts in pictures:
        row = list(random.randint(3, IMAGE_TOKEN, 2))
        for count in counts:
            row += [IMAGE_ID] * count + list(random.randint(3, IMAGE_TOKEN, gap))
        made.append(row)
    length = max(map(len, made))
    ids, mask = np.zeros((len(made), length), np.int32), np.zeros((len(made), length), bool)
    for number, row in enumerate(made):
        place = slice(length - len(row), None) if left else slice(len(row))
        ids[number, place], mask[number, place] = row, True
    return ids, mask
