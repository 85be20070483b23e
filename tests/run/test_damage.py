"""Damaged checkpoints and full disks: an older sound checkpoint stays and is used."""

import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import jax.numpy as jnp
import pytest

import train
from igpt.errors import StorageError, UserError
from igpt.run import checkpoint, restore
from igpt.run.digests import damage
from igpt.state import TrainState
from igpt.track.lines import JsonLines
from tests.helpers import ROOT, assert_bitwise_equal, read_arrays


def damaged(path):
    contents = bytearray(path.read_bytes())
    contents[len(contents) // 2] ^= 1
    path.write_bytes(contents)


def largest(folder):
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


@pytest.mark.parametrize(
    "harm",
    [
        damaged,
        *(pytest.param(harm, marks=pytest.mark.slow) for harm in (Path.unlink, lambda path: os.truncate(path, 10))),
    ],
    ids=["bit", "lost", "cut"],
)
def test_the_older_checkpoint_is_used_if_the_newest_is_damaged(tiny_config, finished_run, tmp_path, capsys, harm):
    whole = read_arrays(tmp_path / "run", 6)
    harm(largest(tmp_path / "run" / "checkpoints" / "6" / "optimizer"))
    capsys.readouterr()
    train.run(tiny_config, tmp_path / "run")
    output = capsys.readouterr().out
    assert "checkpoint of step 6 is damaged (optimizer/" in output and "resumed after step 3" in output
    assert (tmp_path / "run" / "damaged-6-1" / "optimizer").is_dir()
    assert_bitwise_equal(whole, read_arrays(tmp_path / "run", 6))


def test_when_every_checkpoint_is_damaged_the_user_decides(tiny_config, finished_run, tmp_path):
    for step in ("3", "6"):
        damaged(largest(tmp_path / "run" / "checkpoints" / step / "params"))
    with pytest.raises(UserError, match=r"checkpoint of step 6 of .* is damaged \(params/.*there are \[3, 6\]"):
        restore.params(tmp_path / "run", {})
    with pytest.raises(UserError, match="every checkpoint of .* is damaged.*--start_over"):
        train.run(tiny_config, tmp_path / "run")
    assert {path.name for path in (tmp_path / "run").glob("damaged-*")} == {"damaged-3-1", "damaged-6-1"}
    lines = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    with pytest.raises(UserError, match="every checkpoint of .* is damaged.*--start_over"):
        train.run(tiny_config, tmp_path / "run")  # however often it is tried
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == lines


def test_damage_to_what_is_read_first_is_told_in_words(tiny_config, finished_run, tmp_path):
    progress = tmp_path / "run" / "checkpoints" / "6" / "progress" / "metadata"
    os.truncate(progress, 5)
    with pytest.raises(UserError, match=r"checkpoint of step 6 of .* is damaged \(progress/metadata differs"):
        restore.params(tmp_path / "run", {})
    checkpoint.save_params(tmp_path / "imported", {"gain": jnp.ones(3)}, 4)  # parameters only, without digests
    os.truncate(tmp_path / "imported" / "checkpoints" / "4" / "params" / "_METADATA", 5)
    with pytest.raises(UserError, match=r"checkpoint of step 4 of .* is damaged"):
        restore.params(tmp_path / "imported", {"gain": jnp.ones(3)})


def test_a_save_that_a_kill_cut_short_is_passed_over_and_cleared_away(tiny_config, finished_run, tmp_path):
    folder = tmp_path / "run" / "checkpoints"
    unfinished = folder / "6.orbax-checkpoint-tmp"
    (folder / "6").rename(unfinished)
    assert checkpoint.finished_steps(tmp_path / "run") == [3]
    train.run(tiny_config, tmp_path / "run")
    assert sorted(path.name for path in folder.iterdir()) == ["3", "6"]


def test_a_checkpoint_of_another_network_is_no_damage_and_is_not_moved(tiny_config, finished_run, tmp_path):
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    config["model"]["width"] = tiny_config.model.width = 24
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="step 6 of .* does not fit this network"):
        train.run(tiny_config, tmp_path / "run")
    assert checkpoint.finished_steps(tmp_path / "run") == [3, 6]


