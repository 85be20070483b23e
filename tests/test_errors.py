"""How a command ends."""

import jax
import pytest

from igpt import errors


@pytest.fixture
def one_of_several(monkeypatch):
    """The codes with which one of several processes exited at once."""
    codes = []
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(errors.os, "_exit", codes.append)
    return codes


def test_one_of_several_processes_exits_at_once_on_any_error(one_of_several, capsys, monkeypatch):
    """A normal exit would wait for the other processes, which wait for this one."""
    wrong, full = errors.UserError("wrong"), errors.StorageError("full")
    for error in (wrong, full, KeyboardInterrupt(), ZeroDivisionError("zero")):
        with pytest.raises(SystemExit), errors.reported():  # a real os._exit would not return
            raise error
    assert one_of_several == [2, 1, 130, 1]
    shown = capsys.readouterr().err
    assert "error: wrong" in shown and "Traceback" in shown and "ZeroDivisionError: zero" in shown


def test_a_run_that_was_saved_waits_for_the_others(one_of_several):
    from igpt.run.preemption import PreemptedError

    with pytest.raises(SystemExit) as stopped, errors.reported():
        raise PreemptedError("saved")
    assert stopped.value.code == 75 and not one_of_several


def test_a_log_that_cannot_be_written_does_not_stop_the_exit(one_of_several, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(errors.sys.stderr, "write", full)
    for error in (errors.StorageError("full"), ZeroDivisionError()):
        with pytest.raises(SystemExit), errors.reported():
            raise error
    assert one_of_several == [1, 1]


def test_a_single_process_shows_the_traceback_of_a_defect():
    with pytest.raises(ZeroDivisionError), errors.reported():
        raise ZeroDivisionError
