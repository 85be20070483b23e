"""Linear probes: how well a linear classifier reads classes off frozen features (Chen et al. 2020, section 2.4)."""

import dataclasses
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, Int
from ml_collections import ConfigDict
from tqdm import tqdm

from igpt.data.batches import Drops
from igpt.data.examples import Source, Split, few_labels
from igpt.interop.load import Pretrained
from igpt.loss import vote, wilson_interval
from igpt.probe.features import Features, keep_features, raw_pixels, stream_features
from igpt.probe.logistic import fit_lbfgs, fit_sgd

SPLITS = ("train", "validation", "test")


@dataclasses.dataclass(frozen=True)
class Solver:
    """How a probe is fitted: "lbfgs", for all values of C at once, or "sgd", for all learning rates at once."""

    kind: str
    inverse_penalties: tuple[float, ...] = (1.0,)
    max_iter: int = 1000
    learning_rates: tuple[float, ...] = (1.0,)
    steps: int = 1000
    batch_size: int = 256
    weight_decay: float = 0.0
    seed: int = 0

    def fit(self, features: Float[np.ndarray, "N D"], labels: Int[np.ndarray, "N"], num_classes: int, mesh: Mesh):
        """(name of what differs between the classifiers, its values in order of strength, Classifiers)."""
        if self.kind == "lbfgs":
            values = sorted(self.inverse_penalties)
            return "C", values, fit_lbfgs(features, labels, num_classes, values, self.max_iter, mesh)
        values = sorted(self.learning_rates)
        settings = values, self.steps, self.batch_size, self.weight_decay, self.seed, mesh
        return "learning_rate", values, fit_sgd(features, labels, num_classes, *settings)


def fit_probe(
    features: Sequence[Float[np.ndarray, "_ _ D"]], labels: Sequence[Int[np.ndarray, "_"]], solver: Solver, mesh: Mesh
) -> dict:
    """Fits on the first of three splits, chooses among the solver's classifiers on the second, tests on the third.

    The first has one mask; of the others the masks of an image vote. Of equal ones the smallest C or rate is kept.
    Returns it, accuracies, and the 95 % interval of the test accuracy. A class that training lacks is never found, nor
    is a classifier ever right that diverged.
    """
    classes, targets = np.unique(labels[0], return_inverse=True)
    name, values, classifiers = solver.fit(features[0][:, 0], targets.astype(np.int32), len(classes), mesh)

    def predictions(part: np.ndarray) -> np.ndarray:
        under_masks = np.stack([classifiers.predict(part[:, m]) for m in range(part.shape[1])], axis=1)  # [R, M, N]
        winners = under_masks[:, 0]
        if part.shape[1] > 1:
            winners = np.stack([np.asarray(vote(jnp.asarray(masks), len(classes))) for masks in under_masks])
        return np.where((under_masks < 0).any(axis=1), np.iinfo(np.int32).min, classes[winners])

    accuracies = (predictions(features[1]) == labels[1]).mean(axis=1)
    best = int(np.argmax(accuracies))
    correct = int(np.sum(predictions(features[2])[best] == labels[2]))
    return {
        name: values[best],
        "converged": bool(classifiers.converged[best]),
        "validation_accuracy": float(accuracies[best]),
        "test_accuracy": correct / len(labels[2]),
        "interval": wilson_interval(correct, len(labels[2])),
    }


class Probe:
    """The probes of one call of eval_probe.py: they share its settings, its images and a folder for features."""

    def __init__(self, config: ConfigDict, source: Source, layers: list[int], mesh: Mesh, folder: Path):
        self.config, self.source, self.layers, self.mesh, self.folder = config, source, layers, mesh, folder
        self._folders = {}
        shared = dict(inverse_penalties=tuple(config.inverse_penalties), max_iter=config.max_iter, seed=config.seed)
        self.solver = Solver(config.solver, **shared, **config.sgd.to_dict())

    def splits(self) -> list[Split]:
        return [getattr(self.source, name) for name in SPLITS]

    def pixels(self) -> list[Features]:
        """The pixels of each split, as if they were a network's layer 0."""
        return self._kept("pixels", [raw_pixels(split, self.source.channels) for split in self.splits()], [0])

    def features(self, pretrained: Pretrained) -> list[Features]:
        """The features of each split; of a network with BERT's objective under masks, as it is used to.

        They take the place of those of the network before, so that many checkpoints need no more disk than one.
        """
        model, objective = pretrained.model, pretrained.config.objective
        drops = [None] * 3
        if not model.config.causal and self.config.eval_masks:
            drops = [Drops(objective.drop_rate, n, self.config.seed) for n in (1, *[self.config.eval_masks] * 2)]
        streams = [
            stream_features(model, split, pretrained.palette, self.config.batch_size, self.mesh, self.layers, masks)
            for split, masks in zip(self.splits(), drops, strict=True)
        ]
        return self._kept("features", streams, self.layers)

    def _kept(self, kind: str, streams, layers: list[int]) -> list[Features]:
        if kind in self._folders:
            shutil.rmtree(self._folders[kind], ignore_errors=True)  # NFS keeps what is mapped: hence a new name
        self._folders[kind] = Path(tempfile.mkdtemp(prefix=f"{kind}.", dir=self.folder))
        return [
            keep_features(stream, layers, self._folders[kind] / name)
            for name, stream in zip(SPLITS, streams, strict=True)
        ]

    def fit(self, parts: list[Features], layers: list[int]) -> dict:
        return fit_probe(
            [part.joined(layers) for part in parts], [part.labels for part in parts], self.solver, self.mesh
        )

    def fit_layers(self, parts: list[Features], title: str) -> dict:
        layers = [
            {"layer": layer} | self.fit(parts, [layer])
            for layer in tqdm(self.layers, desc=title, unit="layer", leave=False, disable=jax.process_index() != 0)
        ]
        best = max(layers, key=lambda layer: layer["validation_accuracy"])
        return {"best_layer": best["layer"], "test_accuracy": best["test_accuracy"], "layers": layers}

    def fit_few(self, parts: list[Features], layer: int) -> list[dict]:
        """Of each number of labels a class: the test accuracy of each subset, their mean and standard deviation."""
        train, *others = parts
        found = []
        for count in self.config.labels_per_class:
            accuracies = []
            for seed in range(self.config.subsets):
                subset = train.take(few_labels(train.labels, count, seed))  # of the images that could be read
                accuracies.append(self.fit([subset, *others], [layer])["test_accuracy"])
            mean, std = float(np.mean(accuracies)), float(np.std(accuracies))
            found.append({"labels_per_class": count, "accuracies": accuracies, "mean": mean, "std": std})
        return found


def neighbours(best: int, count: int, layers: list[int]) -> list[int]:
    """`count` layers round the best one, as far in the middle as the network allows (section 4.4)."""
    at = layers.index(best)
    first = min(max(at - count // 2, 0), max(len(layers) - count, 0))
    return layers[first : first + count]
