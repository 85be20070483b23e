"""Where a run writes: a folder that can be written to, small files that are there whole or not at all."""

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from igpt.errors import StorageError, UserError

MAX_JSON_BYTES = 8 << 20  # a preprocessor_config.json with 512 clusters has 50 kB, one with 65,535 has 6 MB
MAX_JSON_DEPTH = 32  # lists and objects inside each other; deeper ones could be read, but not copied or written
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


@contextlib.contextmanager
def whole(path: Path | str) -> Iterator[BinaryIO]:
    """A file to write to. It appears as `path` when it is complete; after an exception nothing is left of it."""
    partial = Path(f"{path}.partial")
    try:
        with partial.open("wb") as file:
            yield file
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Whole or not at all, in UTF-8. Raises OSError."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def read_json(path: Path) -> dict:
    """A JSON object from a stranger's file of bounded size; UserError when it is missing, too large or damaged."""
    try:
        if path.exists() and not path.is_file():
            raise UserError(f"{path} is not a file")
        size = path.stat().st_size
        if size > MAX_JSON_BYTES:
            raise UserError(f"{path} has {size:,} bytes; a file of its kind has well under {MAX_JSON_BYTES:,}")
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"there is no {path}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a JSON {type(content).__name__}; an object is needed")
    level = [content]
    for _ in range(MAX_JSON_DEPTH):
        level = [child for node in level for child in (node.values() if isinstance(node, dict) else node)]
        level = [child for child in level if isinstance(child, (dict, list))]
    if level:
        raise UserError(f"{path} is nested more than {MAX_JSON_DEPTH} deep")
    return content


def check_new(out: str | Path) -> None:
    """Raises UserError unless `out` is free: nothing that is there is ever written over."""
    if "://" in str(out):
        raise UserError(f"--out={out} is a bucket; write to a local or mounted path")
    out = Path(out)
    try:
        free = not out.exists() or (out.is_dir() and not any(out.iterdir()))
    except OSError as error:
        raise UserError(f"--out={out} cannot be written: {error.strerror}; name another place") from None
    if not free:
        raise UserError(f"--out={out} exists already; name a new directory")


def write_new(out: str | Path, write: Callable[[Path], None]) -> Path:
    """Has `write` fill a folder beside `out`, and renames it when it is whole. If `write` fails, nothing is left."""
    out = Path(out).absolute()
    partial = out.with_name(f"{out.name}.{os.getpid()}.partial")  # nobody else's
    try:
        partial.mkdir(parents=True)
        try:
            write(partial)
            if out.exists():
                out.rmdir()  # empty: `check_new` has seen to it
            os.rename(partial, out)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    except OSError as error:
        raise UserError(f"--out={out} cannot be written: {error.strerror or error}; name another place") from None
    return out
