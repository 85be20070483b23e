"""Converts a Hugging Face directory, or a TensorFlow checkpoint that OpenAI released, to a run directory.

    igpt import --from=hf_digits --out=runs/imported
    igpt import --checkpoint=model.ckpt-1000000 --clusters=kmeans_centers.npy --size=s --out=runs/igpt-s

An imported run can be probed, sampled, completed, fine-tuned and exported. OpenAI's download.py
fetches the files of a checkpoint: model.ckpt-STEP.index with all its .data-* shards, and the colour clusters.
"""

import math
import shlex
from pathlib import Path

from igpt.command import Parser
from igpt.config import Config
from igpt.data.classes import save_names
from igpt.errors import UserError
from igpt.files import AnyPath, check_new, read_json, write_json, write_new
from igpt.interop import hf_weights, openai
from igpt.interop.export import ORIGIN, PICTURES_OF_ORIGIN, copy_pictures, kept_files
from igpt.interop.hub import PROCESSOR, resolve
from igpt.interop.load import Pretrained, class_names_of, config_of_weights, is_huggingface, outline, processor_of
from igpt.interop.mapping import abstract_params, read_params
from igpt.interop.processor import ImageGPTImageProcessor
from igpt.model import PRESETS, count_params
from igpt.palette import Palette
from igpt.run import checkpoint as checkpoints
from igpt.run.directory import save_config


def import_directory(
    ref: str | Path, out: str | Path, clusters: str | Path | None = None, revision: str | None = None
) -> Path:
    """Writes the Hugging Face model `ref` as the run directory `out`, which must be new or empty.

    `clusters` is a palette file. It replaces the clusters of preprocessor_config.json, or stands in for that file.
    """
    check_new(out)
    directory = resolve(ref, revision)
    if not is_huggingface(directory):
        raise UserError(f"{ref} is not a Hugging Face directory: its config.json has no model_type; give another")
    weights = hf_weights.open_directory(directory)
    positions = weights.model.seq_len
    side = math.isqrt(positions)
    if not clusters:
        processor = processor_of(directory)
    elif (directory / PROCESSOR).is_file():
        centers = Palette.load(clusters).centers.tolist()
        processor = ImageGPTImageProcessor.from_pretrained(directory, clusters=centers)
    elif side * side == positions:
        processor = ImageGPTImageProcessor(clusters=Palette.load(clusters).centers.tolist(), size=side)
    else:
        problem = f"{positions} positions are no square number, so the image size is unknown"
        raise UserError(f'{problem}: write a preprocessor_config.json with "size" and "clusters"')
    config, palette = config_of_weights(directory, weights, processor), processor.palette()
    origin = {"config": read_json(directory / "config.json"), "preprocessor": processor.to_dict()}
    origin |= {"weights": weights.dtype} | kept_files(directory)
    return _write_run(out, config, palette, weights.read(), origin, class_names_of(directory), directory)


def import_checkpoint(checkpoint: str | Path, clusters: str | Path, out: str | Path, size: str | None = None) -> Path:
    """Writes a TensorFlow checkpoint and its colour clusters as the run directory `out`, which must be new or empty.

    `size` is the name in PRESETS that the checkpoint must match, or None. Raises UserError if files are missing,
    damaged or of another network. It is raised before anything is written.
    """
    check_new(out)
    if size is not None and size not in PRESETS:
        raise UserError(f"--size={size} is not known; choose one of {', '.join(PRESETS)}, or leave it out")
    palette = Palette.load(clusters)
    prefix = openai.find_prefix(checkpoint)
    variables = openai.open_checkpoint(prefix)
    model = openai.read_model_config(variables, prefix)
    if size is not None:
        openai.check_size(size, model, prefix)
    if palette.vocab_size != model.vocab_size:
        problem = f"{clusters} has {palette.vocab_size} colours, but the network of {prefix} has {model.vocab_size}"
        raise UserError(f"{problem}; give the clusters that it was trained with")
    side = math.isqrt(model.seq_len)
    config = Config.of_network(model, (side, side), channels=palette.channels)
    params = read_params(variables, openai.targets(variables), abstract_params(model))
    return _write_run(out, config, palette, params)


def _write_run(
    out: str | Path,
    config: Config,
    palette: Palette,
    params: dict,
    origin: dict | None = None,
    class_names: tuple[str, ...] | None = None,
    pictures: AnyPath | None = None,
) -> Path:
    """Writes a run directory with one checkpoint and its class names.

    For a later export it keeps `origin`, and the pictures of the model card that lie in the folder `pictures`.
    """

    def write(folder: Path) -> None:
        save_config(config, folder)
        palette.save(folder / "palette.npy")
        if origin:
            write_json(folder / ORIGIN, origin)
        if class_names:
            save_names(class_names, folder)
        if pictures:
            copy_pictures(pictures, folder / PICTURES_OF_ORIGIN)
        checkpoints.save_params(folder, params, step=0)

    return write_new(out, write)


def add_arguments(parser: Parser) -> None:
    parser.add_argument("--from", dest="ref", help="a Hugging Face directory or hub id")
    parser.add_argument("--revision", help="branch, tag or commit of the hub id")
    parser.add_argument("--checkpoint", help="OpenAI's checkpoint: the path that its files have in common, or one file")
    parser.add_argument("--size", help=f"the size that OpenAI's checkpoint must have: one of {', '.join(PRESETS)}")
    parser.add_argument("--clusters", help="a palette .npy: OpenAI's kmeans_centers.npy, or other clusters for --from")
    parser.add_argument("--out", required=True, help="the run directory to make")


def run(args) -> None:
    """`igpt import`."""
    if (args.ref is None) == (args.checkpoint is None):
        raise UserError("give either --from, a Hugging Face directory or hub id, or --checkpoint, OpenAI's")
    if args.ref:
        if args.size:
            raise UserError("--size is for --checkpoint only; leave it out: a Hugging Face directory has its own size")
        if args.revision and Path(args.ref).is_dir():
            raise UserError(f"--revision is for ids of the hub, and {args.ref} is a directory; leave it out")
        made = import_directory(args.ref, args.out, args.clusters, args.revision)
    else:
        if args.revision or not args.clusters:
            needed = "--clusters=kmeans_centers.npy, the palette of that checkpoint"
            raise UserError(f"--checkpoint needs {needed}, and cannot be combined with --revision")
        made = import_checkpoint(args.checkpoint, args.clusters, args.out, args.size)
    print(_report(outline(made), made))


def _report(pretrained: Pretrained, made: Path) -> str:
    """The imported network, and the commands that a user is likely to run next."""
    model, path, probe = pretrained.model.config, shlex.quote(str(made)), shlex.quote(f"{made}/probe")
    heads = [name for name, there in (("palette head", model.pixel_head), ("classifier", model.num_classes)) if there]
    lines = [
        f"wrote {made}: width {model.width}, depth {model.depth}, {model.num_heads} heads, {model.seq_len} positions, "
        f"{model.vocab_size} colours, {' and '.join(heads) or 'no head'}; {count_params(model):,} parameters",
        "next:",
    ]
    if model.pixel_head and model.causal:
        what = "--num=16" if model.sos else "--complete=image.png"
        lines.append(f"  igpt sample --model={path} {what} --out=samples.png")
    if model.num_classes:
        lines.append(f"  igpt predict --model={path} --preprocess=shrink image.png")
    command = "python eval_probe.py --config=configs/probe.py --config.source=npz:images.npz"
    lines.append(f"  {command} --model={path} --workdir={probe}")
    if not model.causal:
        lines.append("trained with the BERT objective: it can be probed, but not sampled")
    return "\n".join(lines)
