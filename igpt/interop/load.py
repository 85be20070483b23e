"""What `igpt.load` reads: a model from a run directory, a Hugging Face directory, or an id of the Hugging Face hub.

The result is the same for all three, so code that uses a model need not distinguish them.
"""

import dataclasses
import math
from typing import NamedTuple

from flax import nnx
from jax.sharding import Mesh

from igpt.config import Config
from igpt.data.classes import load_names
from igpt.data.settings import FILTERS, DataConfig
from igpt.errors import UserError
from igpt.files import AnyPath, read_json
from igpt.interop import hf_weights
from igpt.interop.hf_network import names_of_labels
from igpt.interop.hub import PROCESSOR, resolve
from igpt.interop.processor import ImageGPTImageProcessor
from igpt.model import ImageGPT, ModelConfig
from igpt.run import restore
from igpt.run.directory import check_tokenizer, load_config
from igpt.sharding import one_device
from igpt.state import with_shardings
from igpt.tokenizer import Tokenizer, load_tokenizer
from igpt.vqvae import VQVAE

OTHER_PROBLEMS = ("regression", "multi_label_classification")  # problem_types that need no softmax over classes


class Pretrained(NamedTuple):
    """A model with everything that is needed to use it.

    config: the configuration of its run; of a Hugging Face model, only data, palette and model are known.
    model: the network, with parameters on devices, or with shapes only if `outline` made it.
    tokenizer: the palette or VQ-VAE whose tokens it reads.
    step: the optimizer step of the parameters, 0 for a Hugging Face model. class_names: those of a classifier's
    outputs, or None if they have numbers only.
    """

    config: Config
    model: ImageGPT | VQVAE
    tokenizer: Tokenizer
    step: int = 0
    class_names: tuple[str, ...] | None = None


def load(ref: str | AnyPath, step: int | None = None, mesh: Mesh | None = None) -> Pretrained:
    """Loads the model `ref` onto `mesh`, by default onto one device.

    step: the checkpoint to load. The default is the newest, or in a fine-tuned run the best on the validation images.
    Raises UserError when there is no such model, or when it is damaged. No code in the files is executed.
    """
    directory = resolve(ref)
    pretrained = outline(directory)
    graph, params = nnx.split(pretrained.model)
    abstract = with_shardings(nnx.to_pure_dict(params), mesh or one_device())
    if not is_huggingface(directory):
        params, step = restore.params(directory, abstract, step)
        check_tokenizer(directory, restore.progress_at(directory, step), pretrained.tokenizer)
    elif step is None:
        params, step = hf_weights.open_directory(directory).read(abstract), 0
    else:
        raise UserError(f"{ref} is a Hugging Face directory: it has no checkpoint of step {step}; leave it out")
    return pretrained._replace(model=nnx.merge(graph, params), step=step)


def outline(directory: AnyPath) -> Pretrained:
    """The model of a directory, with the shapes of its parameters instead of their values."""
    config = config_of(directory)
    if config.program != "igpt":
        what = "is a VQ-VAE, which makes tokens of images and models none"
        raise UserError(f"{directory} {what}; train a model on its codes: --config.tokenizer={directory}")
    # The attention back end of the training machine may not exist on this machine.
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, attention="auto"))
    tokenizer = tokenizer_of(directory)
    check_fits(tokenizer, config, directory)
    model = nnx.eval_shape(lambda: ImageGPT(config.network(), nnx.Rngs(0)))
    return Pretrained(config, model, tokenizer, class_names=class_names_of(directory))


def config_of(directory: AnyPath) -> Config:
    """The configuration of a run, or our configuration of a Hugging Face directory."""
    if not is_huggingface(directory):
        return load_config(directory)
    return config_of_weights(directory, hf_weights.open_directory(directory), processor_of(directory))


def class_names_of(directory: AnyPath) -> tuple[str, ...] | None:
    """The names of a classifier's outputs, or None: those that its run kept, or "id2label" of Hugging Face."""
    if not is_huggingface(directory):
        return load_names(directory)
    weights = hf_weights.open_directory(directory)
    return names_of_labels(weights.config) if weights.model.num_classes else None


def is_huggingface(directory: AnyPath) -> bool:
    """Whether a directory is from Hugging Face: only then its config.json has a model_type."""
    return (directory / "config.json").is_file() and "model_type" in read_json(directory / "config.json")


def data_settings(config: Config, **changes) -> DataConfig:
    """`config.data` with `changes` applied. Changes that are None or "" are ignored."""
    given = {name: value for name, value in changes.items() if value not in (None, "")}
    if given.get("source", config.data.source) == config.data.source:
        return dataclasses.replace(config.data, **given)
    given["split_file"] = ""  # it names files of the old source
    if given["source"].startswith("scattered:"):
        return dataclasses.replace(config.data, **given)
    return config.data.without_places(**given)


def picture_settings(config: Config, preprocess: str | None = None) -> DataConfig:
    """How a picture that belongs to no source is read: as in the run's evaluation, unless `preprocess` is given."""
    preprocess = preprocess or config.data.preprocess
    return config.data.without_places(source="", split_file="", preprocess=preprocess)


