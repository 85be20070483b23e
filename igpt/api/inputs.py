"""Checks the arguments of the documented classes, arrays of any library, and pads them to one of a few lengths."""

import jax
import jax.numpy as jnp
import numpy as np

from igpt.api.forward import IGNORED, Cache, Inputs
from igpt.errors import UserError
from igpt.interop.hf_config import ImageGPTConfig
from igpt.sample import padded_length


def checked_inputs(config: ImageGPTConfig, past, input_ids, embeds, mask, types, positions, head_mask) -> Inputs:
    """Returns the arguments of a call, without labels, as arrays. UserError names an argument that does not fit."""
    if (input_ids is None) == (embeds is None):
        raise UserError("give either input_ids or inputs_embeds, and not both")
    tokens, embeds = as_array("input_ids", input_ids), as_array("inputs_embeds", embeds)
    if tokens is not None:
        tokens = whole_numbers("input_ids", tokens[None] if tokens.ndim == 1 else tokens, config.vocab_size)
    elif embeds.ndim != 3 or embeds.shape[2] != config.n_embd:
        raise UserError(f"inputs_embeds has shape {list(embeds.shape)}; give [B, T, {config.n_embd}]")
    if past is not None and not isinstance(past, Cache):
        raise UserError(f"past_key_values is a {type(past).__name__}; give the past_key_values of an earlier call")
    inputs, past_length = Inputs(tokens, embeds), 0 if past is None else past.length
    (batch, length), room = inputs.shape, config.n_positions - past_length
    if not 0 < length <= room:
        after = f"{config.n_positions} positions, and {past_length} inputs are cached"
        raise UserError(f"there are {length} inputs; the model has {after}: give 1 to {room} inputs")

    types = whole_numbers("token_type_ids", types, config.vocab_size, (batch, length))
    positions = as_array("position_ids", positions)
    if positions is not None:
        positions = positions[None] if positions.ndim == 1 else positions
        rows = batch if positions.shape[0] > 1 else 1
        positions = whole_numbers("position_ids", positions, config.n_positions, (rows, length))
    mask = as_array("attention_mask", mask, (batch, past_length + length))
    if head_mask is not None:
        head_mask = jnp.asarray(as_array("head_mask", head_mask), jnp.float32)
        L, N = config.n_layer, config.n_head
        if head_mask.shape not in ((N,), (L, N)):
            raise UserError(f"head_mask has shape {list(head_mask.shape)}; give [{N}] or [{L}, {N}]")
        head_mask = jnp.broadcast_to(head_mask, (L, N))
    return Inputs(tokens, embeds, positions, types, mask, head_mask)


def checked_prompt(config: ImageGPTConfig, input_ids, mask, max_length, max_new_tokens) -> tuple[np.ndarray, int]:
    """The prompt of `generate`, int32 [B, P], and the length at which to stop. UserError if they do not fit."""
    if input_ids is None:
        input_ids = np.full((1, 1), config.sos_token_id, np.int32)
    prompt = np.asarray(as_array("input_ids", input_ids), np.int32)
    if prompt.ndim != 2 or 0 in prompt.shape:
        raise UserError(f"input_ids has shape {list(prompt.shape)}; give [B, P] with at least one input")
    prompt = whole_numbers("input_ids", prompt, config.vocab_size)
    if mask is not None and not np.all(np.asarray(as_array("attention_mask", mask))):
        raise UserError("attention_mask has zeros, but generate cannot skip inputs; give prompts of one length")
    given = prompt.shape[1]
    most = config.n_positions + 1
    stop = given + max_new_tokens if max_new_tokens is not None else max_length or most
    if not given < stop <= most:
        allowed = f"give a max_length above {given} and at most n_positions + 1, {most}"
        raise UserError(f"the prompt has {given} inputs and would be continued to {stop}; {allowed}")
    return prompt, stop


def as_array(name: str, x, shape: tuple[int, ...] | None = None):
    """Converts `x` to a NumPy array. PyTorch tensors go through the CPU; JAX arrays and None are returned unchanged.

    Raises UserError if the array does not contain numbers, or does not have the given `shape`.
    """
    if x is None:
        return None
    if not isinstance(x, jax.Array):
        x = np.asarray(x.detach().cpu() if hasattr(x, "detach") else x)
        if x.dtype.kind not in "biuf":
            raise UserError(f"{name} is an array of {x.dtype}; give numbers")
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
    if x.ndim > 2 or 0 in x.shape:
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
