"""metrics.jsonl has each step once, whatever happens to the program that writes it."""

import errno
import json
from pathlib import Path

import pytest

from igpt.track.lines import JsonLines
from tests.helpers import records


def test_records_are_json_lines_that_survive_a_restart_without_repeats(tmp_path):
    lines = JsonLines(tmp_path, after=0)
    for step in range(1, 6):
        lines.scalars(step, {"train/loss": float(step)})
    lines.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "train/lo')  # killed in the middle of a line
    lines = JsonLines(tmp_path, after=3)
    lines.scalars(4, {"train/loss": 40.0})
    lines.close()
    found = [(record["step"], record["train/loss"]) for record in records(tmp_path)]
    assert found == [(1, 1), (2, 2), (3, 3), (4, 40)]


def test_a_damaged_line_does_not_stop_a_resumed_run(tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1, "train/loss": 1.0}\n\xff\xfe\n[1]\n{"step": "1"}\n')
    JsonLines(tmp_path, after=1).close()
    assert [record["step"] for record in records(tmp_path)] == [1]


def test_a_file_that_cannot_be_read_for_a_while_is_not_emptied(tmp_path, monkeypatch):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "train/loss": 1.0}\n')

    def fail(path):
        raise OSError(errno.EIO, "Input/output error", str(path))

    with monkeypatch.context() as patch, pytest.raises(OSError, match="Input/output"):
        patch.setattr(Path, "read_bytes", fail)
        JsonLines(tmp_path, after=1)
    assert [record["step"] for record in records(tmp_path)] == [1]


def test_a_record_whose_line_has_no_end_yet_gets_one(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "train/loss": 1.0}')
    lines = JsonLines(tmp_path, after=1)
    lines.scalars(2, {"train/loss": 2.0})
    lines.close()
    assert [record["step"] for record in records(tmp_path)] == [1, 2]


def test_only_an_evaluation_that_will_be_repeated_is_dropped_at_the_step_itself(tmp_path):
    old = [{"step": 3, "train/loss": 1.0}, {"step": 3, "eval/loss": 1.0}]
    for repeats, kept in ((False, old), (True, old[:1])):
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in old))
        JsonLines(tmp_path, after=3, repeats_evaluation=repeats).close()
        assert records(tmp_path) == kept
