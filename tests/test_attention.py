import contextlib
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from igpt import chunked
from igpt.attention import _tpu_kernel, attend_to_cache, attention, resolve_backend
from igpt.errors import UserError
from igpt.model import PRESETS
from igpt.sharding import make_mesh


def random_qkv(length, seed=0, batch=2, heads=3, size=5):
    keys = jax.random.split(jax.random.key(seed), 3)
    return tuple(jax.random.normal(key, (batch, length, heads, size)) for key in keys)


def by_hand(q, k, v, causal):
    """Attention in float64 NumPy, one query at a time."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out = np.zeros_like(q)
    for b, t, n in np.ndindex(q.shape[:3]):
        seen = t + 1 if causal else q.shape[1]
        scores = k[b, :seen, n] @ q[b, t, n] / np.sqrt(q.shape[-1])
        weights = np.exp(scores - scores.max())
        out[b, t, n] = weights / weights.sum() @ v[b, :seen, n]
    return out


@pytest.mark.parametrize("causal", [True, False])
def test_the_reference_is_softmax_attention(causal):
    q, k, v = random_qkv(13)
    ours = attention(q, k, v, backend="reference", causal=causal)
    np.testing.assert_allclose(ours, by_hand(q, k, v, causal), atol=1e-5)


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_position_t_sees_nothing_after_it(monkeypatch, backend):
    monkeypatch.setattr(chunked, "BLOCK", 4)
    q, k, v = random_qkv(11)
    jacobian = jax.jit(jax.jacobian(lambda v: attention(q, k, v, backend=backend)[0, :, 0, 0]))(v)  # [T, B, T, N, K]
    influence = np.abs(jacobian).sum(axis=(1, 3, 4))
    assert (np.triu(influence, 1) == 0).all() and (np.diag(influence) > 0).all()


def test_the_cache_gives_what_the_full_sequence_gives():
    q, k, v = random_qkv(13)
    full = attention(q, k, v, backend="reference")
    keys, values = (jnp.swapaxes(x, 1, 2) for x in (k, v))
    for position in (0, 5, 12):
        step = attend_to_cache(q[:, position], keys, values, position)
        np.testing.assert_allclose(step, full[:, position], atol=1e-6)


@pytest.mark.parametrize("position", [0, 700, 1023])
def test_sums_over_a_large_cache_give_what_products_give(position):
    q, k, v = (np.asarray(x, np.float64) for x in random_qkv(1024, heads=8, size=64))
    keys, values = (jnp.asarray(np.swapaxes(x, 1, 2), jnp.float32) for x in (k, v))
    assert "dot_general" not in jax.jit(attend_to_cache).lower(jnp.float32(q[:, 0]), keys, values, position).as_text()
    step = attend_to_cache(jnp.asarray(q[:, position], jnp.float32), keys, values, position)
    scores = np.einsum("bnk,btnk->bnt", q[:, position], k[:, : position + 1]) / 8
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    expected = np.einsum("bnt,btnk->bnk", weights / weights.sum(-1, keepdims=True), v[:, : position + 1])
    np.testing.assert_allclose(step, expected, atol=2e-6)


def test_dropout_keeps_the_mean_and_other_back_ends_refuse_it():
    q, k, _ = random_qkv(5)
    v = jnp.ones((2, 5, 3, 5))
    keys = jax.random.split(jax.random.key(0), 2000)
    drop = jax.vmap(lambda key: attention(q, k, v, backend="reference", dropout=0.5, key=key))
    dropped = jax.jit(drop)(keys)
    assert float(dropped.std()) > 0.1
    np.testing.assert_allclose(dropped.mean(0), np.ones(v.shape), atol=0.1)
    with pytest.raises(UserError, match="'chunked' back end cannot.*reference"):
        attention(q, k, v, backend="chunked", dropout=0.5, key=keys[0])


@pytest.mark.parametrize("mesh", [None, (2, 1, 2)])
@pytest.mark.parametrize("causal", [True, False])
def test_splash_equals_the_reference_in_value_and_gradient(causal, mesh):
    """Runs the kernel in its interpreter, on one device, and on each device's own examples and heads."""
    q, k, v = random_qkv(128, heads=2, size=32)
    weights = jax.random.normal(jax.random.key(9), q.shape)

    def value_and_grads(attend):
        return jax.jit(jax.value_and_grad(lambda q, k, v: jnp.sum(weights * attend(q, k, v)), (0, 1, 2)))(q, k, v)

    with contextlib.ExitStack() as stack:
        if mesh:
            stack.enter_context(jax.set_mesh(make_mesh(*mesh, devices=jax.devices()[:4])))
        ours = value_and_grads(lambda q, k, v: _tpu_kernel(q, k, v, "splash", causal, interpret=True))
    reference = value_and_grads(lambda q, k, v: attention(q, k, v, backend="reference", causal=causal))
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(reference), strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5)


