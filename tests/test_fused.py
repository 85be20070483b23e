"""The fused kernels of TPUs, in their interpreter: values and gradients are those of the reference."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from igpt import fused
from igpt.attention import _tpu_kernel, attention
from igpt.sharding import make_mesh


def random_qkv(length, heads, head_size, batch=2, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 3)
    return tuple(jax.random.normal(key, (batch, length, heads, head_size), dtype) for key in keys)


def value_and_grads(attend, qkv):
    """The output, and the gradients of its sum with random weights."""
    weights = jax.random.normal(jax.random.key(9), qkv[0].shape)

    def weigh(q, k, v):
        out = attend(q, k, v)
        return jnp.sum(weights * out), out

    grads, out = jax.jit(jax.grad(weigh, (0, 1, 2), has_aux=True))(*qkv)
    return out, *grads


def assert_equals_the_reference(qkv, causal=True, mesh=None, backend="fused"):
    reference = value_and_grads(lambda q, k, v: attention(q, k, v, backend="reference", causal=causal), qkv)
    with contextlib.ExitStack() as stack:
        if mesh:
            stack.enter_context(jax.set_mesh(make_mesh(*mesh, devices=jax.devices()[:4])))
        ours = value_and_grads(lambda q, k, v: _tpu_kernel(q, k, v, backend, causal, interpret=True), qkv)
    for one, other in zip(ours, reference, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


# One head of 128 fills a group, two of 64, four of 96 or 32. Two and three groups show that groups do not mix.
SIZES = [(6, 64), (3, 128), (8, 96), (4, 32)]


@pytest.mark.parametrize(
    ("heads", "head_size", "causal"), [*((*size, True) for size in SIZES), (*SIZES[0], False), (*SIZES[-1], False)]
)
def test_values_and_gradients_equal_the_reference(monkeypatch, heads, head_size, causal):
    monkeypatch.setattr(fused, "BLOCK", 32)
    assert_equals_the_reference(random_qkv(96, heads, head_size), causal)


def test_blocks_that_are_scheduled_apart_give_the_same(monkeypatch):
    monkeypatch.setattr(fused, "BLOCK", 32)
    monkeypatch.setattr(fused, "ONE_REGION", 64)
    assert_equals_the_reference(random_qkv(96, 4, 96))


@pytest.mark.slow
@pytest.mark.parametrize("length", [1024, 2304, 4096])
@pytest.mark.parametrize(("heads", "head_size"), [(2, 64), (1, 128), (4, 96)])
def test_values_and_gradients_equal_the_reference_at_published_lengths(heads, head_size, length):
    assert_equals_the_reference(random_qkv(length, heads, head_size, batch=1))


def test_each_device_computes_its_own_examples_and_heads(monkeypatch):
    monkeypatch.setattr(fused, "BLOCK", 128)
    assert_equals_the_reference(random_qkv(128, 4, 64), mesh=(2, 1, 2))


def test_splash_takes_over_where_a_device_has_no_whole_group(monkeypatch):
    monkeypatch.setattr(fused, "BLOCK", 128)
    monkeypatch.setattr(fused, "fused_attention", None)  # calling it would fail
    assert_equals_the_reference(random_qkv(128, 4, 96), mesh=(2, 1, 2))


def test_no_position_sees_what_follows_it(monkeypatch):
    monkeypatch.setattr(fused, "BLOCK", 8)
    q, k, v = random_qkv(24, 1, 128, batch=1)

    def influence(argument):
        def sums(x):
            qkv = [q, k, v]
            qkv[argument] = x
            return fused.fused_attention(*qkv, causal=True, interpret=True).sum(axis=(0, 2, 3))

        return np.abs(jax.jit(jax.jacrev(sums))((q, k, v)[argument])).sum(axis=(1, 3, 4))  # [T out, T in]

    for keys_or_values in (1, 2):
        found = influence(keys_or_values)
        assert (np.triu(found, 1) == 0).all() and (np.diag(found)[1:] > 0).all()


def test_bfloat16_heads_give_bfloat16_results_near_the_reference(monkeypatch):
    monkeypatch.setattr(fused, "BLOCK", 32)
    narrow = random_qkv(96, 2, 64, dtype=jnp.bfloat16)
    ours = value_and_grads(lambda q, k, v: fused.fused_attention(q, k, v, True, interpret=True), narrow)
    wide = value_and_grads(lambda q, k, v: attention(q, k, v, backend="reference"), [x.astype(float) for x in narrow])
    for one, other in zip(ours, wide, strict=True):
        assert one.dtype == jnp.bfloat16
        assert np.linalg.norm(one.astype(jnp.float32) - other) < 0.01 * np.linalg.norm(other)
