"""The forward pass of the documented classes: our network with Hugging Face's inputs, masks, cache and outputs.

Where transformers departs from the paper, this file follows transformers 5.24 (models/imagegpt/modeling_imagegpt.py).
No start of sequence is added. Hidden states are the inputs of the blocks, before their norm, and the final normed
output. Padding is masked by adding the smallest float32 to its scores.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from igpt.layers import dropout
from igpt.loss import cross_entropy
from igpt.model import ImageGPT
from igpt.sharding import replicate, shard_batch

IGNORED = -100  # targets with this label do not count in the loss
SMALLEST = jnp.finfo(jnp.float32).min


class Inputs(NamedTuple):
    """The arrays of one call. An argument that the caller did not give is None."""

    tokens: Int[Array, "B T"] | None = None
    embeds: Float[Array, "B T D"] | None = None
    positions: Int[Array, "B T"] | None = None
    types: Int[Array, "B T"] | None = None
    mask: Int[Array, "B C"] | None = None  # for the cache and the inputs; 0 hides a position
    head_mask: Float[Array, "L N"] | None = None
    labels: Array | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """Batch size and number of positions."""
        return (self.embeds if self.tokens is None else self.tokens).shape[:2]


class Options(NamedTuple):
    """Which outputs a call returns besides its main one, and which loss it computes."""

    cache: bool
    hidden_states: bool
    attentions: bool
    tied_head: bool
    problem: str  # "next_token", or a problem_type of Hugging Face's configuration


@functools.partial(jax.jit, static_argnames=("graph", "options"))
def forward(graph, params, inputs: Inputs, past, past_length, length, options: Options, key) -> dict:
    """Computes the outputs that `options` requests, by name. With a PRNG key, dropout is on.

    Only the first `length` positions of `inputs` and the first `past_length` of `past` are real, the rest is padding.
    Both lengths are traced values, not shapes, so that one program serves many lengths.
    """
    model = nnx.merge(graph, params)
    config = model.config
    embedding_key, blocks_key = (None, None) if key is None else jax.random.split(key)
    x = dropout(_embed(model, inputs, past_length), config.embedding_dropout, embedding_key)

    needs_weights = options.attentions or (key is not None and config.attention_dropout > 0.0)
    if past is None and inputs.mask is None and inputs.head_mask is None and not needs_weights:
        x, outputs = model.run_blocks(x, blocks_key)
        keys, values, weights = jnp.swapaxes(outputs.keys, 2, 3), jnp.swapaxes(outputs.values, 2, 3), None
    else:
        attend = functools.partial(_attend, config.attention_dropout, inputs.mask, past_length)
        x, outputs = model.run_blocks(x, blocks_key, attend, (past, inputs.head_mask))
        keys, values, weights = outputs.extra

    normed = model.final_norm(x)
    results = {
        "last_hidden_state": normed,
        "past": (keys, values) if options.cache else None,
        "hidden_states": (*outputs.inputs, normed) if options.hidden_states else None,
        "attentions": tuple(weights) if options.attentions else None,
    }
    if options.tied_head:
        table = model.token_table[...].astype(normed.dtype)
        results["logits"] = jnp.einsum("btd,vd->btv", normed, table, preferred_element_type=jnp.float32)
    elif config.pixel_head:
        results["logits"] = model.logits(normed)
    elif config.num_classes:
        real = (jnp.arange(normed.shape[1]) < length)[:, None]
        pooled = jnp.sum(jnp.where(real, normed.astype(jnp.float32), 0.0), axis=1) / length
        results["logits"] = model.class_logits(pooled)
    if inputs.labels is not None:
        results["loss"] = loss(results["logits"], inputs.labels, options.problem)
    return results


def _embed(model: ImageGPT, inputs: Inputs, past_length) -> Float[Array, "B T D"]:
    tokens, positions = replicate(model.token_table[...]), replicate(model.position_table[...])
    x = tokens[inputs.tokens] if inputs.embeds is None else inputs.embeds
    where = past_length + jnp.arange(x.shape[1])[None] if inputs.positions is None else inputs.positions
    x = x + jnp.take(positions, where, axis=0, mode="clip")  # padding may have positions beyond the table
    if inputs.types is not None:  # as in transformers, types are looked up in the token table
        x = x + tokens[inputs.types]
    return shard_batch(x.astype(model.config.dtype))


def _attend(rate, mask, past_length, q, k, v, key, of_layer):
    """Attention that materialises its weights, in the form that `ImageGPT.run_blocks` expects.

    Returns the mixed values [B, T, N, K], and (keys, values, weights) over the cache and the inputs.
    """
    past, head_mask = of_layer
    keys, values = jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2)
    if past is not None:
        keys, values = (
            jax.lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), past_length, axis=2)
            for old, new in zip(past, (keys, values), strict=True)
        )
    scores = jnp.einsum("btnk,bnck->bntc", q, keys, preferred_element_type=jnp.float32) / jnp.sqrt(q.shape[-1])
    source, query = jnp.arange(keys.shape[2])[None], past_length + jnp.arange(q.shape[1])[:, None]
    # The causal mask also hides padding and free room of the cache, because both come after every real query.
    scores = jnp.where(source <= query, scores, SMALLEST)
    if mask is not None:
        scores = scores + jnp.where(mask[:, None, None, :] == 0, SMALLEST, 0.0)
    weights = dropout(jax.nn.softmax(scores, axis=-1), rate, key)
    if head_mask is not None:
        weights = weights * head_mask[None, :, None, None]
    return jnp.einsum("bntc,bnck->btnk", weights.astype(values.dtype), values), (keys, values, weights)


def loss(logits: Float[Array, "B *T V"], labels: Array, problem: str) -> Float[Array, ""]:
    """The mean loss, as in transformers. For next tokens, the logits at position i are compared with labels[:, i + 1].

    Labels are Int [B, T] for next tokens, Int [B] for a single label, and Float [B] or [B, C] for the other problems.
    """
    if problem == "regression":
        return jnp.mean(jnp.square(logits - labels.reshape(logits.shape)))
    if problem == "multi_label_classification":
        return jnp.mean(jnp.logaddexp(0.0, logits) - labels.reshape(logits.shape) * logits)
    if problem == "next_token":
        logits, labels = logits[:, :-1], labels[:, 1:]
    counts = labels != IGNORED  # if no label counts, the mean is NaN, as in PyTorch
    return jnp.sum(jnp.where(counts, cross_entropy(logits, labels), 0.0)) / jnp.sum(counts)
