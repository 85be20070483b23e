"""Memory and time of importing a Hugging Face directory: random weights, in shards, as large as iGPT-L.

python benchmarks/import_memory.py --out=benchmarks/results/import_memory.json

The peak is that of the whole command, less that of the same command on a model of a few kilobytes, so that what is left
is what the weights cost. The weights are in a temporary folder (TMPDIR), which needs twice their size.
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

from igpt.interop.hf_config import ImageGPTConfig, to_model_config
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
    """Makes a Hugging Face directory tensor by tensor; returns the bytes of its weights."""
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
    """A safetensors file of normal float32 numbers, of which only one tensor is ever in memory."""
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
    """Imports a directory of this size in a process of its own."""
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made, "hf")
        folder.mkdir()
        weights = write_directory(folder, size)
        command = [sys.executable, "-m", "igpt", "import", f"--from={folder}", f"--out={made}/run"]
        start = time.perf_counter()
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)  # of this child alone
        process.returncode = os.waitstatus_to_exitcode(status)
        seconds = time.perf_counter() - start
    if process.returncode:
        sys.exit(f"the import ended with exit code {process.returncode}")
    unit = 1 if sys.platform == "darwin" else 1024
    return {"weights_bytes": weights, "peak_bytes": usage.ru_maxrss * unit, "seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, help="the JSON to write")
    parser.add_argument("--size", choices=("s", "m", "l"), default="l", help="of the model (default: l, 5.4 GB)")
    args = parser.parse_args()

    nothing, result = measure(SIZES["tiny"]), measure(SIZES[args.size])
    result["baseline_peak_bytes"] = nothing["peak_bytes"]
    result["baseline_seconds"] = nothing["seconds"]
    ratio = (result["peak_bytes"] - nothing["peak_bytes"]) / result["weights_bytes"]
    result["ratio"] = ratio
    print(
        f"{args.size}: {result['weights_bytes'] / 1e9:.2f} GB of weights, {result['peak_bytes'] / 1e9:.2f} GB at most,"
    )
    print(f"of which {ratio:.2f} x the weights are theirs; {result['seconds']:.0f} s")
    write(args.out, {"what": "peak memory of igpt import", "size": args.size} | result)


if __name__ == "__main__":
    main()
