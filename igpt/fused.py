"""Attention for TPUs in two fused kernels, one forward and one backward, which keep whole sequences in fast memory.

They are for sequences whose keys and values fit in VMEM, the fast memory of a TPU core: up to 4,096 positions. Each
softmax sees all its keys at once, so that it needs no running maximum as in FlashAttention (Dao et al. 2022). One
backward kernel computes all three gradients from one copy of the scores.

The kernels read heads straight out of [B, T, N K], the order in which the projection writes them, so that no array is
transposed or padded in HBM. They read q, k and v from one stack, and write their gradients to one stack, so that
nothing is copied out of the projection's result, or joined for its gradient.

A TPU reads 128 lanes side by side. A *group* is the smallest number of whole heads that fills whole lanes: one head of
128, two of 64, four of 96. The grid runs over examples and groups. Each step loops over the heads of its group. Heads
of 96 are first copied apart. Heads that share 128 lanes stay together: a product reads all lanes, and one of its
factors has zeros in the lanes of other heads.

Scores are transposed, [keys, queries], so that the statistics of a query lie in a row, which broadcasts over keys at no
cost. The loops over blocks are unrolled. Under a causal mask, blocks above the diagonal are left out.

Dims: B batch, T tokens, D = N K width, N heads, K head size, P heads in a group, W = P K lanes in a group.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from igpt.chunked import ATTENTION_OUTPUT, Heads

LANES = 128  # numbers that a TPU reads side by side
BLOCK = 256  # positions in a block
MAX_LENGTH = 4096  # positions whose arrays fit in VMEM
ONE_REGION = 1024  # positions up to which all blocks are scheduled together
VMEM_BYTES = 64 << 20
V4_NUMBERS = 1024 * 128  # positions x lanes of a group that fit in the 16 MiB of VMEM of a v4
NEEDED = (  # what `fits` checks, in words
    "a head size of 32, 64, 96 or 128, heads that fill lanes of 128 (for size 64 a multiple of 2, for 32 and 96 of 4) "
    f"and positions in multiples of {BLOCK} up to {MAX_LENGTH} (on v4 up to 1,024, with heads of 32, 64 or 128)"
)
HIDDEN = -1e30  # the score of a key that a query must not see; finite, so that no difference is NaN

Rows = Float[Array, "B T D"]
Stack = Float[Array, "3 B T D"]  # queries, keys and values


class Layout(NamedTuple):
    """Head size, heads in a group, positions, and whether attention is causal. The kernels are made for one layout."""

    K: int
    P: int
    T: int
    causal: bool

    @property
    def W(self) -> int:
        return self.P * self.K

    @property
    def is_cut(self) -> bool:
        """Whether heads do not lie within 128 lanes, so that products need copies of them."""
        return LANES % self.K != 0

    @property
    def apart(self) -> tuple[int, int, int]:
        return (self.P, self.T, self.K) if self.is_cut else (1, self.T, self.W)

    @property
    def blocks(self) -> list[slice]:
        return [slice(start, start + BLOCK) for start in range(0, self.T, BLOCK)]

    def seen_by(self, queries: slice) -> slice:
        """The keys that some query of a block sees."""
        return slice(0, queries.stop if self.causal else self.T)

    def seeing(self, keys: slice) -> slice:
        """The queries that see some key of a block."""
        return slice(keys.start if self.causal else 0, self.T)


def group_size(head_size: int) -> int:
    """The number of heads in a group."""
    return math.lcm(head_size, LANES) // head_size


def fits(heads: int, head_size: int, length: int, device_kind: str = "") -> bool:
    """Whether the kernels can compute attention of these sizes, on devices of this kind."""
    if "v4" in device_kind and length * group_size(head_size) * head_size > V4_NUMBERS:
        return False
    whole = heads % group_size(head_size) == 0 and length % BLOCK == 0
    return whole and length <= MAX_LENGTH and head_size % 32 == 0 and head_size <= LANES


def fused_attention(q: Heads, k: Heads, v: Heads, causal: bool, interpret: bool = False) -> Heads:
    """Softmax attention in the fused kernels. `interpret` emulates them on any device, slowly."""
    B, T, N, K = q.shape
    # XLA makes no copy here if q, k and v are the slices of one array along its first axis, as in `Block`.
    stack = jnp.stack([x.reshape(B, T, N * K) for x in (q, k, v)])
    return _attend(stack, Layout(K, group_size(K), T, causal), interpret).reshape(q.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _attend(qkv: Stack, layout: Layout, interpret: bool) -> Rows:
    return _forward(qkv, layout, interpret)[0]


def _forward(qkv, layout, interpret):
    _, B, T, D = qkv.shape
    rows, statistics = (B, T, D), (B, D // layout.K, 1, T)
    out_shape = [jax.ShapeDtypeStruct(rows, qkv.dtype), jax.ShapeDtypeStruct(statistics, jnp.float32)]
    kernel = _kernel(_forward_body, "q", "rs", out_shape, [qkv.dtype] * 4, layout, interpret)
    out, log_total = (checkpoint_name(x, ATTENTION_OUTPUT) for x in kernel(qkv, name="fused_attention_forward"))
    return out, (qkv, out, log_total)


def _pallas():
    """Pallas and its part for TPUs. The import takes 0.4 s, and only TPUs need it."""
    from jax.experimental import pallas
    from jax.experimental.pallas import tpu

    return pallas, tpu


def _backward(layout, interpret, residuals, d_out):
    _, pltpu = _pallas()
    gradients = [jax.ShapeDtypeStruct(residuals[0].shape, residuals[0].dtype)]
    kernel = _kernel(_backward_body, "qrsr", "q", gradients, [d_out.dtype] * 6, layout, interpret)
    sums = [pltpu.VMEM(layout.apart, jnp.float32), pltpu.VMEM((8, layout.T), jnp.float32)]
    return tuple(kernel(*residuals, d_out, name="fused_attention_backward", extra=sums))


_attend.defvjp(_forward, _backward)


def _forward_body(qkv, out, log_total, *apart, layout):
    q, k, v = (qkv.at[i] for i in range(3))
    q_heads, k_heads, v_heads, out_heads = apart or (q, k, v, out)
    _cut(layout, (q, q_heads), (k, k_heads), (v, v_heads))

    @_for_each_head(layout)
    def _(head, at, always):
        @_for_each_block(layout, always)
        def _(queries):
            seen = layout.seen_by(queries)
            scores = _scores(k_heads[at, seen, :], _own(q_heads[at, queries, :], head, layout), layout)
            if layout.causal:
                scores = _hide_later_keys(scores, HIDDEN, axis=0)
            peak = jnp.max(scores, axis=0, keepdims=True)
            weights = jnp.exp2(scores - peak)
            total = jnp.sum(weights, axis=0, keepdims=True)
            log_total[head, :, queries] = peak + jnp.log2(total)
            weights = (weights * (1 / total)).astype(v.dtype)
            _put(out_heads, head, queries, _dot(weights, v_heads[at, seen, :], 0, 0), layout)

    _join(layout, (out, out_heads))


def _backward_body(qkv, out, log_total, d_out, d_qkv, d_q_sum, mean, *apart, layout):
    pl, _ = _pallas()
    q, k, v = (qkv.at[i] for i in range(3))
    d_q, d_k, d_v = (d_qkv.at[i] for i in range(3))
    q_heads, k_heads, v_heads, d_out_heads, d_k_heads, d_v_heads = apart or (q, k, v, d_out, d_k, d_v)
    _cut(layout, (q, q_heads), (k, k_heads), (v, v_heads), (d_out, d_out_heads))
    # Softmax's gradient subtracts the mean of the weights' gradients under the weights: for each query, out . d_out.
    # Row n of this product sums the lanes of head n. It has 8 rows, because no product has fewer.
    product = d_out[0].astype(jnp.float32) * out[0].astype(jnp.float32)
    row, lane = (jax.lax.broadcasted_iota(jnp.int32, (8, layout.W), axis) for axis in (0, 1))
    mean[...] = _dot(_is_lane_of(row, lane, layout).astype(jnp.float32), product, 1, 1)
    d_q_sum[...] = jnp.zeros_like(d_q_sum)

    @_for_each_head(layout)
    def _(head, at, always):
        @_for_each_block(layout, always)
        def _(keys):
            seeing = layout.seeing(keys)
            key, value = (_own(x[at, keys, :], head, layout) for x in (k_heads, v_heads))
            query, d_mixed = q_heads[at, seeing, :], d_out_heads[at, seeing, :]
            weights = jnp.exp2(_scores(key, query, layout) - log_total[head, :, seeing])
            if layout.causal:
                weights = _hide_later_keys(weights, 0.0, axis=1)
            d_scores = (weights * (_dot(value, d_mixed, 1, 1) - mean[pl.ds(head, 1), seeing])).astype(q.dtype)
            _put(d_v_heads, head, keys, _dot(weights.astype(q.dtype), d_mixed, 1, 0), layout)
            _put(d_k_heads, head, keys, _dot(d_scores, query, 1, 0) / math.sqrt(layout.K), layout)
            d_q_sum[at, seeing, :] += _dot(d_scores, key, 0, 0)

    d_q_sum[...] *= 1 / math.sqrt(layout.K)
    _join(layout, (d_k, d_k_heads), (d_v, d_v_heads), (d_q, d_q_sum))


def _kernel(body, inputs, outputs, out_shape, apart, layout, interpret):
    """A function that calls a kernel, whose body runs for every example and group.

    Letters describe its arrays: `q` stacks [3, B, T, D], of which the body reads [3, 1, T, W], `r` rows [B, T, D], of
    which it reads [1, T, W], and `s` statistics [B, N, 1, T], of which it reads [P, 1, T]. `apart` has the types of
    arrays for heads that are cut apart, if they are.
    """
    pl, pltpu = _pallas()
    B, T, D = out_shape[0].shape[-3:]
    specs = {
        "q": pl.BlockSpec((3, 1, T, layout.W), lambda example, group: (0, example, 0, group)),
        "r": pl.BlockSpec((1, T, layout.W), lambda example, group: (example, 0, group)),
        "s": pl.BlockSpec((None, layout.P, 1, T), lambda example, group: (example, group, 0, 0)),
    }
    order = ("parallel", "parallel")  # no step needs another: a chip's cores share them

    def call(*arrays, name, extra=()):
        return pl.pallas_call(
            functools.partial(body, layout=layout),
            grid=(B, D // layout.W),
            in_specs=[specs[letter] for letter in inputs],
            out_specs=[specs[letter] for letter in outputs],
            out_shape=out_shape,
            scratch_shapes=[*extra, *(pltpu.VMEM(layout.apart, dtype) for dtype in apart if layout.is_cut)],
            compiler_params=pltpu.CompilerParams(dimension_semantics=order, vmem_limit_bytes=VMEM_BYTES),
            interpret=interpret,
            name=name,
        )(*arrays)

    return call


def _cut(layout, *pairs):
    """Copies the heads of a group from their rows, [1, T, W], to arrays of their own, [P, T, K], if they have some."""
    for rows, heads in pairs:
        for head in range(layout.P if layout.is_cut else 0):
            heads[head] = rows[0, :, head * layout.K : (head + 1) * layout.K]


def _join(layout, *pairs):
    """The inverse of `_cut`."""
    for rows, heads in pairs:
        if heads is not rows:
            parts = [heads[part].astype(rows.dtype) for part in range(heads.shape[0])]
            rows[0] = jnp.concatenate(parts, axis=1)


def _is_lane_of(head, lane, layout):
    return (lane >= head * layout.K) & (lane < (head + 1) * layout.K)


def _own(x, head, layout):
    """x with zeros in the lanes of other heads."""
    if layout.P == 1 or layout.is_cut:
        return x
    lane = jax.lax.broadcasted_iota(jnp.int32, x.shape, 1)
    return jnp.where(_is_lane_of(head, lane, layout), x, jnp.zeros_like(x))


def _put(ref, head, rows, value, layout):
    """Writes a head's lanes of `value`. Other lanes of `value` belong to no head, and those of `ref` to other heads."""
    value = value.astype(ref.dtype)
    if layout.P > 1 and not layout.is_cut:
        lane = jax.lax.broadcasted_iota(jnp.int32, value.shape, 1)
        value = jnp.where(_is_lane_of(head, lane, layout), value, ref[0, rows, :])
    ref[head if layout.is_cut else 0, rows, :] = value


