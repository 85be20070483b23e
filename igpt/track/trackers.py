"""One interface for all trackers: training, fine-tuning, probes and `igpt evaluate` record through it.

    with Trackers(workdir, config.track, "train") as trackers:
        trackers.open(config.flat(), after=0)
        trackers.scalars(1, {"train/loss": 2.8})
        trackers.picture(1, "samples", picture)         # uint8 [H, W, 3]
        trackers.summary(9, {"test/accuracy": 0.95})    # what the run is about

metrics.jsonl gets every number, and the others copy it. A tracker that fails is left with one warning; the run goes on.
"""

import contextlib
import math
import secrets
import sys
from collections.abc import Callable, Sequence
from pathlib import PurePath
from typing import Protocol, runtime_checkable

import numpy as np
from PIL import Image
from tqdm import tqdm

from igpt.errors import StorageError, first_line
from igpt.files import AnyPath, as_path, open_binary, read_json, storage_errors, write_json
from igpt.track.lines import NAME, JsonLines
from igpt.track.live import LiveFiles
from igpt.track.names import check_installed, check_names

IDENTITIES = "trackers.json"  # {tracker: the id of this run there}


@runtime_checkable
class Tracker(Protocol):
    """What a tracker does. Any of its methods may raise any exception."""

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Records numbers of a step."""

    def picture(self, step: int, name: str, picture: np.ndarray) -> None:
        """Records a picture, uint8 [H, W, 3]."""

    def summary(self, step: int, values: dict[str, float]) -> None:
        """Records final results, after the last step."""

    def flush(self) -> None:
        """Stores what was recorded so far, so that a kill does not lose it."""

    def close(self, failed: bool) -> None:
        """Writes what is not written yet. `failed` says whether the run ended in an exception."""


class Trackers:
    """metrics.jsonl in a folder, and the trackers with these names. `open` opens them; the end of `with` closes them.

    Raises UserError, before it writes anything, for an unknown tracker and for one whose package is not installed.
    `kind` is train, finetune, probe or evaluate. Only the process with `active` writes.
    """

    def __init__(self, folder: AnyPath | str, names: Sequence[str], kind: str, active: bool = True):
        check_names(names)
        check_installed(names)
        self.folder, self.names, self.kind, self.active = as_path(folder), names, kind, active
        self.lines: JsonLines | None = None
        self.live: LiveFiles | None = None
        self.others: dict[str, Tracker] = {}

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        if self.lines is not None:
            self.lines.close()
        self._each(lambda tracker: tracker.close(failed=kind is not None))
        live, self.lines, self.live, self.others = self.live, None, None, {}
        if live is not None:
            with contextlib.suppress(*([StorageError] if kind else [])), storage_errors(self.folder):
                live.close()

    def open(self, config: dict, after: int | None = None, repeats_evaluation: bool = False) -> None:
        """Opens all trackers with a flat configuration, {"train.steps": 7}. Raises OSError if metrics.jsonl fails.

        A run that resumes after step `after` continues its own record: later records are dropped, and also those of the
        evaluation at `after` with `repeats_evaluation`. None begins a new record.
        """
        if not self.active:
            return
        self.live = LiveFiles(self.folder)
        self.live.fetch(NAME)
        self.lines = JsonLines(self.live.folder, -1 if after is None else after, repeats_evaluation)
        path = self.folder / IDENTITIES
        known = read_json(path) if after is not None and path.exists() else {}
        identities = {name: known.get(name) or secrets.token_hex(4) for name in self.names if name != "tensorboard"}
        if identities and known | identities != known:
            write_json(path, known | identities)
        for name in self.names:
            with self._one_warning(name):
                self.others[name] = self._opened(name, config, after, identities.get(name, ""))

    def _opened(self, name: str, config: dict, after: int | None, identity: str) -> Tracker:
        """Imports a tracker and opens it. The imports are slow, so that they wait until a run needs them."""
        if name == "tensorboard":
            from igpt.track.tensorboard import TensorBoard

            return TensorBoard(self.live.folder, config, -1 if after is None else after)
        if name == "wandb":
            from igpt.track.wandb import WeightsAndBiases

            return WeightsAndBiases(self.live.folder, config, self.kind, identity, str(self.folder))
        from igpt.track.trackio import Trackio

        return Trackio(self.folder, config, self.kind, identity)

    def scalars(self, step: int, values: dict) -> None:
        """Records numbers, but no NaN, which JSON does not have. Raises OSError if metrics.jsonl cannot be written."""
        self._record(step, values, lambda tracker, finite: tracker.scalars(step, finite))

    def summary(self, step: int, values: dict) -> None:
        """Records final results, after the last step. They are scalars, too."""
        self._record(step, values, lambda tracker, finite: tracker.summary(step, finite))

    def _record(self, step: int, values: dict, record: Callable[[Tracker, dict], None]) -> None:
        if self.lines is not None:
            finite = {name: float(value) for name, value in values.items() if math.isfinite(value)}
            self.lines.scalars(step, finite)
            self._each(lambda tracker: record(tracker, finite))

    def picture(self, step: int, name: str, picture: np.ndarray | AnyPath) -> None:
        """Records a picture, uint8 [H, W, 3], or the one of a file."""
        if self.others:
            if isinstance(picture, PurePath):
                with open_binary(picture) as file, Image.open(file) as image:
                    picture = np.asarray(image.convert("RGB"))
            self._each(lambda tracker: tracker.picture(step, name, picture))

    def flush(self) -> None:
        """Stores what was recorded so far. Call this method before a checkpoint: a resumed run goes on after it."""
        if self.lines is not None:
            self.lines.sync()
            self._each(lambda tracker: tracker.flush())
            self.live.push()

    def _each(self, call: Callable[[Tracker], None]) -> None:
        for name in list(self.others):
            with self._one_warning(name):
                call(self.others[name])

    @contextlib.contextmanager
    def _one_warning(self, name: str):
        """Warns if the block fails, and then leaves this tracker alone: a run must not end because a network does."""
        try:
            yield
        except Exception as error:
            self.others.pop(name, None)
            text = f"warning: {name} records nothing any more ({first_line(error)}); the run and metrics.jsonl go on"
            with contextlib.suppress(OSError):  # stderr may be a file on a full disk
                tqdm.write(text, file=sys.stderr)
