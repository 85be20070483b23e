"""Multi-head attention: one function with several back ends, which compute the same values and gradients.

Layout: q, k and v are [B, T, N, K]. Scores are q.k / sqrt(K), and their softmax is computed in float32. Under a causal
mask, position t attends to positions 0..t (Chen et al. 2020, section 2.2; OpenAI's src/model.py, `attn`).

- `reference`: all T x T scores at once. Read this back end first; the tests compare the other back ends with it.
- `chunked`: blocks of queries, in plain JAX, for any device (igpt/chunked.py).
- `cudnn`: NVIDIA's fused kernel, for bfloat16 on GPUs.
- `fused`: our own kernels for TPUs, for sequences that fit into fast memory (igpt/fused.py).
- `splash`: JAX's kernel for TPUs and any length (jax.experimental.pallas.ops.tpu.splash_attention).
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from igpt import chunked, fused
from igpt.chunked import Heads
from igpt.errors import UserError

BACKENDS = ("reference", "chunked", "cudnn", "fused", "splash")
SPLASH_BLOCKS = (512, 256, 128)  # block sizes for `splash`, in positions; it uses the largest that divides T
CACHE_LANES, CACHE_SLICES = 16, 8  # `_sums_over_cache` adds slices of 16 channels, and an eighth of the positions
SUMMED_FROM = 1 << 20  # numbers in a layer's cached keys; for fewer, `_sums_over_cache` was slower (docs/decisions.md)
CUDNN_SHORTEST = 64  # positions, a tile of cuDNN's kernels; sampling starts with a sequence of one position


def attention(
    q: Heads, k: Heads, v: Heads, *, backend: str, causal: bool = True, dropout: float = 0.0, key: Array | None = None
) -> Heads:
    """Softmax attention with the given back end. Dropout of attention weights needs the back end `reference` and a key.

    `fused` and `splash` need a T that whole blocks fill; for others, which sampling uses, `chunked` runs instead.
    A sequence that is shorter than a tile of `cudnn` gets the reference.
    Where the mesh leaves a device a number of heads that `fused` cannot group, `splash` runs instead.
    """
    if key is not None and dropout > 0.0:
        check_dropout(backend, dropout)
        return _reference(q, k, v, causal, dropout, key)
    match backend:
        case "fused" | "splash" if q.shape[1] % SPLASH_BLOCKS[-1] == 0:
            return _tpu_kernel(q, k, v, backend, causal)
        case "chunked" | "fused" | "splash" if q.shape[1] > chunked.BLOCK:
            return chunked.chunked_attention(q, k, v, causal)
        case "cudnn" if q.shape[1] >= CUDNN_SHORTEST:
            return jax.nn.dot_product_attention(q, k, v, is_causal=causal, implementation="cudnn")
        case "reference" | "chunked" | "cudnn" | "fused" | "splash":  # one block: `chunked` saves no time or memory
            return _reference(q, k, v, causal)
    raise UserError(f"unknown attention back end {backend!r}; choose one of {', '.join(BACKENDS)}")


def _reference(q, k, v, causal, dropout=0.0, key=None):
    # Scores and softmax in float32: bfloat16 cannot distinguish weights that differ by less than 0.4 %.
    scores = jnp.einsum("btnk,bsnk->bnts", q, k, preferred_element_type=jnp.float32) / jnp.sqrt(q.shape[-1])
    if causal:
        position = jnp.arange(q.shape[1])
        scores = jnp.where(position[None] <= position[:, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1)
    if key is not None:
        weights = jnp.where(jax.random.bernoulli(key, 1.0 - dropout, weights.shape), weights / (1.0 - dropout), 0.0)
    # The second product runs in the compute dtype of the model, like every other matrix product.
    return jnp.einsum("bnts,bsnk->btnk", weights.astype(v.dtype), v)


def _tpu_kernel(q, k, v, backend, causal, interpret=False):
    """Runs a TPU kernel on each device's own examples and heads, because the compiler cannot partition a kernel.

    `interpret` emulates the kernel on any device, slowly.
    """
    mesh, kernel = jax.sharding.get_abstract_mesh(), _fused if backend == "fused" else _splash

    def local(*rows):
        q, k, v = (x.reshape(*x.shape[:2], -1, head_size) for x in rows)
        return kernel(q, k, v, causal, interpret).reshape(rows[0].shape)

    # Heads cross the border side by side, [B, T, N K]. With [B, T, N, K] the compiler puts T last, where nothing is
    # padded, and copies all that the kernel reads and writes.
    shape, head_size = q.shape, q.shape[-1]
    rows = [x.reshape(*shape[:2], -1) for x in (q, k, v)]
    if not mesh.empty:
        spec = P(("data", "fsdp"), None, "tensor")
        local = jax.shard_map(local, mesh=mesh, in_specs=(spec,) * 3, out_specs=spec, check_vma=False)
    return local(*rows).reshape(shape)


def _fused(q, k, v, causal, interpret):
    length, heads, head_size = q.shape[1:]
    kernel = fused.fused_attention if fused.fits(heads, head_size, length) else _splash
    return kernel(q, k, v, causal, interpret)


def _splash(q, k, v, causal, interpret):
    from jax.experimental.pallas.ops.tpu import splash_attention as splash  # the import is slow, and only TPUs need it

    length, heads = q.shape[1:3]
    mask = (splash.CausalMask if causal else splash.FullMask)((length, length))
    names = ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute", "q_dq", "kv_dq")
    blocks = splash.BlockSizes(**{f"block_{name}": block_size(length) for name in names})
    options = dict(block_sizes=blocks, residual_checkpoint_name=chunked.ATTENTION_OUTPUT, interpret=interpret)
    kernel = splash.make_splash_mha(splash.MultiHeadMask([mask] * heads), head_shards=1, q_seq_shards=1, **options)
    scaled = (q.astype(jnp.float32) / jnp.sqrt(q.shape[-1])).astype(q.dtype)  # the kernel does not scale scores
    q, k, v = (jnp.swapaxes(x, 1, 2) for x in (scaled, k, v))
    return jnp.swapaxes(jax.vmap(kernel)(q, k, v), 1, 2).astype(v.dtype)


def attend_to_cache(
    q: Float[Array, "B N K"], keys: Float[Array, "B N T K"], values: Float[Array, "B N T K"], position: Array | int
) -> Float[Array, "B N K"]:
    """Attention of one query per sequence, at `position`, to the cached keys and values of positions 0..position."""
    arguments = q, keys, values, jnp.asarray(position)
    divisible = keys.shape[3] % CACHE_LANES == 0 and keys.shape[2] % CACHE_SLICES == 0
    if keys.dtype != jnp.float32 or keys.size < SUMMED_FROM or not divisible:
        return _products_with_cache(*arguments)
    return jax.lax.platform_dependent(*arguments, cpu=_sums_over_cache, default=_products_with_cache)


def _products_with_cache(q, keys, values, position):
    scores = jnp.einsum("bnk,bntk->bnt", q, keys, preferred_element_type=jnp.float32) / jnp.sqrt(q.shape[-1])
    scores = jnp.where(jnp.arange(keys.shape[2]) <= position, scores, jnp.finfo(jnp.float32).min)
    weights = jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True))
    mixed = jnp.einsum("bnt,bntk->bnk", weights.astype(values.dtype), values, preferred_element_type=jnp.float32)
    # Division of K numbers instead of T weights saves a pass over them.
    return (mixed / jnp.sum(weights, axis=-1, keepdims=True)).astype(values.dtype)


def _sums_over_cache(q, keys, values, position):
    """`_products_with_cache` for CPUs, whose libraries read a matrix for one vector at half the speed of memory.

    XLA compiles sums of whole slices into loops that add many numbers at once. A sum over an axis would add one number
    after the other, and remains for the last slice only.
    """
    scores = jnp.sum(_fold(jnp.add, keys * q[:, :, None], 3, keys.shape[3] // CACHE_LANES), axis=-1)
    scores = scores / jnp.sqrt(q.shape[-1])
    scores = jnp.where(jnp.arange(keys.shape[2]) <= position, scores, jnp.finfo(jnp.float32).min)
    weights = jnp.exp(scores - jnp.max(_fold(jnp.maximum, scores, 2, CACHE_SLICES), axis=-1, keepdims=True))
    mixed = jnp.sum(_fold(jnp.add, weights[..., None] * values, 2, CACHE_SLICES), axis=2)
    return mixed / jnp.sum(_fold(jnp.add, weights, 2, CACHE_SLICES), axis=-1, keepdims=True)


def _fold(combine: Callable, x: Array, axis: int, slices: int) -> Array:
    """Combines equal slices of an axis, element by element."""
    return functools.reduce(combine, jnp.split(x, slices, axis=axis))


def resolve_backend(name: str, device, dtype: str, heads: int, head_size: int, seq_len: int) -> str:
    """The fastest back end for a jax.Device if `name` is "auto", else `name`. Raises UserError if `name` cannot run."""
    capability = str(getattr(device, "compute_capability", ""))  # "9.0" on CUDA, "gfx90a" on ROCm, "" on other devices
    ampere = capability.replace(".", "").isdigit() and float(capability) >= 8.0
    whole_blocks = seq_len % SPLASH_BLOCKS[-1] == 0
    gpu_can = device.platform == "gpu" and ampere and dtype == "bfloat16"
    can = {
        "cudnn": gpu_can and head_size % 8 == 0 and head_size <= 128,
        "fused": device.platform == "tpu" and fused.fits(heads, head_size, seq_len, device.device_kind),
        "splash": device.platform == "tpu" and head_size % 32 == 0 and head_size <= 256 and whole_blocks,
    }
    if name == "auto":
        return next((fastest for fastest, runs in can.items() if runs), "chunked")
    if name not in BACKENDS:
        raise UserError(f"model.attention is {name!r}; choose 'auto' or one of {', '.join(BACKENDS)}")
    if not can.get(name, True):
        needed = {
            "cudnn": "an NVIDIA GPU (Ampere or newer), bfloat16 and a head size that is a multiple of 8 up to 128",
            "fused": f"a TPU, {fused.NEEDED}",
            "splash": f"a TPU, a head size in multiples of 32 up to 256, positions in multiples of {SPLASH_BLOCKS[-1]}",
        }[name]
        given = f"this is {device.device_kind}, {dtype}, {heads} heads of size {head_size} and {seq_len} positions"
        raise UserError(f"model.attention={name!r} needs {needed}; {given}. Use 'auto'")
    return name


def block_size(length: int) -> int:
    """The block size of `splash` in positions, or that of `chunked` if no block size of `splash` divides the length."""
    return next((size for size in SPLASH_BLOCKS if length % size == 0), chunked.BLOCK)


def check_dropout(backend: str, dropout: float) -> None:
    """Raises UserError if `dropout` is positive and the back end never stores the attention weights."""
    if dropout > 0.0 and backend != "reference":
        remedy = "set model.attention='reference' or model.attention_dropout=0"
        raise UserError(f"model.attention_dropout is {dropout}, which the {backend!r} back end cannot do; {remedy}")
