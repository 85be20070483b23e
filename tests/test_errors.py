"""How a command ends."""

import jax
import pytest

from igpt import errors


@pytest.fixture
def one_of_several(monkeypatch):
    """The codes that a process, one of several, left with at once."""
    codes = []
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(errors.os, "_exit", codes.append)
    return codes


def test_one_of_several_that_fails_in_whatever_way_leaves_at_once(one_of_several, capsys, monkeypatch):
    """By the interpreter's own way out it would wait for the others, and they for it."""
    wrong, full = errors.UserError("wrong"), errors.StorageError("full")
    for error in (wrong, full, KeyboardInterrupt(), ZeroDivisionError("zero")):
        with pytest.raises(SystemExit), errors.reported():  # which a real os._exit would not come to
            raise error
    assert one_of_several == [2, 1, 130, 1]
    said = capsys.readouterr().err
    assert "error: wrong" in said and "Traceback" in said and "ZeroDivisionError: zero" in said


def test_a_run_that_was_saved_waits_for_the_others(one_of_several):
    from igpt.run.preemption import PreemptedError

    with pytest.raises(SystemExit) as stopped, errors.reported():
        raise PreemptedError("saved")
    assert stopped.value.code == 75 and not one_of_several


def test_a_log_that_cannot_be_written_does_not_keep_a_process(one_of_several, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(errors.sys.stderr, "write", full)
    for error in (errors.StorageError("full"), ZeroDivisionError()):
        with pytest.raises(SystemExit), errors.reported():
            raise error
    assert one_of_several == [1, 1]


def test_alone_a_mistake_of_ours_is_a_traceback_as_ever():
    with pytest.raises(ZeroDivisionError), errors.reported():
        raise ZeroDivisionError
