"""Writes and lists checkpoints, on disk or in a bucket (Orbax: atomic, asynchronous). igpt/run/restore.py reads them.

    WORKDIR/checkpoints/STEP/{params, optimizer, progress, sha256.json}

On disk, a checkpoint gets its name when it is complete. In a bucket, it then gets the file commit_success.txt.

Parameters and optimizer are separate items, so that a program that needs only the model reads no optimizer moments.
`progress` holds the results of evaluations that a resumed run needs.
"""

import contextlib
import dataclasses
import sys
import threading
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy

from igpt.errors import StorageError, first_line, reported
from igpt.files import AnyPath, is_bucket, remove_tree
from igpt.run.cluster import all_processes, barrier, broadcast, is_first_process
from igpt.run.digests import write_digests
from igpt.run.orbax_paths import known_to_orbax
from igpt.state import TrainState

FOLDER = "checkpoints"
ITEMS = ("params", "optimizer", "progress")
REPLACED = "replaced-"
FINISHED = "commit_success.txt"  # in a bucket, Orbax writes it into a checkpoint that is complete; igpt/bucket.py too
FILE_BYTES = 64 << 20  # Orbax keeps a data file in memory while it writes the file; Orbax's default is 2 GiB


def _unraisable(problem, printed=sys.unraisablehook) -> None:
    """Keeps quiet about reads that end after another read of the same checkpoint failed and closed Orbax's event loop.

    Python prints any other exception that it cannot raise.
    """
    if str(problem.exc_value) != "Event loop is closed":
        printed(problem)


sys.unraisablehook = _unraisable


@dataclasses.dataclass
class Progress:
    """What a checkpoint knows of its run, beside the training state."""

    evaluated_step: int = 0  # the last evaluation
    best_step: int = 0  # fine-tuning's best validation accuracy, and the evaluations after it
    best_accuracy: float = -1.0
    evaluations_since: int = 0
    tokenizer: str = ""  # the digest of the tokenizer that made the tokens; empty: none, or by an earlier version
    images: str = ""  # the digest of the images that were learnt and evaluated; empty: written by an earlier version

    def note(self, step: int, accuracy: float) -> bool:
        """Records an evaluation of a classifier; returns whether it is the best so far."""
        if accuracy <= self.best_accuracy:
            self.evaluations_since += 1
            return False
        self.best_step, self.best_accuracy, self.evaluations_since = step, accuracy, 0
        return True

    def is_over(self, patience: int) -> bool:
        """Whether the run ends early, because `patience` evaluations brought no better accuracy. 0 means never."""
        return 0 < patience <= self.evaluations_since


@dataclasses.dataclass
class _KeepBest(preservation_policy.PreservationPolicy):
    """Keeps the checkpoint of the best step. Another policy keeps the newest checkpoints."""

    progress: Progress

    def should_preserve(self, checkpoints, *, context):
        return [checkpoint.step == self.progress.best_step for checkpoint in checkpoints]


class _Manager(ocp.CheckpointManager):
    def reached_preemption(self, step: int) -> bool:
        return False  # only StopSignal may ask JAX's runtime about SIGTERM: it expects a single caller


