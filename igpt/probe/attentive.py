"""Attentive probes: a learnt query decides how much each position counts, instead of the mean over all positions.

El-Nouby et al. 2024 (arXiv 2401.08541) probe with attention whose only query is learnt. With one query, the product of
query and key matrix is a single vector, and so is each column of value matrix times classifier. These vectors are what
is fitted here: the same functions, with fewer parameters. Dims: N examples, T positions, D width, H queries, C classes,
R classifiers, one for each learning rate.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from igpt.loss import cross_entropy
from igpt.probe.config import AdamW
from igpt.probe.logistic import Scale, finite, several_batches
from igpt.sharding import check_batch_size, replicate

NUMBERS_AT_ONCE = 1 << 25  # features in memory at a time: 128 MiB
QUERY_STD = 0.1  # of initial queries: nearly the mean, but no two queries are equal


class Pooler(NamedTuple):
    """The parameters of R classifiers."""

    query: Float[Array, "R H D"]
    kernel: Float[Array, "R H D C"]
    bias: Float[Array, "R C"]


class AttentiveClassifiers(NamedTuple):
    """R classifiers that pool standardised features by attention."""

    params: Pooler
    scale: Scale
    converged: Bool[np.ndarray, "R"]  # whether the parameters are finite

    def predict(self, features: Float[np.ndarray, "N TD"]) -> Int[np.ndarray, "R N"]:
        """Predicts the class of each example. A classifier with parameters that are not finite always predicts -1."""
        at_once, scale = max(1, NUMBERS_AT_ONCE // features.shape[1]), by_position(self.scale)
        chunks = (features[start : start + at_once] for start in range(0, len(features), at_once))
        return np.concatenate(jax.device_get([_predict(self.params, scale(rows)) for rows in chunks]), axis=1)


def fit_attentive(
    features: Float[np.ndarray, "N TD"],
    labels: Int[np.ndarray, "N"],
    num_classes: int,
    positions: int,
    queries: int,
    settings: AdamW,
    seed: int,
    mesh: Mesh,
) -> AttentiveClassifiers:
    """AdamW with cosine decay to 0, for each of `settings.learning_rates`. Each row has its `positions` side by side.

    Features are standardised channel by channel, over examples and positions. They may be in a file. Batches are
    sharded over the mesh, and each process reads its own rows of them. Queries begin as small random numbers, the rest
    as 0. The classifier reads weighted means times `gain_of`, which at first are nearly those that a probe of means
    reads.
    """
    check_batch_size("attention.batch_size", settings.batch_size, 1, mesh)
    width, rates = features.shape[1] // positions, np.asarray(settings.learning_rates, np.float32)
    scale, R = Scale.of(features.reshape(-1, width)), len(rates)
    gain, optimizer = gain_of(features, scale), optax.scale_by_adam()

    def start():
        query = QUERY_STD * jax.random.normal(jax.random.key(seed), (queries, width))
        query = jnp.broadcast_to(query, (R, queries, width))
        params = Pooler(query, jnp.zeros((R, queries, width, num_classes)), jnp.zeros((R, num_classes)))
        return params, optimizer.init(params)

    carry = jax.jit(start, out_shardings=NamedSharding(mesh, P()))()
    at_once = max(1, NUMBERS_AT_ONCE // (settings.batch_size * features.shape[1]))
    with jax.set_mesh(mesh):
        for batches in several_batches(features, labels, by_position(scale), settings, seed, mesh, at_once):
            carry = _descend(carry, *batches, rates, np.float32(settings.weight_decay), gain)
    params, _ = carry
    params = _scaled(params, gain)
    return AttentiveClassifiers(params, scale, finite(jax.device_get(params)))


def by_position(scale: Scale):
    """A function that standardises rows [n, T D], and returns them as [n, T, D]."""
    return lambda rows: scale(rows.reshape(len(rows), -1, len(scale.mean)))


def gain_of(features: Float[np.ndarray, "N TD"], scale: Scale) -> Float[np.ndarray, "D"]:
    """What a mean of standardised features over positions is multiplied with, so that its standard deviation is 1.

    Images differ less in their means than positions do. Without this factor, rates that suit a probe of means are too
    small for the classifier (docs/decisions.md).
    """
    width, at_once = len(scale.mean), max(1, NUMBERS_AT_ONCE // features.shape[1])
    chunks = (features[start : start + at_once] for start in range(0, len(features), at_once))
    means = np.concatenate([rows.reshape(len(rows), -1, width).mean(axis=1, dtype=np.float64) for rows in chunks])
    return scale.std / Scale.of(means).std


def logits(params: Pooler, rows: Float[Array, "n T D"]) -> Float[Array, "R n C"]:
    """The class logits of each classifier: linear in the weighted means that its queries take."""
    # Without "highest", a TPU rounds the factors of a float32 product to bfloat16.
    einsum = functools.partial(jnp.einsum, precision="highest")
    weights = jax.nn.softmax(einsum("ntd,rhd->rnht", rows, params.query) / math.sqrt(rows.shape[-1]), axis=-1)
    pooled = einsum("rnht,ntd->rnhd", weights, rows)
    return einsum("rnhd,rhdc->rnc", pooled, params.kernel) + params.bias[:, None]


def _scaled(params: Pooler, gain) -> Pooler:
    """These classifiers for means that are not multiplied with `gain` [D]."""
    return params._replace(kernel=params.kernel * gain[None, None, :, None])


@jax.jit
def _predict(params, rows):
    return jnp.where(finite(params)[:, None], jnp.argmax(logits(params, rows), axis=-1), -1)


def objective(
    params: Pooler, rows: Float[Array, "n T D"], targets: Int[Array, "n"], gain: Float[Array | np.ndarray, "D"]
) -> Float[Array, ""]:
    """The mean cross-entropy, added over the classifiers, which share no parameter."""
    found = logits(_scaled(params, gain), rows)
    return jnp.sum(jnp.mean(cross_entropy(found, jnp.broadcast_to(targets, found.shape[:-1])), axis=1))


@functools.partial(jax.jit, donate_argnums=0)
def _descend(carry, rows, targets, decay, rates, weight_decay, gain):
    """Runs a step of AdamW for each batch of `rows` [steps, n, T, D]. `decay` [steps] multiplies the learning rates."""
    optimizer = optax.scale_by_adam()

    def step(carry, batch):
        params, state = carry
        rows, targets, decay = batch
        updates, state = optimizer.update(jax.grad(objective)(params, rows, targets, gain), state)
        updates = updates._replace(kernel=updates.kernel + weight_decay * params.kernel)
        params = jax.tree.map(lambda x, u: x - (decay * rates).reshape(-1, *[1] * (x.ndim - 1)) * u, params, updates)
        return (params, state), None

    return jax.tree.map(replicate, jax.lax.scan(step, carry, (rows, targets, decay))[0])
