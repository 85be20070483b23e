"""Linear probe: how well the frozen features of each layer of a model tell classes apart.

    python eval_probe.py --config=configs/probe_digits.py --model=runs/digits --workdir=runs/digits/probe
    python eval_probe.py --config=configs/probe_digits.py --model=runs/digits --workdir=runs/digits/few \\
        --config.labels_per_class="(4,25)"
    python eval_probe.py --config=configs/probe_digits.py --model=runs/digits --workdir=runs/digits/probes \\
        --config.steps=all

Prints accuracy by layer beside two baselines fitted in the same way: the raw pixels, and an untrained network of
the same shape. Writes probe.json and probe.png to --workdir. Where several processes share the devices, all run this
command, and each keeps all features in a folder of its own while it runs.
"""

import contextlib
import dataclasses
import functools
import json
import os
import tempfile
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict

from igpt import config as configuration
from igpt.command import Parser
from igpt.data.examples import Source, check_labels, few_labels
from igpt.data.sources import open_source
from igpt.errors import UserError, reported
from igpt.files import check_workdir, write_text
from igpt.interop.hub import resolve
from igpt.interop.load import Pretrained, check_same_palette, is_huggingface, load, outline
from igpt.model import ImageGPT
from igpt.plots import probe_curve
from igpt.probe.features import write_features
from igpt.probe.fit import SPLITS, Probe, neighbours
from igpt.run import checkpoint
from igpt.run import cluster as launch
from igpt.run.flags import parse_with_config
from igpt.sharding import check_batch_size, make_mesh, shardings


def run(config: ConfigDict, ref: str, workdir: str | Path) -> dict:
    """Probes layers of the model `ref` and returns the results that are written to workdir/probe.json.

    Raises UserError: for mistakes before anything is computed, for unreadable images and full disks when they are met.
    """
    check(config)
    workdir, first = check_workdir(workdir), jax.process_index() == 0
    check_features_out(config.features_out, workdir)
    mesh = make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    check_batch_size("batch_size", config.batch_size, 1, mesh)
    if config.solver == "sgd":
        check_batch_size("sgd.batch_size", config.sgd.batch_size, 1, mesh)
    directory = resolve(ref)
    shapes = outline(directory)
    settings = shapes.config.data
    settings.source = config.source or settings.source
    settings.preprocess = config.preprocess or settings.preprocess
    settings.data_dir = config.data_dir or settings.data_dir
    if config.validation_fraction >= 0:
        settings.validation_fraction = config.validation_fraction
    if not settings.source:
        raise UserError(f"{ref} was not trained here, so that its images are not known; set --config.source")
    shardings(nnx.to_pure_dict(nnx.state(shapes.model)), mesh)  # of a mesh that does not fit, this tells
    steps = chosen_steps(config.steps, directory)
    layers = chosen_layers(config.layers, shapes.model.config.depth)
    source = few_images(open_source(settings), config.train_images)
    check_labels(*[getattr(source, name) for name in SPLITS])
    check_same_palette(shapes.palette, ref, source.palette, f"source={source.name}")
    for count in config.labels_per_class:
        few_labels(source.train.labels, count, seed=0)
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        # NFS keeps what is removed while it is mapped until this process ends.
        scratch = tempfile.TemporaryDirectory(prefix="features.", dir=workdir, ignore_cleanup_errors=True)
    except OSError as error:
        raise UserError(f"--workdir={workdir} cannot be made: {error.strerror}; name a writable place") from None

    with scratch as folder:
        probe = Probe(config, source, layers, mesh, Path(folder))
        results = {"model": str(ref), "step": steps[-1], "source": source.name}
        if config.baselines:
            pixels = probe.pixels()
            results["raw_pixels"] = probe.fit(pixels, [0])
            results["random_init"] = probe.fit_layers(
                probe.features(untrained(shapes, config.seed, mesh)), "random initialisation"
            )
        checkpoints = []
        for step in steps:
            pretrained = load(directory, step, mesh)
            features = probe.features(pretrained)
            fitted = probe.fit_layers(features, f"step {pretrained.step}")
            checkpoints.append({"step": pretrained.step} | validation_loss(directory, pretrained.step) | fitted)
        results |= {"step": pretrained.step, "pretrained": fitted}
        if len(steps) > 1:
            results["checkpoints"] = checkpoints
        results["images"] = {name: len(part.labels) for name, part in zip(SPLITS, features, strict=True)}
        if source.unreadable and first:  # of what this process has read
            print(f"passed over {len(source.unreadable)} unreadable images, such as: {source.unreadable[0]}")
        best = fitted["best_layer"]
        if config.concatenate:
            around = neighbours(best, config.concatenate, layers)
            results["concatenated"] = {"layers": around} | probe.fit(features, around)
        if config.labels_per_class:
            results["few_labels"] = {"layer": best, "features": probe.fit_few(features, best)}
            if config.baselines:
                results["few_labels"]["raw_pixels"] = probe.fit_few(pixels, 0)
        results["solver"] = {name: list(v) if isinstance(v, tuple) else v for name, v in vars(probe.solver).items()}
        results["metrics"] = {
            f"probe/accuracy_layer_{layer['layer']:02d}": layer["test_accuracy"] for layer in fitted["layers"]
        }
        if first:
            try:
                write_text(workdir / "probe.json", json.dumps(results, indent=2) + "\n")
                probe_curve(results, workdir / "probe.png")
            except OSError as error:
                what = f"--workdir={workdir} cannot be written any more: {error.strerror}"
                raise UserError(f"{what}. What was found:\n{table(results)}") from None
        if config.features_out and first:  # last: a full disk then costs nothing else
            write_features(dict(zip(SPLITS, features, strict=True)), Path(config.features_out))
    return results


