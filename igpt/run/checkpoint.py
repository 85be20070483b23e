"""Checkpoints on disk (Orbax: atomic, asynchronous, resharded on restore).

    WORKDIR/config.json, palette.npy, checkpoints/STEP/{params, optimizer, progress, sha256.json}

Parameters and optimizer are separate items, so that whoever only wants the model never reads the moments. `progress`
is what else a run has to know to go on. A checkpoint carries the digests of its files, written before it is given its
name: one that is damaged is told from a sound one before it is read.
"""

import contextlib
import dataclasses
import hashlib
import json
import shutil
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy

from igpt.errors import StorageError, UserError, reported
from igpt.run.cluster import agreed, everywhere, meet
from igpt.state import TrainState

FOLDER = "checkpoints"
ITEMS = ("params", "optimizer", "progress")
DIGESTS = "sha256.json"
REPLACED = "replaced-"
FILE_BYTES = 64 << 20  # Orbax holds a data file in memory until it is written: its own 2 GiB would weigh as much as L


@dataclasses.dataclass
class Progress:
    """How far evaluations have come; of fine-tuning, also which had the highest accuracy, and how many came since."""

    evaluated_step: int = 0
    best_step: int = 0
    best_accuracy: float = -1.0
    evaluations_since: int = 0

    def note(self, step: int, accuracy: float) -> bool:
        """Takes in an evaluation; whether it is the best so far."""
        if accuracy <= self.best_accuracy:
            self.evaluations_since += 1
            return False
        self.best_step, self.best_accuracy, self.evaluations_since = step, accuracy, 0
        return True


@dataclasses.dataclass
class _BestToo(preservation_policy.PreservationPolicy):
    """Keeps, besides the newest, the checkpoint of the best step."""

    progress: Progress

    def should_preserve(self, checkpoints, *, context):
        return [checkpoint.step == self.progress.best_step for checkpoint in checkpoints]


class _Manager(ocp.CheckpointManager):
    def reached_preemption(self, step: int) -> bool:
        return False  # igpt.preemption asks the runtime, which expects one caller that counts


class Checkpoints:
    """Those that a run writes; close them (or use `with`) so that the last save finishes.

    The newest `max_to_keep` are kept, and that of `progress.best_step` as it is at the time of a save. All raise
    StorageError when a save fails, also one that was under way in the background.
    """

    def __init__(self, workdir: Path, max_to_keep: int, progress: Progress | None = None):
        self.workdir, self.progress = workdir.absolute(), progress or Progress()
        policies = [preservation_policy.LatestN(max_to_keep), _BestToo(self.progress)]
        options = ocp.CheckpointManagerOptions(
            preservation_policy=preservation_policy.AnyPreservationPolicy(policies),
            enable_async_checkpointing=True,
            async_options=ocp.AsyncOptions(post_finalization_callback=self._seal, barrier_sync_fn=self._meet),
            cleanup_tmp_directories=True,  # of saves that a kill cut short
            create=True,
        )
        self._saving = None
        self._manager = _Manager(self.workdir / FOLDER, options=options)

    def save(self, state: TrainState, step: int) -> None:
        """Starts writing the state after `step` updates; returns once it is copied off the devices.

        A checkpoint of that step, whose progress is then an older one, is replaced: it is kept beside the others until
        the new one is finished.
        """
        with self._told():
            self._finish()
            self._saving = step
            if step in self._manager.all_steps():
                if jax.process_index() == 0:
                    (self.workdir / FOLDER / str(step)).rename(self.workdir / f"{REPLACED}{step}")
                meet()
                self._manager.reload()
                while not everywhere(step not in self._manager.all_steps()):
                    time.sleep(1)  # a network file system may show what was there
                    self._manager.reload()
            items = dict(
                params=ocp.args.StandardSave(state.params),
                optimizer=ocp.args.StandardSave({"step": state.step, "opt_state": state.opt_state}),
                progress=ocp.args.JsonSave(dataclasses.asdict(self.progress)),
            )
            self._manager.save(step, args=ocp.args.Composite(**items))

    def newest(self) -> int | None:
        """The step of the newest that is finished; waits for one that is being written."""
        with self._told():
            self._finish()
        return max(finished_steps(self.workdir), default=None)

    def close(self) -> None:
        with self._told():
            self._finish()
            self._manager.close()

    def _finish(self) -> None:
        """Waits for the save that is under way."""
        self._manager.wait_until_finished()
        _settle_replaced(self.workdir)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def _seal(self) -> None:
        """Adds the digests; called in the background when all is written and only the directory's name is missing."""
        for unnamed in (self.workdir / FOLDER).glob(f"{self._saving}.*"):
            files = _files(unnamed)
            with ThreadPoolExecutor() as threads:  # hashlib leaves the interpreter to others
                found = threads.map(_digest, files)
                digests = {str(path.relative_to(unnamed)): digest for path, digest in zip(files, found, strict=True)}
            (unnamed / DIGESTS).write_text(json.dumps(digests, indent=0))

    def _meet(self, *, key: str, timeout_ms: int) -> None:
        """Orbax's meeting point of the processes within a save.

        One whose save has failed comes here from the background with the error in flight, to wait for others that
        wait for it elsewhere, all of them 20 minutes: it tells the error and leaves instead, at which they end.
        """
        failed = sys.exception() if threading.current_thread() is not threading.main_thread() else None
        if failed and jax.process_count() > 1:
            with reported(), self._told():
                raise failed
        ocp.multihost.get_barrier_sync_fn()(key=key, timeout_ms=timeout_ms)

    @contextlib.contextmanager
    def _told(self):
        try:
            yield
        except jax.errors.JaxRuntimeError:  # of a device, or the others: not of storage
            raise
        except Exception as error:  # of Orbax, TensorStore and the file system, each in its own words
            kept = sorted(int(path.name) for path in (self.workdir / FOLDER).glob("*") if path.name.isdigit())
            raise StorageError(
                f"the checkpoint of step {self._saving} could not be written to {self.workdir / FOLDER}: "
                f"{_first_line(error)[-200:]}. "
                + (f"That of step {kept[-1]} is untouched; " if kept else "There is none yet; ")
                + "make room, or mend the place, and run the same command again."
            ) from error


