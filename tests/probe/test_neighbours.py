"""Nearest neighbours: the votes of a reference written by hand."""

import math

import numpy as np
import pytest

from igpt.probe import neighbours
from igpt.probe.neighbours import neighbours_accuracy

RNG = np.random.default_rng(0)
TRAIN = RNG.normal(size=(53, 7)).astype(np.float32)
LABELS = RNG.choice([2, 3, 7], 53)
TEST = RNG.normal(size=(31, 2, 7)).astype(np.float32)
TEST_LABELS = RNG.choice([2, 3, 7], 31)


def by_hand(count: int, masks: int) -> float:
    """The accuracy, one image and one neighbour after the other."""
    hits = 0
    for image, label in zip(TEST[:, :masks], TEST_LABELS, strict=True):
        votes = dict.fromkeys((2, 3, 7), 0.0)
        for view in image.astype(float):
            cosines = [row @ view / math.hypot(*row) / math.hypot(*view) for row in TRAIN.astype(float)]
            for nearest in sorted(range(53), key=lambda i: -cosines[i])[:count]:
                votes[LABELS[nearest]] += math.exp(cosines[nearest] / 0.07)
        hits += max(votes, key=votes.get) == label
    return hits / 31


@pytest.mark.parametrize("masks", [1, 2])
@pytest.mark.parametrize("count", [1, 5, 53])
def test_neighbours_vote_as_a_reference_by_hand_does(count, masks, monkeypatch):
    expected = by_hand(count, masks)
    assert neighbours_accuracy(TRAIN, LABELS, TEST[:, :masks], TEST_LABELS, count) == expected
    monkeypatch.setattr(neighbours, "PRODUCTS_AT_ONCE", 53 * 4)  # few test images at a time
    assert neighbours_accuracy(TRAIN, LABELS, TEST[:, :masks], TEST_LABELS, count) == expected


def test_a_copy_of_a_training_image_has_its_class():
    assert neighbours_accuracy(TRAIN, LABELS, 3 * TRAIN[:, None], LABELS, 1) == 1.0
    assert neighbours_accuracy(TRAIN, LABELS, -TRAIN[:, None], LABELS, 1) < 0.8


def test_classes_that_training_lacks_are_wrong_and_few_images_are_enough():
    assert neighbours_accuracy(TRAIN, LABELS, TEST, TEST_LABELS + 100, 5) == 0.0
    assert neighbours_accuracy(TRAIN[:3], np.full(3, 7), TEST, TEST_LABELS, 20) == np.mean(TEST_LABELS == 7)


def test_a_row_of_zeros_is_no_number_to_divide_by():
    assert neighbours_accuracy(np.zeros((4, 7), np.float32), LABELS[:4], TEST, TEST_LABELS, 2) >= 0.0
