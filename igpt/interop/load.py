"""Models from a reference: a run directory, a Hugging Face directory, or the id of one on the hub.

Whoever asks for a model asks here, and cannot tell from the answer which of the three it was.
"""

import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict

from igpt import config as configuration
from igpt.errors import UserError
from igpt.files import read_json
from igpt.interop import hf_weights
from igpt.interop.hub import resolve
from igpt.interop.processor import ImageGPTImageProcessor
from igpt.model import ImageGPT, ModelConfig
from igpt.palette import Palette
from igpt.run import checkpoint
from igpt.sharding import one_device
from igpt.state import with_shardings


class Pretrained(NamedTuple):
    """A model with all that is needed to use it: its run's configuration and its tokenizer."""

    config: ConfigDict
    model: ImageGPT
    palette: Palette
    step: int = 0


def load(ref: str | Path, step: int | None = None, mesh: Mesh | None = None) -> Pretrained:
    """The model that `ref` names, on `mesh`, by default one device.

    Of a run's checkpoints it is that of `step`; without one the newest, or after fine-tuning the best on validation.
    Raises UserError when there is no such model, or when it is damaged. Nothing is ever executed that a file holds.
    """
    directory = resolve(ref)
    pretrained = outline(directory)
    graph, params = nnx.split(pretrained.model)
    mesh = mesh or one_device()
    params, step = params_of(directory, with_shardings(nnx.to_pure_dict(params), mesh), step)
    return pretrained._replace(model=nnx.merge(graph, params), step=step)


def outline(directory: Path) -> Pretrained:
    """All of a model but its parameters, in whose place are their shapes."""
    config = config_of(directory)
    config.model.attention = "auto"  # what the training machine could do, this one may not
    palette = palette_of(directory)
    check_palette_size(palette, config, directory)
    model = nnx.eval_shape(lambda: ImageGPT(configuration.model_config(config), nnx.Rngs(0)))
    return Pretrained(config, model, palette)


def is_huggingface(directory: Path) -> bool:
    """Whether a directory's config.json is of Hugging Face's kind; ours has no model_type."""
    return (directory / "config.json").is_file() and "model_type" in read_json(directory / "config.json")


def config_of(directory: Path) -> ConfigDict:
    """A run's configuration, or what a Hugging Face directory says of network and images."""
    if not is_huggingface(directory):
        return configuration.load(directory)
    return of_weights(directory, hf_weights.open_directory(directory), processor_of(directory))


def of_weights(directory: Path, weights: hf_weights.Weights, processor: ImageGPTImageProcessor) -> ConfigDict:
    """Our configuration of a Hugging Face model; UserError where its parts do not fit each other or our network."""
    if weights.config.tie_word_embeddings:
        raise UserError(
            f"{directory} ties its head to the embedding, start of sequence included; our network has a head of its "
            "own. Such a model can be used through igpt.api only"
        )
    size, clusters = (processor.size["height"], processor.size["width"]), processor.clusters
    if math.prod(size) != weights.model.seq_len:
        raise UserError(
            f"{directory}: the processor makes images of {size[0]} x {size[1]}, the model has {weights.model.seq_len} "
            "positions; set 'size' in preprocessor_config.json to a height and width whose product that is"
        )
    if len(clusters) != weights.model.vocab_size:
        raise UserError(
            f"{directory}: the processor has {len(clusters)} clusters, the model {weights.model.vocab_size} colours "
            "(vocab_size less the start of sequence)"
        )
    units = (processor.do_rescale, processor.rescale_factor, processor.do_normalize)
    if units != (True, 1 / 255, True) or not processor.image_mean == processor.image_std == [0.5] * 3:
        raise UserError(
            f"{directory}: the processor's clusters are in units of their own (do_rescale, rescale_factor, "
            "do_normalize, image_mean, image_std); a palette of ours has byte / 127.5 - 1, which are the defaults. "
            "Convert the clusters, or use the model through igpt.api"
        )
    grey = bool((clusters == clusters[:, :1]).all())
    return configuration.of_network(weights.model, size, channels=1 if grey else 3)


