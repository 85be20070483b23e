"""Repeats five findings of Chen et al. 2020 on real images, at a size that a laptop can train.

python benchmarks/study.py --workdir=runs/study --out=docs/results
python benchmarks/study.py --workdir=runs/study --out=docs/results --data=fashion_mnist --idx=FOLDER

1. accuracy by layer, compared with raw pixels and random initialisation;
2. probe accuracy against validation loss, over the checkpoints of a run;
3. next pixels compared with BERT at equal compute;
4. fine-tuning: joint, classes only, from scratch;
5. few labels: a probe on features, a probe on pixels, and training from scratch.

Every part is a seeded run of train.py or eval_probe.py in a new process, stored under --workdir. A part that has
finished is not run again, so the study can be stopped and continued. --summarize runs nothing and reads what exists.
FOLDER holds the four IDX files of Fashion-MNIST's release; its images are scaled down to 14 x 14.
"""

import argparse
import gzip
import json
import math
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from report import write

T_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}  # Student's t, two-sided, by number of runs


class Study:
    """Runs train.py and eval_probe.py on one data set with several seeds, and reads their results by run name."""

    def __init__(self, name: str, workdir: Path, seeds: int):
        self.name, self.workdir, self.seeds = name, workdir, range(seeds)
        self.log = workdir / f"{name}_seconds.json"

    def path(self, run: str) -> Path:
        return self.workdir / f"{self.name}_{run}"

    def train(self, run: str, config: str, **fields) -> None:
        """Runs train.py to its end, unless that has been done."""
        fields = fields | {"train.num_samples": 16 if run.startswith("autoregressive") else 0}
        self._once(run, f"train.py --config={config} --workdir={self.path(run)}", fields, self.path(run) / "finished")

    def probe(self, run: str, folder: str = "probe", **fields) -> None:
        """Runs eval_probe.py on a run, unless that has been done."""
        model, place = self.path(run), self.path(run) / folder
        command = f"eval_probe.py --config=configs/probe_digits.py --model={model} --workdir={place}"
        fields = {"inverse_penalties": (0.01, 0.1, 1.0, 10.0, 100.0)} | fields
        self._once(f"{run}/{folder}", command, fields, place / "finished")

    def _once(self, what: str, command: str, fields: dict, finished: Path) -> None:
        if finished.exists():
            return
        command += "".join(f" --config.{name}={shlex.quote(str(value))}" for name, value in fields.items())
        print(f"\n$ python {command}", flush=True)
        start = time.perf_counter()
        subprocess.run([sys.executable, *shlex.split(command)], check=True)
        seconds = self.seconds() | {what: time.perf_counter() - start}
        self.log.write_text(json.dumps(seconds, indent=1) + "\n")
        finished.write_text(command + "\n")

    def seconds(self) -> dict:
        return json.loads(self.log.read_text()) if self.log.exists() else {}

    def read(self, run: str, file: str) -> list[dict]:
        """The JSON `file` of a run, for each seed that has one."""
        paths = [self.path(f"{run}_{seed}") / file for seed in self.seeds]
        return [json.loads(path.read_text()) for path in paths if path.exists()]


