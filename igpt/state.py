"""The training state, its sharded creation, and the pure steps that move it on."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from igpt.model import ImageGPT, ModelConfig
from igpt.sharding import shard_batch, shardings, to_devices


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that an update changes: how many there were, the parameters (nested dicts), the optimizer's moments."""

    step: Any  # an int32 scalar; maps over the tree also put shapes and shardings here
    params: dict
    opt_state: Any


def abstract_state(config: ModelConfig, optimizer: optax.GradientTransformation, mesh: Mesh):
    """(graph, state of shapes with shardings). No array is made: what `create_state` and a restore both follow."""
    graph, params = nnx.split(nnx.eval_shape(lambda: ImageGPT(config, nnx.Rngs(0))))
    state = jax.eval_shape(lambda params: _fresh(params, optimizer), nnx.to_pure_dict(params))
    return graph, with_shardings(state, mesh)


def with_shardings(tree, mesh: Mesh):
    """Abstract leaves, each with the sharding that the rule table gives its path."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        tree,
        shardings(tree, mesh),
    )


def create_state(config: ModelConfig, optimizer: optax.GradientTransformation, mesh: Mesh, seed: int) -> TrainState:
    """A new state, every leaf made on the devices that will hold it."""
    _, abstract = abstract_state(config, optimizer, mesh)

    def create():
        return _fresh(nnx.to_pure_dict(nnx.state(ImageGPT(config, nnx.Rngs(seed)))), optimizer)

    return jax.jit(create, out_shardings=jax.tree.map(lambda leaf: leaf.sharding, abstract))()


def _fresh(params: dict, optimizer: optax.GradientTransformation) -> TrainState:
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))


def make_train_step(
    loss: Callable,
    optimizer: optax.GradientTransformationExtraArgs,
    schedule: optax.Schedule,
    abstract: TrainState,
    accumulate: int = 1,
    dropout_seed: int | None = None,
) -> Callable:
    """train_step(state, batch) -> (state, metrics), jitted; the old state's memory is given to the new one.

    `loss` is one of `igpt.loss.make_loss`. The batch is worked through in `accumulate` micro-batches, their gradients
    averaged. `dropout_seed` None: none.
    """

    def loss_and_grads(params, batch, key):
        def mean_loss(params):
            means = jax.tree.map(jnp.mean, loss(params, batch, key))
            return means["loss"], means

        grads, means = jax.grad(mean_loss, has_aux=True)(params)
        return means, grads

    def train_step(state: TrainState, batch: dict):
        key = None if dropout_seed is None else jax.random.fold_in(jax.random.key(dropout_seed), state.step)
        if accumulate == 1:
            means, grads = loss_and_grads(state.params, batch, key)
        else:
            means, grads = _averaged(loss_and_grads, state.params, batch, key, accumulate)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params, loss=means["loss"])
        metrics = {f"train/{name}": mean for name, mean in means.items()} | {
            "train/grad_norm": optax.tree.norm(grads),
            "train/learning_rate": jnp.asarray(schedule(state.opt_state.updates)),
            "train/skipped": opt_state.skipped,
        }
        return TrainState(state.step + 1, optax.apply_updates(state.params, updates), opt_state), metrics

    placement = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    return jax.jit(train_step, donate_argnums=0, out_shardings=(placement, None))


def _averaged(loss_and_grads, params, batch, key, accumulate):
    def micro_batches(x):  # every device keeps its own rows: micro-batch i is rows i, i + A, i + 2A, ...
        return jnp.swapaxes(x.reshape(-1, accumulate, *x.shape[1:]), 0, 1)

    parts = jax.tree.map(micro_batches, batch)

    def add(total, part):
        index, batch = part
        batch = jax.tree.map(shard_batch, batch)
        one = loss_and_grads(params, batch, None if key is None else jax.random.fold_in(key, index))
        return jax.tree.map(jnp.add, total, one), None

    one = jax.eval_shape(lambda: loss_and_grads(params, jax.tree.map(lambda x: x[0], parts), key))
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), one)
    total, _ = jax.lax.scan(add, zeros, (jnp.arange(accumulate), parts))
    return jax.tree.map(lambda x: x / accumulate, total)


def make_eval_step(loss: Callable) -> Callable:
    """eval_step(params, batch) -> (sums over the unmasked examples of what `loss` gives of each, their number)."""

    def eval_step(params, batch):
        values = loss(params, batch)
        return {name: jnp.sum(value * batch["mask"]) for name, value in values.items()}, jnp.sum(batch["mask"])

    return jax.jit(eval_step)


def run_batches(step: Callable, params: dict, batches: Iterable[dict], batch_size: int, mesh: Mesh) -> Iterator[Any]:
    """Yields step(params, batch) of each host batch, as NumPy arrays. The device works one batch ahead of the host."""
    waiting = None
    for batch in batches:
        newest = step(params, to_devices(batch, batch_size, mesh))
        if waiting is not None:
            yield jax.device_get(waiting)
        waiting = newest
    if waiting is not None:
        yield jax.device_get(waiting)
