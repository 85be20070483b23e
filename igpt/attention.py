"""Multi-head attention: one function, several back ends that agree in value and gradient.

Layout: q, k, v are [B, T, N, K]. Scores are q.k / sqrt(K), their softmax is taken in float32, and under a
causal mask position t attends to positions 0..t (Chen et al. 2020, section 2.2; OpenAI's src/model.py, `attn`).

- `reference`: all T x T scores at once. The one to read, and the one the others are tested against.
- `chunked`: block by block with a running softmax, so that blocks above the diagonal are never computed and memory
  grows with T, not T x T; the backward pass computes the scores again.
- `cudnn`: NVIDIA's fused kernel, for bfloat16 on GPUs.
- `splash`: JAX's fused kernel for TPUs (jax.experimental.pallas.ops.tpu.splash_attention).
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from igpt.errors import UserError

BACKENDS = ("reference", "chunked", "cudnn", "splash")
CHUNK = 256  # queries and keys a block; see benchmarks/attention.py
KEPT = "attention"  # names what the backward pass needs of the forward: see REMAT in igpt/model.py
SPLASH_BLOCKS = (512, 256, 128)  # queries and keys a block of the TPU's kernel: the largest that divides T


def resolve_backend(name: str, device, dtype: str, head_size: int, seq_len: int) -> str:
    """The back end that `name` ("auto" or one of BACKENDS) means on `device`; an impossible one is an error."""
    capability = str(getattr(device, "compute_capability", ""))  # "9.0" with CUDA, "gfx90a" with ROCm, absent elsewhere
    ampere = capability.replace(".", "").isdigit() and float(capability) >= 8.0
    cudnn_can = device.platform == "gpu" and ampere and dtype == "bfloat16" and head_size % 8 == 0 and head_size <= 128
    whole_blocks = seq_len % SPLASH_BLOCKS[-1] == 0
    splash_can = device.platform == "tpu" and head_size % 32 == 0 and head_size <= 256 and whole_blocks
    if name == "auto":
        return "cudnn" if cudnn_can else "splash" if splash_can else "chunked"
    if name not in BACKENDS:
        raise UserError(f"model.attention is {name!r}; choose 'auto' or one of {', '.join(BACKENDS)}")
    if name == "cudnn" and not cudnn_can:
        raise UserError(
            "model.attention='cudnn' needs an NVIDIA GPU from Ampere on, bfloat16 and a head size that is a "
            f"multiple of 8 up to 128; this is {device.device_kind}, {dtype} and {head_size}. Use 'auto'"
        )
    if name == "splash" and not splash_can:
        raise UserError(
            "model.attention='splash' needs a TPU, a head size that is a multiple of 32 up to 256 and a number of "
            f"positions that is a multiple of {SPLASH_BLOCKS[-1]}; this is {device.device_kind}, {head_size} and "
            f"{seq_len}. Use 'auto'"
        )
    return name


def block_size(length: int) -> int:
    """Queries and keys a block: of the TPU's kernel the largest that divides the length, or else of `chunked`."""
    return next((size for size in SPLASH_BLOCKS if length % size == 0), CHUNK)


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
    """Softmax attention by the named back end. `dropout` on the attention weights needs `reference` and a key.

    `splash` reads whole blocks: a shorter sequence than the model's, as in sampling, may go the way of `chunked`.
    """
    if key is not None and dropout > 0.0:
        check_dropout(backend, dropout)
        return _attend(q, k, v, causal, dropout, key)
    match backend:
        case "reference":
            return _attend(q, k, v, causal)
        case "splash" if q.shape[1] % SPLASH_BLOCKS[-1] == 0:
            return _splash(q, k, v, causal)
        case "chunked" | "splash" if q.shape[1] > CHUNK:
            return _chunked(q, k, v, causal)
        case "chunked" | "splash":  # a single block: nothing to skip and nothing to save
            return _attend(q, k, v, causal)
        case "cudnn":
            return jax.nn.dot_product_attention(q, k, v, is_causal=causal, implementation="cudnn")
    raise UserError(f"unknown attention back end {backend!r}; choose one of {', '.join(BACKENDS)}")


