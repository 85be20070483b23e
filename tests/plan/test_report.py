"""What `igpt plan` prints and writes, the documented commands, and docs/plans.md with its record."""

import argparse
import importlib
import json
import math
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from igpt.__main__ import main as run_igpt
from igpt.errors import UserError
from igpt.plan import report
from igpt.plan.compiled import CHIPS, USABLE_SHARE, compile_plan

ROOT = Path(__file__).parents[2]
RECORD = json.loads((ROOT / "docs" / "results" / "plan.json").read_text())


def commands():
    """The flags of every `igpt plan` in the help and in the documents."""
    files = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    text = "\n".join([report.__doc__, *(path.read_text() for path in files)])
    return sorted(set(re.findall(r"\bigpt plan (--[^`#]*?--topology=[^`#\n]*)", text)))


@pytest.mark.parametrize("flags", commands())
def test_every_documented_command_divides_over_its_chips(flags):
    flags = dict(flag.removeprefix("--").split("=", 1) for flag in shlex.split(flags) if "=" in flag)
    path, _, argument = flags["config"].partition(":")
    get_config = importlib.import_module(path.removesuffix(".py").replace("/", ".")).get_config
    config = get_config(argument) if argument else get_config()
    config.update_from_flattened_dict(
        {name.removeprefix("config."): json.loads(value) for name, value in flags.items() if "config." in name}
    )
    kind, _, shape = flags["topology"].partition(":")
    chips = math.prod(map(int, shape.split("x"))) * config.mesh.dcn_data
    assert kind in (*CHIPS, "gpu") and compile_plan(config, f"gpu:{chips}")["chips"] == chips


def test_the_table_shows_memory_kernels_and_slices(cpu_plan):
    table = report.format_table(cpu_plan)
    assert re.search(r"attention kernel +NO", table) and re.search(r"compute +float32, attention chunked, remat", table)
    yes = report.format_table(cpu_plan | {"kernels": {"splash_mha_fwd_residuals": 2}})
    assert re.search(r"attention kernel +yes", yes)
    two = report.format_table(cpu_plan | {"slices": 2, "between_slices": {"all-reduce": {"count": 1, "bytes": 1e6}}})
    assert "in 2 slices" in two and "1 a step, 1.0 MB a chip, NOT IN THE ESTIMATE" in two
    large = report.format_table(cpu_plan | {"fits": False, "largest_buffer": "9.9 GiB a chip, of something"})
    assert "DOES NOT FIT" in large and "9.9 GiB a chip, of something" in large


def test_the_command_prints_a_table_and_writes_json(tmp_path, monkeypatch, capsys):
    command = [sys.executable, "-m", "igpt", "plan", "--config=configs/imagenet.py:s", "--topology=gpu:8"]
    done = subprocess.run([*command, f"--json={tmp_path}/plan.json"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "76,571,648" in done.stdout and json.loads((tmp_path / "plan.json").read_text())["chips"] == 8
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as stopped:
        run_igpt([*command[3:-1], "--topology=tpu"])
    assert stopped.value.code == 2 and "give v4, v5e" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["absent/plan.json", "."])
@pytest.mark.parametrize("search", [True, False])
def test_a_file_that_cannot_be_written_is_found_before_anything_is_compiled(monkeypatch, tmp_path, name, search):
    for function in ("compile_plan", "search_plans"):
        monkeypatch.setattr(report, function, lambda *_: pytest.fail("it compiles"))
    args = argparse.Namespace(config=None, topology="v5e:2x4", json=f"{tmp_path}/{name}", search=search)
    with pytest.raises(UserError, match="--json=.* cannot be written"):
        report.run(args)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def benchmark(monkeypatch):
    """benchmarks/plan.py"""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("plan")


def test_the_record_and_the_guide_match_the_present_code(benchmark):
    assert list(RECORD["plans"]) and set(RECORD["plans"]) == {
        f"{size} {topology}" for size in benchmark.SIZES for topology in benchmark.TOPOLOGIES
    }
    for name, plan in RECORD["plans"].items():
        size, topology = name.split()
        assert plan["topology"] == topology and plan["chips"] == benchmark.count_chips(topology), name
        assert plan["fits"] == (plan["peak_share"] <= USABLE_SHARE) and {"jax", "libtpu"} <= plan["made"].keys(), name
        assert plan["peak_share"] == pytest.approx(plan["bytes_per_chip"]["peak"] / plan["bytes_per_chip"]["memory"])
        assert plan["fits"] or "GiB a chip" in plan["largest_buffer"], name
        again = benchmark.estimate_again(size, plan)
        assert all(again.get("checks", {}).values()) and again.get("checks") == plan.get("checks"), name
        if plan["fits"]:
            for figure in ("step_seconds", "mfu_causal", "days", "chip_hours"):
                assert again["estimate"][figure] == pytest.approx(plan["estimate"][figure]), (name, figure)
    guide = (ROOT / "docs" / "plans.md").read_text()
    assert f"<!-- table -->\n{benchmark.format_table(RECORD)}\n<!-- /table -->" in guide


@pytest.mark.parametrize(("flags", "searched"), [([], 1), (["--enough=2"], 2)])
def test_without_enough_only_missing_plans_are_searched(benchmark, monkeypatch, tmp_path, flags, searched):
    (tmp_path / "results").mkdir()
    path = tmp_path / "results" / "plan.json"
    path.write_text(json.dumps(RECORD | {"plans": {"s v5e:2x4": RECORD["plans"]["s v5e:2x4"]}}))  # its enough is 1
    again = []
    monkeypatch.setattr(benchmark, "search_best", lambda size, *_: again.append(size) or RECORD["plans"]["m v5e:2x4"])
    monkeypatch.setattr(sys, "argv", ["plan.py", f"--out={path}", "--sizes=s,m", "--topologies=v5e:2x4", *flags])
    benchmark.main()
    assert len(again) == searched and json.loads(path.read_text())["plans"].keys() == {"s v5e:2x4", "m v5e:2x4"}


def test_the_calibration_of_the_guide_is_the_recorded_one():
    recorded = json.loads((ROOT / "benchmarks" / "results" / "plan_calibration.json").read_text())
    guide = (ROOT / "docs" / "plans.md").read_text()
    for name, run in recorded["runs"].items():
        estimates = [run[f"{which}_estimate"] for which in ("first", "second")]
        shares = [
            run["published_mfu"],
            *(one[kind] for one in estimates for kind in ("mfu", "mfu_without_collectives")),
        ]
        assert f"| {name} | {run['chips']} | " + " | ".join(f"{100 * share:.1f} %" for share in shares) + " |" in guide
