"""Attention in blocks of queries: scores above the causal diagonal's blocks are not computed, and none are kept.

As in FlashAttention (Dao et al. 2022, 2023), the backward pass computes the scores again; but a block of queries meets
all the keys that it may see at once, so that there is no running softmax. Above AT_ONCE blocks, memory grows with T
instead of T x T. Layout: q, k and v are [B, T, N, K].
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

Heads = Float[Array, "B T N K"]  # queries, keys, values or outputs
BLOCK = 256  # number of queries in a block; benchmarks/attention.py compares block sizes
AT_ONCE = 4  # blocks: so many are computed without a loop, which is faster, but XLA stores the scores of all of them
ATTENTION_OUTPUT = "attention"  # checkpoint_name of the arrays that the backward pass needs; see igpt/remat.py


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def chunked_attention(q: Heads, k: Heads, v: Heads, causal: bool) -> Heads:
    """Softmax attention, computed in blocks of BLOCK queries."""
    return _forward(q, k, v, causal)[0]


def _forward(q, k, v, causal):
    keys, values = _by_head(k), _by_head(v)

    def mix(queries, start, seen):
        scores = _product("bntk,bnsk->bnts", queries, keys[:, :, :seen])
        if causal:
            scores = _mask(scores, query_axis=2, start=start)
        peak = scores.max(axis=3, keepdims=True)
        weights = jnp.exp(scores - peak)
        total = weights.sum(axis=3, keepdims=True)
        mixed = _product("bnts,bnsk->bntk", weights.astype(v.dtype), values[:, :, :seen]) / total
        return (mixed.astype(v.dtype), jnp.squeeze(peak + jnp.log(total), 3)), ()

    (mixed, log_totals), _ = _each(mix, _blocks(_scaled(q)), k.shape[1], causal)
    out = checkpoint_name(_unblock(mixed, q.shape[1]), ATTENTION_OUTPUT)
    return out, (q, k, v, out, checkpoint_name(log_totals, ATTENTION_OUTPUT))


def _backward(causal, residuals, d_out):
    q, k, v, out, log_totals = residuals
    keys, values = _by_head(k), _by_head(v)
    # The gradient of the softmax subtracts each query's dot product out . d_out from the gradients of its weights.
    along = _blocks(jnp.sum(d_out.astype(jnp.float32) * out, axis=-1, keepdims=True))[..., 0]

    def differentiate(block, start, seen):
        queries, d_mixed, log_total, along = block
        # [keys, queries], other than in the forward pass: XLA would store those scores instead of computing them again.
        scores = _product("bnsk,bntk->bnst", keys[:, :, :seen], queries)
        if causal:
            scores = _mask(scores, query_axis=3, start=start)
        weights = jnp.exp(scores - log_total[:, :, None])
        d_weights = _product("bnsk,bntk->bnst", values[:, :, :seen], d_mixed)
        d_scores = weights * (d_weights - along[:, :, None])
        weights, d_scores = weights.astype(q.dtype), d_scores.astype(q.dtype)
        unseen = [(0, 0), (0, 0), (0, k.shape[1] - seen), (0, 0)]
        d_keys = jnp.pad(_product("bnst,bntk->bnsk", d_scores, queries), unseen)
        d_values = jnp.pad(_product("bnst,bntk->bnsk", weights, d_mixed), unseen)
        d_queries = _product("bnsk,bnst->bnkt", keys[:, :, :seen], d_scores).swapaxes(2, 3)
        return (d_queries,), (d_keys, d_values)

    blocks = _blocks(_scaled(q)), _blocks(d_out), log_totals, along
    (d_q,), (d_k, d_v) = _each(differentiate, blocks, k.shape[1], causal)
    d_q = _scaled(_unblock(d_q, q.shape[1]))
    return tuple(x.astype(q.dtype) for x in (d_q, _by_head(d_k), _by_head(d_v)))


chunked_attention.defvjp(_forward, _backward)


def _each(function, blocks, length, causal):
    """Calls `function(block, start, seen)` for each block of queries: its first position, how many keys it may see.

    The function returns two tuples of arrays. Returns those of the first, stacked, and the sums of those of the second.
    """
    slices = [jax.tree.map(lambda x: x[i], blocks) for i in range(len(jax.tree.leaves(blocks)[0]))]  # noqa: B023
    starts = [i * BLOCK for i in range(len(slices))]
    calls = [functools.partial(function, start=s, seen=min(s + BLOCK, length) if causal else length) for s in starts]
    if len(calls) <= AT_ONCE:
        results, terms = zip(*(call(block) for call, block in zip(calls, slices, strict=True)), strict=True)
        return jax.tree.map(lambda *x: jnp.stack(x), *results), jax.tree.map(lambda *x: sum(x), *terms)

    def step(sums, numbered):
        result, terms = jax.lax.switch(numbered[0], calls, numbered[1])
        return jax.tree.map(jnp.add, sums, terms), result

    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(calls[0], slices[0])[1])
    sums, results = jax.lax.scan(step, zeros, (jnp.arange(len(calls)), blocks))
    return results, sums


def _blocks(x):
    """[B, T, N, K] -> [T / BLOCK, B, N, BLOCK, K], padded with zeros to whole blocks."""
    batch, length, heads, size = x.shape
    x = jnp.pad(x, [(0, 0), (0, -length % BLOCK), (0, 0), (0, 0)])
    return x.reshape(batch, -1, BLOCK, heads, size).transpose(1, 0, 3, 2, 4)


def _unblock(blocks, length):
    """The inverse of `_blocks`."""
    count, batch, heads, size, width = blocks.shape
    return blocks.transpose(1, 0, 3, 2, 4).reshape(batch, count * size, heads, width)[:, :length]


def _mask(scores, query_axis, start):
    """Hides later keys from the queries from position `start` on. scores: [B, N, t, s], or [B, N, s, t]."""
    query = start + jax.lax.broadcasted_iota(jnp.int32, scores.shape, query_axis)
    key = jax.lax.broadcasted_iota(jnp.int32, scores.shape, 5 - query_axis)
    return jnp.where(key <= query, scores, jnp.finfo(jnp.float32).min)


def _scaled(q):
    """Queries scaled by 1 / sqrt(K) instead of scores: K numbers instead of T. The gradient of it is the same."""
    return (q * q.shape[-1] ** -0.5).astype(q.dtype)


def _by_head(x):
    """[B, T, N, K] <-> [B, N, T, K]."""
    return x.swapaxes(1, 2)


_product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
