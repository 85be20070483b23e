"""Activations of the mlp. The paper uses quick_gelu; Hugging Face's configurations may name any of the others.

Source of the names and formulas: transformers 5.24, activations.py.
"""

import functools

import jax
import jax.numpy as jnp

ACTIVATIONS = {
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),  # `gelu2` in OpenAI's src/model.py
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_10": lambda x: jnp.clip(jax.nn.gelu(x, approximate=False), -10, 10),
    "gelu_new": functools.partial(jax.nn.gelu, approximate=True),
    "hardswish": jax.nn.hard_swish,
    "laplace": lambda x: 0.5 * (1 + jax.scipy.special.erf((x - 0.707107) / (0.282095 * 2**0.5))),
    "leaky_relu": jax.nn.leaky_relu,
    "linear": lambda x: x,
    "mish": jax.nn.mish,
    "relu": jax.nn.relu,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
    "relu6": jax.nn.relu6,
    "sigmoid": jax.nn.sigmoid,
    "silu": jax.nn.silu,
    "sqrtsoftplus": lambda x: jnp.sqrt(jax.nn.softplus(x)),
    "tanh": jnp.tanh,
}
