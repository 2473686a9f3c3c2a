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
from flax.linen.dtypes import promote_dtype

from tove_jax.adapters.initializers import kaiming_relu, torch_linear
from tove_jax.config.schema import AdapterConfig
from tove_jax.errors import InputError, nearest

REPORTS = ("router_probs", "router_choice", "router_probs_mean", "router_choice_mean", "router_entropy")

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


class LoraExperts(nn.Module):
    """E low-rank maps ``scale * B_e(A_e(z))``, both with bias, summed with a weight for each.

    Attributes:
      features: output width d_out.
      experts: number of experts E.
      rank: rank r of each.
      scale: factor on the sum, LoRA's alpha / rank.
      b_init: ``kaiming`` as released, or ``zeros``, where the map starts as zero.
      dtype: compute dtype; parameters are float32.
    """

    features: int
    experts: int
    rank: int
    scale: float
    b_init: Literal["kaiming", "zeros"] = "kaiming"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, z: jax.Array, gate: jax.Array) -> jax.Array:
        """Applies the experts.

        Args:
          z: (..., d_in).
          gate: (..., E), the weight of each expert.

        Returns:
          (..., d_out): ``sum_e gate_e * scale * (B_e(A_e z + a_e) + b_e)``.
        """
        width, experts, rank = z.shape[-1], self.experts, self.rank
        b_init = kaiming_relu(rank) if self.b_init == "kaiming" else nn.initializers.zeros
        a_kernel = self.param("a_kernel", kaiming_relu(width), (width, experts, rank))
        a_bias = self.param("a_bias", nn.initializers.zeros, (experts, rank))
        b_kernel = self.param("b_kernel", b_init, (experts, rank, self.features))
        b_bias = self.param("b_bias", nn.initializers.zeros, (experts, self.features))
        gate = gate * self.scale
        z, gate, a_kernel, a_bias, b_kernel, b_bias = promote_dtype(
            z, gate, a_kernel, a_bias, b_kernel, b_bias, dtype=self.dtype
        )
        hidden = z @ a_kernel.reshape(width, experts * rank) + a_bias.reshape(experts * rank)
        hidden = hidden.reshape(*z.shape[:-1], experts, rank) * gate[..., None]
        # The gate rides along as E more rows of the rank, whose B is the bias.
        hidden = jnp.concatenate([hidden.reshape(*z.shape[:-1], experts * rank), gate], axis=-1)
        return hidden @ jnp.concatenate([b_kernel.reshape(experts * rank, self.features), b_bias])


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
        choice = jax.nn.one_hot(jnp.argmax(probs, axis=-1), self.experts, dtype=probs.dtype)
        gate = self._gate(probs, choice)

        def lora(name: str, z: jax.Array, features: int) -> jax.Array:
            z = nn.Dropout(self.dropout, deterministic=deterministic, name=f"{name}_dropout")(z)
            experts = LoraExperts(
                features, self.experts, self.rank, self.alpha / self.rank, self.b_init, self.dtype, name=name
            )
            return experts(z, gate)

        if self.site == "linears":
            hidden = first(x)
            hidden = activation(hidden + lora("down", x, hidden.shape[-1]))
            y = second(hidden) + lora("up", hidden, x.shape[-1])
        else:
            y = second(activation(first(x))) + lora("ffn", x, x.shape[-1])
        return y, _report(probs, choice, reports)

    def _gate(self, probs: jax.Array, choice: jax.Array) -> jax.Array:
        if self.routing == "dense":
            return probs
        if self.router_gradient == "straight_through":
            # The difference first, so that the factor is one exactly.
            return choice * (1 + (probs - jax.lax.stop_gradient(probs)))
        return choice


class Router(nn.Module):
    """One Linear and a softmax, initialised as ``torch.nn.Linear``.

    Attributes:
      experts: E.
      dtype: dtype of the product's operands; logits and softmax are float32 at the least.
    """

    experts: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns probabilities (..., E) for tokens (..., D)."""
        width = x.shape[-1]
        kernel = self.param("kernel", torch_linear(width), (width, self.experts))
        bias = self.param("bias", torch_linear(width), (self.experts,))
        precise = jnp.promote_types(self.dtype, jnp.float32)
        x, kernel = promote_dtype(x, kernel, dtype=self.dtype)
        logits = jnp.matmul(x, kernel, preferred_element_type=precise) + bias.astype(precise)
        return jax.nn.softmax(logits, axis=-1)


def _report(probs: jax.Array, choice: jax.Array, reports: frozenset[str]) -> dict[str, jax.Array]:
    found = {}
    if "router_probs" in reports:
        found["router_probs"] = probs
    if "router_choice" in reports:
        found["router_choice"] = choice
    if "router_probs_mean" in reports:
        found["router_probs_mean"] = probs.mean(axis=-2)
    if "router_choice_mean" in reports:
        found["router_choice_mean"] = choice.mean(axis=-2)
    if "router_entropy" in reports:
        found["router_entropy"] = jax.scipy.special.entr(probs).sum(axis=-1).mean(axis=-1)
    return found


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


def from_config(config: AdapterConfig, dtype: Any) -> Callable[..., nn.Module] | None:
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
    return MoleFactory(tuple(fields.items()))


class MoleFactory:
    """Builds equal MoLEs; hashable and comparable, so that modules holding it cache in jit."""

    def __init__(self, fields: tuple[tuple[str, Any], ...]):
        self.fields = fields

    def __call__(self, **more: Any) -> MoLE:
        """Returns a MoLE with these fields; ``name`` and ``parent`` may be given."""
        return MoLE(**dict(self.fields), **more)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, MoleFactory) and self.fields == other.fields

    def __hash__(self) -> int:
        return hash(self.fields)
