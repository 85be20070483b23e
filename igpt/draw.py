"""Draws the next token of each image from its logits: temperature, top-k, top-p, and keys that belong to an image."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from igpt.errors import UserError
from igpt.fields import LARGEST_SEED

GREEDY = 1e-30  # logits divided by a smaller temperature overflow float32, and draws become NaN
STATIC_RULES = ("greedy", "top_k", "top_p")  # what `Sampling.rules` holds after the temperature
TINY = float(jnp.finfo(jnp.float32).tiny)


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How to draw a token from logits. top_k 0 and top_p 1 keep all tokens; temperature 0 takes the likeliest token.

    Temperatures below GREEDY count as 0.
    """

    temperature: float = 1.0
    top_k: int | float = 0
    top_p: float = 1.0

    def __post_init__(self):
        if not (self.temperature >= 0.0 and np.isfinite(self.temperature)):
            raise UserError(f"temperature is {self.temperature}; it must be 0 (greedy) or more")
        if not (self.top_k >= 0 and self.top_k % 1 == 0):
            raise UserError(f"top_k is {self.top_k}; give the number of tokens to keep, or 0 for all")
        if not 0.0 < self.top_p <= 1.0:
            raise UserError(f"top_p is {self.top_p}; it must be above 0 and at most 1 (all)")

    @property
    def greedy(self) -> bool:
        return self.temperature < GREEDY

    def rules(self, vocab_size: int) -> tuple:
        """The arguments of `draw_tokens`. A change of all but the first, STATIC_RULES, compiles another program.

        Therefore every top_k that keeps all tokens becomes 0.
        """
        return self.temperature, self.greedy, int(self.top_k) if self.top_k < vocab_size else 0, self.top_p


def image_keys(seed: int | float, num: int, first: int = 0) -> Array:
    """Random keys for `num` images, numbered from `first`. Image i depends on the seed and i, but not on its batch.

    Raises UserError unless the seed is in 0..2**32 - 1: JAX would draw the same from seeds that differ by 2**32.
    """
    if not 0 <= seed <= LARGEST_SEED or seed != int(seed):
        raise UserError(f"seed is {seed}; it must be a whole number from 0 to {LARGEST_SEED}")
    return jax.vmap(functools.partial(jax.random.fold_in, jax.random.key(int(seed))))(first + jnp.arange(num))


def draw_tokens(keys, temperature, greedy: bool, top_k: int, top_p: float, logits, position) -> Int[Array, "B"]:
    """Draws a token for each image: a function of its logits, its key and the position."""
    if greedy:
        return jnp.argmax(logits, axis=-1)
    position_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, position)
    return jax.vmap(jax.random.categorical)(position_keys, truncate(logits / temperature, top_k, top_p))


def truncate(logits: Float[Array, "B V"], top_k: int, top_p: float) -> Float[Array, "B V"]:
    """Keeps the top_k largest logits, then the fewest of them with total probability top_p. Sets the others to -inf.

    Logits that equal the smallest kept logit are kept, too. Top-p is nucleus sampling (Holtzman et al. 2019).
    """
    if 0 < top_k < logits.shape[-1]:
        smallest = jax.lax.platform_dependent(
            logits, cpu=lambda x: kth_largest(x, top_k), default=lambda x: jax.lax.top_k(x, top_k)[0][:, -1:]
        )
        logits = jnp.where(logits < smallest, -jnp.inf, logits)
    if top_p < 1.0:
        descending = jnp.flip(jnp.sort(logits, axis=-1), axis=-1)
        probability = jax.nn.softmax(descending, axis=-1)
        before = jnp.cumsum(probability, axis=-1) - probability  # total probability of likelier tokens
        kept = before < max(top_p, TINY)  # the likeliest token stays: smaller numbers are 0 in float32
        smallest = jnp.min(jnp.where(kept, descending, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits < smallest, -jnp.inf, logits)
    return logits


def kth_largest(x: Float[Array, "B V"], k: int) -> Float[Array, "B 1"]:
    """The k-th largest number of each row, found bit by bit. XLA's top_k sorts on CPUs, and takes ten times as long."""
    bits = jax.lax.bitcast_convert_type(x, jnp.int32)
    ordered = jnp.where(bits < 0, bits ^ jnp.int32(2**31 - 1), bits)  # integers in the order of the floats

    def add_bit(i, found):  # the largest integer so far that k numbers of the row reach
        higher = found ^ (jnp.int32(1) << (31 - i))  # bit 31, the sign, is set in the smallest integer: it is cleared
        enough = jnp.sum(ordered >= higher, axis=-1, keepdims=True) >= k
        return jnp.where(enough, higher, found)

    found = jax.lax.fori_loop(0, 32, add_bit, jnp.full_like(ordered[:, :1], -(2**31)))
    return jax.lax.bitcast_convert_type(jnp.where(found < 0, found ^ jnp.int32(2**31 - 1), found), x.dtype)