def _attend(q, k, v, causal, dropout=0.0, key=None):
    # Scores and softmax in float32: in bfloat16 two weights that differ by less than 0.4 % would be one.
    scores = jnp.einsum("btnk,bsnk->bnts", q, k, preferred_element_type=jnp.float32) / jnp.sqrt(q.shape[-1])
    if causal:
        position = jnp.arange(q.shape[1])
        scores = jnp.where(position[None] <= position[:, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1)
    if key is not None:
        weights = jnp.where(jax.random.bernoulli(key, 1.0 - dropout, weights.shape), weights / (1.0 - dropout), 0.0)
    # The second product runs in the compute dtype of the model, like every other matrix product.
    return jnp.einsum("bnts,bsnk->btnk", weights.astype(v.dtype), v)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _chunked(q, k, v, causal):
    """Softmax attention by blocks of CHUNK queries and CHUNK keys, with a running softmax (Dao et al. 2022, 2023)."""
    return _chunked_forward(q, k, v, causal)[0]


def _chunked_forward(q, k, v, causal):
    q_blocks, k_blocks, v_blocks = map(_blocks, (q, k, v))

    def step(carry, pair):
        out, peak, total = carry  # unnormalised output, largest score and sum of exponentials of each query so far
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
    out = checkpoint_name(_unblock(out / jax.vmap(_per_query)(total), q.shape[1]).astype(v.dtype), KEPT)
    return out, (q, k, v, out, checkpoint_name(peak + jnp.log(total), KEPT))


def _chunked_backward(causal, residuals, d_out):
    q, k, v, out, log_total = residuals
    q_blocks, k_blocks, v_blocks, d_out_blocks = map(_blocks, (q, k, v, d_out))
    # How far each query's output already points along its gradient: what the softmax takes off every weight.
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


_chunked.defvjp(_chunked_forward, _chunked_backward)


def _block_pairs(count: int, causal: bool) -> tuple[Array, Array]:
    """(query block, key block) of all blocks that any query may see: the lower triangle under a causal mask."""
    pairs = [(i, j) for i in range(count) for j in range(i + 1 if causal else count)]
    queries, keys = zip(*pairs, strict=True)
    return jnp.array(queries), jnp.array(keys)


def _block_scores(q, k, i, j, length, causal):
    """Float32 scores of query block i against key block j; the last block's padding and later keys are masked."""
    scores = jnp.einsum("btnk,bsnk->bnts", q, k, preferred_element_type=jnp.float32) / jnp.sqrt(q.shape[-1])
    query, key = i * CHUNK + jnp.arange(CHUNK)[:, None], j * CHUNK + jnp.arange(CHUNK)[None]
    visible = (key <= query) & (key < length) if causal else key < length
    return jnp.where(visible, scores, jnp.finfo(jnp.float32).min)


def _blocks(x):
    """[B, T, N, K] -> [T / CHUNK, B, CHUNK, N, K], padded with zeros to whole blocks."""
    batch, length, heads, size = x.shape
    x = jnp.pad(x, [(0, 0), (0, -length % CHUNK), (0, 0), (0, 0)])
    return x.reshape(batch, -1, CHUNK, heads, size).swapaxes(0, 1)


def _unblock(blocks, length):
    """The inverse of `_blocks`."""
    count, batch, size, heads, width = blocks.shape
    return blocks.swapaxes(0, 1).reshape(batch, count * size, heads, width)[:, :length]


def _per_query(x):
    """[B, N, T] -> [B, T, N, 1], to scale the rows of an output."""
    return x.swapaxes(1, 2)[..., None]


def _splash(q, k, v, causal, interpret=False):
    """The TPU's kernel, on each device's own examples and heads: the compiler cannot split a kernel by itself.

    `interpret` runs it anywhere, slowly.
    """
    mesh = jax.sharding.get_abstract_mesh()
    local = functools.partial(_splash_local, causal=causal, interpret=interpret)
    if mesh.empty:
        return local(q, k, v)
    spec = P(("data", "fsdp"), None, "tensor", None)
    return jax.shard_map(local, mesh=mesh, in_specs=(spec,) * 3, out_specs=spec, check_vma=False)(q, k, v)


def _splash_local(q, k, v, causal, interpret):
    from jax.experimental.pallas.ops.tpu import splash_attention as splash  # slow to import, and for TPUs only

    length, heads = q.shape[1:3]
    mask = (splash.CausalMask if causal else splash.FullMask)((length, length))
    block = block_size(length)
    names = ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute", "q_dq", "kv_dq")
    kernel = splash.make_splash_mha(
        splash.MultiHeadMask([mask] * heads),
        head_shards=1,
        q_seq_shards=1,
        block_sizes=splash.BlockSizes(**{f"block_{name}": block for name in names}),
        residual_checkpoint_name=KEPT,
        interpret=interpret,
    )
    scaled = (q.astype(jnp.float32) / jnp.sqrt(q.shape[-1])).astype(q.dtype)  # the kernel does not scale scores
    q, k, v = (jnp.swapaxes(x, 1, 2) for x in (scaled, k, v))
    return jnp.swapaxes(jax.vmap(kernel)(q, k, v), 1, 2).astype(v.dtype)


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
