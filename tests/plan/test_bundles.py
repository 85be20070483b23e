"""Counting the bundles that the TPU compiler dumps."""

from igpt.plan.bundles import count_bundles, dump_flags, take_bundles

TEXT = """
// a comment: not a bundle
    0x0   :  { %s1 = inlined_call_operand.hbm [shape: bf16[8,128], index: 0, kind: input] }
     1 LB: > { %v2 = vld [vmem:[%s1] sm:$0xff] ;;  %p = scmp }
   0x2   : > { %v3 = vadd.f32 %v2, %v2 }
   0x3 PF: > > { %v4 = vmul.f32 %v3, %v3 }
   0x4   : > { %5 = sbr.rel (%p) target = $region1 }
   0x5   :  { %6 = vst [vmem:[%s1]] %v4 }
"""


def test_bundles_are_counted_by_the_loops_around_them():
    assert count_bundles(TEXT) == {0: 2, 1: 3, 2: 1}


def test_the_final_bundles_of_each_operation_are_taken_once(tmp_path):
    folder = tmp_path / "bundles"
    folder.mkdir()
    (folder / "1795-fusion.12-71-final_bundles.txt").write_text(TEXT)
    (folder / "1795-fusion.12-72-schedule-analysis_final_bundles.txt").write_text(TEXT)
    (folder / "1795-fusion.12-02-original.txt").write_text(TEXT)
    assert take_bundles(folder) == {"fusion.12": {0: 2, 1: 3, 2: 1}}
    assert take_bundles(folder) == {}  # a second program does not count the first one's


def test_the_flags_name_the_folder(tmp_path):
    assert f"--xla_jf_dump_to={tmp_path}" in dump_flags(tmp_path)
