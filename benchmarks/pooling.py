"""Tests whether the mean over all positions is why a small network's features are no better than raw pixels.

python benchmarks/pooling.py --model=runs/study/fashion_mnist_autoregressive_0 \\
    --out=docs/results/pooling_fashion_mnist.json

A linear probe reads the mean of a layer over all positions, while raw pixels keep their positions. This benchmark fits
the same linear classifier to means over the cells of a grid, 1 x 1 (as in the paper) and 2 x 2. The means are of three
things: features of the trained network, features of an untrained one, and colours (a histogram for each cell). The raw
pixels are the baseline.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
from report import write

sys.path.insert(0, str(Path(__file__).parents[1]))  # for configs/

from configs import probe_digits
from igpt.data.examples import Source
from igpt.data.sources import open_source
from igpt.interop.load import load, outline
from igpt.model import grid_pool
from igpt.probe.config import ProbeConfig
from igpt.probe.features import Features, untrained
from igpt.probe.fit import Probe
from igpt.probe.selection import few_images
from igpt.sharding import make_mesh

GRIDS = (1, 2)


def histograms(source: Source, tokenizer, grid: int) -> list[Features]:
    """How often each colour occurs in each cell, for each split, as features of layer 0."""
    found = []
    for split in source.splits().values():
        tokens = tokenizer.encode(split.read(np.arange(len(split)))[0]).reshape(len(split), -1)
        shape = tokenizer.grid(*split.images.shape[1:3])
        shares = grid_pool(jax.nn.one_hot(tokens, tokenizer.vocab_size), shape, grid)
        found.append(Features({0: np.asarray(shares)[:, None]}, split.labels))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a run directory of a network on square images")
    parser.add_argument("--layer", type=int, default=5)
    parser.add_argument("--train_images", type=int, default=10_000)
    parser.add_argument("--out", required=True, help="the JSON to write")
    args = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", 2)

    begun, settings = time.monotonic(), probe_digits.get_config()
    settings.update(layers=(args.layer,), batch_size=100, inverse_penalties=(0.001, 0.01, 0.1, 1.0, 10.0), max_iter=300)
    directory, mesh = Path(args.model), make_mesh()
    shapes = outline(directory)
    source = few_images(open_source(shapes.config.data), args.train_images)
    results = {"model": args.model, "layer": args.layer, "train_images": args.train_images, "test_accuracy": {}}

    def fitted(name: str, probe: Probe, parts: list[Features], layer: int) -> None:
        found = probe.fit(parts, [layer])
        results["test_accuracy"][name] = {key: found[key] for key in ("test_accuracy", "interval", "C")}
        print(f"{name:<40}{found['test_accuracy']:.4f}", flush=True)

    for grid in GRIDS:
        with tempfile.TemporaryDirectory() as folder:
            settings.pool = f"grid:{grid}"
            probe = Probe(ProbeConfig.of(settings), source, [args.layer], mesh, Path(folder))
            if grid == GRIDS[0]:
                fitted("raw pixels", probe, probe.pixels(), 0)
            fitted(f"colours, {grid} x {grid}", probe, histograms(source, shapes.tokenizer, grid), 0)
            for name, network in (
                ("trained", load(directory, None, mesh)),
                ("untrained", untrained(shapes, 100, mesh)),
            ):
                fitted(f"{name} network, {grid} x {grid}", probe, probe.features(network), args.layer)
    results["seconds"] = time.monotonic() - begun
    write(args.out, results)


if __name__ == "__main__":
    main()
