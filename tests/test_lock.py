"""One program at a time in a directory: live, dead and silent owners, and programs that start at once."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time

import pytest

from igpt import lock
from igpt.errors import PREEMPTED, StorageError, UserError
from igpt.lock import InUseError, Lock, lock_files
from tests.helpers import ROOT


@pytest.fixture(autouse=True)
def short_times(monkeypatch):
    monkeypatch.setattr(lock, "BEAT", 0.05)
    monkeypatch.setattr(lock, "PATIENCE", 0.6)
    monkeypatch.setattr(lock, "POLL", 0.1)
    monkeypatch.setattr(lock, "CONTEND", 0.0)


def owner(folder, **changes):
    """Writes the lock file of another program, by default of this very process; returns its path."""
    content = Lock(folder).content | changes
    folder.mkdir(exist_ok=True)
    path = folder / "running-other.json"
    path.write_text(json.dumps(content))
    return path


def ended_process():
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_the_second_is_told_who_works_there_and_since_when(tmp_path):
    with Lock(tmp_path / "run") as first:
        with pytest.raises(InUseError) as refusal, Lock(tmp_path / "run"):
            pass
        assert lock_files(tmp_path / "run") == [first.path]
    said = str(refusal.value)
    assert f"process {os.getpid()} on {first.content['host']} since {first.content['since']}" in said
    assert isinstance(refusal.value, UserError) and refusal.value.exit_code == 1  # a loop tries again


def test_a_lock_goes_with_its_block_even_after_an_error(tmp_path):
    with pytest.raises(ZeroDivisionError), Lock(tmp_path / "deep" / "run"):
        assert lock_files(tmp_path / "deep" / "run")
        _ = 1 / 0
    assert list(tmp_path.iterdir()) == []  # the folders that it made are gone, too
    with Lock(tmp_path / "run"):
        (tmp_path / "run" / "file").touch()
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["file"]


@pytest.mark.parametrize("remains", [False, True], ids=["gone", "another of its number"])
def test_the_lock_of_a_dead_process_of_this_host_is_no_obstacle(tmp_path, remains):
    changes = {"started": "1"} if remains else {"pid": ended_process()}
    path = owner(tmp_path / "run", **changes)
    begun = time.monotonic()
    with Lock(tmp_path / "run"):
        assert not path.exists()
    assert time.monotonic() - begun < 0.5  # at once, without waiting for a sign of life


def test_a_dead_process_that_nobody_has_reaped_is_no_obstacle(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    owner(tmp_path / "run", pid=process.pid, started=lock._start_of(process.pid))
    with pytest.raises(InUseError), Lock(tmp_path / "run"):
        pass
    process.kill()
    time.sleep(0.3)
    with Lock(tmp_path / "run"):
        process.wait()


def test_a_silent_owner_on_another_host_is_gone_after_a_while(tmp_path):
    path = owner(tmp_path / "run", place=["elsewhere"])
    begun = time.monotonic()
    with Lock(tmp_path / "run"):
        assert not path.exists() and time.monotonic() - begun > 0.5


def test_an_owner_on_another_host_that_shows_life_stays(tmp_path, monkeypatch):
    with Lock(tmp_path / "run") as first, monkeypatch.context() as patch:
        patch.setattr(lock, "_place", lambda: ["another host"])
        with pytest.raises(InUseError), Lock(tmp_path / "run"):
            pass
        first.check()


def test_a_damaged_lock_file_counts_as_silent(tmp_path):
    (tmp_path / "running-other.json").write_text("{")
    with Lock(tmp_path):
        assert len(lock_files(tmp_path)) == 1


def test_an_owner_whose_lock_was_taken_over_finds_out(tmp_path):
    with Lock(tmp_path) as first:
        first.path.unlink()
        time.sleep(0.2)  # a renewal does not make the file again
        with pytest.raises(StorageError, match=r"gone: this program gave no sign of life.*without saving"):
            first.check()


def test_a_lock_follows_its_renamed_folder(tmp_path):
    with Lock(tmp_path / "run") as first:
        (tmp_path / "run").rename(tmp_path / "old")
        first.follow(tmp_path / "old")
        assert lock_files(tmp_path / "run") == [first.path] and lock_files(tmp_path / "old") == []
        (tmp_path / "run").rename(tmp_path / "older")
        with pytest.raises(InUseError):
            owner(tmp_path / "run")
            first.follow(tmp_path / "older")


def test_a_lock_whose_folder_is_renamed_while_it_looks_for_others_is_written_again(tmp_path, monkeypatch):
    real, looks = lock.lock_files, []

    def renamed(folder):
        looks.append(folder)
        if len(looks) == 1:
            folder.rename(tmp_path / "old")
            folder.mkdir()
        return real(folder)

    monkeypatch.setattr(lock, "lock_files", renamed)
    with Lock(tmp_path / "run") as held:
        held.check()
    assert len(looks) == 2


def test_a_folder_that_cannot_be_written_is_a_storage_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="file"), Lock(tmp_path / "file" / "run"):
        pass


def test_a_signal_that_ends_the_process_removes_the_lock_and_the_folder_that_it_made(tmp_path):
    code = (
        "import sys, time; from pathlib import Path; from igpt.lock import Lock\n"
        "with Lock(Path(sys.argv[1]), frees_at_sigterm=True): print('held', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, tmp_path / "run"], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n" and lock_files(tmp_path / "run")
    process.send_signal(signal.SIGTERM)
    assert process.wait() == PREEMPTED and not (tmp_path / "run").exists()


def work_in_turn(folder, index):
    """Takes the lock ten times, and adds a line whenever another process was at work at the same time."""
    for _ in range(10):
        try:
            with Lock(folder):
                mark = folder / "at-work"
                try:
                    mark.touch(exist_ok=False)
                    time.sleep(0.002)
                    mark.unlink()
                    line = "alone"
                except FileExistsError:
                    line = "together"
        except InUseError:
            line = "refused"
        with (folder / f"lines-{index}").open("a") as file:
            file.write(line + "\n")


def test_of_many_that_start_at_once_never_two_work_together(tmp_path):
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=work_in_turn, args=(tmp_path, index)) for index in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    lines = [line for path in tmp_path.glob("lines-*") for line in path.read_text().split()]
    assert len(lines) == 40 and "together" not in lines and lines.count("alone") > 1
    assert lock_files(tmp_path) == []
