"""Linear probes: how well a linear classifier reads classes off frozen features (Chen et al. 2020, section 2.4)."""

import math
import warnings
from collections.abc import Iterator

import jax
import numpy as np
from flax import nnx
from jaxtyping import Float, Int

from igpt.data import eval_batches
from igpt.errors import UserError
from igpt.examples import Split
from igpt.model import ImageGPT


def extract_features(model: ImageGPT, split: Split, tokenizer, batch_size: int) -> Float[np.ndarray, "L+1 N D"]:
    """f^0, ..., f^L of every image, a batch at a time: one forward pass gives all layers.

    Images that are passed over as unreadable have no features: `split.readable()` has labels to match.
    """
    graph, params = nnx.split(model)
    features = jax.jit(lambda params, tokens: nnx.merge(graph, params).features(tokens))

    def streamed() -> Iterator[np.ndarray]:
        for batch in eval_batches(split, tokenizer, batch_size):
            yield np.asarray(features(params, batch["tokens"]))[:, batch["mask"] > 0]

    return np.concatenate(list(streamed()), axis=1)


def raw_pixels(split: Split, channels: int) -> Float[np.ndarray, "N P"]:
    """The baseline that needs no model: the pixels themselves, in [-1, 1]."""
    return (split.images[..., :channels] / 127.5 - 1.0).reshape(len(split), -1).astype(np.float32)


def check_labels(*splits: Split) -> None:
    """Raises UserError unless every split has labels and training covers at least two classes."""
    if any(split.labels is None for split in splits):
        raise UserError(
            "a linear probe needs labels, and this source has none; add an integer array 'labels' to an .npz, or sort "
            "the pictures of a folder into a sub-folder for each class"
        )
    if len(np.unique(splits[0].labels)) < 2:
        raise UserError(f"all training images have the label {splits[0].labels[0]}; a probe needs two classes or more")


def fit_probe(features: list[np.ndarray], labels: list[Int[np.ndarray, "N"]], inverse_penalties, max_iter: int) -> dict:
    """Multinomial logistic regression (scikit-learn, L-BFGS) on standardised features.

    `features` and `labels` are those of the train, validation and test splits. `inverse_penalties` are values of C, the
    inverse of the L2 penalty: the one with the best validation accuracy is kept, the smallest on ties.
    Returns C, accuracies, and the 95 % interval of the test accuracy.
    """
    from sklearn.exceptions import ConvergenceWarning  # slow to import, and needed only here
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler
    from threadpoolctl import threadpool_limits

    scaler = StandardScaler().fit(features[0])
    train, validation, test = (scaler.transform(part).astype(np.float64) for part in features)
    best = None
    for strength in sorted(inverse_penalties):
        probe = LogisticRegression(C=strength, max_iter=max_iter)
        # One BLAS thread: on products this small, several spend their time waiting for each other (50 times slower).
        with warnings.catch_warnings(), threadpool_limits(1, "blas"):
            warnings.simplefilter("ignore", ConvergenceWarning)  # reported as `converged` instead
            probe.fit(train, labels[0])
        accuracy = probe.score(validation, labels[1])
        if best is None or accuracy > best[0]:
            best = accuracy, strength, probe
    accuracy, strength, probe = best
    correct = int(np.sum(probe.predict(test) == labels[2]))
    return {
        "C": strength,
        "converged": bool(probe.n_iter_.max() < max_iter),
        "validation_accuracy": float(accuracy),
        "test_accuracy": correct / len(test),
        "interval": wilson_interval(correct, len(test)),
    }


def wilson_interval(correct: int, total: int, z: float = 1.96) -> tuple[float, float]:
    """95 % confidence interval of a proportion (Wilson 1927): sensible up to 0 and 1, unlike the normal one."""
    share, spread = correct / total, z * z / total
    centre = (share + spread / 2) / (1 + spread)
    half = z * math.sqrt(share * (1 - share) / total + spread / (4 * total)) / (1 + spread)
    return centre - half, centre + half
