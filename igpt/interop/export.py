"""Writes a model as a Hugging Face directory, which transformers' ImageGPT classes load.

    igpt export --model=runs/digits --out=hf_digits

The run's palette becomes the clusters of the directory's image processor. If a run was imported, its
export equals the imported directory.
"""

import dataclasses
from pathlib import Path

import numpy as np
from flax import nnx

from igpt.command import Parser, add_shared
from igpt.data.settings import FILTERS
from igpt.errors import UserError
from igpt.files import check_new, read_json, write_new, write_text
from igpt.interop import hf_weights
from igpt.interop.card import card, notice
from igpt.interop.hf_config import ImageGPTConfig
from igpt.interop.hf_network import from_model_config, to_model_config
from igpt.interop.hub import resolve
from igpt.interop.load import Pretrained, is_huggingface, load, parameter_fields, processor_of
from igpt.interop.processor import ImageGPTImageProcessor
from igpt.interop.weight_files import FLOATS, write_safetensors

ORIGIN = "huggingface.json"  # the configurations of an imported directory; an export writes them unchanged


def export(ref: str | Path, out: str | Path, step: int | None = None) -> Path:
    """Writes the model `ref` as the Hugging Face directory `out`, which must be new or empty.

    transformers loads it without missing or unexpected weights. If the network has no biases, zeros are written. If a
    model has a classifier and a palette head, only the classifier is exported: transformers has no class with both.
    README.md says what the model reads, unless that is what the documentation of transformers says.
    """
    check_new(out)
    directory = resolve(ref)
    pretrained = load(directory, step)
    model = pretrained.model.config
    if not model.causal:
        raise UserError(f"{ref} was trained with the BERT objective, but transformers' ImageGPT is always causal")
    head = "classes" if model.num_classes else "pixels" if model.pixel_head else "none"
    config, processor, dtype = _configurations(directory, pretrained, head)
    config = config.with_dtype(np.dtype(FLOATS[dtype]).name)
    params = nnx.to_pure_dict(nnx.state(pretrained.model))
    exported = dataclasses.replace(model, pixel_head=head == "pixels")
    tensors = hf_weights.named_tensors(params, exported, "" if head == "none" else hf_weights.BASE)

    def write(folder: Path) -> None:
        write_safetensors(folder, tensors, dtype)
        config.save_pretrained(folder)
        processor.save_pretrained(folder)
        if text := card(to_model_config(config, head)):
            write_text(folder / "README.md", text)

    return write_new(out, write)


def _configurations(directory: Path, pretrained: Pretrained, head: str) -> tuple:
    """The ImageGPTConfig, ImageGPTImageProcessor and dtype (a key of FLOATS) to write: as imported, or new ones."""
    if is_huggingface(directory):
        weights = hf_weights.open_directory(directory)
        return weights.config, processor_of(directory), weights.dtype
    path, network, palette = directory / ORIGIN, pretrained.model.config, pretrained.palette
    if not path.is_file():
        data, clusters = pretrained.config.data, palette.centers.tolist()
        size = dict(zip(("height", "width"), data.image_size, strict=True))
        resample = None if data.preprocess == "none" else FILTERS[data.filter]
        processor = ImageGPTImageProcessor(clusters, size=size, resample=resample)
        return from_model_config(network, head, pretrained.class_names), processor, "F32"
    origin = read_json(path)
    parts = (origin.get("config"), origin.get("preprocessor"))
    if not all(isinstance(part, dict) for part in parts) or origin.get("weights") not in FLOATS:
        raise UserError(f"{path} is damaged; delete it to export with a new configuration")
    config, processor = ImageGPTConfig.from_dict(parts[0]), ImageGPTImageProcessor.from_dict(parts[1])
    same = parameter_fields(to_model_config(config, head)) == parameter_fields(network)
    if not same or not np.array_equal(processor.palette().centers, palette.centers):
        raise UserError(f"{path} belongs to another model than {directory}; delete it to export without it")
    return config, processor, origin["weights"]


def add_arguments(parser: Parser) -> None:
    add_shared(parser, "model", "step")
    parser.add_argument("--out", required=True, help="the Hugging Face directory to make")


def run(args) -> None:
    """`igpt export`."""
    made = export(args.model, args.out, args.step)
    model = hf_weights.open_directory(made).model
    print(f"wrote {made}: config.json, preprocessor_config.json{', README.md' if card(model) else ''} and the weights")
    if text := notice(model, made):
        print(text)
