"""Linear probe: how well the frozen features of each layer of a model tell classes apart.

    python eval_probe.py --config=configs/probe_digits.py --model=runs/digits --workdir=runs/digits/probe
    python eval_probe.py --config=configs/probe_digits.py --model=runs/digits --workdir=runs/digits/few \\
        --config.labels_per_class="(4,25)"
    python eval_probe.py --config=configs/probe_digits.py --model=runs/digits --workdir=runs/digits/probes \\
        --config.steps=all

Prints accuracy by layer beside two baselines fitted in the same way: the raw pixels, and an untrained network of
the same shape. Writes probe.json and probe.png to --workdir.
"""

import json
import os
import tempfile
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from ml_collections import ConfigDict
from tqdm import tqdm

from igpt import checkpoint
from igpt import config as configuration
from igpt.data import Drops
from igpt.errors import UserError
from igpt.examples import Source, Split, check_labels, few_labels
from igpt.model import ImageGPT
from igpt.plots import probe_curve
from igpt.pretrained import Pretrained, check_same_palette, load, outline, resolve
from igpt.probe import Features, Solver, fit_probe, keep_features, raw_pixels, stream_features
from igpt.sharding import check_batch_size, make_mesh
from igpt.sources import open_source

SPLITS = ("train", "validation", "test")


def run(config: ConfigDict, ref: str, workdir: str | Path) -> dict:
    """Probes layers of the model `ref` and returns the results that are written to workdir/probe.json.

    Raises UserError before anything is computed.
    """
    check(config)
    workdir = Path(workdir)
    mesh = make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    check_batch_size("batch_size", config.batch_size, 1, mesh)
    directory = resolve(ref)
    shapes = outline(directory)
    settings = shapes.config.data
    settings.source = config.source or settings.source
    if not settings.source:
        raise UserError(f"{ref} was not trained here, so that its images are not known; set --config.source")
    steps = chosen_steps(config.steps, directory)
    layers = chosen_layers(config.layers, shapes.model.config.depth)
    source = open_source(settings)
    splits = [getattr(source, name) for name in SPLITS]
    check_labels(*splits)
    check_same_palette(shapes.palette, ref, source.palette, f"source={source.name}")
    subsets = {
        (k, seed): few_labels(source.train.labels, k, seed)
        for k in config.labels_per_class
        for seed in range(config.subsets)
    }
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        scratch = tempfile.TemporaryDirectory(prefix="features.", dir=workdir)
    except OSError as error:
        raise UserError(f"--workdir={workdir} cannot be made: {error.strerror}; name a writable place") from None

    probe = Probe(config, source, layers, mesh)
    results = {"model": str(ref), "step": steps[-1], "source": source.name}
    with scratch as folder:
        folder = Path(folder)
        if config.baselines:
            results |= {"raw_pixels": {}, "random_init": {}}  # in this order in the file
            pixels = probe.pixels(folder)
            results["raw_pixels"] = probe.fit(pixels, [0])
            untrained = shapes._replace(model=ImageGPT(shapes.model.config, nnx.Rngs(config.seed)))
            results["random_init"] = probe.fit_layers(probe.features(untrained, folder), "random initialisation")
        checkpoints = []
        for step in steps:
            pretrained = load(directory, step, mesh)
            features = probe.features(pretrained, folder)
            fitted = probe.fit_layers(features, f"step {pretrained.step}")
            checkpoints.append({"step": pretrained.step} | validation_loss(directory, pretrained.step) | fitted)
        results |= {"step": pretrained.step, "pretrained": fitted}
        if len(steps) > 1:
            results["checkpoints"] = checkpoints
        results["images"] = {name: len(part.labels) for name, part in zip(SPLITS, features, strict=True)}
        if source.unreadable:
            print(f"passed over {len(source.unreadable)} unreadable images, such as: {source.unreadable[0]}")
        best = fitted["best_layer"]
        if config.concatenate:
            around = neighbours(best, config.concatenate, layers)
            results["concatenated"] = {"layers": around} | probe.fit(features, around)
        if subsets:
            results["few_labels"] = {"layer": best, "features": probe.fit_subsets(features, best, subsets)}
            if config.baselines:
                results["few_labels"]["raw_pixels"] = probe.fit_subsets(pixels, 0, subsets)
        if config.features_out:
            write_features(features, Path(config.features_out))
    results["solver"] = {name: list(v) if isinstance(v, tuple) else v for name, v in vars(probe.solver).items()}
    results["metrics"] = {
        f"probe/accuracy_layer_{layer['layer']:02d}": layer["test_accuracy"]
        for layer in results["pretrained"]["layers"]
    }
    partial = workdir / "probe.json.partial"
    partial.write_text(json.dumps(results, indent=2) + "\n")
    os.replace(partial, workdir / "probe.json")
    probe_curve(results, workdir / "probe.png")
    return results