def data_settings(config: ConfigDict, **changes) -> ConfigDict:
    """A copy of `config.data` with the fields of `changes`; a change that is None or "" keeps the model's setting."""
    given = {name: value for name, value in changes.items() if value not in (None, "")}
    return ConfigDict(config.data.to_dict() | given)


def processor_of(directory: Path) -> ImageGPTImageProcessor:
    """The image processor of a Hugging Face directory, with clusters."""
    if not (directory / "preprocessor_config.json").is_file():
        raise UserError(
            f"{directory} has no preprocessor_config.json, and so no palette; give one with igpt "
            f"import --from={directory} --clusters=kmeans_centers.npy --out=RUN"
        )
    processor = ImageGPTImageProcessor.from_pretrained(directory)
    if processor.clusters is None:
        raise UserError(f"{directory}/preprocessor_config.json has no 'clusters', and so no palette")
    return processor


def palette_of(directory: Path) -> Palette:
    if is_huggingface(directory):
        return processor_of(directory).palette()
    return Palette.load(directory / "palette.npy")


def params_of(directory: Path, abstract: dict, step: int | None = None) -> tuple[dict, int]:
    """The parameters onto the shardings of `abstract`, and the step they are of."""
    if not is_huggingface(directory):
        return checkpoint.restore_params(directory, abstract, step)
    if step is not None:
        raise UserError(f"{directory} is a Hugging Face directory: it has no checkpoint of step {step}")
    weights = hf_weights.open_directory(directory)
    return hf_weights.read_params(weights.tensors, weights.model, abstract), 0


def check_same_network(ref: str, config: ConfigDict) -> None:
    """Raises UserError unless a run of `config` can start from the weights of the model `ref`.

    A classifier may be new, and either head left behind.
    """
    theirs, ours = (network(configuration.model_config(c)) for c in (config_of(resolve(ref)), config))
    differing = [
        f"{name} is {theirs[name]} there, {ours[name]} here"
        for name in ours
        if theirs[name] != ours[name] and name not in ("num_classes", "pixel_head")
    ]
    if differing:
        raise UserError(f"init_from={ref} has another network: {'; '.join(differing)}; make the config agree")
    classes = theirs["num_classes"]
    if classes and ours["num_classes"] not in (0, classes):
        raise UserError(
            f"init_from={ref} has a classifier of {classes} classes, model.num_classes is {ours['num_classes']}; set "
            f"model.num_classes={classes}, or start from the model that it was fine-tuned from"
        )
    if ours["pixel_head"] and not theirs["pixel_head"]:
        raise UserError(
            f"init_from={ref} has no head for pixels; set model.pixel_head=False and objective.generative=0 to learn "
            "classes only, or start from a model that has one"
        )


def starting_params(ref: str, mesh: Mesh) -> dict:
    """All parameters of the model `ref`, on the mesh."""
    directory = resolve(ref)
    abstract = nnx.to_pure_dict(nnx.state(outline(directory).model))
    params, _ = params_of(directory, with_shardings(abstract, mesh))
    return params


def network(model: ModelConfig) -> dict:
    """The fields that fix the parameters' shapes and meaning."""
    free = ("embedding_dropout", "residual_dropout", "attention_dropout", "dtype", "attention", "remat", "scan_layers")
    return {name: value for name, value in vars(model).items() if name not in free}


def check_same_palette(palette: Palette, origin, other: Palette | None, whose) -> None:
    """Raises UserError where a model that knows one palette would be given another, or its tokens."""
    if other is not None and not np.array_equal(palette.centers, other.centers):
        raise UserError(
            f"{whose} has another palette than {origin}, whose colours are the only ones that its network knows; use "
            f"{origin}'s: tokens are prepared with it by igpt prepare --palette"
        )


def check_palette_size(palette: Palette, config: ConfigDict, path) -> None:
    """A model's vocabulary is its palette: they must agree before either is used."""
    if palette.vocab_size != config.palette.colors:
        raise UserError(
            f"{path} has {palette.vocab_size} colours, but palette.colors is {config.palette.colors}; "
            f"set palette.colors={palette.vocab_size} or give a palette of that size"
        )