def run_digits(study: Study) -> None:
    config, finetune = "configs/digits.py", "configs/finetune_digits.py"
    often = {"train.eval_every": 260, "train.checkpoint_every": 260, "train.max_to_keep": 10}
    few = {"train.steps": 500, "train.batch_size": 20, "optim.learning_rate": 1e-3}
    for seed in study.seeds:
        study.train(f"autoregressive_{seed}", config, seed=seed, **often)
        study.probe(f"autoregressive_{seed}", seed=seed + 100, labels_per_class=(4, 25, 100), concatenate=3)
        pretrained = {"seed": seed, "init_from": study.path(f"autoregressive_{seed}")}
        study.train(f"joint_{seed}", finetune, **pretrained)
        if seed >= 3:  # more seeds serve one question only: does fine-tuning beat the probe?
            continue
        upper = {"layers": (2, 3, 4), "baselines": False}
        study.probe(f"autoregressive_{seed}", "probes", seed=seed + 100, steps="all", **upper)
        study.train(f"bert_{seed}", config, seed=seed, **often, **{"model.causal": False})
        study.probe(f"bert_{seed}", seed=seed + 100, baselines=False)
        study.train(f"classes_{seed}", finetune, **pretrained, **{"objective.generative": 0.0})
        study.train(f"scratch_{seed}", finetune, seed=seed)
        bert = {"seed": seed, "init_from": study.path(f"bert_{seed}"), "model.causal": False}
        study.train(f"bert_joint_{seed}", finetune, **bert)
        for k in (4, 25, 100):
            subset = {"data.labels_per_class": k, "data.subset_seed": seed}
            study.train(f"scratch_{k}_labels_{seed}", finetune, seed=seed, **few, **subset)


def run_fashion_mnist(study: Study) -> None:
    config = "configs/fashion_mnist.py"
    small = {
        "data.source": f"npz:{study.workdir}/fashion_mnist_14.npz",
        "data.image_size": "(14,14)",
        "data.flip": False,
        "data.validation_fraction": 2 / 70,
        "palette.colors": 16,
        "model.depth": 6,
        "train.eval_batch_size": 100,
    }
    often = {"train.eval_every": 500, "train.checkpoint_every": 500, "train.max_to_keep": 8}
    long = small | often | {"train.steps": 4000, "train.sample_every": 4000}
    tuned = {"model.num_classes": 10, "objective.classification": 1.0, "optim.schedule": "constant"}
    tuned |= {"optim.learning_rate": 5e-4, "train.steps": 3000, "train.eval_every": 250, "train.checkpoint_every": 250}
    few = tuned | {"train.steps": 300, "train.eval_every": 100, "optim.learning_rate": 1e-3}
    probe = {"train_images": 10_000, "batch_size": 100}
    for seed in study.seeds:
        study.train(f"autoregressive_{seed}", config, seed=seed, **long)
        study.probe(f"autoregressive_{seed}", seed=seed + 100, labels_per_class=(4, 25, 400), concatenate=3, **probe)
        start = {"seed": seed, "init_from": study.path(f"autoregressive_{seed}")}
        study.train(f"joint_{seed}", config, **start, **small, **tuned)
        study.train(f"classes_{seed}", config, **start, **small, **tuned, **{"objective.generative": 0.0})
        study.train(f"scratch_{seed}", config, seed=seed, **small, **tuned)
        for k in (4, 25, 400):
            subset = {"data.labels_per_class": k, "data.subset_seed": seed}
            study.train(f"scratch_{k}_labels_{seed}", config, seed=seed, **small, **few, **subset)
        study.train(f"bert_{seed}", config, seed=seed, **long, **{"model.causal": False})
        study.probe(f"bert_{seed}", seed=seed + 100, baselines=False, eval_masks=5, **probe)
        # Five masks make each evaluation five times as long, so there are fewer.
        bert = {"init_from": study.path(f"bert_{seed}"), "model.causal": False, "train.eval_every": 500}
        study.train(f"bert_joint_{seed}", config, **small, **tuned | {"seed": seed} | bert)


def shrink_fashion_mnist(idx: str, path: Path) -> None:
    """Writes the 70,000 images of the IDX files at 14 x 14, where each pixel is the mean of four."""

    def read(kind: str, header: int) -> bytes:
        parts = [Path(idx) / f"{part}-{kind}-ubyte.gz" for part in ("train", "t10k")]
        return b"".join(gzip.open(part).read()[header:] for part in parts)

    images = np.frombuffer(read("images-idx3", 16), np.uint8).reshape(-1, 14, 2, 14, 2)
    labels = np.frombuffer(read("labels-idx1", 8), np.uint8)
    partial = path.with_suffix(".partial")
    with partial.open("wb") as file:
        np.savez(file, images=np.round(images.mean(axis=(2, 4))).astype(np.uint8), labels=labels)
    os.replace(partial, path)


