"""A model of ours as a Hugging Face directory, which transformers' ImageGPT classes load.

    igpt export --model=runs/digits --out=hf_digits

The directory carries the run's palette as the clusters of its image processor. A run that was imported is exported as
the directory that it came from.
"""

import dataclasses
from pathlib import Path

import numpy as np
from flax import nnx

from igpt.command import Parser, add_model_arguments
from igpt.errors import UserError
from igpt.files import check_new, read_json, write_new
from igpt.interop import hf_weights
from igpt.interop.hf_config import ImageGPTConfig, from_model_config, to_model_config
from igpt.interop.hub import resolve
from igpt.interop.load import Pretrained, is_huggingface, load, network, processor_of
from igpt.interop.processor import ImageGPTImageProcessor
from igpt.interop.weight_files import FLOATS, write_safetensors

ORIGIN = "huggingface.json"  # in an imported run: what it came with, for a faithful way back


def export(ref: str | Path, out: str | Path, step: int | None = None) -> Path:
    """Writes the model `ref` as the Hugging Face directory `out`, which must be new or empty.

    transformers loads it strictly. A network without biases gets zeros for them. Where a model has a classifier and a
    head over the palette, the classifier goes out: transformers has no class with both.
    """
    check_new(out)
    directory = resolve(ref)
    pretrained = load(directory, step)
    model = pretrained.model.config
    if not model.causal:
        raise UserError(f"{ref} was trained with the BERT objective; transformers' ImageGPT is always causal")
    head = "classes" if model.num_classes else "pixels" if model.pixel_head else "none"
    config, processor, file_type = _documented(directory, pretrained, head)
    params = nnx.to_pure_dict(nnx.state(pretrained.model))
    shown = dataclasses.replace(model, pixel_head=head == "pixels")
    tensors = hf_weights.named_tensors(params, shown, "" if head == "none" else hf_weights.BASE)

    def write(folder: Path) -> None:
        write_safetensors(folder, tensors, file_type)
        config.save_pretrained(folder)
        processor.save_pretrained(folder)

    return write_new(out, write)


def _documented(
    directory: Path, pretrained: Pretrained, head: str
) -> tuple[ImageGPTConfig, ImageGPTImageProcessor, str]:
    """The configurations and the type of number of an export: those of an import, or new ones that say the same."""
    if is_huggingface(directory):
        weights = hf_weights.open_directory(directory)
        return weights.config, processor_of(directory), file_type(weights)
    if (directory / ORIGIN).is_file():
        return _original(directory / ORIGIN, pretrained, head)
    config = from_model_config(pretrained.model.config, head)
    height, width = pretrained.config.data.image_size
    centers = pretrained.palette.centers.tolist()
    return config, ImageGPTImageProcessor(clusters=centers, size={"height": height, "width": width}), "F32"


def _original(path: Path, pretrained: Pretrained, head: str) -> tuple[ImageGPTConfig, ImageGPTImageProcessor, str]:
    """What `import_directory` left at `path`; UserError unless it is of this model."""
    origin = read_json(path)
    parts = (origin.get("config"), origin.get("preprocessor"))
    if not all(isinstance(part, dict) for part in parts) or origin.get("weights") not in FLOATS:
        raise UserError(f"{path} is damaged; delete it to export under a configuration made anew")
    config, processor = ImageGPTConfig.from_dict(parts[0]), ImageGPTImageProcessor.from_dict(parts[1])
    same_network = network(to_model_config(config, head)) == network(pretrained.model.config)
    if not same_network or not np.array_equal(processor.palette().centers, pretrained.palette.centers):
        raise UserError(f"{path} is of another model than {path.parent}; delete it to export without it")
    return config, processor, origin["weights"]


def file_type(weights: hf_weights.Weights) -> str:
    """The type that can hold all of the numbers."""
    types = {tensor.dtype for tensor in weights.tensors.values()}
    return types.pop() if len(types) == 1 else "F32"


def add_arguments(parser: Parser) -> None:
    add_model_arguments(parser)
    parser.add_argument("--out", required=True, help="the Hugging Face directory to make")


def run(args) -> None:
    """Exports a model as the command line says."""
    made = export(args.model, args.out, args.step)
    print(f"wrote {made}: config.json, preprocessor_config.json and the weights")