def untrained(shapes: Pretrained, seed: int, mesh: Mesh) -> Pretrained:
    """A new network of the same shapes, made where the pretrained one will lie."""
    graph, params = nnx.split(shapes.model)
    placement = shardings(nnx.to_pure_dict(params), mesh)

    @functools.partial(jax.jit, out_shardings=placement)
    def initialise():
        return nnx.to_pure_dict(nnx.state(ImageGPT(shapes.model.config, nnx.Rngs(seed))))

    return shapes._replace(model=nnx.merge(graph, initialise()))


def few_images(source: Source, count: int) -> Source:
    """The source with `count` of its training images, drawn once and for all; 0: with all."""
    if not count:
        return source
    if count > len(source.train):
        raise UserError(f"train_images is {count}; {source.name} has {len(source.train)} training images, or 0 for all")
    chosen = np.sort(np.random.default_rng(0).permutation(len(source.train))[:count])
    return dataclasses.replace(source, train=source.train.take(chosen))


def chosen_steps(steps: str, directory: Path) -> list[int | None]:
    """ "" is the newest checkpoint (None), "all" every one, "100,200" those; UserError for one that is not there."""
    there = checkpoint.agreed_steps(directory)
    if not there and (steps or not is_huggingface(directory)):
        raise UserError(
            f"{directory} has no finished checkpoint; "
            + ("leave config.steps empty for a Hugging Face model" if is_huggingface(directory) else "train first")
        )
    if not steps:
        return [None]
    if steps == "all":
        return there
    try:
        wanted = sorted({int(step) for step in steps.split(",")})
    except ValueError:
        raise UserError(f"steps is {steps!r}; give numbers such as '1000,2000', or 'all'") from None
    if missing := [step for step in wanted if step not in there]:
        raise UserError(f"{directory} has no checkpoint of step {missing[0]}; it has {there}")
    return wanted


def chosen_layers(layers, depth: int) -> list[int]:
    """Those named, in order; all where none is. UserError for one that is not there."""
    if not all(layer in range(depth + 1) for layer in layers):
        raise UserError(
            f"layers is {tuple(layers)}; this model has layers 0 to {depth}, where {depth} is the final norm"
        )
    return sorted({int(layer) for layer in layers}) or list(range(depth + 1))


def validation_loss(directory: Path, step: int) -> dict:
    """What the run itself measured at this step, where it did."""
    try:
        lines = (directory / "metrics.jsonl").read_text().splitlines()
    except (OSError, ValueError):
        return {}
    found = []
    for line in lines:
        with contextlib.suppress(ValueError, KeyError, TypeError):  # such as a last line that a kill cut short
            record = json.loads(line)
            if record["step"] == step:
                found.append(record["eval/loss"])
    return {"validation_loss": found[-1]} if found else {}


def check_features_out(name: str, workdir: Path) -> None:
    """Raises UserError unless a file of this name can be written, also into a workdir that is still to be made."""
    path = Path(name).absolute()
    writable = path.parent == workdir.absolute() or (path.parent.is_dir() and os.access(path.parent, os.W_OK))
    if name and (path.is_dir() or not writable):
        raise UserError(f"features_out={name} cannot be written; name a file in an existing, writable folder")


