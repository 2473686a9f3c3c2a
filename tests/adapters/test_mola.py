from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tove_jax.adapters.mlp_head import unshuffle
from tove_jax.adapters.mola import ROUTED, MoLA, from_config, report_names
from tove_jax.config.schema import AdapterConfig, Config, FeaturesConfig, StudentConfig
from tove_jax.errors import InputError
from tove_jax.models import vit

WIDTH, HIDDEN, RANK, ROUTER, ALPHA = 6, 10, 2, 5, 3.0
TEACHERS, GENERAL = 3, 2
ROWS, TOKENS = 4, 5
X = np.random.default_rng(0).standard_normal((ROWS, TOKENS, WIDTH)).astype(np.float32)


class Host(nn.Module):
    """The smallest MLP with a MoLA."""

    fields: tuple = ()

    @nn.compact
    def __call__(self, x, **more):
        fields = {"teacher_experts": TEACHERS, "general_experts": GENERAL, "rank": RANK, "router_width": ROUTER}
        mola = MoLA(**{**fields, "alpha": ALPHA, **dict(self.fields)}, name="adapter")
        return mola(x, nn.Dense(HIDDEN, name="fc1"), nn.relu, nn.Dense(WIDTH, name="fc2"), **more)


def host(**fields):
    return Host(tuple(fields.items()))


def drawn(module, scale=0.3):
    params = jax.jit(module.init)(jax.random.key(0), X)["params"]
    draw = np.random.default_rng(1)
    return jax.tree.map(lambda a: np.asarray(a + scale * draw.standard_normal(a.shape), np.float32), params)


def run(module, params, x=X, **more):
    return jax.jit(lambda p: module.apply({"params": p}, x, **more))(params)


def gelu(x):
    from scipy.special import erf

    return x * (1 + erf(x / np.sqrt(2))) / 2


def expected(params, x, forced, site="linears", dora=False, general=GENERAL):
    """Token by token and expert by expert in double precision, merged weights written out."""
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    a = p["adapter"]

    def probabilities(group, token):
        r = a[f"router_{group}"]
        logits = gelu(token @ r["hidden"]["kernel"] + r["hidden"]["bias"]) @ r["out"]["kernel"] + r["out"]["bias"]
        return np.exp(logits) / np.exp(logits).sum()

    def extra(group, site, expert, z):
        w = a[f"{group}_{site}"]
        delta = ALPHA / RANK * w["a_kernel"][:, expert] @ w["b_kernel"][expert]
        if not dora:
            return z @ delta
        base = p["fc1" if site == "down" else "fc2"]["kernel"]
        magnitude = np.linalg.norm(base, axis=0) + w["magnitude"][expert]
        merged = base + delta
        return z @ (magnitude * merged / np.linalg.norm(merged, axis=0)) - z @ base

    out = np.zeros_like(x, np.float64)
    probs = {"teacher": np.zeros((*x.shape[:2], TEACHERS)), "general": np.zeros((*x.shape[:2], general))}
    for row, token in np.ndindex(x.shape[:2]):
        z = x[row, token].astype(np.float64)
        chosen = []
        for group in ("teacher", "general") if general else ("teacher",):
            probs[group][row, token] = probabilities(group, z)
            chosen.append((group, probs[group][row, token].argmax()))
        if forced[row] >= 0:
            chosen = [("teacher", forced[row])]
        added = lambda site, z, chosen=chosen: sum(extra(group, site, expert, z) for group, expert in chosen)
        linear = lambda name, z: z @ p[name]["kernel"] + p[name]["bias"]
        if site == "ffn":
            out[row, token] = linear("fc2", np.maximum(linear("fc1", z), 0)) + added("ffn", z)
        else:
            hidden = np.maximum(linear("fc1", z) + added("down", z), 0)
            out[row, token] = linear("fc2", hidden) + added("up", hidden)
    return out, probs


