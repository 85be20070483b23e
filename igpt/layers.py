"""The layers that the network is built from: norm, product, dropout, and the lookup in a table of vectors.

Dims: B batch, V rows of a table, D width.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int


class Norm(nnx.Module):
    """x / sqrt(mean(x^2) + eps) * gain, with no centring and no shift (OpenAI's src/model.py, `norm`)."""

    def __init__(self, width: int, epsilon: float):
        self.gain = nnx.Param(jnp.ones(width))
        self.epsilon = epsilon

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        wide = x.astype(jnp.float32)  # a mean of squares loses too much precision in bfloat16
        scale = jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.epsilon)
        return (wide * scale * jnp.broadcast_to(self.gain[...], x.shape)).astype(x.dtype)


class Linear(nnx.Module):
    """einsum(equation, x, kernel) + bias. It casts float32 parameters to x's dtype and returns `out_dtype` if given.

    `flat` is the kernel's shape in the product, where N and K are one axis: a last axis of K alone is slow on TPUs. In
    the equation, `...` stands for B and T. On CPUs they are one dimension in the product. On GPUs, queries, keys and
    values (c) are three products: slices of one product would be copied for cuDNN's attention.
    """

    def __init__(
        self,
        equation: str,
        shape: tuple,
        std: float,
        bias_shape: tuple | None,
        rngs: nnx.Rngs,
        flat: tuple | None = None,
        platform: str = "",
    ):
        self.equation, self.flat, self.platform = equation, flat or shape, platform
        self.kernel = nnx.Param(std * jax.random.normal(rngs.params(), shape))
        self.bias = None if bias_shape is None else nnx.Param(jnp.zeros(bias_shape))

    def __call__(self, x: Array, out_dtype=None) -> Array:
        kernel = self.kernel[...].astype(x.dtype).reshape(self.flat)
        rows = x.reshape(-1, x.shape[-1]) if self.platform == "cpu" else x
        product = functools.partial(jnp.einsum, preferred_element_type=out_dtype)
        if self.platform == "gpu" and kernel.ndim == 3:
            one = self.equation.replace("c", "")
            y = jnp.stack([product(one, rows, part) for part in jnp.unstack(kernel, axis=1)], axis=-2)
        else:
            y = product(self.equation, rows, kernel)
        y = y.reshape(*x.shape[:-1], *self.flat[1:])
        if self.bias is not None:
            y = y + jnp.broadcast_to(self.bias[...].reshape(self.flat[1:]), y.shape).astype(y.dtype)
        return y


def dropout(x: Array, rate: float, key: Array | None) -> Array:
    """x with zeros at this rate, and all else divided by 1 - rate. Without a key, x itself."""
    if key is None or rate == 0.0:
        return x
    return jnp.where(jax.random.bernoulli(key, 1.0 - rate, x.shape), x / (1.0 - rate), 0.0)


@jax.custom_vjp
def rows_of(table: Float[Array, "V D"], ids: Int[Array, "*B"]) -> Float[Array, "*B D"]:
    """table[ids], with a gradient whose bits do not change from run to run: a product with a matrix of ones and zeros.

    The usual gradient adds the rows of equal ids in whatever order a GPU's threads reach them.
    """
    return table[ids]


def _rows_of_backward(kept: tuple, d_rows: Array) -> tuple:
    ids, size = kept
    chosen = jax.nn.one_hot(ids.reshape(-1), size, dtype=d_rows.dtype)
    return jnp.einsum("bv,bd->vd", chosen, d_rows.reshape(-1, d_rows.shape[-1])), None


rows_of.defvjp(lambda table, ids: (table[ids], (ids, len(table))), _rows_of_backward)
