"""Reading compiled programs: a text whose numbers can be counted by hand, and a program that XLA makes here."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from igpt.plan.hlo import HloProgram
from igpt.sharding import make_mesh

TEXT = """HloModule jit_step, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%fused (p: bf16[8,4]) -> bf16[8,4] {
  %p = bf16[8,4]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %inside = bf16[8,4]{1,0:T(8,128)(2,1)} all-to-all(%p), replica_groups={{0,1,2}}, dimensions={0}
}

%all-reduce-scatter.1 (p: bf16[8,4]) -> bf16[4,4] {
  %p = bf16[8,4]{1,0} parameter(0)
  %whole = bf16[8,4]{1,0} all-reduce(%p), replica_groups={{0,1}}, to_apply=%add
  ROOT %part = bf16[4,4]{1,0} dynamic-slice(%whole, %i, %j), dynamic_slice_sizes={4,4}
}

%begin (p: bf16[2,4]) -> (bf16[2,4], u32[]) {
  %p = bf16[2,4]{1,0} parameter(0)
  %gather.1 = bf16[8,4]{1,0} all-gather(%p), channel_id=3, dimensions={0}, frontend_attributes={chain_id="0"}
  ROOT %begun = (bf16[2,4]{1,0}, u32[]) custom-call(%gather.1), custom_call_target="AsyncCollectiveStart"
}

%carry_on (p: bf16[2,4]) -> bf16[8,4] {
  %p = bf16[2,4]{1,0} parameter(0)
  %gather.2 = bf16[8,4]{1,0} all-gather(%p), channel_id=3, dimensions={0}, frontend_attributes={chain_id="0"}
  ROOT %product = bf16[8,4]{1,0} multiply(%gather.2, %gather.2)
}

%body (carry: (s32[], bf16[8,4])) -> (s32[], bf16[8,4]) {
  %carry = (s32[], /*index=1*/bf16[8,4]{1,0}) parameter(0)
  %x = bf16[8,4]{1,0} get-tuple-element(%carry), index=1
  %both = (f32[3]{0}, bf16[8,4]{1,0}) all-reduce(%x, %x), to_apply=%add, backend_config={"estimated_cycles":"10"}
  %mixed = bf16[8,4]{1,0} fusion(%x), kind=kLoop, calls=%fused, backend_config={"estimated_cycles":"7"}
  %flash.12 = bf16[8,4]{1,0} custom-call(%mixed), custom_call_target="tpu_custom_call"
  %chain.1 = (bf16[2,4]{1,0}, u32[]) fusion(%x), kind=kCustom, calls=%begin
  %chain.2 = bf16[8,4]{1,0} fusion(%x), kind=kCustom, calls=%carry_on
  ROOT %next = (s32[], bf16[8,4]{1,0}) tuple(%i, %flash.12)
}

%condition (carry: (s32[], bf16[8,4])) -> pred[] {
  %limit = s32[]{:T(128)} constant(5)
  %carry = (s32[], bf16[8,4]{1,0}) parameter(0)
  ROOT %less = pred[] compare(%i, %limit), direction=LT
}

%forever (carry: (s32[], bf16[8,4])) -> pred[] {
  %carry = (s32[], bf16[8,4]{1,0}) parameter(0)
  ROOT %go_on = pred[] compare(%i, %j), direction=LT
}

%kernel.1 (p: bf16[8,4]) -> bf16[8,4] {
  %p = bf16[8,4]{1,0} parameter(0)
  ROOT %fast.1 = bf16[8,4]{1,0} custom-call(%p), custom_call_target="tpu_custom_call"
}

%kernel.2 (p: bf16[8,4]) -> bf16[8,4] {
  %p = bf16[8,4]{1,0} parameter(0)
  ROOT %slow.1 = bf16[8,4]{1,0} custom-call(%p), custom_call_target="tpu_custom_call"
}

