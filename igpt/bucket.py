"""Paths in buckets, gs://BUCKET/NAME and s3://BUCKET/NAME, with the methods of pathlib.Path.

They are paths of etils, as Orbax uses them, but TensorStore reads and writes the objects: it is installed with Orbax,
finds the usual credentials, tries again after errors, and needs neither TensorFlow nor fsspec.

A bucket has objects and no folders. A file is one object, which appears completely or not at all. A folder exists while
the name of an object begins with its name. A folder is renamed and removed object by object; Orbax's mark of a finished
checkpoint is copied last and removed first, so an interruption never leaves a checkpoint that looks finished and lacks
files. `endpoint` says which variables name another server than Google's or Amazon's.
"""

import errno
import functools
import io
import os
import re
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatchcase

from etils.epath import register_path_cls
from etils.epath.backend import Backend
from etils.epath.gpath import PosixGPath
from etils.epath.stat_utils import StatResult

from igpt.errors import first_line

SCHEMES = {"gs://": "gcs", "s3://": "s3"}  # scheme -> driver of TensorStore
FINISHED = "commit_success.txt"  # Orbax writes it into a checkpoint that is complete
RETRIES = 6  # after 1, 2, 4, ... seconds; together about a minute
AT_ONCE = 4  # objects that are copied or read at the same time; each is held in memory


def endpoint(scheme: str) -> dict:
    """The server of a kind of bucket as fields of TensorStore's specification, from the environment.

    AWS_ENDPOINT_URL_S3 or AWS_ENDPOINT_URL, and AWS_REGION or AWS_DEFAULT_REGION, are those of Amazon's own programs.
    TensorStore itself reads TENSORSTORE_GCS_HTTP_URL.
    """
    if scheme != "s3://":
        return {}
    server = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or ("us-east-1" if server else "")
    credentials = {"type": "environment"} if os.environ.get("AWS_ACCESS_KEY_ID") else None
    fields = {"endpoint": server, "aws_region": region, "aws_credentials": credentials}
    return {name: value for name, value in fields.items() if value}


def split(path: str | os.PathLike) -> tuple[str, str, str]:
    """The scheme, the bucket and the object's name of a path, such as ("gs://", "bucket", "runs/digits")."""
    scheme, _, rest = os.fspath(path).partition("://")
    bucket, _, key = rest.partition("/")
    return f"{scheme}://", bucket, key


def specification(path: str | os.PathLike) -> dict:
    """TensorStore's specification of the key-value store that begins at a path."""
    scheme, bucket, key = split(path)
    return {"driver": SCHEMES[scheme], "bucket": bucket, "path": key} | endpoint(scheme)


@functools.cache
def _store(scheme: str, bucket: str):
    import tensorstore as ts  # slow to import, and needed only for buckets

    retries = {name: {"max_retries": RETRIES} for name in ("gcs_request_retries", "s3_request_retries")}
    return ts.KvStore.open(specification(f"{scheme}{bucket}/"), context=ts.Context(retries)).result()


def _request(path: str | os.PathLike, make: Callable):
    """Calls `make` with the path's bucket and the object's name, and waits for the answer. Raises OSError."""
    scheme, bucket, key = split(path)
    try:
        return make(_store(scheme, bucket), key).result()
    except Exception as error:  # TensorStore raises ValueError and others
        raise OSError(errno.EIO, first_line(error)[:300], str(path)) from error


def _is_path(name: str) -> bool:
    return not {"", ".", ".."} & set(name.split("/"))


