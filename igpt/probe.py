"""Linear probes: how well a linear classifier reads classes off frozen features (Chen et al. 2020, section 2.4)."""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Float, Int

from igpt.data import Drops, eval_batches
from igpt.errors import UserError
from igpt.examples import Split
from igpt.logistic import fit_lbfgs, fit_sgd
from igpt.loss import vote
from igpt.model import ImageGPT
from igpt.sharding import to_devices


def stream_features(
    model: ImageGPT,
    split: Split,
    tokenizer,
    batch_size: int,
    mesh: Mesh,
    layers: Sequence[int] | None = None,
    drops: Drops | None = None,
) -> Iterator[tuple[Float[np.ndarray, "b l M D"], Int[np.ndarray, "b"]]]:
    """Batches of f^l, one forward pass for all `layers` (default: all), with the labels of their images.

    With `drops`, BERT's, an image is seen under each of M masks; else M is 1. Unreadable images are left out.
    """
    graph, params = nnx.split(model)
    layers = tuple(range(model.config.depth + 1) if layers is None else layers)

    @jax.jit
    def features(params, batch):
        model = nnx.merge(graph, params)
        masks = jnp.moveaxis(batch["keep"], 1, 0) if "keep" in batch else [None]
        under_masks = [model.features(batch["tokens"], layers, keep) for keep in masks]
        return jnp.transpose(jnp.stack(under_masks), (2, 1, 0, 3))

    with jax.set_mesh(mesh):
        for batch in eval_batches(split, tokenizer, batch_size, drops=drops):
            used = batch["mask"] > 0
            yield np.asarray(features(params, to_devices(batch, batch_size, mesh)))[used], batch["label"][used]


@dataclasses.dataclass(frozen=True)
class Features:
    """Of a split, by layer: float32 [N, M, D] each, in memory or in a file, and labels int32 [N]."""

    layers: dict[int, Float[np.ndarray, "N M D"]]
    labels: Int[np.ndarray, "N"]

    def take(self, indices: np.ndarray) -> "Features":
        return Features({layer: rows[indices] for layer, rows in self.layers.items()}, self.labels[indices])

    def joined(self, layers: Sequence[int]) -> Float[np.ndarray, "N M lD"]:
        """Features of several layers side by side."""
        return np.concatenate([self.layers[layer] for layer in layers], axis=-1)


def keep_features(stream, layers: Sequence[int], folder: Path) -> Features:
    """Writes a stream of features to a file a layer, so that memory does not grow with the number of images."""
    folder.mkdir()
    labels, shape = [], None
    files = {layer: (folder / f"layer_{layer:02d}.f32").open("wb") for layer in layers}
    try:
        for rows, of_rows in stream:
            for index, file in enumerate(files.values()):
                file.write(np.ascontiguousarray(rows[:, index], np.float32).data)
            labels.append(of_rows)
            shape = rows.shape[2:]
    except OSError as error:
        raise UserError(
            f"the features cannot be written to {folder}: {error.strerror}; name another --workdir"
        ) from None
    finally:
        for file in files.values():
            file.close()
    labels = np.concatenate(labels)
    kept = {layer: np.memmap(file.name, np.float32, "r", shape=(len(labels), *shape)) for layer, file in files.items()}
    return Features(kept, labels)


def raw_pixels(split: Split, channels: int, batch_size: int = 1024) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The baseline that needs no model: a stream of the pixels themselves, in [-1, 1], as one layer of features."""
    for start in range(0, len(split), batch_size):
        indices = np.arange(start, min(start + batch_size, len(split)))
        images, used = split.read(indices)
        images, labels = images[used == indices], split.labels[indices[used == indices]]
        yield (images[..., :channels] / 127.5 - 1.0).reshape(len(images), 1, 1, -1).astype(np.float32), labels


@dataclasses.dataclass(frozen=True)
class Solver:
    """How a probe is fitted: "lbfgs", a value of C at a time, or "sgd", a learning rate at a time."""

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
    features: Sequence[Float[np.ndarray, "N M D"]], labels: Sequence[Int[np.ndarray, "N"]], solver: Solver, mesh: Mesh
) -> dict:
    """Fits on the first of three splits, chooses among the solver's classifiers on the second, tests on the third.

    The first has one mask; of the others the masks of an image vote. Of equal ones the smallest C or rate is kept.
    Returns it, accuracies, and the 95 % interval of the test accuracy. A class that training lacks is never found.
    """
    classes, targets = np.unique(labels[0], return_inverse=True)
    name, values, classifiers = solver.fit(features[0][:, 0], targets.astype(np.int32), len(classes), mesh)

    def predictions(part: np.ndarray) -> np.ndarray:
        under_masks = np.stack([classifiers.predict(part[:, m]) for m in range(part.shape[1])], axis=1)  # [R, M, N]
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


def wilson_interval(correct: int, total: int, z: float = 1.96) -> tuple[float, float]:
    """95 % confidence interval of a proportion (Wilson 1927): sensible up to 0 and 1, unlike the normal one."""
    share, spread = correct / total, z * z / total
    centre = (share + spread / 2) / (1 + spread)
    half = z * math.sqrt(share * (1 - share) / total + spread / (4 * total)) / (1 + spread)
    return centre - half, centre + half
