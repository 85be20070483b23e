"""Connects the processes of a run. Every host starts the same command.

    python train.py ... --coordinator=host0:12345 --processes=4 --process=I

Cloud TPU, SLURM's srun, Kubernetes' indexed jobs and Open MPI's mpirun need no flag, because JAX reads the environment.
If a host is missing, jax.distributed.initialize aborts the process without naming the host. Therefore a roll call
(roll_call.py) comes first. The collectives below communicate only if there are several processes. Every process must
then call them, in the same order.
"""

import os
import secrets
import signal
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from igpt.compiler import share_programs
from igpt.errors import UserError, end_at_sigterm
from igpt.files import AnyPath, is_bucket
from igpt.run.roll_call import roll_call
from igpt.sharding import all_devices

PROCESS_FLAGS = {
    "coordinator": "HOST:PORT of process 0; not needed on Cloud TPU, SLURM, Kubernetes, Open MPI",
    "processes": "number of processes; 1: this process alone, whatever the environment says",
    "process": "index of this process, from 0",
    "join_timeout": "seconds to wait for all processes (default 300)",
}


class ProcessPlace(NamedTuple):
    """The address of process 0, the number of processes, and this process's index and local devices."""

    coordinator: str
    processes: int
    process: int
    local_devices: list[int] | None = None


def add_process_arguments(parser) -> None:
    """Adds the flags of `join` to a parser."""
    group = parser.add_argument_group("several processes")
    for name, text in PROCESS_FLAGS.items():
        group.add_argument(f"--{name}", help=text)


def join_from(args, cpu_devices: int = 0, saves_at_sigterm: bool = False) -> None:
    """Calls `join` with the values of the flags that `add_process_arguments` added, then starts the devices.

    `cpu_devices`: the number of devices to make from this CPU's cores; 0: as JAX is set. Raises UserError as `join` and
    `sharding.all_devices` do.
    """
    join(*(getattr(args, name) for name in PROCESS_FLAGS), saves_at_sigterm=saves_at_sigterm)
    all_devices(cpu_devices)
    workdir = getattr(args, "workdir", None)
    if jax.process_count() > 1 and workdir and not is_bucket(workdir):
        share_programs(Path(workdir).absolute().parent / ".compiled")


def join(coordinator=None, processes=None, process=None, join_timeout=None, saves_at_sigterm: bool = False) -> None:
    """Connects this process with the other processes of a run, if there are any. Call it before any other use of JAX.

    The first four arguments may be strings. Set `saves_at_sigterm` if the command polls a StopSignal; otherwise SIGTERM
    ends the process. Raises UserError for an impossible value, and MissingProcessError if a process does not connect.
    """
    timeout = _number("join_timeout", join_timeout, 1, 86400) if join_timeout else 300
    place = named(coordinator, processes, process) if coordinator or processes or process else detected(timeout)
    if place is None or place.processes == 1:
        return
    roll_call(place.coordinator, place.process, place.processes, timeout)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_enable_preemption_service", saves_at_sigterm)  # this service catches SIGTERM
    if signal.getsignal(signal.SIGTERM) is end_at_sigterm:  # Python would run it only after all have connected
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    jax.distributed.initialize(
        place.coordinator,
        place.processes,
        place.process,
        place.local_devices,
        cluster_detection_method="deactivate",
        initialization_timeout=timeout,
    )


def named(coordinator, processes, process) -> ProcessPlace | None:
    """Returns the ProcessPlace that the flags describe, or None if there is a single process."""
    if not processes:
        raise UserError("--coordinator and --process need --processes, the number of all processes")
    count = _number("processes", processes, 1, 1 << 20)
    if count == 1:
        return None
    if not is_address(coordinator or "") or process is None:
        raise UserError(
            f"--processes={count} needs --coordinator=HOST:PORT, the address of process 0, and --process=0 to "
            f"{count - 1}, different in each process; given were --coordinator={coordinator} and --process={process}"
        )
    return ProcessPlace(coordinator, count, _number("process", process, 0, count - 1))


def is_address(text: str) -> bool:
    """Whether a text is HOST:PORT."""
    host, _, port = text.rpartition(":")
    return bool(host) and port.isascii() and port.isdecimal() and 0 < int(port) < 1 << 16


def _number(name: str, value, low: int, high: int) -> int:
    text = str(value)
    if not (text.isascii() and text.isdecimal()) or not low <= int(text) <= high:
        raise UserError(f"--{name}={value}; give a whole number from {low} to {high}")
    return int(text)


