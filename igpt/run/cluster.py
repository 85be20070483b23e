"""Several processes, one program: every host starts the same command, and they find each other here.

    python train.py ... --coordinator=host0:12345 --processes=4 --process=I

No flag is needed on Cloud TPU, under SLURM's srun, in Kubernetes' indexed jobs or under Open MPI's mpirun: there JAX
reads the environment. A roll call (roll_call.py) comes before jax.distributed.initialize, which aborts the process
without naming the missing host. The collectives below do nothing if there is one process; otherwise every process must
call them, in the same order.
"""

import os
import secrets
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from igpt.errors import UserError
from igpt.run.roll_call import roll_call

PROCESS_FLAGS = {
    "coordinator": "HOST:PORT of process 0; not needed on Cloud TPU, SLURM, Kubernetes, Open MPI",
    "processes": "number of processes; 1: this process alone, whatever the environment says",
    "process": "index of this process, from 0",
    "join_timeout": "seconds to wait for all processes (default 300)",
}


class ProcessPlace(NamedTuple):
    """The place of this process among all."""

    coordinator: str
    processes: int
    process: int
    local_devices: list[int] | None = None


def add_process_arguments(parser) -> None:
    """Adds the flags of `join` to a parser."""
    group = parser.add_argument_group("several processes")
    for name, text in PROCESS_FLAGS.items():
        group.add_argument(f"--{name}", help=text)


def join_from(args, saves_at_sigterm: bool = False) -> None:
    """`join` with the values of the flags that `add_process_arguments` added."""
    join(*(getattr(args, name) for name in PROCESS_FLAGS), saves_at_sigterm=saves_at_sigterm)


def join(coordinator=None, processes=None, process=None, join_timeout=None, saves_at_sigterm: bool = False) -> None:
    """Connects this process with the others; does nothing if there are none. Call it before any other use of JAX.

    The first four may be strings. `saves_at_sigterm`: the command polls a StopSignal; without it SIGTERM ends the
    process as usual. Raises UserError for impossible values, MissingProcessError if a process does not arrive.
    """
    timeout = _number("join_timeout", join_timeout, 1, 86400) if join_timeout else 300
    place = named(coordinator, processes, process) if coordinator or processes or process else detected(timeout)
    if place is None or place.processes == 1:
        return
    roll_call(place.coordinator, place.process, place.processes, timeout)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_enable_preemption_service", saves_at_sigterm)  # the service would catch SIGTERM
    jax.distributed.initialize(
        place.coordinator,
        place.processes,
        place.process,
        place.local_devices,
        cluster_detection_method="deactivate",
        initialization_timeout=timeout,
    )


def named(coordinator, processes, process) -> ProcessPlace | None:
    """The place that the flags name; None for a single process."""
    if not processes:
        raise UserError("--coordinator and --process need --processes, the number of all processes")
    count = _number("processes", processes, 1, 1 << 20)
    if count == 1:
        return None
    host, _, port = (coordinator or "").rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 1 << 16 or process is None:
        raise UserError(
            f"--processes={count} needs --coordinator=HOST:PORT, the address of process 0, and --process=0 to "
            f"{count - 1}, different in each process; given were --coordinator={coordinator} and --process={process}"
        )
    return ProcessPlace(coordinator, count, _number("process", process, 0, count - 1))


def _number(name: str, value, low: int, high: int) -> int:
    text = str(value)
    if not text.isdecimal() or not low <= int(text) <= high:
        raise UserError(f"--{name}={value}; give a whole number from {low} to {high}")
    return int(text)


def detected(timeout: int) -> ProcessPlace | None:
    """The place that the environment gives this process, as JAX reads it; None if there is only one process."""
    # Private, but the only list of clusters that JAX knows; jax.distributed.initialize reads the same one.
    from jax._src.clusters import ClusterEnv

    signs, slurm_tasks = _signs_of_others(), os.environ.get("SLURM_STEP_NUM_TASKS")
    in_step = "SLURM_STEP_NODELIST" in os.environ and slurm_tasks != "1"
    if not (signs or in_step) and (slurm_tasks or "KUBERNETES_SERVICE_HOST" in os.environ):
        return None  # a shell in an allocation, or a single pod: JAX would take either for a cluster
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
    except Exception as error:  # a scheduler's variables, metadata server or API can fail in any way
        raise UserError(
            f"this environment looks like a cluster, but does not say which process this is ({error}); give "
            "--coordinator, --processes and --process, or --processes=1"
        ) from None
    if None not in found[:3]:
        return ProcessPlace(*found)
    if signs:
        raise UserError(
            f"{', '.join(signs)}: this process was started as one of several, but JAX cannot find out which; give "
            "--coordinator, --processes and --process, or --processes=1 if it is alone. (No flags are needed in "
            "Kubernetes' indexed jobs after pip install kubernetes, nor under Open MPI before version 5.)"
        )
    return None


def _signs_of_others() -> list[str]:
    """The environment variables that mean several processes, whether or not JAX understands them."""
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
    """The numbers of process 0, on every process."""
    if jax.process_count() == 1:
        return values
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.broadcast_one_to_all(np.asarray(values)))


def all_processes(true: bool) -> bool:
    """Whether the statement is true on every process."""
    if jax.process_count() == 1:
        return true
    from jax.experimental import multihost_utils

    return bool(np.asarray(multihost_utils.process_allgather(np.asarray(true))).all())


def barrier() -> None:
    """Returns once every process has called it."""
    all_processes(True)


def exists(path: Path) -> bool:
    """Whether process 0 sees this path, on every process."""
    return bool(broadcast(path.exists()))


def check_seen(path: Path) -> None:
    """Raises UserError unless every process sees this path."""
    if not all_processes(path.exists()):
        raise UserError(
            f"process 0 sees {path}, but not every process does; give a --workdir that all hosts share, on a network "
            "file system or a mounted bucket"
        )


def check_shared(workdir: Path) -> None:
    """Raises UserError unless every process sees a file that process 0 has just written into the workdir."""
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
