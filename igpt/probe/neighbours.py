"""k nearest neighbours: how well the most similar training images predict classes, without fitting anything."""

import numpy as np
from jaxtyping import Float, Int

from igpt.run.cluster import broadcast

TEMPERATURE = 0.07  # of the weights, as DINO reports it (Caron et al. 2021, appendix F.1)
PRODUCTS_AT_ONCE = 1 << 24  # similarities in memory: 64 MiB


def neighbours_accuracy(
    train: Float[np.ndarray, "N D"],
    train_labels: Int[np.ndarray, "N"],
    test: Float[np.ndarray, "n M D"],
    test_labels: Int[np.ndarray, "n"],
    count: int,
) -> float:
    """The share of test images whose `count` nearest training images, by cosine, vote for their class.

    A vote weighs exp(cosine / TEMPERATURE). The votes under all M masks of an image are added. Ties go to the smaller
    label. Each process computes all votes, and then takes the result of process 0, since processors round differently.
    """
    classes, targets = np.unique(train_labels, return_inverse=True)
    count = min(count, len(train))
    rows, at_once, hits = unit(train), max(1, PRODUCTS_AT_ONCE // len(train)), 0
    for start in range(0, len(test), at_once):
        queries, votes = test[start : start + at_once], 0.0
        for mask in range(test.shape[1]):
            votes = votes + _votes(rows, targets, unit(queries[:, mask]), count, len(classes))
        hits += np.sum(classes[np.argmax(votes, axis=1)] == test_labels[start : start + at_once])
    return int(broadcast(np.int32(hits))) / len(test)


def unit(rows: Float[np.ndarray, "N D"]) -> Float[np.ndarray, "N D"]:
    """Rows of length 1. A row of zeros, such as a black image, stays as it is: it is equally near to all."""
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)


def _votes(rows, targets, queries, count: int, num_classes: int) -> Float[np.ndarray, "n C"]:
    similarity = queries @ rows.T
    nearest = np.argpartition(-similarity, count - 1, axis=1)[:, :count]
    weights = np.exp((np.take_along_axis(similarity, nearest, axis=1) - 1.0) / TEMPERATURE)  # at most 1
    votes = np.zeros((len(queries), num_classes))
    np.add.at(votes, (np.arange(len(queries))[:, None], targets[nearest]), weights)
    return votes
