"""Losses: one number for each image, so that callers can weight images. Pixel losses are in nats per token."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from igpt.model import ModelConfig, pool


def next_pixel(logits: Float[Array, "B T V"], tokens: Int[Array, "B T"]) -> Float[Array, "B"]:
    """Mean negative log-likelihood of an image's tokens (Chen et al. 2020, section 2.1). No token is padding."""
    return jnp.mean(cross_entropy(logits, tokens), axis=-1)


def dropped_pixels(
    logits: Float[Array, "B T V"], tokens: Int[Array, "B T"], keep: Bool[Array, "B T"]
) -> Float[Array, "B"]:
    """BERT's loss: the mean loss over an image's dropped positions (section 2.1), or 0 if no position is dropped."""
    dropped = 1.0 - keep
    return jnp.sum(cross_entropy(logits, tokens) * dropped, axis=-1) / jnp.maximum(jnp.sum(dropped, axis=-1), 1.0)


def cross_entropy(logits: Float[Array, "*B V"], targets: Int[Array, "*B"]) -> Float[Array, "*B"]:
    """-log softmax(logits)[target], in float32."""
    logits = logits.astype(jnp.float32)
    # A masked sum selects the target's logit. XLA fuses this sum; a gather would need a scatter in the backward pass.
    is_target = jax.nn.one_hot(targets, logits.shape[-1], dtype=bool)
    target = jnp.sum(jnp.where(is_target, logits, 0.0), axis=-1)
    return jax.nn.logsumexp(logits, axis=-1) - target


def make_loss(graph: nnx.GraphDef, generative: float = 1.0, classification: float = 0.0) -> Callable:
    """Returns loss(params, batch, key), which maps a batch to a dict of arrays [B].

    "loss" is `generative` x the pixel loss + `classification` x the cross-entropy of the labels (section 2.3). With
    classification, the dict also has both parts and the "accuracy". A part whose weight is 0 is not computed. Without
    SOS, the pixel loss is the mean over the last T - 1 tokens, because no position predicts the first one. A BERT batch
    has M masks for each image, `keep` [B, M, T]. The pixel loss is then the mean over dropped pixels, both losses are
    averaged over the masks, and the masks vote on the class. Dropout is on if there is a key.
    """

    def under_mask(model, batch, keep, key):
        tokens, losses = batch["tokens"], {}
        normed = model.normed(tokens, key, keep)
        if generative:
            first = model.config.first_predicted
            logits, targets = model.logits(normed[:, : tokens.shape[1] - first]), tokens[:, first:]
            pixels = next_pixel(logits, targets) if keep is None else dropped_pixels(logits, targets, keep)
            losses["generative_loss"] = pixels
        if not classification:
            return losses, None
        class_logits = model.class_logits(pool(normed))
        losses["classification_loss"] = cross_entropy(class_logits, batch["label"])
        return losses, jnp.argmax(class_logits, axis=-1)

    def loss(params, batch, key=None):
        model = nnx.merge(graph, params)
        each, classes = zip(*[under_mask(model, batch, keep, key) for keep in masks_of(batch)], strict=True)
        values = {name: sum(losses[name] for losses in each) / len(each) for name in each[0]}
        if not classification:
            return {"loss": generative * values["generative_loss"]}
        values["loss"] = generative * values.get("generative_loss", 0.0)
        values["loss"] += classification * values["classification_loss"]
        values["accuracy"] = (vote(jnp.stack(classes)) == batch["label"]).astype(jnp.float32)
        return values

    return loss


def masks_of(batch: dict) -> list[Bool[Array, "B T"] | None]:
    """The M masks of a BERT batch as a list, or [None] for a batch without masks."""
    return list(jnp.moveaxis(batch["keep"], 1, 0)) if "keep" in batch else [None]


def vote(classes: Int[Array, "M B"]) -> Int[Array, "B"]:
    """The class that most masks chose. If several classes tie, the class among them that the earliest mask chose wins.

    The masks are random, so that ties are broken at random (section 4.6), but independently of the rest of the batch.
    """
    support = jnp.sum(classes[:, None] == classes[None], axis=1)  # [M, B]: how many masks chose the class of each mask
    earliest = jnp.argmax(support, axis=0, keepdims=True)  # argmax returns the first of equal values
    return jnp.take_along_axis(classes, earliest, axis=0)[0]


def bits_per_dim(nats_per_token: float, model: ModelConfig, height: int, width: int, channels: int) -> float:
    """Bits per byte of the image. A palette loses colours, so that only models with the same palette are comparable.

    A token that the model does not predict (the first one, without SOS) counts ln V nats: every colour as likely.
    """
    first = model.first_predicted
    nats = nats_per_token * (model.seq_len - first) + first * np.log(model.vocab_size)
    return nats / (np.log(2) * height * width * channels)


def marginal_entropy(tokens: Int[np.ndarray, "N T"], vocab_size: int) -> float:
    """The mean entropy of the positions' colour histograms, in nats: the loss of the best model without context."""
    counts = np.stack([np.bincount(column, minlength=vocab_size) for column in tokens.T])
    frequency = counts / len(tokens)
    return float(-np.sum(frequency * np.log(np.where(counts > 0, frequency, 1.0))) / tokens.shape[1])


def wilson_interval(correct: int, total: int, z: float = 1.96) -> tuple[float, float]:
    """95 % confidence interval of a proportion (Wilson 1927). Unlike the normal interval, it stays within 0 and 1."""
    share, spread = correct / total, z * z / total
    centre = (share + spread / 2) / (1 + spread)
    half = z * math.sqrt(share * (1 - share) / total + spread / (4 * total)) / (1 + spread)
    return centre - half, centre + half