def over_runs(values) -> dict:
    """Mean and 95 % interval (Student) of one number per seed."""
    values = [float(value) for value in values]
    mean = float(np.mean(values))
    if len(values) < 2:
        return {"values": values, "mean": mean, "interval": None}
    half = T_95[len(values)] * float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return {"values": values, "mean": mean, "interval": [mean - half, mean + half]}


def beats(ours: list[dict], other: list[dict]) -> dict:
    """Whether `ours` has the higher test accuracy: from differences over seeds, or from the intervals of one run."""
    pairs = list(zip(ours, other, strict=False))
    difference = over_runs([a["test_accuracy"] - b["test_accuracy"] for a, b in pairs])
    if difference["interval"]:
        low, high = difference["interval"]
    else:
        (a, b), *_ = pairs
        low, high = a["interval"][0] - b["interval"][1], a["interval"][1] - b["interval"][0]
    return {"difference": difference, "holds": "yes" if low > 0 else "no" if high < 0 else "undecided"}


def best_layer(results: dict, key: str = "pretrained") -> dict:
    return next(layer for layer in results[key]["layers"] if layer["layer"] == results[key]["best_layer"])


def findings(study: Study) -> dict:
    """Each of the five findings whose runs exist."""
    found = {}
    probes, bert_probes = study.read("autoregressive", "probe/probe.json"), study.read("bert", "probe/probe.json")
    best = [best_layer(probe) for probe in probes]
    if probes:
        layers = [layer["layer"] for layer in probes[0]["pretrained"]["layers"]]
        curves = {
            key: [over_runs(probe[key]["layers"][i]["test_accuracy"] for probe in probes) for i in range(len(layers))]
            for key in ("pretrained", "random_init")
        }
        found["1 accuracy by layer"] = {
            "paper": "the best features lie in the middle; far above random initialisation and raw pixels",
            "layers": layers,
            **curves,
            "converged": {  # by layer, the number of runs whose chosen fit converged
                key: [sum(probe[key]["layers"][i]["converged"] for probe in probes) for i in range(len(layers))]
                for key in curves
            },
            "best_layers": [layer["layer"] for layer in best],
            "test_intervals_of_the_best": [layer["interval"] for layer in best],
            "raw_pixels": over_runs(probe["raw_pixels"]["test_accuracy"] for probe in probes),
            "middle_beats_last": beats(best, [probe["pretrained"]["layers"][-1] for probe in probes]),
            "beats_raw_pixels": beats(best, [probe["raw_pixels"] for probe in probes]),
            "beats_random_init": beats(best, [best_layer(probe, "random_init") for probe in probes]),
            "concatenated": over_runs(probe["concatenated"]["test_accuracy"] for probe in probes),
        }
    with_checkpoints = study.read("autoregressive", "probes/probe.json")
    if with_checkpoints:
        points = [
            [(c["step"], c["validation_loss"], c["test_accuracy"]) for c in probe["checkpoints"]]
            for probe in with_checkpoints
        ]
        ranks = [np.argsort(np.argsort(np.array(run)[:, 1:], axis=0), axis=0) for run in points]
        correlations = over_runs(np.corrcoef(rank.T)[0, 1] for rank in ranks)
        low, high = correlations["interval"] or (correlations["mean"],) * 2
        found["2 accuracy against validation loss"] = {
            "paper": "the lower the validation loss of a checkpoint, the better its features",
            "step, validation loss, test accuracy": points,
            "rank_correlation": correlations,
            "holds": "yes" if high < 0 else "no" if low > 0 else "undecided",
        }
    tuned = {name: study.read(name, "finetune.json") for name in ("joint", "classes", "scratch", "bert_joint")}
    accuracy = {name: over_runs(run["test_accuracy"] for run in runs) for name, runs in tuned.items() if runs}
    if probes and bert_probes:
        bert_best = [best_layer(probe) for probe in bert_probes]
        found["3 next pixels against BERT"] = {
            "paper": "next pixels win the probe (CIFAR-10 by over 1 point, ImageNet by 6); fine-tuned, they are even",
            "probe": {"next pixels": over_runs(b["test_accuracy"] for b in best),
                      "BERT": over_runs(b["test_accuracy"] for b in bert_best)},
            "bert_layers": [over_runs(probe["pretrained"]["layers"][i]["test_accuracy"] for probe in bert_probes)
                            for i in range(len(bert_probes[0]["pretrained"]["layers"]))],
            "next_pixels_beat_bert_in_the_probe": beats(best, bert_best),
            "fine-tuned": {name: accuracy[run] for name, run in (("next pixels", "joint"), ("BERT", "bert_joint"))
                           if run in accuracy},
        }  # fmt: skip
    if {"joint", "classes", "scratch"} <= accuracy.keys():
        found["4 fine-tuning"] = {
            "paper": "the joint loss beats classes only, and fine-tuning beats the probe and training from scratch",
            "test_accuracy": accuracy,
            "test_intervals": {name: [run["interval"] for run in runs] for name, runs in tuned.items()},
            "joint_beats_classes_only": beats(tuned["joint"], tuned["classes"]),
            "pretrained_beats_scratch": beats(tuned["joint"], tuned["scratch"]),
            "fine-tuning_beats_the_probe": beats(tuned["joint"], best),
        }
    if probes and "few_labels" in probes[0]:
        rows = []
        for i, entry in enumerate(probes[0]["few_labels"]["features"]):
            k = entry["labels_per_class"]
            scratch = study.read(f"scratch_{k}_labels", "finetune.json")
            ways = {
                name: [probe["few_labels"][name][i]["mean"] for probe in probes] for name in ("features", "raw_pixels")
            }
            row = {"labels_per_class": k} | {name: over_runs(means) for name, means in ways.items()}
            row["std_over_subsets"] = {
                name: [probe["few_labels"][name][i]["std"] for probe in probes] for name in ("features", "raw_pixels")
            }
            if scratch:
                row["scratch"] = over_runs(run["test_accuracy"] for run in scratch)
            rows.append(row)
        found["5 few labels"] = {
            "paper": "the probe on features of iGPT-L is near the state of the art: 73.2, 87.6, 94.3 % at 4, 25, 400",
            "rows": rows,
        }
    return found


