"""Checkpoints on disk (Orbax: atomic, asynchronous, resharded on restore).

    WORKDIR/config.json, palette.npy, checkpoints/STEP/{params, optimizer}

Parameters and optimizer are separate items, so that whoever only wants the model never reads the moments.
"""

from pathlib import Path

import orbax.checkpoint as ocp

from igpt.errors import UserError
from igpt.state import TrainState

FOLDER = "checkpoints"
FILE_BYTES = 64 << 20  # Orbax holds a data file in memory until it is written: its own 2 GiB would weigh as much as L


def open_checkpoints(workdir: Path, max_to_keep: int) -> ocp.CheckpointManager:
    """The checkpoints of a run, for writing and reading; close it (or use `with`) so that the last save finishes."""
    options = ocp.CheckpointManagerOptions(max_to_keep=max_to_keep, enable_async_checkpointing=True, create=True)
    return ocp.CheckpointManager(workdir.absolute() / FOLDER, options=options)


def finished_steps(workdir: Path) -> list[int]:
    """The steps of a run's finished checkpoints, oldest first; reads only."""
    if not (workdir / FOLDER).is_dir():
        return []
    with _reader(workdir) as checkpoints:
        return sorted(checkpoints.all_steps())


def _reader(workdir: Path) -> ocp.CheckpointManager:
    options = ocp.CheckpointManagerOptions(create=False)
    return ocp.CheckpointManager(workdir.absolute() / FOLDER, options=options, item_names=("params", "optimizer"))


def save(checkpoints: ocp.CheckpointManager, state: TrainState, step: int) -> None:
    """Starts writing the state after `step` updates; returns once it is copied off the devices."""
    items = ocp.args.Composite(
        params=ocp.args.StandardSave(state.params),
        optimizer=ocp.args.StandardSave({"step": state.step, "opt_state": state.opt_state}),
    )
    checkpoints.save(step, args=items)


def save_params(workdir: Path, params: dict, step: int) -> None:
    """Writes parameters alone, as a checkpoint that can be loaded and started from, but not resumed.

    It needs hardly any memory besides theirs; jax.Arrays, that is: of numpy's Orbax makes a copy first.
    """
    options = ocp.CheckpointManagerOptions(enable_async_checkpointing=False, create=True)  # no second copy in memory
    with ocp.CheckpointManager(workdir.absolute() / FOLDER, options=options) as checkpoints:
        item = ocp.args.PyTreeSave(params, ocdbt_target_data_file_size=FILE_BYTES)
        checkpoints.save(step, args=ocp.args.Composite(params=item))


def restore(checkpoints: ocp.CheckpointManager, abstract: TrainState, step: int) -> TrainState:
    """The state after `step` updates, onto the shardings of `abstract`, whatever mesh wrote it."""
    items = ocp.args.Composite(
        params=ocp.args.StandardRestore(abstract.params),
        optimizer=ocp.args.StandardRestore({"step": abstract.step, "opt_state": abstract.opt_state}),
    )
    found = checkpoints.restore(step, args=items)
    return TrainState(found.optimizer["step"], found.params, found.optimizer["opt_state"])


def restore_params(workdir: Path, abstract: dict, step: int | None = None) -> tuple[dict, int]:
    """The parameters alone, of the newest checkpoint unless `step` names one; and the step they are of."""
    steps = finished_steps(workdir)
    if not steps:
        raise UserError(f"{workdir} has no finished checkpoint yet: train first, or name another run directory")
    step = steps[-1] if step is None else step
    if step not in steps:
        raise UserError(f"{workdir} has no checkpoint of step {step}; it has {steps}")
    with _reader(workdir) as checkpoints:
        items = ocp.args.Composite(params=ocp.args.StandardRestore(abstract))
        return checkpoints.restore(step, args=items).params, step
