"""Writes files and new directories completely or not at all, on disks and in buckets. Reads untrusted JSON."""

import contextlib
import errno
import io
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path, PurePath
from typing import BinaryIO

import numpy as np

from igpt.errors import StorageError, UserError

MAX_JSON_BYTES = 8 << 20  # a preprocessor_config.json with 512 clusters has 50 kB, one with 65,535 has 6 MB
MAX_JSON_DEPTH = 32  # Python reads far deeper nesting, but raises RecursionError when it copies or writes it
AnyPath = PurePath  # a pathlib.Path, or a path in a bucket (igpt/bucket.py), which has the same methods
STORAGE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)  # error numbers that only writing causes


def expand_home(path: str | os.PathLike) -> str:
    """Replaces a leading `~` or `~user` by the home directory, also behind the kind of a source, as in `folder:~/x`."""
    kind, colon, place = str(path).rpartition(":~")
    return f"{kind}:{os.path.expanduser('~' + place)}" if colon else os.path.expanduser(path)


def is_bucket(path: str | os.PathLike) -> bool:
    """Whether a path is that of a bucket, such as gs://BUCKET/runs, or of another store on the network."""
    return "://" in str(path)


def as_path(path: str | os.PathLike) -> AnyPath:
    """A path on a disk, or in a bucket: gs://BUCKET/... or s3://BUCKET/... Raises UserError for another store."""
    if not is_bucket(path):
        return Path(expand_home(path))
    from igpt.bucket import SCHEMES, BucketPath  # imports etils, which only buckets need

    if not str(path).startswith(tuple(SCHEMES)):
        raise UserError(f"{path}: the buckets that are known begin with {' or '.join(SCHEMES)}; or give a path")
    return BucketPath(os.fspath(path))


