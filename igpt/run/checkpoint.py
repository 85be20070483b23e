"""Checkpoints on disk (Orbax: atomic, asynchronous, resharded when restored).

    WORKDIR/checkpoints/STEP/{params, optimizer, progress, sha256.json}

Parameters and optimizer are separate items: a reader who wants the model never reads the optimizer's moments.
`progress` holds the rest of what a resumed run must know.
"""

import contextlib
import dataclasses
import shutil
import sys
import threading
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy

from igpt.errors import StorageError, UserError, first_line, reported
from igpt.run.cluster import all_processes, barrier, broadcast, exists, is_first_process
from igpt.run.digests import damage, write_digests
from igpt.state import TrainState

FOLDER = "checkpoints"
ITEMS = ("params", "optimizer", "progress")
REPLACED = "replaced-"
FILE_BYTES = 64 << 20  # Orbax holds a data file in memory while it writes it; its default of 2 GiB is as large as L


@dataclasses.dataclass
class Progress:
    """The last evaluation, the best validation accuracy of fine-tuning, and how many evaluations came after it."""

    evaluated_step: int = 0
    best_step: int = 0
    best_accuracy: float = -1.0
    evaluations_since: int = 0

    def note(self, step: int, accuracy: float) -> bool:
        """Records an evaluation of a classifier; returns whether it is the best so far."""
        if accuracy <= self.best_accuracy:
            self.evaluations_since += 1
            return False
        self.best_step, self.best_accuracy, self.evaluations_since = step, accuracy, 0
        return True

    def is_over(self, patience: int) -> bool:
        """Whether the run has ended early: that many evaluations without a better accuracy (0: never)."""
        return 0 < patience <= self.evaluations_since


@dataclasses.dataclass
class _KeepBest(preservation_policy.PreservationPolicy):
    """Keeps the checkpoint of the best step, besides the newest ones."""

    progress: Progress

    def should_preserve(self, checkpoints, *, context):
        return [checkpoint.step == self.progress.best_step for checkpoint in checkpoints]


class _Manager(ocp.CheckpointManager):
    def reached_preemption(self, step: int) -> bool:
        return False  # StopSignal polls the runtime, which expects a single caller