@pytest.mark.parametrize(
    "fields",
    [{}, {"site": "ffn"}, {"dora": True}, {"general_experts": 0}],
    ids=["linears", "ffn", "dora", "no general"],
)
def test_equals_expert_by_expert(fields):
    module = host(**fields)
    params = drawn(module)
    general = fields.get("general_experts", GENERAL)
    kept = {"site": fields.get("site", "linears"), "dora": fields.get("dora", False), "general": general}
    names = report_names(general)
    forced = np.array([ROUTED, 2, ROUTED, 0], np.int32)
    y, found = run(module, params, inputs={"forced": forced}, reports=frozenset(names))
    reference, probs = expected(params, X, forced, **kept)
    np.testing.assert_allclose(y, reference, atol=2e-5)
    assert set(found) == set(names)
    for group in ("teacher", "general") if general else ("teacher",):
        p = probs[group]
        np.testing.assert_allclose(found[f"router_{group}_probs"], p, atol=1e-6)
        choice = np.eye(p.shape[-1])[p.argmax(-1)]
        np.testing.assert_array_equal(found[f"router_{group}_choice"], choice)
        np.testing.assert_allclose(found[f"router_{group}_probs_mean"], p.mean(1), atol=1e-6)
        np.testing.assert_allclose(found[f"router_{group}_choice_mean"], choice.mean(1), atol=1e-6)
        np.testing.assert_allclose(found[f"router_{group}_entropy"], -(p * np.log(p)).sum(-1).mean(-1), atol=1e-6)
    everything = np.full(ROWS, ROUTED)
    np.testing.assert_allclose(run(module, params)[0], expected(params, X, everything, **kept)[0], atol=2e-5)


def test_passes_side_by_side_equal_a_value_a_row():
    module, passes = host(), (ROUTED, 1, 0)
    params = drawn(module)
    x = np.repeat(X, len(passes), axis=0)
    reports = frozenset({"router_teacher_probs", "router_general_choice_mean"})
    by_row, every = run(module, params, x, inputs={"forced": np.tile(passes, ROWS)}, reports=reports)
    by_pass, routed = run(module, params, x, inputs={"forced": passes}, reports=reports)
    np.testing.assert_allclose(by_row, by_pass, atol=1e-5)
    for name in reports:
        np.testing.assert_allclose(every[name][:: len(passes)], routed[name], atol=1e-6)
    np.testing.assert_allclose(by_pass[:: len(passes)], run(module, params)[0], atol=1e-5)


def test_two_products_a_site_and_routers_only_where_routed():
    module, passes = host(), (ROUTED, 0, 1, 2)
    params, x = drawn(module), np.repeat(X, 4, axis=0)
    jaxpr = jax.make_jaxpr(lambda p: module.apply({"params": p}, x, inputs={"forced": passes})[0])(params).jaxpr
    equations = [e for part in jaxpr.eqns for e in getattr(part.params.get("call_jaxpr"), "eqns", [part])]
    rows = [e.outvars[0].aval.shape for e in equations if e.primitive.name == "dot_general"]
    # Two routers of two linears on one row in four; fc1, fc2 and two products beside each on all.
    assert sorted(shape[0] for shape in rows) == [ROWS] * 4 + [4 * ROWS] * 6
    assert not {"gather", "while", "scan", "cond"} & {e.primitive.name for e in equations}


@pytest.mark.parametrize("dora", [False, True])
def test_forced_rows_know_one_expert_and_routed_rows_no_forced_choice(dora):
    module = host(dora=dora)
    params = drawn(module)

    def gradient(forced):
        """Gradient of row 0 alone."""

        def first_row(p):
            return (module.apply({"params": p}, X, inputs={"forced": forced})[0][0] ** 2).sum()

        return jax.jit(jax.grad(first_row))(params)["adapter"]

    one = gradient(np.array([1, ROUTED, 0, 2]))
    for name, tree in one.items():
        for leaf in jax.tree.leaves(tree):
            if not name.startswith("teacher_"):
                assert not leaf.any(), name
            else:
                experts = np.asarray(leaf) if leaf.shape[0] == TEACHERS else np.moveaxis(np.asarray(leaf), 1, 0)
                assert experts[1].any() and not experts[0].any() and not experts[2].any(), name
    routed = [
        run(module, params, inputs={"forced": np.array([ROUTED, *rest])})[0][0] for rest in ((1, 1, 1), (0, 2, -1))
    ]
    np.testing.assert_array_equal(*routed)
    through = gradient(np.array([ROUTED, 0, 0, 0]))
    assert all(np.abs(through[f"router_{group}"]["hidden"]["kernel"]).max() > 0 for group in ("teacher", "general"))


