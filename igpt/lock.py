"""One program at a time in a directory.

A program writes a file `running-ID.json` with a name of its own, and then looks for the files of others. If a file
belongs to a program that may still be at work, it removes its own file and raises InUseError. If two programs start at
once, at least the later of the two files is written before its writer looks, so they never both go on. The file of a
program that is gone is removed. No other program can have a file of that name, so this harms nobody.

A program of this host is gone when its process is. A program of another host is gone when it has not renewed its file
for PATIENCE seconds, measured by this program's own clock. Neither file locks nor equal clocks of hosts are needed.

In a bucket the same holds, because a new object is listed as soon as it is written. A file is renewed only if it still
has the generation that was just read, so a program that was taken for gone does not write its file again. Google's
bucket checks that while it writes. For Amazon's, TensorStore asks first and then writes: if a program stands still for
PATIENCE seconds between these two requests, and another starts meanwhile, both go on.
"""

import contextlib
import json
import os
import random
import secrets
import signal
import socket
import threading
import time
from datetime import UTC, datetime
from pathlib import Path

from igpt.errors import StorageError, UserError, end_at_sigterm
from igpt.files import AnyPath, is_bucket, read_json, storage_errors, write_text

BEAT = 10.0  # seconds between two renewals of a program's own file
PATIENCE = 120.0  # seconds without a renewal, after which a program of another host counts as gone
POLL = 2.0  # seconds between two looks at the file of a program of another host
UNKNOWN = "unknown"  # the start of a process that cannot be found out
NOBODYS = (signal.SIG_DFL, end_at_sigterm)  # handlers of SIGTERM that a lock replaces
CONTEND = 1.0  # seconds in which programs that start at once, and see each other, try again


class InUseError(UserError):
    """Another program works in this directory. Its code is that of errors that may go away: start again later."""

    exit_code = 1


class Lock:
    """Inside `with`, no other program that uses a Lock works in `folder`. The folder is made if it is missing.

    Entering raises InUseError, which names the other program, or StorageError if the folder cannot be written. On
    leaving, the lock's file is removed, and so are folders that it made and that are still empty. With
    `frees_at_sigterm`, a SIGTERM that nobody else handles does the same, and ends the process with the code PREEMPTED:
    there is nothing to save then.
    """

    def __init__(self, folder: AnyPath, frees_at_sigterm: bool = False):
        self.folder, self.frees_at_sigterm = folder, frees_at_sigterm
        self.path = folder / f"running-{secrets.token_hex(8)}.json"
        parents = () if is_bucket(folder) else (folder, *folder.parents)
        self.made = [path for path in parents if not path.exists()]
        since = _now()
        self.content = {"host": socket.gethostname(), "pid": os.getpid(), "since": since, "alive": since}
        self.content |= {"place": _place(), "started": _start_of(os.getpid())}
        self._mutex, self._ended, self._previous = threading.Lock(), threading.Event(), None

    def __enter__(self):
        try:
            self._acquire()
        except BaseException:
            self._remove_folders()
            raise
        on_main_thread = threading.current_thread() is threading.main_thread()
        if self.frees_at_sigterm and on_main_thread and signal.getsignal(signal.SIGTERM) in NOBODYS:
            self._previous = signal.signal(signal.SIGTERM, self._end)
        threading.Thread(target=self._renew, daemon=True).start()
        return self

    def __exit__(self, *_):
        self._ended.set()
        with self._mutex, contextlib.suppress(OSError):
            self.path.unlink(missing_ok=True)
        self._remove_folders()
        if self._previous is not None:
            signal.signal(signal.SIGTERM, self._previous)

    def check(self) -> None:
        """Raises StorageError if the lock's file is gone, because this program was suspended and another took over."""
        if not self.path.exists():
            raise StorageError(
                f"{self.path} is gone: this program gave no sign of life for {PATIENCE:.0f} seconds, and another one "
                f"may work in {self.folder} now. It ends without saving"
            )

    def follow(self, old: AnyPath) -> None:
        """Takes the lock again after its folder was renamed to `old`. Raises InUseError if another was faster."""
        with self._mutex:
            try:
                self._acquire()
            finally:
                (old / self.path.name).unlink(missing_ok=True)

    def _acquire(self) -> None:
        deadline = time.monotonic() + CONTEND
        while others := self._others_after_writing():
            alive = [path for path in others if not _is_gone(path)]
            if alive and time.monotonic() > deadline:
                raise InUseError(_who(alive[0], self.folder))
            time.sleep(random.uniform(0.0, 0.3) if alive else 0.0)

    def _others_after_writing(self) -> list[AnyPath]:
        """Writes the own file and lists those of others. If there are any, removes the own file.

        Writes again if the own file is gone, because another program has renamed the folder meanwhile.
        """
        with storage_errors(self.folder):
            is_there = False
            while not is_there:
                self.folder.mkdir(parents=True, exist_ok=True)
                write_text(self.path, json.dumps(self.content))
                others = sorted(set(lock_files(self.folder)) - {self.path})
                is_there = self.path.exists()
            if others:
                self.path.unlink(missing_ok=True)
        return others

    def _renew(self) -> None:
        """Renews the own file while it exists. It is overwritten in place, so that it is not made again once gone."""
        while not self._ended.wait(BEAT):
            with self._mutex, contextlib.suppress(OSError):  # a full disk, or storage that is away for a while
                content = json.dumps(self.content | {"alive": _now()})
                if is_bucket(self.path):
                    self.path.rewrite(content.encode())
                    continue
                try:
                    with self.path.open("r+") as file:
                        file.write(content)
                except OSError:
                    os.utime(self.path)

    def _end(self, *_) -> None:
        self.path.unlink(missing_ok=True)
        self._remove_folders()
        end_at_sigterm()  # the second SIGTERM of a run ends up here, too, and may cut off a save

    def _remove_folders(self) -> None:
        for folder in self.made:
            with contextlib.suppress(OSError):  # the folder has files
                folder.rmdir()


