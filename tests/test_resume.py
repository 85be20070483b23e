"""Runs that are cut short, damaged or diverge, and what becomes of them."""

import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from test_train import ROOT, assert_bitwise_equal, losses, records

import train
from igpt import checkpoint, data, metrics
from igpt import loss as loss_module
from igpt.errors import NonFiniteError, UserError
from igpt.preemption import PreemptedError, StopSignal


@pytest.mark.parametrize("causal", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["pixels", "bert"])
def test_a_continued_run_repeats_the_uninterrupted_one_bitwise(tiny_config, tmp_path, monkeypatch, causal):
    tiny_config.model.update(residual_dropout=0.1, causal=causal)
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
    assert_bitwise_equal(checkpoint.read_arrays(tmp_path / "whole", 6), checkpoint.read_arrays(tmp_path / "parts", 6))
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")


@pytest.mark.parametrize("name", ["digits", pytest.param("finetune_digits", marks=pytest.mark.slow)])
def test_a_run_killed_at_any_moment_ends_bitwise_where_an_uninterrupted_one_ends(tmp_path, name):
    """Real processes, a real SIGKILL, two devices."""
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
        if any(path.name.isdigit() for path in killed.glob("checkpoints/*")):  # one is finished
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
    assert_bitwise_equal(checkpoint.read_arrays(whole, steps), checkpoint.read_arrays(killed, steps))
    assert losses(killed) == losses(whole)
    if name == "finetune_digits":
        assert checkpoint.progress_at(killed, steps) == checkpoint.progress_at(whole, steps) != checkpoint.Progress()
        assert (killed / "finetune.json").read_bytes() == (whole / "finetune.json").read_bytes()
        assert checkpoint.finished_steps(killed) == checkpoint.finished_steps(whole)


def test_a_loss_that_is_not_finite_stops_training_at_the_last_good_checkpoint(tiny_config, tmp_path, monkeypatch):
    real = loss_module.next_pixel

    def poisoned(logits, tokens):  # once the head has grown past what three updates of this run can make of it
        return real(logits, tokens) * jax.numpy.where(abs(logits).max() > 0.2, jax.numpy.nan, 1.0)

    monkeypatch.setattr(loss_module, "next_pixel", poisoned)
    tiny_config.train.update(steps=40, checkpoint_every=1, eval_every=40, sample_every=40, num_samples=0)
    with pytest.raises(NonFiniteError, match=r"step \d+: loss nan.*checkpoint is that of step \d+.*learning_rate"):
        train.run(tiny_config, tmp_path / "run")
    steps = [int(path.name) for path in (tmp_path / "run" / "checkpoints").iterdir()]
    finite = losses(tmp_path / "run")
    assert max(steps) == max(finite) and np.isfinite(list(finite.values())).all()
    arrays = checkpoint.read_arrays(tmp_path / "run", max(steps))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(arrays["params"]))


def test_a_run_that_stopped_at_a_bad_step_goes_on_past_it_when_told_to_skip(tiny_config, tmp_path, monkeypatch, capsys):
    real = loss_module.next_pixel

    def poisoned(logits, tokens):  # the batch of one step, whenever it comes
        here = tokens.shape == bad.shape and (tokens == bad).all()
        return real(logits, tokens) * jax.numpy.where(here, jax.numpy.nan, 1.0)

    batches = {}
    real_get = data.TrainBatches.__getitem__

    def remembered(self, step):
        batches[step] = real_get(self, step)
        return batches[step]

    tiny_config.train.update(steps=8, checkpoint_every=3, eval_every=8, num_samples=0)
    monkeypatch.setattr(data.TrainBatches, "__getitem__", remembered)
    train.run(tiny_config, tmp_path / "clean")
    bad = batches[4]["tokens"]
    monkeypatch.setattr(loss_module, "next_pixel", poisoned)
    with pytest.raises(NonFiniteError, match=r"step 5: loss nan.*newest .* that of step 3.*on_bad_step=skip"):
        train.run(tiny_config, tmp_path / "run")
    tiny_config.train.on_bad_step = "skip"
    capsys.readouterr()
    train.run(tiny_config, tmp_path / "run")
    output = capsys.readouterr()
    assert "resumed after step 3" in output.out and "step 5: loss nan" in output.out + output.err
    assert losses(tmp_path / "run").keys() == {1, 2, 3, 4, 6, 7, 8}
    assert records(tmp_path / "run")[-2]["train/skipped"] == 1
    train.run(tiny_config, tmp_path / "skipped")
    assert_bitwise_equal(checkpoint.read_arrays(tmp_path / "run", 8), checkpoint.read_arrays(tmp_path / "skipped", 8))
    assert losses(tmp_path / "run")[4] == losses(tmp_path / "clean")[4]
    assert losses(tmp_path / "run")[7] != losses(tmp_path / "clean")[7]


def test_nothing_but_bad_steps_ends_a_run_that_skips(tiny_config, tmp_path, monkeypatch):
    monkeypatch.setattr(loss_module, "next_pixel", lambda logits, tokens: logits[..., 0] + jax.numpy.nan)
    tiny_config.train.update(steps=60, on_bad_step="skip", eval_every=60, sample_every=60, checkpoint_every=60)
    with pytest.raises(NonFiniteError, match="step 20: .* last of 20 bad steps in a row.*There is no checkpoint yet"):
        train.run(tiny_config, tmp_path / "run")


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
def test_of_a_damaged_newest_checkpoint_the_one_before_is_used(tiny_config, tmp_path, capsys, harm):
    tiny_config.train.update(num_samples=0, eval_every=6)
    train.run(tiny_config, tmp_path / "run")
    whole = checkpoint.read_arrays(tmp_path / "run", 6)
    harm(largest(tmp_path / "run" / "checkpoints" / "6" / "optimizer"))
    capsys.readouterr()
    train.run(tiny_config, tmp_path / "run")
    output = capsys.readouterr().out
    assert "checkpoint of step 6 is damaged (optimizer/" in output and "resumed after step 3" in output
    assert (tmp_path / "run" / "damaged-6-1" / "optimizer").is_dir()
    assert_bitwise_equal(whole, checkpoint.read_arrays(tmp_path / "run", 6))


