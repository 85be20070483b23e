import warnings

import jax
import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from igpt.errors import UserError
from igpt.probe import logistic
from igpt.probe.config import SGD
from igpt.probe.logistic import Scale, fit_lbfgs, fit_sgd
from igpt.sharding import make_mesh

ONE = make_mesh(1, 1, 1, devices=jax.devices()[:1])
CLASSES = 5


def overlapping(count, seed, width=13):
    """Classes that no linear classifier separates, with correlated features of very different scale."""
    rng = np.random.default_rng(7)
    centres, mixing = rng.normal(size=(CLASSES, width)), rng.normal(size=(width, width))
    sizes, offsets = 10.0 ** rng.uniform(-2, 2, width), rng.normal(size=width)
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, CLASSES, count).astype(np.int32)
    features = (centres[labels] + 1.5 * rng.normal(size=(count, width))) @ mixing
    return ((features + offsets) * sizes).astype(np.float32), labels


TRAIN, TEST = overlapping(1203, seed=0), overlapping(2000, seed=1)
PENALTIES = (0.01, 0.1, 10.0)


def peer(C, features=TRAIN[0], labels=TRAIN[1]):
    scaler = StandardScaler().fit(features.astype(np.float64))
    model = LogisticRegression(C=C, tol=1e-6, max_iter=5000).fit(scaler.transform(features), labels)
    return scaler, model


def accuracies(classifiers, features=TEST[0], labels=TEST[1]):
    return (classifiers.predict(features) == labels).mean(axis=1)


def peer_accuracy(C):
    scaler, model = peer(C)
    return model.score(scaler.transform(TEST[0]), TEST[1])


def test_lbfgs_matches_scikit_learn_for_every_penalty():
    ours = fit_lbfgs(*TRAIN, CLASSES, PENALTIES, 1000, ONE)
    assert ours.converged.all()
    for C, kernel, bias, accuracy in zip(PENALTIES, ours.kernel, ours.bias, accuracies(ours), strict=True):
        _, model = peer(C)
        np.testing.assert_allclose(kernel, model.coef_.T, atol=0.01 * np.abs(model.coef_).max())
        np.testing.assert_allclose(bias - bias.mean(), model.intercept_ - model.intercept_.mean(), atol=0.01)
        assert abs(accuracy - peer_accuracy(C)) <= 0.002
    assert 0.4 < peer_accuracy(0.1) < 0.95  # the classes overlap, but differ


def test_for_two_classes_scikit_learns_c_is_twice_ours():
    rows = TRAIN[1] < 2
    features, labels = TRAIN[0][rows], TRAIN[1][rows]
    ours = fit_lbfgs(features, labels, 2, (0.05,), 1000, ONE)
    _, model = peer(0.1, features, labels)
    difference = ours.kernel[0, :, 1] - ours.kernel[0, :, 0]
    np.testing.assert_allclose(difference, model.coef_[0], atol=0.01 * np.abs(model.coef_).max())


def test_sgd_with_the_same_penalty_matches_scikit_learn_too():
    C, count = 0.1, len(TRAIN[0])
    ours = fit_sgd(*TRAIN, CLASSES, SGD((0.1, 0.3), 1500, 64, 1 / (C * count)), 0, ONE)
    assert np.abs(accuracies(ours) - peer_accuracy(C)).max() <= 0.002
    _, model = peer(C)
    np.testing.assert_allclose(ours.kernel[0], model.coef_.T, atol=0.05 * np.abs(model.coef_).max())


def by_lbfgs(mesh, features, labels):
    return fit_lbfgs(features, labels, int(labels.max()) + 1, (0.1, 1.0), 300, mesh)


def by_sgd(mesh, features, labels):
    return fit_sgd(features, labels, int(labels.max()) + 1, SGD((0.1, 0.3), 70, 32, 1e-3), 0, mesh)


@pytest.mark.parametrize("fit", [by_lbfgs, by_sgd])
@pytest.mark.parametrize("count", [203, 3])  # 203 is no multiple of the four device groups; 3 is less than four
def test_eight_devices_fit_the_same_as_one(fit, count):
    features, labels = TRAIN[0][:count], np.unique(TRAIN[1][:count], return_inverse=True)[1].astype(np.int32)
    one, eight = fit(ONE, features, labels), fit(make_mesh(2, 2, 2), features, labels)
    assert len(eight.kernel.sharding.device_set) == 8
    np.testing.assert_allclose(one.kernel, eight.kernel, atol=2e-3 * np.abs(one.kernel).max())
    np.testing.assert_allclose(one.bias, eight.bias, atol=2e-3 * np.abs(one.kernel).max())
    assert (one.predict(TEST[0]) == eight.predict(TEST[0])).mean() > 0.998