def detected(timeout: int) -> ProcessPlace | None:
    """Returns the ProcessPlace that JAX reads from the environment, or None if there is a single process."""
    # This class is private to JAX, but only it lists the clusters that JAX knows; jax.distributed.initialize uses it.
    from jax._src.clusters import ClusterEnv

    signs, slurm_tasks = _signs_of_others(), os.environ.get("SLURM_STEP_NUM_TASKS")
    in_step = "SLURM_STEP_NODELIST" in os.environ and slurm_tasks != "1"
    if not (signs or in_step) and (slurm_tasks or "KUBERNETES_SERVICE_HOST" in os.environ):
        return None  # JAX would mistake a shell in an allocation, or a single pod, for a cluster
    devices = os.environ.get("JAX_LOCAL_DEVICE_IDS")
    try:
        found = ClusterEnv.auto_detect_unset_distributed_params(
            os.environ.get("JAX_COORDINATOR_ADDRESS"),
            None,
            None,
            [int(device) for device in devices.split(",")] if devices else None,
            None,
            timeout,
        )
    except Exception as error:  # a scheduler's variables, metadata server or API can raise any error
        raise UserError(
            f"this environment looks like a cluster, but does not say which process this is ({error}); give "
            "--coordinator, --processes and --process, or --processes=1"
        ) from None
    if None not in found[:3]:
        if not is_address(found[0]):
            problem = f"the environment names {found[0]} as the address of process 0, which is not HOST:PORT"
            raise UserError(f"{problem}; mend JAX_COORDINATOR_ADDRESS or JAX_COORDINATOR_PORT, or give --coordinator")
        return ProcessPlace(*found)
    if signs:
        raise UserError(
            f"{', '.join(signs)}: this process was started as one of several, but JAX cannot find out which; give "
            "--coordinator, --processes and --process, or --processes=1 if it is alone. (No flags are needed in "
            "Kubernetes' indexed jobs after pip install kubernetes, nor under Open MPI before version 5.)"
        )
    return None


def _signs_of_others() -> list[str]:
    """The environment variables that show that there are several processes, even if JAX does not read them."""
    says = {
        "OMPI_COMM_WORLD_SIZE": lambda count: count != "1",
        "PMI_SIZE": lambda count: count != "1",
        "MEGASCALE_NUM_SLICES": lambda count: count != "1",
        "TPU_WORKER_HOSTNAMES": lambda names: "," in names,
        "TPU_PROCESS_ADDRESSES": lambda names: "," in names,
        "JOB_COMPLETION_INDEX": lambda index: True,
        "JAX_COORDINATOR_ADDRESS": lambda address: True,
    }
    return [
        f"{name}={os.environ[name]}"
        for name, several in says.items()
        if name in os.environ and several(os.environ[name])
    ]


def is_first_process() -> bool:
    """Whether this is process 0, which writes files and prints."""
    return jax.process_index() == 0


def broadcast(values):
    """Returns the numbers that process 0 passes, on every process."""
    if jax.process_count() == 1:
        return values
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.broadcast_one_to_all(np.asarray(values)))


def all_processes(true: bool) -> bool:
    """Returns whether the argument is True on every process."""
    if jax.process_count() == 1:
        return true
    from jax.experimental import multihost_utils

    return bool(np.asarray(multihost_utils.process_allgather(np.asarray(true))).all())


def barrier() -> None:
    """Returns once every process has called it."""
    all_processes(True)


def exists(path: AnyPath) -> bool:
    """Returns, on every process, whether this path exists on process 0."""
    return bool(broadcast(path.exists()))


def check_seen(path: AnyPath) -> None:
    """Raises UserError if this path does not exist on every process."""
    if not all_processes(path.exists()):
        raise UserError(
            f"process 0 sees {path}, but not every process does; give a --workdir that all hosts share, on a network "
            "file system or in a bucket"
        )


def check_shared(workdir: AnyPath) -> None:
    """Raises UserError unless every process sees a new file that process 0 writes into the workdir."""
    if jax.process_count() == 1:
        return
    mark = workdir / f".seen-by-all-{int(broadcast(np.int32(secrets.randbits(31))))}"
    if is_first_process():
        mark.touch()
    barrier()
    try:
        check_seen(mark)
    finally:
        if is_first_process():
            mark.unlink(missing_ok=True)
