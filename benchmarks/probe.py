"""Measures linear probes on the CPU: features beside a forward pass, memory, and our solvers beside scikit-learn's.

python train.py --config=configs/digits.py --workdir=runs/digits --config.train.steps=600
python benchmarks/probe.py --model=runs/digits --out=benchmarks/results/probe_cpu.json

Features: the time for all layers and for the middle one, relative to a forward pass to the final norm; the three are
measured in turn. Memory: the peak of a process that writes the features of 1,000 and of 10,000 images, which are
generated on demand (from /proc, so on Linux only). Solvers: each fits a classifier for every C on the same standardised
features to the same tolerance. Quickstart: the processor time of every layer and penalty of the README's probe, ours
and scikit-learn's in turn. scikit-learn gets one thread, its fastest form here: with two, they wait for each other.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from report import machine, median_seconds, write
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits

sys.path.insert(0, str(Path(__file__).parents[1]))  # for configs/

import igpt
from configs import probe_digits
from igpt.data.examples import EncodedImages, Split
from igpt.data.images import Preprocess
from igpt.data.sources import open_source
from igpt.model import ImageGPT, ModelConfig
from igpt.palette import Palette
from igpt.probe.config import SGD, ProbeConfig
from igpt.probe.features import Features, keep_features, stream_features
from igpt.probe.fit import fit_probe
from igpt.probe.logistic import TOLERANCE, fit_lbfgs, fit_sgd
from igpt.probe.newton import fit_newton
from igpt.sharding import make_mesh

NETWORK = ModelConfig(width=256, depth=12, num_heads=8, vocab_size=512, seq_len=256)
# Many features for little work.
FEATURES = ModelConfig(width=512, depth=8, num_heads=8, mlp_width=512, vocab_size=16, seq_len=4)
COUNTS = (1_000, 10_000)
PENALTIES = (0.01, 0.1, 1.0)
RATES, STEPS = (0.1, 0.3), 4000
PARTS = ("extraction", "memory", "solvers", "quickstart")


def extraction(batch_size: int, repeats: int) -> dict:
    graph, params = nnx.split(ImageGPT(NETWORK, nnx.Rngs(0)))
    tokens = jax.random.randint(jax.random.key(0), (batch_size, NETWORK.seq_len), 0, NETWORK.vocab_size)
    runs = {
        "forward": jax.jit(lambda params: nnx.merge(graph, params).normed(tokens)),
        "all_layers": jax.jit(lambda params: nnx.merge(graph, params).features(tokens)),
        "middle_layer": jax.jit(lambda params: nnx.merge(graph, params).features(tokens, (NETWORK.depth // 2,))),
    }
    seconds = {name: [] for name in runs}
    for repeat in range(repeats + 1):  # the first compiles
        for name, run in runs.items():
            start = time.perf_counter()
            jax.block_until_ready(run(params))
            if repeat:
                seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    ratios = {name: medians[name] / medians["forward"] for name in ("all_layers", "middle_layer")}
    print(f"features of all layers take {ratios['all_layers']:.2f} x a forward pass", end=", ")
    print(f"features of the middle layer {ratios['middle_layer']:.2f} x", flush=True)
    return {"batch_size": batch_size, "repeats": repeats, "seconds": medians, "of_a_forward_pass": ratios}


class Noise(Sequence):
    """A sequence of `count` images, each generated when it is read."""

    def __init__(self, count: int):
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int):
        return np.random.default_rng(index).integers(0, 256, (2, 2, 3), np.uint8), f"image {index}"


def write_features(count: int) -> None:
    """Prints the peak memory in bytes of writing `count` images' features, after a first pass that compiles."""
    model, mesh = ImageGPT(FEATURES, nnx.Rngs(0)), make_mesh()
    palette = Palette(np.linspace(-1, 1, FEATURES.vocab_size)[:, None].repeat(3, axis=1))
    with tempfile.TemporaryDirectory() as folder:
        for images, name in ((COUNTS[0], "first"), (count, "all")):
            Path("/proc/self/clear_refs").write_text("5")  # resets the peak
            split = Split(EncodedImages(Noise(images), Preprocess((2, 2))), np.zeros(images, np.int32))
            stream = stream_features(model, split, palette, 100, mesh)
            kept = keep_features(stream, range(FEATURES.depth + 1), Path(folder, name))
    assert len(kept.labels) == count
    print(1024 * int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]))