def test_straight_through_changes_nothing_forward():
    plain, through = host(router_gradient="none"), host()
    params = drawn(plain)
    np.testing.assert_array_equal(run(plain, params)[0], run(through, params)[0])
    gradient = jax.jit(jax.grad(lambda p: (plain.apply({"params": p}, X)[0] ** 2).sum()))(params)["adapter"]
    assert not np.asarray(gradient["router_teacher"]["out"]["kernel"]).any()
    assert np.abs(gradient["teacher_up"]["b_kernel"]).max() > 0


@pytest.mark.parametrize("dora", [False, True])
def test_fresh_experts_add_exactly_nothing(dora):
    module = host(dora=dora)
    params = jax.jit(module.init)(jax.random.key(0), X)["params"]
    # Another base than the one they were made beside, as when a start is read from a file.
    params["fc1"]["kernel"] = params["fc1"]["kernel"] * 1.7
    assert np.asarray(params["adapter"]["teacher_down"]["a_kernel"]).any()
    for forced in (np.full(ROWS, ROUTED), np.arange(ROWS) % TEACHERS):
        y, _ = run(module, params, inputs={"forced": forced})
        base = nn.Dense(HIDDEN).apply({"params": params["fc1"]}, X)
        np.testing.assert_array_equal(y, nn.Dense(WIDTH).apply({"params": params["fc2"]}, nn.relu(base)))


def test_dora_takes_no_gradient_through_the_norm_but_one_to_the_magnitude():
    module = host(dora=True, general_experts=0, teacher_experts=1)
    params = drawn(module)

    def merged(p, site, base):
        w, kernel = p["adapter"][f"teacher_{site}"], p[base]["kernel"]
        whole = kernel + ALPHA / RANK * w["a_kernel"][:, 0] @ w["b_kernel"][0]
        norm, magnitude = jnp.linalg.norm(whole, axis=0), jnp.linalg.norm(kernel, axis=0) + w["magnitude"][0]
        factor = (w["magnitude"][0] - jax.lax.stop_gradient(w["magnitude"][0] - magnitude)) / jax.lax.stop_gradient(
            norm
        )
        return whole * factor

    def reference(p):
        hidden = nn.relu(X @ merged(p, "down", "fc1") + p["fc1"]["bias"])
        return ((hidden @ merged(p, "up", "fc2") + p["fc2"]["bias"]) ** 2).sum()

    def ours(p):
        forced = {"forced": jnp.zeros(ROWS, jnp.int32)}
        return (module.apply({"params": p}, X, inputs=forced)[0] ** 2).sum()

    wanted, found = jax.jit(jax.value_and_grad(reference))(params), jax.jit(jax.value_and_grad(ours))(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-3), wanted, found)


def test_dropout_only_touches_the_experts():
    module = host(dropout=0.5)
    params, probs = drawn(module), frozenset({"router_teacher_probs"})
    plain, found = run(module, params, reports=probs)
    rngs = {"dropout": jax.random.key(2)}
    dropped, again = run(module, params, deterministic=False, reports=probs, rngs=rngs)
    np.testing.assert_array_equal(found["router_teacher_probs"], again["router_teacher_probs"])
    assert np.abs(plain - dropped).max() > 1e-3


