"""What the runs of benchmarks/study.py say about each finding: means, intervals, yes or no."""

import json
import math

import numpy as np
from scipy import stats

TUNED = ("joint", "classes", "scratch", "long_scratch", "bert_joint")  # fine-tuned runs, and those from scratch


def over_runs(values) -> dict:
    """Mean and 95 % interval (Student) of one number per seed."""
    values = [float(value) for value in values]
    mean = float(np.mean(values))
    if len(values) < 2:
        return {"values": values, "mean": mean, "interval": None}
    half = float(stats.t.ppf(0.975, len(values) - 1)) * float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return {"values": values, "mean": mean, "interval": [mean - half, mean + half]}


def beats(ours: dict[int, dict], other: dict[int, dict]) -> dict | None:
    """Whether `ours` has the higher test accuracy: from differences over seeds, or from the intervals of one run.

    Compares the seeds that both have. None if they share no seed.
    """
    pairs = [(ours[seed], other[seed]) for seed in ours if seed in other]
    if not pairs:
        return None
    difference = over_runs([a["test_accuracy"] - b["test_accuracy"] for a, b in pairs])
    if difference["interval"]:
        low, high = difference["interval"]
    else:
        (a, b), *_ = pairs
        low, high = a["interval"][0] - b["interval"][1], a["interval"][1] - b["interval"][0]
    return {"difference": difference, "holds": "yes" if low > 0 else "no" if high < 0 else "undecided"}


def best_layer(results: dict, key: str = "pretrained") -> dict:
    return next(layer for layer in results[key]["layers"] if layer["layer"] == results[key]["best_layer"])


def best_of(probes: dict[int, dict], key: str = "pretrained") -> dict[int, dict]:
    return {seed: best_layer(probe, key) for seed, probe in probes.items()}


def accuracy_of(runs: dict[int, dict]) -> dict:
    """Mean and interval of the test accuracy over seeds."""
    return over_runs(run["test_accuracy"] for run in runs.values())


def best_layers(probes: dict[int, dict]) -> dict:
    """The layers that validation chose, over seeds, beside the raw pixels, whose interval is that of one run.

    `disjoint` tells whether the interval of the network lies above those of the raw pixels and of untrained networks.
    Nearest neighbours vote on the same layers.
    """
    pixels, best = raw_pixels_of(probes), {"pretrained": best_of(probes), "untrained": best_of(probes, "random_init")}
    found = {
        f"best_{name}": {"linear": accuracy_of(of), "layers": [layer["layer"] for layer in of.values()]}
        for name, of in best.items()
    }
    if all("neighbours" in layer for layer in best["pretrained"].values()):
        votes = (layer["neighbours"] for layer in best["pretrained"].values())
        found["best_pretrained"]["neighbours"] = over_runs(votes)
        found["neighbours_of_raw_pixels"] = over_runs(fit["neighbours"] for fit in pixels.values())
    found["raw_pixels_interval"] = first(pixels)["interval"]
    ours, untrained = (found[f"best_{name}"]["linear"]["interval"] for name in ("pretrained", "untrained"))
    if ours:
        found["disjoint"] = ours[0] > max(found["raw_pixels_interval"][1], untrained[1])
    return found


def first(runs: dict[int, dict]) -> dict:
    return next(iter(runs.values()))


def raw_pixels_of(probes: dict[int, dict]) -> dict[int, dict]:
    return {seed: probe["raw_pixels"] for seed, probe in probes.items()}


def layers_of(probes: dict[int, dict]) -> list[int]:
    return [layer["layer"] for layer in first(probes)["pretrained"]["layers"]]


def accuracies_by_layer(probes: dict[int, dict], key: str = "pretrained") -> list[dict]:
    accuracies = [[layer["test_accuracy"] for layer in probe[key]["layers"]] for probe in probes.values()]
    return [over_runs(seeds) for seeds in zip(*accuracies, strict=True)]


def by_layer(probes: dict[int, dict]) -> dict:
    """Accuracies by layer, of networks that were trained and of untrained ones, and what they beat."""
    best, layers, pixels = best_of(probes), layers_of(probes), raw_pixels_of(probes)
    last = {seed: probe["pretrained"]["layers"][-1] for seed, probe in probes.items()}
    curves = {key: accuracies_by_layer(probes, key) for key in ("pretrained", "random_init")}
    return {
        "layers": layers,
        **curves,
        "converged": {  # by layer, the number of runs whose chosen fit converged
            key: [sum(probe[key]["layers"][i]["converged"] for probe in probes.values()) for i in range(len(layers))]
            for key in curves
        },
        **best_layers(probes),
        "test_intervals_of_the_best": [layer["interval"] for layer in best.values()],
        "raw_pixels": accuracy_of(pixels),
        "middle_beats_last": beats(best, last),
        "beats_raw_pixels": beats(best, pixels),
        "beats_random_init": beats(best, best_of(probes, "random_init")),
    }


