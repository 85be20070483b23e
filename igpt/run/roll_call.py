"""The roll call before jax.distributed starts. If processes are missing, every process raises an error that lists them.

Process 0 listens on the port that JAX's coordinator uses afterwards. Every other process connects to process 0, sends
"igpt INDEX COUNT" and waits for its answer, the verdict: the word "all" or the text of an error.
"""

import contextlib
import re
import socket
import time

from igpt.errors import MissingProcessError

GRACE = 10.0  # other processes wait so many seconds longer than process 0, which may start later
MAX_MESSAGE = 1 << 16  # bytes of a message


def roll_call(coordinator: str, process: int, processes: int, timeout: float) -> None:
    """Returns when all processes have connected. Raises MissingProcessError if some are missing after `timeout` s."""
    deadline = time.monotonic() + timeout
    if process == 0:
        _call(coordinator, processes, deadline, timeout)
    else:
        _answer(coordinator, process, processes, deadline, timeout)


def _call(coordinator: str, processes: int, deadline: float, timeout: float) -> None:
    """Runs on process 0. Waits for every other process, then sends each of them "all" or the reason of a failure."""
    present: dict[int, socket.socket] = {}
    verdict = ""
    with _listen(coordinator, processes) as listener:
        while not verdict:
            present = _connected(present)
            if len(present) == processes - 1:
                verdict = "all"
                continue
            listener.settimeout(max(deadline - time.monotonic(), 0.01))
            try:
                peer, _ = listener.accept()
            except TimeoutError:
                verdict = _missing(coordinator, present, processes, timeout)
                continue
            claim = re.fullmatch(r"igpt (\d{1,9}) (\d{1,9})", _read(peer, 5.0))
            if not claim:
                peer.close()  # the connection comes from another program
                continue
            present = _connected(present)  # a process that was started again has closed its old connection
            verdict = _contradiction(present, int(claim[1]), int(claim[2]), processes)
            present[-1 if verdict else int(claim[1])] = peer
        for peer in present.values():
            with peer:
                _send(peer, verdict)
    if verdict != "all":
        raise MissingProcessError(verdict)


def _listen(coordinator: str, processes: int) -> socket.socket:
    try:
        port = int(coordinator.rpartition(":")[2])
        both = dict(family=socket.AF_INET6, dualstack_ipv6=True) if socket.has_dualstack_ipv6() else {}
        return socket.create_server(("", port), backlog=processes, **both)
    except OSError as error:
        raise MissingProcessError(
            f"process 0 cannot listen at {coordinator}: {error.strerror}. If an earlier process is still ending, start "
            "it again; otherwise choose another port, by --coordinator or, where the environment names it, "
            "JAX_COORDINATOR_PORT"
        ) from None


def _missing(coordinator: str, present: dict, processes: int, timeout: float) -> str:
    missing = sorted(set(range(1, processes)) - set(present))
    return (
        f"{len(present) + 1} of {processes} processes came in {timeout:.0f} seconds; missing: "
        f"{', '.join(map(str, missing[:20]))}{' and others' if len(missing) > 20 else ''}. Check that they were "
        f"started, by the same command, and that they reach {coordinator}; --join_timeout waits longer"
    )


def _contradiction(present: dict, process: int, claimed: int, processes: int) -> str:
    """The text of an error if a process cannot belong to this run, else ""."""
    if claimed == processes and 0 < process < processes and process not in present:
        return ""
    return (
        f"a process says that it is number {process} of {claimed}; process 0 was started with {processes} processes"
        + (f", and number {process} is there already" if process in present else "")
    )


def _answer(coordinator: str, process: int, processes: int, deadline: float, timeout: float) -> None:
    """Runs on all other processes. Tries to connect until process 0 listens, sends its index, waits for the answer."""
    host, _, port = coordinator.rpartition(":")
    reason = "no address"
    while time.monotonic() < deadline:
        try:
            with socket.create_connection((host.strip("[]"), int(port)), timeout=5.0) as peer:
                reason = "it was reached, and waits for others"
                _send(peer, f"igpt {process} {processes}")
                verdict = _read(peer, deadline + GRACE - time.monotonic())
            if verdict == "all":
                return
            if verdict:
                raise MissingProcessError(verdict)
        except OSError as error:
            reason = error.strerror or str(error)
        time.sleep(0.2)
    raise MissingProcessError(
        f"process {process} of {processes} got no answer from process 0 at {coordinator} in {timeout:.0f} seconds "
        f"({reason}); check that it was started, and when, and that the address is right; --join_timeout waits longer"
    )


def _connected(present: dict[int, socket.socket]) -> dict[int, socket.socket]:
    """Returns the processes that still wait. Closes the connections of processes that gave up or died."""
    gone = [process for process, peer in present.items() if _is_closed(peer)]
    for process in gone:
        present[process].close()
    return {process: peer for process, peer in present.items() if process not in gone}


def _is_closed(peer: socket.socket) -> bool:
    """Whether the other process has closed the connection. A process that waits sends nothing."""
    peer.setblocking(False)
    try:
        return not peer.recv(1)
    except BlockingIOError:
        return False
    except OSError:
        return True


def _send(peer: socket.socket, text: str) -> None:
    with contextlib.suppress(OSError):  # the other process has exited, and reports its own error
        peer.settimeout(5.0)
        peer.sendall(text.encode()[: MAX_MESSAGE - 1] + b"\n")


def _read(peer: socket.socket, seconds: float) -> str:
    """Reads one line, or the part of the line that arrives within `seconds`."""
    data, deadline = b"", time.monotonic() + seconds
    with contextlib.suppress(OSError):
        while not data.endswith(b"\n") and len(data) < MAX_MESSAGE:
            peer.settimeout(max(deadline - time.monotonic(), 0.01))
            part = peer.recv(4096)
            if not part:
                break
            data += part
    return data.decode(errors="replace").strip()
