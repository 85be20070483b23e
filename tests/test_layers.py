"""The layers: the norm by hand, one product in every platform's form, dropout's rate, and the table's gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from igpt.layers import Linear, Norm, dropout, rows_of


def test_the_norm_neither_centres_nor_shifts():
    x = jnp.array([[3.0, 4.0]])
    np.testing.assert_allclose(Norm(2, 1e-5)(x), x / np.sqrt(12.5 + 1e-5), rtol=1e-6)


@pytest.mark.parametrize("platform", ["cpu", "gpu", ""])
@pytest.mark.parametrize(
    ("equation", "shape", "bias", "flat"),
    [("...d,df->...f", (5, 7), (7,), None), ("...d,dch->...ch", (5, 3, 2, 3), (3, 2, 3), (5, 3, 6))],
    ids=["one product", "queries, keys and values"],
)
def test_the_product_is_the_same_in_the_form_of_every_platform(platform, equation, shape, bias, flat):
    linear = Linear(equation, shape, 1.0, bias, nnx.Rngs(0), flat=flat, platform=platform)
    linear.bias[...] = jnp.arange(linear.bias[...].size).reshape(bias)
    x = jax.random.normal(jax.random.key(1), (2, 11, 5))
    kernel = np.asarray(linear.kernel[...], np.float64).reshape(5, -1)
    expected = np.asarray(x, np.float64) @ kernel + np.arange(kernel.shape[1])
    np.testing.assert_allclose(linear(x).reshape(2, 11, -1), expected, rtol=0, atol=1e-5)


def test_dropout_drops_at_its_rate_and_keeps_the_mean():
    x = dropout(jnp.ones((100, 1000)), 0.25, jax.random.key(0))
    np.testing.assert_allclose(np.unique(x), [0.0, 1 / 0.75], rtol=1e-6)
    np.testing.assert_allclose([np.mean(x == 0.0), np.mean(x)], [0.25, 1.0], atol=0.01)
    np.testing.assert_array_equal(dropout(x, 0.25, None), x)


def test_the_gradient_of_a_table_sums_the_rows_of_equal_ids():
    rng = np.random.default_rng(0)
    ids, d_rows = jnp.asarray(rng.integers(0, 5, (3, 11))), jax.random.normal(jax.random.key(0), (3, 11, 2))
    table = jax.random.normal(jax.random.key(1), (7, 2))
    rows, backward = jax.vjp(lambda table: rows_of(table, ids), table)
    expected = np.zeros((7, 2))
    np.add.at(expected, ids, d_rows)
    np.testing.assert_array_equal(rows, np.asarray(table)[ids])
    np.testing.assert_allclose(backward(d_rows)[0], expected, rtol=0, atol=1e-5)
