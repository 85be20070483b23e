"""Drawing a token: which ones top-k and top-p keep, which settings and seeds are refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from igpt.draw import Sampling, image_keys, kth_largest, truncate
from igpt.errors import UserError


def test_top_k_keeps_the_k_largest():
    logits = jax.random.normal(jax.random.key(0), (5, 11))
    kept = np.isfinite(truncate(logits, top_k=3, top_p=1.0))
    np.testing.assert_array_equal(kept, np.argsort(np.argsort(-logits)) < 3)
    np.testing.assert_array_equal(truncate(logits, 0, 1.0), logits)
    np.testing.assert_array_equal(truncate(logits, 99, 1.0), logits)


def test_the_kth_largest_is_that_of_a_sort_also_with_ties_zeros_and_infinities():
    logits = (np.random.default_rng(0).normal(size=(50, 37)) * 10.0 ** np.arange(-25, 25)[:, None]).astype(np.float32)
    logits[3] = np.round(logits[3])  # ties
    logits[4, ::3], logits[5, ::2], logits[6, 5:] = -np.inf, np.inf, 0.0
    logits[7, :20], logits[7, 20:] = 0.0, -0.0
    for k in (1, 2, 20, 37):
        np.testing.assert_array_equal(kth_largest(jnp.asarray(logits), k)[:, 0], np.sort(logits)[:, -k])


def test_rules_that_keep_every_token_are_one_program():
    assert [Sampling(top_k=top_k).rules(17)[2] for top_k in (0, 16, 17, 600)] == [0, 16, 0, 0]


def test_top_p_keeps_the_smallest_set_of_that_mass():
    probability = np.array([[0.05, 0.4, 0.25, 0.3]])
    for top_p, kept in ((0.3, [1]), (0.4, [1]), (0.41, [1, 3]), (0.7, [1, 3]), (0.75, [1, 2, 3]), (0.99, [0, 1, 2, 3])):
        found = np.flatnonzero(np.isfinite(truncate(jnp.log(probability), 0, top_p)[0]))
        np.testing.assert_array_equal(found, kept)


@pytest.mark.parametrize(
    "settings",
    [
        *({"temperature": value} for value in (-1.0, float("nan"), float("inf"))),
        *({"top_k": value} for value in (-1, 1.5, float("nan"), float("inf"))),
        *({"top_p": value} for value in (0.0, 1.5, float("nan"))),
    ],
    ids=str,
)
def test_impossible_settings_are_refused(settings):
    with pytest.raises(UserError, match=f"{next(iter(settings))} is"):
        Sampling(**settings)


@pytest.mark.parametrize("top_p", [1e-39, 1e-45, 1e-9])
def test_a_tiny_share_still_keeps_the_likeliest_token(top_p):
    logits = jnp.log(jnp.array([[0.1, 0.6, 0.3]]))
    np.testing.assert_array_equal(jnp.isfinite(truncate(logits, 0, top_p)), [[False, True, False]])


@pytest.mark.parametrize("seed", [-1, 2**32, 2**64])
def test_seeds_that_would_repeat_others_are_refused(seed):
    with pytest.raises(UserError, match=f"seed is {seed}; it must be a whole number from 0 to 4294967295"):
        image_keys(seed, 2)
    assert (jax.random.key_data(image_keys(2**32 - 1, 1)) != jax.random.key_data(image_keys(0, 1))).any()


def test_a_whole_seed_may_be_a_float():
    np.testing.assert_array_equal(jax.random.key_data(image_keys(3.0, 2)), jax.random.key_data(image_keys(3, 2)))
