"""What a run measured and drew, as its directory tells: the figures and the pictures of a model card."""

import contextlib
import math
from pathlib import Path
from typing import NamedTuple

from igpt.errors import UserError
from igpt.files import AnyPath, read_json
from igpt.plots import check_drawing, loss_curve
from igpt.track.lines import records

CLASSES, DRAWING = "image-classification", "unconditional-image-generation"  # tasks, as the hub calls them
PICTURES = ("samples.png", "curves.png", "confusion.png", "probe.png")
PIXEL_METRICS = {"eval/bits_per_dim": ("bits_per_dim", "bits per dimension"), "eval/loss": ("loss", "nats per token")}


class Figure(NamedTuple):
    """One figure: its task, the images it was measured on, its kind and name, its value, and its 95 % interval.

    `source` is that of the images, if it is not that of the run's own data.
    """

    task: str
    images: str
    kind: str
    name: str
    value: float
    interval: tuple[float, float] | None = None
    source: str = ""


def figures(directory: AnyPath, step: int, classifies: bool, depth: int) -> tuple[Figure, ...]:
    """The figures that a run measured at this step: test accuracy, linear probe, validation loss."""
    found = []
    tuned, probe = _results(directory / "finetune.json", step), _results(directory / "probe" / "probe.json", step)
    if classifies and _is_number(tuned.get("test_accuracy")):
        found.append(Figure(CLASSES, "test", "accuracy", "accuracy", tuned["test_accuracy"], _interval(tuned)))
    with contextlib.suppress(KeyError, TypeError, StopIteration):  # another program may have written the file
        fits = probe["pretrained"]["layers"]
        best = next(fit for fit in fits if fit["layer"] == probe["pretrained"]["best_layer"])
        if _is_number(best["test_accuracy"]):
            pool = str(probe.get("solver", {}).get("pool", "mean"))
            kind = "an attentive probe" if pool.startswith("attention") else "a linear probe"
            name = f"accuracy of {kind} on layer {best['layer']} of {depth}"
            name += f", pool {pool}" if pool != "mean" else ""
            source = str(probe.get("source") or "")
            found.append(Figure(CLASSES, "test", "accuracy", name, best["test_accuracy"], _interval(best), source))
    evaluated = _records(directory, step).get(step, {})
    if classifies and "eval/accuracy" in evaluated:
        found.append(Figure(CLASSES, "validation", "accuracy", "accuracy", evaluated["eval/accuracy"]))
    for metric, (kind, name) in ({} if classifies else PIXEL_METRICS).items():
        if metric in evaluated:
            found.append(Figure(DRAWING, "validation", kind, name, evaluated[metric]))
    return tuple(found)


def pictures(directory: AnyPath, step: int, classifies: bool, folder: Path) -> dict[str, str]:
    """Writes the pictures of a run up to this step into `folder`. Returns {file name: what it shows}."""
    shown = {}
    drawn = [path for path in (directory / "samples").glob("*.png") if path.stem.isdigit() and int(path.stem) <= step]
    if drawn and not classifies:
        (folder / "samples.png").write_bytes(max(drawn).read_bytes())
        shown["samples.png"] = f"Images that the model drew after step {int(max(drawn).stem):,}"
    records = _records(directory, step)
    curves = {
        label: {number: record[metric] for number, record in records.items() if metric in record}
        for label, metric in (("training images", "train/loss"), ("validation images", "eval/loss"))
    }
    if any(len(curve) > 1 for curve in curves.values()):
        check_drawing()
        loss_curve(curves, folder / "curves.png", "loss" if classifies else "loss (nats per token)")
        shown["curves.png"] = "The loss by step"
    for path, of, text in (
        ("confusion.png", "finetune.json", "The confusion matrix on the test images"),
        ("probe/probe.png", "probe/probe.json", "The accuracy of probes, layer by layer"),
    ):
        if (directory / path).is_file() and _results(directory / of, step):
            (folder / Path(path).name).write_bytes((directory / path).read_bytes())
            shown[Path(path).name] = text
    return shown


def _results(path: AnyPath, step: int) -> dict:
    """The content of a JSON file if it was measured at this step; otherwise {}."""
    with contextlib.suppress(UserError):
        content = read_json(path)
        return content if content.get("step") == step else {}
    return {}


def _records(directory: AnyPath, step: int) -> dict[int, dict[str, float]]:
    """The finite metrics of metrics.jsonl by step, up to `step`. If a run repeated a step, its last values count."""
    found = {}
    for record in records(directory):
        if record["step"] <= step:
            numbers = {name: value for name, value in record.items() if _is_number(value)}
            found.setdefault(record["step"], {}).update(numbers)
    return found


def _interval(result: dict) -> tuple[float, float] | None:
    match result.get("interval"):
        case [low, high] if _is_number(low) and _is_number(high):
            return low, high
    return None


def _is_number(value) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)
