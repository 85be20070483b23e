"""Checks the arguments of the documented classes, arrays of any library, and pads them to one of a few lengths."""

import jax
import jax.numpy as jnp
import numpy as np

from igpt.api.forward import IGNORED, Inputs
from igpt.api.outputs import Cache, as_cache, from_torch
from igpt.errors import UserError
from igpt.interop.hf_config import ImageGPTConfig
from igpt.sample import padded_length


def checked_inputs(
    config: ImageGPTConfig, cache, input_ids, embeds, mask, types, positions, head_mask
) -> tuple[Inputs, Cache | None]:
    """Returns the arguments of a call, without labels, as arrays, and the cache.

    One row may be given without its first axis. Raises UserError, which names an argument that does not fit.
    """
    if (input_ids is None) == (embeds is None):
        raise UserError("give either input_ids or inputs_embeds, and not both")
    tokens, embeds = rows("input_ids", input_ids), rows("inputs_embeds", embeds, axes=3)
    if tokens is not None:
        tokens = whole_numbers("input_ids", tokens, config.vocab_size)
    elif embeds.ndim != 3 or embeds.shape[2] != config.n_embd:
        raise UserError(f"inputs_embeds has shape {list(embeds.shape)}; give [B, T, {config.n_embd}]")
    inputs = Inputs(tokens, embeds)
    batch, length = inputs.shape
    head_size = config.n_embd // config.n_head
    cache = as_cache(cache, (config.n_layer, batch, config.n_head, None, head_size))
    past_length = 0 if cache is None else cache.length
    room = config.n_positions - past_length
    if not 0 < length <= room:
        after = f"{config.n_positions} positions, and {past_length} inputs are cached"
        raise UserError(f"there are {length} inputs; the model has {after}: give 1 to {room} inputs")

    types = whole_numbers("token_type_ids", types, config.vocab_size, (batch, length))
    positions = rows("position_ids", positions)
    if positions is not None:
        positions = whole_numbers(
            "position_ids", positions, config.n_positions, (batch if len(positions) > 1 else 1, length)
        )
    mask = checked_mask(mask, (batch, past_length + length))
    if head_mask is not None:
        head_mask = jnp.asarray(as_array("head_mask", head_mask), jnp.float32)
        L, N = config.n_layer, config.n_head
        if head_mask.shape not in ((N,), (L, N)):
            raise UserError(f"head_mask has shape {list(head_mask.shape)}; give [{N}] or [{L}, {N}]")
        head_mask = jnp.broadcast_to(head_mask, (L, N))
    return Inputs(tokens, embeds, positions, types, mask, head_mask), cache


def checked_mask(mask, shape: tuple[int, int]):
    """An attention_mask. UserError if it has numbers other than 0 and 1, such as those that are added to scores."""
    mask = as_array("attention_mask", mask, shape)
    if mask is not None and not isinstance(mask, jax.core.Tracer) and not np.isin(mask, (0, 1)).all():
        raise UserError("attention_mask has other values than 1, which keeps a position, and 0, which hides it")
    return mask


def rows(name: str, x, axes: int = 2):
    """`as_array`, with a first axis in front if x has one axis less than `axes`: a single row."""
    x = as_array(name, x)
    return x[None] if x is not None and x.ndim == axes - 1 else x


def as_array(name: str, x, shape: tuple[int, ...] | None = None):
    """Converts `x` to a NumPy array. PyTorch tensors go through the CPU; JAX arrays and None are returned unchanged.

    An array that lacks the first axis of a `shape` with one row gets it. Raises UserError if the array does not contain
    numbers, or does not have the `shape`.
    """
    if x is None:
        return None
    if not isinstance(x, jax.Array):
        try:
            x = np.asarray(from_torch(x))
        except ValueError:
            raise UserError(f"{name} has rows of different lengths; pad them, and give an attention_mask") from None
        if x.dtype.kind not in "biuf":
            raise UserError(f"{name} is an array of {x.dtype}; give numbers")
    if shape is not None and (1, *x.shape) == shape:
        x = x[None]
    if shape is not None and x.shape != shape:
        raise UserError(f"{name} has shape {list(x.shape)}; give {list(shape)}")
    return x


def whole_numbers(name: str, x, count: int, shape: tuple[int, ...] | None = None, also: int | None = None):
    """`as_array` for integers. All values must be in 0..count - 1, or equal `also`. Traced values are not checked."""
    x = as_array(name, x, shape)
    if x is None:
        return None
    if x.dtype.kind not in "iu":
        raise UserError(f"{name} is an array of {x.dtype}; give whole numbers")
    if x.ndim not in (1, 2) or 0 in x.shape:
        raise UserError(f"{name} has shape {list(x.shape)}; give [B, T]")
    if isinstance(x, jax.core.Tracer):
        return x
    x = np.asarray(x)
    outside = ((x < 0) | (x >= count)) & (x != also)  # if `also` is None, every number differs from it
    if outside.any():
        allowed = f"0..{count - 1}" + ("" if also is None else f" or {also}")
        raise UserError(f"{name} has the value {x[outside][0]}; give {allowed}")
    return x.astype(np.int32)


def padded(inputs: Inputs, past: Cache | None, positions: int, label_positions: bool) -> tuple[Inputs, Cache | None]:
    """Pads the inputs and the cache to powers of two, so that one compiled program serves many lengths.

    Padding is on the right, where the causal mask hides it. `positions` is the model's number of positions. With
    `label_positions`, labels have one column per input and are padded, too.
    """

    def pad(x, to, value=0):
        if x is None or x.shape[1] == to:
            return x
        room = [(0, 0), (0, to - x.shape[1])] + [(0, 0)] * (x.ndim - 2)
        pad = jnp.pad if isinstance(x, jax.Array) else np.pad  # unlike JAX, NumPy needs no compilation for a new length
        return pad(x, room, constant_values=value)

    length = capacity = padded_length(inputs.shape[1], positions)
    if past is not None:
        needed = past.length + length
        past = past.with_room(padded_length(needed, max(needed, positions)))
        capacity = past.keys.shape[3]
    tokens, embeds, places, types = (pad(x, length) for x in inputs[:4])
    labels = pad(inputs.labels, length, IGNORED) if label_positions else inputs.labels
    return Inputs(tokens, embeds, places, types, pad(inputs.mask, capacity), inputs.head_mask, labels), past