def test_refusals():
    module = host()
    params = {"params": drawn(module)}
    for inputs, message in (
        (np.zeros(ROWS), "expected adapter inputs"),
        ({"forced": np.zeros(3, np.int32)}, r"one expert a row \(4,\), found \(3,\)"),
        ({"forced": (ROUTED, 0, 1)}, "passes that divide 4 rows"),
        ({"forced": (0, ROUTED)}, "routed ones first"),
        ({"forced": (ROUTED, TEACHERS)}, "there are 3 teacher experts"),
    ):
        with pytest.raises(InputError, match=message):
            module.apply(params, X, inputs=inputs)
    with pytest.raises(InputError, match="no report 'router_probs'"):
        module.apply(params, X, reports=frozenset({"router_probs"}))
    for fields, message in (
        ({}, "at least one teacher-specific expert"),
        ({"teacher_experts": 2, "routing": "dense"}, "routes top1"),
        ({"teacher_experts": 2, "dora": True, "site": "ffn"}, "site 'linears'"),
    ):
        with pytest.raises(InputError, match=message):
            from_config(AdapterConfig(kind="mola", **fields), jnp.float32)


def test_teacher_experts_follow_the_run():
    student = StudentConfig(adapter=AdapterConfig(kind="mola"))
    config = Config(student=student, features=FeaturesConfig(experts=("a", "b", "c", "d")))
    assert config.student.adapter.teacher_experts == 4
    fixed = StudentConfig(adapter=AdapterConfig(kind="mola", teacher_experts=2))
    assert Config(student=fixed).student.adapter.teacher_experts == 2
    assert Config(student=StudentConfig(adapter=AdapterConfig())).student.adapter.teacher_experts == 0


@pytest.mark.parametrize("fields,parameters", [({}, 59_818_128), ({"teacher_experts": 4}, 67_688_616)])
def test_parameters_at_full_size(fields, parameters):
    """24 layers of N experts of rank 32 beside 1024 -> 4096 and back, and of two routers 1024 -> 256 -> N."""
    adapter = AdapterConfig(kind="mola", **{"teacher_experts": 3, **fields})
    student = vit.from_config(StudentConfig(adapter=adapter))
    shapes = jax.eval_shape(student.init, jax.random.key(0), jnp.zeros((1, 336, 336, 3)))["params"]
    count = sum(leaf.size for leaf in jax.tree.leaves(shapes["layers"]["mlp"]["adapter"]))
    experts = (adapter.teacher_experts, adapter.general_experts)
    routers = sum(1024 * 256 + 256 + 256 * n + n for n in experts)
    assert count == 24 * (sum(experts) * 32 * 2 * (1024 + 4096) + routers) == parameters


def test_unshuffle():
    grid = np.arange(2 * 4 * 4 * 3, dtype=np.float32).reshape(2, 4, 4, 3)
    found = np.asarray(unshuffle(grid, 2))
    assert found.shape == (2, 4, 12)
    # Token (1, 0) holds the cells (2..3, 0..1), row by row.
    np.testing.assert_array_equal(found[1, 2].reshape(2, 2, 3), grid[1, 2:, :2])
    np.testing.assert_array_equal(unshuffle(grid, 4), grid.reshape(2, 16, 3))
    assert unshuffle(grid, 3).shape == (2, 9, 3) and unshuffle(grid, 2, "resize").shape == (2, 4, 3)
    # The sizes of the paper's teachers on a student of 24 x 24.
    sides = {64: 4, 32: 1, 24: 1, 48: 4}
    for side, cells in sides.items():
        shape = jax.eval_shape(lambda x: unshuffle(x, 24), jax.ShapeDtypeStruct((1, side, side, 8), jnp.float32)).shape
        assert shape == (1, 576, 8 * cells)


def test_unshuffle_resizes_like_torch():
    torch = pytest.importorskip("torch")
    grid = np.random.default_rng(0).standard_normal((2, 7, 7, 3)).astype(np.float32)
    for side in (3, 4, 5):
        k = max(1, 7 // side)
        resized = torch.nn.functional.interpolate(
            torch.from_numpy(grid.transpose(0, 3, 1, 2)), size=(k * side,) * 2, mode="bilinear", align_corners=False
        )
        cells = resized.numpy().transpose(0, 2, 3, 1).reshape(2, side, k, side, k, 3).transpose(0, 1, 3, 2, 4, 5)
        np.testing.assert_allclose(unshuffle(grid, side), cells.reshape(2, side * side, -1), atol=1e-6)
