"""How W&B and trackio are called, with modules in their place; test_read_back.py uses the real ones."""

import importlib
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from igpt.files import as_path

CALLS = []


@pytest.fixture
def adapter(monkeypatch):
    """adapter("wandb", step=0) imports igpt.track.wandb with a stand-in for the package; CALLS has what it was told."""

    def use(name, step=0):
        def note(method):
            return lambda *arguments, **named: CALLS.append((method, arguments, named))

        run = SimpleNamespace(
            step=step, log=note("log"), finish=note("finish"), summary=SimpleNamespace(update=note("sum"))
        )
        package = SimpleNamespace(Image=lambda picture: f"image of {picture.shape}", finish=note("finish"))
        package.Settings = type("Settings", (dict,), {"model_fields": {"console", "finish_timeout"}})
        package.init = lambda *arguments, **named: CALLS.append(("init", arguments, named)) or run
        monkeypatch.setitem(sys.modules, name, package)
        monkeypatch.delitem(sys.modules, f"igpt.track.{name}", raising=False)
        return importlib.import_module(f"igpt.track.{name}")

    CALLS.clear()
    yield use
    for name in ("wandb", "trackio"):
        sys.modules.pop(f"igpt.track.{name}", None)


def test_a_resumed_run_of_wandb_has_its_id_and_repeats_no_step(adapter, tmp_path):
    tracker = adapter("wandb", step=5).WeightsAndBiases(tmp_path, {"train.steps": 9}, "train", "abc")
    for step in (4, 5):
        tracker.scalars(step, {"train/loss": 1.0})
    tracker.picture(6, "samples", np.zeros((4, 6, 3), np.uint8))
    tracker.summary(6, {"test/accuracy": 0.5})
    tracker.close(failed=True)
    (_, _, named), *rest = CALLS
    assert (named["id"], named["resume"], named["dir"], named["job_type"]) == ("abc", "allow", str(tmp_path), "train")
    assert named["settings"] == {"console": "off", "finish_timeout": 120.0}  # those that this version knows
    assert named["config"] == {"train.steps": 9}
    assert rest == [
        ("log", ({"train/loss": 1.0},), {"step": 5}),
        ("log", ({"samples": "image of (4, 6, 3)"},), {"step": 6}),
        ("log", ({"test/accuracy": 0.5},), {"step": 6}),
        ("sum", ({"test/accuracy": 0.5},), {}),
        ("finish", (), {"exit_code": 1}),
    ]


def test_a_run_of_trackio_is_named_by_its_folder_and_its_id(adapter, tmp_path, capsys):
    tracker = adapter("trackio").Trackio(tmp_path, {"data.image_size": (8, 8)}, "train", "abc")
    tracker.summary(6, {"test/accuracy": 0.5})
    tracker.close(failed=False)
    (_, (project,), named), *rest = CALLS
    assert project == "igpt" and named["resume"] == "allow" and named["config"] == {"data.image_size": "(8, 8)"}
    assert named["name"] == f"{tmp_path.parent.name}-{tmp_path.name}-abc"
    assert rest == [("log", ({"test/accuracy": 0.5},), {"step": 6}), ("finish", (), {})]


def test_a_run_of_trackio_has_the_same_name_however_its_folder_is_written(adapter, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path.parent)
    for folder in (tmp_path, Path(tmp_path.name), Path(".", tmp_path.name)):
        adapter("trackio").Trackio(folder, {}, "train", "abc")
    assert {named["name"] for _, _, named in CALLS} == {f"{tmp_path.parent.name}-{tmp_path.name}-abc"}
    CALLS.clear()
    adapter("trackio").Trackio(as_path("gs://bucket/runs/digits"), {}, "train", "abc")
    assert CALLS[0][2]["name"] == "runs-digits-abc"
