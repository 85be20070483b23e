"""What the documented classes are given: arrays of any library, checked, then padded to few lengths."""

import jax
import jax.numpy as jnp
import numpy as np

from igpt.api.forward import IGNORED, Cache, Inputs
from igpt.errors import UserError
from igpt.interop.hf_config import ImageGPTConfig


def checked_inputs(
    config: ImageGPTConfig, input_ids, past, mask, types, positions, head_mask, embeds
) -> tuple[Inputs, int, int]:
    """The inputs as arrays, how long they are and how many came before; UserError for what does not fit."""
    if (input_ids is None) == (embeds is None):
        raise UserError("give either input_ids or inputs_embeds, and not both")
    tokens, embeds = as_array("input_ids", input_ids), as_array("inputs_embeds", embeds)
    if tokens is not None:
        tokens = whole_numbers("input_ids", tokens[None] if tokens.ndim == 1 else tokens, config.vocab_size)
    elif embeds.ndim != 3 or embeds.shape[2] != config.n_embd:
        raise UserError(f"inputs_embeds has shape {list(embeds.shape)}; [B, T, {config.n_embd}] is needed")
    batch, length = (embeds if tokens is None else tokens).shape[:2]
    if past is not None and not isinstance(past, Cache):
        raise UserError(f"past_key_values is a {type(past).__name__}; give the past_key_values of an earlier call")
    past_length = 0 if past is None else past.length
    if not 0 < length <= config.n_positions - past_length:
        before = f" after {past_length} that are cached" if past_length else ""
        raise UserError(f"there are {length} inputs{before}; the model has {config.n_positions} positions")

    types, positions, mask = (
        as_array(name, x)
        for name, x in (("token_type_ids", types), ("position_ids", positions), ("attention_mask", mask))
    )
    if types is not None:
        types = whole_numbers("token_type_ids", of_shape("token_type_ids", types, (batch, length)), config.vocab_size)
    if positions is not None:
        positions = positions[None] if positions.ndim == 1 else positions
        positions = of_shape("position_ids", positions, (batch if positions.shape[0] > 1 else 1, length))
        positions = whole_numbers("position_ids", positions, config.n_positions)
    if mask is not None:
        mask = of_shape("attention_mask", mask, (batch, past_length + length))
    if head_mask is not None:
        head_mask = jnp.asarray(as_array("head_mask", head_mask), jnp.float32)
        if head_mask.shape not in ((config.n_head,), (config.n_layer, config.n_head)):
            raise UserError(
                f"head_mask has shape {list(head_mask.shape)}; [{config.n_head}] or "
                f"[{config.n_layer}, {config.n_head}] is needed"
            )
        head_mask = jnp.broadcast_to(head_mask, (config.n_layer, config.n_head))
    return Inputs(tokens, embeds, positions, types, mask, head_mask, None), length, past_length


def as_array(name: str, x):
    """A JAX array as it is, anything else as NumPy; PyTorch's tensors leave their graph and device."""
    if x is None or isinstance(x, jax.Array):
        return x
    if hasattr(x, "detach"):
        x = x.detach().cpu()
    x = np.asarray(x)
    if x.dtype.kind not in "biuf":
        raise UserError(f"{name} is an array of {x.dtype}; numbers are needed")
    return x


def of_shape(name: str, x, shape: tuple[int, ...]):
    if x.shape != shape:
        raise UserError(f"{name} has shape {list(x.shape)}; {list(shape)} is needed")
    return x


def whole_numbers(name: str, x, count: int, also: int | None = None):
    """Whole numbers in 0..count - 1, or `also`; what is being traced cannot be looked at and is trusted."""
    if x.dtype.kind not in "iu":
        raise UserError(f"{name} is an array of {x.dtype}; whole numbers are needed")
    if x.ndim > 2 or 0 in x.shape:
        raise UserError(f"{name} has shape {list(x.shape)}; [B, T] is needed")
    if isinstance(x, jax.core.Tracer):
        return x
    x = np.asarray(x)
    outside = (x < 0) | (x >= count)
    if also is not None:
        outside &= x != also
    if outside.any():
        raise UserError(
            f"{name} has {x[outside][0]}; allowed is 0..{count - 1}" + ("" if also is None else f" or {also}")
        )
    return x.astype(np.int32)


def padded(inputs: Inputs, length: int, capacity: int, labels_by_position: bool) -> Inputs:
    """The sequences padded to `length` on the right, where causality hides it, the mask to the cache's capacity."""

    def pad(x, to, value=0):
        if x is None or x.shape[1] == to:
            return x
        room = [(0, 0), (0, to - x.shape[1])] + [(0, 0)] * (x.ndim - 2)
        pad = jnp.pad if isinstance(x, jax.Array) else np.pad  # NumPy's needs no program for every length
        return pad(x, room, constant_values=value)

    tokens, embeds, positions, types = (
        pad(x, length) for x in (inputs.tokens, inputs.embeds, inputs.positions, inputs.types)
    )
    labels = pad(inputs.labels, length, IGNORED) if labels_by_position else inputs.labels
    return Inputs(tokens, embeds, positions, types, pad(inputs.mask, capacity), inputs.head_mask, labels)
