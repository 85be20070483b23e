"""What a model loses on a data set, in nats a token, and how often its classifier is right.

    igpt evaluate --model=runs/digits
    igpt evaluate --model=runs/igpt-s --source=tfds:imagenet2012 --preprocess=crop

The second compares with the losses in OpenAI's README: 2.0895 for iGPT-S on ImageNet at 32 x 32. All devices take part;
where several processes share them, all run this command.
"""

import json
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from igpt.command import Parser, add_mesh_arguments, add_model_arguments, at_least
from igpt.data.batches import Drops, eval_batches
from igpt.data.examples import Split, check_labels
from igpt.data.sources import open_source
from igpt.errors import UserError
from igpt.files import write_text
from igpt.interop.hub import resolve
from igpt.interop.load import Pretrained, check_same_palette, load, outline
from igpt.loss import bits_per_dim, make_loss, wilson_interval
from igpt.run import cluster as launch
from igpt.sharding import batch_shards, make_mesh, one_device, process_rows, replicate, to_devices


def evaluate(pretrained: Pretrained, split: Split, batch_size: int, masks: int = 5, mesh: Mesh | None = None) -> dict:
    """Means over the images of a split: loss (nats a token, with its standard error), accuracy (with its interval).

    A network with BERT's objective is asked for the positions that each of `masks` masks drops; they vote on the class.
    `mesh` is the one that the model was loaded onto.
    """
    mesh = mesh or one_device()
    batch_size += -batch_size % batch_shards(mesh)
    rows = process_rows(batch_size, mesh)
    model, objective = pretrained.model.config, pretrained.config.objective
    graph, params = nnx.split(pretrained.model)
    classifies = bool(model.num_classes) and split.labels is not None
    if not (model.pixel_head or classifies):
        raise UserError("this model has no head that these images could test: it gives features only; probe them")
    loss = make_loss(graph, float(model.pixel_head), float(classifies))

    @jax.jit
    def of_every_image(params, batch):
        return jax.tree.map(replicate, loss(params, batch) | {"mask": batch["mask"]})

    drops = None if model.causal else Drops(objective.drop_rate, masks)
    each = {"generative_loss": [], "classification_loss": [], "accuracy": []}
    with jax.set_mesh(mesh):
        for batch in eval_batches(split, pretrained.palette, batch_size, rows, drops):
            values = jax.device_get(of_every_image(params, to_devices(batch, batch_size, mesh)))
            if not classifies:
                values["generative_loss"] = values["loss"]
            for name in each.keys() & values.keys():
                each[name].append(values[name][values["mask"] > 0])
    each = {name: np.concatenate(parts) for name, parts in each.items() if parts}
    results = {"images": len(next(iter(each.values())))}
    if model.pixel_head:
        losses = each["generative_loss"].astype(np.float64)
        results["loss"] = float(losses.mean())
        results["standard_error"] = float(losses.std() / np.sqrt(len(losses)))
        if model.causal:
            height, width = pretrained.config.data.image_size
            channels = pretrained.config.data.channels
            results["bits_per_dim"] = bits_per_dim(results["loss"], model.seq_len, height, width, channels)
    if classifies:
        correct = int(each["accuracy"].sum())
        results["classification_loss"] = float(each["classification_loss"].mean())
        results |= {"accuracy": correct / results["images"], "interval": wilson_interval(correct, results["images"])}
    return results


def add_arguments(parser: Parser) -> None:
    add_model_arguments(parser)
    parser.add_argument("--source", help="of the images, as data.source (default: what the model was trained on)")
    parser.add_argument("--preprocess", help="none, shrink or crop (default: as in training)")
    parser.add_argument("--data_dir", help="where tensorflow_datasets keeps its data")
    parser.add_argument("--split", default="test", choices=("train", "validation", "test"), help="(default test)")
    parser.add_argument("--batch_size", type=at_least(1), default=64, help="images at a time (default 64)")
    parser.add_argument("--masks", type=at_least(1), default=5, help="of each image, for BERT (default 5)")
    parser.add_argument("--json", help="a file for the figures")
    add_mesh_arguments(parser)
    launch.add_arguments(parser)


def run(args) -> None:
    """Evaluates a model as the command line says; prints the figures and writes them to --json."""
    launch.join_from(args)
    directory = resolve(args.model)
    shapes = outline(directory)
    settings = shapes.config.data
    for name in ("source", "preprocess", "data_dir"):
        settings[name] = getattr(args, name) or settings[name]
    if not settings.source:
        raise UserError(f"{args.model} was not trained here, so that its images are not known; give --source")
    source = open_source(settings)
    check_same_palette(shapes.palette, args.model, source.palette, f"--source={source.name}")
    split = getattr(source, args.split)
    if shapes.model.config.num_classes and split.labels is not None:
        check_labels(split, num_classes=shapes.model.config.num_classes)
    mesh = make_mesh(fsdp=args.fsdp, tensor=args.tensor)
    pretrained = load(directory, args.step, mesh)
    results = {"model": args.model, "step": pretrained.step, "source": source.name, "split": args.split}
    results |= evaluate(pretrained, split, args.batch_size, args.masks, mesh)
    if args.json and jax.process_index() == 0:
        try:
            write_text(Path(args.json), json.dumps(results, indent=1) + "\n")
        except OSError as error:
            raise UserError(f"--json={args.json} cannot be written: {error.strerror}") from None
    if jax.process_index() == 0:
        for name, value in results.items():
            print(f"{name:<20}{value}")
