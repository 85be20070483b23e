"""The roll call over real sockets, in threads: all processes arrive, or each learns which are missing."""

import socket
import threading
import time

import pytest

from igpt.errors import MissingProcessError, UserError
from igpt.run import roll_call


@pytest.fixture
def address():
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return f"localhost:{probe.getsockname()[1]}"


def called(address, members, timeout=20.0, delays=()):
    """How the roll call ends for each (process, processes): None or its error message.

    `delays`: seconds to wait before it, or functions that wait.
    """
    found = [None] * len(members)

    def answer(index, member):
        delay = delays[index] if delays else 0.0
        delay() if callable(delay) else time.sleep(delay)
        try:
            roll_call.roll_call(address, *member, timeout)
        except UserError as error:
            found[index] = str(error)

    threads = [threading.Thread(target=answer, args=item) for item in enumerate(members)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout + 30)
        assert not thread.is_alive()
    return found


@pytest.mark.parametrize("delays", [(0.0, 0.3, 0.0, 0.1), (0.6, 0.0, 0.2, 0.0)], ids=["0 first", "0 last"])
def test_the_roll_call_ends_when_all_have_come_in_any_order(address, delays):
    assert called(address, [(i, 4) for i in range(4)], delays=delays) == [None] * 4
    with socket.create_server(("", int(address.partition(":")[2]))):
        pass  # the port is free again, for the runtime


def test_a_process_that_came_learns_how_many_came_and_who_is_missing(address):
    found = called(address, [(i, 5) for i in (0, 1, 3)], timeout=5.0)
    assert len(set(found)) == 1
    assert found[0].startswith("3 of 5 processes came in 5 seconds; missing: 2, 4.")
    assert address in found[0] and "--join_timeout" in found[0]


def test_without_process_0_the_others_name_its_address(address):
    [found] = called(address, [(2, 3)], timeout=1.0)
    assert found.startswith(f"process 2 of 3 got no answer from process 0 at {address} in 1 seconds (Connection")


@pytest.mark.parametrize(
    ("other", "message"),
    [((3, 1), "number 1 of 3; process 0 was started with 4 processes"), ((4, 1), "number 1 is there already")],
)
def test_processes_with_different_flags_are_refused(address, other, message):
    found = called(address, [(0, 4), (1, 4), other[::-1]], timeout=3.0)
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
    assert called(address, [(0, 2), (1, 2)], delays=(0.0, 1.0)) == [None] * 2
    thread.join()


def test_a_process_that_is_restarted_while_it_waits_is_counted_once(address):
    host, port = address.split(":")

    def died():
        with socket.create_connection((host, int(port))) as first:
            first.sendall(b"igpt 1 3\n")
            time.sleep(0.2)

    thread = threading.Timer(0.2, died)
    thread.start()
    assert called(address, [(i, 3) for i in range(3)], delays=(0.0, thread.join, 1.5)) == [None] * 3


def test_a_process_that_stopped_waiting_is_not_counted(address):
    """Process 1 connects long before process 0 and leaves. When process 2 comes, three have connected."""
    found = [None] * 3

    def answer(process, timeout, delay):
        time.sleep(delay)
        with pytest.raises(MissingProcessError) as raised:
            roll_call.roll_call(address, process, 3, timeout)
        found[process] = str(raised.value)

    times = [(0, 4.0, 0.0), (1, 1.0, 0.0), (2, 10.0, 2.5)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(roll_call, "GRACE", 0.0)
        threads = [threading.Thread(target=answer, args=time_) for time_ in times]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
    assert (
        "process 1 of 3 got no answer from process 0" in found[1] and "it was reached, and waits for others" in found[1]
    )
    assert found[0] == found[2] and found[0].startswith("2 of 3 processes came in 4 seconds; missing: 1.")


def test_a_port_that_is_taken_is_an_error(address):
    with socket.create_server(("", int(address.partition(":")[2]))):
        [found] = called(address, [(0, 2)])
    assert "cannot listen" in found and "choose another port" in found
