from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from tove_jax.errors import InputError
from tove_jax.plan.hlo import Program

GOLDENS = Path(__file__).parents[1] / "goldens" / "plan"


def counted(program):
    return sum(times * program.flops(where, one) for where, times in program.runs() for one in where.instructions)


def compiled(function, *shapes):
    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return jax.jit(function).lower(*arrays).compile()


def run_layers(x, weights, unroll):
    def body(x, w):
        return jnp.tanh(x @ w[0]) @ w[1], None

    return jnp.square(jax.lax.scan(body, x, weights, unroll=unroll)[0]).sum()


def test_a_scanned_loop_counts_as_often_as_it_runs():
    shapes = ((16, 32), (5, 32, 64), (5, 64, 32))
    step = lambda unroll: jax.grad(lambda x, a, b: run_layers(x, (a, b), unroll), argnums=(0, 1, 2))
    scanned, unrolled = compiled(step(1), *shapes), compiled(step(5), *shapes)
    program = Program(scanned.as_text())
    assert any(times == 5 for _, times in program.runs())
    products = 6 * 5 * 2 * 16 * 32 * 64
    assert counted(program) == counted(Program(unrolled.as_text())) == products
    # The compiler counts elementwise operations too, and the scanned body once.
    assert products <= unrolled.cost_analysis()["flops"] < 1.1 * products
    assert scanned.cost_analysis()["flops"] < 0.5 * products


@pytest.mark.parametrize(
    "options",
    [
        {"window_strides": (1, 1), "padding": "SAME"},
        {"window_strides": (2, 3), "padding": ((1, 2), (0, 1))},
        {"window_strides": (1, 1), "padding": ((2, 2), (2, 2)), "lhs_dilation": (2, 2)},
        {"window_strides": (1, 1), "padding": "VALID", "rhs_dilation": (2, 1)},
        {"window_strides": (1, 1), "padding": "SAME", "feature_group_count": 4},
    ],
)
def test_convolutions_count_what_meets_the_input(options):
    inner = 8 // options.get("feature_group_count", 1)
    numbers = ("NHWC", "HWIO", "NHWC")
    convolve = lambda x, k: jax.lax.conv_general_dilated(x, k, dimension_numbers=numbers, **options)
    found = compiled(convolve, (2, 9, 11, 8), (3, 3, inner, 12))
    assert counted(Program(found.as_text())) == pytest.approx(found.cost_analysis()["flops"], rel=1e-6)


def test_slices_of_a_stacked_array_count_as_slices():
    def pick(stack):
        return jax.lax.scan(lambda total, row: (total + row.sum(), None), 0.0, stack)[0]

    program = Program(compiled(pick, (64, 256)).as_text())
    moved = sum(times * program.bytes(where, one) for where, times in program.runs() for one in where.instructions)
    whole = 64 * 256 * 4
    assert whole <= moved < 4 * whole  # not 64 times


ASYNCHRONOUS = """HloModule moves, is_scheduled=true

ENTRY %main (stack: bf16[23,64,4096], row: bf16[8,128]) -> bf16[6,64,4096] {
  %stack = bf16[23,64,4096]{2,1,0} parameter(0)
  %row = bf16[8,128]{1,0} parameter(1)
  %copy-start = (bf16[8,128]{1,0:S(1)}, bf16[8,128]{1,0}, u32[]{:S(2)}) copy-start(%row)
  %copy-done = bf16[8,128]{1,0:S(1)} copy-done(%copy-start)
  %slice-start = ((bf16[23,64,4096]{2,1,0}), bf16[6,64,4096]{2,1,0:S(1)}, s32[]{:S(2)}) slice-start(%stack), slice={[6:12], [0:64], [0:4096]}
  %slice-done = bf16[6,64,4096]{2,1,0:S(1)} slice-done(%slice-start)
  %collective-permute-start = (bf16[8,128]{1,0}, bf16[8,128]{1,0}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%row), channel_id=1, source_target_pairs={{0,1},{1,0}}
  %collective-permute-done = bf16[8,128]{1,0} collective-permute-done(%collective-permute-start)
  ROOT %slice = bf16[6,64,4096]{2,1,0} slice(%stack), slice={[0:6], [0:64], [0:4096]}
}
"""


