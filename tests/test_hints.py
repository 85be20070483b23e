"""The suite checks type hints and broadcasts; without these checks a wrong hint would go unnoticed."""

import jax.numpy as jnp
import pytest
from jaxtyping import TypeCheckError

from igpt.loss import next_pixel


def test_arrays_of_the_wrong_shape_are_refused():
    next_pixel(jnp.zeros((2, 3, 5)), jnp.zeros((2, 3), jnp.int32))
    with pytest.raises(TypeCheckError, match="igpt.loss.next_pixel"):
        next_pixel(jnp.zeros((2, 3, 5)), jnp.zeros((2, 7), jnp.int32))


def test_a_broadcast_between_ranks_has_to_be_written_out():
    with pytest.raises(ValueError, match="jax_numpy_rank_promotion"):
        jnp.zeros((2, 3)) + jnp.zeros(3)
