"""How a command ends."""

import os
import subprocess
import sys

import jax
import pytest

from igpt import errors
from tests.helpers import ROOT


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


def test_a_path_that_cannot_be_used_is_told_without_a_traceback(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped, errors.reported():
        (tmp_path / ("long" * 75)).read_bytes()
    assert stopped.value.code == 2 and "File name too long; name another place" in capsys.readouterr().err
    with pytest.raises(FileNotFoundError), errors.reported():  # a defect: whoever opened it did not look
        (tmp_path / "absent").read_bytes()


def test_a_reader_that_leaves_ends_the_program_without_a_word():
    code = (
        "from igpt.errors import reported; from igpt.files import storage_errors\n"
        "with reported(), storage_errors('run'):\n"
        "    while True: print('a line', flush=True)"
    )
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as program:
        program.stdout.readline()
        program.stdout.close()
        assert program.wait(timeout=60) == 141 and program.stderr.read() == b""


def test_a_file_name_that_is_no_text_can_be_printed():
    program = "from igpt.errors import reported\nwith reported(): print('photo\\udcff.png')"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8"}
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert (ran.returncode, ran.stdout) == (0, "photo\\udcff.png\n"), ran.stderr


def test_a_single_process_shows_the_traceback_of_a_defect():
    with pytest.raises(ZeroDivisionError), errors.reported():
        raise ZeroDivisionError