def test_lbfgs_spreads_its_rows_over_the_devices(monkeypatch):
    rows = []
    monkeypatch.setattr(
        logistic, "_minimise", lambda x, y, w, *_: rows.extend([x, y, w]) or ((np.zeros(1), np.zeros(1)), True)
    )
    by_lbfgs(make_mesh(2, 2, 2), TRAIN[0][:203], TRAIN[1][:203])
    assert {array.sharding.shard_shape(array.shape)[0] for array in rows} == {51}
    np.testing.assert_allclose(np.sum(rows[2]), 1.0, rtol=1e-5)  # the padding row has weight 0


def test_a_batch_that_the_mesh_does_not_divide_is_refused():
    with pytest.raises(UserError, match="sgd.batch_size 30 does not divide"):
        fit_sgd(*TRAIN, CLASSES, SGD((0.1,), 10, 30, 0.0), 0, make_mesh(2, 2, 2))


def test_the_number_of_sgd_steps_per_call_does_not_change_the_result(monkeypatch):
    whole = fit_sgd(*TRAIN, CLASSES, SGD((0.1,), 70, 32, 0.0), 0, ONE)
    monkeypatch.setattr(logistic, "STEPS_AT_ONCE", 11)
    np.testing.assert_allclose(
        fit_sgd(*TRAIN, CLASSES, SGD((0.1,), 70, 32, 0.0), 0, ONE).kernel, whole.kernel, atol=1e-5
    )


def test_sgd_sees_each_example_once_an_epoch_and_epochs_within_a_batch():
    few = TRAIN[0][:7], TRAIN[1][:7]
    # A batch of whole epochs has the mean gradient of all examples, whatever the order.
    orders = [fit_sgd(*few, CLASSES, SGD((0.1,), 5, 14, 0.0), seed, ONE).kernel for seed in (0, 1)]
    np.testing.assert_allclose(*orders, atol=1e-5)
    others = [fit_sgd(*few, CLASSES, SGD((0.1,), 5, 4, 0.0), seed, ONE).kernel for seed in (0, 1)]
    assert not np.allclose(*others, atol=1e-3)


def test_a_classifier_that_diverged_predicts_no_class_and_is_marked():
    ours = fit_sgd(*TRAIN, CLASSES, SGD((1e30, 0.1), 20, 32, 0.01), 0, ONE)
    assert ours.converged.tolist() == [False, True]
    found = ours.predict(TEST[0])
    assert (found[0] == -1).all() and (found[1] >= 0).all()


def test_lbfgs_reports_when_it_had_too_few_iterations():
    assert fit_lbfgs(*TRAIN, CLASSES, (100.0,), 2, ONE).converged.tolist() == [False]


@pytest.fixture
def mapped(tmp_path):
    """The training features in a file."""
    TRAIN[0].tofile(tmp_path / "features.f32")
    return np.memmap(tmp_path / "features.f32", np.float32, "r", shape=TRAIN[0].shape)


@pytest.mark.parametrize("rows", [100, 1 << 12])
def test_the_scale_matches_scikit_learn_for_constants_and_files_too(monkeypatch, mapped, rows):
    monkeypatch.setattr(logistic, "ROWS_AT_ONCE", rows)
    peer = StandardScaler().fit(TRAIN[0].astype(np.float64))
    scale = Scale.of(mapped)
    np.testing.assert_allclose(scale.mean, peer.mean_, rtol=1e-5)
    np.testing.assert_allclose(scale.std, peer.scale_, rtol=1e-5)
    np.testing.assert_allclose(scale(mapped), peer.transform(TRAIN[0]), atol=1e-4)

    odd = np.array([[3.3, 0.0, 1e4 + i / 8, 1e-8 * i] for i in range(300)], np.float32)
    scale, peer = Scale.of(odd), StandardScaler().fit(odd.astype(np.float64))
    assert scale.std[0] == scale.std[1] == 1.0
    np.testing.assert_allclose(scale.std, peer.scale_, rtol=1e-4)
    np.testing.assert_allclose(scale(odd), peer.transform(odd), atol=1e-3)


@pytest.mark.parametrize("fit", [by_lbfgs, by_sgd])
def test_features_in_a_file_give_the_same_fit(fit, mapped):
    in_memory, in_file = fit(ONE, *TRAIN), fit(ONE, mapped, TRAIN[1])
    np.testing.assert_array_equal(in_memory.kernel, in_file.kernel)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_array_equal(in_memory.predict(TRAIN[0]), in_file.predict(mapped))
