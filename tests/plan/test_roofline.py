"""The second estimate, on a program whose products and bytes can be counted by hand."""

from collections import Counter

import pytest

from igpt.plan.compiled import CHIPS
from igpt.plan.hlo import HloProgram
from igpt.plan.roofline import MEMORY_SHARE, PRODUCT_SHARE, Roofline, operands

CHIP = CHIPS["v5p"]  # two cores
TEXT = """HloModule jit_step, is_scheduled=true

%product (p: bf16[512,256], q: bf16[256,1024]) -> bf16[512,1024] {
  %p = bf16[512,256]{1,0:T(8,128)(2,1)} parameter(0)
  %q = bf16[256,1024]{1,0:T(8,128)(2,1)} parameter(1)
  ROOT %whole = bf16[512,1024]{1,0:T(8,128)(2,1)} convolution(%p, %q), dim_labels=bf_io->bf
}

%store (stack: bf16[7,16,128], row: bf16[16,128], i: s32[]) -> bf16[7,16,128] {
  %stack = bf16[7,16,128]{2,1,0:T(8,128)(2,1)} parameter(0)
  %row = bf16[16,128]{1,0:T(8,128)(2,1)} parameter(1)
  %i = s32[] parameter(2)
  %wide = bf16[1,16,128]{2,1,0:T(8,128)(2,1)} bitcast(%row)
  ROOT %stacked = bf16[7,16,128]{2,1,0:T(8,128)(2,1)} dynamic-update-slice(%stack, %wide, %i, %i, %i)
}

%load (stack: bf16[7,16,128], i: s32[]) -> bf16[16,128] {
  %stack = bf16[7,16,128]{2,1,0:T(8,128)(2,1)} parameter(0)
  %i = s32[] parameter(1)
  %cut = bf16[1,16,128]{2,1,0:T(8,128)(2,1)} dynamic-slice(%stack, %i, %i, %i), dynamic_slice_sizes={1,16,128}
  ROOT %row = bf16[16,128]{1,0:T(8,128)(2,1)} bitcast(%cut)
}

%body (carry: (s32[], bf16[7,16,128])) -> (s32[], bf16[7,16,128]) {
  %carry = (s32[], bf16[7,16,128]{2,1,0}) parameter(0)
  %i = s32[] get-tuple-element(%carry), index=0
  %stack = bf16[7,16,128]{2,1,0:T(8,128)(2,1)} get-tuple-element(%carry), index=1
  %loaded = bf16[16,128]{1,0:T(8,128)(2,1)} fusion(%stack, %i), kind=kLoop, calls=%load
  %stored = bf16[7,16,128]{2,1,0:T(8,128)(2,1)} fusion(%stack, %loaded, %i), kind=kLoop, calls=%store
  %kernel.1 = bf16[16,128]{1,0} custom-call(%loaded), custom_call_target="tpu_custom_call"
  ROOT %next = (s32[], bf16[7,16,128]{2,1,0}) tuple(%i, %stored)
}

%condition (carry: (s32[], bf16[7,16,128])) -> pred[] {
  %carry = (s32[], bf16[7,16,128]{2,1,0}) parameter(0)
  %limit = s32[] constant(7)
  ROOT %less = pred[] compare(%i, %limit), direction=LT
}

ENTRY %main (a: bf16[512,256], b: bf16[256,1024], c: f32[3,100]) -> bf16[512,1024] {
  %a = bf16[512,256]{1,0:T(8,128)(2,1)} parameter(0)
  %b = bf16[256,1024]{1,0:T(8,128)(2,1)S(1)} parameter(1)
  %c = f32[3,100]{1,0:T(8,128)} parameter(2)
  %padded = f32[3,100]{1,0:T(8,128)} copy(%c)
  %loop = (s32[], bf16[7,16,128]{2,1,0}) while(%start), condition=%condition, body=%body
  %summed = f32[3,100]{1,0:T(8,128)} all-reduce(%padded), to_apply=%add
  ROOT %out = bf16[512,1024]{1,0:T(8,128)(2,1)} fusion(%a, %b), calls=%product, backend_config={NOTE}
}
""".replace("NOTE", '"window_config":{"iteration_bounds":["4","2"]},"estimated_cycles":"77"')
BUNDLES = {"out": Counter({0: 10, 1: 50}), "kernel.1": Counter({0: 5, 1: 1000, 2: 1})}


