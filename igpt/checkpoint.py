"""Checkpoints on disk (Orbax: atomic, asynchronous, resharded on restore).

    WORKDIR/config.json, palette.npy, checkpoints/STEP/{params, optimizer, progress}

Parameters and optimizer are separate items, so that whoever only wants the model never reads the moments. Fine-tuning
has a third, its progress: which step has been the best so far, and how good.
"""

import dataclasses
from pathlib import Path

import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy

from igpt.errors import UserError
from igpt.state import TrainState

FOLDER = "checkpoints"
ITEMS = ("params", "optimizer", "progress")
FILE_BYTES = 64 << 20  # Orbax holds a data file in memory until it is written: its own 2 GiB would weigh as much as L


@dataclasses.dataclass
class Progress:
    """Of fine-tuning: the evaluation with the highest validation accuracy, and how many there have been since."""

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


def open_checkpoints(workdir: Path, max_to_keep: int, progress: Progress | None = None) -> ocp.CheckpointManager:
    """The checkpoints of a run, for writing and reading; close it (or use `with`) so that the last save finishes.

    The newest `max_to_keep` are kept, and that of `progress.best_step` as it is at the time of a save.
    """
    policies = [preservation_policy.LatestN(max_to_keep), *([_BestToo(progress)] if progress else [])]
    options = ocp.CheckpointManagerOptions(
        preservation_policy=preservation_policy.AnyPreservationPolicy(policies),
        enable_async_checkpointing=True,
        create=True,
    )
    return ocp.CheckpointManager(workdir.absolute() / FOLDER, options=options)


def finished_steps(workdir: Path) -> list[int]:
    """The steps of a run's finished checkpoints, oldest first; reads only."""
    if not (workdir / FOLDER).is_dir():
        return []
    with _reader(workdir) as checkpoints:
        return sorted(checkpoints.all_steps())


def _reader(workdir: Path) -> ocp.CheckpointManager:
    options = ocp.CheckpointManagerOptions(create=False)
    return ocp.CheckpointManager(workdir.absolute() / FOLDER, options=options, item_names=ITEMS)


def save(checkpoints: ocp.CheckpointManager, state: TrainState, step: int, progress: Progress | None = None) -> None:
    """Starts writing the state after `step` updates; returns once it is copied off the devices."""
    items = dict(
        params=ocp.args.StandardSave(state.params),
        optimizer=ocp.args.StandardSave({"step": state.step, "opt_state": state.opt_state}),
    )
    if progress:
        items["progress"] = ocp.args.JsonSave(dataclasses.asdict(progress))
    checkpoints.save(step, args=ocp.args.Composite(**items))


def save_params(workdir: Path, params: dict, step: int) -> None:
    """Writes parameters alone, as a checkpoint that can be loaded and started from, but not resumed.

    It needs hardly any memory besides theirs; jax.Arrays, that is: of numpy's Orbax makes a copy first.
    """
    options = ocp.CheckpointManagerOptions(enable_async_checkpointing=False, create=True)  # no second copy in memory
    with ocp.CheckpointManager(workdir.absolute() / FOLDER, options=options) as checkpoints:
        item = ocp.args.PyTreeSave(params, ocdbt_target_data_file_size=FILE_BYTES)
        checkpoints.save(step, args=ocp.args.Composite(params=item))


def progress_at(workdir: Path, step: int) -> Progress | None:
    """What a checkpoint says of a fine-tuning run's progress; None for any other run."""
    if not (workdir / FOLDER / str(step) / "progress").is_dir():
        return None
    with _reader(workdir) as checkpoints:
        return Progress(**checkpoints.restore(step, args=ocp.args.Composite(progress=ocp.args.JsonRestore())).progress)


def restore(checkpoints: ocp.CheckpointManager, abstract: TrainState, step: int) -> TrainState:
    """The state after `step` updates, onto the shardings of `abstract`, whatever mesh wrote it."""
    items = ocp.args.Composite(
        params=ocp.args.StandardRestore(abstract.params),
        optimizer=ocp.args.StandardRestore({"step": abstract.step, "opt_state": abstract.opt_state}),
    )
    found = checkpoints.restore(step, args=items)
    return TrainState(found.optimizer["step"], found.params, found.optimizer["opt_state"])


def restore_params(workdir: Path, abstract: dict, step: int | None = None) -> tuple[dict, int]:
    """The parameters alone, and the step they are of: `step`, or that of the best checkpoint of a fine-tuning run, or
    the newest of any other."""
    steps = finished_steps(workdir)
    if not steps:
        raise UserError(f"{workdir} has no finished checkpoint yet: train first, or name another run directory")
    if step is None:
        progress = progress_at(workdir, steps[-1])
        step = progress.best_step if progress and progress.best_step in steps else steps[-1]
    if step not in steps:
        raise UserError(f"{workdir} has no checkpoint of step {step}; it has {steps}")
    with _reader(workdir) as checkpoints:
        items = ocp.args.Composite(params=ocp.args.StandardRestore(abstract))
        return checkpoints.restore(step, args=items).params, step