def draw(found: dict, path: str) -> None:
    """Draws the findings, one panel each, and writes the picture as PNG."""
    figure = Figure(figsize=(11.0, 8.0), layout="constrained")
    axes = figure.subplots(2, 2)
    for panel, draw_panel in zip(axes.flat, (draw_layers, draw_checkpoints, draw_tuning, draw_few_labels), strict=True):
        draw_panel(panel, found)
        panel.grid(alpha=0.3)
        panel.set_visible(panel.has_data())
    figure.savefig(path, dpi=120)


def draw_line(panel, x, entries: list[dict], label: str, **style) -> None:
    """Means in percent, with their intervals if all have one."""
    means = 100 * np.array([entry["mean"] for entry in entries])
    (line,) = panel.plot(x, means, "o-", label=label, **style)
    if all(entry["interval"] for entry in entries):
        low, high = 100 * np.array([entry["interval"] for entry in entries]).T
        panel.fill_between(x, low, high, alpha=0.15, linewidth=0, color=line.get_color())


def draw_layers(panel, found: dict) -> None:
    if by_layer := found.get("1 accuracy by layer"):
        draw_line(panel, by_layer["layers"], by_layer["pretrained"], "next pixels", color="tab:blue")
        draw_line(panel, by_layer["layers"], by_layer["random_init"], "random initialisation", color="tab:gray")
        if bert := found.get("3 next pixels against BERT"):
            draw_line(panel, by_layer["layers"], bert["bert_layers"], "BERT", color="tab:green")
        panel.axhline(100 * by_layer["raw_pixels"]["mean"], color="tab:orange", linestyle="--", label="raw pixels")
        panel.set_xticks(by_layer["layers"])
        panel.legend()
    panel.set(title="linear probe by layer", xlabel="layer", ylabel="test accuracy (%)")


