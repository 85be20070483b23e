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


def by_newton_schulz(matrix):
    """Five iterations of Jordan et al. 2024 in float64: singular values come near to 1."""
    x = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x = x / np.linalg.norm(x)
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.775 * a + 2.0315 * a @ a) @ x
    return x.T if matrix.shape[0] > matrix.shape[1] else x


def test_the_first_update_of_muon_is_that_by_hand_for_each_matrix_of_the_blocks():
    L, D, N, K, F = 2, 6, 2, 3, 24
    shapes = {"qkv": (L, D, 3, N, K), "out": (L, N, K, D), "up": (L, D, F), "down": (L, F, D)}
    rng = np.random.default_rng(0)
    grads = {"blocks": {name: {"kernel": rng.normal(size=shape)} for name, shape in shapes.items()}}
    params = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), grads)
    optimizer, _ = make_optimizer(optim_config(name="muon", learning_rate=0.1, schedule="constant"), steps=9)
    inputs = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), grads)
    updates, _ = optimizer.update(inputs, optimizer.init(params), params, loss=jnp.ones(()))

    def matrices(tree):  # of layer 1, as what a product sums over times what it makes
        qkv, out, up, down = (np.asarray(tree["blocks"][name]["kernel"])[1] for name in shapes)
        return [*(qkv[:, i].reshape(D, N * K) for i in range(3)), out.reshape(N * K, D), up, down]

    for found, grad in zip(matrices(updates), matrices(grads), strict=True):
        expected = -0.1 * 0.2 * np.sqrt(max(grad.shape)) * by_newton_schulz(grad)
        np.testing.assert_allclose(found, expected, atol=1e-4)


def test_muon_leaves_all_but_the_blocks_kernels_to_adam():
    settings = dict(learning_rate=0.1, schedule="constant")
    optimizer, _ = make_optimizer(optim_config(name="muon", **settings), steps=9)
    adam = optax.nadamw(0.1, b1=0.9, b2=0.95, weight_decay=0.0)
    params = {"head": {"kernel": jnp.ones((3, 4))}, "blocks": {"up": {"bias": jnp.ones((2, 4))}}}
    grads = jax.tree.map(lambda x: jnp.arange(x.size, dtype=jnp.float32).reshape(x.shape) - 3, params)
    found, _ = optimizer.update(grads, optimizer.init(params), params, loss=jnp.ones(()))
    expected, _ = adam.update(grads, adam.init(params), params)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


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
        ({"eps": 0.0}, "eps is 0.0; it must be above 0"),
        ({"b2": 1.0}, r"b2 is 1.0; it must lie in \[0, 1\)"),
        ({"schedule": "linear"}, "'linear'; choose cosine, constant"),
        ({"name": "sgd"}, "optim.name is 'sgd'; choose adam, muon"),
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
