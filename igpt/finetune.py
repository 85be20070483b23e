"""Fine-tuning: a classifier on the pooled final norm, learnt with the whole network (Chen et al. 2020, section 2.3).

The network's head is `model.num_classes`, the joint objective `igpt.loss.make_loss`, early stopping
`igpt.checkpoint.Progress`; the loop is train.py's. Here is what comes before the first step and after the last.
"""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Int
from ml_collections import ConfigDict

from igpt.data.batches import Drops, eval_batches
from igpt.data.examples import Source, check_labels, few_labels
from igpt.files import write_text
from igpt.loss import masks_of, vote, wilson_interval
from igpt.palette import Palette
from igpt.plots import confusion_picture
from igpt.sharding import process_rows, replicate, to_devices


def labelled(source: Source, config: ConfigDict) -> Source:
    """The source with its training images cut down to `data.labels_per_class`; UserError where labels do not serve."""
    if config.objective.classification:
        tested = [source.test] if source.test.labels is not None else []
        check_labels(source.train, source.validation, *tested, num_classes=config.model.num_classes)
    if not config.data.labels_per_class:
        return source
    check_labels(source.train)
    chosen = few_labels(source.train.labels, config.data.labels_per_class, config.data.subset_seed)
    return dataclasses.replace(source, train=source.train.take(chosen))


def merge_params(fresh: dict, starting: dict) -> dict:
    """Parameters to start from: a head that `starting` does not have is fresh, one that `fresh` has not is left."""
    return fresh | {name: part for name, part in starting.items() if name in fresh}


def confusion(
    graph: nnx.GraphDef, params: dict, source: Source, palette: Palette, drops: Drops | None, batch_size: int, mesh
) -> Int[np.ndarray, "C C"]:
    """How many test images of each class (row) were taken for each (column); with `drops`, by its masks' votes."""

    def count(params, batch):
        model = nnx.merge(graph, params)
        classes = jnp.stack([jnp.argmax(model.classify(batch["tokens"], keep), axis=-1) for keep in masks_of(batch)])
        C = model.config.num_classes
        true = jax.nn.one_hot(batch["label"], C) * batch["mask"][:, None]
        return replicate(jnp.einsum("bc,bd->cd", true, jax.nn.one_hot(vote(classes, C), C), precision="highest"))

    count = jax.jit(count)
    rows = process_rows(batch_size, mesh)
    batches = eval_batches(source.test, palette, batch_size, rows, drops)
    with jax.set_mesh(mesh):
        return sum(
            np.asarray(jax.device_get(count(params, to_devices(batch, batch_size, mesh)))).astype(np.int64)
            for batch in batches
        )


def report(workdir: Path, counts: Int[np.ndarray, "C C"], details: dict) -> dict:
    """Writes finetune.json and confusion.png: test accuracy with its 95 % interval, and the confusion matrix."""
    correct, total = int(np.trace(counts)), int(counts.sum())
    results = details | {
        "test_accuracy": correct / total,
        "interval": wilson_interval(correct, total),
        "confusion": counts.tolist(),
    }
    if jax.process_index() == 0:
        write_text(workdir / "finetune.json", json.dumps(results, indent=1) + "\n")
        confusion_picture(counts, workdir / "confusion.png")
    return results