class Probe:
    """Everything that the probes of one call share."""

    def __init__(self, config: ConfigDict, source: Source, layers: list[int], mesh: jax.sharding.Mesh):
        self.config, self.source, self.layers, self.mesh = config, source, layers, mesh
        shared = dict(inverse_penalties=tuple(config.inverse_penalties), max_iter=config.max_iter, seed=config.seed)
        self.solver = Solver(config.solver, **shared, **config.sgd.to_dict())
        self.made = 0

    def _kept(self, streams, layers, folder: Path) -> list[Features]:
        self.made += 1
        return [
            keep_features(stream, layers, folder / f"{self.made}-{name}")
            for name, stream in zip(SPLITS, streams, strict=True)
        ]

    def splits(self) -> list[Split]:
        return [getattr(self.source, name) for name in SPLITS]

    def pixels(self, folder: Path) -> list[Features]:
        """The pixels of each split, as if they were a network's layer 0."""
        return self._kept([raw_pixels(split, self.source.channels) for split in self.splits()], [0], folder)

    def features(self, pretrained: Pretrained, folder: Path) -> list[Features]:
        """The features of each split; of a network with BERT's objective under masks, as it is used to."""
        model, objective = pretrained.model, pretrained.config.objective
        drops = [None] * 3
        if not model.config.causal and self.config.eval_masks:
            drops = [Drops(objective.drop_rate, n, self.config.seed) for n in (1, *[self.config.eval_masks] * 2)]
        streams = [
            stream_features(model, split, pretrained.palette, self.config.batch_size, self.mesh, self.layers, masks)
            for split, masks in zip(self.splits(), drops, strict=True)
        ]
        return self._kept(streams, self.layers, folder)

    def fit(self, parts: list[Features], layers: list[int]) -> dict:
        return fit_probe(
            [part.joined(layers) for part in parts], [part.labels for part in parts], self.solver, self.mesh
        )

    def fit_layers(self, parts: list[Features], title: str) -> dict:
        layers = [
            {"layer": layer} | self.fit(parts, [layer])
            for layer in tqdm(self.layers, desc=title, unit="layer", leave=False)
        ]
        best = max(layers, key=lambda layer: layer["validation_accuracy"])
        return {"best_layer": best["layer"], "test_accuracy": best["test_accuracy"], "layers": layers}

    def fit_subsets(self, parts: list[Features], layer: int, subsets: dict) -> list[dict]:
        """Of each number of labels a class: the test accuracy of each subset, their mean and standard deviation."""
        train, *others = parts
        found = {}
        for (k, _), indices in subsets.items():
            result = self.fit([train.take(indices), *others], [layer])
            found.setdefault(k, []).append(result["test_accuracy"])
        return [
            {"labels_per_class": k, "accuracies": each, "mean": np.mean(each), "std": np.std(each)}
            for k, each in found.items()
        ]


