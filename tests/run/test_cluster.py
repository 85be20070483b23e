"""How processes find each other: by a roll call over real sockets, by flags and by the environment."""

import socket
import sys
import threading
import time
import types
import warnings

import jax
import numpy as np
import pytest

from igpt.errors import UserError
from igpt.run import cluster as launch
from igpt.run.cluster import Place


@pytest.fixture
def address():
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return f"localhost:{probe.getsockname()[1]}"


def called(places, timeout=20.0, delays=()):
    """How the roll call ends in each process: None or its error message. `delays`: seconds, or functions that wait."""
    found = [None] * len(places)

    def answer(index, place):
        delay = delays[index] if delays else 0.0
        delay() if callable(delay) else time.sleep(delay)
        try:
            launch.roll_call(place, timeout)
        except UserError as error:
            found[index] = str(error)

    threads = [threading.Thread(target=answer, args=item) for item in enumerate(places)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout + 30)
        assert not thread.is_alive()
    return found


@pytest.mark.parametrize("delays", [(0.0, 0.3, 0.0, 0.1), (0.6, 0.0, 0.2, 0.0)], ids=["0 first", "0 last"])
def test_the_roll_call_ends_when_all_have_come_in_any_order(address, delays):
    assert called([Place(address, 4, i) for i in range(4)], delays=delays) == [None] * 4
    with socket.create_server(("", int(address.partition(":")[2]))):
        pass  # the port is free again, for the runtime


def test_a_process_that_came_learns_how_many_came_and_who_is_missing(address):
    found = called([Place(address, 5, i) for i in (0, 1, 3)], timeout=5.0)
    assert len(set(found)) == 1
    assert found[0].startswith("3 of 5 processes came in 5 seconds; missing: 2, 4.")
    assert address in found[0] and "--join_timeout" in found[0]


def test_without_process_0_the_others_name_its_address(address):
    [found] = called([Place(address, 3, 2)], timeout=1.0)
    assert found.startswith(f"process 2 of 3 did not hear from process 0 at {address} in 1 seconds (Connection")


@pytest.mark.parametrize(
    ("other", "message"),
    [((3, 1), "number 1 of 3; process 0 was told that there are 4"), ((4, 1), "number 1 is there already")],
)
def test_processes_with_different_flags_are_refused(address, other, message):
    found = called([Place(address, 4, 0), Place(address, 4, 1), Place(address, *other)], timeout=3.0)
    assert all(message in words for words in found[:1]) and any(message in words for words in found[1:] if words)


def test_a_stranger_at_the_port_is_not_counted(address):
    host, port = address.split(":")

    def knock():
        for words in (
            b"GET / HTTP/1.1\r\n\r\n",
            b"igpt 1 x\n",
            b"",
            b"\xff" * 100 + b"\n",
            b"igpt -1 2\n",
            b"igpt 1 " + b"9" * 5000,
        ):
            time.sleep(0.05)
            with socket.create_connection((host, int(port))) as stranger:
                stranger.sendall(words)

    thread = threading.Timer(0.2, knock)
    thread.start()
    assert called([Place(address, 2, 0), Place(address, 2, 1)], delays=(0.0, 1.0)) == [None] * 2
    thread.join()


def test_a_process_that_is_restarted_while_it_waits_is_counted_once(address):
    host, port = address.split(":")

    def died():
        with socket.create_connection((host, int(port))) as first:
            first.sendall(b"igpt 1 3\n")
            time.sleep(0.2)

    thread = threading.Timer(0.2, died)
    thread.start()
    assert called([Place(address, 3, i) for i in range(3)], delays=(0.0, thread.join, 1.5)) == [None] * 3


def test_a_process_that_stopped_waiting_is_not_counted(address):
    """Process 1 connects long before process 0 and leaves. When process 2 comes, three have connected."""
    found = [None] * 3

    def answer(process, timeout, delay):
        time.sleep(delay)
        with pytest.raises(launch.MissingProcessError) as raised:
            launch.roll_call(Place(address, 3, process), timeout)
        found[process] = str(raised.value)

    times = [(0, 4.0, 0.0), (1, 1.0, 0.0), (2, 10.0, 2.5)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "GRACE", 0.0)
        threads = [threading.Thread(target=answer, args=time_) for time_ in times]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
    assert (
        "process 1 of 3 did not hear from process 0" in found[1] and "it was reached, and waits for others" in found[1]
    )
    assert found[0] == found[2] and found[0].startswith("2 of 3 processes came in 4 seconds; missing: 1.")


def test_a_port_that_is_taken_is_an_error(address):
    with socket.create_server(("", int(address.partition(":")[2]))):
        [found] = called([Place(address, 2, 0)])
    assert "cannot listen" in found and "choose another port" in found


