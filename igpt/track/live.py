"""Files that grow while a run works, or that libraries write to disks only: those of trackers, and profiles.

An object in a bucket cannot grow. A run in a bucket keeps these files in a temporary folder and copies them to the
bucket: before each save, so that a checkpoint always has the records of its steps, and at the end.
"""

import contextlib
import tempfile
from pathlib import Path

from igpt.files import AnyPath, is_bucket


class LiveFiles:
    """`folder` is the place to write live files to: the workdir itself, or a temporary folder if that is in a bucket.

    `fetch` gets a file of an earlier start. Call `push` to copy what changed, and `close` at the end.
    """

    def __init__(self, workdir: AnyPath):
        self.workdir, self.folder, self._temporary, self._pushed = workdir, workdir, None, {}
        if is_bucket(workdir):
            self._temporary = tempfile.TemporaryDirectory(prefix="igpt-live.", ignore_cleanup_errors=True)
            self.folder = Path(self._temporary.name)

    def fetch(self, name: str) -> None:
        """Copies a file from the bucket, if it is there."""
        if self._temporary:
            with contextlib.suppress(FileNotFoundError):
                (self.folder / name).write_bytes((self.workdir / name).read_bytes())

    def push(self) -> None:
        """Copies the files that changed since the last call to the bucket. Raises OSError if that fails."""
        if not self._temporary:
            return
        for path in sorted(path for path in self.folder.rglob("*") if path.is_file()):
            content = path.read_bytes()
            if self._pushed.get(path) != len(content):  # live files only grow
                (self.workdir / path.relative_to(self.folder)).write_bytes(content)
                self._pushed[path] = len(content)

    def close(self) -> None:
        """Copies the files, and removes the temporary folder."""
        if self._temporary:
            try:
                self.push()
            finally:
                self._temporary.cleanup()
