"""Several processes, one program: every host starts the same command, and here they find each other.

    python train.py ... --coordinator=host0:12345 --processes=4 --process=I

Nothing has to be said on Cloud TPU, under SLURM's srun, in Kubernetes' indexed jobs or under Open MPI's mpirun: JAX
reads who and where it is from the environment, and its own runtime (jax.distributed) connects all. Before that comes a
roll call, since the runtime aborts without a word that counts when a host is missing.
"""

import contextlib
import os
import re
import secrets
import socket
import time
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from igpt.errors import UserError

FLAGS = {
    "coordinator": "HOST:PORT of process 0, where it is not found by itself (Cloud TPU, SLURM, Kubernetes, Open MPI).",
    "processes": "How many processes there are in all; 1: this one alone, whatever the environment says.",
    "process": "Which of them this is, from 0.",
    "join_timeout": "Seconds to wait for all of them (default 300).",
}
GRACE = 10.0  # seconds more for the verdict: process 0 may have started a little later
LONGEST = 1 << 16  # bytes of a message in the roll call


class MissingProcessError(UserError):
    """Not all processes came together."""

    exit_code = 1


class Place(NamedTuple):
    """A process among all."""

    coordinator: str
    processes: int
    process: int
    local_devices: list[int] | None = None


def join(coordinator=None, processes=None, process=None, join_timeout=None, saves_at_sigterm: bool = False) -> None:
    """Connects this process with the others; does nothing where there are none. Call it before anything of JAX.

    All but the last may be strings, of the command line. `saves_at_sigterm`: the command asks a StopSignal; of any
    other SIGTERM ends the process as ever. Raises UserError for what cannot be meant, MissingProcessError with counts.
    """
    timeout = _number("join_timeout", join_timeout, 1, 86400) if join_timeout else 300
    place = named(coordinator, processes, process) if coordinator or processes or process else detected(timeout)
    if place is None or place.processes == 1:
        return
    roll_call(place, timeout)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_enable_preemption_service", saves_at_sigterm)  # it would keep SIGTERM to itself
    jax.distributed.initialize(
        place.coordinator,
        place.processes,
        place.process,
        place.local_devices,
        cluster_detection_method="deactivate",
        initialization_timeout=timeout,
    )


def add_arguments(parser) -> None:
    """The flags of `join` for an argparse command."""
    group = parser.add_argument_group("several processes")
    for name, text in FLAGS.items():
        group.add_argument(f"--{name}", help=text)


def join_from(args, saves_at_sigterm: bool = False) -> None:
    """`join` with what `add_arguments` gave."""
    join(*(getattr(args, name) for name in FLAGS), saves_at_sigterm=saves_at_sigterm)


def named(coordinator, processes, process) -> Place | None:
    """The place that flags name; None for a process alone."""
    if not processes:
        raise UserError("--coordinator and --process need --processes, the number of all of them")
    count = _number("processes", processes, 1, 1 << 20)
    if count == 1:
        return None
    host, _, port = (coordinator or "").rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 1 << 16 or process is None:
        raise UserError(
            f"--processes={count} needs --coordinator=HOST:PORT, the address of process 0, and --process=0 to "
            f"{count - 1}, which differs on each; given were --coordinator={coordinator} and --process={process}"
        )
    return Place(coordinator, count, _number("process", process, 0, count - 1))


def _number(name: str, value, low: int, high: int) -> int:
    text = str(value)
    if not text.isdecimal() or not low <= int(text) <= high:
        raise UserError(f"--{name}={value}; give a whole number from {low} to {high}")
    return int(text)


def detected(timeout: int) -> Place | None:
    """The place that the environment gives this process, as JAX reads it; None where it says nothing of several."""
    # Private, but the only list of clusters that JAX knows; jax.distributed.initialize reads the same one.
    from jax._src.clusters import ClusterEnv

    signs, slurm_tasks = _signs_of_others(), os.environ.get("SLURM_STEP_NUM_TASKS")
    in_step = "SLURM_STEP_NODELIST" in os.environ and slurm_tasks != "1"
    if not (signs or in_step) and (slurm_tasks or "KUBERNETES_SERVICE_HOST" in os.environ):
        return None  # a shell in an allocation, or a pod alone, of which JAX thinks otherwise
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
    except Exception as error:  # of a scheduler's variables, metadata server or API: anything
        raise UserError(
            f"this environment looks like a cluster's, but does not say which process this is ({error}); give "
            "--coordinator, --processes and --process, or --processes=1"
        ) from None
    if None not in found[:3]:
        return Place(*found)
    if signs:
        raise UserError(
            f"{', '.join(signs)}: this process was started as one of several, but JAX cannot tell as which; give "
            "--coordinator, --processes and --process, or --processes=1 if it is alone. (Flags are not needed in "
            "Kubernetes' indexed jobs after pip install kubernetes, nor under Open MPI before 5.)"
        )
    return None


def _signs_of_others() -> list[str]:
    """The variables that say that this process is one of several, whether or not JAX understands them."""
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


def roll_call(place: Place, timeout: float) -> None:
    """Returns once all processes have come; on time-out tells each that came how many did, and which did not."""
    if place.process == 0:
        _call(place, time.monotonic() + timeout, timeout)
    else:
        _answer(place, time.monotonic() + timeout, timeout)