ENTRY %main (p: bf16[8,4]) -> bf16[8,4] {
  %p = bf16[8,4]{1,0} parameter(0)
  %gathered = (bf16[8,4]{1,0}, bf16[16,4]{1,0}) all-gather-start(%p), dimensions={0}
  %done = bf16[16,4]{1,0} all-gather-done(%gathered)
  %loop = (s32[], bf16[8,4]{1,0}) while(%start), condition=%condition, body=%body
  %scattered = bf16[4,4]{1,0} fusion(%p), kind=kCustom, calls=%all-reduce-scatter.1
  %listed = bf16[4,4]{1,0} reduce-scatter(%p), replica_groups={{0,1},{2,3}}, dimensions={0}, to_apply=%add
  %counted = bf16[2,4]{1,0} reduce-scatter(%p), replica_groups=[2,4]<=[8], dimensions={0}, to_apply=%add
  %sent = (bf16[8,4]{1,0}, bf16[8,4]{1,0}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%p)
  %flash.3 = bf16[8,4]{1,0} custom-call(%p), custom_call_target="tpu_custom_call"
  %either = bf16[8,4]{1,0} conditional(%q, %p, %p), branch_computations={%kernel.1, %kernel.2}
  %known = (s32[]) while(%start), condition=%forever, body=%kernel.2, backend_config={"known_trip_count":{"n":"3"}}
  %unknown = (s32[]) while(%start), condition=%forever, body=%kernel.1
  %summed = (f32[3]{0}, f32[5]{0}) all-reduce-start(%x, %y), to_apply=%add
  %over = (f32[7]{0}, u32[], token[]) send(%x), frontend_attributes={_xla_megascale_transfer_type="ALL_REDUCE"}
  %sent_off = token[] send-done(%over), frontend_attributes={_xla_megascale_transfer_type="ALL_REDUCE"}
  ROOT %end = bf16[8,4]{1,0} get-tuple-element(%loop), index=1, backend_config={"estimated_cycles":"100"}
}
"""


def test_instructions_in_a_loop_count_as_often_as_it_runs():
    program = HloProgram(TEXT)
    assert program.times["body"] == program.times["fused"] == 5 and program.times["main"] == 1
    assert program.cycles() == 100 + 5 * (10 + 7)
    # Both branches of a conditional count, the loop of known length three times, the one of unknown length once.
    assert program.kernels() == {"flash": 6, "fast": 1 + 1, "slow": 1 + 3}
    assert program.uncounted == {"unknown"}


def test_collectives_are_counted_with_the_bytes_of_their_results():
    assert HloProgram(TEXT).collectives() == {
        # A start's operand does not count. In the loop only the first part of the chain counts.
        "all-gather": {"count": 1 + 5, "bytes": 2 * 16 * 4 + 5 * 2 * 8 * 4},
        "all-reduce": {"count": 5 + 1, "bytes": 5 * (4 * 3 + 2 * 8 * 4) + 4 * (3 + 5)},  # its start has no operands
        "all-to-all": {"count": 5, "bytes": 5 * 2 * 8 * 4 * 3},  # three devices
        "reduce-scatter": {"count": 3, "bytes": 3 * 2 * 8 * 4},  # before scattering
        "collective-permute": {"count": 1, "bytes": 2 * 8 * 4},
    }


def test_transfers_between_slices_are_counted_separately():
    assert HloProgram(TEXT).between_slices() == {"all-reduce": {"count": 1, "bytes": 4 * 7}}


def test_a_compiled_program_of_eight_devices_can_be_read():
    mesh = make_mesh(8)
    rows = jax.ShapeDtypeStruct((16, 32), jnp.float32, sharding=NamedSharding(mesh, P("data")))

    def summed(x):  # a product over the rows needs one all-reduce per step of the scan
        return jax.lax.scan(lambda total, w: (total + jnp.sin(w * x).T @ x, None), jnp.zeros((32, 32)), np.arange(3.0))[
            0
        ]

    program = HloProgram(jax.jit(summed, out_shardings=NamedSharding(mesh, P())).lower(rows).compile().as_text())
    found = program.collectives()
    assert set(found) == {"all-reduce"}
    assert found["all-reduce"]["bytes"] in (4 * 32 * 32, 3 * 4 * 32 * 32)  # once after the loop, or in each step
