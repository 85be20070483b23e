"""How a process learns its place among others: flags, and the variables of schedulers."""

import sys
import types
import warnings

import jax
import numpy as np
import pytest

from igpt.errors import UserError
from igpt.run import cluster
from igpt.run.cluster import ProcessPlace


def test_flags_give_the_coordinator_and_the_process_number():
    assert cluster.named("host0:1234", "4", "3") == ProcessPlace("host0:1234", 4, 3)
    assert cluster.named("[::1]:1234", "2", "0") == ProcessPlace("[::1]:1234", 2, 0)
    assert cluster.named(None, "1", None) is None


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("host0:1", None, None), "need --processes"),
        ((None, "2", "0"), "needs --coordinator=HOST:PORT"),
        (("host0", "2", "0"), "needs --coordinator=HOST:PORT"),
        (("host0:99999", "2", "0"), "needs --coordinator=HOST:PORT"),
        (("host0:1", "2", None), "--process=0 to 1, different in each process"),
        (("host0:1", "2", "2"), "--process=2; give a whole number from 0 to 1"),
        (("host0:1", "0", "0"), "--processes=0; give a whole number from 1"),
        (("host0:1", "many", "0"), "--processes=many"),
    ],
)
def test_incomplete_or_impossible_flags_are_refused(flags, message):
    with pytest.raises(UserError, match=message):
        cluster.named(*flags)


SLURM = {
    "SLURM_JOB_ID": "4097",
    "SLURM_STEP_NODELIST": "node[07-09]",
    "SLURM_NTASKS": "3",
    "SLURM_PROCID": "2",
    "SLURM_LOCALID": "0",
}


def test_slurm_and_open_mpi_number_the_processes(monkeypatch):
    assert cluster.detected(5) is None  # no variable is set
    with monkeypatch.context() as slurm:
        for name, value in SLURM.items():
            slurm.setenv(name, value)
        place = cluster.detected(5)
        assert place == ProcessPlace("node07:61441", 3, 2, [0])
    for name, value in {
        "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1:34911",
        "OMPI_COMM_WORLD_SIZE": "4",
        "OMPI_COMM_WORLD_RANK": "1",
        "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    }.items():
        monkeypatch.setenv(name, value)
    place = cluster.detected(5)
    assert place.coordinator.startswith("10.96.0.1:") and place[1:] == (4, 1, [1])


def test_a_kubernetes_pod_that_is_no_indexed_job_is_alone(monkeypatch):
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    monkeypatch.delenv("JOB_COMPLETION_INDEX", raising=False)
    monkeypatch.setitem(sys.modules, "kubernetes", types.ModuleType("kubernetes"))  # JAX would use it, and fail
    assert cluster.detected(5) is None


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
        cluster.detected(5)  # JAX warns of Kubernetes without its package


def test_slurm_and_open_mpi_count_in_a_pod_but_not_in_a_plain_shell(monkeypatch):
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    assert cluster.detected(5) == ProcessPlace("node07:61441", 3, 2, [0])
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")
    assert cluster.detected(5) is None


def test_jax_variables_give_devices_and_the_coordinator(monkeypatch):
    own = {"JAX_LOCAL_DEVICE_IDS": "0,1,2,3", "JAX_COORDINATOR_ADDRESS": "node07-ib:1234"}
    for name, value in (SLURM | own).items():
        monkeypatch.setenv(name, value)
    assert cluster.detected(5) == ProcessPlace("node07-ib:1234", 3, 2, [0, 1, 2, 3])


def test_an_environment_that_contradicts_itself_is_refused(monkeypatch):
    for name, value in (SLURM | {"SLURM_NTASKS": "three"}).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="looks like a cluster.*--processes=1"):
        cluster.detected(5)


@pytest.mark.parametrize("address", ["node07", "node07:abc", "node07:99999", ":1234"])
def test_an_address_of_the_environment_that_is_none_is_named(monkeypatch, address):
    for name, value in (SLURM | {"JAX_COORDINATOR_ADDRESS": address}).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=f"names {address} as the address of process 0.*JAX_COORDINATOR_PORT"):
        cluster.detected(5)


def test_one_process_joins_nobody(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError

    monkeypatch.setattr(jax.distributed, "initialize", refuse)
    cluster.join(processes="1")
    cluster.join()
    for name, value in (SLURM | {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}).items():
        monkeypatch.setenv(name, value)
    cluster.join()


def test_a_single_process_needs_no_communication(tmp_path):
    assert cluster.all_processes(True) and not cluster.all_processes(False)
    values = np.arange(3.0)
    assert cluster.broadcast(values) is values and cluster.is_first_process()
    assert cluster.exists(tmp_path) and not cluster.exists(tmp_path / "absent")
    cluster.barrier()
    cluster.check_shared(tmp_path)
    with pytest.raises(UserError, match="process 0 sees .*absent, but not every process does"):
        cluster.check_seen(tmp_path / "absent")
