"""Where a run writes: a folder that can be written to, small files that are there whole or not at all."""

import contextlib
import errno
import os
from pathlib import Path

from igpt.errors import StorageError, UserError

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)  # errors of writing, and of nothing else


def check_workdir(workdir: str | Path) -> Path:
    """The workdir as a path that this run can write to, or UserError."""
    if "://" in str(workdir):
        raise UserError(f"--workdir={workdir} is a bucket; mount it, as docs/pods.md says, and give its path")
    workdir = Path(workdir)
    nearest = next(path for path in (workdir.absolute(), *workdir.absolute().parents) if path.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise UserError(f"--workdir={workdir} cannot be written: {nearest} is no writable folder; name another place")
    return workdir


@contextlib.contextmanager
def told_of_storage(workdir: Path):
    """What the file system says of a run's files and its data as a StorageError; a checkpoint tells for itself."""
    try:
        yield
    except OSError as error:
        where = error.filename or (workdir if error.errno in NO_ROOM else "a file of the run, or of its data")
        raise StorageError(
            f"{where}: {error.strerror or error}. Finished checkpoints are as they were; make "
            "room, or mend the place, and run the same command again."
        ) from error


def write_text(path: Path, text: str) -> None:
    """Whole or not at all, in UTF-8. Raises OSError."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
