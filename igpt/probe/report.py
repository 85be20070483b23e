"""What a probe prints and writes: a table for the terminal, probe.json, probe.png, and metrics for trackers."""

import contextlib
import os
from pathlib import Path

from igpt.errors import UserError
from igpt.files import AnyPath, is_bucket, write_json
from igpt.plots import probe_curve
from igpt.run.cluster import is_first_process
from igpt.track.lines import records
from igpt.track.trackers import Trackers


def check_features_out(name: str, workdir: AnyPath) -> None:
    """Raises UserError unless a file `name` can be written. The workdir need not exist, because it is made later."""
    if is_bucket(name):
        raise UserError(f"features_out={name} is in a bucket; name a local file, and copy it")
    path = Path(name).absolute()
    writable = path.parent == workdir.absolute() or (path.parent.is_dir() and os.access(path.parent, os.W_OK))
    if name and (path.is_dir() or not writable):
        raise UserError(f"features_out={name} cannot be written; name a file in an existing, writable folder")


def validation_loss(directory: AnyPath, step: int) -> dict:
    """Returns {"validation_loss": ...} if the training run logged the loss at this step, otherwise {}."""
    found = [x["eval/loss"] for x in records(directory) if x["step"] == step and "eval/loss" in x]
    return {"validation_loss": found[-1]} if found else {}


def metrics_of_layers(fitted: dict, name: str = "accuracy_layer") -> dict:
    """The test accuracy of each layer, {"probe/accuracy_layer_07": 0.9}, from the fits of one checkpoint."""
    return {f"probe/{name}_{fit['layer']:02d}": fit["test_accuracy"] for fit in fitted["layers"]}


def write_results(results: dict, workdir: AnyPath) -> None:
    """Process 0 writes probe.json and probe.png. Raises UserError, with the table of results, if that fails."""
    if not is_first_process():
        return
    with _errors_with_table(results, workdir):
        write_json(workdir / "probe.json", results, indent=2)
        probe_curve(results, workdir / "probe.png")


def record_results(results: dict, workdir: AnyPath, trackers: Trackers, config: dict) -> None:
    """Records accuracies by layer for each checkpoint, the curve, and the best layer beside the baselines."""
    with _errors_with_table(results, workdir):
        trackers.open(config)
        step = results["step"]
        for fitted in results.get("checkpoints", [{"step": step} | results["pretrained"]]):
            trackers.scalars(fitted["step"], metrics_of_layers(fitted))
        trackers.picture(step, "probe", workdir / "probe.png")
        best = results["pretrained"]["best_layer"]
        summary = {"probe/best_layer": best, "probe/accuracy": results["pretrained"]["test_accuracy"]}
        if "raw_pixels" in results:
            summary["probe/accuracy_raw_pixels"] = results["raw_pixels"]["test_accuracy"]
            summary |= metrics_of_layers(results["random_init"], "accuracy_random_layer")
        trackers.summary(step, summary)


@contextlib.contextmanager
def _errors_with_table(results: dict, workdir: AnyPath):
    """Raises UserError, with the table of results, if the block raises OSError."""
    try:
        yield
    except OSError as error:
        reason = f"{error.strerror}. The results:\n{table(results)}"
        raise UserError(f"--workdir={workdir} cannot be written any more: {reason}") from None


def table(results: dict) -> str:
    """Formats the results as text: test accuracy by layer, baselines, checkpoints, and fits on few labels."""
    random = {fit["layer"]: fit for fit in results.get("random_init", {}).get("layers", [])}
    voted = "neighbours" in results["pretrained"]["layers"][0]
    title = "layer       pretrained    95% interval" + ("      random initialisation" if random else "")
    lines = [title + ("   nearest neighbours" if voted else "")]
    for fit in results["pretrained"]["layers"]:
        beside = f"  {100 * random[fit['layer']]['test_accuracy']:>12.1f} %" if random else ""
        beside += f"  {100 * fit['neighbours']:>18.1f} %" if voted else ""
        best = "  <- best on validation" if fit["layer"] == results["pretrained"]["best_layer"] else ""
        lines.append(_line(f"{fit['layer']:02d}", fit) + beside + best)
    if joined := results.get("concatenated"):
        lines.append(_line(f"{joined['layers'][0]:02d}..{joined['layers'][-1]:02d}", joined) + "  side by side")
    if "raw_pixels" in results:
        fit = results["raw_pixels"]
        votes = f"  nearest neighbours {100 * fit['neighbours']:.1f} %" if "neighbours" in fit else ""
        lines.append(_line("raw pixels", fit) + votes)
    for entry in results.get("checkpoints", []):
        loss = f", validation loss {entry['validation_loss']:.4f}" if "validation_loss" in entry else ""
        accuracy = f"best layer {entry['best_layer']:02d} {100 * entry['test_accuracy']:.1f} %"
        lines.append(f"step {entry['step']:>7}: {accuracy}{loss}")
    few = results.get("few_labels", {})
    for name, label in (("features", f"layer {few.get('layer', 0):02d}"), ("raw_pixels", "raw pixels")):
        for entry in few.get(name, []):
            accuracy = f"{100 * entry['mean']:.1f} % +- {100 * entry['std']:.1f}"
            what = f"{entry['labels_per_class']} labels a class, {label}"
            lines.append(f"{what}: {accuracy} over {len(entry['accuracies'])} subsets")
    return "\n".join([*lines, *_learning_rate_hint(results)])


def _learning_rate_hint(results: dict) -> list[str]:
    """A line if the best layer's learning rate is the largest of those tried. Of equally good ones, it would not be."""
    best = next(fit for fit in results["pretrained"]["layers"] if fit["layer"] == results["pretrained"]["best_layer"])
    if best.get("solver") not in ("sgd", "adamw"):
        return []
    section = "attention" if best["solver"] == "adamw" else "sgd"
    rates = results["solver"].get("attention", results["solver"])["learning_rates"]
    if best["learning_rate"] < max(rates):
        return []
    largest = f"validation chose {best['learning_rate']:g}, the largest learning rate of those tried"
    return [f"{largest}; larger ones may do better: config.{section}.learning_rates"]


def _line(name: str, fit: dict) -> str:
    """A test accuracy and its interval, in percent."""
    low, high = fit["interval"]
    return f"{name:<10}{100 * fit['test_accuracy']:>12.1f} %   [{100 * low:.1f}, {100 * high:.1f}]"
