from pathlib import Path

import pytest

from tove_jax.errors import InputError
from tove_jax.plan.chips import parse
from tove_jax.plan.collectives import Collective, collectives, members
from tove_jax.plan.hlo import Instruction, Program
from tove_jax.plan.roofline import Place, roofline, speed

GOLDENS = Path(__file__).parents[1] / "goldens" / "plan"
WEIGHT = 1024 * 2048 * 2  # bytes of one bfloat16 weight


def program(name):
    return Program((GOLDENS / f"v5e_2x2_{name}.hlo").read_text())


def square(slices=1, side=2):
    return [Place(s, (x, y)) for s in range(slices) for y in range(side) for x in range(side)]


def test_sharded_layers_gather_twice_and_scatter_once():
    found = roofline(program("one_slice"), parse("v5e:2x2"), square())
    gathered, scattered = found.traffic
    assert (gathered.kind, gathered.count, gathered.bytes) == ("all-gather", 24, 24 * WEIGHT * 3 / 4)
    assert (scattered.kind, scattered.count, scattered.bytes) == ("reduce-scatter", 12, 12 * WEIGHT * 3 / 4)
    # Two dimensions of two chips, no ring: two links.
    assert found.network_s == pytest.approx(36 * WEIGHT * 3 / 4 / 100e9)
    assert 0 < gathered.hidden_s < gathered.seconds and scattered.hidden_s == 0
    assert found.step_s == pytest.approx(found.busy_s + found.exposed_s) and found.bound == "network"
    assert found.busy_s >= max(found.compute_s, found.memory_s)


def test_between_slices_gradients_are_reduced_in_shards():
    found = roofline(program("two_slices"), parse("v5e:2x2", 2), square(2))
    outer = [row for row in found.traffic if row.link == "network"]
    assert [(row.kind, row.count, row.bytes) for row in outer] == [("all-reduce", 12, 12 * WEIGHT / 4)]
    assert outer[0].seconds == pytest.approx(12 * WEIGHT / 4 / 3.125e9)
    inner = {row.kind: row.bytes for row in found.traffic if row.link == "chip"}
    assert inner == {"all-gather": 24 * WEIGHT * 3 / 4, "reduce-scatter": 12 * WEIGHT * 3 / 4}


def test_an_asynchronous_collective_is_one():
    found = collectives(program("one_slice"), 4, lambda where, one: 1.0)
    assert sum(one.asynchronous for one in found) == 1
    assert all(one.group == (0, 1, 2, 3) for one in found)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("replica_groups={{0,2},{1,3}}, x", (0, 2)),
        ("replica_groups={}, x", (0, 1, 2, 3, 4, 5, 6, 7)),
        ("replica_groups=[4,2]<=[8]", (0, 1)),
        ("replica_groups=[2,4]<=[4,2]T(1,0), x", (0, 2, 4, 6)),
        ("replica_groups=[4,2]<=[2,2,2]T(1,2,0)", (0, 4)),
        ("replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_1'}, x", (0, 1)),
        ("replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_0'}", (0, 2, 4, 6)),
        ("replica_groups=mesh['a'=8] {'a':(2)2}", (0, 2)),
        ("source_target_pairs={{0,0},{1,3},{3,1}}", (1, 3)),
    ],
)
def test_groups_in_every_spelling(text, expected):
    assert members(Instruction("c", "all-gather", (), (), ", " + text, "", False), 8) == expected


def test_unknown_groups_are_refused():
    with pytest.raises(InputError, match="unknown way"):
        members(Instruction("c", "all-gather", (), (), "replica_groups=@elsewhere", "", False), 8)


def link(topology, group, places):
    return speed(Collective("all-gather", 1.0, group, 1, False, 0.0), topology, places)


def test_links_add_up_over_the_dimensions_of_a_torus():
    pod, part = parse("v5e:16x16"), parse("v5e:4x4")
    places = square(side=16)
    assert link(pod, tuple(range(16)), places) == ("chip", 2 * 50e9)  # a ring
    assert link(pod, tuple(range(8)), places) == ("chip", 50e9)  # half of it is a line
    assert link(pod, tuple(range(256)), places) == ("chip", 4 * 50e9)
    assert link(part, (0, 1, 2, 3), square(side=4)) == ("chip", 50e9)
    cube = parse("v5p:4x4x4")
    lined = [Place(0, (x, y, z)) for z in range(4) for y in range(4) for x in range(4)]
    assert link(cube, tuple(range(4)), lined) == ("chip", 200e9)
    assert link(parse("v5p:2x2x1"), (0, 1), lined) == ("chip", 100e9)


