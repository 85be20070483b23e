"""A run that is stopped or killed and then resumed ends with the same bits as an uninterrupted one."""

import os
import signal
import subprocess
import sys
import time

import pytest

import igpt
import train
from igpt.errors import UserError
from igpt.palette import Palette
from igpt.run import checkpoint, restore
from tests.helpers import ROOT, assert_bitwise_equal, losses, read_arrays


@pytest.mark.parametrize(
    ("causal", "optimizer"),
    [(True, "adam"), (True, "muon"), pytest.param(False, "adam", marks=pytest.mark.slow)],
    ids=["pixels", "muon", "bert"],
)
def test_a_continued_run_repeats_the_uninterrupted_one_bitwise(tiny_config, tmp_path, monkeypatch, causal, optimizer):
    tiny_config.model.update(residual_dropout=0.1, causal=causal)
    tiny_config.optim.name = optimizer
    train.run(tiny_config, tmp_path / "whole")

    class Interrupted(Exception):
        pass

    def save_then_stop(checkpoints, *arguments):
        real_save(checkpoints, *arguments)
        raise Interrupted

    real_save = checkpoint.Checkpoints.save
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(checkpoint.Checkpoints, "save", save_then_stop)
        train.run(tiny_config, tmp_path / "parts")
    train.run(tiny_config, tmp_path / "parts")
    assert_bitwise_equal(read_arrays(tmp_path / "whole", 6), read_arrays(tmp_path / "parts", 6))
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")


def test_a_palette_that_was_replaced_inside_a_run_is_refused(tiny_config, tmp_path):
    train.run(tiny_config, tmp_path / "run")
    palette = Palette(Palette.load(tmp_path / "run" / "palette.npy").centers[::-1])  # of the right size
    palette.save(tmp_path / "run" / "palette.npy")
    tiny_config.train.steps = 8
    with pytest.raises(UserError, match="palette.npy is another file than the one whose tokens this run has learnt"):
        train.run(tiny_config, tmp_path / "run", allowed=["train.steps"])
    with pytest.raises(UserError, match="palette.npy is another file"):
        igpt.load(tmp_path / "run")


@pytest.mark.parametrize("name", ["digits", pytest.param("finetune_digits", marks=pytest.mark.slow)])
def test_a_run_killed_at_any_moment_resumes_bitwise_as_if_uninterrupted(tmp_path, name):
    """With real processes, a real SIGKILL and two devices."""
    steps = {"digits": 120, "finetune_digits": 80}[name]
    command = [
        sys.executable, "train.py", f"--config=configs/{name}.py", f"--config.train.steps={steps}",
        "--config.optim.warmup_steps=5", "--config.train.checkpoint_every=10", "--config.train.eval_every=30",
        "--config.train.num_samples=0", "--config.train.log_every=1", "--config.model.width=24",
        "--config.model.depth=2", "--config.model.num_heads=2", "--config.model.residual_dropout=0.1",
        "--config.train.batch_size=16", "--config.train.patience=0",
    ]  # fmt: skip
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}

    def start(workdir):
        return subprocess.Popen(
            [*command, f"--workdir={workdir}"],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    uninterrupted, process = start(whole), start(killed)
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and process.poll() is None:
        if any(path.name.isdigit() for path in killed.glob("checkpoints/*")):  # one checkpoint is finished
            break
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert 10 <= max(losses(killed)) < steps
    output = uninterrupted.communicate(timeout=300)[0]
    assert uninterrupted.returncode == 0, output.decode()
    again = start(killed)
    output = again.communicate(timeout=300)[0].decode()
    assert again.returncode == 0, output
    assert "resumed after step " in output
    assert_bitwise_equal(read_arrays(whole, steps), read_arrays(killed, steps))
    assert losses(killed) == losses(whole)
    if name == "finetune_digits":
        assert restore.progress_at(killed, steps) == restore.progress_at(whole, steps) != checkpoint.Progress()
        assert (killed / "finetune.json").read_bytes() == (whole / "finetune.json").read_bytes()
        assert checkpoint.finished_steps(killed) == checkpoint.finished_steps(whole)
