"""Models to and from Hugging Face directories, as transformers' ImageGPT classes read and write them.

    python -m igpt.huggingface export --model=runs/digits --out=hf_digits
    python -m igpt.huggingface import --from=hf_digits --out=runs/imported

An exported directory carries the run's palette as the clusters of its image processor. An imported run can be probed,
sampled, completed and started from; exported again, it is the directory that it came from.
"""

import argparse
import dataclasses
import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
from flax import nnx

from igpt import checkpoint, hf_weights
from igpt import config as configuration
from igpt.errors import UserError, reported
from igpt.files import write_text
from igpt.hf_config import ImageGPTConfig, from_model_config, read_json, to_model_config
from igpt.model import count_params
from igpt.palette import Palette
from igpt.pretrained import Pretrained, is_huggingface, load, network, of_weights, outline, processor_of, resolve
from igpt.processor import ImageGPTImageProcessor
from igpt.weight_files import FLOATS, write_safetensors

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
        return weights.config, processor_of(directory), _file_type(weights)
    if (directory / ORIGIN).is_file():
        return _original(directory / ORIGIN, pretrained, head)
    config = from_model_config(pretrained.model.config, head)
    height, width = pretrained.config.data.image_size
    centers = pretrained.palette.centers.tolist()
    return config, ImageGPTImageProcessor(clusters=centers, size={"height": height, "width": width}), "F32"


def _original(path: Path, pretrained: Pretrained, head: str) -> tuple[ImageGPTConfig, ImageGPTImageProcessor, str]:
    """What `import_` left at `path`; UserError unless it is of this model."""
    origin = read_json(path)
    parts = (origin.get("config"), origin.get("preprocessor"))
    if not all(isinstance(part, dict) for part in parts) or origin.get("weights") not in FLOATS:
        raise UserError(f"{path} is damaged; delete it to export under a configuration made anew")
    config, processor = ImageGPTConfig.from_dict(parts[0]), ImageGPTImageProcessor.from_dict(parts[1])
    same_network = network(to_model_config(config, head)) == network(pretrained.model.config)
    if not same_network or not np.array_equal(processor.palette().centers, pretrained.palette.centers):
        raise UserError(f"{path} is of another model than {path.parent}; delete it to export without it")
    return config, processor, origin["weights"]


def _file_type(weights: hf_weights.Weights) -> str:
    """The type that can hold all of the numbers."""
    types = {tensor.dtype for tensor in weights.tensors.values()}
    return types.pop() if len(types) == 1 else "F32"


def import_(ref: str | Path, out: str | Path, clusters: str | None = None, revision: str | None = None) -> Path:
    """Writes the Hugging Face model `ref` as the run directory `out`, which must be new or empty.

    `clusters`: a palette file, for directories without a preprocessor_config.json of their own.
    """
    check_new(out)
    directory = resolve(ref, revision)
    if not is_huggingface(directory):
        raise UserError(f"{ref} is no Hugging Face directory: its config.json has no model_type")
    weights = hf_weights.open_directory(directory)
    processor = _with_clusters(clusters, weights.model.seq_len) if clusters else processor_of(directory)
    config = of_weights(directory, weights, processor)
    palette = processor.palette()
    params = hf_weights.read_params(weights.tensors, weights.model)

    def write(folder: Path) -> None:
        configuration.save(config, folder)
        palette.save(folder / "palette.npy")
        origin = {"config": read_json(directory / "config.json"), "preprocessor": processor.to_dict()}
        origin["weights"] = _file_type(weights)
        write_text(folder / ORIGIN, json.dumps(origin, indent=1) + "\n")
        checkpoint.save_params(folder, params, step=0)

    return write_new(out, write)


def _with_clusters(path: str, positions: int) -> ImageGPTImageProcessor:
    side = math.isqrt(positions)
    if side * side != positions:
        raise UserError(
            f"{positions} positions are no square: write a preprocessor_config.json with size and clusters "
            "instead of giving --clusters"
        )
    return ImageGPTImageProcessor(clusters=Palette.load(path).centers.tolist(), size={"height": side, "width": side})


def check_new(out: str | Path) -> None:
    """Raises UserError unless `out` is free: nothing that is there is ever written over."""
    if "://" in str(out):
        raise UserError(f"--out={out} is a bucket; write to a local or mounted path")
    out = Path(out)
    try:
        free = not out.exists() or (out.is_dir() and not any(out.iterdir()))
    except OSError as error:
        raise UserError(f"--out={out} cannot be written: {error.strerror}; name another place") from None
    if not free:
        raise UserError(f"--out={out} exists already; name a new directory")


def write_new(out: str | Path, write: Callable[[Path], None]) -> Path:
    """Has `write` fill a folder beside `out`, and renames it when it is whole. If `write` fails, nothing is left."""
    out = Path(out).absolute()
    partial = out.with_name(f"{out.name}.{os.getpid()}.partial")  # nobody else's
    try:
        partial.mkdir(parents=True)
        try:
            write(partial)
            if out.exists():
                out.rmdir()  # empty: `check_new` has seen to it
            os.rename(partial, out)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    except OSError as error:
        raise UserError(f"--out={out} cannot be written: {error.strerror or error}; name another place") from None
    return out


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(
        "python -m igpt.huggingface", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    out = commands.add_parser("export", help="a model of ours -> a Hugging Face directory")
    out.add_argument("--model", required=True, help="a run directory")
    out.add_argument("--step", type=int, help="checkpoint to export (default: the newest, or of fine-tuning the best)")
    out.add_argument("--out", required=True, help="the Hugging Face directory to make")
    into = commands.add_parser("import", help="a Hugging Face directory or hub id -> a run directory")
    into.add_argument("--from", dest="ref", required=True, help="a Hugging Face directory or hub id")
    into.add_argument("--clusters", help="palette .npy, where the directory has no preprocessor_config.json")
    into.add_argument("--revision", help="of a hub id: branch, tag or commit")
    into.add_argument("--out", required=True, help="the run directory to make")
    args = parser.parse_args(argv)
    with reported():
        if args.command == "export":
            made = export(args.model, args.out, args.step)
            print(f"wrote {made}: config.json, preprocessor_config.json and the weights")
        else:
            made = import_(args.ref, args.out, args.clusters, args.revision)
            print(describe(outline(made), made))


def describe(pretrained: Pretrained, made: Path) -> str:
    """What was imported, and what one would want to run next."""
    model = pretrained.model.config
    heads = [name for name, there in (("palette head", model.pixel_head), ("classifier", model.num_classes)) if there]
    lines = [
        f"wrote {made}: width {model.width}, depth {model.depth}, {model.num_heads} heads, {model.seq_len} positions, "
        f"{model.vocab_size} colours, {' and '.join(heads) or 'no head'}; {count_params(model):,} parameters",
        "next:",
    ]
    if model.pixel_head and model.causal:
        lines.append(f"  python -m igpt.sample --model={made} --num=16 --out=samples.png")
    lines.append(
        f"  python eval_probe.py --config=configs/probe_digits.py --config.source=npz:images.npz --model={made} "
        f"--workdir={made}/probe"
    )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
