"""Reads checkpoints: the state of a run to resume, or its parameters alone. igpt/run/checkpoint.py writes them."""

import jax
import orbax.checkpoint as ocp

from igpt.errors import UserError, first_line
from igpt.files import AnyPath
from igpt.run import checkpoint
from igpt.run.cluster import barrier, broadcast, exists, is_first_process
from igpt.run.digests import damage
from igpt.sharding import path_of
from igpt.state import TrainState


def newest_sound_step(workdir: AnyPath) -> int:
    """The step of the newest undamaged checkpoint, or 0 if the run has saved no checkpoint yet.

    Renames newer, damaged checkpoints. Raises UserError if all checkpoints are damaged.
    """
    checkpoint.settle_replaced(workdir)
    barrier()
    steps = checkpoint.common_steps(workdir)
    for step in reversed(steps):
        reason = damage(checkpoint.folder_of(workdir, step))
        if not reason:
            return step
        if is_first_process():
            number = 1
            while (aside := workdir / f"damaged-{step}-{number}").exists():
                number += 1
            checkpoint.folder_of(workdir, step).rename(aside)
            print(f"the checkpoint of step {step} is damaged ({reason}): moved to {aside}, resuming from an older one")
        barrier()
    if steps or broadcast(any(workdir.glob("damaged-*"))):  # found damaged now, or at an earlier start
        raise UserError(
            f"every checkpoint of {workdir} is damaged, and was moved to {workdir}/damaged-STEP-N; restore one from a "
            "copy, or run with --start_over to train from step 0"
        )
    return 0


def progress_at(workdir: AnyPath, step: int) -> checkpoint.Progress | None:
    """The progress in a checkpoint, or None if the checkpoint has parameters only."""
    if not exists(checkpoint.folder_of(workdir, step) / "progress"):
        return None
    if reason := damage(checkpoint.folder_of(workdir, step), "progress/"):
        raise _damaged(workdir, step, reason)
    with checkpoint.reader(workdir) as checkpoints:
        found = checkpoints.restore(step, args=ocp.args.Composite(progress=ocp.args.JsonRestore())).progress
    try:
        return checkpoint.Progress(**found)
    except TypeError as error:
        problem = f"{checkpoint.folder_of(workdir, step)}/progress was written by another version of igpt: {error}"
        raise UserError(f"{problem}; resume the run with that version") from None


def state(workdir: AnyPath, abstract: TrainState, step: int) -> TrainState:
    """Restores the state after `step` updates with the shardings of `abstract`. Any mesh may have saved the state."""
    optimizer = {"step": abstract.step, "opt_state": abstract.opt_state}
    items = ocp.args.Composite(
        params=ocp.args.StandardRestore(abstract.params),
        # The restore is partial, because earlier versions of igpt also saved the last 128 losses.
        optimizer=ocp.args.PyTreeRestore(
            optimizer, ocp.checkpoint_utils.construct_restore_args(optimizer), partial_restore=True
        ),
    )
    _check_params(workdir, step, abstract.params)
    found = _restored(workdir, step, items)
    return TrainState(found.optimizer["step"], found.params, found.optimizer["opt_state"])


def params(workdir: AnyPath, abstract: dict, step: int | None = None) -> tuple[dict, int]:
    """Restores only the parameters; returns them and their step. Default: fine-tuning's best step, else the newest.

    Raises UserError if the checkpoint is missing or damaged.
    """
    steps = checkpoint.common_steps(workdir)
    if not steps:
        raise UserError(f"{workdir} has no finished checkpoint yet: train first, or name another run directory")
    if step is None:
        progress = progress_at(workdir, steps[-1])
        step = progress.best_step if progress and progress.best_step in steps else steps[-1]
    if step not in steps:
        raise UserError(f"{workdir} has no checkpoint of step {step}; it has {steps}")
    if reason := damage(checkpoint.folder_of(workdir, step), "params/"):
        raise _damaged(workdir, step, reason)
    _check_params(workdir, step, abstract)
    return _restored(workdir, step, ocp.args.Composite(params=ocp.args.StandardRestore(abstract))).params, step


def _check_params(workdir: AnyPath, step: int, abstract: dict) -> None:
    """Raises UserError unless a checkpoint's parameters have the names and shapes of `abstract`. It reads no array.

    If Orbax found the difference, its other reads would go on, fail, and print tracebacks after the message.
    """
    try:
        found = checkpoint.described(checkpoint.folder_of(workdir, step) / "params")
    except Exception as error:  # a checkpoint of parameters only has no digests that would have shown the damage
        raise _damaged(workdir, step, first_line(error)[:300]) from error
    there, here = (
        {path_of(path): list(leaf.shape) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
        for tree in (found, abstract)
    )
    differing = [
        f"{name} is {there.get(name, 'absent')} there, {here.get(name, 'absent')} here"
        for name in sorted(there.keys() | here.keys())
        if there.get(name) != here.get(name)
    ]
    if differing:
        raise _unfit(workdir, step, f"{differing[0]} ({len(differing)} of its arrays differ)")


def _damaged(workdir: AnyPath, step: int, reason: str) -> UserError:
    steps = checkpoint.finished_steps(workdir)
    return UserError(f"the checkpoint of step {step} of {workdir} is damaged ({reason}); there are {steps}")


def _unfit(workdir: AnyPath, step: int, why: str) -> UserError:
    return UserError(
        f"the checkpoint of step {step} of {workdir} does not fit this network: {why}. It may come from another "
        "version of igpt; another run can still start from its weights with init_from"
    )


def _restored(workdir: AnyPath, step: int, items):
    with checkpoint.reader(workdir) as checkpoints:
        try:
            return checkpoints.restore(step, args=items)
        except Exception as error:  # the files are undamaged; the optimizer has other arrays
            raise _unfit(workdir, step, first_line(error)[:300]) from error