def findings(study) -> dict:
    """Each finding whose runs exist, without the comparisons of which one side has not run."""
    found = {name: find(study) for name, find in FINDINGS.items()}
    return {
        name: {part: value for part, value in finding.items() if value is not None}
        for name, finding in found.items()
        if finding
    }


def probes_of(study, run: str = "autoregressive", folder: str = "probe") -> dict[int, dict]:
    return study.read(run, f"{folder}/probe.json")


def accuracy_by_layer(study) -> dict | None:
    if probes := probes_of(study):
        found = {"paper": "the best features lie in the middle; far above random initialisation and raw pixels"}
        found |= by_layer(probes)
        if "concatenated" in first(probes):
            found["concatenated"] = accuracy_of({seed: probe["concatenated"] for seed, probe in probes.items()})
        return found


def pooling_by_attention(study) -> dict | None:
    pooled, probes = probes_of(study, folder="attention"), probes_of(study)
    if pooled and probes:
        return {
            "what": "a weighted mean over positions, whose weights a learnt query gives, instead of the plain mean",
            "layers": layers_of(pooled),
            "accuracies": accuracies_by_layer(pooled),
            "best": accuracy_of(best_of(pooled)),
            "beats_the_mean": beats(best_of(pooled), best_of(probes)),
        }


def loss_against_accuracy(study) -> dict | None:
    if probes := probes_of(study, folder="probes"):
        points = [
            [(c["step"], c["validation_loss"], c["test_accuracy"]) for c in probe["checkpoints"]]
            for probe in probes.values()
        ]
        correlations = over_runs(stats.spearmanr(np.array(run)[:, 1:])[0] for run in points)
        low, high = correlations["interval"] or (correlations["mean"],) * 2
        return {
            "paper": "the lower the validation loss of a checkpoint, the better its features",
            "step, validation loss, test accuracy": points,
            "rank_correlation": correlations,
            "holds": "yes" if high < 0 else "no" if low > 0 else "undecided",
        }


def against_bert(study, run: str = "bert") -> dict | None:
    """The best layers of next pixels beside those of BERT."""
    ours, bert = probes_of(study), probes_of(study, run)
    if ours and bert:
        return {
            "paper": "next pixels win the probe (CIFAR-10 by over 1 point, ImageNet by 6); fine-tuned, they are even",
            "probe": {name: accuracy_of(best_of(probes)) for name, probes in (("next pixels", ours), ("BERT", bert))},
            "bert_layers": accuracies_by_layer(bert),
            "next_pixels_beat_bert_in_the_probe": beats(best_of(ours), best_of(bert)),
        }


def against_bert_at_equal_compute(study) -> dict | None:
    if found := against_bert(study):
        accuracy, _ = fine_tuned(study)
        ways = {"next pixels": "joint", "BERT": "bert_joint"}
        return found | {"fine-tuned": {name: accuracy[run] for name, run in ways.items() if run in accuracy}}


def against_bert_at_equal_predictions(study) -> dict | None:
    if found := against_bert(study, "bert_longer"):
        return {"what": "BERT sees so many more images that both predict equally many positions"} | found


def fine_tuned(study) -> tuple[dict, dict]:
    """The accuracies of the classifiers that exist, over seeds, and their runs."""
    runs = {name: study.read(name, "finetune.json") for name in TUNED}
    return {name: accuracy_of(some) for name, some in runs.items() if some}, runs


def fine_tuning(study) -> dict | None:
    accuracy, runs = fine_tuned(study)
    if {"joint", "classes", "scratch"} <= accuracy.keys():
        return {
            "paper": "the joint loss beats classes only, and fine-tuning beats the probe and training from scratch",
            "test_accuracy": accuracy,
            "test_intervals": {name: [run["interval"] for run in some.values()] for name, some in runs.items()},
            "joint_beats_classes_only": beats(runs["joint"], runs["classes"]),
            "pretrained_beats_scratch": beats(runs["joint"], runs["scratch"]),
            "fine-tuning_beats_the_probe": beats(runs["joint"], best_of(probes_of(study))),
        }


