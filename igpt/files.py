"""Where a run writes: a folder that can be written to, small files that are there whole or not at all."""

import os
from pathlib import Path

from igpt.errors import UserError


def check_workdir(workdir: str | Path) -> Path:
    """The workdir as a path that this run can write to, or UserError."""
    if "://" in str(workdir):
        raise UserError(f"--workdir={workdir} is a bucket; mount it, as docs/pods.md says, and give its path")
    workdir = Path(workdir)
    nearest = next(path for path in (workdir.absolute(), *workdir.absolute().parents) if path.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise UserError(f"--workdir={workdir} cannot be written: {nearest} is no writable folder; name another place")
    return workdir


def write_text(path: Path, text: str) -> None:
    """Whole or not at all, in UTF-8. Raises OSError."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
