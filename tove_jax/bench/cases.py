"""Training steps to be timed: settings by method and size, filled with numbers that are drawn."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tove_jax import methods
from tove_jax.bench.timing import compiled_memory
from tove_jax.config.schema import (
    AdapterConfig,
    Config,
    DataConfig,
    FeaturesConfig,
    HawaiiConfig,
    LanguageConfig,
    MoveKDConfig,
    OptimConfig,
    StudentConfig,
    TextConfig,
    ToVEConfig,
    TrainConfig,
)
from tove_jax.data.conversation import IGNORED, IMAGE_ID
from tove_jax.experts.flops import flops
from tove_jax.experts.run import as_stored
from tove_jax.methods.presets import MOLA
from tove_jax.plan.abstract import abstract_cards, abstract_run
from tove_jax.plan.compile import without_remat
from tove_jax.train.initial import state_builder
from tove_jax.train.language import build, whole
from tove_jax.train.objective import make_student

SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"image_size": 32, "patch_size": 8, "width": 32, "layers": 2, "heads": 2, "mlp_width": 64},
    "B/16-224": {"image_size": 224, "patch_size": 16, "width": 768, "layers": 12, "heads": 12, "mlp_width": 3072},
    "L/14-336": {"image_size": 336, "patch_size": 14, "width": 1024, "layers": 24, "heads": 16, "mlp_width": 4096},
}
"""Students by size: CLIP's, and one for tests."""

TEACHERS = {
    "move_kd": ("clip", "eva02_l", "convnext_xxl"),
    "hawaii": ("clip", "convnext_xxl", "eva02_l"),
    "tove": ("depth", "normals", "edges", "dinov2_b", "eva02_clip_b"),
}
"""Experts of the papers; a tiny student has CLIP and one that is small."""

DECODERS: dict[str, dict[str, Any]] = {
    "tiny": {"vocabulary": 64, "width": 32, "layers": 2, "heads": 2, "kv_heads": 2, "mlp_width": 64},
    "0.1B": {"vocabulary": 32000, "width": 768, "layers": 12, "heads": 12, "kv_heads": 12, "mlp_width": 2048},
    "1B": {"vocabulary": 32000, "width": 2048, "layers": 22, "heads": 32, "kv_heads": 4, "mlp_width": 5632},
    "7B": {"vocabulary": 32000, "width": 4096, "layers": 32, "heads": 32, "kv_heads": 32, "mlp_width": 11008},
}
"""Decoders of the Llama family: two of ours, TinyLlama's shape (arXiv 2401.02385), Llama 2's and Vicuna's."""

EVERYTHING = ((".*", 1.0),)

DRAWN = 2**24 - 3
"""How many numbers of an array are drawn; no size of a picture's features divides it."""


def config_of(
    method: str,
    size: str,
    *,
    batch: int,
    dtype: str,
    everything: bool = False,
    decoder: str = "",
    text: int = 0,
    codec: str = "bf16",
) -> Config:
    """Returns the settings of a step.

    Dropout is off, so that others can compute the same loss, and no expert starts as nothing, so that all of them are
    compared.

    Args:
      method: ``move_kd``, ``hawaii``, ``tove``.
      size: in `SIZES`.
      batch: pictures.
      dtype: ``float32`` or ``bfloat16``.
      everything: train the tower too, and the decoder where there is one; otherwise adapters and what is theirs.
      decoder: in `DECODERS`; empty: none.
      text: tokens of a row of text.
      codec: of the features.
    """
    tiny = size == "tiny"
    experts = ("clip", "efficientnet_lite0:64") if tiny else TEACHERS[method]
    small: dict[str, Any] = {"hidden": 16, "stem_width": 16, "vocabulary": 16, "caption_words": 4} if tiny else {}
    known: dict[str, tuple[Any, AdapterConfig]] = {
        "move_kd": (MoveKDConfig(), AdapterConfig(dropout=0.0)),
        "hawaii": (HawaiiConfig(), dataclasses.replace(MOLA, dropout=0.0, b_init="kaiming")),
        "tove": (
            ToVEConfig(map_experts=() if tiny else ("depth", "normals", "edges"), **small),
            AdapterConfig(kind="none"),
        ),
    }
    chosen, adapter = known[method]
    rates: dict[str, Any] = {"groups": EVERYTHING} if everything else {}
    precision: Any = dtype
    language = LanguageConfig(kind="llava", **DECODERS[decoder], remat="dots") if decoder else LanguageConfig()
    return Config(
        title=f"bench {method} {size}",
        student=StudentConfig(**SIZES[size], adapter=adapter, feature="layers/-1" if method == "tove" else "layers/-2"),
        method=chosen,
        data=DataConfig(source="folder"),
        text=TextConfig(limit=text, buckets=(text,)) if decoder else TextConfig(),
        language=language,
        features=FeaturesConfig(experts=experts, codec=codec),
        optim=OptimConfig(lr=1e-4, schedule="constant", warmup=0.0, **rates),
        train=TrainConfig(steps=1000, batch=batch, dtype=precision),
    )


def plain_config(config: Config) -> Config:
    """Returns the settings of the same tower without adapters."""
    student = dataclasses.replace(config.student, adapter=AdapterConfig(kind="none"))
    return dataclasses.replace(config, student=student)