def lock_files(folder: AnyPath) -> list[AnyPath]:
    """The files of all locks in a folder."""
    return list(folder.glob("running-*.json"))


def _is_gone(path: AnyPath) -> bool:
    """Whether the program that wrote this file is gone; then removes the file. It may watch it for PATIENCE seconds."""
    content = _read(path)
    start = _start_of(content.get("pid")) if content.get("place") == _place() else UNKNOWN
    gone = _is_silent(path) if start == UNKNOWN else start != content.get("started")
    if gone:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
    return gone


def _is_silent(path: AnyPath) -> bool:
    """Whether a file stays as it is for PATIENCE seconds. It counts looks, because a look itself may hang."""
    first = _signs(path)
    for look in range(round(PATIENCE / POLL)):
        if not path.exists():
            return True
        if look == round(BEAT / POLL) + 1:
            print(f"{path} comes from another host; waiting {PATIENCE:.0f} seconds for a sign of life", flush=True)
        time.sleep(POLL)
        if _signs(path) != first:
            return not path.exists()
    return True


def _signs(path: AnyPath) -> tuple:
    """The content and the time of a file; opening it makes a network file system look at the server."""
    try:
        with path.open("rb") as file:
            return file.read(), 0 if is_bucket(path) else os.fstat(file.fileno()).st_mtime_ns
    except OSError as error:
        return (error.errno,)


def _read(path: AnyPath) -> dict:
    with contextlib.suppress(UserError):
        return read_json(path)
    return {}


def _who(path: AnyPath, folder: AnyPath) -> str:
    content = _read(path)
    return (
        f"{folder} is in use by process {content.get('pid')} on {content.get('host')} since {content.get('since')}; "
        "wait until it ends, or give another directory"
    )


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def _place() -> list[str]:
    """What processes with comparable numbers share: the host since it was booted, and on Linux the pid namespace."""
    place = [socket.gethostname()]
    for read in (Path("/proc/sys/kernel/random/boot_id").read_text, lambda: os.readlink("/proc/self/ns/pid")):
        with contextlib.suppress(OSError):
            place.append(read().strip())
    return place


def _start_of(pid) -> str | None:
    """When a process of this host started, or UNKNOWN. None if it is gone, or dead and not yet reaped."""
    if not isinstance(pid, int):
        return None
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if fields[0] in "ZX" else fields[19]
    except OSError:  # the process is gone, or of another user, or this system has no /proc
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return None
        except OSError:
            pass
        return UNKNOWN