def fine_tuning_at_equal_compute(study) -> dict | None:
    accuracy, runs = fine_tuned(study)
    if {"joint", "long_scratch"} <= accuracy.keys():
        return {
            "what": "training from scratch for as many steps as pretraining and fine-tuning took together",
            "pretrained_beats_long_scratch": beats(runs["joint"], runs["long_scratch"]),
        }


def few_labels(study) -> dict | None:
    probes = probes_of(study)
    if not probes or "few_labels" not in first(probes):
        return None
    rows = []
    for i, entry in enumerate(first(probes)["few_labels"]["features"]):
        row = {"labels_per_class": (k := entry["labels_per_class"]), "std_over_subsets": {}}
        for name in ("features", "raw_pixels"):
            row[name] = over_runs(probe["few_labels"][name][i]["mean"] for probe in probes.values())
            row["std_over_subsets"][name] = [probe["few_labels"][name][i]["std"] for probe in probes.values()]
        if scratch := study.read(f"scratch_{k}_labels", "finetune.json"):
            row["scratch"] = accuracy_of(scratch)
        rows.append(row)
    return {
        "paper": "the probe on features of iGPT-L is near the state of the art: 73.2, 87.6, 94.3 % at 4, 25, 400",
        "rows": rows,
    }


def codes_against_pixels(study) -> dict | None:
    """Probes and fine-tuned runs of both, at equal FLOPs."""
    probes = {name: probes_of(study, name) for name in ("codes", "pixels")}
    if not all(probes.values()):
        return None
    best = {name: best_of(some) for name, some in probes.items()}
    tuned = {name: study.read(f"{name}_joint", "finetune.json") for name in probes}
    made = {
        "paper": "on ImageNet 69.0 % with codes (the first version's abstract), 65.2 % with the pixels of 48 x 48",
        "layers": layers_of(probes["codes"]),
        "by_layer": {name: accuracies_by_layer(some) for name, some in probes.items()},
        "best_layers": {name: [layer["layer"] for layer in some.values()] for name, some in best.items()},
        "probe": {name: accuracy_of(some) for name, some in best.items()},
        "neighbours": {name: over_runs(layer["neighbours"] for layer in some.values()) for name, some in best.items()},
        "untrained": {name: accuracy_of(best_of(some, "random_init")) for name, some in probes.items()},
        "raw_pixels": accuracy_of(raw_pixels_of(probes["pixels"])),
        "codes_beat_pixels_in_the_probe": beats(best["codes"], best["pixels"]),
    }
    if all(tuned.values()):
        made["fine-tuned"] = {name: accuracy_of(runs) for name, runs in tuned.items()}
        made["codes_beat_pixels_fine-tuned"] = beats(tuned["codes"], tuned["pixels"])
    return made


def in_color(study, run: str = "color") -> dict | None:
    if probes := probes_of(study, run):
        return by_layer(probes)


def in_color_on_many(study) -> dict | None:
    if found := in_color(study, "color_on_many"):
        return found | {"last_losses": last_losses(study, "color_on_many")}


def in_color_on_black(study) -> dict | None:
    return in_color(study, "color_on_black")


def in_color_longer(study) -> dict | None:
    if probes := probes_of(study, "color_longer"):
        return {
            "what": "four times as many steps, one seed",
            "layers": layers_of(probes),
            "accuracies": accuracies_by_layer(probes),
            "best": accuracy_of(best_of(probes)),
            "test_interval": first(best_of(probes))["interval"],
            "last_losses": {run: losses for run in ("color", "color_longer") if (losses := last_losses(study, run))},
        }


def last_losses(study, run: str) -> dict[str, float] | None:
    """The last losses of a run's seed 0, if that has run."""
    path = study.path(f"{run}_0") / "metrics.jsonl"
    if not path.exists():
        return None
    records = [json.loads(line) for line in path.read_text().splitlines()]
    return {name: [x[name] for x in records if name in x][-1] for name in ("train/loss", "eval/loss")}


FINDINGS = {
    "1 accuracy by layer": accuracy_by_layer,
    "1 pooling by attention": pooling_by_attention,
    "2 accuracy against validation loss": loss_against_accuracy,
    "3 next pixels against BERT": against_bert_at_equal_compute,
    "3 as many predicted positions": against_bert_at_equal_predictions,
    "4 fine-tuning": fine_tuning,
    "4 fine-tuning against scratch at equal compute": fine_tuning_at_equal_compute,
    "5 few labels": few_labels,
    "6 codes against pixels": codes_against_pixels,
    "7 in colour, on photographs": in_color,
    "7 in colour, on photographs, longer": in_color_longer,
    "7 in colour, on many photographs": in_color_on_many,
    "7 in colour, on black": in_color_on_black,
}