def chosen_steps(steps: str, directory: Path) -> list[int | None]:
    """ "" is the newest checkpoint (None), "all" every one, "100,200" those; UserError for one that is not there."""
    if not steps:
        return [None]
    there = checkpoint.finished_steps(directory)
    if steps == "all":
        if not there:
            raise UserError(f"{directory} has no checkpoints of several steps: leave config.steps empty")
        return there
    try:
        wanted = [int(step) for step in steps.split(",")]
    except ValueError:
        raise UserError(f"steps is {steps!r}; give numbers such as '1000,2000', or 'all'") from None
    if missing := [step for step in wanted if step not in there]:
        raise UserError(f"{directory} has no checkpoint of step {missing[0]}; it has {there}")
    return wanted


def chosen_layers(layers, depth: int) -> list[int]:
    wanted = sorted(set(layers)) or list(range(depth + 1))
    if not 0 <= wanted[0] <= wanted[-1] <= depth:
        raise UserError(
            f"layers is {tuple(layers)}; this model has layers 0 to {depth}, where {depth} is the final norm"
        )
    return wanted


def neighbours(best: int, count: int, layers: list[int]) -> list[int]:
    """`count` layers round the best one, as far in the middle as the network allows (section 4.2)."""
    at = layers.index(best)
    first = min(max(at - count // 2, 0), max(len(layers) - count, 0))
    return layers[first : first + count]


def validation_loss(directory: Path, step: int) -> dict:
    """What the run itself measured at this step, where it did."""
    try:
        lines = (directory / "metrics.jsonl").read_text().splitlines()
        found = [
            record["eval/loss"] for record in map(json.loads, lines) if record["step"] == step and "eval/loss" in record
        ]
    except (OSError, ValueError, KeyError):
        return {}
    return {"validation_loss": found[-1]} if found else {}


def write_features(parts: list[Features], path: Path) -> None:
    """An .npz of SPLIT_labels and, for each layer, SPLIT_layer_NN: float32 [N, D], or [N, M, D] under M masks."""
    arrays = {}
    for name, part in zip(SPLITS, parts, strict=True):
        arrays[f"{name}_labels"] = part.labels
        for layer, rows in part.layers.items():
            arrays[f"{name}_layer_{layer:02d}"] = rows[:, 0] if rows.shape[1] == 1 else rows
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("wb") as file:
            np.savez(file, **arrays)
        os.replace(partial, path)
    except OSError as error:
        raise UserError(f"features_out={path} cannot be written: {error.strerror}; name another file") from None


def check(config: ConfigDict) -> None:
    """Raises UserError for values that no probe could use."""
    from configs import probe_digits

    if missing := [name for name in probe_digits.get_config() if name not in config]:
        raise UserError(f"this is no probe configuration: it has no {', '.join(missing)}; see configs/probe_digits.py")
    least = dict(batch_size=1, max_iter=1, subsets=1, concatenate=0, eval_masks=0)
    for name, smallest in least.items():
        if config[name] < smallest:
            raise UserError(f"{name} is {config[name]}; it must be at least {smallest}")
    for name in ("steps", "batch_size"):
        if config.sgd[name] < 1:
            raise UserError(f"sgd.{name} is {config.sgd[name]}; it must be at least 1")
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
    if config.features_out and not Path(config.features_out).absolute().parent.is_dir():
        raise UserError(f"features_out={config.features_out} lies in no existing folder; make it first")


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


def main(config: ConfigDict, model: str, workdir: str) -> None:
    check(config)
    if config.mesh.cpu_devices:
        jax.config.update("jax_num_cpu_devices", config.mesh.cpu_devices)
    results = run(config, model, workdir)
    print(table(results))
    print(f"wrote {workdir}/probe.json and {workdir}/probe.png")


if __name__ == "__main__":
    configuration.run_app(
        main,
        {"model": "A run or Hugging Face directory, or a hub id.", "workdir": "Where probe.json and probe.png go."},
    )
