"""Checks token ids where they enter, outside jit."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Integer

from igpt.errors import UserError

Tokens = Integer[Array | np.ndarray, "B T"]  # palette ids, 0..V-1


def checked_ids(name: str, ids: Array | np.ndarray, count: int) -> Array | np.ndarray:
    """`ids` as int32, so that the SOS fits, too. Raises UserError unless all are whole numbers in 0..count - 1.

    The values of a traced array, or of one that other processes hold, are unknown, and are not checked.
    """
    if ids.dtype.kind not in "iu":
        raise UserError(f"{name} are {ids.dtype}; ids of palette colours are whole numbers")
    if not isinstance(ids, jax.core.Tracer) and getattr(ids, "is_fully_addressable", True) and ids.size:
        values = np.asarray(ids)  # inside a trace, JAX's own min of a known array would be traced
        least, most = int(values.min()), int(values.max())
        if least < 0 or most >= count:
            raise UserError(f"{name} run from {least} to {most}; this model's ids are 0..{count - 1}")
    return ids.astype(jnp.int32)
