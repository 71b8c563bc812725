import re

import pytest

from alignprop_jax.planning.hlo_cycles import num_bytes, program_cost

# As the compiler writes programs, with what costs nothing left out.
# ruff: noqa: E501
PROGRAM = """HloModule jit_step

%fused_computation (param_0: f32[8]) -> f32[8] {
  %param_0 = f32[8]{0} parameter(0)
  ROOT %tanh.1 = f32[8]{0} tanh(%param_0)
}

%trained (param.1: (f32[8])) -> f32[8] {
  %param.1 = (f32[8]{0}) parameter(0)
  ROOT %fusion.1 = f32[8]{0} fusion(%param.1), kind=kLoop, calls=%fused_computation, metadata={op_name="jit(step)/transpose(jvp())/tanh"}, backend_config={"estimated_cycles":"100"}
}

%untrained (param.2: (f32[8])) -> f32[8] {
  %param.2 = (f32[8]{0}) parameter(0)
  ROOT %zeros = f32[8]{0} broadcast(%param.2), backend_config={"estimated_cycles":"20"}
}

%body (param.3: (s32[], f32[8])) -> (s32[], f32[8]) {
  %param.3 = (s32[], f32[8]{0}) parameter(0)
  %conditional.1 = f32[8]{0} conditional(%gate, %a, %b), branch_computations={%untrained, %trained}, metadata={op_name="jit(step)/transpose(jvp())/while/body/cond"}
  %all-gather-start.1 = (bf16[4]{0}, bf16[8]{0}) all-gather-start(%x), replica_groups={{0,1}}
  ROOT %tuple.1 = (s32[], f32[8]{0}) tuple(%i, %conditional.1)
}

%condition (param.4: (s32[], f32[8])) -> pred[] {
  %param.4 = (s32[], f32[8]{0}) parameter(0)
  %constant.7 = s32[]{:T(128)} constant(7)
  %i = s32[]{:T(128)} get-tuple-element(%param.4), index=0
  ROOT %lt.1 = pred[] compare(%i, %constant.7), direction=LT
}

ENTRY %main (param.5: f32[8]) -> f32[8] {
  %param.5 = f32[8]{0} parameter(0)
  %while.1 = (s32[], f32[8]{0}) while(%tuple), condition=%condition, body=%body
  %gradient = (f32[3,5]{1,0:T(8,128)}, f32[]) all-reduce(%p, %q), to_apply=%sum
  ROOT %copy.1 = f32[8]{0} copy(%y), backend_config={"estimated_cycles":"5"}
}
"""


def test_loops_and_conditionals_are_taken_as_often_as_they_are_run():
    cost = program_cost(PROGRAM, lambda name: 0.25 if "transpose" in name else 1.0)
    assert cost.cycles == pytest.approx(
        {"tanh": 7 * 0.25 * 100, "broadcast": 7 * 0.75 * 20, "copy": 5}
    )
    assert cost.collective_bytes == {"all-gather": 7 * (8 + 16) / 2, "all-reduce": 4 * 16}


def test_without_cycles_the_longer_branch_is_the_costlier():
    gather = "  %all-gather.2 = f32[16]{0} all-gather(%w), replica_groups={{0,1}}\n"
    text = re.sub(r', backend_config=\{"estimated_cycles":"\d+"\}', "", PROGRAM)
    text = text.replace("  ROOT %fusion.1", gather + "  ROOT %fusion.1")
    cost = program_cost(text, lambda name: 0.25)
    assert not cost.cycles
    assert cost.collective_bytes["all-gather"] == 7 * ((8 + 16) / 2 + 0.25 * 64)


def test_bytes_of_shapes():
    assert num_bytes("(bf16[2,3]{1,0:T(8,128)(2,1)S(1)}, pred[], f8e4m3[4])") == 12 + 1 + 4