def test_metrics_that_cannot_be_written_end_in_a_message_too(tiny_config, tmp_path, monkeypatch):
    real, before = JsonLines.scalars, resource.getrlimit(resource.RLIMIT_FSIZE)

    def full(lines, step, values):
        if step == 5:
            while not (tmp_path / "run" / "checkpoints" / "3").is_dir():
                time.sleep(0.01)
            resource.setrlimit(resource.RLIMIT_FSIZE, (lines.file.tell() + 1, before[1]))
        real(lines, step, values)

    monkeypatch.setattr(JsonLines, "scalars", full)
    tiny_config.train.num_samples = 0
    try:
        with pytest.raises(StorageError, match=r"run: File too large. Finished checkpoints are unchanged"):
            train.run(tiny_config, tmp_path / "run")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert checkpoint.finished_steps(tmp_path / "run") == [3] and not damage(checkpoint.folder_of(tmp_path / "run", 3))
    monkeypatch.undo()
    train.run(tiny_config, tmp_path / "run")


def test_a_checkpoint_that_was_being_removed_is_not_taken_for_whole(tiny_config, finished_run, tmp_path, capsys):
    (tmp_path / "run" / "checkpoints" / "6" / "sha256.json").unlink()
    train.run(tiny_config, tmp_path / "run")
    assert "step 6 is damaged (sha256.json is missing)" in capsys.readouterr().out


def test_a_checkpoint_that_is_replaced_is_there_until_the_new_one_is(finished_run, tmp_path, monkeypatch):
    whole, held = read_arrays(tmp_path / "run", 6), tmp_path / "run" / "replaced-6"
    progress = restore.progress_at(tmp_path / "run", 6)
    monkeypatch.setattr(checkpoint.Checkpoints, "_seal", lambda self: 1 / 0)  # fails before the final name
    with pytest.raises(StorageError), checkpoint.Checkpoints(tmp_path / "run", 2, progress) as checkpoints:
        checkpoints.save(TrainState(jnp.int32(6), whole["params"], whole["optimizer"]["opt_state"]), 6)
    assert held.is_dir() and checkpoint.finished_steps(tmp_path / "run") == [3]
    monkeypatch.undo()
    assert restore.newest_sound_step(tmp_path / "run") == 6 and not held.exists()
    with checkpoint.Checkpoints(tmp_path / "run", 2, progress) as checkpoints:
        checkpoints.save(TrainState(jnp.int32(6), whole["params"], whole["optimizer"]["opt_state"]), 6)
        assert held.is_dir()
    assert checkpoint.finished_steps(tmp_path / "run") == [3, 6] and not held.exists()


def test_a_full_disk_ends_in_a_message_and_the_older_checkpoint_stays(tmp_path):
    """From the second save on the process may write no file of more than 2,000 bytes."""
    limit = tmp_path / "limit.py"
    limit.write_text(
        "import resource, runpy, sys\n"
        "from igpt.run import checkpoint\n"
        "real = checkpoint.Checkpoints.save\n"
        "def save(self, state, step):\n"
        "    if step > 4: self.newest(); resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))\n"
        "    real(self, state, step)\n"
        "checkpoint.Checkpoints.save = save\n"
        "sys.argv = ['train.py', *sys.argv[1:]]\n"
        "runpy.run_path('train.py', run_name='__main__')\n"
    )
    command = [
        sys.executable, str(limit), "--config=configs/digits.py", f"--workdir={tmp_path / 'run'}",
        "--config.train.steps=12", "--config.train.num_samples=0", "--config.train.checkpoint_every=4",
        "--config.model.width=16", "--config.model.depth=1", "--config.model.num_heads=2",
        "--config.train.batch_size=8", "--config.train.log_every=1000",
    ]  # fmt: skip
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1, done.stderr  # stderr also has lines of TensorStore's own threads
    assert "error: the checkpoint of step 8 could not be written" in done.stderr
    assert "The one of step 4 is unchanged; make room" in done.stderr
    assert checkpoint.finished_steps(tmp_path / "run") == [4] and not damage(checkpoint.folder_of(tmp_path / "run", 4))
