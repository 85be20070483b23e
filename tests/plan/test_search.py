"""The search for the fastest plan, with a stub in place of the compiler."""

import argparse
import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from configs import imagenet
from igpt.errors import UnreadableProgramError, UserError
from igpt.model import PRESETS, ModelConfig
from igpt.plan import report, search
from igpt.plan.compiled import CHIPS
from igpt.remat import REMAT

ROOT = Path(__file__).parents[2]
RECORD = json.loads((ROOT / "docs" / "results" / "plan.json").read_text())
FITTING = {name: plan for name, plan in RECORD["plans"].items() if plan["fits"]}
OTHER_POLICIES = json.loads((ROOT / "benchmarks" / "results" / "plan_remat.json").read_text())["plans"]
V5P = CHIPS["v5p"]


def candidates(size, batch_size, chips, chip=V5P):
    fields = dict(PRESETS[size], dtype="bfloat16", attention="splash")
    return sorted(search.candidates(ModelConfig(**fields), batch_size, chips, chip), key=lambda one: one.seconds)


def test_candidates_divide_the_batch_the_heads_and_the_chips():
    found = candidates("xl", 64, 256)  # 24 heads
    assert found and {one.remat for one in found} == set(REMAT)
    for one in found:
        data = 256 // one.tensor // one.fsdp
        assert data * one.fsdp * one.tensor == 256 and 24 % one.tensor == 0
        assert 64 % (data * one.fsdp * one.accumulate) == 0
    assert {one.tensor for one in found} == {4, 8}  # 64 images cannot feed 256 chips otherwise
    assert not candidates("xl", 63, 256)
    narrow = ModelConfig(**PRESETS["s"] | {"num_heads": 16, "mlp_width": 1000})
    assert {one.tensor for one in search.candidates(narrow, 64, 16, V5P)} == {1, 2, 4, 8}


def test_predictions_know_what_costs_time_and_what_saves_memory():
    by_split = {one[:4]: one for one in candidates("l", 128, 8)}
    memory = [by_split[1, 8, 1, remat].memory for remat in ("none", "minimal", "dots", "full")]
    assert memory == sorted(memory, reverse=True) and len(set(memory)) == 4
    plain = by_split[1, 8, 1, "full"]
    assert by_split[1, 8, 4, "full"].memory < plain.memory and by_split[1, 8, 4, "full"].seconds > plain.seconds
    assert by_split[8, 1, 1, "full"].seconds > plain.seconds  # two all-reduces per block and pass
    assert by_split[1, 4, 1, "full"].memory > plain.memory


@pytest.mark.parametrize("name", [*FITTING, *OTHER_POLICIES])
def test_predictions_are_near_the_compiled_plans(name):
    plan = FITTING.get(name) or OTHER_POLICIES[name]
    size, topology, mesh = *name.split()[:2], plan["mesh"]
    split = (mesh["tensor"], mesh["fsdp"], plan["accumulate"], plan["remat"])
    found = candidates(size, plan["batch_size"], plan["chips"], CHIPS[topology.partition(":")[0]])
    (found,) = [one for one in found if one[:4] == split]
    assert found.seconds == pytest.approx(search.step_seconds(plan), rel=0.12)
    peak = plan["bytes_per_chip"]["peak"] if name in FITTING else plan["peak_bytes_per_chip"]
    assert found.memory == pytest.approx(peak, rel=0.4)


@pytest.fixture
def compiler(monkeypatch):
    """A stub. `compiled` lists its candidates; its results follow `fits` and `slowdown`, functions of a candidate."""
    predicted = {one[:4]: one for size in ("xl", "l") for one in candidates(size, 128, 8)}
    stub = SimpleNamespace(compiled=[], fits=lambda one: True, slowdown=lambda one: 1.0)

    def compile_plan(config, topology):
        one = predicted[config.mesh.tensor, config.mesh.fsdp, config.train.accumulate, config.model.remat]
        stub.compiled.append(one)
        plan = {"topology": topology, "mesh": vars(config.mesh), "remat": one.remat, "accumulate": one.accumulate}
        plan |= {"peak_share": 1.5 - one.seconds / 100, "slices": config.mesh.dcn_data}
        estimate = {"step_seconds": one.seconds * stub.slowdown(one), "mfu_causal": 0.5}
        return plan | {"split": one[:4], "fits": stub.fits(one), "estimate": estimate}

    device = SimpleNamespace(platform="tpu", device_kind="TPU")
    monkeypatch.setattr(search, "topology_devices", lambda topology, slices: [device] * 8)
    monkeypatch.setattr(search, "compile_plan", compile_plan)
    return stub