def test_cores_and_nodes():
    half = parse("tpu7x:2x2x1")
    places = [Place(0, (x, y, 0)) for y in range(2) for x in range(2) for _ in range(2)]
    assert link(half, (0, 1), places) == ("chip", 50e9)  # two halves of a chip
    nodes = parse("h200:8", 2)
    places = [Place(number // 8) for number in range(16)]
    assert link(nodes, (0, 1), places) == ("chip", 450e9)
    assert link(nodes, (0, 8), places) == ("network", 50e9)


def test_wire_bytes_by_kind():
    sent = lambda kind: Collective(kind, 8.0, (0, 1, 2, 3), 1, False, 0.0).wire_bytes
    assert [sent(kind) for kind in ("all-gather", "reduce-scatter", "all-reduce", "collective-permute")] == [
        6,
        6,
        12,
        8,
    ]


CARRIED = """HloModule carried, is_scheduled=true
%starts (p: f32[4]) -> (f32[4], f32[8]) {
  %p = f32[4]{0} parameter(0)
  %gather.0 = f32[8]{0} all-gather(%p), channel_id=1, replica_groups={{0,1}}, dimensions={0}
  ROOT %call.0 = (f32[4]{0}, f32[8]{0}) custom-call(%gather.0), custom_call_target="AsyncCollectiveStart"
}
%async_collective_fusion.1 (q: f32[4]) -> f32[4] {
  %q = f32[4]{0} parameter(0)
  %gather.1 = f32[8]{0} all-gather(%q), channel_id=1, replica_groups={{0,1}}, dimensions={0}
  ROOT %add.1 = f32[4]{0} add(%q, %q)
}
%ends (r: f32[4]) -> f32[8] {
  %r = f32[4]{0} parameter(0)
  %gather.2 = f32[8]{0} all-gather(%r), channel_id=1, replica_groups={{0,1}}, dimensions={0}
  ROOT %call.2 = f32[8]{0} custom-call(%gather.2), custom_call_target="AsyncCollectiveDone"
}
%condition (c: (s32[], f32[4])) -> pred[] {
  %c = (s32[], f32[4]{0}) parameter(0)
  %counter = s32[] get-tuple-element(%c), index=0
  %bound = s32[] constant(3)
  ROOT %less = pred[] compare(%counter, %bound), direction=LT
}
%body (b: (s32[], f32[4])) -> (s32[], f32[4]) {
  %b = (s32[], f32[4]{0}) parameter(0)
  %i = s32[] get-tuple-element(%b), index=0
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  %x = f32[4]{0} get-tuple-element(%b), index=1
  %carry = f32[4]{0} fusion(%x), kind=kOutput, calls=%async_collective_fusion.1
  ROOT %pair = (s32[], f32[4]{0}) tuple(%next, %carry)
}
ENTRY %main (a: f32[4]) -> f32[8] {
  %a = f32[4]{0} parameter(0)
  %zero = s32[] constant(0)
  %start = (f32[4]{0}, f32[8]{0}) fusion(%a), kind=kCustom, calls=%starts
  %given = (s32[], f32[4]{0}) tuple(%zero, %a)
  %loop = (s32[], f32[4]{0}) while(%given), condition=%condition, body=%body
  %out = f32[4]{0} get-tuple-element(%loop), index=1
  ROOT %done = f32[8]{0} fusion(%out), kind=kCustom, calls=%ends
}
"""


def test_a_loop_that_carries_a_collective_does_not_run_it_again():
    read = Program(CARRIED)
    found = collectives(read, 2, lambda where, one: float(one.opcode == "fusion"))
    assert [(one.kind, one.bytes, one.times, one.asynchronous) for one in found] == [("all-gather", 32, 1, True)]
    assert found[0].cover_s == 3  # the loop's three rounds


CALLED = """HloModule called, is_scheduled=true
%gathers (s: f32[4], t: token[]) -> f32[8] {
  %t = token[] parameter(1)
  %s = f32[4]{0} parameter(0)
  ROOT %gather = f32[8]{0} all-gather(%s), channel_id=1, replica_groups={{0,1}}, dimensions={0}
}, execution_thread="sparsecore"

ENTRY %main (a: f32[4]) -> f32[8] {
  %a = f32[4]{0} parameter(0)
  %ready = token[] custom-call(), custom_call_target="PrepareAsyncCallDone"
  %start = ((f32[4]{0}, token[]), f32[8]{0}) call-start(%a, %ready), async_execution_thread="sparsecore", to_apply=%gathers
  %beside = f32[4]{0} add(%a, %a)
  %done = f32[8]{0} call-done(%start)
  ROOT %copy = f32[8]{0} copy(%done)
}
"""


def test_a_collective_that_another_core_runs_is_one_from_its_call_to_its_end():
    read = Program(CALLED)
    found = collectives(read, 2, lambda where, one: float(one.opcode == "add"))
    assert [(one.kind, one.bytes, one.times, one.asynchronous) for one in found] == [("all-gather", 32, 1, True)]
    assert found[0].cover_s == 1 and found[0].group == (0, 1)
    main = read.computations["main"]
    start, copy = main.by_name["start"], main.by_name["copy"]
    assert read.seconds(main, start, 1.0, 1.0) == 0 and read.seconds(main, copy, 1.0, 1.0) == 64
    assert read.bytes(main, start) == 4 * (4 + 8)
