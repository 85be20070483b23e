import jax
import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_info, threadpool_limits

from igpt.probe import newton
from igpt.probe.logistic import TOLERANCE, Scale, fit_lbfgs
from igpt.probe.newton import fit_newton
from igpt.sharding import make_mesh
from tests.probe.test_logistic import CLASSES, TEST, TRAIN, overlapping

ONE = make_mesh(1, 1, 1, devices=jax.devices()[:1])
PENALTIES = (0.01, 0.1, 1.0, 10.0, 300.0)


def objective(kernel, bias, C, features, labels):
    """The mean cross-entropy plus the penalty of a classifier, and its largest gradient, in float64."""
    rows = Scale.of(features)(features).astype(np.float64)
    kernel, bias = kernel.astype(np.float64), bias.astype(np.float64)
    logits = rows @ kernel + bias
    logits -= logits.max(axis=1, keepdims=True)
    sums = np.exp(logits).sum(axis=1)
    off = (np.exp(logits) / sums[:, None] - np.eye(kernel.shape[1])[labels]) / len(labels)
    loss = np.mean(np.log(sums) - logits[np.arange(len(labels)), labels])
    penalty = np.square(kernel).sum() / (2 * C * len(labels))
    gradient = np.abs(rows.T @ off + kernel / (C * len(labels))).max(), np.abs(off.sum(axis=0)).max()
    return loss + penalty, max(gradient)


def peer(C, features, labels):
    rows = Scale.of(features)(features).astype(np.float64)
    return LogisticRegression(C=C, tol=1e-7, max_iter=20_000).fit(rows, labels)


@pytest.mark.parametrize("count", [1203, 31], ids=["overlapping", "separable"])
def test_newton_finds_the_optimum_of_scikit_learn_for_every_penalty(count):
    examples = TRAIN[0][:count], TRAIN[1][:count]
    ours = fit_newton(*examples, CLASSES, PENALTIES, 1000)
    assert ours.converged.all()
    for C, kernel, bias in zip(PENALTIES, ours.kernel, ours.bias, strict=True):
        best = peer(C, *examples)
        value, gradient = objective(kernel, bias, C, *examples)
        optimum, _ = objective(best.coef_.T, best.intercept_, C, *examples)
        assert gradient <= 1.1 * TOLERANCE and value - optimum <= 1e-6
        np.testing.assert_allclose(kernel, best.coef_.T, atol=0.02 * np.abs(best.coef_).max())


def test_newton_and_lbfgs_fit_the_same_classifiers():
    ours, lbfgs = fit_newton(*TRAIN, CLASSES, (0.01, 0.1), 1000), fit_lbfgs(*TRAIN, CLASSES, (0.01, 0.1), 1000, ONE)
    np.testing.assert_allclose(ours.kernel, lbfgs.kernel, atol=0.01 * np.abs(ours.kernel).max())
    assert (ours.predict(TEST[0]) == lbfgs.predict(TEST[0])).mean() > 0.998


def test_more_features_than_examples_constants_and_a_missing_spread_are_no_obstacle():
    features, labels = overlapping(60, seed=3, width=97)
    features[:, 5], features[:, 6] = 3.3, features[:, 7]  # a constant, and a copy
    ours = fit_newton(features, labels, CLASSES, (0.1, 1e6), 1000)
    assert ours.converged.all() and np.abs(ours.kernel[:, 5]).max() < 1e-6
    for C, kernel, bias in zip((0.1, 1e6), ours.kernel, ours.bias, strict=True):
        assert objective(kernel, bias, C, features, labels)[1] <= 1.1 * TOLERANCE
    one_class = fit_newton(features, np.zeros(60, np.int32), 1, (1.0,), 1000)
    assert one_class.converged.all() and (one_class.predict(features) == 0).all()


def test_the_order_of_the_penalties_changes_nothing():
    forward, backward = (fit_newton(*TRAIN, CLASSES, Cs, 1000) for Cs in (PENALTIES, PENALTIES[::-1]))
    np.testing.assert_array_equal(forward.kernel, backward.kernel[::-1])
    np.testing.assert_array_equal(forward.bias, backward.bias[::-1])


def test_newton_takes_few_steps_for_all_penalties(monkeypatch):
    steps, step = [], newton.Problem.newton_step
    monkeypatch.setattr(newton.Problem, "newton_step", lambda *args: steps.append(1) or step(*args))
    fit_newton(*TRAIN, CLASSES, PENALTIES, 1000)
    warm = len(steps)
    for C in PENALTIES:
        fit_newton(*TRAIN, CLASSES, (C,), 1000)
    assert warm <= 6 * len(PENALTIES) and warm < len(steps) - warm  # each starts from the solution before


def test_newton_keeps_to_one_thread_and_repeats_every_bit(monkeypatch):
    threads, minimum = [], newton.Problem.minimum

    def watched(*args):
        threads.extend(pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas")
        return minimum(*args)

    monkeypatch.setattr(newton.Problem, "minimum", watched)
    with threadpool_limits(2):
        fits = [fit_newton(*TRAIN, CLASSES, PENALTIES, 1000) for _ in range(2)]
    assert set(threads) == {1}
    np.testing.assert_array_equal(*(fit.kernel for fit in fits))
    np.testing.assert_array_equal(*(fit.predict(TEST[0]) for fit in fits))


def test_every_process_takes_the_classifiers_of_process_0(monkeypatch):
    monkeypatch.setattr(newton, "broadcast", lambda values: values + 7)
    own = fit_newton(*TRAIN, CLASSES, (0.1,), 1000)
    monkeypatch.setattr(newton, "broadcast", lambda values: values)
    first = fit_newton(*TRAIN, CLASSES, (0.1,), 1000)
    np.testing.assert_array_equal(own.kernel, first.kernel + 7)
    np.testing.assert_array_equal(own.bias, first.bias + 7)
    assert first.converged.all() and not own.converged.any()


def test_newton_reports_when_it_had_too_few_iterations():
    assert fit_newton(*TRAIN, CLASSES, (100.0,), 2).converged.tolist() == [False]


def test_a_classifier_on_the_host_predicts_as_on_the_devices():
    ours = fit_newton(*TRAIN, CLASSES, PENALTIES, 1000)
    moved = ours._replace(kernel=jax.numpy.asarray(ours.kernel), bias=jax.numpy.asarray(ours.bias))
    assert (ours.predict(TEST[0]) == moved.predict(TEST[0])).mean() > 0.9999
    ours.kernel[1, 0, 0] = np.nan
    assert (ours.predict(TEST[0])[1] == -1).all() and (ours.predict(TEST[0])[0] >= 0).all()


def test_newton_reads_features_from_a_file(tmp_path):
    TRAIN[0].tofile(tmp_path / "features.f32")
    mapped = np.memmap(tmp_path / "features.f32", np.float32, "r", shape=TRAIN[0].shape)
    in_memory, in_file = (fit_newton(rows, TRAIN[1], CLASSES, (0.1,), 1000) for rows in (TRAIN[0], mapped))
    np.testing.assert_array_equal(in_memory.kernel, in_file.kernel)


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_features_that_are_not_finite_have_no_classifier(wrong):
    features = TRAIN[0].copy()
    features[3, 5] = wrong
    ours = fit_newton(features, TRAIN[1], CLASSES, PENALTIES, 1000)
    assert not ours.converged.any() and (ours.predict(TEST[0]) == -1).all()
    assert ours.kernel.shape == (len(PENALTIES), features.shape[1], CLASSES)
