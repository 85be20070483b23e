"""Attention in blocks: memory grows with T instead of T x T, and blocks above the causal diagonal are skipped.

FlashAttention without a fused kernel (Dao et al. 2022, 2023): the forward pass keeps a running softmax over blocks of
keys, and the backward pass computes the scores again. Layout: q, k and v are [B, T, N, K].
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

Heads = Float[Array, "B T N K"]  # queries, keys, values or outputs
BLOCK = 256  # number of queries, and of keys, in a block; benchmarks/attention.py compares block sizes
ATTENTION_OUTPUT = "attention"  # checkpoint_name of the arrays that the backward pass needs; see REMAT in igpt/model.py


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def chunked_attention(q: Heads, k: Heads, v: Heads, causal: bool) -> Heads:
    """Softmax attention, computed in blocks of BLOCK queries and BLOCK keys."""
    return _forward(q, k, v, causal)[0]


def _forward(q, k, v, causal):
    q_blocks, k_blocks, v_blocks = map(_blocks, (q, k, v))

    def step(carry, pair):
        out, peak, total = carry  # each query's unnormalised output, largest score, sum of exponentials so far
        i, j = pair
        scores = _block_scores(q_blocks[i], k_blocks[j], i, j, q.shape[1], causal)
        new_peak = jnp.maximum(peak[i], scores.max(axis=-1))
        shrink = jnp.exp(peak[i] - new_peak)
        weights = jnp.exp(scores - new_peak[..., None])
        mixed = jnp.einsum("bnts,bsnk->btnk", weights.astype(v.dtype), v_blocks[j], preferred_element_type=jnp.float32)
        out = out.at[i].set(out[i] * _per_query(shrink) + mixed)
        total = total.at[i].set(total[i] * shrink + weights.sum(axis=-1))
        return (out, peak.at[i].set(new_peak), total), None

    count, batch, size, heads, _ = q_blocks.shape
    per_query = jnp.zeros((count, batch, heads, size), jnp.float32)
    start = (jnp.zeros(q_blocks.shape, jnp.float32), per_query + jnp.finfo(jnp.float32).min, per_query)
    (out, peak, total), _ = jax.lax.scan(step, start, _block_pairs(count, causal))
    out = checkpoint_name(_unblock(out / jax.vmap(_per_query)(total), q.shape[1]).astype(v.dtype), ATTENTION_OUTPUT)
    return out, (q, k, v, out, checkpoint_name(peak + jnp.log(total), ATTENTION_OUTPUT))


def _backward(causal, residuals, d_out):
    q, k, v, out, log_total = residuals
    q_blocks, k_blocks, v_blocks, d_out_blocks = map(_blocks, (q, k, v, d_out))
    # The gradient of the softmax subtracts each query's dot product out . d_out from the gradients of its weights.
    along = _blocks(jnp.sum(d_out.astype(jnp.float32) * out, axis=-1, keepdims=True))[..., 0].swapaxes(2, 3)

    def step(carry, pair):
        d_q, d_k, d_v = carry
        i, j = pair
        weights = jnp.exp(_block_scores(q_blocks[i], k_blocks[j], i, j, q.shape[1], causal) - log_total[i][..., None])
        d_weights = jnp.einsum("btnk,bsnk->bnts", d_out_blocks[i], v_blocks[j], preferred_element_type=jnp.float32)
        d_scores = weights * (d_weights - along[i][..., None]) / jnp.sqrt(q.shape[-1])
        weights, d_scores = weights.astype(q.dtype), d_scores.astype(q.dtype)
        d_q = d_q.at[i].add(jnp.einsum("bnts,bsnk->btnk", d_scores, k_blocks[j], preferred_element_type=jnp.float32))
        d_k = d_k.at[j].add(jnp.einsum("bnts,btnk->bsnk", d_scores, q_blocks[i], preferred_element_type=jnp.float32))
        d_v = d_v.at[j].add(jnp.einsum("bnts,btnk->bsnk", weights, d_out_blocks[i], preferred_element_type=jnp.float32))
        return (d_q, d_k, d_v), None

    zeros = jnp.zeros(q_blocks.shape, jnp.float32)
    gradients, _ = jax.lax.scan(step, (zeros, zeros, zeros), _block_pairs(len(q_blocks), causal))
    return tuple(_unblock(gradient, q.shape[1]).astype(q.dtype) for gradient in gradients)


chunked_attention.defvjp(_forward, _backward)


def _block_pairs(count: int, causal: bool) -> tuple[Array, Array]:
    """Indices (query block, key block) of all block pairs to compute: the lower triangle if attention is causal."""
    pairs = [(i, j) for i in range(count) for j in range(i + 1 if causal else count)]
    return tuple(map(jnp.array, zip(*pairs, strict=True)))


def _block_scores(q, k, i, j, length, causal):
    """Float32 scores of query block i and key block j. Masks the last block's padding and, if causal, later keys."""
    scores = jnp.einsum("btnk,bsnk->bnts", q, k, preferred_element_type=jnp.float32) / jnp.sqrt(q.shape[-1])
    query, key = i * BLOCK + jnp.arange(BLOCK)[:, None], j * BLOCK + jnp.arange(BLOCK)[None]
    visible = (key <= query) & (key < length) if causal else key < length
    return jnp.where(visible, scores, jnp.finfo(jnp.float32).min)


def _blocks(x):
    """[B, T, N, K] -> [T / BLOCK, B, BLOCK, N, K], padded with zeros to whole blocks."""
    batch, length, heads, size = x.shape
    x = jnp.pad(x, [(0, 0), (0, -length % BLOCK), (0, 0), (0, 0)])
    return x.reshape(batch, -1, BLOCK, heads, size).swapaxes(0, 1)


def _unblock(blocks, length):
    """The inverse of `_blocks`."""
    count, batch, size, heads, width = blocks.shape
    return blocks.swapaxes(0, 1).reshape(batch, count * size, heads, width)[:, :length]


def _per_query(x):
    """[B, N, T] -> [B, T, N, 1], so that the result can scale an output [B, T, N, K]."""
    return x.swapaxes(1, 2)[..., None]
