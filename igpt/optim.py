"""Adam and its schedule as in the paper (Chen et al. 2020, section 3.3), Muon, and a guard that skips non-finite steps.

Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/) replaces each matrix of an update by the nearest
one whose singular values are equal. It learns as much as Adam in fewer steps, and keeps one moment instead of two.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int
from optax.contrib import MuonDimensionNumbers, muon

from igpt.errors import UserError
from igpt.fields import check_at_least, check_choice
from igpt.sharding import path_of

# The axes over which a product with a kernel of the blocks sums, and those of its result. Any others count separate
# matrices: layers, and queries, keys and values.
MATRICES = {
    "blocks.qkv.kernel": MuonDimensionNumbers(1, (3, 4)),  # [L, D, 3, N, K]
    "blocks.out.kernel": MuonDimensionNumbers((1, 2), 3),  # [L, N, K, D]
    "blocks.up.kernel": MuonDimensionNumbers(1, 2),  # [L, D, F]
    "blocks.down.kernel": MuonDimensionNumbers(1, 2),  # [L, F, D]
}
# The root mean square of Muon's updates before the learning rate: about that of Adam's, so that both take similar rates
# (Liu et al. 2025, arXiv 2502.16982, section 2.2).
MUON_RMS = 0.2


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """The optimizer's fields and its schedule's. Raises UserError, which names the field, for an impossible value."""

    learning_rate: float
    warmup_steps: int
    schedule: str
    b1: float
    b2: float
    eps: float
    weight_decay: float
    clip_norm: float
    name: str = "adam"

    def __post_init__(self):
        for name in ("learning_rate", "eps"):  # without eps, a gradient of 0 would give 0 / 0
            if not getattr(self, name) > 0:
                raise UserError(f"optim.{name} is {getattr(self, name)}; it must be above 0")
        for name in ("b1", "b2"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise UserError(f"optim.{name} is {getattr(self, name)}; it must lie in [0, 1)")
        check_at_least(self, "optim.", warmup_steps=0, weight_decay=0.0, clip_norm=0.0)
        check_choice(self, "optim.", schedule=("cosine", "constant"), name=("adam", "muon"))


def make_optimizer(
    optim: OptimConfig, steps: int, around: Callable = lambda adam: adam
) -> tuple[optax.GradientTransformationExtraArgs, optax.Schedule]:
    """Returns the guarded optimizer for `steps` updates, and its schedule (update number -> learning rate).

    `around` may wrap Adam in another transformation, inside the guard. With Muon, Adam with Nesterov's momentum
    updates all but MATRICES.
    """
    peak, warmup = optim.learning_rate, min(optim.warmup_steps, steps // 2)
    if optim.schedule == "cosine":
        course = optax.cosine_decay_schedule(peak, steps - warmup)
    else:
        course = optax.constant_schedule(peak)
    # The warmup starts at peak / (warmup + 1), because an update with learning rate 0 would waste a batch.
    rise = optax.linear_schedule(peak / (warmup + 1), peak, warmup)
    schedule = optax.join_schedules([rise, course], [warmup]) if warmup else course

    def is_kernel(params):
        return jax.tree_util.tree_map_with_path(lambda path, _: path_of(path).endswith("kernel"), params)

    def matrices(params):
        return jax.tree_util.tree_map_with_path(lambda path, _: MATRICES.get(path_of(path)), params)

    decay = optim.weight_decay
    if optim.name == "muon":
        of_adam = {"adam_b1": optim.b1, "adam_b2": optim.b2, "eps": optim.eps}
        of_muon = {"muon_weight_dimension_numbers": matrices, "consistent_rms": MUON_RMS}
        chosen = muon(schedule, weight_decay=decay, weight_decay_mask=is_kernel, **of_adam, **of_muon)
    else:
        chosen = optax.adamw(schedule, optim.b1, optim.b2, optim.eps, weight_decay=decay, mask=is_kernel)
    clip = [optax.clip_by_global_norm(optim.clip_norm)] if optim.clip_norm > 0 else []
    return guarded(around(optax.chain(*clip, chosen))), schedule


class GuardState(NamedTuple):
    """The inner optimizer's state, the number of updates made, and the number of updates skipped."""

    inner: Any
    updates: Int[Array, ""]
    skipped: Int[Array, ""]


def guarded(inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Leaves parameters and moments unchanged if the loss or a gradient is not finite.

    `update` needs the keyword `loss`, and gives the others to `inner`. (optax.apply_if_finite applies bad updates after
    many errors; this never does.)
    """
    inner = optax.with_extra_args_support(inner)

    def init(params):
        zero = jnp.zeros((), jnp.int32)
        return GuardState(inner.init(params), zero, zero)

    def update(grads, state, params=None, *, loss, **others):
        good = jnp.isfinite(loss) & jnp.isfinite(optax.tree.norm(grads))
        updates, inner_state = inner.update(grads, state.inner, params, **others)

        def where_good(new, old):
            return jax.tree.map(lambda new, old: jnp.where(good, new, old), new, old)

        updates = where_good(updates, jax.tree.map(jnp.zeros_like, updates))
        return updates, GuardState(where_good(inner_state, state.inner), state.updates + good, state.skipped + ~good)

    return optax.GradientTransformationExtraArgs(init, update)
