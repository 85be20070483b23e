"""The training state, and the program of a configuration: shapes, shardings, training step and evaluation step.

train.py runs this program. `igpt plan` compiles the same program for devices that this machine does not have.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import AbstractMesh, Mesh

from igpt import vqvae
from igpt.attention import check_dropout
from igpt.compiler import give_back_memory, one_run_options, step_options
from igpt.config import Config
from igpt.loss import bits_per_dim, make_loss
from igpt.model import ImageGPT, ModelConfig
from igpt.optim import make_optimizer
from igpt.sharding import check_batch_size, path_of, shard_batch, shardings, to_devices
from igpt.vqvae import VQConfig


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that an update changes: the number of updates, the parameters (nested dicts) and the optimizer's state."""

    step: Any  # an int32 scalar; jax.tree.map over a state may also put a shape or a sharding here
    params: dict
    opt_state: Any


class TrainProgram(NamedTuple):
    """The program of a configuration on a mesh. No field holds arrays."""

    model: ModelConfig | VQConfig  # each "auto" is already replaced by a choice for the mesh's devices
    graph: nnx.GraphDef
    optimizer: optax.GradientTransformationExtraArgs
    abstract: TrainState  # shapes and shardings instead of arrays
    train_step: Callable  # (state, batch) -> (state, metrics); the old state is donated
    eval_step: Callable  # (params, batch) -> (sums over the batch, number of examples)
    mesh: Mesh
    eval_metrics: Callable  # (means of the evaluation, name of bits per dimension) -> metrics

    def create_state(self, seed: int) -> TrainState:
        """Makes a new state. Each leaf is initialised on the devices that hold it."""
        return create_state(self.model, self.optimizer, self.mesh, seed)

    def compile_ahead(self, train_batch: dict, eval_batch: dict) -> Callable[[], None]:
        """Starts to compile both steps for such batches, in threads. The returned function waits until they are ready.

        JAX then finds the compiled steps in its memory, so that the first call of a step does not compile.
        """
        pool = ThreadPoolExecutor(max_workers=2)
        compiling = [
            pool.submit(_compile, self.train_step, self.abstract, train_batch, self.mesh),
            pool.submit(_compile, self.eval_step, self.abstract.params, eval_batch, self.mesh),
        ]
        pool.shutdown(wait=False)

        def wait():
            for each in compiling:
                each.result()
            give_back_memory()

        return wait


def build_program(config: Config, mesh: Mesh) -> TrainProgram:
    """Builds the program of a training configuration. Raises UserError if the configuration does not fit the mesh."""
    train = config.train
    check_batch_size("train.batch_size", train.batch_size, train.accumulate, mesh)
    return {"igpt": _igpt_program, "vqvae": _vqvae_program}[config.program](config, mesh)


def _igpt_program(config: Config, mesh: Mesh) -> TrainProgram:
    train, data, objective = config.train, config.data, config.objective
    model = config.network(mesh.devices.flat[0], mesh.shape["tensor"])
    check_dropout(model.attention, model.attention_dropout)
    optimizer, schedule = make_optimizer(config.optim, train.steps)
    graph, abstract = abstract_state(model, optimizer, mesh)
    loss = make_loss(graph, objective.generative, objective.classification)
    dropout_seed = config.seed if model.has_dropout else None
    platform = mesh.devices.flat[0].platform
    train_step = make_train_step(loss, optimizer, schedule, abstract, train.accumulate, dropout_seed, platform)

    def eval_metrics(means: dict, bits_name: str) -> dict:
        metrics = {name: float(mean) for name, mean in means.items()}
        if model.causal and objective.generative:
            nats = metrics.get("generative_loss", metrics["loss"])
            metrics[bits_name] = bits_per_dim(nats, model, *data.image_size, data.channels)
        return metrics

    return TrainProgram(model, graph, optimizer, abstract, train_step, make_eval_step(loss), mesh, eval_metrics)


def _vqvae_program(config: Config, mesh: Mesh) -> TrainProgram:
    """The program of a VQ-VAE. Its batches have the bytes of images, [B, H W 3], as tokens."""
    model, size = config.vqvae, config.data.image_size
    around = functools.partial(vqvae.with_codebook, config=model)
    optimizer, schedule = make_optimizer(config.optim, config.train.steps, around)
    graph, abstract = abstract_state(model, optimizer, mesh)

    def passed(params, batch):
        network = nnx.merge(graph, params)
        forward = vqvae.forward(network, batch["tokens"].reshape(-1, *size, 3))
        return vqvae.losses_of(network, forward), forward

    def train_step(state: TrainState, batch: dict):
        def mean_loss(params):
            losses, forward = passed(params, batch)
            means = jax.tree.map(jnp.mean, losses)
            return means["loss"], (means, forward)

        grads, (means, forward) = jax.grad(mean_loss, has_aux=True)(state.params)
        seen = {"latents": forward.latents.reshape(-1, model.code_width), "codes": forward.codes.reshape(-1)}
        seen["key"] = jax.random.fold_in(jax.random.key(config.seed), state.step)
        state, metrics = _updated(state, grads, means, optimizer, schedule, **seen)
        used = {
            "perplexity": vqvae.perplexity(vqvae.shares(seen["codes"], model)),
            "revived": state.opt_state.inner[1].revived,
        }
        return state, metrics | {f"train/{name}": value for name, value in used.items()}

    def eval_metrics(means: dict, bits_name: str) -> dict:
        return vqvae.eval_metrics(means)

    def of_images(params, batch):
        losses, forward = passed(params, batch)
        return losses | {"share": jax.vmap(lambda codes: vqvae.shares(codes.reshape(-1), model))(forward.codes)}

    step = _jitted(train_step, abstract, mesh.devices.flat[0].platform)
    return TrainProgram(model, graph, optimizer, abstract, step, make_eval_step(of_images), mesh, eval_metrics)


