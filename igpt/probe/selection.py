"""Selects the checkpoints, the layers and the images of a probe by its configuration."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from igpt.data.classes import class_counts
from igpt.data.examples import Source, check_labels, few_labels
from igpt.data.sources import open_source
from igpt.errors import UserError
from igpt.files import AnyPath
from igpt.interop.load import Pretrained, data_settings, is_huggingface
from igpt.model import check_cells
from igpt.probe.config import ProbeConfig, kind_of
from igpt.run import checkpoint
from igpt.run.cluster import is_first_process
from igpt.tokenizer import check_same


def chosen_steps(steps: str, directory: AnyPath) -> list[int | None]:
    """The checkpoints to probe. `steps` is "" for the newest ([None]), "all", or numbers like "1,2". Else UserError."""
    existing, foreign = checkpoint.common_steps(directory), is_huggingface(directory)
    if not existing and (steps or not foreign):
        remedy = "leave config.steps empty for a Hugging Face model" if foreign else "train first"
        raise UserError(f"{directory} has no finished checkpoint; {remedy}")
    if steps in ("", "all"):
        return existing if steps else [None]
    try:
        wanted = sorted({int(step) for step in steps.split(",")})
    except ValueError:
        raise UserError(f"steps is {steps!r}; give numbers such as '1000,2000', or 'all'") from None
    if missing := [step for step in wanted if step not in existing]:
        raise UserError(f"{directory} has no checkpoint of step {missing[0]}; it has {existing}")
    return wanted


def chosen_layers(layers: Sequence[int], depth: int) -> list[int]:
    """The layers to probe in ascending order; all layers if none is named. Raises UserError for one out of range."""
    if not all(layer in range(depth + 1) for layer in layers):
        raise UserError(f"layers is {tuple(layers)}; this model has layers 0 to {depth} ({depth}: the final norm)")
    return sorted({int(layer) for layer in layers}) or list(range(depth + 1))


def probed_images(config: ProbeConfig, pretrained: Pretrained, ref: str | Path) -> Source:
    """Opens the images to probe, by default the model's training data. UserError if they do not fit."""
    fraction = config.validation_fraction if config.validation_fraction >= 0 else None
    changes = dict(source=config.source, preprocess=config.preprocess, data_dir=config.data_dir)
    settings = data_settings(pretrained.config, validation_fraction=fraction, **changes)
    if not settings.source:
        raise UserError(f"{ref} was not trained here, so that its images are not known; set --config.source")
    source = few_images(open_source(settings), config.train_images)
    check_labels(source.train, source.validation, source.test)
    kind, cells = kind_of(config.pool)
    if kind == "grid":
        check_cells(pretrained.tokenizer.grid(*source.image_size), cells)
    check_same(pretrained.tokenizer, ref, source.tokenizer, f"source={source.name}")
    if is_first_process():
        print(f"classes  {class_counts(source)}", flush=True)
    for count in config.labels_per_class:
        few_labels(source.train.labels, count, seed=0)  # raises if a class has fewer examples
    return source


def few_images(source: Source, count: int) -> Source:
    """Returns the source with `count` random training images, the same in every call. 0 keeps all training images."""
    if not count:
        return source
    if count > len(source.train):
        most = len(source.train)
        problem = f"train_images is {count}; {source.name} has {most} training images"
        raise UserError(f"{problem}: set it to at most {most}, or to 0 for all")
    return dataclasses.replace(source, train=source.train.some(count))
