import dataclasses

import jax
import numpy as np
import pytest

from configs import probe_digits
from igpt.data.examples import ArrayImages, Source, Split, check_labels
from igpt.errors import UserError
from igpt.probe import fit as fit_module
from igpt.probe.config import SGD, ProbeConfig
from igpt.probe.features import Features, keep_features
from igpt.probe.fit import Probe, fit_probe, layers_around, solver_for
from igpt.probe.logistic import fit_lbfgs
from igpt.sharding import make_mesh

ONE = make_mesh(1, 1, 1, devices=jax.devices()[:1])


def blobs(count, seed, noise=0.3):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 3, count).astype(np.int32)
    features = 100 * np.eye(3)[labels] + 100 * noise * rng.normal(size=(count, 3)) + 1000
    return features[:, None].astype(np.float32), labels


def fit(parts, config, mesh=ONE):
    return fit_probe([Features({0: features}, labels) for features, labels in parts], [0], config, mesh)


def lbfgs(*penalties):
    config = ProbeConfig.of(probe_digits.get_config())
    return dataclasses.replace(config, solver="lbfgs", inverse_penalties=penalties)


def sgd(*rates, steps, weight_decay=0.0):
    return dataclasses.replace(lbfgs(1.0), solver="sgd", sgd=SGD(rates, steps, 32, weight_decay), seed=0)


def newton(*penalties):
    return dataclasses.replace(lbfgs(*penalties), solver="newton")


SOLVERS = [lbfgs(1.0), newton(1.0), sgd(0.3, steps=200)]


@pytest.mark.parametrize("config", SOLVERS, ids=lambda config: config.solver)
def test_a_probe_separates_separable_classes_at_any_scale(config):
    result = fit([blobs(count, seed, noise=0.05) for seed, count in enumerate((90, 30, 60))], config)
    assert result["test_accuracy"] == result["validation_accuracy"] == 1.0
    assert result["converged"] and result["interval"][0] > 0.9


@pytest.mark.parametrize("config", SOLVERS, ids=lambda config: config.solver)
def test_a_probe_of_noise_is_at_chance(config):
    rng = np.random.default_rng(0)
    parts = [(rng.normal(size=(n, 1, 4)).astype(np.float32), rng.integers(0, 3, n)) for n in (300, 100, 600)]
    low, high = fit(parts, config)["interval"]
    assert low < 1 / 3 < high


def test_the_penalty_is_chosen_on_validation_and_never_on_test():
    rng = np.random.default_rng(0)
    parts = []
    for count in (40, 200, 200):  # few examples, many useless features: a strong penalty generalises better
        x, y = blobs(count, count, noise=0.8)
        parts.append((np.concatenate([x, 1000 * rng.normal(size=(count, 1, 60))], axis=-1).astype(np.float32), y))
    penalties = (1e3, 1e-1, 1e-3)
    alone = {C: fit(parts, lbfgs(C))["validation_accuracy"] for C in penalties}
    chosen = fit(parts, lbfgs(*penalties))
    assert len(set(alone.values())) > 1
    assert chosen["validation_accuracy"] == max(alone.values()) == alone[chosen["C"]]
    # A test set on which another penalty is better: its predictions become the labels.
    for C in penalties:
        if chosen["C"] != C:
            assert fit([*parts[:2], relabelled(parts, C)], lbfgs(*penalties))["C"] == chosen["C"]


def relabelled(parts, C):
    (features, labels), _, (tested, _) = parts
    return tested, fit_lbfgs(features[:, 0], labels, 3, (C,), 1000, ONE).predict(tested[:, 0])[0]


def test_among_equally_good_penalties_the_strongest_is_chosen():
    parts = [blobs(count, seed, noise=0.05) for seed, count in enumerate((90, 30, 60))]
    assert fit(parts, lbfgs(100.0, 1.0, 10.0))["C"] == 1.0


def test_a_learning_rate_that_diverged_is_never_chosen():
    train, (features, labels), test = [blobs(count, seed, noise=0.8) for seed, count in enumerate((90, 60, 60))]
    zeros = labels == 0  # the class that an argmax over NaN alone returns
    config = sgd(1e30, 0.1, steps=40, weight_decay=0.01)
    result = fit([train, (features[zeros], labels[zeros]), test], config)
    assert result["learning_rate"] == 0.1 and result["converged"] and result["validation_accuracy"] < 1.0
    alone = fit([train, (features[zeros], labels[zeros]), test], sgd(1e30, steps=40, weight_decay=0.01))
    assert alone["test_accuracy"] == alone["validation_accuracy"] == 0.0 and not alone["converged"]