def peak_bytes(count: int) -> int:
    """Runs `write_features` in a new process. One malloc arena, because several vary the peak by tens of megabytes."""
    command = [sys.executable, __file__, f"--write_features={count}"]
    environment = os.environ | {"MALLOC_ARENA_MAX": "1"}
    return int(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout)


def memory() -> dict:
    peaks = {count: peak_bytes(count) for count in COUNTS}
    features = {count: 4 * FEATURES.width * (FEATURES.depth + 1) * count for count in COUNTS}
    grown, more = (of[COUNTS[1]] - of[COUNTS[0]] for of in (peaks, features))
    print(f"{COUNTS[1]:,} images: peak {peaks[COUNTS[1]] / 1e6:.0f} MB, {grown / 1e6:.1f} MB more than with", end=" ")
    print(f"{COUNTS[0]:,} images; the features are {more / 1e6:.1f} MB larger", flush=True)
    return {"peak_bytes": peaks, "features_bytes": features}


def correlated_features(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Ten overlapping classes in 128 correlated features, like a network's: float32 [N, 128] and labels int32 [N]."""
    rng = np.random.default_rng(0)
    centres, mixing = rng.normal(size=(10, 32)), rng.normal(size=(32, 128))
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 10, count).astype(np.int32)
    latent = 0.6 * centres[labels] + rng.normal(size=(count, 32))
    return (latent @ mixing + 3 * rng.normal(size=(count, 128))).astype(np.float32), labels


def best_by_scikit_learn(parts: list[Features], layer: int, solver: str, warm: bool, Cs: Sequence[float]) -> float:
    """The test accuracy of the penalty that is best on validation, like `fit_probe`."""
    (train, _), *_ = pairs = [(part.layers[layer][:, 0].astype(np.float64), part.labels) for part in parts]
    scaler = StandardScaler().fit(train)
    (train, labels), validation, test = [(scaler.transform(rows), truth) for rows, truth in pairs]
    model = LogisticRegression(solver=solver, tol=TOLERANCE, max_iter=1000, warm_start=warm)
    found = []
    for C in sorted(Cs):
        model.set_params(C=C).fit(train, labels)
        found.append((model.score(*validation), model.score(*test)))
    return max(found, key=lambda pair: pair[0])[1]


def quickstart(ref: str, repeats: int) -> dict:
    """Fits all layers and penalties of the quickstart's probe, and chooses and tests as `eval_probe.py` does."""
    pretrained, mesh, config = igpt.load(ref), make_mesh(), ProbeConfig.of(probe_digits.get_config())
    layers = range(pretrained.model.config.depth + 1)
    with tempfile.TemporaryDirectory() as folder:
        splits = open_source(pretrained.config.data).splits()
        parts = [
            keep_features(
                stream_features(pretrained.model, split, pretrained.tokenizer, 64, mesh), layers, Path(folder, name)
            ).take(np.arange(len(split)))
            for name, split in splits.items()
        ]
    peers = {"scikit_learn": ("lbfgs", False), "scikit_learn_newton_cg": ("newton-cg", True)}  # True: warm starts
    runs = {"ours": lambda layer: fit_probe(parts, [layer], config, mesh)["test_accuracy"]}
    for name, settings in peers.items():
        runs[name] = lambda layer, settings=settings: best_by_scikit_learn(
            parts, layer, *settings, config.inverse_penalties
        )
    seconds, accuracies = {name: [] for name in runs}, {}
    for _ in range(repeats):
        for name, run in runs.items():
            with threadpool_limits(1, "blas"), warnings.catch_warnings():
                warnings.simplefilter("ignore", ConvergenceWarning)  # of L-BFGS, for weak penalties
                start = time.process_time()
                accuracies[name] = [run(layer) for layer in layers]
                seconds[name].append(time.process_time() - start)
    ratios = {
        name: statistics.median(peer / ours for peer, ours in zip(seconds[name], seconds["ours"], strict=True))
        for name in peers
    }
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    for name, median in medians.items():
        print(f"{name}: {median:.2f} processor seconds for {len(layers)} layers, {accuracies[name]}", flush=True)
    sizes = {"examples": len(parts[0].labels), "layers": len(layers), "penalties": len(config.inverse_penalties)}
    return sizes | {
        "repeats": repeats,
        "processor_seconds": medians,
        "ratio_to_ours": ratios,
        "test_accuracy_by_layer": accuracies,
    }


