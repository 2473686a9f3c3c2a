"""MoLA: teacher-specific and general LoRA experts in the MLP of a transformer (HAWAII, arXiv 2506.19072).

Every token goes to one expert of each of two groups, chosen by two routers; or, when a teacher's
expert is forced, to that one alone. All experts of a site are two matrix products (see
`tove_jax.adapters.lora`): routed and forced rows differ in the mask.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from tove_jax.adapters import router as routers
from tove_jax.adapters.lora import AdapterFactory, LoraWeights, apply_lora, dora_change, join
from tove_jax.adapters.router import MlpRouter
from tove_jax.config.schema import AdapterConfig
from tove_jax.errors import InputError, nearest

ROUTED = -1
"""In ``inputs["forced"]``: no expert is forced."""

GROUPS = ("teacher", "general")

_SITES = r"(.*/)?layers/mlp/adapter/(teacher|general)_"
_ROUTERS = r"(.*/)?layers/mlp/adapter/router_(teacher|general)/"
LOGICAL_AXES = (
    (_ROUTERS + "hidden/kernel", ("layers", "embed", None)),
    (_ROUTERS + "hidden/bias", ("layers", None)),
    (_ROUTERS + "out/kernel", ("layers", None, "expert")),
    (_ROUTERS + "out/bias", ("layers", "expert")),
    (_SITES + "(down|ffn)/a_kernel", ("layers", "embed", "expert", "rank")),
    (_SITES + "up/a_kernel", ("layers", "mlp", "expert", "rank")),
    (_SITES + "down/b_kernel", ("layers", "expert", "rank", "mlp")),
    (_SITES + "(up|ffn)/b_kernel", ("layers", "expert", "rank", "embed")),
    (_SITES + "down/magnitude", ("layers", "expert", "mlp")),
    (_SITES + "up/magnitude", ("layers", "expert", "embed")),
)


class MoLA(nn.Module):
    """Mixture of N_t teacher-specific and N_g general LoRA experts beside one MLP.

        i = argmax f_t(x),  j = argmax f_g(x)                       two routers: Linear, GELU, Linear, softmax
        u = fc1(x) + down_i(x) + down_j(x),  y = fc2(act(u)) + up_i(act(u)) + up_j(act(u))    site "linears" (ours)
        y = fc2(act(fc1(x))) + ffn_i(x) + ffn_j(x)                                            site "ffn", as printed

    The experts' outputs are added as they are, with ``router_gradient`` ``straight_through`` times
    ``1 + (P - stop_gradient(P))``, which changes nothing forward (ours). Where teacher expert i is
    forced, it alone is added and no router has a say.

    Experts are ``alpha / rank * B(A(dropout(.)))``, without bias. With ``dora`` (sites "linears"
    only) expert e turns the linear W beside it into ``c_e * (W + alpha / rank * A_e B_e)``, where
    ``c_e = m_e / ||W + alpha / rank * A_e B_e||`` a column, and what it adds is the difference from W:

        (c_e - 1) * (W z) + c_e * alpha / rank * B_e(A_e(dropout(z)))

    Parameters: ``router_{teacher,general}/{hidden,out}/{kernel,bias}``, and for each group and site
    ``{teacher,general}_{down,up}`` or ``{teacher,general}_ffn`` the ``a_kernel (d_in, N, r)``, ``b_kernel
    (N, r, d_out)`` and with ``dora`` ``magnitude (N, d_out)``. Nothing is made for an empty group.

    Attributes:
      teacher_experts: N_t, at least 1.
      general_experts: N_g; 0 leaves the group and its router out.
      rank: r.
      alpha: LoRA's alpha.
      dropout: rate before A, when not deterministic.
      site: ``linears`` or ``ffn``.
      b_init: ``zeros`` (each expert starts as nothing) or ``kaiming``.
      router_width: hidden width of the routers.
      router_gradient: ``none`` or ``straight_through``.
      dora: see above.
      dtype: compute dtype; the routers' softmax and DoRA's norms are float32 at the least.
    """

    teacher_experts: int
    general_experts: int = 3
    rank: int = 32
    alpha: float = 32.0
    dropout: float = 0.05
    site: Literal["linears", "ffn"] = "linears"
    b_init: Literal["kaiming", "zeros"] = "zeros"
    router_width: int = 256
    router_gradient: Literal["none", "straight_through"] = "straight_through"
    dora: bool = False
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
          first, activation, second: the MLP's own maps, D -> F, F -> F, F -> D; with ``dora`` the first
            and the last are bound `flax.linen.Dense`, whose kernels are read.
          inputs: None, which routes every row; or ``{"forced": ...}`` with an int array (B,), a row's
            forced teacher expert or `ROUTED`; or with a tuple of ints, one for each of the equal
            passes that lie side by side in the batch (row ``b * len(forced) + p`` is pass p), the routed
            ones first. The tuple is known while tracing, so that routers run on routed rows alone.
          deterministic: no dropout; otherwise the rng ``dropout`` is needed.
          reports: which of `report_names` to compute.

        Returns:
          (B, T, D), and the reports of the rows whose routers ran (with an array of ``forced`` all of
          them; what they say of forced rows has no effect): for each group ``router_{group}_`` and
          one of `tove_jax.adapters.router.KINDS`.

        Raises:
          InputError: an unknown report, ``inputs`` of another form, an expert that is not there.
        """
        gate, found = self._gate(x, self._forced(inputs, x.shape[0]), reports)

        def experts(site: str, z: jax.Array, features: int) -> Any:
            weights = [
                LoraWeights(
                    z.shape[-1], features, count, self.rank, self.b_init, False, self.dora, name=f"{group}_{site}"
                )()
                for group, count in zip(GROUPS, self._counts(), strict=True)
                if count
            ]
            dropped = nn.Dropout(self.dropout, deterministic=deterministic, name=f"{site}_dropout")(z)
            return join(weights), dropped

        def beside(site: str, z: jax.Array, linear: Any) -> jax.Array:
            y = linear(z)
            weights, dropped = experts(site, z, y.shape[-1])
            scale = self.alpha / self.rank
            if self.dora:
                base = linear.variables["params"]
                change = dora_change(weights, base["kernel"], scale)
                weights = weights._replace(b_kernel=weights.b_kernel * (1 + change)[:, None])
                stretch = (gate.astype(change.dtype) @ change).astype(y.dtype)
                y = y + stretch * (y - base["bias"].astype(y.dtype))
            return y + apply_lora(weights, dropped, gate, scale, self.dtype)

        if self.site == "linears":
            return beside("up", activation(beside("down", x, first)), second), found
        if self.dora:
            raise InputError("student.adapter.dora: needs the weight of a linear, so site 'linears', found site 'ffn'")
        weights, dropped = experts("ffn", x, x.shape[-1])
        added = apply_lora(weights, dropped, gate, self.alpha / self.rank, self.dtype)
        return second(activation(first(x))) + added, found

    def _counts(self) -> tuple[int, int]:
        return self.teacher_experts, self.general_experts

    def _forced(self, inputs: Any, rows: int) -> jax.Array | tuple[int, ...]:
        """Returns ``inputs["forced"]``, checked."""
        if inputs is None:
            return (ROUTED,)
        if not isinstance(inputs, dict) or set(inputs) != {"forced"}:
            raise InputError(f"MoLA: expected adapter inputs {{'forced': ...}}, found {inputs!r}")
        forced = inputs["forced"]
        if not isinstance(forced, tuple):
            if jnp.shape(forced) != (rows,):
                raise InputError(f"MoLA: forced: expected one expert a row ({rows},), found {jnp.shape(forced)}")
            return jnp.asarray(forced)
        routed = sum(expert == ROUTED for expert in forced)
        if not forced or rows % len(forced) or any(e != ROUTED for e in forced[:routed]):
            raise InputError(
                f"MoLA: forced: expected passes that divide {rows} rows, routed ones first, found {forced}"
            )
        if any(not 0 <= expert < self.teacher_experts for expert in forced[routed:]):
            raise InputError(f"MoLA: forced: there are {self.teacher_experts} teacher experts, found {forced}")
        return forced

    def _gate(
        self, x: jax.Array, forced: jax.Array | tuple[int, ...], reports: frozenset[str]
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Returns the weight of every expert, (B, T, N_t + N_g), teachers' first, and the reports."""
        rows, tokens, width = x.shape
        passes, routed = 1, 1
        if isinstance(forced, tuple):
            passes, routed = len(forced), sum(expert == ROUTED for expert in forced)
        folded = x.reshape(rows // passes, passes, tokens, width)[:, :routed]
        gates, found = self._route(folded.reshape(-1, tokens, width), reports)
        experts = sum(self._counts())
        if not isinstance(forced, tuple):
            alone = jax.nn.one_hot(forced, experts, dtype=gates.dtype)[:, None]
            return jnp.where((forced >= 0)[:, None, None], alone, gates), found
        gates = gates.reshape(rows // passes, routed, tokens, experts)
        if passes > routed:
            alone = jax.nn.one_hot(jnp.array(forced[routed:]), experts, dtype=gates.dtype)
            alone = jnp.broadcast_to(alone[None, :, None], (rows // passes, passes - routed, tokens, experts))
            gates = jnp.concatenate([gates, alone], axis=1)
        return gates.reshape(rows, tokens, experts), found

    def _route(self, x: jax.Array, reports: frozenset[str]) -> tuple[jax.Array, dict[str, jax.Array]]:
        known = report_names(self.general_experts)
        for name in reports:
            if name not in known:
                raise InputError(f"MoLA: no report '{name}'{nearest(name, known)}; reports: {', '.join(known)}")
        gates, found = [], {}
        for group, count in zip(GROUPS, self._counts(), strict=True):
            if count:
                probs = MlpRouter(count, self.router_width, self.dtype, name=f"router_{group}")(x)
                choice = routers.choose(probs)
                gates.append(routers.top1_gate(probs, choice, self.router_gradient))
                found |= routers.report(f"router_{group}_", probs, choice, reports)
        return jnp.concatenate(gates, axis=-1), found


def groups(general_experts: int) -> tuple[str, ...]:
    """Returns the groups that have experts."""
    return GROUPS if general_experts else GROUPS[:1]


def report_names(general_experts: int) -> tuple[str, ...]:
    """Returns every report of a MoLA with so many general experts."""
    return tuple(f"router_{group}_{kind}" for group in groups(general_experts) for kind in routers.KINDS)


def from_config(config: AdapterConfig, dtype: Any) -> AdapterFactory:
    """Returns a factory ``(name=...) -> MoLA`` for the student's blocks.

    Raises:
      InputError: no teacher experts, dense routing, or DoRA without a linear.
    """
    check(config)
    fields = {
        "teacher_experts": config.teacher_experts,
        "general_experts": config.general_experts,
        "rank": config.rank,
        "alpha": config.alpha,
        "dropout": config.dropout,
        "site": config.site,
        "b_init": config.b_init,
        "router_width": config.router_width,
        "router_gradient": config.router_gradient,
        "dora": config.dora,
        "dtype": dtype,
    }
    return AdapterFactory(MoLA, fields)


def check(config: AdapterConfig) -> None:
    """Refuses settings that MoLA cannot have."""
    if config.teacher_experts < 1 or config.general_experts < 0:
        raise InputError(
            "student.adapter: MoLA needs at least one teacher-specific expert and no negative number of general "
            f"ones, found teacher_experts {config.teacher_experts} and general_experts {config.general_experts}"
        )
    if config.routing != "top1":
        raise InputError(f"student.adapter.routing: MoLA routes top1, found '{config.routing}'")
    if config.dora and config.site != "linears":
        raise InputError("student.adapter.dora: needs the weight of a linear, so site 'linears', found site 'ffn'")