def test_flags_give_the_coordinator_and_the_process_number():
    assert launch.named("host0:1234", "4", "3") == Place("host0:1234", 4, 3)
    assert launch.named("[::1]:1234", "2", "0") == Place("[::1]:1234", 2, 0)
    assert launch.named(None, "1", None) is None


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("host0:1", None, None), "need --processes"),
        ((None, "2", "0"), "needs --coordinator=HOST:PORT"),
        (("host0", "2", "0"), "needs --coordinator=HOST:PORT"),
        (("host0:99999", "2", "0"), "needs --coordinator=HOST:PORT"),
        (("host0:1", "2", None), "--process=0 to 1, which differs"),
        (("host0:1", "2", "2"), "--process=2; give a whole number from 0 to 1"),
        (("host0:1", "0", "0"), "--processes=0; give a whole number from 1"),
        (("host0:1", "many", "0"), "--processes=many"),
    ],
)
def test_incomplete_or_impossible_flags_are_refused(flags, message):
    with pytest.raises(UserError, match=message):
        launch.named(*flags)


SLURM = {
    "SLURM_JOB_ID": "4097",
    "SLURM_STEP_NODELIST": "node[07-09]",
    "SLURM_NTASKS": "3",
    "SLURM_PROCID": "2",
    "SLURM_LOCALID": "0",
}


def test_slurm_and_open_mpi_number_the_processes(monkeypatch):
    assert launch.detected(5) is None  # no variable is set
    with monkeypatch.context() as slurm:
        for name, value in SLURM.items():
            slurm.setenv(name, value)
        place = launch.detected(5)
        assert place == Place("node07:61441", 3, 2, [0])
    for name, value in {
        "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1:34911",
        "OMPI_COMM_WORLD_SIZE": "4",
        "OMPI_COMM_WORLD_RANK": "1",
        "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    }.items():
        monkeypatch.setenv(name, value)
    place = launch.detected(5)
    assert place.coordinator.startswith("10.96.0.1:") and place[1:] == (4, 1, [1])


def test_a_kubernetes_pod_that_is_no_indexed_job_is_alone(monkeypatch):
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    monkeypatch.delenv("JOB_COMPLETION_INDEX", raising=False)
    monkeypatch.setitem(sys.modules, "kubernetes", types.ModuleType("kubernetes"))  # JAX would use it, and fail
    assert launch.detected(5) is None


@pytest.mark.parametrize(
    ("environment", "sign"),
    [
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "1"}, "JOB_COMPLETION_INDEX=1"),
        ({f"OMPI_COMM_WORLD_{name}": "4" for name in ("SIZE", "RANK", "LOCAL_RANK")}, "mpi4py|SIZE=4"),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "PMI_SIZE": "2"}, "PMI_SIZE=2"),
        ({"JAX_COORDINATOR_ADDRESS": "host0:1"}, "JAX_COORDINATOR_ADDRESS=host0:1"),
        ({"TPU_WORKER_HOSTNAMES": "host0,host1"}, "TPU_WORKER_HOSTNAMES=host0,host1"),
    ],
    ids=["Kubernetes without its package", "Open MPI 5", "another MPI in a pod", "JAX's own", "TPUs without libtpu"],
)
def test_one_of_several_that_jax_does_not_understand_does_not_run_alone(monkeypatch, environment, sign):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setitem(sys.modules, "kubernetes", None)  # not installed
    with warnings.catch_warnings(action="ignore"), pytest.raises(UserError, match=f"({sign}).*--processes=1"):
        launch.detected(5)  # JAX warns of Kubernetes without its package


def test_slurm_and_open_mpi_count_in_a_pod_but_not_in_a_plain_shell(monkeypatch):
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    assert launch.detected(5) == Place("node07:61441", 3, 2, [0])
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")
    assert launch.detected(5) is None


def test_jax_variables_give_devices_and_the_coordinator(monkeypatch):
    own = {"JAX_LOCAL_DEVICE_IDS": "0,1,2,3", "JAX_COORDINATOR_ADDRESS": "node07-ib:1234"}
    for name, value in (SLURM | own).items():
        monkeypatch.setenv(name, value)
    assert launch.detected(5) == Place("node07-ib:1234", 3, 2, [0, 1, 2, 3])


def test_an_environment_that_contradicts_itself_is_refused(monkeypatch):
    for name, value in (SLURM | {"SLURM_NTASKS": "three"}).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="looks like a cluster's.*--processes=1"):
        launch.detected(5)


def test_one_process_joins_nobody(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError

    monkeypatch.setattr(jax.distributed, "initialize", refuse)
    launch.join(processes="1")
    launch.join()
    for name, value in (SLURM | {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}).items():
        monkeypatch.setenv(name, value)
    launch.join()


def test_alone_a_process_agrees_with_itself():
    assert launch.everywhere(True) and not launch.everywhere(False)
    values = np.arange(3.0)
    assert launch.agreed(values) is values