def cache_directory() -> Path:
    """The user's cache folder: $XDG_CACHE_HOME, or ~/.cache. Raises OSError if this user has no home directory."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError as error:
        raise OSError(errno.ENOENT, str(error)) from None


def open_binary(path: str | os.PathLike) -> io.BufferedIOBase:
    """Opens a file to read its bytes. Raises OSError if it cannot be read."""
    return as_path(path).open("rb")


def remove_tree(folder: AnyPath) -> None:
    """Removes a folder. It ignores OSError, so some of its files may remain."""
    with contextlib.suppress(OSError):
        if is_bucket(folder):
            folder.rmtree()
        else:
            shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def whole(path: AnyPath | str) -> Iterator[BinaryIO]:
    """Opens a temporary binary file to write, and renames it to `path` when the block ends.

    If the block fails, `path` is unchanged. Raises OSError if the file cannot be written. In a bucket, the file is kept
    in memory until the block ends, and is then one object.
    """
    if is_bucket(path):
        content = io.BytesIO()
        yield content
        as_path(path).write_bytes(content.getvalue())
        return
    path = expand_home(path)
    partial = Path(f"{path}.partial")
    try:
        with partial.open("wb") as file:
            yield file
        os.replace(partial, path)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise


def write_text(path: AnyPath | str, text: str) -> None:
    """Writes UTF-8 text completely or not at all. Raises OSError if the file cannot be written."""
    with whole(path) as file:
        file.write(text.encode("utf-8"))


def write_array(file: BinaryIO | io.BufferedIOBase, array: np.ndarray) -> None:
    """Writes an array as .npy. Raises OSError on a full disk, where np.save silently loses the end of the array."""
    array = np.asarray(array, order="C")  # before the header, which states the order of the bytes
    np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(array))
    file.write(array.data)


def write_json(path: AnyPath | str, content: dict, indent: int = 1) -> None:
    """Writes a JSON object completely or not at all. Raises OSError if the file cannot be written."""
    write_text(path, json.dumps(content, indent=indent) + "\n")


def read_json(path: AnyPath) -> dict:
    """Reads a JSON object from an untrusted file. Raises UserError if the file is missing, too large or damaged."""
    try:
        if path.exists() and not path.is_file():
            raise UserError(f"{path} is not a file")
        if not is_bucket(path):
            _check_json_size(path, path.stat().st_size)
        text = path.read_bytes()
        _check_json_size(path, len(text))
        content = json.loads(text.decode("utf-8"))
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


def _check_json_size(path: AnyPath, size: int) -> None:
    if size > MAX_JSON_BYTES:
        raise UserError(f"{path} has {size:,} bytes; a file of its kind has well under {MAX_JSON_BYTES:,}")


def check_holds_no_run(workdir: AnyPath) -> None:
    """Raises UserError if a folder for results holds a run or a model, whose records the results would replace."""
    if any((workdir / name).exists() for name in ("config.json", "checkpoints")):
        raise UserError(f"--workdir={workdir} holds a run or a model; name another folder, such as {workdir / 'probe'}")


def check_workdir(workdir: str | os.PathLike, flag: str = "--workdir") -> AnyPath:
    """Returns `workdir` as a path. Raises UserError if this process cannot write to it, or cannot reach its bucket."""
    if not str(workdir):
        raise UserError(f"{flag} is empty; name a folder ({flag}=. is the current one)")
    workdir = as_path(workdir)
    if is_bucket(workdir):
        try:
            any(workdir.glob("config.json"))
        except OSError as error:
            raise UserError(
                f"{flag}={workdir} cannot be reached: {error.strerror}. Check the name and the rights of this "
                "machine's account, and for a server other than Google's or Amazon's its address (docs/pods.md)"
            ) from None
        return workdir
    if workdir.resolve() == Path.cwd():
        workdir = Path.cwd()  # --start_over renames the folder, and "." would follow it
    places = (workdir.absolute(), *workdir.absolute().parents)
    nearest = next(path for path in places if path.exists() or path.is_symlink())  # a link may lead nowhere
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise UserError(f"{flag}={workdir} cannot be written: {nearest} is no writable folder; name another place")
    return workdir


@contextlib.contextmanager
def storage_errors(workdir: AnyPath):
    """Turns an OSError of the block into a StorageError. The block reads or writes files of a run, or of its data."""
    try:
        yield
    except BrokenPipeError:  # whoever read what this program prints has left
        raise
    except OSError as error:
        place = workdir if error.errno in STORAGE_ERRORS else "a file of the run, or of its data"
        raise StorageError(
            f"{error.filename or place}: {error.strerror or error}. Finished checkpoints are unchanged; make room, or "
            "repair the storage, and run the same command again."
        ) from error


@contextlib.contextmanager
def written(what: str):
    """Turns an OSError of the block into a UserError. `what` names a flag and its file: --out=a.png."""
    try:
        yield
    except OSError as error:
        problem = f"{what} cannot be written: {error.strerror or error}"
        raise UserError(f"{problem}; make room, or name another place") from None


def check_writable(path: AnyPath | str, flag: str = "", suffix: str = "") -> None:
    """Raises UserError if a file cannot be written, or lacks the suffix. Comes before long work. Asks no bucket."""
    what = f"{flag}={path}" if flag else str(path)
    if not str(path).lower().endswith(suffix):
        raise UserError(f"{what}: this file is written as {suffix}; give a name that ends in {suffix}")
    if is_bucket(path):
        return
    with written(what):
        if Path(expand_home(path)).is_dir():
            raise IsADirectoryError(errno.EISDIR, "it is a folder")
        tempfile.TemporaryFile(dir=Path(expand_home(path)).absolute().parent).close()


def check_new(out: str | Path) -> None:
    """Raises UserError if `out` exists and is not an empty directory, so that no file is overwritten."""
    if is_bucket(out):
        raise UserError(f"--out={out} is a bucket; write to a local or mounted path, and copy it")
    out = Path(expand_home(out))
    try:
        free = not out.exists() or (out.is_dir() and not any(out.iterdir()))
    except OSError as error:
        raise UserError(f"--out={out} cannot be written: {error.strerror}; name another place") from None
    if not free:
        raise UserError(f"--out={out} exists already; name a new directory")


def write_new(out: str | Path, write: Callable[[Path], None]) -> Path:
    """Calls `write` with a new folder, then renames this folder to `out`. If `write` fails, it removes the folder."""
    out = Path(expand_home(out)).absolute()
    partial = out.with_name(f"{out.name}.{os.getpid()}.partial")  # no other process uses this name
    try:
        partial.mkdir(parents=True)
        try:
            write(partial)
            if out.exists():
                out.rmdir()  # `check_new` made sure that `out` is empty
            os.rename(partial, out)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    except OSError as error:
        raise UserError(f"--out={out} cannot be written: {error.strerror or error}; name another place") from None
    return out