@pytest.mark.parametrize("length", [64, 300])
def test_splash_takes_another_way_for_lengths_its_kernel_cannot_read(length):
    q, k, v = random_qkv(length)
    ours, reference = (attention(q, k, v, backend=backend) for backend in ("splash", "reference"))
    np.testing.assert_allclose(ours, reference, atol=2e-6)


def test_the_back_end_is_never_chosen_silently():
    def device(platform, **fields):
        return SimpleNamespace(platform=platform, device_kind=platform, **fields)

    cpu, tpu = device("cpu"), device("tpu")
    hopper, turing = (device("gpu", compute_capability=version) for version in ("9.0", "7.5"))
    rocm = device("gpu", compute_capability="gfx90a")
    assert resolve_backend("auto", hopper, "bfloat16", 8, 64, 1024) == "cudnn"
    for size in PRESETS.values():
        heads, head_size = size["num_heads"], size["width"] // size["num_heads"]
        assert resolve_backend("auto", tpu, "bfloat16", heads, head_size, size["seq_len"]) == "fused"
    v4 = SimpleNamespace(platform="tpu", device_kind="TPU v4")  # it has little VMEM
    assert [resolve_backend("auto", v4, "bfloat16", 8, size, 1024) for size in (64, 96, 128)] == [
        "fused",
        "splash",
        "fused",
    ]
    assert resolve_backend("auto", v4, "bfloat16", 8, 128, 2048) == "splash"
    assert resolve_backend("auto", tpu, "bfloat16", 7, 128, 1024) == "fused"  # heads of 128 need no other heads
    for heads, head_size, length in ((7, 64, 1024), (6, 96, 1024), (8, 64, 128), (8, 64, 8192), (8, 256, 1024)):
        assert resolve_backend("auto", tpu, "bfloat16", heads, head_size, length) == "splash"
        with pytest.raises(UserError, match=f"'fused' needs a TPU, .*this is tpu, .*{heads} heads of size {head_size}"):
            resolve_backend("fused", tpu, "bfloat16", heads, head_size, length)
    assert resolve_backend("splash", tpu, "float32", 8, 64, 1024) == "splash"
    for other, head_size in ((cpu, 64), (tpu, 10), (hopper, 64)):
        with pytest.raises(UserError, match="'splash' needs a TPU, a head size"):
            resolve_backend("splash", other, "bfloat16", 8, head_size, 1024)
    assert resolve_backend("auto", tpu, "bfloat16", 8, 64, 28 * 28) == "chunked"  # 784 is 6 blocks of 128 and a rest
    with pytest.raises(UserError, match="multiples of 128; this is tpu.* 64 and 784 positions"):
        resolve_backend("splash", tpu, "bfloat16", 8, 64, 28 * 28)
    for other, dtype, head_size in (
        (cpu, "float32", 64),
        (tpu, "bfloat16", 10),
        (hopper, "float32", 64),
        (hopper, "bfloat16", 10),
        (turing, "bfloat16", 64),
        (rocm, "bfloat16", 64),
    ):
        assert resolve_backend("auto", other, dtype, 8, head_size, 1024) == "chunked"
        with pytest.raises(UserError, match="'cudnn' needs an NVIDIA GPU"):
            resolve_backend("cudnn", other, dtype, 8, head_size, 1024)
    assert resolve_backend("reference", tpu, "bfloat16", 8, 64, 1024) == "reference"
    with pytest.raises(UserError, match="'flash'; choose"):
        resolve_backend("flash", hopper, "bfloat16", 8, 64, 1024)
    with pytest.raises(UserError, match="unknown attention back end 'flash'"):
        attention(*random_qkv(3), backend="flash")


def test_a_sequence_shorter_than_cudnns_tile_takes_another_way():
    q, k, v = random_qkv(63)
    np.testing.assert_array_equal(*(attention(q, k, v, backend=backend) for backend in ("cudnn", "reference")))


@pytest.mark.gpu
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("length", "size"), [(64, 32), (784, 64), (1024, 64), (1024, 96), (2304, 96), (4096, 128)])
def test_cudnn_equals_the_reference_in_value_and_gradient(length, size, causal):
    assert jax.devices()[0].platform == "gpu"
    q, k, v = (x.astype(jnp.bfloat16) for x in random_qkv(length, heads=2, size=size))

    def value_and_grads(backend):
        def total(q, k, v):
            return jnp.sum(attention(q, k, v, backend=backend, causal=causal).astype(jnp.float32) ** 2)

        return jax.value_and_grad(total, (0, 1, 2))(q, k, v)

    ours, reference = value_and_grads("cudnn"), value_and_grads("reference")
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(reference), strict=True):
        one, other = (np.asarray(x, np.float32) for x in (one, other))
        assert np.linalg.norm(one - other) <= 2e-2 * np.linalg.norm(other)