class Checkpoints:
    """The checkpoints that a run writes. Close them, or use `with`, so that the last save finishes.

    The newest `max_to_keep` are kept, and the one of `progress.best_step` at the time of a save. All methods raise
    StorageError when a save fails, also one that runs in the background.
    """

    def __init__(self, workdir: Path, max_to_keep: int, progress: Progress | None = None):
        self.workdir, self.progress = workdir.absolute(), progress or Progress()
        policies = [preservation_policy.LatestN(max_to_keep), _KeepBest(self.progress)]
        options = ocp.CheckpointManagerOptions(
            preservation_policy=preservation_policy.AnyPreservationPolicy(policies),
            enable_async_checkpointing=True,
            async_options=ocp.AsyncOptions(post_finalization_callback=self._seal, barrier_sync_fn=self._barrier),
            cleanup_tmp_directories=True,  # of saves that a kill interrupted
            create=True,
        )
        self._saving = None
        self._manager = _Manager(self.workdir / FOLDER, options=options)

    def save(self, state: TrainState, step: int) -> None:
        """Starts to write the state after `step` updates; returns once it is copied off the devices.

        An existing checkpoint of that step, which has an older progress, is replaced. It is kept under another name
        until the new one is finished.
        """
        with self._storage_errors():
            self._finish()
            self._saving = step
            if step in self._manager.all_steps():
                self._put_aside(step)
            items = dict(
                params=ocp.args.StandardSave(state.params),
                optimizer=ocp.args.StandardSave({"step": state.step, "opt_state": state.opt_state}),
                progress=ocp.args.JsonSave(dataclasses.asdict(self.progress)),
            )
            self._manager.save(step, args=ocp.args.Composite(**items))

    def _put_aside(self, step: int) -> None:
        if is_first_process():
            (self.workdir / FOLDER / str(step)).rename(self.workdir / f"{REPLACED}{step}")
        barrier()
        self._manager.reload()
        while not all_processes(step not in self._manager.all_steps()):
            time.sleep(1)  # a network file system may show the old name for a while
            self._manager.reload()

    def newest(self) -> int | None:
        """The step of the newest finished checkpoint; waits for one that is being written."""
        with self._storage_errors():
            self._finish()
        return max(finished_steps(self.workdir), default=None)

    def close(self) -> None:
        """Waits for the save that is running and frees its threads."""
        with self._storage_errors():
            self._finish()
            self._manager.close()

    def _finish(self) -> None:
        """Waits for the save that is running."""
        self._manager.wait_until_finished()
        _settle_replaced(self.workdir)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def _seal(self) -> None:
        """Adds the digests. Orbax calls it in the background before it gives the directory its final name."""
        for unnamed in (self.workdir / FOLDER).glob(f"{self._saving}.*"):
            write_digests(unnamed)

    def _barrier(self, *, key: str, timeout_ms: int) -> None:
        """Orbax's barrier among the processes of a save.

        A process whose background save has failed would wait here for 20 minutes, since the others wait at another
        barrier. It reports its error and exits instead; the runtime then ends the others.
        """
        failed = sys.exception() if threading.current_thread() is not threading.main_thread() else None
        if failed and jax.process_count() > 1:
            with reported(), self._storage_errors():
                raise failed
        ocp.multihost.get_barrier_sync_fn()(key=key, timeout_ms=timeout_ms)

    @contextlib.contextmanager
    def _storage_errors(self):
        try:
            yield
        except jax.errors.JaxRuntimeError:  # of a device or another process, not of storage
            raise
        except Exception as error:  # Orbax, TensorStore and the file system each raise types of their own
            kept = sorted(int(path.name) for path in (self.workdir / FOLDER).glob("*") if path.name.isdigit())
            raise StorageError(
                f"the checkpoint of step {self._saving} could not be written to {self.workdir / FOLDER}: "
                f"{first_line(error)[-200:]}. "
                + (f"The one of step {kept[-1]} is unchanged; " if kept else "There is no other yet; ")
                + "make room, or repair the storage, and run the same command again."
            ) from error


def _settle_replaced(workdir: Path) -> None:
    """Keeps one of a replaced checkpoint and its successor: the successor if it is finished, else the old one."""
    if not is_first_process():
        return
    for old in workdir.glob(f"{REPLACED}*"):
        new = workdir / FOLDER / old.name.removeprefix(REPLACED)
        if new.exists():
            shutil.rmtree(old, ignore_errors=True)  # files that cannot be removed now are removed the next time
        else:
            old.rename(new)


def finished_steps(workdir: Path) -> list[int]:
    """The steps of a run's finished checkpoints as this process sees them, oldest first; only reads."""
    if not (workdir / FOLDER).is_dir():
        return []
    with _reader(workdir) as checkpoints:
        return sorted(checkpoints.all_steps())


def common_steps(workdir: Path) -> list[int]:
    """The finished steps as process 0 sees them, for a run that may still be training. Every process must call it."""
    steps = np.array(finished_steps(workdir), np.int32)
    count = int(broadcast(len(steps)))
    return np.asarray(broadcast(np.resize(steps, count))).tolist() if count else []


def _reader(workdir: Path) -> ocp.CheckpointManager:
    options = ocp.CheckpointManagerOptions(create=False)
    return ocp.CheckpointManager(workdir.absolute() / FOLDER, options=options, item_names=ITEMS)


def folder_of(workdir: Path, step: int) -> Path:
    """The directory of a checkpoint."""
    return workdir / FOLDER / str(step)


