"""Decoding: the network reads one token of each image at a time, beside a cache of all earlier keys and values.

The time of a step is the time to read the parameters and the cache from memory. So kernels lie in memory as the product
reads them, and the cache has room only for the positions of the current segment (igpt/sample.py). Dims: B batch,
T tokens, V palette size, D width, N heads, K head size, and S positions for which the cache has room.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from igpt.attention import attend_to_cache
from igpt.layers import Linear
from igpt.model import Block, ImageGPT
from igpt.sharding import shard_cache

# The products of a block. Its hidden layer is [F, B, T], other than in igpt/model.py: XLA would transpose a copy of it.
EQUATIONS = {"qkv": "btd,dch->btch", "out": "bth,hd->btd", "up": "btd,df->fbt", "down": "fbt,fd->btd"}
HEAD = "btd,dv->btv"
HALVED_FROM = 1 << 18  # numbers in a kernel; for fewer, a second product costs more than it saves


class KVCache(NamedTuple):
    """Keys and values of all positions so far. Each layer has its own array, so that XLA can update it in place."""

    keys: tuple[Float[Array, "B N S K"], ...]
    values: tuple[Float[Array, "B N S K"], ...]


class Decoder(NamedTuple):
    """A network whose products are laid out for one token per image. `decoder_of` makes it, once for all steps."""

    model: ImageGPT
    blocks: list[Block]
    head: Callable


def decoder_of(model: ImageGPT) -> Decoder:
    """Unstacks the blocks, lays kernels out for `decode` and casts them to the compute dtype: once, not per token."""
    graph, stacked = nnx.split(model.blocks)
    blocks = []
    for layer in range(model.config.depth):
        block = nnx.merge(graph, jax.tree.map(lambda leaf, layer=layer: leaf[layer], stacked))
        for name, equation in EQUATIONS.items():
            setattr(block, name, by_rows(getattr(block, name), model.config.dtype, equation))
        blocks.append(block)
    return Decoder(model, blocks, model.head and by_rows(model.head, model.config.dtype, HEAD))


def by_rows(linear: Linear, dtype: str, equation: str) -> Callable[..., Array]:
    """`linear` as a function for few inputs: its kernel is [outputs, inputs], and products are kernel @ inputs.

    On the CPU, XLA multiplies a few vectors by a kernel [inputs, outputs] only after it has copied the kernel into
    another layout. The copy takes longer than the product. It reads a kernel of this layout as it lies in memory. Two
    halves of a large kernel, each an array of its own, are read at the same time. Two threads on one array are slower.
    """
    operands, result = equation.split("->")
    read, given = operands.split(",")
    inputs = "".join(dim for dim in given if dim in read)
    outputs = "".join(dim for dim in given if dim not in read)
    kernel = jnp.einsum(f"{given}->{outputs}{inputs}", linear.kernel[...].astype(dtype).reshape(linear.flat))
    last = len(outputs) - 1
    # On several devices a half would not lie where the other kernels' shards lie.
    one_cpu = jax.default_backend() == "cpu" and jax.sharding.get_abstract_mesh().size <= 1
    parts = jnp.array_split(kernel, 2 if one_cpu and kernel.size >= HALVED_FROM else 1, axis=last)

    def product(x: Array, out_dtype=None) -> Array:
        multiply = functools.partial(jnp.einsum, preferred_element_type=out_dtype)
        y = jnp.concatenate([multiply(f"{outputs}{inputs},{read}->{outputs}bt", part, x) for part in parts], axis=last)
        if linear.bias is not None:
            y = y + jnp.broadcast_to(linear.bias[...].reshape(*y.shape[:-2], 1, 1), y.shape).astype(y.dtype)
        return jnp.einsum(f"{outputs}bt->{result}", y)

    return product


def prefill(model: ImageGPT, inputs: Int[Array, "B P"], given: Array | int) -> tuple[Float[Array, "B V"], KVCache]:
    """Reads the first `given` of P inputs. Returns the logits of the next token, and a cache of P positions.

    The other inputs are padding. The cache has entries for them, too, which `decode` overwrites.
    """
    x, outputs = model.run_blocks(model.embed(inputs))
    last = jax.lax.dynamic_slice_in_dim(x, given - 1, 1, axis=1)
    stacks = (jnp.swapaxes(kv, 2, 3) for kv in (outputs.keys, outputs.values))  # [L, B, N, P, K]
    return model.logits(model.final_norm(last))[:, 0], KVCache(*(tuple(map(shard_cache, stack)) for stack in stacks))


def grow(cache: KVCache, length: int) -> KVCache:
    """The cache with room for `length` positions. It is copied here, and nowhere else."""

    def pad(kv: Float[Array, "B N S K"]) -> Float[Array, "B N length K"]:
        return shard_cache(jnp.pad(kv, [(0, 0), (0, 0), (0, length - kv.shape[2]), (0, 0)]))

    return jax.tree.map(pad, cache)


def decode(
    decoder: Decoder, token: Int[Array, "B"], position: Int[Array, ""], cache: KVCache
) -> tuple[Float[Array, "B V"], KVCache]:
    """Reads one more input, the token at `position`. Returns the next logits and the cache with the token's entries."""
    model, blocks, head = decoder
    x = model.embed(token[:, None], position)
    keys, values = list(cache.keys), list(cache.values)
    for layer, block in enumerate(blocks):

        def attend(q, k, v, _, layer=layer):
            at = (0, 0, position, 0)
            keys[layer] = jax.lax.dynamic_update_slice(keys[layer], jnp.swapaxes(k, 1, 2), at)
            values[layer] = jax.lax.dynamic_update_slice(values[layer], jnp.swapaxes(v, 1, 2), at)
            return attend_to_cache(q[:, 0], keys[layer], values[layer], position)[:, None], None

        x, _ = block(x, layer, attend)
    return head(model.final_norm(x), jnp.float32)[:, 0], KVCache(tuple(keys), tuple(values))
