"""Adam as the paper uses it (Chen et al. 2020, section 3.3), with the schedule, from the config; and its guard."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int
from ml_collections import ConfigDict

from igpt.errors import UserError
from igpt.sharding import path_of

RECENT = 128  # losses in the guard's ring, which nothing reads: checkpoints of earlier runs contain it


def make_optimizer(optim: ConfigDict, steps: int) -> tuple[optax.GradientTransformationExtraArgs, optax.Schedule]:
    """The guarded optimizer of `steps` updates and its schedule, update number -> learning rate."""
    peak, warmup = optim.learning_rate, min(optim.warmup_steps, steps // 2)
    if not peak > 0:
        raise UserError(f"optim.learning_rate is {peak}; it must be above 0")
    for name in ("b1", "b2"):
        if not 0.0 <= optim[name] < 1.0:
            raise UserError(f"optim.{name} is {optim[name]}; it must lie in [0, 1)")
    match optim.schedule:
        case "cosine":
            decay = optax.cosine_decay_schedule(peak, steps - warmup)
        case "constant":
            decay = optax.constant_schedule(peak)
        case _:
            raise UserError(f"optim.schedule is {optim.schedule!r}; choose cosine or constant")
    # From peak / (warmup + 1): a first update of zero would waste a batch.
    rise = optax.linear_schedule(peak / (warmup + 1), peak, warmup)
    schedule = optax.join_schedules([rise, decay], [warmup]) if warmup else decay

    def is_kernel(params):
        return jax.tree_util.tree_map_with_path(lambda path, _: path_of(path).endswith("kernel"), params)

    adam = optax.adamw(schedule, optim.b1, optim.b2, optim.eps, weight_decay=optim.weight_decay, mask=is_kernel)
    clip = [optax.clip_by_global_norm(optim.clip_norm)] if optim.clip_norm > 0 else []
    return guarded(optax.chain(*clip, adam)), schedule


class GuardState(NamedTuple):
    """The guard's state, which a checkpoint holds beside the moments."""

    inner: Any
    losses: Float[Array, "128"]  # those of the last updates that were not skipped, in a ring
    updates: Int[Array, ""]
    skipped: Int[Array, ""]


def guarded(inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Skips an update, and counts it, if the loss or a gradient is not finite: parameters and moments do not change.

    `update` needs the keyword `loss`.
    """

    def init(params):
        zero = jnp.zeros((), jnp.int32)
        return GuardState(inner.init(params), jnp.zeros(RECENT, jnp.float32), zero, zero)

    def update(grads, state, params=None, *, loss, **_):
        good = jnp.isfinite(loss) & jnp.isfinite(optax.tree.norm(grads))
        updates, inner_state = inner.update(grads, state.inner, params)

        def chosen(new, old):
            return jax.tree.map(lambda new, old: jnp.where(good, new, old), new, old)

        remembered = state.losses.at[state.updates % RECENT].set(loss.astype(jnp.float32))
        return jax.tree.map(lambda leaf: jnp.where(good, leaf, jnp.zeros_like(leaf)), updates), GuardState(
            chosen(inner_state, state.inner),
            jnp.where(good, remembered, state.losses),
            state.updates + good,
            state.skipped + ~good,
        )

    return optax.GradientTransformationExtraArgs(init, update)
