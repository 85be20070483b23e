"""Linear probes: how well a linear classifier predicts classes from frozen features (Chen et al. 2020, section 2.4)."""

import dataclasses
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Bool

from igpt.data.batches import Drops
from igpt.data.examples import SPLITS, Source, check_labels, few_labels
from igpt.interop.load import Pretrained
from igpt.loss import vote, wilson_interval
from igpt.probe.attentive import AttentiveClassifiers, fit_attentive
from igpt.probe.config import ProbeConfig, kind_of
from igpt.probe.features import Features, keep_features, raw_pixels, stream_features
from igpt.probe.logistic import Classifiers, fit_lbfgs, fit_sgd
from igpt.probe.neighbours import neighbours_accuracy
from igpt.probe.newton import fit_newton
from igpt.progress import progress_bar
from igpt.run.cluster import is_first_process

# solver="auto" takes Newton's method for at most so many examples x features x classes. With fewer than MEMORY_CLASSES,
# it counts so many: then memory is the limit, which is about 40 bytes for each feature of each example.
NEWTON_PRODUCTS, MEMORY_CLASSES = 1 << 26, 8


def solver_for(config: ProbeConfig, examples: int, width: int, classes: int) -> str:
    """The solver of a fit: the configured one, or for "auto" the faster of Newton's method and L-BFGS."""
    if config.solver != "auto":
        return config.solver
    return "newton" if examples * width * max(classes, MEMORY_CLASSES) <= NEWTON_PRODUCTS else "lbfgs"


def fit_probe(parts: Sequence[Features], layers: Sequence[int], config: ProbeConfig, mesh: Mesh) -> dict:
    """Fits classifiers on the training split, chooses one by its validation accuracy, and tests it on the test split.

    Concatenates the features of `layers`. Fits one classifier for each C (Newton's method, L-BFGS) or learning rate
    (SGD, AdamW). If several are equally accurate, the smallest C or rate is chosen. Training has one mask; in other
    splits, the predictions under all masks of an image vote. An example counts as wrong if its class does not occur in
    training, or if the classifier diverged. Returns the solver, the chosen C or rate, the accuracies, and the 95 %
    interval of the test accuracy. `converged` tells of SGD and AdamW only that the parameters are finite.
    """
    train, validation, test = ((part.joined(layers), part.labels) for part in parts)
    classes, targets = np.unique(train[1], return_inverse=True)
    examples = train[0][:, 0], targets.astype(np.int32), len(classes)
    solver, name, values, classifiers = fit_classifiers(examples, parts[0].positions, config, mesh)

    def correct(features, labels) -> Bool[np.ndarray, "R N"]:
        masks = range(features.shape[1])
        under_masks = np.stack([classifiers.predict(features[:, m]) for m in masks], axis=1)  # [R, M, N]
        winners = under_masks[:, 0]
        if len(masks) > 1:
            winners = np.stack([np.asarray(vote(jnp.asarray(votes))) for votes in under_masks])
        return (classes[winners] == labels) & (under_masks >= 0).all(axis=1)

    accuracies = correct(*validation).mean(axis=1)
    best = int(np.argmax(accuracies))
    hits, count = int(np.sum(correct(*test)[best])), len(test[1])
    chosen = {"solver": solver, name: values[best], "converged": bool(classifiers.converged[best])}
    chosen |= {"validation_accuracy": float(accuracies[best]), "test_accuracy": hits / count}
    return chosen | {"interval": wilson_interval(hits, count)}


def fit_classifiers(
    examples: tuple, positions: int, config: ProbeConfig, mesh: Mesh
) -> tuple[str, str, tuple[float, ...], Classifiers | AttentiveClassifiers]:
    """Fits `examples` (features, labels, number of classes). Returns the solver, what it varies, the values, the fits.

    The values ascend. With more than one position, the classifiers pool by attention.
    """
    solver = solver_for(config, *examples[0].shape, examples[2]) if positions == 1 else "adamw"
    if solver in ("newton", "lbfgs"):
        values = tuple(sorted(config.inverse_penalties))
        settings = (*examples, values, config.max_iter)
        return solver, "C", values, fit_newton(*settings) if solver == "newton" else fit_lbfgs(*settings, mesh)
    settings = config.sgd if solver == "sgd" else config.attention
    values = tuple(sorted(settings.learning_rates))
    settings = dataclasses.replace(settings, learning_rates=values)
    if solver == "sgd":
        return solver, "learning_rate", values, fit_sgd(*examples, settings, config.seed, mesh)
    _, queries = kind_of(config.pool)
    fits = fit_attentive(*examples, positions, queries, settings, config.seed, mesh)
    return solver, "learning_rate", values, fits


