import jax
import jax.numpy as jnp
import numpy as np
import pytest

from igpt import chunked
from igpt.attention import attention


def random_qkv(length, batch=2, heads=3, size=5):
    return jax.random.normal(jax.random.key(0), (3, batch, length, heads, size))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("length", [1, 7, 8, 23, 32, 40, 45])  # shorter than a block, whole blocks, a rest; in a loop
def test_chunked_equals_the_reference_in_value_and_gradient(monkeypatch, length, causal):
    monkeypatch.setattr(chunked, "BLOCK", 8)
    q, k, v = random_qkv(length)
    weights = jax.random.normal(jax.random.key(9), q.shape)

    def value_and_grads(backend):
        def weighted(q, k, v):
            return jnp.sum(weights * attention(q, k, v, backend=backend, causal=causal))

        value = jax.jit(lambda q, k, v: attention(q, k, v, backend=backend, causal=causal))
        return value(q, k, v), *jax.jit(jax.grad(weighted, (0, 1, 2)))(q, k, v)

    for ours, reference in zip(value_and_grads("chunked"), value_and_grads("reference"), strict=True):
        np.testing.assert_allclose(ours, reference, atol=2e-6)


def test_blocks_above_the_diagonal_are_not_computed():
    q, k, v = random_qkv(16 * chunked.BLOCK, batch=1, heads=1)

    def product_flops(backend):
        """FLOPs of the matrix products in the traced program, before any compiler changes it."""
        jaxpr = jax.make_jaxpr(lambda q, k, v: attention(q, k, v, backend=backend))(q, k, v)
        return count_dot_flops(jaxpr.jaxpr)

    assert product_flops("chunked") == product_flops("reference") * 17 // 32  # 1 + 2 + ... + 16 of 16 x 16 blocks


def count_dot_flops(jaxpr) -> int:
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            total += 2 * equation.outvars[0].aval.size * int(np.prod([left[axis] for axis in contracted]))
        times = equation.params.get("length", 1)  # of a scan
        for value in equation.params.values():
            inner = [getattr(part, "jaxpr", part) for part in (value if isinstance(value, tuple) else (value,))]
            inner = [part for part in inner if hasattr(part, "eqns")]
            # A loop over a switch takes each branch once: on average, one of them in each round.
            total += times * sum(map(count_dot_flops, inner)) // max(1, len(inner))
    return total


def test_memory_grows_with_the_length_and_not_with_its_square():
    def temporaries(backend, blocks):
        q, k, v = random_qkv(blocks * chunked.BLOCK, batch=1, heads=4)

        def loss(q, k, v):
            return jnp.sum(attention(q, k, v, backend=backend) ** 2)

        return jax.jit(jax.grad(loss, (0, 1, 2))).lower(q, k, v).compile().memory_analysis().temp_size_in_bytes

    assert temporaries("chunked", 16) < 2.2 * temporaries("chunked", 8)
    assert temporaries("reference", 16) > 3.5 * temporaries("reference", 8)
    assert temporaries("chunked", 16) < 0.1 * temporaries("reference", 16)