class _Objects(Backend):
    """The file operations that etils' paths need, on the objects of buckets."""

    def names(self, path, begins: str = "") -> list[str]:
        """The names of all objects in a folder, relative to it, that begin with `begins`.

        A name such as ../x or a//b is no path in that folder, and is passed over: a copy of it would lie elsewhere.
        """
        import tensorstore as ts

        below = split(path)[2].rstrip("/")
        start = f"{below}/" if below else ""
        first = start + begins
        keys = ts.KvStore.KeyRange(first, first[:-1] + chr(ord(first[-1]) + 1) if first else "")
        found = _request(path, lambda store, key: store.list(keys, strip_prefix_length=len(start.encode())))
        return sorted(name for name in (key.decode() for key in found) if _is_path(name))

    def found(self, path, **part):
        """TensorStore's answer to a request for an object, or for a part of it. FileNotFoundError if there is none."""
        found = _request(path, lambda store, key: store.read(key, **part))
        if found.state != "value":
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
        return found

    def read(self, path) -> bytes:
        return self.found(path).value

    def write(self, path, content: bytes) -> None:
        _request(path, lambda store, key: store.write(key, content))

    def is_file(self, path) -> bool:
        try:
            return bool(split(path)[2] and self.found(path, byte_range=slice(0, 0)))
        except FileNotFoundError:
            return False

    def exists(self, path) -> bool:
        return self.is_file(path) or self.isdir(path)

    def isdir(self, path) -> bool:
        return bool(self.names(path))

    def listdir(self, path) -> list[str]:
        return sorted({name.partition("/")[0] for name in self.names(path)})

    def glob(self, path) -> list[str]:
        raise NotImplementedError("BucketPath.glob does not need it")

    def walk(self, top, *, top_down=True, on_error=None):
        raise NotImplementedError("use BucketPath.files")

    def makedirs(self, path, *, exist_ok=False, mode=None) -> None:
        """Does nothing: a folder exists when it has a file."""

    mkdir = makedirs

    def remove(self, path) -> None:
        if not self.is_file(path):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
        self.delete(path)

    def delete(self, path) -> None:
        _request(path, lambda store, key: store.write(key, None))

    def rmtree(self, path) -> None:
        names = self.names(path)
        if not names:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
        files, marks = _marks_apart(names)
        for name in reversed(marks):
            self.delete(f"{path}/{name}")
        _for_each(files, lambda name: self.delete(f"{path}/{name}"))

    def rename(self, path, dst) -> None:
        if self.exists(dst):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(dst))
        self.replace(path, dst)

    def replace(self, path, dst) -> None:
        if self.is_file(path):
            self.write(dst, self.read(path))
            self.delete(path)
            return
        files, marks = _marks_apart(self.names(path))
        _for_each(files, lambda name: self.copy(f"{path}/{name}", f"{dst}/{name}", overwrite=True))
        for name in marks:
            self.copy(f"{path}/{name}", f"{dst}/{name}", overwrite=True)
        self.rmtree(path)

    def copy(self, path, dst, overwrite: bool) -> None:
        if not overwrite and self.exists(dst):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(dst))
        self.write(dst, self.read(path))

    def stat(self, path) -> StatResult:
        is_folder = not self.is_file(path)
        length = 0 if is_folder else len(self.read(path))
        return StatResult(is_directory=is_folder, length=length, mtime=0, owner=None, group=None, mode=None)

    def open(self, path, mode: str):
        if "r" in mode:
            content = io.BytesIO(self.read(path))
            return content if "b" in mode else io.TextIOWrapper(content, encoding="utf-8")
        upload = _BytesUpload() if "b" in mode else _TextUpload(newline="")
        upload.put = functools.partial(self.write, path)
        if "a" in mode and self.is_file(path):
            there = self.read(path)
            upload.write(there if "b" in mode else there.decode())
        return upload


class _Upload:
    """A file in memory that becomes an object when it is closed, unless the block of its `with` failed."""

    def close(self) -> None:
        if not self.closed:
            content = self.getvalue()
            super().close()
            self.put(content if isinstance(content, bytes) else content.encode())

    def __exit__(self, kind, *_) -> None:
        self.close() if kind is None else super().close()


class _BytesUpload(_Upload, io.BytesIO):
    pass


class _TextUpload(_Upload, io.StringIO):
    pass


def _marks_apart(names: Iterable[str]) -> tuple[list[str], list[str]]:
    """The names without the marks of finished checkpoints, and the marks. A checkpoint's mark follows its items'."""
    marks = {name for name in names if name.rpartition("/")[2] == FINISHED}
    return [name for name in names if name not in marks], sorted(marks, key=lambda name: -name.count("/"))


def _for_each(names: Iterable[str], do: Callable) -> None:
    with ThreadPoolExecutor(AT_ONCE) as threads:
        list(threads.map(do, names))


@register_path_cls(tuple(SCHEMES))  # in place of etils' own classes, which need TensorFlow or fsspec
class BucketPath(PosixGPath):
    """A path in a bucket."""

    _objects = _Objects()

    @property
    def _backend(self) -> _Objects:
        return self._objects

    def is_file(self) -> bool:
        """Whether there is such an object."""
        return self._objects.is_file(str(self))

    def expanduser(self) -> "BucketPath":
        """The path itself."""
        return self

    def absolute(self) -> "BucketPath":
        """The path itself."""
        return self

    def resolve(self, strict: bool = False) -> "BucketPath":
        """The path itself."""
        return self

    def glob(self, pattern: str) -> Iterator["BucketPath"]:
        """The files and folders whose last parts match the parts of `pattern`, in order."""
        patterns = pattern.split("/")
        begins = re.match(r"[^*?\[]*", pattern)[0]
        parts = (name.split("/")[: len(patterns)] for name in self._objects.names(str(self), begins))
        fit = {"/".join(some) for some in parts if len(some) == len(patterns) and all(map(fnmatchcase, some, patterns))}
        return iter([self / name for name in sorted(fit)])

    def files(self) -> list["BucketPath"]:
        """All files below this folder."""
        return [self / name for name in self._objects.names(str(self))]

    def version(self) -> str:
        """What distinguishes the object from earlier and later ones of its name."""
        return self._objects.found(str(self), byte_range=slice(0, 0)).stamp.generation.hex()

    def read_with_version(self) -> tuple[bytes, str]:
        """The content of the object, and its version."""
        found = self._objects.found(str(self))
        return found.value, found.stamp.generation.hex()

    def read_bytes(self) -> bytes:
        """The content of the object."""
        return self._objects.read(str(self))

    def rewrite(self, content: bytes) -> None:
        """Writes an object that exists, unless it is removed or written meanwhile.

        Google's bucket checks that while it writes. TensorStore asks Amazon's first, and then writes.
        """
        found = _request(self, lambda store, key: store.read(key))
        if found.state == "value":
            _request(self, lambda store, key: store.write(key, content, if_equal=found.stamp.generation))

    def write_bytes(self, data: bytes) -> int:
        """Writes an object."""
        self._objects.write(str(self), data)
        return len(data)
