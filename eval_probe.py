"""Linear probe: how well the frozen features of each layer of a model tell classes apart.

    python eval_probe.py --config=configs/probe_digits.py --model=runs/digits --workdir=runs/digits/probe

Prints accuracy by layer beside two baselines fitted in the same way: the raw pixels, and an untrained network of
the same shape. Writes probe.json and probe.png to --workdir.
"""

import json
import os
from pathlib import Path

import numpy as np
from flax import nnx
from ml_collections import ConfigDict
from tqdm import tqdm

from igpt import config as configuration
from igpt.errors import UserError
from igpt.model import ImageGPT
from igpt.plots import probe_curve
from igpt.pretrained import load
from igpt.probe import check_labels, extract_features, fit_probe, raw_pixels
from igpt.sources import open_source


def run(config: ConfigDict, ref: str, workdir: str | Path) -> dict:
    """Probes every layer of the model `ref` and returns the results that are written to workdir/probe.json."""
    check(config)
    workdir = Path(workdir)
    pretrained = load(ref, config.step or None)
    settings = pretrained.config.data
    settings.source = config.source or settings.source
    if not settings.source:
        raise UserError(f"{ref} was not trained here, so that its images are not known; set --config.source")
    source = open_source(settings)
    check_labels(source.train, source.validation, source.test)
    splits = [split.readable() for split in (source.train, source.validation, source.test)]
    if source.unreadable:
        print(f"passed over {len(source.unreadable)} unreadable images, such as: {source.unreadable[0]}")
    check_labels(*splits)  # once more: a class may have had no image that could be read
    labels = [split.labels for split in splits]
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--workdir={workdir} cannot be made: {error.strerror}; name a writable place") from None

    def fit(features: list[np.ndarray]) -> dict:
        return fit_probe(features, labels, config.inverse_penalties, config.max_iter)

    def fit_layers(model: ImageGPT, title: str) -> dict:
        features = [extract_features(model, split, pretrained.palette, config.batch_size) for split in splits]
        layers = []
        for layer in tqdm(range(model.config.depth + 1), desc=title, unit="layer", leave=False):
            layers.append({"layer": layer} | fit([of_split[layer] for of_split in features]))
        best = max(layers, key=lambda layer: layer["validation_accuracy"])
        return {"best_layer": best["layer"], "test_accuracy": best["test_accuracy"], "layers": layers}

    untrained = ImageGPT(pretrained.model.config, nnx.Rngs(config.seed))
    results = {
        "model": str(ref),
        "step": pretrained.step,
        "source": source.name,
        "images": dict(zip(("train", "validation", "test"), map(len, splits), strict=True)),
        "inverse_penalties": list(config.inverse_penalties),
        "raw_pixels": fit([raw_pixels(split, source.channels) for split in splits]),
        "random_init": fit_layers(untrained, "random initialisation"),
        "pretrained": fit_layers(pretrained.model, "pretrained"),
    }
    results["metrics"] = {
        f"probe/accuracy_layer_{layer['layer']:02d}": layer["test_accuracy"]
        for layer in results["pretrained"]["layers"]
    }
    partial = workdir / "probe.json.partial"
    partial.write_text(json.dumps(results, indent=2) + "\n")
    os.replace(partial, workdir / "probe.json")
    probe_curve(results, workdir / "probe.png")
    return results


def check(config: ConfigDict) -> None:
    if missing := [
        name for name in ("seed", "step", "source", "batch_size", "inverse_penalties", "max_iter") if name not in config
    ]:
        raise UserError(f"this is no probe configuration: it has no {', '.join(missing)}; see configs/probe_digits.py")
    for name in ("batch_size", "max_iter"):
        if config[name] < 1:
            raise UserError(f"{name} is {config[name]}; it must be at least 1")
    penalties = config.inverse_penalties
    if not penalties or min(penalties) <= 0:
        raise UserError(f"inverse_penalties is {penalties}; give one or more positive values of C, such as '(0.1,1.0)'")


def table(results: dict) -> str:
    """Test accuracy by layer, and the baselines, for the terminal."""

    def row(name, entry, extra=""):
        low, high = entry["interval"]
        return f"{name:<10}{100 * entry['test_accuracy']:>12.1f} %   [{100 * low:.1f}, {100 * high:.1f}]{extra}"

    lines = ["layer       pretrained    95% interval      random initialisation"]
    for ours, random in zip(results["pretrained"]["layers"], results["random_init"]["layers"], strict=True):
        best = "  <- best on validation" if ours["layer"] == results["pretrained"]["best_layer"] else ""
        lines.append(row(f"{ours['layer']:02d}", ours, f"  {100 * random['test_accuracy']:>12.1f} %{best}"))
    lines.append(row("raw pixels", results["raw_pixels"]))
    return "\n".join(lines)


def main(config: ConfigDict, model: str, workdir: str) -> None:
    results = run(config, model, workdir)
    print(table(results))
    print(f"wrote {workdir}/probe.json and {workdir}/probe.png")


if __name__ == "__main__":
    configuration.run_app(
        main,
        {"model": "A run or Hugging Face directory, or a hub id.", "workdir": "Where probe.json and probe.png go."},
    )