def solvers() -> dict:
    (features, labels), (held_out, truth), (tested, answers) = (
        correlated_features(count, seed) for seed, count in enumerate((20_000, 5_000, 20_000))
    )
    mesh, scaler, fitted = make_mesh(), StandardScaler().fit(features), {}

    def by_scikit_learn():
        rows = scaler.transform(features)
        fitted["peers"] = [LogisticRegression(C=C, tol=TOLERANCE, max_iter=1000).fit(rows, labels) for C in PENALTIES]

    def by_lbfgs():
        fitted["ours"] = fit_lbfgs(features, labels, 10, PENALTIES, 1000, mesh)
        return fitted["ours"].kernel

    def by_newton():
        return fit_newton(features, labels, 10, PENALTIES, 1000).kernel

    seconds = {"ours": median_seconds(by_lbfgs, repeats=1), "scikit_learn": median_seconds(by_scikit_learn, repeats=1)}
    seconds["ours_newton"] = median_seconds(by_newton, repeats=1)
    by_penalty = zip(PENALTIES, fitted["peers"], (fitted["ours"].predict(tested) == answers).mean(axis=1), strict=True)
    rows = []
    for C, peer, lbfgs in by_penalty:
        sgd = fit_sgd(features, labels, 10, SGD(RATES, STEPS, 256, 1 / (C * len(features))), 0, mesh)
        best = int(np.argmax((sgd.predict(held_out) == truth).mean(axis=1)))
        accuracy = {
            "scikit_learn": peer.score(scaler.transform(tested), answers),
            "lbfgs": float(lbfgs),
            "sgd": float((sgd.predict(tested)[best] == answers).mean()),
        }
        points = {name: 100 * (accuracy[name] - accuracy["scikit_learn"]) for name in ("lbfgs", "sgd")}
        rows.append({"C": C, "accuracy": accuracy, "points_from_scikit_learn": points, "sgd_rate": RATES[best]})
        print(f"C {C}: scikit-learn {accuracy['scikit_learn']:.2%}", end="; difference of ours in points: ")
        print(f"L-BFGS {points['lbfgs']:+.2f}, SGD {points['sgd']:+.2f}", flush=True)
    ratio = seconds["scikit_learn"] / seconds["ours"]
    print(f"all C: L-BFGS {seconds['ours']:.1f} s, Newton {seconds['ours_newton']:.1f} s", end=", ")
    print(f"scikit-learn {seconds['scikit_learn']:.1f} s; L-BFGS {ratio:.2f} times as fast", flush=True)
    return {"features": list(features.shape), "seconds": seconds, "speed_ratio": ratio, "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", help="the JSON to write")
    parser.add_argument("--model", help="a run of configs/digits.py, for the quickstart")
    parser.add_argument("--only", choices=PARTS, help="measure one part, and keep the others in --out")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=20, help="repeats of each forward pass (default: 20)")
    parser.add_argument("--write_features", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.write_features:
        return write_features(args.write_features)
    if not args.out:
        parser.error("--out is missing; give the JSON file to write")

    runs = {
        "extraction": lambda: extraction(args.batch_size, args.repeats),
        "memory": memory,
        "solvers": solvers,
        "quickstart": lambda: quickstart(args.model, repeats=3),
    }
    if not args.model and args.only in (None, "quickstart"):
        parser.error("--model is missing; name a run of configs/digits.py")
    results = {"what": "linear probes, float32, medians"}
    if args.only:
        results |= json.loads(Path(args.out).read_text()) if Path(args.out).exists() else {}
        write(args.out, {**results, args.only: machine() | runs[args.only]()})
    else:
        write(args.out, results | {name: runs[name]() for name in PARTS})


if __name__ == "__main__":
    main()
