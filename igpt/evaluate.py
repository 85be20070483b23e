"""The mean loss of a model on a data set, in nats per token, and the accuracy of its classifier.

    igpt evaluate --model=runs/digits
    igpt evaluate --model=runs/igpt-s --source=tfds:imagenet2012 --preprocess=crop
    igpt evaluate --model=runs/flowers --source=folder:new-photos --split=all
    igpt evaluate --model=runs/digits --workdir=runs/digits/test --track=tensorboard,wandb

Compare the second command's loss with OpenAI's README: 2.0895 for iGPT-S on ImageNet at 32 x 32. Classes of the model
and of the source meet by name. The command uses all devices. With several processes, start it in each process.
"""

import functools
from collections.abc import Sequence

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Float, Int

from igpt.command import Parser, add_shared, at_least
from igpt.data.batches import Drops, eval_batches
from igpt.data.classes import class_counts, full_names, listed, with_classes
from igpt.data.examples import SPLITS, Split, check_classes
from igpt.data.settings import CHOICES
from igpt.data.sources import open_source
from igpt.errors import UserError
from igpt.files import check_holds_no_run, check_workdir, check_writable, write_json, written
from igpt.interop.hub import resolve
from igpt.interop.load import Pretrained, data_settings, load, outline
from igpt.loss import bits_per_dim, make_loss, wilson_interval
from igpt.run import cluster
from igpt.sharding import batch_shards, make_mesh, one_device, process_rows, replicate
from igpt.state import run_batches
from igpt.tokenizer import check_same
from igpt.track.lines import records
from igpt.track.trackers import Trackers


def evaluate(
    pretrained: Pretrained, split: Split | Sequence[Split], batch_size: int, masks: int = 5, mesh: Mesh | None = None
) -> dict:
    """Returns means over one or several splits: loss (nats per token, with its standard error), accuracy.

    One image has no standard error. The accuracy comes with its 95 % interval and by class, {name: accuracy}, for the
    classes that have images. A BERT network runs once for each of `masks` masks: it predicts the dropped positions, and
    the masks vote on the class. `mesh` is the mesh that the model was loaded onto. Raises UserError if none of the
    model's heads can be tested on the split.
    """
    mesh = mesh or one_device()
    batch_size += -batch_size % batch_shards(mesh)
    model, objective, data = pretrained.model.config, pretrained.config.objective, pretrained.config.data
    graph, params = nnx.split(pretrained.model)
    splits = [split] if isinstance(split, Split) else split
    classifies = bool(model.num_classes) and all(part.labels is not None for part in splits)
    if not (model.pixel_head or classifies):
        raise UserError("this model has no head that these images could test: it gives features only; probe them")
    step = functools.partial(_losses, graph, pixels=model.pixel_head, classifies=classifies)
    drops = None if model.causal else Drops(objective.drop_rate, masks)
    rows = process_rows(batch_size, mesh)
    batches = (batch for part in splits for batch in eval_batches(part, pretrained.tokenizer, batch_size, rows, drops))
    with jax.set_mesh(mesh):
        parts = list(run_batches(step, params, batches, batch_size, mesh))
    real = np.concatenate([part["mask"] for part in parts]) > 0
    each = {name: np.concatenate([part[name] for part in parts])[real] for name in parts[0]}
    results = {"images": int(real.sum())}
    if model.pixel_head:
        losses = each["generative_loss" if classifies else "loss"].astype(np.float64)
        results["loss"] = float(losses.mean())
        if len(losses) > 1:
            results["standard_error"] = float(losses.std(ddof=1) / np.sqrt(len(losses)))
        if model.causal:
            results[pretrained.tokenizer.bits_name] = bits_per_dim(
                results["loss"], model, *data.image_size, data.channels
            )
    if classifies:
        correct = int(each["accuracy"].sum())
        results["classification_loss"] = float(each["classification_loss"].mean())
        results |= {"accuracy": correct / results["images"], "interval": wilson_interval(correct, results["images"])}
        names = full_names(pretrained.class_names, model.num_classes)
        results["accuracy_by_class"] = accuracy_by_class(each["label"], each["accuracy"], names)
    return results


@functools.partial(jax.jit, static_argnames=("graph", "pixels", "classifies"))  # compiled once for all calls
def _losses(graph, params, batch, pixels: bool, classifies: bool) -> dict:
    """The losses of each image of a whole batch, with its mask and its labels, replicated on all devices."""
    given = {name: batch[name] for name in ("mask", "label") if name in batch}
    losses = make_loss(graph, float(pixels), float(classifies))(params, batch)
    return jax.tree.map(replicate, losses | given)


