"""What the documented classes return: their outputs, readable as attributes, by name and by index, and the cache."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from igpt.errors import UserError

OLD_NAME = "past_key_values"  # transformers 5.24 calls it cache


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """The documented `cache`. The first `length` of the C positions are filled, the others are free."""

    keys: Float[Array, "L B N C K"]
    values: Float[Array, "L B N C K"]
    length: int = dataclasses.field(metadata=dict(static=True))

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.length

    @property
    def layers(self) -> list["LayerCache"]:
        """The keys and values of each layer, [B, N, length, K]."""
        return list(self)

    def to_legacy_cache(self) -> tuple:
        """A tuple of (keys, values) for each layer, as in transformers 4."""
        return tuple(tuple(layer) for layer in self.layers)

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, layer: int) -> "LayerCache":
        number = range(len(self))[layer]  # raises IndexError, which a JAX array does not
        return LayerCache(*(x[number, :, :, : self.length] for x in (self.keys, self.values)))

    def with_room(self, capacity: int) -> "Cache":
        """Returns this cache, padded to at least `capacity` positions."""
        if capacity <= self.keys.shape[3]:
            return self
        room = [(0, 0), (0, 0), (0, 0), (0, capacity - self.keys.shape[3]), (0, 0)]
        return Cache(jnp.pad(self.keys, room), jnp.pad(self.values, room), self.length)


class LayerCache(NamedTuple):
    keys: Float[Array, "B N P K"]
    values: Float[Array, "B N P K"]


def as_cache(given: Any, shape: tuple) -> Cache | None:
    """The Cache of an earlier call, of a tuple of (keys, values) for each layer, or of a cache of transformers.

    shape: what each of the keys and values must have, [L, B, N, None, K]. An empty cache is None. UserError if it does
    not fit.
    """
    if given is None:
        return None
    if isinstance(given, Cache):
        keys, values, length = given.keys, given.values, given.length
    else:
        layers = getattr(given, "layers", given)
        if not hasattr(layers, "__len__"):
            raise UserError(f"the cache is a {type(given).__name__}; give the cache of an earlier call")
        pairs = [(x.keys, x.values) if hasattr(x, "get_seq_length") else tuple(x) for x in layers]
        if not pairs or all(pair[0] is None for pair in pairs):
            return None
        try:
            keys, values = (jnp.stack([_floats(x) for x in part]) for part in zip(*pairs, strict=True))
        except (TypeError, ValueError):
            allowed = "give the cache of an earlier call, or (keys, values) [B, N, P, K] for each layer"
            raise UserError(f"the cache is a {type(given).__name__} of other things than arrays; {allowed}") from None
        length = keys.shape[3] if keys.ndim == 5 else 0
    wanted = [length if size is None else size for size in shape]
    for x in (keys, values):
        found = list(x.shape)
        if x.ndim != 5 or found[:3] + found[4:] != wanted[:3] + wanted[4:]:
            raise UserError(f"the cache has layers, rows, heads, positions and head size {found}; give {wanted}")
    return Cache(keys, values, length)


def from_torch(x):
    """A PyTorch tensor on the CPU, in a type that NumPy has. Anything else as it is."""
    if not hasattr(x, "detach"):
        return x
    x = x.detach().cpu()
    return x.float() if str(x.dtype) == "torch.bfloat16" else x


def _floats(x) -> Array:
    x = jnp.asarray(np.asarray(from_torch(x)) if hasattr(x, "detach") else x)
    return x if jnp.issubdtype(x.dtype, jnp.floating) else x.astype(jnp.float32)


class Output(Mapping):
    """The base of all outputs: a mapping of the fields that are not None. As attributes, all fields exist."""

    def to_tuple(self) -> tuple:
        return tuple(value for value in vars(self).values() if value is not None)

    def __getitem__(self, key: str | int | slice):
        if not isinstance(key, str):
            return self.to_tuple()[key]
        value = vars(self).get("cache" if key == OLD_NAME else key)
        if value is None:
            raise KeyError(key)
        return value

    def __iter__(self) -> Iterator[str]:
        return (name for name, value in vars(self).items() if value is not None)

    def __len__(self) -> int:
        return len(self.to_tuple())

    @property
    def past_key_values(self) -> Cache | None:
        return self.cache


@jax.tree_util.register_dataclass
@dataclasses.dataclass(eq=False)
class ModelOutput(Output):
    """The outputs of a call. Those that were not requested are None.

    Shapes: loss [], logits [B, T, V] or [B, num_labels], last_hidden_state [B, T, D]. hidden_states is a tuple of
    L + 1 arrays [B, T, D]; attentions is a tuple of L arrays [B, N, T, past + T]. cross_attentions is always None.
    """

    loss: Any = None
    logits: Any = None
    last_hidden_state: Any = None
    cache: Cache | None = None
    hidden_states: tuple | None = None
    attentions: tuple | None = None
    cross_attentions: None = None


@dataclasses.dataclass(eq=False)
class GenerateOutput(Output):
    """The result of `generate` with return_dict_in_generate. Those that were not requested are None.

    sequences: int [B, stop], the prompt and G new tokens. scores, logits: G arrays [B, V] from which the tokens were
    drawn, with and without temperature, top_k and top_p. attentions, hidden_states: for each new token a tuple over
    layers, of arrays [B, N, Q, P] and [B, Q, D]; Q is the length of the prompt for the first and 1 for the others.
    """

    sequences: Any
    scores: tuple | None = None
    logits: tuple | None = None
    attentions: tuple | None = None
    hidden_states: tuple | None = None
    cache: Cache | None = None
