"""The forward pass of the documented classes: our network with Hugging Face's inputs, masks, cache and outputs.

Where transformers departs from the paper this follows transformers 5.23 (models/imagegpt/modeling_imagegpt.py): no
start of sequence is added, hidden states come before the norm, padding is masked by adding the smallest float32.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from igpt.model import ImageGPT, dropout
from igpt.sharding import replicate, shard_batch

IGNORED = -100  # a label that the loss passes over
SMALLEST = jnp.finfo(jnp.float32).min


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """The documented `past_key_values`: keys and values of `length` inputs, with room for more behind them."""

    keys: Float[Array, "L B N C K"]
    values: Float[Array, "L B N C K"]
    length: int = dataclasses.field(metadata=dict(static=True))

    def get_seq_length(self) -> int:
        return self.length

    @property
    def layers(self) -> list["LayerCache"]:
        """The keys and values of each layer, [B, N, length, K]."""
        return [LayerCache(*(x[i, :, :, : self.length] for x in (self.keys, self.values))) for i in range(len(self))]

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, layer: int) -> "LayerCache":
        return self.layers[layer]

    def with_room(self, capacity: int) -> "Cache":
        """The same cache, for `capacity` inputs or more."""
        if capacity <= self.keys.shape[3]:
            return self
        room = [(0, 0), (0, 0), (0, 0), (0, capacity - self.keys.shape[3]), (0, 0)]
        return Cache(jnp.pad(self.keys, room), jnp.pad(self.values, room), self.length)


class LayerCache(NamedTuple):
    keys: Float[Array, "B N P K"]
    values: Float[Array, "B N P K"]


class Inputs(NamedTuple):
    """What one call reads; None where nothing was given. All T positions, of which the last may be padding."""

    tokens: Int[Array, "B T"] | None
    embeds: Float[Array, "B T D"] | None
    positions: Int[Array, "B T"] | None
    types: Int[Array, "B T"] | None
    mask: Int[Array, "B C"] | None  # of the cached inputs and these; 0: not to be attended to
    head_mask: Float[Array, "L N"] | None
    labels: Array | None


class Wanted(NamedTuple):
    """What a call is to return besides its main output, and how its loss is meant."""

    cache: bool
    hidden_states: bool
    attentions: bool
    tied_head: bool
    problem: str  # of a classifier with labels


@functools.partial(jax.jit, static_argnames=("graph", "wanted"))
def forward(graph, params, inputs: Inputs, past, past_length, given, wanted: Wanted, key) -> dict:
    """Everything that was asked for, by name. Of the inputs the first `given` count, of `past` the first `past_length`.

    Both are values, not shapes, so that one program serves every length. A key turns dropout on.
    """
    model = nnx.merge(graph, params)
    config = model.config
    embedding_key, blocks_key = (None, None) if key is None else jax.random.split(key)
    x = dropout(_embed(model, inputs, past_length), config.embedding_dropout, embedding_key)

    drops_weights = key is not None and config.attention_dropout > 0.0
    plain = past is None and inputs.mask is None and inputs.head_mask is None
    if plain and not wanted.attentions and not drops_weights:
        x, outputs = model.run_blocks(x, blocks_key)
        keys, values, weights = jnp.swapaxes(outputs.keys, 2, 3), jnp.swapaxes(outputs.values, 2, 3), None
    else:
        attend = functools.partial(_attend, config.attention_dropout, inputs.mask, past_length)
        x, outputs = model.run_blocks(x, blocks_key, attend, (past, inputs.head_mask))
        keys, values, weights = outputs.extra

    normed = model.final_norm(x)
    results = {"last_hidden_state": normed}
    if wanted.cache:
        results["past"] = keys, values
    if wanted.hidden_states:
        results["hidden_states"] = (*outputs.inputs, normed)
    if wanted.attentions:
        results["attentions"] = tuple(weights)
    if wanted.tied_head:
        table = model.token_table[...].astype(normed.dtype)
        results["logits"] = jnp.einsum("btd,vd->btv", normed, table, preferred_element_type=jnp.float32)
    elif config.pixel_head:
        results["logits"] = model.logits(normed)
    elif config.num_classes:
        counts = (jnp.arange(normed.shape[1]) < given)[:, None]
        pooled = jnp.sum(jnp.where(counts, normed.astype(jnp.float32), 0.0), axis=1) / given
        results["logits"] = model.class_logits(pooled)
    if inputs.labels is not None:
        loss = class_loss if config.num_classes else next_token_loss
        results["loss"] = loss(results["logits"], inputs.labels, wanted.problem)
    return results


def _embed(model: ImageGPT, inputs: Inputs, past_length) -> Float[Array, "B T D"]:
    tokens, positions = replicate(model.token_table[...]), replicate(model.position_table[...])
    x = tokens[inputs.tokens] if inputs.embeds is None else inputs.embeds
    where = past_length + jnp.arange(x.shape[1])[None] if inputs.positions is None else inputs.positions
    x = x + jnp.take(positions, where, axis=0, mode="clip")  # padding may lie beyond the last position
    if inputs.types is not None:  # looked up in the token table, as transformers does
        x = x + tokens[inputs.types]
    return shard_batch(x.astype(model.config.dtype))


def _attend(rate, mask, past_length, q, k, v, key, of_layer):
    """Attention with all weights at hand: returns what it mixed, and (keys, values, weights) of cache and inputs."""
    past, head_mask = of_layer
    keys, values = jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2)
    if past is not None:
        keys, values = (
            jax.lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), past_length, axis=2)
            for old, new in zip(past, (keys, values), strict=True)
        )
    scores = jnp.einsum("btnk,bnck->bntc", q, keys, preferred_element_type=jnp.float32) / jnp.sqrt(q.shape[-1])
    source, query = jnp.arange(keys.shape[2])[None], past_length + jnp.arange(q.shape[1])[:, None]
    scores = jnp.where(
        source <= query, scores, SMALLEST
    )  # so too for the padding and the cache's room, which lie behind
    if mask is not None:
        scores = scores + jnp.where(mask[:, None, None, :] == 0, SMALLEST, 0.0)
    weights = jax.nn.softmax(scores, axis=-1)
    weights = dropout(weights, rate, key)
    if head_mask is not None:
        weights = weights * head_mask[None, :, None, None]
    return jnp.einsum("bntc,bnck->btnk", weights.astype(values.dtype), values), (keys, values, weights)


def next_token_loss(logits: Float[Array, "B T V"], labels: Int[Array, "B T"], problem: str) -> Float[Array, ""]:
    """Mean of -log p(labels[:, i + 1]) from the logits at i, over the labels that are not IGNORED; NaN if all are."""
    targets = labels[:, 1:]
    counts = targets != IGNORED
    log_probability = jax.nn.log_softmax(logits[:, :-1])
    chosen = jnp.take_along_axis(log_probability, jnp.where(counts, targets, 0)[..., None], axis=-1)[..., 0]
    return -jnp.sum(jnp.where(counts, chosen, 0.0)) / jnp.sum(counts)


def class_loss(logits: Float[Array, "B C"], labels: Array, problem: str) -> Float[Array, ""]:
    """Cross-entropy; or mean squared error; or, for multi-label, mean binary cross-entropy over images and classes."""
    match problem:
        case "single_label_classification":
            counts = labels != IGNORED
            chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.where(counts, labels, 0)[:, None], axis=-1)
            return -jnp.sum(jnp.where(counts, chosen[:, 0], 0.0)) / jnp.sum(counts)
        case "regression":
            return jnp.mean(jnp.square(logits - labels.reshape(logits.shape)))
        case "multi_label_classification":
            return jnp.mean(jnp.logaddexp(0.0, logits) - labels * logits)
    raise AssertionError(problem)