@pytest.fixture
def found():
    roofline = Roofline(HloProgram(TEXT), BUNDLES, CHIP, kernel_steps=(6, 12))
    return {one.name: one for one in roofline.operations()}


def memory_bytes(operation):
    return operation.memory * MEMORY_SHARE * CHIP.bandwidth


def test_structure_and_collectives_are_no_operations(found):
    assert set(found) == {"padded", "out", "loaded", "stored", "kernel.1"}
    assert found["loaded"].times == 7 and found["out"].times == 1


def test_products_count_by_their_sizes(found):
    assert found["out"].products == pytest.approx(2 * 512 * 256 * 1024 / PRODUCT_SHARE / CHIP.peak)
    assert found["padded"].products == found["loaded"].products == 0


def test_traffic_counts_padded_tiles_and_leaves_out_what_lies_in_vmem(found):
    assert memory_bytes(found["padded"]) == pytest.approx(2 * 8 * 128 * 4)
    assert memory_bytes(found["out"]) == pytest.approx(2 * (512 * 256 + 512 * 1024))  # b is in VMEM


def test_slices_of_a_stack_count_without_the_stack(found):
    row, index = 2 * 16 * 128, 4
    assert memory_bytes(found["loaded"]) == pytest.approx(2 * row + index)
    assert memory_bytes(found["stored"]) == pytest.approx(2 * row + index)


def test_the_cores_share_the_loops_of_an_operation(found):
    assert found["out"].bundles == pytest.approx((10 + 50 * 4 * 2 / 2) / CHIP.clock)
    assert found["kernel.1"].bundles == pytest.approx((5 + 1000 * 6 / 2 + 1 * 12 / 2) / CHIP.clock)


def test_an_operation_takes_as_long_as_its_slowest_limit(found):
    assert found["out"].seconds == max(found["out"].bundles, found["out"].products, found["out"].memory)
    assert found["kernel.1"].seconds == found["kernel.1"].bundles and found["kernel.1"].is_kernel


def test_an_operation_without_bundles_takes_those_of_an_equal_one():
    out = TEXT[TEXT.index("  ROOT %out") :].removesuffix("}\n")
    again = TEXT.replace(out, out.replace("ROOT %out", "%first") + out)
    found = {one.name: one for one in Roofline(HloProgram(again), BUNDLES, CHIP, (6, 12)).operations()}
    assert found["first"].bundles == found["out"].bundles > 0


def test_the_seconds_of_a_step_are_those_of_kernels_and_of_all_else():
    roofline = Roofline(HloProgram(TEXT), BUNDLES, CHIP, kernel_steps=(6, 12))
    found = {one.name: one for one in roofline.operations()}
    others = found["padded"].seconds + found["out"].seconds + 7 * (found["loaded"].seconds + found["stored"].seconds)
    assert roofline.seconds() == pytest.approx({"kernels": 7 * found["kernel.1"].seconds, "operations": others})


def test_kernels_without_bundles_have_no_seconds():
    assert Roofline(HloProgram(TEXT), {}, CHIP, (6, 12)).seconds()["kernels"] is None


def test_operands_are_the_names_in_the_parentheses():
    program = HloProgram(TEXT)
    by_name = {one.name: operands(one) for one, _ in program}
    assert by_name["stored"] == ["stack", "loaded", "i"] and by_name["next"] == ["i", "stored"]
    assert by_name["carry"] == []