class Checkpoints:
    """Writes the checkpoints of a run. Call `close`, or use `with`, so that the last save finishes.

    Each save keeps the newest `max_to_keep` checkpoints and the checkpoint of `progress.best_step`. All methods raise
    StorageError if a save fails, even if the save runs in the background.
    """

    def __init__(self, workdir: AnyPath, max_to_keep: int, progress: Progress | None = None):
        self.workdir, self.progress = workdir.absolute(), progress or Progress()
        policies = [preservation_policy.LatestN(max_to_keep), _KeepBest(self.progress)]
        options = ocp.CheckpointManagerOptions(
            preservation_policy=preservation_policy.AnyPreservationPolicy(policies),
            enable_async_checkpointing=True,
            async_options=ocp.AsyncOptions(post_finalization_callback=self._seal, barrier_sync_fn=self._barrier),
            cleanup_tmp_directories=True,  # removes files of saves that a kill interrupted
            create=True,
        )
        self._saving = None
        self._manager = _Manager(known_to_orbax(self.workdir / FOLDER), options=options)

    def save(self, state: TrainState, step: int) -> None:
        """Starts to save the state after `step` updates. Returns when the state is copied from the devices to the host.

        If a checkpoint of this step exists, it has an older progress, and the new checkpoint replaces it. The old
        checkpoint is kept under another name until the new one is finished.
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
            time.sleep(1)  # a network file system may list the old name for a while
            self._manager.reload()

    def newest(self) -> int | None:
        """Waits for the running save. Returns the step of the newest finished checkpoint, or None if there is none."""
        with self._storage_errors():
            self._finish()
        return max(finished_steps(self.workdir), default=None)

    def close(self) -> None:
        """Waits for the running save, then closes Orbax's manager and stops its threads."""
        with self._storage_errors():
            self._finish()
            self._manager.close()

    def _finish(self) -> None:
        """Waits for the running save. Then deletes the checkpoint that it replaced, or renames it back."""
        self._manager.wait_until_finished()
        settle_replaced(self.workdir)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def _seal(self) -> None:
        """Writes the digests, which reads every file back, and opens every array.

        Orbax calls this in the background, before it finishes the checkpoint and deletes older ones.
        """
        folder = self.workdir / FOLDER
        for unfinished in [folder / str(self._saving)] if is_bucket(folder) else folder.glob(f"{self._saving}.*"):
            write_digests(unfinished)
            for item in ("params", "optimizer"):
                described(unfinished / item)

    def _barrier(self, *, key: str, timeout_ms: int) -> None:
        """Waits at Orbax's barrier until all processes of a save have called it.

        A process whose background save has failed would wait here for 20 minutes, because the other processes wait at
        another barrier. Therefore it reports its error and exits; JAX's runtime then ends the other processes.
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
        except jax.errors.JaxRuntimeError:  # the error of a device or of another process, not of storage
            raise
        except Exception as error:  # Orbax, TensorStore and the file system each raise their own types
            kept = []
            with contextlib.suppress(OSError):
                there = (self.workdir / FOLDER).glob("*")
                kept = sorted(int(path.name) for path in there if path.name.isdigit() and _is_finished(path))
            raise StorageError(
                f"the checkpoint of step {self._saving} could not be written to {self.workdir / FOLDER}: "
                f"{first_line(error)[-200:]}. "
                + (f"The one of step {kept[-1]} is unchanged; " if kept else "There is no other yet; ")
                + "make room, or repair the storage, and run the same command again."
            ) from error


def settle_replaced(workdir: AnyPath) -> None:
    """Deletes each old checkpoint whose replacement is finished. Renames the other old checkpoints back."""
    if not is_first_process():
        return
    for old in workdir.glob(f"{REPLACED}*"):
        new = workdir / FOLDER / old.name.removeprefix(REPLACED)
        if _is_finished(new):
            remove_tree(old)  # if some files cannot be removed now, the next call tries again
        else:
            remove_tree(new)  # in a bucket, an interrupted save has its final name
            old.rename(new)


def _is_finished(folder: AnyPath) -> bool:
    """Whether a checkpoint's folder is that of a finished one."""
    return (folder / FINISHED).is_file() if is_bucket(folder) else folder.exists()


def finished_steps(workdir: AnyPath) -> list[int]:
    """Lists the steps of a run's finished checkpoints, as this process sees them, oldest first. Changes no file."""
    if not (workdir / FOLDER).is_dir():
        return []
    with reader(workdir) as checkpoints:
        return sorted(checkpoints.all_steps())


def common_steps(workdir: AnyPath) -> list[int]:
    """Broadcasts the steps of a run's finished checkpoints from process 0. Every process must call this function.

    Without the broadcast, processes could list different steps while the run is still training.
    """
    steps = np.array(finished_steps(workdir), np.int32)
    count = int(broadcast(len(steps)))
    return np.asarray(broadcast(np.resize(steps, count))).tolist() if count else []


def reader(workdir: AnyPath) -> ocp.CheckpointManager:
    """Orbax's view of a run's checkpoints, which writes nothing. Use `with`, so that its threads end."""
    options = ocp.CheckpointManagerOptions(create=False)
    return ocp.CheckpointManager(known_to_orbax(workdir / FOLDER), options=options, item_names=ITEMS)


def described(item: AnyPath) -> dict:
    """The tree of a checkpoint's item with the shape of each array instead of its values."""
    return ocp.PyTreeCheckpointHandler().metadata(known_to_orbax(item)).tree


def folder_of(workdir: AnyPath, step: int) -> AnyPath:
    """The directory that holds the checkpoint of `step`."""
    return workdir / FOLDER / str(step)


def save_params(workdir: AnyPath, params: dict, step: int) -> None:
    """Writes a checkpoint of parameters only. A run can load it or start from it, but cannot resume from it.

    If the parameters are jax.Arrays, this needs little extra memory. Orbax copies NumPy arrays before it writes them.
    """
    options = ocp.CheckpointManagerOptions(enable_async_checkpointing=False, create=True)  # avoids a copy in memory
    with ocp.CheckpointManager(known_to_orbax(workdir / FOLDER), options=options) as checkpoints:
        item = ocp.args.PyTreeSave(params, ocdbt_target_data_file_size=FILE_BYTES)
        checkpoints.save(step, args=ocp.args.Composite(params=item))