def _settle_replaced(workdir: Path) -> None:
    """Of a checkpoint that is being replaced one stays: the new one where it is finished, else the old."""
    if jax.process_index() > 0:
        return
    for old in workdir.glob(f"{REPLACED}*"):
        new = workdir / FOLDER / old.name.removeprefix(REPLACED)
        if new.exists():
            shutil.rmtree(old, ignore_errors=True)  # what is left of it goes the next time
        else:
            old.rename(new)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _files(folder: Path) -> list[Path]:
    """Those of the items; beside them Orbax keeps a note that it has yet to finish."""
    return sorted(path for path in folder.glob("*/**/*") if path.is_file())


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def damage(workdir: Path, step: int, item: str = "") -> str:
    """What is wrong with the files of a checkpoint, or of one item of it; "" where nothing is.

    Of several processes each reads its share of the files; all have to ask. Weights alone (`save_params`) have no
    digests; of a training state they are missing only where it was being removed. Raises StorageError where a sound
    file cannot be read, or not by all.
    """
    folder = workdir / FOLDER / str(step)
    found = _flaw(folder, item, jax.process_index(), jax.process_count())
    if everywhere(not found):
        return ""
    if jax.process_count() > 1:  # what only another host does not see is that host's trouble
        whole = _flaw(folder, item) if jax.process_index() == 0 else ""
        if not agreed(np.array(bool(whole))):
            raise StorageError(
                f"{folder} is whole as process 0 sees it, but not as another does ({found or 'nothing here'}); see "
                "whether all hosts see the same directory, and start again"
            )
        found = whole or found or "as process 0 found"
    return found


def _flaw(folder: Path, item: str, first: int = 0, every: int = 1) -> str:
    try:
        digests = json.loads((folder / DIGESTS).read_text())
        for name in sorted(name for name in digests if name.startswith(item))[first::every]:
            if not (folder / name).is_file():
                return f"{name} is missing"
            if _digest(folder / name) != digests[name]:
                return f"{name} is not what was written"
    except FileNotFoundError:
        if [path.name for path in folder.glob("*") if path.is_dir()] != ["params"] or not any(_files(folder)):
            return f"{DIGESTS} is missing"
    except OSError as error:
        raise StorageError(
            f"the checkpoint {folder} cannot be read ({error}). If it is lost, move it away, and the one before is used"
        ) from error
    except (ValueError, TypeError, AttributeError) as error:
        return f"{DIGESTS}: {error}"
    return ""


def finished_steps(workdir: Path) -> list[int]:
    """The steps of a run's finished checkpoints, oldest first; reads only."""
    if not (workdir / FOLDER).is_dir():
        return []
    with _reader(workdir) as checkpoints:
        return sorted(checkpoints.all_steps())