class Step:
    """A training step of drawn weights on a drawn batch, compiled; calling it takes one.

    Attributes:
      config: its settings.
      params: weights before the first step, on the host, nested.
      batch: on the host.
      flops: operations of a step by its trace, without what is computed again.
      compile_s: seconds to trace and compile.
      memory_mib: of the program, by the compiler.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        run = abstract_run(config)
        self.batch = draw_batch(config, run.batch)
        params = draw_parameters(config)
        self.params = jax.device_get({name: params[name] for name in ("student", "method")})
        plain = abstract_run(without_remat(config))
        self.flops = flops(plain.step, plain.state, plain.batch, plain.experts)
        make, _ = state_builder(config, params)
        self._state = jax.jit(make, donate_argnums=0)(params)
        del params
        self._batch = jax.device_put(self.batch)
        began = time.perf_counter()
        compiled = jax.jit(run.step, donate_argnums=0).lower(self._state, self._batch, {}).compile()
        self.compile_s = time.perf_counter() - began
        self.memory_mib = compiled_memory(compiled)
        self._compiled = compiled

    def __call__(self) -> dict[str, float]:
        """Takes a step; returns its metrics when it is done."""
        self._state, metrics = self._compiled(self._state, self._batch, {})
        jax.block_until_ready(self._state)
        return {name: float(metrics[name]) for name in ("loss/total", "optim/gradient_norm")}

    def fed(self, batches: Any, count: int) -> float:
        """Takes steps on batches of a loader, or on the one held; returns the seconds that they waited for data.

        As `tove_jax.train.loop` does: the next batch is fetched while the device works, and then the step before is
        looked at.

        Args:
          batches: an iterator; None holds one batch on the device.
          count: of steps.
        """
        waited, following, previous = 0.0, self._batch, None
        for _ in range(count):
            self._state, metrics = self._compiled(self._state, following, {})
            if batches is not None:
                began = time.perf_counter()
                batch = next(batches)
                waited += time.perf_counter() - began
                following = jax.device_put(batch)
            if previous is not None:
                float(previous["loss/total"])
            previous = metrics
        jax.block_until_ready(self._state)
        return waited

    @property
    def facts(self) -> dict[str, Any]:
        """What a table says beside the times."""
        return {"compile_s": self.compile_s, "memory_mib": self.memory_mib}


def draw_parameters(config: Config) -> dict[str, Any]:
    """Returns every parameter as its module draws it, on the devices."""
    keys = jax.random.split(jax.random.key(config.train.seed), 3)
    student, size = make_student(config), config.student.image_size
    cards = {name: as_stored(config, card) for name, card in abstract_cards(config).items()}
    params = {
        "student": jax.jit(student.init)(keys[0], jnp.zeros((1, size, size, 3)))["params"],
        "method": methods.get(config.method.name).init_extra(config, cards, student.grid**2, keys[1]),
    }
    model = build(config, config.language.vocabulary, read=False)
    if model is not None:
        params["language"] = jax.jit(lambda key: whole(model, config.student.width, key, key))(keys[2])
    return params


def draw_batch(config: Config, shapes: Any = None) -> Any:
    """Returns a batch of numbers of the right kind on the host: attention is positive and sums to one, masks are full."""
    draw = np.random.default_rng(0)

    def fill(path: Any, leaf: Any) -> np.ndarray:
        name = str(getattr(path[-1], "key", path[-1]))
        if leaf.dtype == bool:
            return np.ones(leaf.shape, bool)
        if leaf.dtype == np.uint8:
            return draw.integers(0, 256, leaf.shape, np.uint8)
        if jnp.issubdtype(leaf.dtype, jnp.integer):
            return draw.integers(1, 16, leaf.shape).astype(leaf.dtype)
        if name == "cls_attention":
            values = draw.random(leaf.shape)
            return (values / values.sum(-1, keepdims=True)).astype(leaf.dtype)
        # The summary is multiplied with tokens: larger ones would leave one teacher all the weight. Billions of numbers
        # take long to draw, so beyond some they come again.
        some = draw.standard_normal(min(math.prod(leaf.shape), DRAWN), np.float32) * (0.05 if name == "summary" else 1)
        return np.resize(some.astype(leaf.dtype), leaf.shape)

    batch = jax.tree_util.tree_map_with_path(fill, abstract_run(config).batch if shapes is None else shapes)
    if "text" in batch:
        tokens = (config.student.image_size // config.student.patch_size) ** 2
        batch["text"]["input_ids"][:, 1 : 1 + tokens] = IMAGE_ID
        batch["text"]["labels"][:, : 1 + tokens] = IGNORED
    return batch


def timed_function(function: Callable[..., Any], *arguments: Any) -> tuple[Callable[[], None], dict[str, Any], float]:
    """Compiles a function of arrays; returns what runs it once, facts for a table, and its operations."""
    began = time.perf_counter()
    compiled = jax.jit(function).lower(*arguments).compile()
    facts = {"compile_s": time.perf_counter() - began, "memory_mib": compiled_memory(compiled)}
    return lambda: jax.block_until_ready(compiled(*arguments)), facts, flops(function, *arguments)