def processor_of(directory: AnyPath) -> ImageGPTImageProcessor:
    """The image processor of a Hugging Face directory. Raises UserError if it has no clusters."""
    if not (directory / PROCESSOR).is_file():
        command = f"igpt import --from={directory} --clusters=kmeans_centers.npy --out=RUN"
        raise UserError(f"{directory} has no {PROCESSOR}, and so no palette; give one with {command}")
    processor = ImageGPTImageProcessor.from_pretrained(directory)
    if processor.clusters is None:
        raise UserError(f"{directory}/{PROCESSOR} has no 'clusters', and so no palette; add them")
    return processor


def config_of_weights(directory: AnyPath, weights: hf_weights.Weights, processor: ImageGPTImageProcessor) -> Config:
    """Our configuration of a Hugging Face model. UserError if its parts do not fit each other or our network."""
    size, model = (processor.size["height"], processor.size["width"]), weights.model
    usual = (processor.do_rescale, processor.rescale_factor, processor.do_normalize) == (True, 1 / 255, True)
    if weights.config.tie_word_embeddings:
        problem = "its head is its embedding, but our network has a separate head; use such a model through igpt.api"
    elif model.num_classes and (model.num_classes == 1 or weights.config.problem_type in OTHER_PROBLEMS):
        problem = "its classifier is for regression or for several labels an image; use such a model through igpt.api"
    elif math.prod(size) != model.seq_len:
        makes = f"the processor makes images of {size[0]} x {size[1]}, the model has {model.seq_len} positions"
        problem = f"{makes}; set 'size' in preprocessor_config.json to a height and a width with that product"
    elif len(processor.clusters) != model.vocab_size:
        has = f"the processor has {len(processor.clusters)} clusters, the model {model.vocab_size} colours"
        problem = f"{has} (vocab_size less the start of sequence); give the clusters that it was trained with"
    elif not usual or not processor.image_mean == processor.image_std == [0.5] * 3:
        problem = "the clusters are in unusual units; convert them to byte / 127.5 - 1, or load the model with igpt.api"
    else:
        config = Config.of_network(model, size, channels=processor.palette().channels)
        names = {choice: name for name, choice in FILTERS.items()}  # all filters of PIL, and so all of a processor
        return dataclasses.replace(config, data=dataclasses.replace(config.data, filter=names[processor.resample]))
    raise UserError(f"{directory}: {problem}")


def tokenizer_of(directory: AnyPath) -> Tokenizer:
    """The tokenizer of a run, or the palette of a Hugging Face directory's image processor."""
    return processor_of(directory).palette() if is_huggingface(directory) else load_tokenizer(directory)


def check_fits(tokenizer: Tokenizer, config: Config, path) -> None:
    """Raises UserError unless the tokenizer has the model's vocabulary and length."""
    size, model = config.data.image_size, config.model
    if (tokenizer.vocab_size, math.prod(tokenizer.grid(*size))) == (model.vocab_size, model.seq_len):
        return
    if config.tokenizer == tokenizer.kind:
        problem = f"{path} has {tokenizer.vocab_size} colours, but palette.colors is {config.palette.colors}"
        raise UserError(f"{problem}; set palette.colors={tokenizer.vocab_size} or give a palette of that size")
    makes = f"{path} makes {math.prod(tokenizer.grid(*size))} of {tokenizer.vocab_size} {tokenizer.noun} of an image"
    flags = " ".join(f"--config.{name}={value}" for name, value in tokenizer.fields(path).items())
    raise UserError(f"{makes}, but the configuration asks for {model.seq_len} of {model.vocab_size}; set {flags}")


def starting_params(ref: str, mesh: Mesh) -> dict:
    """All parameters of the model `ref`, on the mesh."""
    return nnx.to_pure_dict(nnx.state(load(ref, mesh=mesh).model))


def parameter_fields(model: ModelConfig) -> dict:
    """The fields that determine the shapes and the meaning of the parameters. Weights may change from SOS to none."""
    free = ("sos", "embedding_dropout", "residual_dropout", "attention_dropout")
    free += ("dtype", "attention", "remat", "scan_layers", "platform")
    return {name: value for name, value in vars(model).items() if name not in free}


def check_same_network(ref: str, config: Config) -> ModelConfig:
    """Raises UserError unless a run of `config` can start from the weights of the model `ref`; returns its network.

    The run may add a classifier, omit the classifier or the palette head, and change whether SOS is read.
    """
    there = config_of(resolve(ref)).model
    theirs, ours = parameter_fields(there), parameter_fields(config.model)
    names = [name for name in ours if theirs[name] != ours[name] and name not in ("num_classes", "pixel_head")]
    if names:
        differing = "; ".join(f"{name} is {theirs[name]} there, {ours[name]} here" for name in names)
        raise UserError(f"init_from={ref} has another network: {differing}; change the config to match")
    classes = theirs["num_classes"]
    if classes and ours["num_classes"] not in (0, classes):
        problem = f"has a classifier of {classes} classes, model.num_classes is {ours['num_classes']}"
        remedy = f"set model.num_classes={classes}, or start from the model that it was fine-tuned from"
        raise UserError(f"init_from={ref} {problem}; {remedy}")
    if ours["pixel_head"] and not theirs["pixel_head"]:
        remedy = "set model.pixel_head=False and objective.generative=0 to learn classes only"
        raise UserError(f"init_from={ref} has no head for pixels; {remedy}, or start from a model that has one")
    return there