def draw_checkpoints(panel, found: dict) -> None:
    if over_time := found.get("2 accuracy against validation loss"):
        for seed, points in enumerate(over_time["step, validation loss, test accuracy"]):
            _, losses, accuracies = np.array(points).T
            panel.plot(losses, 100 * accuracies, "o-", label=f"seed {seed}")
        panel.invert_xaxis()
        panel.legend()
    panel.set(title="best layer of a run's checkpoints", xlabel="validation loss (nats a token)", ylabel="accuracy (%)")


def draw_tuning(panel, found: dict) -> None:
    if tuning := found.get("4 fine-tuning"):
        names = list(tuning["test_accuracy"])
        means = [100 * tuning["test_accuracy"][name]["mean"] for name in names]
        panel.barh(names, means, color="tab:blue", alpha=0.6)
        for row, name in enumerate(names):
            values = tuning["test_accuracy"][name]["values"]
            panel.plot(100 * np.array(values), [row] * len(values), "k.")
        panel.set_xlim(min(means) - 5, 100)
    panel.set(title="fine-tuning", xlabel="test accuracy (%)")


def draw_few_labels(panel, found: dict) -> None:
    if few := found.get("5 few labels"):
        for name, label in (("features", "probe on features"), ("raw_pixels", "on raw pixels"), ("scratch", "scratch")):
            rows = [row for row in few["rows"] if name in row]
            if rows:
                draw_line(panel, [row["labels_per_class"] for row in rows], [row[name] for row in rows], label)
        panel.set_xscale("log")
        panel.set_xticks(counts := [row["labels_per_class"] for row in few["rows"]], counts, minor=False)
        panel.minorticks_off()
        panel.legend()
    panel.set(title="few labels", xlabel="labels a class", ylabel="test accuracy (%)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", required=True, help="the folder for all runs")
    parser.add_argument("--out", required=True, help="the folder for study_DATA.json and its picture")
    parser.add_argument("--data", choices=("digits", "fashion_mnist"), default="digits")
    parser.add_argument("--idx", help="the folder of Fashion-MNIST's IDX files")
    parser.add_argument(
        "--seeds", type=int, help="default: 5 for the digits (3 of them with all runs), 1 for Fashion-MNIST"
    )
    parser.add_argument("--summarize", action="store_true", help="run nothing, read the results that exist")
    args = parser.parse_args()

    workdir = Path(args.workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    study = Study(args.data, workdir, args.seeds or {"digits": 5, "fashion_mnist": 1}[args.data])
    small = workdir / "fashion_mnist_14.npz"
    if args.data == "fashion_mnist" and not small.exists():
        if not args.idx:
            parser.error("--idx is missing; give the folder of train-images-idx3-ubyte.gz and the other three files")
        shrink_fashion_mnist(args.idx, small)
    if not args.summarize:
        {"digits": run_digits, "fashion_mnist": run_fashion_mnist}[args.data](study)
    results = {
        "what": "test accuracies; intervals are 95 %: Student over seeds, Wilson within one run",
        "data": args.data,
        "seeds": list(study.seeds),
        "seconds": study.seconds(),
        "findings": findings(study),
    }
    write(f"{args.out}/study_{args.data}.json", results)
    draw(results["findings"], f"{args.out}/study_{args.data}.png")


if __name__ == "__main__":
    main()