def solver_settings(config: ProbeConfig) -> dict:
    """The settings of the features and of `fit_probe`, as they are written to probe.json."""
    settings = dict(kind=config.solver, inverse_penalties=config.inverse_penalties, max_iter=config.max_iter)
    settings |= vars(config.sgd) | {"seed": config.seed, "pool": config.pool, "neighbours": config.neighbours}
    if kind_of(config.pool)[0] == "attention":
        settings["attention"] = dataclasses.asdict(config.attention)
    return {name: list(value) if isinstance(value, tuple) else value for name, value in settings.items()}


class Probe:
    """Computes features and fits classifiers, always with the same settings, images, layers, mesh and folder."""

    def __init__(self, config: ProbeConfig, source: Source, layers: list[int], mesh: Mesh, folder: Path):
        self.config, self.source, self.layers, self.mesh, self.folder = config, source, layers, mesh, folder

    def pixels(self) -> list[Features]:
        """The pixels of each split, as features of layer 0."""
        streams = [raw_pixels(split, self.source.channels) for split in self.source.splits().values()]
        return self._kept("pixels", streams, [0])

    def features(self, pretrained: Pretrained) -> list[Features]:
        """Computes the features of each split. A network of the BERT objective receives masked images, as in training.

        First deletes the feature files of the previous network, so that many checkpoints do not fill the disk.
        """
        model, config, layers = pretrained.model, self.config, self.layers
        drops = [None] * 3
        if not model.config.causal and config.eval_masks:
            rate = pretrained.config.objective.drop_rate
            drops = [Drops(rate, masks, config.seed) for masks in (1, config.eval_masks, config.eval_masks)]
        streams = [
            stream_features(
                model, split, pretrained.tokenizer, config.batch_size, self.mesh, layers, masks, config.pool
            )
            for split, masks in zip(self.source.splits().values(), drops, strict=True)
        ]
        positions = model.config.seq_len if kind_of(config.pool)[0] == "attention" else 1
        return self._kept("features", streams, self.layers, positions)

    def _kept(self, kind: str, streams: list, layers: list[int], positions: int = 1) -> list[Features]:
        for old in self.folder.glob(f"{kind}.*"):  # NFS keeps mapped files, so the new folder has another name
            shutil.rmtree(old, ignore_errors=True)
        folder = Path(tempfile.mkdtemp(prefix=f"{kind}.", dir=self.folder))
        named = zip(SPLITS, streams, strict=True)
        kept = [keep_features(stream, layers, folder / name, positions) for name, stream in named]
        # Of labels in files, only the first were checked before. Now all are in memory.
        splits = zip(self.source.splits().values(), kept, strict=True)
        check_labels(*(dataclasses.replace(split, labels=part.labels) for split, part in splits))
        for count in self.config.labels_per_class:  # unreadable images may have left a class with fewer
            few_labels(kept[0].labels, count, seed=0)
        return kept

    def fit(self, parts: list[Features], layers: list[int]) -> dict:
        """See `fit_probe`."""
        return fit_probe(parts, layers, self.config, self.mesh)

    def vote(self, parts: list[Features], layer: int) -> dict:
        """The test accuracy of the votes of `config.neighbours` training images: see `neighbours_accuracy`."""
        if not self.config.neighbours:
            return {}
        train, _, test = ((part.mean(layer), part.labels) for part in parts)
        return {"neighbours": neighbours_accuracy(train[0][:, 0], train[1], *test, self.config.neighbours)}

    def fit_layers(self, parts: list[Features], title: str) -> dict:
        """Fits each layer. The best layer is the one with the highest validation accuracy."""
        progress = progress_bar(self.layers, desc=title, unit="layer", leave=False, disable=not is_first_process())
        fits = [{"layer": layer} | self.fit(parts, [layer]) | self.vote(parts, layer) for layer in progress]
        best = max(fits, key=lambda fit: fit["validation_accuracy"])
        return {"best_layer": best["layer"], "test_accuracy": best["test_accuracy"], "layers": fits}

    def fit_few(self, parts: list[Features], layer: int) -> list[dict]:
        """For each number of labels per class: the test accuracy of every subset, their mean and standard deviation."""
        (train, *others), found = parts, []
        for count in self.config.labels_per_class:
            subsets = (train.take(few_labels(train.labels, count, seed)) for seed in range(self.config.subsets))
            accuracies = [self.fit([subset, *others], [layer])["test_accuracy"] for subset in subsets]
            mean, std = float(np.mean(accuracies)), float(np.std(accuracies))
            found.append({"labels_per_class": count, "accuracies": accuracies, "mean": mean, "std": std})
        return found


def layers_around(best: int, count: int, layers: list[int]) -> list[int]:
    """`count` neighbours in `layers`, with `best` as near to the middle as possible (Chen et al. 2020, section 4.4)."""
    at = layers.index(best)
    first = min(max(at - count // 2, 0), max(len(layers) - count, 0))
    return layers[first : first + count]
