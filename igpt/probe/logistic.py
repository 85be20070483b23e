"""Multinomial logistic regression on a mesh of devices: L-BFGS over whole data sets, SGD for such as ImageNet.

Both fit several classifiers at once, one for each penalty or learning rate of a list: R of them, which share every pass
over the features. Dims: N examples, D features, C classes.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from igpt.data.batches import EpochOrder
from igpt.loss import cross_entropy
from igpt.sharding import batch_shards, check_batch_size, process_rows, replicate, to_devices

CHUNK = 1 << 12  # rows read and predicted at a time
STEPS_AT_ONCE = 64  # of SGD, between two visits to the host
TOLERANCE = 1e-5  # of the gradient's largest entry; scikit-learn's default is 1e-4


class Scale(NamedTuple):
    """Mean and standard deviation of each feature over the training examples."""

    mean: Float[np.ndarray, "D"]
    std: Float[np.ndarray, "D"]

    @classmethod
    def of(cls, features: Float[np.ndarray, "N D"]) -> "Scale":
        """In one pass over rows that may lie in a file. A feature that never changes is left as it is."""
        total, squares = np.zeros(features.shape[1]), np.zeros(features.shape[1])
        shift = np.asarray(features[0], np.float64)  # keeps the difference of squares exact enough
        for start in range(0, len(features), CHUNK):
            rows = features[start : start + CHUNK].astype(np.float64) - shift
            total += rows.sum(axis=0)
            squares += np.square(rows).sum(axis=0)
        mean = total / len(features)
        std = np.sqrt(np.maximum(squares / len(features) - mean**2, 0.0))
        constant = std <= 1e-6 * np.abs(mean + shift)
        return cls((mean + shift).astype(np.float32), np.where(constant, 1.0, std).astype(np.float32))

    def __call__(self, rows: Float[np.ndarray, "n D"]) -> Float[np.ndarray, "n D"]:
        return np.asarray((rows - self.mean) / self.std)  # of a mapped file's rows: now in memory


class Classifiers(NamedTuple):
    """R linear classifiers of standardised features."""

    kernel: Float[Array, "R D C"]
    bias: Float[Array, "R C"]
    scale: Scale
    converged: Bool[np.ndarray, "R"]

    def predict(self, features: Float[np.ndarray, "N D"]) -> Int[np.ndarray, "R N"]:
        """Classes; -1 for all examples where a classifier is no longer finite."""
        found = []
        for start in range(0, len(features), CHUNK):
            found.append(_predict(self.kernel, self.bias, self.scale(features[start : start + CHUNK])))
        return np.concatenate(jax.device_get(found), axis=1)


@jax.jit
def _predict(kernel, bias, rows):
    classes = jnp.argmax(_logits(kernel, bias, rows), axis=-1)
    finite = jnp.isfinite(kernel).all(axis=(1, 2)) & jnp.isfinite(bias).all(axis=1)
    return jnp.where(finite[:, None], classes, -1)


def _logits(kernel: Float[Array, "R D C"], bias: Float[Array, "R C"], rows: Float[Array, "n D"]):
    # On TPUs a float32 product is made of bfloat16 ones unless more is asked for.
    return jnp.einsum("nd,rdc->rnc", rows, kernel, precision="highest") + bias[:, None]


def fit_lbfgs(
    features: Float[np.ndarray, "N D"],
    labels: Int[np.ndarray, "N"],
    num_classes: int,
    inverse_penalties,
    max_iter: int,
    mesh: Mesh,
) -> Classifiers:
    """scikit-learn's LogisticRegression(C) for each C of `inverse_penalties`, on standardised features.

    The rows are spread over the mesh. Minimises the mean cross-entropy + |kernel|^2 / (2 C N), biases left free. Of
    just two classes scikit-learn keeps one vector, the difference of ours: there its C means twice ours.
    """
    scale, count = Scale.of(features), len(features)
    padded = count + -count % batch_shards(mesh)
    numbers = np.arange(padded)[process_rows(padded, mesh)]
    real = np.minimum(numbers, count - 1)
    weights = np.where(numbers < count, np.float32(1 / count), np.float32(0))
    batch = dict(rows=scale(features[real]), targets=labels[real], weights=weights)
    penalties = np.array([1 / (C * count) for C in inverse_penalties], np.float32)
    with jax.set_mesh(mesh):
        rows, targets, weights = to_devices(batch, padded, mesh).values()
        (kernel, bias), converged = _minimise(rows, targets, weights, penalties, num_classes, max_iter)
    return Classifiers(kernel, bias, scale, np.asarray(converged))


@functools.partial(jax.jit, static_argnames=("num_classes", "max_iter"))
def _minimise(rows, targets, weights, penalties, num_classes, max_iter):
    optimizer = optax.lbfgs(memory_size=10)
    D = rows.shape[1]

    def fit(penalty):
        def objective(params):
            kernel, bias = params
            losses = cross_entropy(_logits(kernel[None], bias[None], rows)[0], targets)
            return jnp.sum(losses * weights) + 0.5 * penalty * jnp.sum(jnp.square(kernel))

        value_and_grad = optax.value_and_grad_from_state(objective)

        def going_on(carry):
            _, state = carry
            gradient = optax.tree.max(jax.tree.map(jnp.abs, optax.tree.get(state, "grad")))
            step = optax.tree.get(state, "count")
            return (step == 0) | ((step < max_iter) & (gradient > TOLERANCE))

        def update(carry):
            params, state = carry
            value, grad = value_and_grad(params, state=state)
            updates, state = optimizer.update(grad, state, params, value=value, grad=grad, value_fn=objective)
            return optax.apply_updates(params, updates), state

        start = (jnp.zeros((D, num_classes)), jnp.zeros(num_classes))
        params, _ = jax.lax.while_loop(going_on, update, (start, optimizer.init(start)))
        gradient = optax.tree.max(jax.tree.map(jnp.abs, jax.grad(objective)(params)))
        return params, gradient

    params, gradient = jax.vmap(fit)(penalties)
    return jax.tree.map(replicate, (params, gradient <= 10 * TOLERANCE))


def fit_sgd(
    features: Float[np.ndarray, "N D"],
    labels: Int[np.ndarray, "N"],
    num_classes: int,
    learning_rates,
    steps: int,
    batch_size: int,
    weight_decay: float,
    seed: int,
    mesh: Mesh,
) -> Classifiers:
    """SGD with momentum 0.9 and a cosine to zero (Chen et al. 2020, section 3.4), for each rate of `learning_rates`.

    Features are standardised, and may lie in a file: a batch at a time is read. Batches are spread over the mesh, and
    each process reads its own rows of them.
    """
    check_batch_size("sgd.batch_size", batch_size, 1, mesh)
    scale, order = Scale.of(features), EpochOrder(len(features), seed)
    rates, D = np.asarray(learning_rates, np.float32), features.shape[1]
    mine = process_rows(batch_size, mesh)

    def zeros():
        return jnp.zeros((len(rates), D, num_classes)), jnp.zeros((len(rates), num_classes))

    # Parameters and momentum; made on the devices, since a process may put nothing onto another's.
    carry = jax.jit(lambda: (zeros(), zeros()), out_shardings=NamedSharding(mesh, P()))()
    with jax.set_mesh(mesh):
        for start in range(0, steps, STEPS_AT_ONCE):
            number = np.arange(start, min(start + STEPS_AT_ONCE, steps))
            indices = order[np.arange(number[0] * batch_size, (number[-1] + 1) * batch_size)]
            indices = indices.reshape(len(number), batch_size)[:, mine]
            wanted, back = np.unique(indices, return_inverse=True)  # a file is read faster in its own order
            rows = scale(features[wanted])[back.reshape(indices.shape)]
            share = np.asarray(0.5 * (1 + np.cos(np.pi * number / steps)), np.float32)
            batches = to_devices({"rows": rows, "labels": labels[indices]}, batch_size, mesh, axis=1)
            carry = _descend(carry, *batches.values(), share, rates, np.float32(weight_decay))
    (kernel, bias), _ = carry
    return Classifiers(kernel, bias, scale, np.isfinite(np.asarray(bias)).all(axis=1))


@functools.partial(jax.jit, donate_argnums=0)
def _descend(carry, rows, targets, share, rates, weight_decay):
    def objective(params, rows, targets):
        kernel, bias = params
        logits = _logits(kernel, bias, rows)
        losses = cross_entropy(logits, jnp.broadcast_to(targets, logits.shape[:-1]))
        return jnp.sum(jnp.mean(losses, axis=1)) + 0.5 * weight_decay * jnp.sum(jnp.square(kernel))

    def step(carry, batch):
        params, momentum = carry
        rows, targets, share = batch
        grads = jax.grad(objective)(params, rows, targets)
        momentum = jax.tree.map(lambda m, g: 0.9 * m + g, momentum, grads)

        def moved(x, m):
            return x - (share * rates).reshape(-1, *[1] * (x.ndim - 1)) * m

        return (jax.tree.map(moved, params, momentum), momentum), None

    return jax.tree.map(replicate, jax.lax.scan(step, carry, (rows, targets, share))[0])
