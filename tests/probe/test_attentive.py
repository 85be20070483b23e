"""Attentive probes: the formula and the gradient of a reference by hand, and what only attention can tell apart."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import probe_digits
from igpt.errors import UserError
from igpt.probe.attentive import (
    AttentiveClassifiers,
    Pooler,
    _descend,
    by_position,
    fit_attentive,
    gain_of,
    logits,
    objective,
)
from igpt.probe.config import AdamW, ProbeConfig
from igpt.probe.features import Features
from igpt.probe.fit import fit_probe
from igpt.probe.logistic import Scale
from igpt.sharding import make_mesh

ONE = make_mesh(1, 1, 1, devices=jax.devices()[:1])
POSITIONS, WIDTH, QUERIES, CLASSES, RATES = 5, 7, 3, 4, 2
RNG = np.random.default_rng(0)
PARAMS = Pooler(
    *(
        RNG.normal(size=shape).astype(np.float32)
        for shape in ((RATES, QUERIES, WIDTH), (RATES, QUERIES, WIDTH, CLASSES), (RATES, CLASSES))
    )
)
ROWS = RNG.normal(size=(11, POSITIONS, WIDTH)).astype(np.float32)
TARGETS = RNG.integers(0, CLASSES, 11).astype(np.int32)
GAIN = RNG.uniform(0.5, 2.0, WIDTH).astype(np.float32)


def by_hand(params, image) -> np.ndarray:
    """The logits of one classifier for one image [T, D], in float64, query after query."""
    query, kernel, bias = (x.astype(np.float64) for x in params)
    found = bias.copy()
    for u, weights_of_classes in zip(query, kernel, strict=True):
        shares = np.exp([u @ position / np.sqrt(WIDTH) for position in image.astype(np.float64)])
        mean = sum(share * position for share, position in zip(shares / shares.sum(), image, strict=True))
        found += mean @ weights_of_classes
    return found


def loss_by_hand(params) -> float:
    total = 0.0
    for r in range(RATES):
        of_one = Pooler(*(x[r] for x in params))
        of_one = of_one._replace(kernel=of_one.kernel * GAIN[:, None])
        for image, target in zip(ROWS, TARGETS, strict=True):
            found = by_hand(of_one, image)
            total += (np.log(np.exp(found).sum()) - found[target]) / len(ROWS)
    return total


def test_the_logits_are_those_of_a_reference_by_hand():
    expected = [[by_hand(Pooler(*(x[r] for x in PARAMS)), image) for image in ROWS] for r in range(RATES)]
    np.testing.assert_allclose(logits(PARAMS, jnp.asarray(ROWS)), expected, rtol=0, atol=1e-5)
    scale = Scale(np.zeros(WIDTH, np.float32), np.ones(WIDTH, np.float32))
    found = AttentiveClassifiers(PARAMS, scale, np.array([True, True])).predict(ROWS.reshape(11, -1))
    np.testing.assert_array_equal(found, np.argmax(expected, axis=-1))


def test_the_gradient_is_that_of_finite_differences():
    gradient = jax.grad(objective)(PARAMS, jnp.asarray(ROWS), jnp.asarray(TARGETS), GAIN)
    for name, index in (("query", (1, 2, 3)), ("kernel", (0, 1, 4, 2)), ("bias", (1, 3))):
        around = []
        for sign in (1, -1):
            moved = getattr(PARAMS, name).astype(np.float64)
            moved[index] += sign * 1e-5
            around.append(loss_by_hand(PARAMS._replace(**{name: moved})))
        assert getattr(gradient, name)[index] == pytest.approx((around[0] - around[1]) / 2e-5, abs=1e-5)


def test_a_first_step_is_adamws():
    rates, decay = np.float32([0.1, 0.01]), np.float32([0.5])
    zeros = jax.tree.map(np.zeros_like, PARAMS)
    state = optax.ScaleByAdamState(np.int32(0), zeros, zeros)
    params, _ = _descend((PARAMS, state), ROWS[None], TARGETS[None], decay, rates, np.float32(0.2), GAIN)
    gradient = jax.grad(objective)(PARAMS, jnp.asarray(ROWS), jnp.asarray(TARGETS), GAIN)
    for name, weight_decay in (("query", 0.0), ("kernel", 0.2), ("bias", 0.0)):
        before, slope = getattr(PARAMS, name), np.asarray(getattr(gradient, name), np.float64)
        rate = 0.5 * rates.reshape(-1, *[1] * (before.ndim - 1))
        expected = before - rate * (slope / (np.abs(slope) + 1e-8) + weight_decay * before)
        np.testing.assert_allclose(getattr(params, name), expected, rtol=0, atol=1e-4)


def test_the_gain_makes_means_over_positions_as_large_as_those_of_a_probe_of_means(monkeypatch):
    monkeypatch.setattr("igpt.probe.attentive.NUMBERS_AT_ONCE", 3 * POSITIONS * WIDTH)  # several chunks
    features = (5 * ROWS + 40).reshape(11, -1)
    features[:, ::WIDTH] = 7.0  # a channel without content
    scale = Scale.of(features.reshape(-1, WIDTH))
    means = by_position(scale)(features).mean(axis=1) * gain_of(features, scale)
    np.testing.assert_allclose(means.std(axis=0), [0.0] + [1.0] * (WIDTH - 1), rtol=0, atol=1e-5)


def needles(count, seed):
    """Images whose class is a direction at one random position; other positions hold larger noise without a mark."""
    rng = np.random.default_rng(seed)
    labels, places = rng.integers(0, 3, count).astype(np.int32), rng.integers(0, 24, count)
    rows = 2 * rng.normal(size=(count, 24, 6))
    rows[..., 0] = 0.0
    rows[np.arange(count), places] = np.concatenate(
        [np.full((count, 1), 4.0), np.zeros((count, 2)), np.eye(3)[labels]], 1
    )
    rows[..., 1:3] = 2 * rng.normal(size=(count, 24, 2))
    return Features({0: (50 * rows + 300).reshape(count, 1, -1).astype(np.float32)}, labels, positions=24)


def pooled(part):
    return Features({0: part.mean(0)}, part.labels)


def config(pool, *rates, steps=250):
    settings = ProbeConfig.of(probe_digits.get_config())
    return dataclasses.replace(
        settings, pool=pool, attention=AdamW(rates, steps, 64, 0.01), inverse_penalties=(0.1, 1.0)
    )


def test_attention_finds_the_position_that_a_mean_drowns():
    parts = [needles(count, seed) for seed, count in enumerate((600, 100, 200))]
    result = fit_probe(parts, [0], config("attention", 0.1, 1e-4), ONE)
    linear = fit_probe([pooled(part) for part in parts], [0], config("mean", 0.03), ONE)
    assert result["solver"] == "adamw" and result["learning_rate"] == 0.1 and result["converged"]
    assert result["test_accuracy"] > 0.9 > 0.7 > linear["test_accuracy"]


def test_the_mesh_and_the_number_of_steps_in_a_call_change_nothing(monkeypatch):
    train = needles(70, 0)
    examples = train.layers[0][:, 0], train.labels, 3, 24, 2, AdamW((0.01, 0.03), 9, 16, 0.1), 0
    one, eight = (fit_attentive(*examples, mesh) for mesh in (ONE, make_mesh(2, 2, 2)))
    monkeypatch.setattr("igpt.probe.attentive.NUMBERS_AT_ONCE", 2 * 16 * 24 * 6)
    few = fit_attentive(*examples, ONE)
    for other in (eight, few):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), one.params, other.params)
    assert not np.allclose(one.params.query[:, 0], one.params.query[:, 1])  # two queries learn two things
    with pytest.raises(UserError, match="attention.batch_size 16 does not divide|attention.batch_size 15"):
        fit_attentive(*examples[:5], AdamW((0.01,), 9, 15, 0.1), 0, make_mesh(2, 2, 2))


def test_a_rate_that_diverges_predicts_no_class_and_is_never_chosen():
    parts = [needles(count, seed) for seed, count in enumerate((90, 30, 30))]
    result = fit_probe(parts, [0], config("attention", 1e30, 0.01, steps=5), ONE)
    assert result["learning_rate"] == 0.01 and result["converged"]


def test_layers_join_position_by_position():
    a, b = needles(4, 0).layers[0], needles(4, 1).layers[0]
    joined = Features({0: a, 3: b}, np.zeros(4, np.int32), positions=24).joined([0, 3]).reshape(4, 24, 12)
    np.testing.assert_array_equal(joined[..., :6], a.reshape(4, 24, 6))
    np.testing.assert_array_equal(joined[..., 6:], b.reshape(4, 24, 6))


def test_features_are_standardised_channel_by_channel():
    rows = needles(50, 0).layers[0][:, 0]
    scaled = by_position(Scale.of(rows.reshape(-1, 6)))(rows)
    np.testing.assert_allclose(scaled.mean(axis=(0, 1)), 0, atol=1e-4)
    np.testing.assert_allclose(scaled.std(axis=(0, 1)), 1, atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(pool="attention", solver="lbfgs"), "solver is 'lbfgs', but pool=attention is trained with AdamW"),
        (dict(pool="attention:2", solver="sgd"), "set solver=auto, or pool=mean"),
        (dict(pool="attention:0"), "pool is 'attention:0'; choose mean, grid:G"),
        (dict(pool="grid"), "pool is 'grid'; choose mean"),
        (dict(pool="mean:2"), "attention:H for H learnt queries"),
        (dict(attention=dict(steps=0)), "attention.steps is 0"),
        (dict(attention=dict(learning_rates=())), "attention.learning_rates is"),
    ],
)
def test_what_does_not_fit_attention_is_refused(changes, message):
    wrong = probe_digits.get_config()
    wrong.update(changes)
    with pytest.raises(UserError, match=message):
        ProbeConfig.of(wrong)
