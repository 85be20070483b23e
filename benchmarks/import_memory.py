"""Measures memory and time to import a Hugging Face directory: random weights in shards, by default of iGPT-L's size.

python benchmarks/import_memory.py --out=benchmarks/results/import_memory.json

The ratio is (peak - baseline) / size of the weights. The peak is the memory of the whole command, the baseline that of
the same command on a model of a few kilobytes. The temporary folder (TMPDIR) needs room for twice the weights.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from math import prod
from pathlib import Path

import numpy as np
from report import write

from igpt.interop.hf_config import ImageGPTConfig
from igpt.interop.hf_network import to_model_config
from igpt.interop.hf_weights import BASE, HEADS, sizes, targets
from igpt.interop.processor import ImageGPTImageProcessor
from igpt.model import PRESETS

SIZES = {
    "tiny": dict(width=8, depth=1, num_heads=2, seq_len=16),
    "s": PRESETS["s"],
    "m": PRESETS["m"],
    "l": PRESETS["l"],
}
SHARD_BYTES = 1 << 30


def write_directory(folder: Path, size: dict) -> int:
    """Writes a Hugging Face directory tensor by tensor. Returns the size of its weights in bytes."""
    settings = dict(n_embd=size["width"], n_layer=size["depth"], n_head=size["num_heads"], n_positions=size["seq_len"])
    config = ImageGPTConfig(**settings, architectures=["ImageGPTForCausalImageModeling"])
    config.save_pretrained(folder)
    rng = np.random.default_rng(0)
    side = round(size["seq_len"] ** 0.5)
    clusters = rng.uniform(-1, 1, (config.vocab_size - 1, 3))
    ImageGPTImageProcessor(clusters=clusters, size={"height": side, "width": side}).save_pretrained(folder)

    shards, filled = [{}], 0
    model = to_model_config(config, "pixels")
    for name, target in targets(model).items():
        shape = target.shape(sizes(model))
        if filled > SHARD_BYTES:
            shards.append({})
            filled = 0
        shards[-1][name if name in HEADS.values() else BASE + name] = shape
        filled += 4 * prod(shape)
    weight_map, total = {}, 0
    for i, shard in enumerate(shards):
        file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        weight_map |= dict.fromkeys(shard, file)
        total += write_shard(folder / file, shard, rng)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return total


def write_shard(path: Path, shapes: dict[str, tuple[int, ...]], rng: np.random.Generator) -> int:
    """Writes a safetensors file of normal float32 numbers, with one tensor in memory at a time."""
    header, stop = {"__metadata__": {"format": "pt"}}, 0
    for name, shape in shapes.items():
        start, stop = stop, stop + 4 * prod(shape)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [start, stop]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for shape in shapes.values():
            file.write(rng.standard_normal(shape, np.float32))
    return stop


def measure(size: dict) -> dict:
    """Imports a directory of this size in a new process, and returns its peak memory and its time."""
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made, "hf")
        folder.mkdir()
        weights = write_directory(folder, size)
        command = [sys.executable, "-m", "igpt", "import", f"--from={folder}", f"--out={made}/run"]
        start = time.perf_counter()
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)  # usage of this child alone
        process.returncode = os.waitstatus_to_exitcode(status)
        seconds = time.perf_counter() - start
    if process.returncode:
        sys.exit(f"igpt import exited with code {process.returncode}; its message is above")
    unit = 1 if sys.platform == "darwin" else 1024
    return {"weights_bytes": weights, "peak_bytes": usage.ru_maxrss * unit, "seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, help="the JSON to write")
    parser.add_argument("--size", choices=("s", "m", "l"), default="l", help="size of the model (default: l, 5.4 GB)")
    args = parser.parse_args()

    baseline, result = measure(SIZES["tiny"]), measure(SIZES[args.size])
    result["baseline_peak_bytes"] = baseline["peak_bytes"]
    result["baseline_seconds"] = baseline["seconds"]
    ratio = (result["peak_bytes"] - baseline["peak_bytes"]) / result["weights_bytes"]
    result["ratio"] = ratio
    weights, peak = result["weights_bytes"] / 1e9, result["peak_bytes"] / 1e9
    print(f"{args.size}: {weights:.2f} GB of weights, peak memory {peak:.2f} GB, {result['seconds']:.0f} s")
    print(f"above the baseline, the import needs {ratio:.2f} x the size of the weights")
    write(args.out, {"what": "peak memory of igpt import", "size": args.size} | result)


if __name__ == "__main__":
    main()
