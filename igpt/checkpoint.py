"""Checkpoints on disk (Orbax: atomic, asynchronous, resharded on restore), and models from a reference.

    WORKDIR/config.json, palette.npy, checkpoints/STEP/{params, optimizer}

Parameters and optimizer are separate items, so that whoever only wants the model never reads the moments.
"""

from pathlib import Path
from typing import NamedTuple

import jax
import orbax.checkpoint as ocp
from flax import nnx
from ml_collections import ConfigDict

from igpt import config as configuration
from igpt.errors import UserError
from igpt.model import ImageGPT, ModelConfig
from igpt.palette import Palette
from igpt.sharding import make_mesh
from igpt.state import TrainState, with_shardings

FOLDER = "checkpoints"


class Pretrained(NamedTuple):
    """A model with all that is needed to use it: its run's configuration and its tokenizer."""

    config: ConfigDict
    model: ImageGPT
    palette: Palette
    step: int = 0


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


def load(ref: str | Path, step: int | None = None) -> Pretrained:
    """The model that `ref` names. A reference is a run directory; nothing outside it is read."""
    workdir = Path(ref)
    if not workdir.is_dir():
        raise UserError(f"there is no run directory {ref}; give the --workdir of a training run")
    config = configuration.load(workdir)
    config.model.attention = "auto"  # what the training machine could do, this one may not
    palette = Palette.load(workdir / "palette.npy")
    check_palette_size(palette, config, workdir / "palette.npy")
    graph, params = nnx.split(nnx.eval_shape(lambda: ImageGPT(configuration.model_config(config), nnx.Rngs(0))))
    local = make_mesh(data=1, devices=jax.local_devices()[:1])
    params, step = restore_params(workdir, with_shardings(nnx.to_pure_dict(params), local), step)
    return Pretrained(config, nnx.merge(graph, params), palette, step)


def check_same_network(ref: str, config: ConfigDict) -> None:
    """Raises UserError unless the run `ref` has a network into which the weights of this one would fit."""
    theirs, ours = (network(configuration.model_config(c)) for c in (configuration.load(Path(ref)), config))
    differing = [f"{name} is {theirs[name]} there, {ours[name]} here" for name in ours if theirs[name] != ours[name]]
    if differing:
        raise UserError(f"init_from={ref} has another network: {'; '.join(differing)}; make the config agree")


def network(model: ModelConfig) -> dict:
    """The fields that fix the parameters' shapes and meaning."""
    names = ("vocab_size", "seq_len", "width", "depth", "num_heads", "mlp_width", "use_bias")
    return {name: getattr(model, name) for name in names}


def check_palette_size(palette: Palette, config: ConfigDict, path) -> None:
    """A model's vocabulary is its palette: they must agree before either is used."""
    if palette.vocab_size != config.palette.colors:
        raise UserError(
            f"{path} has {palette.vocab_size} colours, but palette.colors is {config.palette.colors}; "
            f"set palette.colors={palette.vocab_size} or give a palette of that size"
        )
