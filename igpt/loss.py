"""Losses, in nats per token, one number an image so that any weighting can follow."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


def next_pixel(logits: Float[Array, "B T V"], tokens: Int[Array, "B T"]) -> Float[Array, "B"]:
    """Mean negative log-likelihood of an image's tokens (Chen et al. 2020, section 2.1). Every palette id counts."""
    logits = logits.astype(jnp.float32)
    # A masked sum picks the target's logit: it fuses, where a gather would need a scatter in the backward pass.
    is_target = tokens[..., None] == jnp.arange(logits.shape[-1])
    target = jnp.sum(jnp.where(is_target, logits, 0.0), axis=-1)
    return jnp.mean(jax.nn.logsumexp(logits, axis=-1) - target, axis=-1)


def bits_per_dim(nats_per_token: float, tokens: int, height: int, width: int, channels: int) -> float:
    """Bits for every byte of the image that the tokens stand for (a palette is lossy: compare like with like)."""
    return nats_per_token * tokens / (np.log(2) * height * width * channels)


def marginal_entropy(tokens: Int[np.ndarray, "N T"], vocab_size: int) -> float:
    """Mean over positions of the entropy of that position's own colour histogram, in nats: the best order-0 model."""
    counts = np.stack([np.bincount(column, minlength=vocab_size) for column in tokens.T])
    frequency = counts / len(tokens)
    return float(-np.sum(frequency * np.log(np.where(counts > 0, frequency, 1.0))) / tokens.shape[1])
