"""The journal shows what a run does, and hands numbers and pictures on."""

import io
import sys

import numpy as np
import pytest

from igpt.data.examples import ArrayImages, Source, Split
from igpt.run.checkpoint import Checkpoints
from igpt.run.directory import RunDirectory
from igpt.run.journal import Journal
from igpt.track.trackers import Trackers
from tests.helpers import RUN_MODEL, configured, records


@pytest.fixture
def terminal(monkeypatch):
    """stderr as a terminal; returns what was written to it."""

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    return stream


@pytest.fixture
def journal(tmp_path, terminal):
    run = RunDirectory(tmp_path, configured(**{"train.steps": 50, "train.log_every": 1}))
    source = Source("none", *[Split(ArrayImages(np.zeros((1, 8, 8, 3), np.uint8)), None)] * 3, channels=1)
    with Trackers(tmp_path, (), "train") as trackers, Checkpoints(tmp_path, max_to_keep=1) as checkpoints:
        trackers.open({})
        with Journal(run, checkpoints, trackers, RUN_MODEL, source, skipped=0) as journal:
            yield journal


def step(journal, number, loss):
    journal.add(number, {"train/loss": loss, "train/grad_norm": 1.0, "train/skipped": 0})
    journal.settle()


def test_the_bar_shows_the_eval_loss_beside_the_train_loss_and_the_time_left(journal, terminal):
    step(journal, 1, 2.5)
    journal.bar.refresh()
    assert " left" not in terminal.getvalue()
    step(journal, 2, 2.25)
    journal.evaluated(2, {"eval/loss": 2.125})
    step(journal, 3, 2.0)
    journal.bar.refresh()
    shown = terminal.getvalue().split("\r")[-1]
    assert " left, loss 2.0000, eval 2.1250, " in shown and "3/50 [" in shown


def test_the_bar_shows_what_compiles_evaluates_draws_or_saves_as_long_as_it_does(journal, terminal):
    for what in ("compiling", "evaluating", "drawing", "saving"):
        with journal.doing(what):
            assert f"\r{what}:   0%|" in terminal.getvalue()
        journal.bar.refresh()
        assert what not in terminal.getvalue().split("\r")[-1]


def test_grids_are_written_as_pictures(journal, tmp_path):
    journal.sampled(7, np.zeros((4, 6, 3), np.uint8))
    assert (tmp_path / "samples" / "0000007.png").read_bytes().startswith(b"\x89PNG")


def test_numbers_are_recorded(journal, tmp_path):
    step(journal, 1, 2.5)
    journal.evaluated(1, {"eval/loss": 2.125})
    assert [record.get("train/loss", record.get("eval/loss")) for record in records(tmp_path)] == [2.5, 2.125]
