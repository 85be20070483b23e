"""Adam as the paper uses it (Chen et al. 2020, section 3.3), with the schedule, from the config."""

import jax
import optax
from ml_collections import ConfigDict

from igpt.errors import UserError
from igpt.sharding import path_of


def make_optimizer(optim: ConfigDict, steps: int) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """The optimizer of `steps` updates and its schedule, update number -> learning rate."""
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
    return optax.chain(*clip, adam), schedule