def agreed_steps(workdir: Path) -> list[int]:
    """The finished steps as process 0 sees them, of a run that may still be training; all processes have to ask."""
    steps = np.array(finished_steps(workdir), np.int32)
    count = int(agreed(np.array(len(steps))))
    return agreed(np.resize(steps, count)).tolist() if count else []


def _reader(workdir: Path) -> ocp.CheckpointManager:
    options = ocp.CheckpointManagerOptions(create=False)
    return ocp.CheckpointManager(workdir.absolute() / FOLDER, options=options, item_names=ITEMS)


def sound_step(workdir: Path) -> int:
    """The step of the newest checkpoint that is whole, 0 where there has been none. Damaged ones are moved away.

    Raises UserError where all are damaged.
    """
    _settle_replaced(workdir)
    meet()
    steps = agreed_steps(workdir)
    for step in reversed(steps):
        reason = damage(workdir, step)
        if not reason:
            return step
        if jax.process_index() == 0:
            number = 1
            while (aside := workdir / f"damaged-{step}-{number}").exists():
                number += 1
            (workdir / FOLDER / str(step)).rename(aside)
            print(f"the checkpoint of step {step} is damaged ({reason}): moved to {aside}, going on from an older one")
        meet()
    if steps or agreed(np.array(any(workdir.glob("damaged-*")))):  # now, or when the run was last started
        raise UserError(
            f"every checkpoint of {workdir} is damaged, and so they were moved to {workdir}/damaged-STEP; restore one "
            "from a copy, or run with --start_over to begin anew"
        )
    return 0


def save_params(workdir: Path, params: dict, step: int) -> None:
    """Writes parameters alone, as a checkpoint that can be loaded and started from, but not resumed.

    It needs hardly any memory besides theirs; jax.Arrays, that is: of numpy's Orbax makes a copy first.
    """
    options = ocp.CheckpointManagerOptions(enable_async_checkpointing=False, create=True)  # no second copy in memory
    with ocp.CheckpointManager(workdir.absolute() / FOLDER, options=options) as checkpoints:
        item = ocp.args.PyTreeSave(params, ocdbt_target_data_file_size=FILE_BYTES)
        checkpoints.save(step, args=ocp.args.Composite(params=item))


def progress_at(workdir: Path, step: int) -> Progress | None:
    """What a checkpoint says of its run's progress; None of one that has only weights, or is older than that."""
    if not agreed(np.array((workdir / FOLDER / str(step) / "progress").is_dir())):
        return None
    with _reader(workdir) as checkpoints:
        return Progress(**checkpoints.restore(step, args=ocp.args.Composite(progress=ocp.args.JsonRestore())).progress)


def restore(workdir: Path, abstract: TrainState, step: int) -> TrainState:
    """The state after `step` updates, onto the shardings of `abstract`, whatever mesh wrote it."""
    items = ocp.args.Composite(
        params=ocp.args.StandardRestore(abstract.params),
        optimizer=ocp.args.StandardRestore({"step": abstract.step, "opt_state": abstract.opt_state}),
    )
    found = _restored(workdir, step, items)
    return TrainState(found.optimizer["step"], found.params, found.optimizer["opt_state"])


def restore_params(workdir: Path, abstract: dict, step: int | None = None) -> tuple[dict, int]:
    """The parameters alone, and the step they are of: `step`, or that of the best checkpoint of a fine-tuning run, or
    the newest of any other."""
    steps = agreed_steps(workdir)
    if not steps:
        raise UserError(f"{workdir} has no finished checkpoint yet: train first, or name another run directory")
    if step is None:
        progress = progress_at(workdir, steps[-1])
        step = progress.best_step if progress and progress.best_step in steps else steps[-1]
    if step not in steps:
        raise UserError(f"{workdir} has no checkpoint of step {step}; it has {steps}")
    if reason := damage(workdir, step, "params/"):
        raise UserError(f"the checkpoint of step {step} of {workdir} is damaged ({reason}); there are {steps}")
    return _restored(workdir, step, ocp.args.Composite(params=ocp.args.StandardRestore(abstract))).params, step


def _restored(workdir: Path, step: int, items):
    with _reader(workdir) as checkpoints:
        try:
            return checkpoints.restore(step, args=items)
        except Exception as error:  # of Orbax and TensorStore; digests tell damage, so that this is mostly another tree
            reason = _first_line(error)[:300]
            raise UserError(
                f"the checkpoint of step {step} of {workdir} cannot be read as this network's: {reason}. It may be of "
                "another version of igpt; its weights alone may still serve another run, as init_from"
            ) from error