def test_when_every_checkpoint_is_damaged_the_user_decides(tiny_config, tmp_path):
    tiny_config.train.update(num_samples=0, eval_every=6)
    train.run(tiny_config, tmp_path / "run")
    for step in ("3", "6"):
        damaged(largest(tmp_path / "run" / "checkpoints" / step / "params"))
    with pytest.raises(UserError, match=r"checkpoint of step 6 of .* is damaged \(params/.*there are \[3, 6\]"):
        checkpoint.restore_params(tmp_path / "run", None)
    with pytest.raises(UserError, match="every checkpoint of .* is damaged.*--start_over"):
        train.run(tiny_config, tmp_path / "run")
    assert {path.name for path in (tmp_path / "run").glob("damaged-*")} == {"damaged-3-1", "damaged-6-1"}


def test_a_save_that_a_kill_cut_short_is_passed_over_and_cleared_away(tiny_config, tmp_path):
    tiny_config.train.num_samples = 0
    train.run(tiny_config, tmp_path / "run")
    folder = tmp_path / "run" / "checkpoints"
    unfinished = folder / "6.orbax-checkpoint-tmp"
    (folder / "6").rename(unfinished)
    assert checkpoint.finished_steps(tmp_path / "run") == [3]
    train.run(tiny_config, tmp_path / "run")
    assert sorted(path.name for path in folder.iterdir()) == ["3", "6"]


def test_a_checkpoint_of_another_network_is_no_damage_and_is_not_moved(tiny_config, tmp_path):
    train.run(tiny_config, tmp_path / "run")
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    config["model"]["width"] = tiny_config.model.width = 24
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="step 6 of .* cannot be read as this network's"):
        train.run(tiny_config, tmp_path / "run")
    assert checkpoint.finished_steps(tmp_path / "run") == [3, 6]


@pytest.fixture
def told_to_stop(monkeypatch):
    """told_to_stop(check): SIGTERM comes just before the run looks for it the check-th time."""

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
def test_sigterm_at_any_look_saves_and_the_run_ends_bitwise_as_if_it_had_not_come(
    tmp_path, monkeypatch, told_to_stop, checks
):
    """Fine-tuning, where an evaluation decides what is kept; looks in steps and in evaluations."""
    from configs import finetune_digits

    config = finetune_digits.get_config()
    config.model.update(width=20, depth=1, num_heads=2, mlp_width=28, residual_dropout=0.1, remat="none")
    config.mesh.cpu_devices = 0
    config.train.update(steps=4, batch_size=8, log_every=1, eval_every=2, eval_batch_size=80, checkpoint_every=4)
    config.train.patience = 0
    train.run(config, tmp_path / "whole")
    whole, stopped = checkpoint.read_arrays(tmp_path / "whole", 4), 0
    for check in checks:
        workdir = tmp_path / f"stopped-{check}"
        told_to_stop(check)
        try:
            train.run(config, workdir)
        except PreemptedError as error:
            step = max(losses(workdir))
            assert f"saved after step {step}" in str(error) and checkpoint.finished_steps(workdir)[-1] == step
            stopped += 1
        monkeypatch.undo()
        train.run(config, workdir)
        assert_bitwise_equal(whole, checkpoint.read_arrays(workdir, 4))
        assert losses(workdir) == losses(tmp_path / "whole")
        evaluated = [record["step"] for record in records(workdir) if "eval/loss" in record]
        assert evaluated == [2, 4]
        assert checkpoint.progress_at(workdir, 4) == checkpoint.progress_at(tmp_path / "whole", 4)
        assert (workdir / "finetune.json").read_bytes() == (tmp_path / "whole" / "finetune.json").read_bytes()
    assert stopped >= min(len(checks), 10)


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


def test_metrics_that_cannot_be_written_end_in_a_message_too(tiny_config, tmp_path, monkeypatch):
    real = metrics.Writer.write

    def full(writer, step, values):
        if step > 4:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(writer, step, values)

    monkeypatch.setattr(metrics.Writer, "write", full)
    tiny_config.train.num_samples = 0
    with pytest.raises(checkpoint.StorageError, match=r"run: No space left on device. Finished checkpoints are"):
        train.run(tiny_config, tmp_path / "run")
    assert checkpoint.finished_steps(tmp_path / "run") == [3] and not checkpoint.damage(tmp_path / "run", 3)
    monkeypatch.undo()
    train.run(tiny_config, tmp_path / "run")


def test_a_full_disk_ends_in_a_message_and_the_older_checkpoint_stays(tmp_path):
    """From the second save on the process may write no file of more than 2,000 bytes."""
    limit = tmp_path / "limit.py"
    limit.write_text(
        "import resource, runpy, sys\n"
        "from igpt import checkpoint\n"
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
    assert done.returncode == 1, done.stderr  # which has more, of TensorStore's own threads
    assert "error: the checkpoint of step 8 could not be written" in done.stderr
    assert "That of step 4 is untouched; make room" in done.stderr
    assert checkpoint.finished_steps(tmp_path / "run") == [4] and not checkpoint.damage(tmp_path / "run", 4)