def _compile(step: Callable, state: Any, batch: dict, mesh: Mesh) -> None:
    with jax.set_mesh(mesh):
        step.lower(state, batch).compile()


NETWORKS = {ModelConfig: ImageGPT, vqvae.VQConfig: vqvae.VQVAE}


def abstract_state(config: ModelConfig | VQConfig, optimizer: optax.GradientTransformation, mesh: Mesh | AbstractMesh):
    """Returns (graph, abstract TrainState): the shapes and shardings of a new or restored state."""
    graph, params = nnx.split(nnx.eval_shape(lambda: NETWORKS[type(config)](config, nnx.Rngs(0))))
    state = jax.eval_shape(lambda params: _fresh(params, optimizer), nnx.to_pure_dict(params))
    return graph, with_shardings(state, mesh)


def with_shardings(tree, mesh: Mesh | AbstractMesh):
    """The tree of abstract leaves, with the shardings that RULES of igpt/sharding.py give to their paths."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        tree,
        shardings(tree, mesh),
    )


def create_state(
    config: ModelConfig | VQConfig, optimizer: optax.GradientTransformation, mesh: Mesh, seed: int
) -> TrainState:
    """Makes a new state on the devices of the mesh. No device ever holds more than its own shards."""
    _, abstract = abstract_state(config, optimizer, mesh)

    def create():
        return _fresh(nnx.to_pure_dict(nnx.state(NETWORKS[type(config)](config, nnx.Rngs(seed)))), optimizer)

    options = one_run_options(mesh.devices.flat[0].platform)
    placement = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    return jax.jit(create, out_shardings=placement, compiler_options=options)()


def _fresh(params: dict, optimizer: optax.GradientTransformation) -> TrainState:
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))


def make_train_step(
    loss: Callable,
    optimizer: optax.GradientTransformationExtraArgs,
    schedule: optax.Schedule,
    abstract: TrainState,
    accumulate: int = 1,
    dropout_seed: int | None = None,
    platform: str = "",
) -> Callable:
    """Returns the jitted train_step(state, batch) -> (state, metrics). It donates the old state.

    `loss` comes from `igpt.loss.make_loss`. The batch is split into `accumulate` micro-batches, whose gradients are
    averaged. Without a `dropout_seed` there is no dropout. `platform` selects the compiler's options.
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
        return _updated(state, grads, means, optimizer, schedule)

    return _jitted(train_step, abstract, platform)


def _updated(state: TrainState, grads, means: dict, optimizer, schedule, **others) -> tuple[TrainState, dict]:
    """The state after an update, and its metrics. The optimizer also reads `others`."""
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params, loss=means["loss"], **others)
    metrics = {f"train/{name}": mean for name, mean in means.items()} | {
        "train/grad_norm": optax.tree.norm(grads),
        "train/learning_rate": jnp.asarray(schedule(state.opt_state.updates)),
        "train/skipped": opt_state.skipped,
    }
    return TrainState(state.step + 1, optax.apply_updates(state.params, updates), opt_state), metrics


def _jitted(train_step: Callable, abstract: TrainState, platform: str) -> Callable:
    placement = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    options = step_options(platform)
    if platform == "cpu":
        train_step = _moments_last(train_step)
    return jax.jit(train_step, donate_argnums=0, out_shardings=(placement, None), compiler_options=options)


def _moments_last(train_step: Callable) -> Callable:
    """The step with an order: first new parameters, which need the old moments, then new moments in their place.

    XLA's CPU backend has no order of its own here, and copies all moments first. Where devices share a parameter, the
    order costs an all-reduce of one number.
    """

    def after(first, array):  # XLA keeps this product, because it does not know whether `first` is finite
        return array + 0.0 * first[(0,) * first.ndim]

    def ordered(state: TrainState, batch: dict) -> tuple[TrainState, dict]:
        new, metrics = train_step(state, batch)
        params = {path_of(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(new.params)}

        def last(path, leaf):  # a moment is named as its parameter, after names of the optimizer's own
            names = path_of(path).split(".")
            owner = next((name for i in range(len(names)) if (name := ".".join(names[i:])) in params), None)
            return leaf if owner is None else after(params[owner], leaf)

        opt_state = jax.tree_util.tree_map_with_path(last, new.opt_state)
        return dataclasses.replace(new, opt_state=opt_state), metrics

    return ordered


def _averaged(loss_and_grads, params, batch, key, accumulate):
    """The mean of loss_and_grads over the micro-batches, which run one after the other."""

    def micro_batches(x):  # micro-batch i has the rows i, i + A, i + 2A, ..., so that no row changes its device
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
    """Returns the jitted eval_step(params, batch) -> (sums of losses over examples with mask 1, number of them)."""

    def eval_step(params, batch):
        values = loss(params, batch)

        def of_real(value):  # [B], or [B, V] -> [V]
            return jnp.sum(value * jnp.expand_dims(batch["mask"], tuple(range(1, value.ndim))), axis=0)

        return {name: of_real(value) for name, value in values.items()}, jnp.sum(batch["mask"])

    return jax.jit(eval_step)


def run_batches(step: Callable, params: Any, batches: Iterable[dict], batch_size: int, mesh: Mesh) -> Iterator[Any]:
    """Yields step(params, batch) for each host batch, as NumPy arrays. The device runs one batch ahead of the host."""
    waiting = None
    for batch in batches:
        newest = step(params, to_devices(batch, batch_size, mesh))
        if waiting is not None:
            yield jax.device_get(waiting)
        waiting = newest
    if waiting is not None:
        yield jax.device_get(waiting)
