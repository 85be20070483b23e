import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from igpt.errors import UserError
from igpt.optim import make_optimizer
from tests.helpers import optim_config


def test_the_rate_rises_to_its_peak_and_falls_to_zero():
    _, schedule = make_optimizer(optim_config(learning_rate=0.5, warmup_steps=10), steps=100)
    rates = np.array([schedule(step) for step in range(101)])
    assert 0 < rates[0] < 0.06
    assert rates.argmax() == 10 and np.isclose(rates[10], 0.5)
    assert (np.diff(rates[:11]) > 0).all() and (np.diff(rates[10:]) < 0).all()
    assert np.isclose(rates[55], 0.25) and np.isclose(rates[100], 0.0)


def test_a_run_shorter_than_its_warm_up_still_comes_down():
    _, schedule = make_optimizer(optim_config(learning_rate=0.5, warmup_steps=99), steps=20)
    rates = np.array([schedule(step) for step in range(21)])
    assert rates.argmax() == 10 and np.isclose(rates[20], 0.0)


def test_a_constant_schedule_stays():
    _, schedule = make_optimizer(optim_config(learning_rate=0.5, schedule="constant"), steps=100)
    assert schedule(0) == schedule(99) == 0.5


def test_an_update_is_adam_by_hand():
    optimizer, _ = make_optimizer(optim_config(learning_rate=0.1, schedule="constant"), steps=9)
    params, moments = {"head": {"kernel": jnp.array([1.0, -2.0])}}, [np.zeros(2), np.zeros(2)]
    state, value = optimizer.init(params), np.array([1.0, -2.0])
    for step in range(1, 4):
        grad = value * step
        updates, state = optimizer.update({"head": {"kernel": jnp.asarray(grad)}}, state, params, loss=jnp.ones(()))
        params = optax.apply_updates(params, updates)
        moments = [0.9 * moments[0] + 0.1 * grad, 0.95 * moments[1] + 0.05 * grad**2]
        value = value - 0.1 * (moments[0] / (1 - 0.9**step)) / (np.sqrt(moments[1] / (1 - 0.95**step)) + 1e-8)
        np.testing.assert_allclose(params["head"]["kernel"], value, rtol=1e-5)


def test_weight_decay_touches_kernels_only():
    optimizer, _ = make_optimizer(optim_config(weight_decay=0.1), steps=9)
    params = {
        "up": {"kernel": jnp.ones(2), "bias": jnp.ones(2)},
        "norm": {"gain": jnp.ones(2)},
        "token_table": jnp.ones(2),
    }
    updates, _ = optimizer.update(optax.tree.zeros_like(params), optimizer.init(params), params, loss=jnp.ones(()))
    assert (updates["up"]["kernel"] < 0).all()
    for untouched in (updates["up"]["bias"], updates["norm"]["gain"], updates["token_table"]):
        assert (untouched == 0).all()


def test_clipping_bounds_the_gradient_that_adam_sees():
    clipped, _ = make_optimizer(optim_config(clip_norm=1.0, eps=1.0), steps=9)
    free, _ = make_optimizer(optim_config(eps=1.0), steps=9)
    params = {"head": {"kernel": jnp.zeros(2)}}
    large, unit = ({"head": {"kernel": jnp.array(g)}} for g in ([30.0, 40.0], [0.6, 0.8]))
    ours, _ = clipped.update(large, clipped.init(params), params, loss=jnp.ones(()))
    expected, _ = free.update(unit, free.init(params), params, loss=jnp.ones(()))
    np.testing.assert_allclose(ours["head"]["kernel"], expected["head"]["kernel"], rtol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"learning_rate": 0.0}, "learning_rate is 0.0"),
        ({"b2": 1.0}, r"b2 is 1.0; it must lie in \[0, 1\)"),
        ({"schedule": "linear"}, "'linear'; choose cosine, constant"),
    ],
)
def test_impossible_settings_are_refused(change, message):
    with pytest.raises(UserError, match=message):
        optim_config(**change)


def trained(losses, grads=None, **changes):
    """The parameter (one number) after each update, and the last state. Its gradient is 1 unless one is given."""
    optimizer, _ = make_optimizer(optim_config(learning_rate=0.1, schedule="constant", **changes), steps=999)
    params = {"head": {"kernel": jnp.ones(1)}}
    state, found = optimizer.init(params), []
    update = jax.jit(optimizer.update)
    for loss, grad in zip(losses, grads or [1.0] * len(losses), strict=True):
        tree = {"head": {"kernel": jnp.full(1, grad, jnp.float32)}}
        updates, state = update(tree, state, params, loss=jnp.float32(loss))
        params = optax.apply_updates(params, updates)
        found.append(float(params["head"]["kernel"][0]))
    return found, state


@pytest.mark.parametrize(("loss", "grad"), [(np.nan, 1.0), (np.inf, 1.0), (1.0, np.nan), (1.0, -np.inf)])
def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(loss, grad):
    without, state_without = trained([2.0] * 4)
    with_it, state = trained([2.0, 2.0, loss, 2.0, 2.0], [1.0, 1.0, grad, 1.0, 1.0])
    assert with_it == [*without[:2], without[1], *without[2:]]
    assert state.skipped == 1 and state.updates == 4
    jax.tree.map(np.testing.assert_array_equal, state._replace(skipped=jnp.int32(0)), state_without)
