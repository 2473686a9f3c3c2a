import re
from pathlib import Path

import pytest

from tove_jax.plan.chips import parse
from tove_jax.plan.hlo import Program
from tove_jax.plan.profile import direction_of, group_of, profile, table
from tove_jax.plan.roofline import Place, roofline

GOLDENS = Path(__file__).parents[1] / "goldens" / "plan"


def made(opcode="fusion", source="", rest=""):
    from tove_jax.plan.hlo import Instruction

    return Instruction("x", opcode, (), (), f'{rest}, metadata={{op_name="{source}"}}', "", False)


@pytest.mark.parametrize(
    ("opcode", "source", "group", "direction"),
    [
        ("fusion", "jit(step)/jvp(VisionTransformer)/while/body/closed_call/Block/mlp/adapter/fc1/fc1/dot_general", "MLP", "forward"),
        (
            "fusion",
            "jit(step)/transpose(jvp(VisionTransformer))/while/body/closed_call/checkpoint/Block/mlp/adapter/dot_general",
            "adapters",
            "backward",
        ),
        (
            "fusion",
            "jit(step)/transpose(jvp(VisionTransformer))/while/body/checkpoint/rematted_computation/Block/attention/vmap()/sub",
            "attention, maps",
            "again",
        ),
        ("fusion", "jit(step)/jvp(VisionTransformer)/while/body/closed_call/Block/attention/query/dot_general", "attention, projections", "forward"),
        ("copy", "jit(step)/jvp(VisionTransformer)/while/body/closed_call/Block/attention/query/add", "copies and layout", "forward"),
        ("fusion", "jit(step)/transpose(jvp(VisionTransformer))/while/body/closed_call/checkpoint/Block/norm2/add_any", "norms", "backward"),
        ("fusion", "jit(step)/transpose(jvp(method))/EncoderAdapter/channel/dot_general", "losses and targets", "backward"),
        ("fusion", "jit(step)/optimiser/mul", "optimiser", "forward"),
        ("fusion", "jit(step)/jvp(VisionTransformer)/while/body/jit(dynamic_update_index_in_dim)/dynamic_update_slice", "kept for the backward pass", "forward"),
        ("fusion", "jit(step)/jvp()/add", "the rest", "forward"),
    ],
)  # fmt: skip
def test_groups_by_the_source(opcode, source, group, direction):
    one = made(opcode, source)
    assert (group_of(one, source), direction_of(source)) == (group, direction)


def test_groups_add_up_to_the_roofline():
    program, topology = Program((GOLDENS / "v5e_2x2_one_slice.hlo").read_text()), parse("v5e:2x2")
    found = profile(program, topology.chip.device, 5)
    line = roofline(program, topology, [Place(0, (x, y)) for y in range(2) for x in range(2)])
    chip = topology.chip.device
    moved = sum(
        times * program.bytes(where, one)
        for where, times in program.runs()
        for one in where.instructions
        if program.seconds(where, one, chip.flops, chip.bandwidth)
    )
    assert line.bytes > moved > 0.5 * line.bytes  # the rest is of collectives
    for name, total in (("seconds", line.busy_s), ("flops", line.flops), ("bytes", moved)):
        assert sum(getattr(group, name) for group in found.groups) == pytest.approx(total)
    seconds = [one.seconds for one in found.instructions]
    assert len(seconds) == 5 and seconds == sorted(seconds, reverse=True) and found.instructions[0].flops
    told = table(found, line.step_s, instructions=3)
    assert "where it goes" in told and len(re.findall(r" times, ", told)) == 3


KERNEL = """HloModule kernel, is_scheduled=true
ENTRY %main (p: bf16[8,16]) -> bf16[8,16] {
  %p = bf16[8,16]{1,0} parameter(0)
  %made = bf16[8,16]{1,0} custom-call(), custom_call_target="AllocateBuffer"
  %kernel = (bf16[8,16]{1,0}, bf16[8,16]{1,0}) custom-call(%p), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"told":"{}"
}}, metadata={op_name="jit(step)/jvp(VisionTransformer)/Block/attention/pallas_call"}, backend_config={"custom_call_config":{"cost_estimate":{"flops":"1000","transcendentals":"1"}}}
  ROOT %out = bf16[8,16]{1,0} get-tuple-element(%kernel), index=0
}
"""


def test_a_kernel_says_its_operations():
    program = Program(KERNEL)
    found = profile(program, parse("v5e:2x2").chip.device)
    assert [(line.name, line.flops, line.bytes) for line in found.groups] == [("attention, maps", 1000, 3 * 8 * 16 * 2)]
    assert program.computations["main"].root.name == "out"
