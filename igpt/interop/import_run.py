"""A model from elsewhere as a run directory: of Hugging Face, or OpenAI's released TensorFlow checkpoints.

    igpt import --from=hf_digits --out=runs/imported
    igpt import --checkpoint=model.ckpt-1000000 --clusters=kmeans_centers.npy --size=s --out=runs/igpt-s

An imported run can be probed, sampled, completed, started from and exported. OpenAI's files are those that its
download.py fetches: model.ckpt-STEP.index with all its .data-* shards, and the colour clusters.
"""

import json
import math
from pathlib import Path

from igpt import config as configuration
from igpt.command import Parser
from igpt.errors import UserError
from igpt.files import check_new, read_json, write_new, write_text
from igpt.interop import hf_weights, openai
from igpt.interop.export import ORIGIN, file_type
from igpt.interop.hub import resolve
from igpt.interop.load import Pretrained, is_huggingface, of_weights, outline, processor_of
from igpt.interop.processor import ImageGPTImageProcessor
from igpt.model import PRESETS, count_params
from igpt.palette import Palette
from igpt.run import checkpoint


def import_directory(
    ref: str | Path, out: str | Path, clusters: str | Path | None = None, revision: str | None = None
) -> Path:
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
        origin["weights"] = file_type(weights)
        write_text(folder / ORIGIN, json.dumps(origin, indent=1) + "\n")
        checkpoint.save_params(folder, params, step=0)

    return write_new(out, write)


def _with_clusters(path: str | Path, positions: int) -> ImageGPTImageProcessor:
    side = math.isqrt(positions)
    if side * side != positions:
        raise UserError(
            f"{positions} positions are no square: write a preprocessor_config.json with size and clusters "
            "instead of giving --clusters"
        )
    return ImageGPTImageProcessor(clusters=Palette.load(path).centers.tolist(), size={"height": side, "width": side})


def add_arguments(parser: Parser) -> None:
    parser.add_argument("--from", dest="ref", help="a Hugging Face directory or hub id")
    parser.add_argument("--revision", help="of a hub id: branch, tag or commit")
    parser.add_argument("--checkpoint", help="of OpenAI's: the path that its files have in common, or one of them")
    parser.add_argument("--size", help=f"of OpenAI's, one of {', '.join(PRESETS)}: an error if it is another")
    parser.add_argument("--clusters", help="a palette .npy: OpenAI's kmeans_centers.npy, or where --from has none")
    parser.add_argument("--out", required=True, help="the run directory to make")


def run(args) -> None:
    """Imports a model as the command line says."""
    if (args.ref is None) == (args.checkpoint is None):
        raise UserError("give --from, a Hugging Face directory or hub id, or --checkpoint, OpenAI's; one of the two")
    if args.ref:
        if args.size:
            raise UserError("--size goes with --checkpoint; a Hugging Face directory says its own")
        made = import_directory(args.ref, args.out, args.clusters, args.revision)
    else:
        if args.revision or not args.clusters:
            raise UserError("--checkpoint needs --clusters=kmeans_centers.npy, its palette, and takes no --revision")
        made = openai.import_checkpoint(args.checkpoint, args.clusters, args.out, args.size)
    pretrained = outline(made)
    print(describe(pretrained, made))
    if not pretrained.model.config.causal:
        print("trained with the BERT objective: it can be probed, but not sampled")


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
        lines.append(f"  igpt sample --model={made} --num=16 --out=samples.png")
    lines.append(
        f"  python eval_probe.py --config=configs/probe_digits.py --config.source=npz:images.npz --model={made} "
        f"--workdir={made}/probe"
    )
    return "\n".join(lines)
