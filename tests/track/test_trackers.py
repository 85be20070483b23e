"""All trackers get the same; one that fails warns once and stops nothing; wrong names are mistakes of the user."""

import json
import resource

import numpy as np
import pytest

from configs import base, probe
from igpt.config import Config
from igpt.errors import UserError
from igpt.probe.config import ProbeConfig
from igpt.track import names, tensorboard
from igpt.track.trackers import Trackers
from tests.helpers import records
from tests.track.read_back import of_tensorboard

PICTURE = np.zeros((4, 6, 3), np.uint8)


class Recorder:
    """A tracker that keeps its calls, and fails at a method whose name is `fails`."""

    def __init__(self, fails=""):
        self.calls, self.fails = [], fails

    def __getattr__(self, method):
        def call(*arguments, **named):
            self.calls.append((method, *arguments, *named.values()))
            if method == self.fails:
                raise ConnectionError("no route to host\nsecond line")

        return call


@pytest.fixture
def opened(monkeypatch):
    """opened(first=Recorder(), ...) makes Trackers open these, and allows their names."""

    def use(**trackers):
        monkeypatch.setattr(names, "EXTRAS", dict.fromkeys(trackers, ""))
        monkeypatch.setattr(Trackers, "_opened", lambda self, name, *_: trackers[name])
        return tuple(trackers)

    return use


def test_every_tracker_gets_every_number_picture_and_result(tmp_path, opened):
    one, other = Recorder(), Recorder()
    with Trackers(tmp_path, opened(one=one, other=other), "train") as trackers:
        trackers.open({})
        trackers.scalars(1, {"train/loss": np.float32(1.5), "train/grad_norm": np.inf})
        trackers.picture(1, "samples", PICTURE)
        trackers.summary(2, {"test/accuracy": 0.5})
    assert one.calls == other.calls
    assert one.calls == [
        ("scalars", 1, {"train/loss": 1.5}),
        ("picture", 1, "samples", PICTURE),
        ("summary", 2, {"test/accuracy": 0.5}),
        ("close", False),
    ]
    assert records(tmp_path) == [{"step": 1, "train/loss": 1.5}, {"step": 2, "test/accuracy": 0.5}]


@pytest.mark.parametrize("method", ["scalars", "picture", "summary", "close"])
def test_a_tracker_that_fails_warns_once_and_stops_neither_the_run_nor_the_others(tmp_path, opened, capsys, method):
    broken, sound = Recorder(fails=method), Recorder()
    with Trackers(tmp_path, opened(broken=broken, sound=sound), "train") as trackers:
        trackers.open({})
        for step in (1, 2, 3):
            trackers.scalars(step, {"train/loss": 1.0})
            trackers.picture(step, "samples", PICTURE)
        trackers.summary(3, {"test/accuracy": 0.5})
    warnings = capsys.readouterr().err.splitlines()
    assert len(warnings) == 1 and warnings[0].startswith("warning: broken records nothing any more (no route to host)")
    assert [call[0] for call in broken.calls].count(method) == 1 and broken.calls[-1][0] == method
    assert len(sound.calls) == 8 and len(records(tmp_path)) == 4


def test_a_tracker_that_cannot_start_warns_and_the_run_goes_on(tmp_path, opened, monkeypatch, capsys):
    chosen = opened(broken=None)
    monkeypatch.setattr(Trackers, "_opened", lambda *_: 1 / 0)
    with Trackers(tmp_path, chosen, "train") as trackers:
        trackers.open({})
        trackers.scalars(1, {"train/loss": 1.0})
    assert "warning: broken records nothing any more (division by zero)" in capsys.readouterr().err
    assert len(records(tmp_path)) == 1


def test_a_full_disk_under_tensorboard_is_a_warning_and_the_lines_go_on(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tensorboard, "FLUSH_SECONDS", 0)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Trackers(tmp_path, ("tensorboard",), "train") as trackers:
        trackers.open({"train.steps": 3})
        trackers.scalars(1, {"train/loss": 1.0})
        resource.setrlimit(resource.RLIMIT_FSIZE, (next(tmp_path.glob("events.*")).stat().st_size, before[1]))
        try:
            for step in (2, 3):
                trackers.scalars(step, {"train/loss": 1.0})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert capsys.readouterr().err.count("warning: tensorboard records nothing any more") == 1
    assert [record["step"] for record in records(tmp_path)] == [1, 2, 3]


def test_the_trackers_are_told_whether_the_run_failed(tmp_path, opened):
    recorder = Recorder()
    with pytest.raises(KeyError), Trackers(tmp_path, opened(one=recorder), "train") as trackers:
        trackers.open({})
        raise KeyError
    assert recorder.calls == [("close", True)]


def test_only_the_active_process_writes(tmp_path):
    with Trackers(tmp_path, ("tensorboard",), "train", active=False) as trackers:
        trackers.open({})
        trackers.scalars(1, {"train/loss": 1.0})
        trackers.picture(1, "samples", PICTURE)
        trackers.summary(1, {"test/accuracy": 1.0})
    assert list(tmp_path.iterdir()) == []


def test_a_resumed_run_keeps_its_identity_and_a_new_record_gets_another(tmp_path, opened):
    found = []
    chosen = opened(one=Recorder())
    for after in (0, 3, 3, None):
        with Trackers(tmp_path, chosen, "train") as trackers:
            trackers.open({}, after)
        found.append(json.loads((tmp_path / "trackers.json").read_text())["one"])
    assert found[0] == found[1] == found[2] != found[3]


def test_a_resumed_run_goes_on_in_tensorboard(tmp_path):
    for after, steps in ((0, (1, 2, 3, 4)), (2, (3, 4, 5))):
        with Trackers(tmp_path, ("tensorboard",), "train") as trackers:
            trackers.open({}, after)
            for step in steps:
                trackers.scalars(step, {"train/loss": float(10 * after + step)})
    numbers = {step: value for (step, _), value in of_tensorboard(tmp_path)[0].items()}
    assert numbers == {1: 1.0, 2: 2.0, 3: 23.0, 4: 24.0, 5: 25.0}


def test_a_picture_may_be_a_file(tmp_path, opened):
    from igpt.plots import save_png

    recorder = Recorder()
    save_png(PICTURE + 7, tmp_path / "confusion.png")
    with Trackers(tmp_path, opened(one=recorder), "train") as trackers:
        trackers.open({})
        trackers.picture(1, "confusion", tmp_path / "confusion.png")
    np.testing.assert_array_equal(recorder.calls[0][3], PICTURE + 7)


def test_an_unknown_or_repeated_tracker_is_a_mistake_that_names_the_allowed():
    for module, config in ((base, Config), (probe, ProbeConfig)):
        values = module.get_config()
        values.track = ("tensorboard", "mlflow")
        with pytest.raises(UserError, match="track names 'mlflow'.*; choose some of tensorboard, wandb, trackio"):
            config.of(values)
        values.track = ("wandb", "wandb")
        with pytest.raises(UserError, match="name each tracker once"):
            config.of(values)
        values.track = ()
        assert config.of(values).track == ()


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_tracker_without_its_package_is_a_mistake_that_names_the_extra(tmp_path, monkeypatch, name):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=rf"not installed; pip install -e '.\[{name}\]', or leave {name} out"):
        Trackers(tmp_path, ("tensorboard", name), "train")
    Trackers(tmp_path, ("tensorboard",), "train")
