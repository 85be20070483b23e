"""The classes of image files: names and probabilities, from a model with a classifier.

    igpt predict --model=runs/digits-ft --preprocess=shrink photo.png
    igpt predict --model=runs/flowers --top=3 --json=classes.json photos/*.jpg

Images are resized as the model's own training resized them, unless --preprocess says otherwise. Files that cannot be
read are named at the end, and the exit code is then 2.
"""

import functools
import sys
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Float

from igpt.command import Parser, add_shared, at_least
from igpt.data.batches import Drops, eval_batches
from igpt.data.classes import full_names
from igpt.data.examples import EncodedImages, Split
from igpt.data.folder import ImagePaths, printable
from igpt.data.images import Preprocess
from igpt.errors import UserError
from igpt.files import check_writable, write_json, written
from igpt.interop.hub import resolve
from igpt.interop.load import Pretrained, load, outline, picture_settings
from igpt.loss import masks_of
from igpt.sharding import batch_shards, make_mesh, one_device, process_rows, replicate
from igpt.state import run_batches


def predict(
    pretrained: Pretrained, split: Split, batch_size: int = 64, masks: int = 5, mesh: Mesh | None = None
) -> Float[np.ndarray, "N C"]:
    """The probability of each class for each image of a split; NaN for images that the split passes over as unreadable.

    A BERT network runs once for each of `masks` masks, and the probabilities are means. `mesh` is the mesh that the
    model was loaded onto. Raises UserError if the model has no classifier.
    """
    check_classifies(pretrained, "this model")
    mesh, batch_size = mesh or one_device(), min(batch_size, len(split))
    batch_size += -batch_size % batch_shards(mesh)
    graph, params = nnx.split(pretrained.model)
    step = functools.partial(_probabilities, graph)
    drops = None if pretrained.model.config.causal else Drops(pretrained.config.objective.drop_rate, masks)
    batches = eval_batches(split, pretrained.tokenizer, batch_size, process_rows(batch_size, mesh), drops)
    with jax.set_mesh(mesh):
        return np.concatenate([*run_batches(step, params, batches, batch_size, mesh)])[: len(split)]


# Compiled once for all calls.
@functools.partial(jax.jit, static_argnames="graph")
def _probabilities(graph, params, batch):
    """The probabilities [B, C] of a whole batch, replicated on all devices."""
    model = nnx.merge(graph, params)
    logits = jnp.stack([model.classify(batch["tokens"], keep) for keep in masks_of(batch)])
    shares = jnp.mean(jax.nn.softmax(logits, axis=-1), axis=0)
    return replicate(jnp.where(batch["mask"][:, None] > 0, shares, jnp.nan))


def check_classifies(pretrained: Pretrained, ref: str) -> None:
    """Raises UserError unless the model has a classifier."""
    if not pretrained.model.config.num_classes:
        raise UserError(
            f"{ref} has no classifier; fine-tune it first, as configs/finetune_digits.py does: python train.py "
            "--config=configs/finetune_digits.py --config.init_from=MODEL --workdir=RUN"
        )


def best_classes(shares: np.ndarray, names: Sequence[str], top: int) -> list[dict]:
    """The `top` likeliest classes of an image with probabilities [C]: [{"class": name, "probability": share}, ...]."""
    order = np.argsort(-shares, kind="stable")[:top]
    return [{"class": names[i], "probability": float(shares[i])} for i in order]


def add_arguments(parser: Parser) -> None:
    add_shared(parser, "model", "step")
    parser.add_argument("files", nargs="+", metavar="FILE", help="image files")
    parser.add_argument("--top", type=at_least(1), default=5, help="classes to name for each image (default 5)")
    parser.add_argument("--preprocess", help="none, shrink or crop (default: as in training)")
    parser.add_argument("--masks", type=at_least(1), default=5, help="masks per image, for BERT (default 5)")
    add_shared(parser, "batch_size", "json", "fsdp", "tensor")


def run(args) -> None:
    """Prints the likeliest classes of each file, and writes them to the file that --json names."""
    if args.json:
        check_writable(args.json, "--json")
    directory = resolve(args.model)
    shapes = outline(directory)
    check_classifies(shapes, args.model)
    settings = picture_settings(shapes.config, args.preprocess)
    images = EncodedImages(ImagePaths(args.files, "."), Preprocess.of(settings), settings.channels, skip=True)
    mesh = make_mesh(fsdp=args.fsdp, tensor=args.tensor)
    pretrained = load(directory, args.step, mesh)
    try:
        shares = predict(pretrained, Split(images, None), args.batch_size, args.masks, mesh)
    except UserError:
        if len(images.unreadable) < len(args.files):
            raise
        # No file can be read: all are named below.
    names = full_names(pretrained.class_names, pretrained.model.config.num_classes)
    results = []
    for i, file in enumerate(args.files):
        if i in images.unreadable:
            results.append({"file": file, "error": images.unreadable[i]})
            continue
        best = best_classes(shares[i], names, args.top)
        results.append({"file": file, "classes": best})
        likeliest = ", ".join(f"{one['class']} {100 * one['probability']:.1f} %" for one in best)
        print(f"{printable(file)}: {likeliest}", flush=True)
    if args.json:
        with written(f"--json={args.json}"):
            write_json(args.json, {"model": args.model, "step": pretrained.step, "files": results})
    if images.unreadable:
        sys.stdout.flush()
        reasons = "\n  ".join(images.unreadable[i] for i in sorted(images.unreadable))
        raise UserError(f"{len(images.unreadable)} of {len(args.files)} files cannot be read:\n  {reasons}")
