"""Tests whether the mean over all positions is why a small network's features are no better than raw pixels.

python benchmarks/pooling.py --model=runs/study/fashion_mnist_autoregressive_0 \\
    --out=docs/results/pooling_fashion_mnist.json

A linear probe reads the mean of a layer over all positions, while raw pixels keep their positions. This benchmark fits
the same linear classifier to means over the cells of a grid, 1 x 1 (as in the paper) and 2 x 2. The means are of three
things: features of the trained network, features of an untrained one, and colours (a histogram for each cell). The raw
pixels are the baseline.
"""

import argparse
import itertools
import sys
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from report import write

sys.path.insert(0, str(Path(__file__).parents[1]))  # for configs/

from configs import probe_digits
from igpt import model as network
from igpt.data.sources import open_source
from igpt.interop.load import load, outline
from igpt.probe.config import ProbeConfig
from igpt.probe.features import Features, untrained
from igpt.probe.fit import Probe
from igpt.probe.selection import few_images
from igpt.sharding import make_mesh

GRIDS = (1, 2)


def by_cells(side: int, grid: int):
    """Returns a function [B, T, D] -> [B, grid * grid * D]: means over the cells of a grid on a side x side image."""

    def pool(normed):
        B, _, D = normed.shape
        cells = normed.astype(jnp.float32).reshape(B, grid, side // grid, grid, side // grid, D)
        return cells.mean(axis=(2, 4)).reshape(B, grid * grid * D)

    return pool


def coarser(parts: list[Features], layer: int, fine: int, grid: int) -> list[Features]:
    """Averages features of a fine x fine grid over the cells of a coarser grid."""
    found = []
    edges = [round(i * fine / grid) for i in range(grid + 1)]
    for part in parts:
        rows = np.asarray(part.layers[layer])[:, 0].reshape(len(part.labels), fine, fine, -1)
        cells = [
            rows[:, a:b, c:d].mean(axis=(1, 2))
            for a, b in itertools.pairwise(edges)
            for c, d in itertools.pairwise(edges)
        ]
        found.append(Features({layer: np.concatenate(cells, axis=1)[:, None]}, part.labels))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a run directory of a network on square images")
    parser.add_argument("--layer", type=int, default=5)
    parser.add_argument("--train_images", type=int, default=10_000)
    parser.add_argument("--out", required=True, help="the JSON to write")
    args = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", 2)

    begun, config = time.monotonic(), probe_digits.get_config()
    config.update(layers=(args.layer,), batch_size=100, inverse_penalties=(0.001, 0.01, 0.1, 1.0, 10.0), max_iter=300)
    directory, mesh = Path(args.model), make_mesh()
    shapes = outline(directory)
    settings = shapes.config.data
    side = settings.image_size[0]
    source = few_images(open_source(settings), args.train_images)
    fine = max(GRIDS)
    network.pool = by_cells(side, fine)
    results = {"model": args.model, "layer": args.layer, "train_images": args.train_images, "test_accuracy": {}}
    with tempfile.TemporaryDirectory() as folder:
        probe = Probe(ProbeConfig.of(config), source, [args.layer], mesh, Path(folder))

        def fitted(name: str, parts: list[Features], layer: int) -> None:
            found = probe.fit(parts, [layer])
            results["test_accuracy"][name] = {key: found[key] for key in ("test_accuracy", "interval", "C")}
            print(f"{name:<40}{found['test_accuracy']:.4f}", flush=True)

        fitted("raw pixels", probe.pixels(), 0)
        histograms = []
        for split in source.splits().values():
            tokens = shapes.tokenizer.encode(split.read(np.arange(len(split)))[0]).reshape(len(split), -1)
            of_each = np.asarray(by_cells(side, fine)(jax.nn.one_hot(tokens, shapes.tokenizer.vocab_size)))
            histograms.append(Features({0: of_each[:, None]}, split.labels))
        for grid in GRIDS:
            fitted(f"colours, {grid} x {grid}", coarser(histograms, 0, fine, grid), 0)
        for name, of in (
            ("trained", lambda: load(directory, None, mesh)),
            ("untrained", lambda: untrained(shapes, 100, mesh)),
        ):
            parts = probe.features(of())
            for grid in GRIDS:
                fitted(f"{name} network, {grid} x {grid}", coarser(parts, args.layer, fine, grid), args.layer)
    results["seconds"] = time.monotonic() - begun
    write(args.out, results)


if __name__ == "__main__":
    main()