def test_labels_are_any_integers_and_an_unseen_class_counts_as_wrong():
    train, validation, (features, labels) = [blobs(count, seed, noise=0.05) for seed, count in enumerate((90, 30, 60))]
    names = np.array([-5, 7, 1000], np.int32)
    result = fit([(x, names[y]) for x, y in (train, validation, (features, labels))], SOLVERS[0])
    assert result["test_accuracy"] == result["validation_accuracy"] == 1.0
    unseen = np.array([-5, 8, 1000], np.int32)  # 8 instead of 7, so that training does not have it
    result = fit([(x, names[y]) for x, y in (train, validation)] + [(features, unseen[labels])], SOLVERS[0])
    assert result["validation_accuracy"] == 1.0 and result["test_accuracy"] == np.mean(labels != 1)


def test_an_image_without_a_label_is_found_when_its_label_is_read(tmp_path):
    class InFiles(list):  # labels of which only some are looked at before, as in igpt.data.tfds
        def __getitem__(self, index):
            return np.array(self)[index]

        def classes(self):
            return np.arange(2)

    images = ArrayImages(np.zeros((4, 2, 2, 3), np.uint8))
    split = Split(images, InFiles([0, 1, 1, -1]), may_lack_labels=True)
    source = Source("tfds:mine", split, split, split, channels=3)
    check_labels(*source.splits().values())
    with pytest.raises(UserError, match="1 images of train have no label"):
        Probe(lbfgs(1.0), source, [0], ONE, tmp_path).pixels()


def test_the_masks_of_an_image_vote():
    train, *others = [blobs(count, seed, noise=0.05) for seed, count in enumerate((90, 30, 60))]

    def under(masks):  # 1: features as they are; 0: those of another class
        return [(np.concatenate([x if m else np.roll(x, 1, axis=-1) for m in masks], axis=1), y) for x, y in others]

    right, wrong = fit([train, *under([0, 1, 1])], SOLVERS[0]), fit([train, *under([1, 0, 0])], SOLVERS[0])
    assert right["test_accuracy"] == right["validation_accuracy"] == 1.0
    assert wrong["test_accuracy"] == wrong["validation_accuracy"] == 0.0


def test_a_probe_of_features_in_files_equals_one_in_memory(tmp_path):
    parts = [blobs(count, seed, noise=0.8) for seed, count in enumerate((90, 30, 60))]
    kept = [keep_features([(x[:, None], y)], [4], tmp_path / str(i)) for i, (x, y) in enumerate(parts)]
    assert all(isinstance(part, Features) for part in kept)
    for config in SOLVERS:
        assert fit_probe(kept, [4], config, ONE) == fit(parts, config)


def test_auto_takes_newton_for_small_sets_and_lbfgs_for_large_ones(monkeypatch):
    parts = [
        blobs(count, seed, noise=0.8) for seed, count in enumerate((90, 30, 60))
    ]  # 90 x 3 features; 3 classes count as 8
    config = dataclasses.replace(lbfgs(0.1, 1.0), solver="auto")
    monkeypatch.setattr(fit_module, "NEWTON_PRODUCTS", 90 * 3 * 8)
    small = fit(parts, config)
    assert small == fit(parts, newton(0.1, 1.0)) and small["solver"] == "newton"
    monkeypatch.setattr(fit_module, "NEWTON_PRODUCTS", 90 * 3 * 8 - 1)
    large = fit(parts, config)
    assert large == fit(parts, lbfgs(0.1, 1.0)) and large["solver"] == "lbfgs"


def test_auto_fits_the_digits_by_newton_and_the_papers_sets_by_lbfgs():
    auto = ProbeConfig.of(probe_digits.get_config())
    assert auto.solver == "auto" and solver_for(auto, 1258, 128, 10) == "newton"
    assert solver_for(auto, 45_000, 512, 10) == "lbfgs"  # CIFAR-10 with iGPT-S
    assert solver_for(sgd(0.3, steps=200), 1258, 128, 10) == "sgd"  # who names a solver gets it


@pytest.mark.parametrize(
    ("best", "count", "expected"),
    [
        (5, 1, [5]),
        (5, 3, [4, 5, 6]),
        (5, 4, [3, 4, 5, 6]),
        (0, 5, [0, 1, 2, 3, 4]),
        (1, 5, [0, 1, 2, 3, 4]),
        (8, 5, [4, 5, 6, 7, 8]),
        (7, 5, [4, 5, 6, 7, 8]),
        (3, 99, list(range(9))),
    ],
)
def test_neighbours_stay_within_the_network(best, count, expected):
    assert layers_around(best, count, list(range(9))) == expected


def test_neighbours_are_among_the_chosen_layers():
    assert layers_around(6, 3, [0, 2, 6, 8]) == [2, 6, 8]
