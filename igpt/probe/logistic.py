"""Multinomial logistic regression on a mesh of devices: L-BFGS for data sets that fit the devices, SGD for larger ones.

Both fit R classifiers at once, one for each penalty or learning rate, so that one pass over the features serves all
classifiers. Dims: N examples, D features, C classes.
"""

import functools
import operator
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int
from threadpoolctl import threadpool_limits

from igpt.data.batches import EpochOrder
from igpt.loss import cross_entropy
from igpt.probe.config import SGD
from igpt.sharding import batch_shards, check_batch_size, process_rows, replicate, to_devices

ROWS_AT_ONCE = 1 << 12  # rows that are read from a file, or predicted, at a time
STEPS_AT_ONCE = 64  # steps of SGD in one jitted call
TOLERANCE = 1e-5  # L-BFGS stops when no gradient entry is larger; scikit-learn's default: 1e-4


class Scale(NamedTuple):
    """Mean and standard deviation of each feature over the training examples."""

    mean: Float[np.ndarray, "D"]
    std: Float[np.ndarray, "D"]

    @classmethod
    def of(cls, features: Float[np.ndarray, "N D"]) -> "Scale":
        """Computes each feature's mean and std in one pass over memory or a file. A constant's std is set to 1."""
        total, squares = np.zeros(features.shape[1]), np.zeros(features.shape[1])
        shift = np.asarray(features[0], np.float64)  # subtracted first, so that E[x^2] - E[x]^2 is accurate
        for start in range(0, len(features), ROWS_AT_ONCE):
            rows = features[start : start + ROWS_AT_ONCE].astype(np.float64) - shift
            total += rows.sum(axis=0)
            squares += np.square(rows).sum(axis=0)
        mean = total / len(features)
        std = np.sqrt(np.maximum(squares / len(features) - mean**2, 0.0))
        constant = std <= 1e-6 * np.abs(mean + shift)
        return cls((mean + shift).astype(np.float32), np.where(constant, 1.0, std).astype(np.float32))

    def __call__(self, rows: Float[np.ndarray, "*n D"]) -> Float[np.ndarray, "*n D"]:
        return np.asarray((rows - self.mean) / self.std)  # asarray turns rows of a memory map into a plain array


class Classifiers(NamedTuple):
    """R linear classifiers for standardised features."""

    kernel: Float[Array | np.ndarray, "R D C"]  # on the devices, or on the host
    bias: Float[Array | np.ndarray, "R C"]
    scale: Scale
    converged: Bool[np.ndarray, "R"]  # of SGD: whether the parameters are finite

    def predict(self, features: Float[np.ndarray, "N D"]) -> Int[np.ndarray, "R N"]:
        """Predicts the class of each example. A classifier with parameters that are not finite always predicts -1."""
        chunks = (features[start : start + ROWS_AT_ONCE] for start in range(0, len(features), ROWS_AT_ONCE))
        predict = _predict if isinstance(self.kernel, jax.Array) else _predict_on_host
        classes = [predict(self.kernel, self.bias, self.scale(rows)) for rows in chunks]
        return np.concatenate(jax.device_get(classes), axis=1)


@jax.jit
def _predict(kernel, bias, rows):
    classes = jnp.argmax(_logits(kernel, bias, rows), axis=-1)
    return jnp.where(finite((kernel, bias))[:, None], classes, -1)


def _predict_on_host(kernel, bias, rows):
    """`_predict` without a compilation."""
    with threadpool_limits(1, "blas"):
        classes = np.argmax(rows @ kernel + bias[:, None], axis=-1)
    return np.where(finite((kernel, bias))[:, None], classes, -1)


def finite(params: tuple[Array | np.ndarray, ...]) -> Bool[Array | np.ndarray, "R"]:
    """Whether all parameters of each of R classifiers are finite. Arrays of NumPy stay on the host."""
    return functools.reduce(operator.and_, ((abs(x) < np.inf).reshape(len(x), -1).all(axis=1) for x in params))


def _logits(kernel: Float[Array, "R D C"], bias: Float[Array, "R C"], rows: Float[Array, "n D"]):
    # Without "highest", a TPU rounds the factors of a float32 product to bfloat16.
    return jnp.einsum("nd,rdc->rnc", rows, kernel, precision="highest") + bias[:, None]


def fit_lbfgs(
    features: Float[np.ndarray, "N D"], labels: Int[np.ndarray, "N"], num_classes: int, Cs, max_iter: int, mesh: Mesh
) -> Classifiers:
    """Fits what scikit-learn's LogisticRegression(C) fits, for each C of `Cs`, on standardised features.

    The rows are sharded over the mesh. Minimises mean cross-entropy + |kernel|^2 / (2 C N); biases have no penalty. For
    two classes, scikit-learn fits only the difference of our two vectors, so its C corresponds to C / 2 here.
    """
    scale, count = Scale.of(features), len(features)
    padded = count + -count % batch_shards(mesh)
    numbers = np.arange(padded)[process_rows(padded, mesh)]
    real = np.minimum(numbers, count - 1)
    weights = np.where(numbers < count, np.float32(1 / count), np.float32(0))
    batch = dict(rows=scale(features[real]), targets=labels[real], weights=weights)
    penalties = np.array([1 / (C * count) for C in Cs], np.float32)
    with jax.set_mesh(mesh):
        rows, targets, weights = to_devices(batch, padded, mesh).values()
        (kernel, bias), converged = _minimise(rows, targets, weights, penalties, num_classes, max_iter)
    return Classifiers(kernel, bias, scale, np.asarray(converged))