def check(config: ConfigDict) -> None:
    """Raises UserError for values that no probe could use."""
    from configs import probe_digits

    if missing := [name for name in probe_digits.get_config() if name not in config]:
        raise UserError(f"this is no probe configuration: it has no {', '.join(missing)}; see configs/probe_digits.py")
    least = {
        "seed": 0,
        "batch_size": 1,
        "train_images": 0,
        "concatenate": 0,
        "subsets": 1,
        "eval_masks": 0,
        "max_iter": 1,
        "sgd.steps": 1,
        "sgd.batch_size": 1,
        "sgd.weight_decay": 0.0,
        "mesh.cpu_devices": 0,
    }
    values = configuration.flatten(config)
    for name, smallest in least.items():
        if values[name] < smallest:
            raise UserError(f"{name} is {values[name]}; it must be at least {smallest}")
    if config.solver not in ("lbfgs", "sgd"):
        raise UserError(f"solver is {config.solver!r}; choose lbfgs, or sgd for data sets of ImageNet's size")
    for name, values in (
        ("inverse_penalties", config.inverse_penalties),
        ("sgd.learning_rates", config.sgd.learning_rates),
    ):
        if not values or min(values) <= 0:
            raise UserError(f"{name} is {values}; give one or more positive values, such as '(0.1,1.0)'")
    if config.labels_per_class and min(config.labels_per_class) < 1:
        raise UserError(f"labels_per_class is {config.labels_per_class}; give numbers of 1 or more, such as '(4,25)'")


def table(results: dict) -> str:
    """Test accuracy by layer, and the baselines, for the terminal."""

    def percent(entry):
        low, high = entry["interval"]
        return f"{100 * entry['test_accuracy']:>12.1f} %   [{100 * low:.1f}, {100 * high:.1f}]"

    random = {layer["layer"]: layer for layer in results.get("random_init", {}).get("layers", [])}
    lines = ["layer       pretrained    95% interval" + ("      random initialisation" if random else "")]
    for ours in results["pretrained"]["layers"]:
        line = f"{ours['layer']:02d}        {percent(ours)}"
        if random:
            line += f"  {100 * random[ours['layer']]['test_accuracy']:>12.1f} %"
        lines.append(line + ("  <- best on validation" if ours["layer"] == results["pretrained"]["best_layer"] else ""))
    if "concatenated" in results:
        joined = results["concatenated"]["layers"]
        lines.append(f"{f'{joined[0]:02d}..{joined[-1]:02d}':<10}{percent(results['concatenated'])}  side by side")
    if "raw_pixels" in results:
        lines.append(f"{'raw pixels':<10}{percent(results['raw_pixels'])}")
    for entry in results.get("checkpoints", []):
        loss = f", validation loss {entry['validation_loss']:.4f}" if "validation_loss" in entry else ""
        lines.append(
            f"step {entry['step']:>7}: best layer {entry['best_layer']:02d} {100 * entry['test_accuracy']:.1f} %{loss}"
        )
    few = results.get("few_labels", {})
    for name, label in (("features", f"layer {few.get('layer', 0):02d}"), ("raw_pixels", "raw pixels")):
        for entry in few.get(name, []):
            lines.append(
                f"{entry['labels_per_class']} labels a class, {label}: {100 * entry['mean']:.1f} % +- "
                f"{100 * entry['std']:.1f} over {len(entry['accuracies'])} subsets"
            )
    return "\n".join(lines)


def parser() -> Parser:
    """The flags of this script; `parse_with_config` adds those of the config file."""
    flags = Parser("eval_probe.py", __doc__)
    flags.add_argument("--model", required=True, help="a run or Hugging Face directory, or a hub id")
    flags.add_argument("--workdir", required=True, help="where probe.json and probe.png go")
    launch.add_arguments(flags)
    return flags


def main(argv: list[str] | None = None) -> None:
    with reported():
        args = parse_with_config(parser(), argv)
        launch.join_from(args)
        check(args.config)
        if args.config.mesh.cpu_devices:
            jax.config.update("jax_num_cpu_devices", args.config.mesh.cpu_devices)
        results = run(args.config, args.model, args.workdir)
        if jax.process_index() == 0:
            print(table(results))
            print(f"wrote {args.workdir}/probe.json and {args.workdir}/probe.png")


if __name__ == "__main__":
    main()
