"""What the runs of benchmarks/study.py say about each of the five findings: means, intervals, yes or no."""

import math

import numpy as np

TUNED = ("joint", "classes", "scratch", "long_scratch", "bert_joint")  # fine-tuned runs, and those from scratch
T_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}  # Student's t, two-sided, by number of runs


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


def best_layers(probes: list[dict]) -> dict:
    """The layers that validation chose, over seeds, beside the raw pixels, whose interval is that of one run.

    `disjoint` tells whether the interval of the network lies above those of the raw pixels and of untrained networks.
    Nearest neighbours vote on the same layers.
    """
    found = {
        f"best_{name}": {
            "linear": over_runs(best_layer(probe, key)["test_accuracy"] for probe in probes),
            "layers": [best_layer(probe, key)["layer"] for probe in probes],
        }
        for name, key in (("pretrained", "pretrained"), ("untrained", "random_init"))
    }
    if all("neighbours" in best_layer(probe) for probe in probes):
        found["best_pretrained"]["neighbours"] = over_runs(best_layer(probe)["neighbours"] for probe in probes)
        found["neighbours_of_raw_pixels"] = over_runs(probe["raw_pixels"]["neighbours"] for probe in probes)
    found["raw_pixels_interval"] = probes[0]["raw_pixels"]["interval"]
    ours, untrained = (found[f"best_{name}"]["linear"]["interval"] for name in ("pretrained", "untrained"))
    if ours:
        found["disjoint"] = ours[0] > max(found["raw_pixels_interval"][1], untrained[1])
    return found


def findings(study) -> dict:
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
            **best_layers(probes),
            "test_intervals_of_the_best": [layer["interval"] for layer in best],
            "raw_pixels": over_runs(probe["raw_pixels"]["test_accuracy"] for probe in probes),
            "middle_beats_last": beats(best, [probe["pretrained"]["layers"][-1] for probe in probes]),
            "beats_raw_pixels": beats(best, [probe["raw_pixels"] for probe in probes]),
            "beats_random_init": beats(best, [best_layer(probe, "random_init") for probe in probes]),
        }
        if "concatenated" in probes[0]:
            joined = over_runs(probe["concatenated"]["test_accuracy"] for probe in probes)
            found["1 accuracy by layer"]["concatenated"] = joined
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
    tuned = {name: study.read(name, "finetune.json") for name in TUNED}
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
    if "long_scratch" in accuracy and "joint" in accuracy:
        found["4 fine-tuning against scratch at equal compute"] = {
            "what": "training from scratch for as many steps as pretraining and fine-tuning took together",
            "pretrained_beats_long_scratch": beats(tuned["joint"], tuned["long_scratch"]),
        }
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
    ways = {name: study.read(name, "probe/probe.json") for name in ("codes", "pixels")}
    if all(ways.values()):
        found["6 codes against pixels"] = codes_against_pixels(study, ways)
    return found


def codes_against_pixels(study, probes: dict[str, list[dict]]) -> dict:
    """Probes and fine-tuned runs of both, at equal FLOPs."""
    best = {name: [best_layer(probe) for probe in some] for name, some in probes.items()}
    tuned = {name: study.read(f"{name}_joint", "finetune.json") for name in probes}
    made = {
        "paper": "on ImageNet 69.0 % with codes (the first version's abstract), 65.2 % with the pixels of 48 x 48",
        "layers": [layer["layer"] for layer in probes["codes"][0]["pretrained"]["layers"]],
        "by_layer": {
            name: [over_runs(accuracies) for accuracies in zip(*(accuracies_of(probe) for probe in some), strict=True)]
            for name, some in probes.items()
        },
        "best_layers": {name: [layer["layer"] for layer in some] for name, some in best.items()},
        "probe": {name: over_runs(layer["test_accuracy"] for layer in some) for name, some in best.items()},
        "neighbours": {name: over_runs(layer["neighbours"] for layer in some) for name, some in best.items()},
        "untrained": {
            name: over_runs(best_layer(probe, "random_init")["test_accuracy"] for probe in some)
            for name, some in probes.items()
        },
        "raw_pixels": over_runs(probe["raw_pixels"]["test_accuracy"] for probe in probes["pixels"]),
        "codes_beat_pixels_in_the_probe": beats(best["codes"], best["pixels"]),
    }
    if all(tuned.values()):
        made["fine-tuned"] = {name: over_runs(run["test_accuracy"] for run in runs) for name, runs in tuned.items()}
        made["codes_beat_pixels_fine-tuned"] = beats(tuned["codes"], tuned["pixels"])
    return made


def accuracies_of(probe: dict) -> list[float]:
    return [layer["test_accuracy"] for layer in probe["pretrained"]["layers"]]