def run_search(size="l", topology="v5p:2x2x2", changes=(), **options):
    config = imagenet.get_config(size)
    config.update_from_flattened_dict(dict(changes))
    return search.search_plans(config, topology, **options)


def test_the_search_compiles_the_fastest_first_and_stops_early(compiler, monkeypatch):
    every = candidates("l", 128, 8)
    likely = [one for one in every if one.memory <= V5P.memory]
    monkeypatch.setattr(search, "MARGIN", 2.0)  # wide enough for ENOUGH plans
    result = run_search()
    assert compiler.compiled[0] == likely[0] and result.found[0]["split"] == likely[0][:4]
    assert all(one.seconds <= 3.0 * likely[0].seconds for one in compiler.compiled)
    assert result.compiled == len(compiler.compiled) == len(result.found) == search.ENOUGH
    assert result.too_large == len(every) - len(likely)
    assert result.compiled + result.too_large + result.slower == len(every)
    kinds = [(one.tensor, one.accumulate, one.remat) for one in compiler.compiled]
    assert len(set(kinds)) == len(kinds)  # meshes that differ in fsdp only are as fast

    compiler.compiled.clear()
    monkeypatch.setattr(search, "MARGIN", 0.0)
    assert run_search().compiled == 1


def test_the_search_goes_on_after_programs_that_do_not_fit(compiler):
    compiler.fits = lambda one: len(compiler.compiled) == 3
    found = run_search(enough=1).found
    assert [plan["split"] for plan in found] == [compiler.compiled[2][:4]]


def test_the_search_passes_over_programs_that_cannot_be_read(compiler):
    def refuse(one):
        raise UnreadableProgramError("jaxlib cannot read it")

    compiler.fits = lambda one: refuse(one) if len(compiler.compiled) == 1 else True
    result = run_search(enough=1)
    assert result.found[0]["split"] == compiler.compiled[1][:4] and result.compiled == 1
    compiler.fits = refuse
    with pytest.raises(UnreadableProgramError, match="cannot read it"):
        run_search(enough=1)


def test_the_search_prefers_the_fastest_estimate_to_the_prediction(compiler):
    compiler.slowdown = lambda one: 0.5 if len(compiler.compiled) == 2 else 1.0
    assert run_search().found[0]["split"] == compiler.compiled[1][:4]


def test_the_search_lets_only_the_data_axis_cross_slices(compiler):
    run_search(topology="v5e:2x4")  # one slice: fsdp 8 suits its memory best
    assert compiler.compiled[0].fsdp == 8
    compiler.compiled.clear()
    run_search(topology="v5e:2x4", changes={"mesh.dcn_data": 2})
    assert compiler.compiled and all(8 // one.tensor // one.fsdp % 2 == 0 for one in compiler.compiled)


def test_a_search_without_a_fit_stops_and_keeps_the_smallest(compiler):
    compiler.fits = lambda one: False
    result = run_search()
    assert not result.found and result.compiled == search.MAX_COMPILED
    slowest = max(compiler.compiled, key=lambda one: one.seconds)  # in the stub it needs the least memory
    assert result.nearest["split"] == slowest[:4]
    assert str(result).startswith(f"{search.MAX_COMPILED} programs compiled, 0 of them fit; left out: ")


def test_if_all_predictions_are_too_large_the_compiler_decides(compiler):
    compiler.fits = lambda one: False
    result = run_search("xl", "v5e:2x2", {"train.batch_size": 128})  # 16 GiB a chip; the state alone takes 12.7
    assert result.compiled and result.nearest and result.too_large > 0


@pytest.mark.parametrize(
    ("topology", "batch_size", "message"),
    [
        ("gpu:8", 128, "no search for GPUs"),
        ("v5p:2x2x2", 125, "batch_size 125 does not divide over any mesh of 8 chips.*multiple of 8"),
    ],
)
def test_a_search_without_candidates_raises_a_user_error(compiler, topology, batch_size, message):
    with pytest.raises(UserError, match=message):  # tensor cannot split three heads
        run_search("l", topology, {"train.batch_size": batch_size, "model.num_heads": 3})


def test_a_search_without_a_fit_still_prints_and_writes_figures(compiler, monkeypatch, tmp_path, capsys):
    compiler.fits = lambda one: False
    monkeypatch.setattr(report, "format_table", lambda plan: f"table of {plan['split']}")
    path, config = tmp_path / "plan.json", imagenet.get_config("l")
    report.run(argparse.Namespace(config=config, topology="v5p:2x2x2", json=str(path), search=True))
    written, printed = json.loads(path.read_text()), capsys.readouterr().out
    assert not written["fits"] and "none fits: take more chips" in printed
    assert f"table of {tuple(written['split'])}" in printed
