"""Multi-head attention: one function, several back ends that agree in value and gradient.

Layout: q, k, v are [B, T, N, K]. Scores are q.k / sqrt(K), their softmax is taken in float32, and under a
causal mask position t attends to positions 0..t (Chen et al. 2020, section 2.2; OpenAI's src/model.py, `attn`).

- `reference`: all T x T scores at once. The one to read, and the one the others are tested against.
- `chunked`: a block of queries at a time against the keys it may see, so that blocks above the diagonal are never
  computed and no more than one block of scores is ever held; the backward pass recomputes them.
- `cudnn`: NVIDIA's fused kernel, for bfloat16 on GPUs.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from igpt.errors import UserError

BACKENDS = ("reference", "chunked", "cudnn")
CHUNK = 128  # queries a block; see benchmarks/attention.py


def resolve_backend(name: str, platform: str, dtype: str) -> str:
    """The back end that `name` ("auto" or one of BACKENDS) means on `platform`; an impossible one is an error."""
    cudnn_can = platform == "gpu" and dtype == "bfloat16"
    if name == "auto":
        return "cudnn" if cudnn_can else "chunked"
    if name not in BACKENDS:
        raise UserError(f"model.attention is {name!r}; choose 'auto' or one of {', '.join(BACKENDS)}")
    if name == "cudnn" and not cudnn_can:
        raise UserError(
            f"model.attention='cudnn' needs an NVIDIA GPU and bfloat16, but this is {platform} with {dtype}; "
            "use 'auto', 'chunked' or 'reference'"
        )
    return name


def check_dropout(backend: str, dropout: float) -> None:
    """Raises UserError when training would need dropout on attention weights that `backend` never materialises."""
    if dropout > 0.0 and backend != "reference":
        raise UserError(
            f"model.attention_dropout is {dropout}, which the {backend!r} back end cannot do; "
            "set model.attention='reference' or model.attention_dropout=0"
        )


def attention(
    q: Float[Array, "B T N K"],
    k: Float[Array, "B T N K"],
    v: Float[Array, "B T N K"],
    *,
    backend: str,
    causal: bool = True,
    dropout: float = 0.0,
    key: Array | None = None,
) -> Float[Array, "B T N K"]:
    """Softmax attention by the named back end. `dropout` on the attention weights needs `reference` and a key."""
    if key is not None and dropout > 0.0:
        check_dropout(backend, dropout)
        return _attend(q, k, v, first_query=0, causal=causal, dropout=dropout, key=key)
    match backend:
        case "reference":
            return _attend(q, k, v, first_query=0, causal=causal)
        case "chunked":
            return _chunked(q, k, v, causal)
        case "cudnn":
            return jax.nn.dot_product_attention(q, k, v, is_causal=causal, implementation="cudnn")
    raise UserError(f"unknown attention back end {backend!r}; choose one of {', '.join(BACKENDS)}")


def _attend(q, k, v, *, first_query, causal, dropout=0.0, key=None):
    """Attention of queries first_query, first_query + 1, ... to all given keys."""
    # Scores and softmax in float32: in bfloat16 two weights that differ by less than 0.4 % would be one.
    scores = jnp.einsum("btnk,bsnk->bnts", q, k, preferred_element_type=jnp.float32) / jnp.sqrt(q.shape[-1])
    if causal:
        query = first_query + jnp.arange(q.shape[1])[:, None]
        scores = jnp.where(jnp.arange(k.shape[1]) <= query, scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1)
    if key is not None:
        weights = jnp.where(jax.random.bernoulli(key, 1.0 - dropout, weights.shape), weights / (1.0 - dropout), 0.0)
    # The second product runs in the compute dtype of the model, like every other matrix product.
    return jnp.einsum("bnts,bsnk->btnk", weights.astype(v.dtype), v)


def _chunked(q, k, v, causal):
    length = q.shape[1]
    if length <= CHUNK:  # a single block: nothing to skip, and too small for recomputation to save memory
        return _attend(q, k, v, first_query=0, causal=causal)
    blocks = []
    for start in range(0, length, CHUNK):
        stop = min(start + CHUNK, length)
        visible = stop if causal else length
        block = jax.checkpoint(functools.partial(_attend, first_query=start, causal=causal))
        blocks.append(block(q[:, start:stop], k[:, :visible], v[:, :visible]))
    return jnp.concatenate(blocks, axis=1)


def attend_to_cache(
    q: Float[Array, "B N K"],
    keys: Float[Array, "B N T K"],
    values: Float[Array, "B N T K"],
    position: Array | int,
) -> Float[Array, "B N K"]:
    """One query a sequence, at `position`, against the cached positions 0..position."""
    scores = jnp.einsum("bnk,bntk->bnt", q, keys, preferred_element_type=jnp.float32) / jnp.sqrt(q.shape[-1])
    scores = jnp.where(jnp.arange(keys.shape[2]) <= position, scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(values.dtype)
    return jnp.einsum("bnt,bntk->bnk", weights, values)
