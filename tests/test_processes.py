"""Several real processes on one machine, connected as hosts are: gloo over loopback, a few CPU devices each."""

import os
import signal
import socket
import subprocess
import sys
import time

import pytest
from test_train import ROOT, assert_bitwise_equal, losses

from igpt import checkpoint


def command(workdir, devices, *fields):
    return [
        sys.executable, "train.py", "--config=configs/digits.py", f"--workdir={workdir}",
        "--config.train.log_every=1", "--config.train.num_samples=0", "--config.train.batch_size=16",
        "--config.model.width=16", "--config.model.depth=2", "--config.model.num_heads=4",
        "--config.optim.warmup_steps=2", "--config.mesh.fsdp=2", "--config.mesh.tensor=2",
        "--config.model.residual_dropout=0.1", f"--config.mesh.cpu_devices={devices}", *fields,
    ]  # fmt: skip


def start(workdir, processes, *fields):
    """Eight devices in so many processes, each with its own output."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    started = []
    for index in range(processes):
        place = [f"--coordinator=localhost:{port}", f"--processes={processes}", f"--process={index}"]
        arguments = [*command(workdir, 8 // processes, *fields), *(place if processes > 1 else [])]
        started.append(
            subprocess.Popen(
                arguments, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
            )
        )
    return started


def ended(started, timeout=400):
    """(exit code, output, errors) of each."""
    texts = [process.communicate(timeout=timeout) for process in started]
    return [(process.returncode, *text) for process, text in zip(started, texts, strict=True)]


def close(one, other):
    assert one.keys() == other.keys()
    return max(abs(one[step] - other[step]) for step in one) < 1e-5


def test_two_processes_learn_what_one_does_and_only_the_first_speaks_and_writes(tmp_path):
    fields = ("--config.train.steps=6", "--config.train.eval_every=6", "--config.train.checkpoint_every=6")
    alone = start(tmp_path / "one", 1, *fields)
    together = start(tmp_path / "two", 2, *fields)
    [(code, output, errors)] = ended(alone)
    assert code == 0, errors
    (code, output, errors), (other_code, other_output, other_errors) = ended(together)
    assert code == other_code == 0, errors + other_errors
    assert "2 process(es), mesh data 2 x fsdp 2 x tensor 2" in output and "finished step 6" in output
    assert "step" not in other_output and "step/s" not in other_errors  # only process 0 speaks
    assert close(losses(tmp_path / "one"), losses(tmp_path / "two"))
    assert len(list((tmp_path / "two").glob("events*"))) == 1


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


INTERLEAVED = """
import sys
import jax
import numpy as np
from jax.sharding import AxisType, Mesh
from igpt import launch, sharding

jax.config.update("jax_num_cpu_devices", 4)
launch.join(sys.argv[1], "2", sys.argv[2])
devices = np.array(jax.devices())[[0, 4, 1, 5, 6, 2, 3, 7]].reshape(4, 2, 1)
mesh = Mesh(devices, sharding.AXES, axis_types=(AxisType.Auto,) * 3)
rows = sharding.process_rows(24, mesh)
assert len(rows) == 12 and np.diff(rows).max() > 1, rows
x = np.arange(72).reshape(24, 3)
there = sharding.to_devices({"x": x[rows]}, 24, mesh)["x"]
with jax.set_mesh(mesh):
    np.testing.assert_array_equal(jax.jit(sharding.replicate)(there), x)
"""


def test_hosts_whose_rows_of_a_batch_do_not_lie_together_put_them_where_they_belong():
    """As on a pod, where a host is a block of the torus."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"localhost:{probe.getsockname()[1]}"
    started = [
        subprocess.Popen(
            [sys.executable, "-c", INTERLEAVED, address, str(index)],
            cwd=ROOT,
            env=os.environ | {"JAX_PLATFORMS": "cpu"},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for index in range(2)
    ]
    outcomes = ended(started)
    assert [code for code, _, _ in outcomes] == [0, 0], outcomes


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
def test_fifty_steps_of_several_processes_are_those_of_one_and_each_goes_on_from_the_others(tmp_path, processes):
    fields = ("--config.train.eval_every=25", "--config.train.checkpoint_every=25")
    for name, count in (("one", 1), ("several", processes)):
        assert [code for code, _, _ in ended(start(tmp_path / name, count, *fields, "--config.train.steps=50"))] == [
            0
        ] * count
    assert close(losses(tmp_path / "one"), losses(tmp_path / "several"))
    assert len(losses(tmp_path / "one")) == 50
    for name, count in (("one", processes), ("several", 1)):  # swapped: from step 25 on the other number goes on
        (tmp_path / name / "checkpoints" / "50").rename(tmp_path / f"{name}-50")
        before = losses(tmp_path / name)
        outcomes = ended(start(tmp_path / name, count, *fields, "--config.train.steps=50"))
        assert [code for code, _, _ in outcomes] == [0] * count, outcomes
        assert "resumed after step 25" in outcomes[0][1]
        assert close(before, losses(tmp_path / name))


@pytest.mark.slow
def test_a_run_of_two_processes_that_are_killed_ends_bitwise_where_an_uninterrupted_one_ends(tmp_path):
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
    assert_bitwise_equal(
        checkpoint.read_arrays(tmp_path / "whole", 60), checkpoint.read_arrays(tmp_path / "killed", 60)
    )