def _call(place: Place, deadline: float, timeout: float) -> None:
    """Process 0: listens on the port that the runtime will take over."""
    present: dict[int, socket.socket] = {}
    try:
        port = int(place.coordinator.rpartition(":")[2])
        both = dict(family=socket.AF_INET6, dualstack_ipv6=True) if socket.has_dualstack_ipv6() else {}
        listener = socket.create_server(("", port), backlog=place.processes, **both)
    except OSError as error:
        reason = f"process 0 cannot listen at {place.coordinator}: {error.strerror}"
        raise MissingProcessError(
            f"{reason}. If an earlier process is still ending, start it again; otherwise choose another port, by "
            "--coordinator or, where the environment names it, JAX_COORDINATOR_PORT"
        ) from None
    verdict = "all"
    with listener:
        while verdict == "all" and len(present := _still_there(present)) < place.processes - 1:
            listener.settimeout(max(deadline - time.monotonic(), 0.01))
            try:
                peer, _ = listener.accept()
            except TimeoutError:
                missing = sorted(set(range(1, place.processes)) - set(present))
                verdict = (
                    f"{len(present) + 1} of {place.processes} processes came in {timeout:.0f} seconds; missing: "
                    f"{', '.join(map(str, missing[:20]))}{' and others' if len(missing) > 20 else ''}. See whether "
                    f"they were started, by the same command, and whether they reach {place.coordinator}; "
                    "--join_timeout waits longer"
                )
                break
            claim = re.fullmatch(r"igpt (\d{1,9}) (\d{1,9})", _read(peer, 5.0))
            if not claim:
                peer.close()  # somebody else's knock
                continue
            process, processes = int(claim[1]), int(claim[2])
            present = _still_there(present)  # without one that was started again
            if processes != place.processes or not 0 < process < processes or process in present:
                verdict = (
                    f"a process says that it is number {process} of {processes}; process 0 was told that there are "
                    f"{place.processes}" + (f", and number {process} is there already" if process in present else "")
                )
            present[process if process not in present else -1] = peer
        for peer in present.values():
            with peer:
                _send(peer, verdict)
    if verdict != "all":
        raise MissingProcessError(verdict)


def _answer(place: Place, deadline: float, timeout: float) -> None:
    """Any other process: knocks until process 0 is there, says who it is, and waits for the verdict."""
    host, _, port = place.coordinator.rpartition(":")
    reason = "no address"
    while time.monotonic() < deadline:
        try:
            with socket.create_connection((host.strip("[]"), int(port)), timeout=5.0) as peer:
                reason = "it was reached, and waits for others"
                _send(peer, f"igpt {place.process} {place.processes}")
                verdict = _read(peer, deadline + GRACE - time.monotonic())
            if verdict == "all":
                return
            if verdict:
                raise MissingProcessError(verdict)
        except OSError as error:
            reason = error.strerror or str(error)
        time.sleep(0.2)
    raise MissingProcessError(
        f"process {place.process} of {place.processes} did not hear from process 0 at {place.coordinator} in "
        f"{timeout:.0f} seconds ({reason}); see whether it was started, and when, and whether the address is right; "
        "--join_timeout waits longer"
    )


def _still_there(present: dict[int, socket.socket]) -> dict[int, socket.socket]:
    """Those that have not given up waiting, or died."""
    gone = [process for process, peer in present.items() if _gone(peer)]
    for process in gone:
        present[process].close()
    return {process: peer for process, peer in present.items() if process not in gone}


def _gone(peer: socket.socket) -> bool:
    """Whether the other end, which only waits, has closed."""
    peer.setblocking(False)
    try:
        return not peer.recv(1)
    except BlockingIOError:
        return False
    except OSError:
        return True


def _send(peer: socket.socket, text: str) -> None:
    with contextlib.suppress(OSError):  # it has gone away: its own error is the better one
        peer.settimeout(5.0)
        peer.sendall(text.encode()[: LONGEST - 1] + b"\n")


def _read(peer: socket.socket, seconds: float) -> str:
    """A line, or what came of it in that time."""
    data, deadline = b"", time.monotonic() + seconds
    with contextlib.suppress(OSError):
        while not data.endswith(b"\n") and len(data) < LONGEST:
            peer.settimeout(max(deadline - time.monotonic(), 0.01))
            part = peer.recv(4096)
            if not part:
                break
            data += part
    return data.decode(errors="replace").strip()


def meet() -> None:
    """Returns once every process is here."""
    everywhere(True)


def check_shared(workdir: Path) -> None:
    """UserError unless every process sees what process 0 writes into the workdir; all have to ask."""
    if jax.process_count() == 1:
        return
    first = jax.process_index() == 0
    mark = workdir / f".seen-by-all-{int(agreed(np.array(secrets.randbits(31), np.int32)))}"
    if first:
        mark.touch()
    meet()
    try:
        check_seen(mark)
    finally:
        if first:
            mark.unlink(missing_ok=True)


def check_seen(path: Path) -> None:
    """UserError unless every process sees this file of the workdir; all have to ask."""
    if not everywhere(path.exists()):
        raise UserError(
            f"not every process sees {path}, which process 0 sees; give a --workdir that all hosts share, on a network "
            "file system or a mounted bucket"
        )


def agreed(values: np.ndarray) -> np.ndarray:
    """Process 0's numbers, for every process; all have to ask."""
    if jax.process_count() == 1:
        return values
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.broadcast_one_to_all(values))


def everywhere(true: bool) -> bool:
    """Whether it is true of every process; all have to ask."""
    if jax.process_count() == 1:
        return true
    from jax.experimental import multihost_utils

    return bool(np.asarray(multihost_utils.process_allgather(np.asarray(true))).all())


def is_first_process() -> bool:
    """Whether this is process 0, the one that prints and writes files."""
    return jax.process_index() == 0