def test_what_only_starts_moves_its_result_once():
    program = Program(ASYNCHRONOUS)
    moved = {one.name: program.bytes(where, one) for where, _ in program.runs() for one in where.instructions}
    row, part = 8 * 128 * 2, 6 * 64 * 4096 * 2
    assert {name: size for name, size in moved.items() if size} == {
        "copy-start": row,  # into fast memory, which takes no bandwidth of the main one
        "slice-start": part,
        "collective-permute-start": 2 * row,
        "slice": 2 * part,
    }


@pytest.mark.parametrize("name", ["one_slice", "two_slices"])
def test_programs_for_tpus(name):
    program = Program((GOLDENS / f"v5e_2x2_{name}.hlo").read_text())
    # Two products forward, the first of them again, four backward; one layer's loop is peeled over two slices.
    assert counted(program) == 6 * 7 * 2 * 64 * 1024 * 2048


# As TPUs' compiler writes a gather that runs beside a sum: the shard, the gathered array and a flag are handed on.
CARRIED = """HloModule carried, is_scheduled=true
%starts (p: f32[64]) -> (f32[64], f32[128], u32[]) {
  %p = f32[64]{0} parameter(0)
  %gather.0 = f32[128]{0} all-gather(%p), channel_id=1, replica_groups={{0,1}}, dimensions={0}
  ROOT %call.0 = (f32[64]{0}, f32[128]{0}, u32[]) custom-call(%gather.0), custom_call_target="AsyncCollectiveStart"
}
%async_collective_fusion.1 (s: f32[64], g: f32[128], u: u32[], x: f32[32]) -> (f32[32], f32[64], f32[128], f32[128], u32[]) {
  %s = f32[64]{0} parameter(0)
  %g = f32[128]{0} parameter(1)
  %u = u32[] parameter(2)
  %x = f32[32]{0} parameter(3)
  %add.1 = f32[32]{0} add(%x, %x)
  %gather.1 = f32[128]{0} all-gather(%s), channel_id=1, replica_groups={{0,1}}, dimensions={0}
  ROOT %all.1 = (f32[32]{0}, f32[64]{0}, f32[128]{0}, f32[128]{0}, u32[]) tuple(%add.1, %s, %g, %gather.1, %u)
}
%ends (r: f32[64], h: f32[128], v: u32[]) -> f32[128] {
  %r = f32[64]{0} parameter(0)
  %h = f32[128]{0} parameter(1)
  %v = u32[] parameter(2)
  %gather.2 = f32[128]{0} all-gather(%r), channel_id=1, replica_groups={{0,1}}, dimensions={0}
  ROOT %call.2 = f32[128]{0} custom-call(%r, %h, %gather.2, %v), custom_call_target="AsyncCollectiveDone"
}
ENTRY %main (a: f32[64], b: f32[32]) -> f32[128] {
  %a = f32[64]{0} parameter(0)
  %b = f32[32]{0} parameter(1)
  %start = (f32[64]{0}, f32[128]{0}, u32[]) fusion(%a), kind=kCustom, calls=%starts
  %s0 = f32[64]{0} get-tuple-element(%start), index=0
  %s1 = f32[128]{0} get-tuple-element(%start), index=1
  %s2 = u32[] get-tuple-element(%start), index=2
  %carry = (f32[32]{0}, f32[64]{0}, f32[128]{0}, f32[128]{0}, u32[]) fusion(%s0, %s1, %s2, %b), kind=kLoop, calls=%async_collective_fusion.1
  %c1 = f32[64]{0} get-tuple-element(%carry), index=1
  %c2 = f32[128]{0} get-tuple-element(%carry), index=2
  %c4 = u32[] get-tuple-element(%carry), index=4
  ROOT %done = f32[128]{0} fusion(%c1, %c2, %c4), kind=kCustom, calls=%ends
}
"""


def test_a_carried_collective_moves_its_arrays_where_it_starts():
    program = Program(CARRIED)
    main = program.computations["main"]
    moved = {name: program.bytes(main, main.by_name[name]) for name in ("start", "carry", "done")}
    assert moved == {"start": 4 * (64 + 128), "carry": 4 * (32 + 32), "done": 0}
    seconds = {name: program.seconds(main, main.by_name[name], 1.0, 1.0) for name in moved}
    assert seconds == {"start": 0, "carry": 4 * (32 + 32), "done": 0}  # the network says how long it takes


def test_what_is_not_a_program_is_refused():
    with pytest.raises(InputError, match="none with an entry"):
        Program("HloModule empty\n")
    text = (GOLDENS / "v5e_2x2_one_slice.hlo").read_text().replace("direction=LT", "direction=NE")
    with pytest.raises(InputError, match="the length of loop .* is not known"):
        counted(Program(text))
