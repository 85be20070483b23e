"""Fine-tuning: a classifier on the pooled final norm, trained with the whole network (Chen et al. 2020, section 2.3).

Other modules have the classifier (igpt/model.py), the joint loss (igpt/loss.py), early stopping
(igpt/run/checkpoint.py) and the loop (train.py). This module prepares labels and parameters, and tests the result.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Int

from igpt.config import Config
from igpt.data.batches import Drops, eval_batches
from igpt.data.classes import full_names, with_classes
from igpt.data.examples import Source, check_labels, few_labels
from igpt.files import AnyPath, whole, write_array, write_json
from igpt.loss import masks_of, vote, wilson_interval
from igpt.plots import confusion_picture
from igpt.run.cluster import is_first_process
from igpt.sharding import process_rows, replicate
from igpt.state import run_batches
from igpt.tokenizer import Tokenizer

MOST_IN_JSON = 500  # classes whose confusion matrix stays below the size of JSON that is read


def labelled(source: Source, config: Config, names: Sequence[str] | None = None, whose: str | AnyPath = "") -> Source:
    """The source with only `data.labels_per_class` training images of each class (0: all images).

    `names` are those of the classes that the classifier of the model `whose` already knows. Labels are numbered like
    them. Raises UserError if labels are missing, or if they do not fit these classes or their number.
    """
    if config.objective.classification:
        source = with_classes(source, names, whose)
        tested = [source.test] if source.test.labels is not None else []
        check_labels(source.train, source.validation, *tested, num_classes=config.model.num_classes)
        needing = {name: dataclasses.replace(split, needs_labels=True) for name, split in source.splits().items()}
        source = dataclasses.replace(source, **needing)
    if not config.data.labels_per_class:
        return source
    check_labels(source.train)
    chosen = few_labels(source.train.labels, config.data.labels_per_class, config.data.subset_seed)
    return dataclasses.replace(source, train=source.train.take(chosen))


def merge_params(fresh: dict, pretrained: dict) -> dict:
    """Pretrained parameters win. A head that exists on one side only is taken from `fresh`, or dropped."""
    return fresh | {name: part for name, part in pretrained.items() if name in fresh}


def confusion(
    graph: nnx.GraphDef,
    params: dict,
    source: Source,
    tokenizer: Tokenizer,
    drops: Drops | None,
    batch_size: int,
    mesh: Mesh,
) -> Int[np.ndarray, "C C"]:
    """The test confusion matrix: rows are true classes, columns are predictions. With `drops`, masks vote."""

    @jax.jit
    def count(params, batch):
        model = nnx.merge(graph, params)
        classes = jnp.stack([jnp.argmax(model.classify(batch["tokens"], keep), axis=-1) for keep in masks_of(batch)])
        C = model.config.num_classes
        true = jax.nn.one_hot(batch["label"], C) * batch["mask"][:, None]
        return replicate(jnp.einsum("bc,bd->cd", true, jax.nn.one_hot(vote(classes), C), precision="highest"))

    batches = eval_batches(source.test, tokenizer, batch_size, process_rows(batch_size, mesh), drops)
    with jax.set_mesh(mesh):
        counts = run_batches(count, params, batches, batch_size, mesh)
        return sum(np.asarray(one).astype(np.int64) for one in counts)


def output_names(source: Source, config: Config) -> tuple[str, ...] | None:
    """The class names of the classifier's outputs, or None if there is no classifier, or the source has no names."""
    classes = config.model.num_classes
    return full_names(source.class_names, classes) if classes and source.class_names else None


def report(
    workdir: AnyPath, counts: Int[np.ndarray, "C C"], details: dict, class_names: Sequence[str] | None = None
) -> dict:
    """Writes test accuracy, its 95 % interval and the confusion matrix to finetune.json, and draws confusion.png.

    With more than MOST_IN_JSON classes the matrix is in confusion.npy instead.
    """
    correct, total = int(np.trace(counts)), int(counts.sum())
    results = details | {
        "test_accuracy": correct / total,
        "interval": wilson_interval(correct, total),
    }
    if len(counts) <= MOST_IN_JSON:
        results["confusion"] = counts.tolist()
    if class_names:
        results["class_names"] = list(class_names)
    if is_first_process():
        if len(counts) > MOST_IN_JSON:
            with whole(workdir / "confusion.npy") as file:
                write_array(file, counts)
        write_json(workdir / "finetune.json", results)
        confusion_picture(counts, workdir / "confusion.png", class_names)
    return results