def newest_sound_step(workdir: Path) -> int:
    """The step of the newest undamaged checkpoint, 0 if there has been none. Damaged ones are moved away.

    Raises UserError if all are damaged.
    """
    _settle_replaced(workdir)
    barrier()
    steps = common_steps(workdir)
    for step in reversed(steps):
        reason = damage(folder_of(workdir, step))
        if not reason:
            return step
        if is_first_process():
            number = 1
            while (aside := workdir / f"damaged-{step}-{number}").exists():
                number += 1
            folder_of(workdir, step).rename(aside)
            print(f"the checkpoint of step {step} is damaged ({reason}): moved to {aside}, resuming from an older one")
        barrier()
    if steps or broadcast(any(workdir.glob("damaged-*"))):  # found now, or by an earlier start
        raise UserError(
            f"every checkpoint of {workdir} is damaged, and was moved to {workdir}/damaged-STEP; restore one from a "
            "copy, or run with --start_over to begin anew"
        )
    return 0


def save_params(workdir: Path, params: dict, step: int) -> None:
    """Writes parameters alone: a checkpoint to load or to start from, but not to resume.

    Needs little memory besides theirs if they are jax.Arrays; Orbax copies NumPy arrays first.
    """
    options = ocp.CheckpointManagerOptions(enable_async_checkpointing=False, create=True)  # no second copy in memory
    with ocp.CheckpointManager(workdir.absolute() / FOLDER, options=options) as checkpoints:
        item = ocp.args.PyTreeSave(params, ocdbt_target_data_file_size=FILE_BYTES)
        checkpoints.save(step, args=ocp.args.Composite(params=item))


def progress_at(workdir: Path, step: int) -> Progress | None:
    """The progress that a checkpoint holds; None for a checkpoint of weights alone."""
    if not exists(folder_of(workdir, step) / "progress"):
        return None
    with _reader(workdir) as checkpoints:
        return Progress(**checkpoints.restore(step, args=ocp.args.Composite(progress=ocp.args.JsonRestore())).progress)


def restore(workdir: Path, abstract: TrainState, step: int) -> TrainState:
    """The state after `step` updates, onto the shardings of `abstract`, whatever mesh wrote it."""
    optimizer = {"step": abstract.step, "opt_state": abstract.opt_state}
    items = ocp.args.Composite(
        params=ocp.args.StandardRestore(abstract.params),
        # Partial: earlier versions also saved the last 128 losses.
        optimizer=ocp.args.PyTreeRestore(
            optimizer, ocp.checkpoint_utils.construct_restore_args(optimizer), partial_restore=True
        ),
    )
    found = _restored(workdir, step, items)
    return TrainState(found.optimizer["step"], found.params, found.optimizer["opt_state"])


def restore_params(workdir: Path, abstract: dict, step: int | None = None) -> tuple[dict, int]:
    """The parameters alone, and their step: `step`, or the best step of a fine-tuning run, or the newest of any other.

    Raises UserError for a missing or damaged checkpoint.
    """
    steps = common_steps(workdir)
    if not steps:
        raise UserError(f"{workdir} has no finished checkpoint yet: train first, or name another run directory")
    if step is None:
        progress = progress_at(workdir, steps[-1])
        step = progress.best_step if progress and progress.best_step in steps else steps[-1]
    if step not in steps:
        raise UserError(f"{workdir} has no checkpoint of step {step}; it has {steps}")
    if reason := damage(folder_of(workdir, step), "params/"):
        raise UserError(f"the checkpoint of step {step} of {workdir} is damaged ({reason}); there are {steps}")
    return _restored(workdir, step, ocp.args.Composite(params=ocp.args.StandardRestore(abstract))).params, step


def _restored(workdir: Path, step: int, items):
    with _reader(workdir) as checkpoints:
        try:
            return checkpoints.restore(step, args=items)
        except Exception as error:  # damage was excluded by the digests: mostly this is another tree of arrays
            raise UserError(
                f"the checkpoint of step {step} of {workdir} does not fit this network: {first_line(error)[:300]}. It "
                "may come from another version of igpt; another run can still start from its weights with init_from"
            ) from error
