"""Several real processes on one machine, connected as hosts are: by gloo over loopback, with a few CPU devices each."""

import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from igpt.run import checkpoint
from igpt.run.digests import damage
from tests.helpers import ROOT, assert_bitwise_equal, losses, read_arrays


def options(workdir, devices, *fields):
    return [
        "--config=configs/digits.py", f"--workdir={workdir}",
        "--config.train.log_every=1", "--config.train.num_samples=0", "--config.train.batch_size=16",
        "--config.model.width=16", "--config.model.depth=2", "--config.model.num_heads=4",
        "--config.optim.warmup_steps=2", "--config.mesh.fsdp=2", "--config.mesh.tensor=2",
        "--config.model.residual_dropout=0.1", f"--config.mesh.cpu_devices={devices}", *fields,
    ]  # fmt: skip


def free_address():
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return f"localhost:{probe.getsockname()[1]}"


def python(*arguments):
    """Starts a Python process on CPU devices; its output is captured."""
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def start(workdir, processes, *fields, program=("train.py",)):
    """Eight devices, shared by that many processes. `workdir` is one folder, or a list with one for each process."""
    address, started = free_address(), []
    for index in range(processes):
        place = [f"--coordinator={address}", f"--processes={processes}", f"--process={index}"]
        own = workdir[index] if isinstance(workdir, list) else workdir
        arguments = [*options(own, 8 // processes, *fields), *(place if processes > 1 else [])]
        started.append(python(*program, *arguments))
    return started


def ended(started, timeout=400):
    """(exit code, stdout, stderr) of each process."""
    texts = [process.communicate(timeout=timeout) for process in started]
    return [(process.returncode, *text) for process, text in zip(started, texts, strict=True)]


def close(one, other):
    assert one.keys() == other.keys()
    return max(abs(one[step] - other[step]) for step in one) < 1e-5


VQVAE = (
    "--config.program=vqvae",
    "--config.optim.name=adam",
    *(f"--config.vqvae.{name}=8" for name in ("codes", "width", "code_width")),
)


@pytest.mark.parametrize("program", [(), VQVAE], ids=["igpt", "vqvae"])
def test_two_processes_learn_what_one_does_and_only_the_first_writes(tmp_path, program):
    fields = ("--config.train.steps=6", "--config.train.eval_every=6", "--config.train.checkpoint_every=6", *program)
    alone = start(tmp_path / "one", 1, *fields)
    together = start(tmp_path / "two", 2, *fields)
    [(code, output, errors)] = ended(alone)
    assert code == 0, errors
    (code, output, errors), (other_code, other_output, other_errors) = ended(together)
    assert code == other_code == 0, errors + other_errors
    assert "2 process(es), mesh data 2 x fsdp 2 x tensor 2" in output and "finished step 6" in output
    assert "step" not in other_output and "step/s" not in other_errors  # only process 0 prints
    assert close(losses(tmp_path / "one"), losses(tmp_path / "two"))
    written = (tmp_path / "two" / "metrics.jsonl").read_text().splitlines()
    assert len(written) == len(set(written)) == 7  # six steps and an evaluation, each once


def test_sigterm_to_one_of_two_saves_and_stops_both_at_the_same_step(tmp_path):
    fields = (
        "--config.train.eval_every=1000",
        "--config.train.checkpoint_every=1000",
        "--config.optim.schedule=constant",
    )
    started = start(tmp_path / "run", 2, *fields, "--config.train.steps=100000")
    lines = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and not (lines.exists() and lines.read_text().count("\n") > 3):
        assert all(process.poll() is None for process in started), ended(started)
        time.sleep(0.1)
    started[1].send_signal(signal.SIGTERM)
    outcomes = ended(started)
    assert [code for code, _, _ in outcomes] == [75, 75], outcomes
    [step] = checkpoint.finished_steps(tmp_path / "run")
    assert all(f"the run is saved after step {step}" in errors for _, _, errors in outcomes)


FILLS_UP = """
import resource, runpy, sys
from igpt.run import checkpoint
from igpt.run.digests import damage

def save(self, state, step, real=checkpoint.Checkpoints.save):
    if step > 4:
        self.newest()
        if "--process=1" in sys.argv:  # it may write no more than small files
            resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
    real(self, state, step)

checkpoint.Checkpoints.save = save
sys.argv = sys.argv[1:]
runpy.run_path("train.py", run_name="__main__")
"""


@pytest.mark.slow
def test_a_full_disk_ends_one_process_with_a_message_without_waiting(tmp_path):
    fields = ("--config.train.steps=8", "--config.train.eval_every=8", "--config.train.checkpoint_every=4")
    started = start(tmp_path / "run", 2, *fields, program=("-c", FILLS_UP, "train.py"))
    error = started[1].communicate(timeout=90)[1]  # orbax would wait for 20 minutes
    started[0].kill()  # the runtime's heartbeat would notice after 100 seconds
    started[0].communicate()
    assert started[1].returncode == 1
    assert "error: the checkpoint of step 8 could not be written" in error and "The one of step 4 is unchanged" in error
    assert checkpoint.finished_steps(tmp_path / "run") == [4] and not damage(checkpoint.folder_of(tmp_path / "run", 4))


def test_hosts_that_do_not_share_a_workdir_are_refused_before_training(tmp_path):
    folders = [tmp_path / "host0", tmp_path / "host1"]
    outcomes = ended(start(folders, 2, "--config.train.steps=2"), timeout=120)
    assert all(code in (2, -signal.SIGABRT) for code, _, _ in outcomes), outcomes  # or aborted by the other's exit
    assert any("but not every process does" in error and "that all hosts share" in error for _, _, error in outcomes)
    assert not any(path.is_file() for folder in folders for path in folder.rglob("*"))


SLEEPS = """
import sys, time
from igpt.run import cluster

cluster.join(sys.argv[1], "2", sys.argv[2])
cluster.barrier()
print("met", flush=True)
time.sleep(300)
"""


def test_sigterm_ends_a_command_that_would_save_nothing():
    address = free_address()
    started = [python("-c", SLEEPS, address, index) for index in range(2)]
    for process in started:
        assert "met\n" in iter(process.stdout.readline, "")
    for process in started:
        process.terminate()
    assert [code for code, _, _ in ended(started, timeout=60)] == [-signal.SIGTERM] * 2


INTERLEAVED = """
import sys
import jax
import numpy as np
from jax.sharding import AxisType, Mesh
from igpt import sharding
from igpt.run import cluster

jax.config.update("jax_num_cpu_devices", 4)
cluster.join(sys.argv[1], "2", sys.argv[2])
devices = np.array(jax.devices())[[0, 4, 1, 5, 6, 2, 3, 7]].reshape(4, 2, 1)
mesh = Mesh(devices, sharding.AXES, axis_types=(AxisType.Auto,) * 3)
rows = sharding.process_rows(24, mesh)
assert len(rows) == 12 and np.diff(rows).max() > 1, rows
x = np.arange(72).reshape(24, 3)
there = sharding.to_devices({"x": x[rows]}, 24, mesh)["x"]
with jax.set_mesh(mesh):
    np.testing.assert_array_equal(jax.jit(sharding.replicate)(there), x)
"""


def test_hosts_place_rows_of_a_batch_that_are_not_contiguous():
    """On a pod a host holds a block of the torus, and its rows of a batch are not contiguous."""
    address = free_address()
    outcomes = ended([python("-c", INTERLEAVED, address, index) for index in range(2)])
    assert [code for code, _, _ in outcomes] == [0, 0], outcomes


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
def test_fifty_steps_are_the_same_with_one_process_and_with_several(tmp_path, processes):
    fields = ("--config.train.eval_every=25", "--config.train.checkpoint_every=25")
    for name, count in (("one", 1), ("several", processes)):
        assert [code for code, _, _ in ended(start(tmp_path / name, count, *fields, "--config.train.steps=50"))] == [
            0
        ] * count
    assert close(losses(tmp_path / "one"), losses(tmp_path / "several"))
    assert len(losses(tmp_path / "one")) == 50
    # From step 25 each run continues with the other number of processes.
    for name, count in (("one", processes), ("several", 1)):
        (tmp_path / name / "checkpoints" / "50").rename(tmp_path / f"{name}-50")
        before = losses(tmp_path / name)
        outcomes = ended(start(tmp_path / name, count, *fields, "--config.train.steps=50"))
        assert [code for code, _, _ in outcomes] == [0] * count, outcomes
        assert "resumed after step 25" in outcomes[0][1]
        assert close(before, losses(tmp_path / name))


@pytest.mark.slow
def test_two_killed_processes_resume_bitwise_as_if_uninterrupted(tmp_path):
    fields = ("--config.train.steps=60", "--config.train.eval_every=20", "--config.train.checkpoint_every=10")
    assert [code for code, _, _ in ended(start(tmp_path / "whole", 2, *fields))] == [0, 0]
    started = start(tmp_path / "killed", 2, *fields)
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and not checkpoint.finished_steps(tmp_path / "killed"):
        time.sleep(0.1)
    for process in started:
        process.kill()
    assert [code for code, _, _ in ended(started)] == [-signal.SIGKILL] * 2
    assert [code for code, _, _ in ended(start(tmp_path / "killed", 2, *fields))] == [0, 0]
    assert_bitwise_equal(read_arrays(tmp_path / "whole", 60), read_arrays(tmp_path / "killed", 60))
