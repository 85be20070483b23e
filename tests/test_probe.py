import numpy as np
import pytest
from test_model import TINY, random_model

from igpt.data import Split
from igpt.errors import UserError
from igpt.examples import check_labels
from igpt.palette import Palette
from igpt.probe import extract_features, fit_probe, raw_pixels, wilson_interval


def random_split(count=23, height=1, width=13):
    palette = Palette(np.linspace(-1, 1, 11)[:, None].repeat(3, axis=1))
    tokens = np.random.default_rng(0).integers(0, 11, (count, height, width))
    return palette, Split(palette.decode(tokens), np.arange(count, dtype=np.int32) % 3)


def test_streamed_features_are_those_of_all_images_at_once():
    model = random_model()
    palette, split = random_split()
    streamed = extract_features(model, split, palette, batch_size=10)
    assert streamed.shape == (TINY.depth + 1, 23, TINY.width)
    np.testing.assert_allclose(streamed, model.features(palette.encode(split.images)[:, 0]), atol=1e-5)


def test_raw_pixels_are_the_channels_that_differ():
    _, split = random_split()
    grey, colour = raw_pixels(split, channels=1), raw_pixels(split, channels=3)
    assert grey.shape == (23, 13) and colour.shape == (23, 39)
    np.testing.assert_allclose(grey, colour[:, ::3])
    assert grey.min() == -1.0 and grey.max() == 1.0


def blobs(count, seed, noise=0.3):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 3, count)
    features = 100 * np.eye(3)[labels] + 100 * noise * rng.normal(size=(count, 3)) + 1000
    return features.astype(np.float32), labels


def test_a_probe_separates_what_is_separable_whatever_its_scale():
    parts = [blobs(count, seed, noise=0.05) for seed, count in enumerate((90, 30, 60))]
    result = fit_probe([x for x, _ in parts], [y for _, y in parts], (1.0,), 500)
    assert result["test_accuracy"] == result["validation_accuracy"] == 1.0
    assert result["converged"] and result["interval"][0] > 0.9


def test_a_probe_of_noise_is_at_chance():
    rng = np.random.default_rng(0)
    features = [rng.normal(size=(n, 4)).astype(np.float32) for n in (300, 100, 600)]
    labels = [rng.integers(0, 3, len(x)) for x in features]
    low, high = fit_probe(features, labels, (0.1, 1.0), 500)["interval"]
    assert low < 1 / 3 < high


def test_the_penalty_is_chosen_on_validation_never_on_test():
    rng = np.random.default_rng(0)
    parts = []
    for count in (40, 200, 200):  # few examples, many useless features: a strong penalty generalises better
        x, y = blobs(count, count, noise=0.8)
        parts.append((np.concatenate([x, 1000 * rng.normal(size=(count, 60))], axis=1), y))
    features, labels = [x for x, _ in parts], [y for _, y in parts]
    alone = {C: fit_probe(features, labels, (C,), 2000)["validation_accuracy"] for C in (1e-3, 1e-1, 1e3)}
    chosen = fit_probe(features, labels, (1e3, 1e-1, 1e-3), 2000)
    assert len(set(alone.values())) > 1
    assert chosen["validation_accuracy"] == max(alone.values()) == alone[chosen["C"]]
    scrambled = fit_probe(features, [*labels[:2], rng.permutation(labels[2])], (1e3, 1e-1, 1e-3), 2000)
    assert scrambled["C"] == chosen["C"]


def test_the_interval_is_wilsons():
    np.testing.assert_allclose(wilson_interval(50, 100), (0.4038, 0.5962), atol=1e-4)
    low, high = wilson_interval(100, 100)
    assert 0.96 < low < high <= 1.0


def test_labels_must_be_there_and_differ():
    images = np.zeros((4, 2, 2, 3), np.uint8)
    with pytest.raises(UserError, match="labels are needed"):
        check_labels(Split(images, None))
    with pytest.raises(UserError, match="have the label 7"):
        check_labels(Split(images, np.full(4, 7)))
