"""metrics.jsonl: one JSON record a line, {"step": 7, "train/loss": 1.5}. What trackers show is a copy of it."""

import contextlib
import json
import os
import time
from pathlib import Path

from igpt.files import AnyPath, write_text

SYNC_SECONDS = 30  # how often the file is synced to disk
NAME = "metrics.jsonl"


class JsonLines:
    """Appends records to DIR/metrics.jsonl. It raises OSError if the file cannot be written."""

    def __init__(self, folder: Path, after: int, repeats_evaluation: bool = False):
        """Drops old records of steps beyond `after`, and of the evaluation at `after` if the run will repeat it."""
        path = folder / NAME
        _drop_records_after(path, after, repeats_evaluation)
        self.file, self.sync_at = path.open("a"), 0.0

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Writes a record. It reaches the operating system before the method returns."""
        self.file.write(json.dumps({"step": step} | values) + "\n")
        self.file.flush()
        if time.monotonic() > self.sync_at:
            self.sync()

    def sync(self) -> None:
        """Makes sure that the file is stored. A mounted bucket stores a file only when it is synced or closed."""
        os.fsync(self.file.fileno())
        self.sync_at = time.monotonic() + SYNC_SECONDS

    def close(self) -> None:
        """Closes the file. It ignores OSError, because an earlier write has already reported a full disk."""
        with contextlib.suppress(OSError):
            self.file.close()


def records(folder: AnyPath) -> list[dict]:
    """The records of DIR/metrics.jsonl in their order. [] if it is missing. Incomplete lines are passed over."""
    with contextlib.suppress(OSError):
        return [record for record, _ in _read(folder / NAME)]
    return []


def _read(path: AnyPath) -> list[tuple[dict, str]]:
    """The records of a file and their lines. A killed run, or a full disk, may leave incomplete lines."""
    found = []
    for line in path.read_bytes().splitlines():
        with contextlib.suppress(ValueError):
            record = json.loads(text := line.decode())
            if isinstance(record, dict) and isinstance(record.get("step"), int):
                found.append((record, text))
    return found


def _drop_records_after(path: Path, step: int, repeats_evaluation: bool) -> None:
    """Removes the records that a killed run wrote and the resumed run will write again."""
    if path.exists():
        kept = [
            text + "\n"
            for record, text in _read(path)
            if record["step"] < step + 1 - (repeats_evaluation and "eval/loss" in record)
        ]
        write_text(path, "".join(kept))