def _for_each_head(layout):
    """Runs the function for each head of a group, with the index of its array, and a condition that always holds.

    Short sequences need no loop.
    """

    def run(function):
        pl, _ = _pallas()
        always = pl.program_id(0) >= 0  # read here, because the emulation knows no program_id within a loop

        def run_head(head, _=None):
            function(head, head if layout.is_cut else 0, always)

        if layout.P == 1 or layout.T <= ONE_REGION:
            for head in range(layout.P):
                run_head(head)
        else:
            jax.lax.fori_loop(0, layout.P, run_head, None)

    return run


def _for_each_block(layout, always):
    """Runs the function for each block of positions.

    The compiler schedules up to ONE_REGION positions together, which is fastest. Its time grows with the square of the
    code that it schedules together. So for longer sequences a condition that always holds makes each block a region.
    """

    def run(function):
        for block in layout.blocks:
            if layout.T <= ONE_REGION:
                function(block)
            else:
                pl, _ = _pallas()
                pl.when(always)(functools.partial(function, block))

    return run


def _dot(a, b, a_axis, b_axis):
    """The matrix product that sums over the given axes, in float32."""
    return jax.lax.dot_general(a, b, (((a_axis,), (b_axis,)), ((), ())), preferred_element_type=jnp.float32)


def _scores(key, query, layout):
    """[keys, queries]: q . k / sqrt(K), in units of ln 2, because exp2 is cheaper than exp."""
    return _dot(key, query, 1, 1) * (math.log2(math.e) / math.sqrt(layout.K))


def _hide_later_keys(scores, filler, axis):
    """Fills in what lies above the diagonal, whose block is the last along axis 0 or the first along axis 1."""
    key, query = (jax.lax.broadcasted_iota(jnp.int32, (BLOCK, BLOCK), axis) for axis in (0, 1))
    diagonal = scores[-BLOCK:] if axis == 0 else scores[:, :BLOCK]
    diagonal = jnp.where(key <= query, diagonal, filler)
    if scores.shape == diagonal.shape:
        return diagonal
    parts = [scores[:-BLOCK], diagonal] if axis == 0 else [diagonal, scores[:, BLOCK:]]
    return jnp.concatenate(parts, axis)
