"""After SIGTERM the run is saved. It then continues as if there had been no signal."""

import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import train
from igpt.run import checkpoint, restore
from igpt.run.preemption import PreemptedError, StopSignal
from tests.helpers import ROOT, assert_bitwise_equal, losses, read_arrays, records


def small_finetuning(**train):
    from configs import finetune_digits

    config = finetune_digits.get_config()
    config.model.update(width=20, depth=1, num_heads=2, mlp_width=28, residual_dropout=0.1, remat="none")
    config.mesh.cpu_devices = 0
    config.train.update(steps=4, batch_size=8, log_every=1, eval_every=2, eval_batch_size=80, checkpoint_every=4)
    config.train.update(patience=0, **train)
    return config


@pytest.fixture
def stop_at_check(monkeypatch):
    """stop_at_check(check) sends SIGTERM just before the run checks for it for the check-th time."""

    def at(check):
        real, count = StopSignal.requested, [0]

        def requested(signal_):
            count[0] += 1
            if count[0] == check:
                signal.raise_signal(signal.SIGTERM)
            return real(signal_)

        monkeypatch.setattr(StopSignal, "requested", requested)

    return at


@pytest.mark.parametrize(
    "checks", [(3, 10), pytest.param(range(1, 14), marks=pytest.mark.slow)], ids=["evaluations", "all"]
)
def test_sigterm_at_any_check_saves_and_the_resumed_run_is_bitwise_equal(tmp_path, monkeypatch, stop_at_check, checks):
    """Fine-tuning, where an evaluation decides which step is kept. A run checks in steps and in evaluations."""
    config = small_finetuning()
    train.run(config, tmp_path / "whole")
    whole, stopped = read_arrays(tmp_path / "whole", 4), 0
    for check in checks:
        workdir = tmp_path / f"stopped-{check}"
        stop_at_check(check)
        try:
            train.run(config, workdir)
        except PreemptedError as error:
            step = max(losses(workdir))
            assert f"saved after step {step}" in str(error) and checkpoint.finished_steps(workdir)[-1] == step
            stopped += 1
        monkeypatch.undo()
        train.run(config, workdir)
        assert_bitwise_equal(whole, read_arrays(workdir, 4))
        assert losses(workdir) == losses(tmp_path / "whole")
        evaluated = [record["step"] for record in records(workdir) if "eval/loss" in record]
        assert evaluated == [2, 4]
        assert restore.progress_at(workdir, 4) == restore.progress_at(tmp_path / "whole", 4)
        assert (workdir / "finetune.json").read_bytes() == (tmp_path / "whole" / "finetune.json").read_bytes()
    assert stopped >= min(len(checks), 10)


def test_an_evaluation_interrupted_twice_is_completed_the_third_time(tmp_path, monkeypatch, stop_at_check):
    config = small_finetuning(profile_at=2)  # profiles a step that is not repeated
    train.run(config, tmp_path / "whole")
    for check in (3, 1):  # the first check in the evaluation of step 2, then the first check of all, in it too
        stop_at_check(check)
        with pytest.raises(PreemptedError, match="saved after step 2"):
            train.run(config, tmp_path / "run")
        monkeypatch.undo()
    train.run(config, tmp_path / "run")
    assert_bitwise_equal(read_arrays(tmp_path / "whole", 4), read_arrays(tmp_path / "run", 4))
    assert [record["step"] for record in records(tmp_path / "run") if "eval/loss" in record] == [2, 4]
    assert restore.progress_at(tmp_path / "run", 4) == restore.progress_at(tmp_path / "whole", 4)


def test_patience_that_ends_in_a_resumed_evaluation_ends_the_run(tmp_path, monkeypatch, stop_at_check):
    config = small_finetuning(steps=8)
    config.train.patience, real = 1, train.evaluate

    def never_better(*inputs):
        found = real(*inputs)
        return found and found | {"eval/accuracy": 0.5}

    monkeypatch.setattr(train, "evaluate", never_better)
    stop_at_check(8)
    with pytest.raises(PreemptedError, match="saved after step 4"):
        train.run(config, tmp_path / "run")
    monkeypatch.undo()
    monkeypatch.setattr(train, "evaluate", never_better)
    train.run(config, tmp_path / "run")
    assert max(losses(tmp_path / "run")) == 4 and (tmp_path / "run" / "finetune.json").exists()


def test_sigterm_while_a_run_imports_its_modules_ends_with_code_75(tmp_path):
    command = [sys.executable, "train.py", "--config=configs/digits.py", f"--workdir={tmp_path / 'run'}"]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)

    def handles_sigterm() -> bool:
        lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
        caught = next(line.split()[1] for line in lines if line.startswith("SigCgt"))
        return bool(int(caught, 16) >> (signal.SIGTERM - 1) & 1)

    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not handles_sigterm():
        time.sleep(0.01)
    assert "jaxlib" not in Path(f"/proc/{process.pid}/maps").read_text()  # the slow imports are still to come
    process.send_signal(signal.SIGTERM)
    assert "stopped: SIGTERM came" in process.communicate(timeout=60)[1]
    assert process.returncode == 75 and not (tmp_path / "run").exists()


def test_sigterm_to_a_real_process_saves_and_ends_with_code_75(tmp_path):
    command = [
        sys.executable, "train.py", "--config=configs/digits.py", f"--workdir={tmp_path / 'run'}",
        "--config.train.steps=100000", "--config.train.log_every=1", "--config.train.num_samples=0",
        "--config.model.width=16", "--config.model.depth=1", "--config.model.num_heads=2",
        "--config.train.batch_size=8", "--config.train.checkpoint_every=100000",
    ]  # fmt: skip
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    lines = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (lines.exists() and lines.read_text().count("\n") > 3):
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    error = process.communicate(timeout=60)[1]
    assert process.returncode == 75 and "Traceback" not in error
    [step] = checkpoint.finished_steps(tmp_path / "run")
    assert f"stopped: SIGTERM came; the run is saved after step {step}" in error.splitlines()[-1]
    assert max(losses(tmp_path / "run")) == step


def test_a_second_sigterm_is_obeyed_at_once_and_the_old_handler_comes_back():
    heard = []
    before = signal.signal(signal.SIGTERM, lambda *_: heard.append(1))
    try:
        with StopSignal() as stop:
            assert not stop.requested()
            signal.raise_signal(signal.SIGTERM)
            assert stop.requested() and not heard
            signal.raise_signal(signal.SIGTERM)
            assert heard == [1]
        signal.raise_signal(signal.SIGTERM)
        assert heard == [1, 1]
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_run_in_a_thread_leaves_signals_alone():
    def body():
        with StopSignal() as stop:
            found.append(stop.requested())

    found = []
    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert found == [False]