@functools.partial(jax.jit, static_argnames=("num_classes", "max_iter"))
def _minimise(rows, targets, weights, penalties, num_classes, max_iter):
    optimizer = optax.lbfgs(memory_size=10)

    def fit(penalty):
        def objective(params):
            kernel, bias = params
            losses = cross_entropy(_logits(kernel[None], bias[None], rows)[0], targets)
            return jnp.sum(losses * weights) + 0.5 * penalty * jnp.sum(jnp.square(kernel))

        value_and_grad = optax.value_and_grad_from_state(objective)

        def unfinished(carry):
            step, gradient = (optax.tree.get(carry[1], name) for name in ("count", "grad"))
            largest = optax.tree.max(jax.tree.map(jnp.abs, gradient))
            return (step == 0) | ((step < max_iter) & (largest > TOLERANCE))

        def update(carry):
            params, state = carry
            value, grad = value_and_grad(params, state=state)
            updates, state = optimizer.update(grad, state, params, value=value, grad=grad, value_fn=objective)
            return optax.apply_updates(params, updates), state

        start = (jnp.zeros((rows.shape[1], num_classes)), jnp.zeros(num_classes))
        params, _ = jax.lax.while_loop(unfinished, update, (start, optimizer.init(start)))
        return params, optax.tree.max(jax.tree.map(jnp.abs, jax.grad(objective)(params)))

    params, largest = jax.vmap(fit)(penalties)
    return jax.tree.map(replicate, (params, largest <= 10 * TOLERANCE))


def fit_sgd(
    features: Float[np.ndarray, "N D"], labels: Int[np.ndarray, "N"], num_classes: int, sgd: SGD, seed: int, mesh: Mesh
) -> Classifiers:
    """SGD with momentum 0.9 and cosine decay to 0 (Chen et al. 2020, section 3.4), for each of `sgd.learning_rates`.

    Features are standardised. They may be in a file: STEPS_AT_ONCE batches are in memory at a time. Batches are sharded
    over the mesh, and each process reads its own rows of them.
    """
    check_batch_size("sgd.batch_size", sgd.batch_size, 1, mesh)
    scale, rates = Scale.of(features), np.asarray(sgd.learning_rates, np.float32)
    shapes = (len(rates), features.shape[1], num_classes), (len(rates), num_classes)
    # Parameters and momentum, from a jitted function: a process cannot copy arrays to devices of another process.
    zeros = jax.jit(lambda: tuple(map(jnp.zeros, shapes)), out_shardings=NamedSharding(mesh, P()))
    carry = zeros(), zeros()
    with jax.set_mesh(mesh):
        for batches in several_batches(features, labels, scale, sgd, seed, mesh, STEPS_AT_ONCE):
            carry = _descend(carry, *batches, rates, np.float32(sgd.weight_decay))
    params, _ = carry
    return Classifiers(*params, scale, finite(jax.device_get(params)))


def several_batches(features, labels, scale, settings: SGD, seed: int, mesh: Mesh, at_once: int) -> Iterator[tuple]:
    """Yields the batches of `at_once` steps: scaled rows [steps, n, ...], labels [steps, n], and a cosine [steps].

    The rows and labels are on the devices. The cosine falls from 1 to 0, and multiplies the learning rate.
    """
    order, mine = EpochOrder(len(features), seed), process_rows(settings.batch_size, mesh)
    for start in range(0, settings.steps, at_once):
        numbers = np.arange(start, min(start + at_once, settings.steps))
        indices = order[np.arange(numbers[0] * settings.batch_size, (numbers[-1] + 1) * settings.batch_size)]
        indices = indices.reshape(len(numbers), settings.batch_size)[:, mine]
        wanted, back = np.unique(indices, return_inverse=True)  # sorted: reading a file in its own order is faster
        rows = scale(features[wanted])[back.reshape(indices.shape)]
        decay = np.asarray(0.5 * (1 + np.cos(np.pi * numbers / settings.steps)), np.float32)
        batches = to_devices({"rows": rows, "labels": labels[indices]}, settings.batch_size, mesh, axis=1)
        yield *batches.values(), decay


@functools.partial(jax.jit, donate_argnums=0)
def _descend(carry, rows, targets, decay, rates, weight_decay):
    """Runs a step of SGD for each batch of `rows` [steps, n, D]. `decay` [steps] multiplies the R learning `rates`."""

    def objective(params, rows, targets):
        kernel, bias = params
        logits = _logits(kernel, bias, rows)
        losses = cross_entropy(logits, jnp.broadcast_to(targets, logits.shape[:-1]))
        return jnp.sum(jnp.mean(losses, axis=1)) + 0.5 * weight_decay * jnp.sum(jnp.square(kernel))

    def step(carry, batch):
        params, momentum = carry
        rows, targets, decay = batch
        grads = jax.grad(objective)(params, rows, targets)
        momentum = jax.tree.map(lambda m, g: 0.9 * m + g, momentum, grads)
        rate = decay * rates  # [R]
        params = jax.tree.map(lambda x, m: x - rate.reshape(-1, *[1] * (x.ndim - 1)) * m, params, momentum)
        return (params, momentum), None

    return jax.tree.map(replicate, jax.lax.scan(step, carry, (rows, targets, decay))[0])