def accuracy_by_class(labels: Int[np.ndarray, "N"], correct: Float[np.ndarray, "N"], names: Sequence[str]) -> dict:
    """The mean of `correct` (1.0 or 0.0) for each class that has images: {names[label]: mean}."""
    classes, index, counts = np.unique(labels, return_inverse=True, return_counts=True)
    means = np.bincount(index, weights=correct) / counts
    known = dict(enumerate(names))
    return {known.get(label, str(label)): mean for label, mean in zip(classes.tolist(), means.tolist(), strict=True)}


def record(results: dict, trackers: Trackers) -> None:
    """Records the numbers of an evaluation, named by their split, such as test/loss. Raises UserError on failure.

    It adds to the records that the folder has already, and removes none, whatever their steps are.
    """
    numbers = {name: value for name, value in results.items() if isinstance(value, int | float) and name != "step"}
    with trackers, written(f"--workdir={trackers.folder}"):
        trackers.folder.mkdir(parents=True, exist_ok=True)
        last = max([results["step"], *(earlier["step"] for earlier in records(trackers.folder))])
        trackers.open({name: results[name] for name in ("model", "step", "source", "split")}, after=last)
        trackers.summary(results["step"], {f"{results['split']}/{name}": x for name, x in numbers.items()})


def _trackers(args) -> Trackers | None:
    """The trackers that the command line names. Raises UserError for a wrong name before the evaluation."""
    if args.workdir is None:
        if args.track is not None:
            raise UserError(f"--track={args.track} needs --workdir, the folder of the records that trackers copy")
        return None
    track = "tensorboard" if args.track is None else args.track
    names = tuple(name.strip() for name in track.split(",") if name.strip())
    workdir = check_workdir(args.workdir)
    check_holds_no_run(workdir)
    return Trackers(workdir, names, "evaluate", cluster.is_first_process())


def add_arguments(parser: Parser) -> None:
    add_shared(parser, "model", "step")
    parser.add_argument("--source", help="images, written as data.source (default: the model's training data)")
    parser.add_argument("--preprocess", help="none, shrink or crop (default: as in training)")
    skip = "at an image that cannot be read (default: as in training)"
    parser.add_argument("--on_unreadable", choices=CHOICES["on_unreadable"], help=skip)
    which = "all: every image of the source (default test)"
    parser.add_argument("--split", default="test", choices=(*SPLITS, "all"), help=which)
    parser.add_argument("--masks", type=at_least(1), default=5, help="masks per image, for BERT (default 5)")
    add_shared(parser, "data_dir", "batch_size", "json", "fsdp", "tensor")
    kept = "a folder for metrics.jsonl and the trackers; adds to the records in it"
    parser.add_argument("--workdir", help=kept)
    trackers = "with --workdir: where metrics.jsonl is copied to, some of tensorboard,wandb,trackio"
    parser.add_argument("--track", help=f"{trackers} (default tensorboard)")
    cluster.add_process_arguments(parser)


def run(args) -> None:
    """Evaluates a model as the command line says. Prints the results and writes them to the file that --json names."""
    cluster.join_from(args)
    tracked = _trackers(args)
    if args.json and cluster.is_first_process():
        check_writable(args.json, "--json")
    directory = resolve(args.model)
    shapes = outline(directory)
    changes = {name: getattr(args, name) for name in ("source", "preprocess", "on_unreadable", "data_dir")}
    settings = data_settings(shapes.config, **changes)
    if not settings.source:
        raise UserError(f"{args.model} was not trained here, so that its images are not known; give --source")
    source = with_classes(open_source(settings, whole=args.split == "all"), shapes.class_names, args.model)
    check_same(shapes.tokenizer, args.model, source.tokenizer, f"--source={source.name}")
    splits = [*source.splits().values()] if args.split == "all" else [source.splits()[args.split]]
    if shapes.model.config.num_classes and all(split.labels is not None for split in splits):
        check_classes(splits, shapes.model.config.num_classes)
        if cluster.is_first_process():
            print(f"{'classes':<20}{class_counts(source)}", flush=True)
    mesh = make_mesh(fsdp=args.fsdp, tensor=args.tensor)
    pretrained = load(directory, args.step, mesh)
    results = {"model": args.model, "step": pretrained.step, "source": source.name, "split": args.split}
    results |= evaluate(pretrained, splits, args.batch_size, args.masks, mesh)
    if not cluster.is_first_process():
        return
    for name, value in results.items():  # first, so that a full disk does not lose them
        print(f"{name:<20}{_printed(value)}", flush=True)
    if source.unreadable:  # only images that this process read are listed
        print(f"passed over {len(source.unreadable)} unreadable images, such as: {source.unreadable[0]}", flush=True)
    if tracked:
        record(results, tracked)
    if args.json:
        with written(f"--json={args.json}"):
            write_json(args.json, results)


def _printed(value) -> str:
    if isinstance(value, dict):
        return listed([f"{part}: {share:.4f}" for part, share in value.items()])
    if isinstance(value, tuple):
        return " to ".join(f"{bound:.4f}" for bound in value)
    return f"{value:.6g}" if isinstance(value, float) else str(value)
