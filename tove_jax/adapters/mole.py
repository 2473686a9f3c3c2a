"""MoLE: LoRA experts in the MLP of a transformer, chosen a token at a time (MoVE-KD, arXiv 2501.01709).

All experts are two matrix products: their A are concatenated along the rank, the blocks of the
rank that the router did not choose are masked, and the concatenated B follow. Top-1 and dense
routing differ in the mask alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from tove_jax.adapters import router as routers
from tove_jax.adapters.lora import AdapterFactory, LoraWeights, apply_lora
from tove_jax.adapters.router import Router
from tove_jax.config.schema import AdapterConfig
from tove_jax.errors import InputError, nearest

REPORTS = tuple(f"router_{kind}" for kind in routers.KINDS)

LOGICAL_AXES = (
    (r"(.*/)?layers/mlp/adapter/router/kernel", ("layers", "embed", "expert")),
    (r"(.*/)?layers/mlp/adapter/router/bias", ("layers", "expert")),
    (r"(.*/)?layers/mlp/adapter/(down|ffn)/a_kernel", ("layers", "embed", "expert", "rank")),
    (r"(.*/)?layers/mlp/adapter/up/a_kernel", ("layers", "mlp", "expert", "rank")),
    (r"(.*/)?layers/mlp/adapter/(down|up|ffn)/a_bias", ("layers", "expert", "rank")),
    (r"(.*/)?layers/mlp/adapter/down/b_kernel", ("layers", "expert", "rank", "mlp")),
    (r"(.*/)?layers/mlp/adapter/(up|ffn)/b_kernel", ("layers", "expert", "rank", "embed")),
    (r"(.*/)?layers/mlp/adapter/down/b_bias", ("layers", "expert", "mlp")),
    (r"(.*/)?layers/mlp/adapter/(up|ffn)/b_bias", ("layers", "expert", "embed")),
)


class MoLE(nn.Module):
    """Mixture of LoRA experts beside one MLP, with one router for the whole MLP.

        P = softmax(x W_r + b_r),  i = argmax P
        u = fc1(x) + down_i(dropout(x)),  y = fc2(act(u)) + up_i(dropout(act(u)))      site "linears"
        y = fc2(act(fc1(x))) + ffn_i(dropout(x))                                       site "ffn"

    Dense routing weighs every expert by P in place of the choice. Top-1 does not multiply by P, so
    only the balance loss trains the router, unless ``router_gradient`` is ``straight_through``:
    then the chosen output is multiplied by ``1 + (P_i - stop_gradient(P_i))``, which changes nothing
    forward (ours). Parameters: ``router/{kernel,bias}`` and, for ``linears``, ``down/`` beside fc1
    and ``up/`` beside fc2, or, for ``ffn``, ``ffn/`` from the MLP's input to its output; each with
    ``a_kernel (d_in, E, r), a_bias (E, r), b_kernel (E, r, d_out), b_bias (E, d_out)``.

    Attributes:
      experts: E.
      rank: r.
      alpha: LoRA's alpha; the scale is alpha / rank.
      dropout: rate before A, when not deterministic.
      routing: ``top1`` or ``dense``.
      site: ``linears`` or ``ffn``.
      b_init: ``kaiming`` or ``zeros``.
      router_gradient: ``none`` or ``straight_through``; dense routing has a gradient anyway.
      dtype: compute dtype; the router's softmax is float32 at the least.
    """

    experts: int = 3
    rank: int = 32
    alpha: float = 1.0
    dropout: float = 0.05
    routing: Literal["top1", "dense"] = "top1"
    site: Literal["linears", "ffn"] = "linears"
    b_init: Literal["kaiming", "zeros"] = "kaiming"
    router_gradient: Literal["none", "straight_through"] = "none"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        first: Callable[[jax.Array], jax.Array],
        activation: Callable[[jax.Array], jax.Array],
        second: Callable[[jax.Array], jax.Array],
        *,
        inputs: Any = None,
        deterministic: bool = True,
        reports: frozenset[str] = frozenset(),
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Runs the MLP with its experts.

        Args:
          x: (B, T, D) input of the MLP.
          first, activation, second: the MLP's own maps, D -> F, F -> F, F -> D.
          inputs: pytree given to every layer's adapter alike; MoLE takes none.
          deterministic: no dropout; otherwise the rng ``dropout`` is needed.
          reports: which of `REPORTS` to compute.

        Returns:
          (B, T, D), and the reports: ``router_probs`` and ``router_choice`` (one-hot of the argmax)
          (B, T, E), their means over tokens ``router_probs_mean`` and ``router_choice_mean``
          (B, E), and ``router_entropy`` (B,), the mean entropy of P in nats. The choice has no
          gradient.

        Raises:
          InputError: an unknown report, or ``inputs`` that are not None.
        """
        if inputs is not None:
            raise InputError("MoLE takes no adapter inputs, found some")
        for name in reports:
            if name not in REPORTS:
                raise InputError(f"MoLE: no report '{name}'{nearest(name, REPORTS)}; reports: {', '.join(REPORTS)}")
        probs = Router(self.experts, self.dtype, name="router")(x)
        choice = routers.choose(probs)
        gate = probs if self.routing == "dense" else routers.top1_gate(probs, choice, self.router_gradient)

        def lora(name: str, z: jax.Array, features: int) -> jax.Array:
            z = nn.Dropout(self.dropout, deterministic=deterministic, name=f"{name}_dropout")(z)
            weights = LoraWeights(z.shape[-1], features, self.experts, self.rank, self.b_init, bias=True, name=name)
            return apply_lora(weights(), z, gate, self.alpha / self.rank, self.dtype)

        if self.site == "linears":
            hidden = first(x)
            hidden = activation(hidden + lora("down", x, hidden.shape[-1]))
            y = second(hidden) + lora("up", hidden, x.shape[-1])
        else:
            y = second(activation(first(x))) + lora("ffn", x, x.shape[-1])
        return y, routers.report("router_", probs, choice, reports)


def balance_loss(probs_mean: jax.Array, choice_mean: jax.Array, pool: Literal["all", "layer"] = "all") -> jax.Array:
    """Returns the balance loss of each sample, ``sum_e P_e f_e``; 1/E when the load is even.

    Args:
      probs_mean: (L, B, E) mean router probability over tokens, a layer each.
      choice_mean: (L, B, E) mean one-hot choice; no gradient flows through it.
      pool: ``all`` takes P and f over all layers and tokens of a sample, as released; ``layer``
        takes them a layer at a time and averages the products, so that no layer may lean on another.

    Returns:
      (B,).
    """
    choice_mean = jax.lax.stop_gradient(choice_mean)
    if pool == "all":
        return (probs_mean.mean(axis=0) * choice_mean.mean(axis=0)).sum(axis=-1)
    return (probs_mean * choice_mean).sum(axis=-1).mean(axis=0)


def from_config(config: AdapterConfig, dtype: Any) -> AdapterFactory | None:
    """Returns a factory ``(name=...) -> MoLE`` for the student's blocks, or None for no adapter."""
    if config.kind == "none":
        return None
    fields = {
        "experts": config.experts,
        "rank": config.rank,
        "alpha": config.alpha,
        "dropout": config.dropout,
        "routing": config.routing,
        "site": config.site,
        "b_init": config.b_init,
        "router_gradient": config.router_gradient,
        "dtype": dtype,
    }
    return AdapterFactory(MoLE, fields)
