"""Measures features of the middle layer: ours stops there; transformers computes all layers and their hidden states.

pip install -e ".[bench]"
python benchmarks/features.py --out=benchmarks/results/features_cpu.json

Times alternate in one process. Peak memory is that of one process each, from the first call on, minus what the process
holds before that call (from /proc, so on Linux only).
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import torch
from flax import nnx
from peer import transformers_model
from report import write

from igpt.model import ImageGPT, ModelConfig


def runs(depth: int, width: int, batch_size: int, names: list[str]) -> dict:
    """{name: a function that computes features [B, D] of the middle layer}."""
    config = ModelConfig(width=width, depth=depth, num_heads=8, vocab_size=512, seq_len=1024)
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (batch_size, config.seq_len)).astype(np.int32)
    middle, found = depth // 2, {}
    if "ours" in names:
        model = ImageGPT(config, nnx.Rngs(0))
        compute = jax.jit(lambda model, tokens: model.features(tokens, [middle])[0])
        found["ours"] = lambda: np.asarray(compute(model, tokens))
    if "transformers" in names:  # its ImageGPT has no SDPA: transformers warns, and stays with its own attention
        peer = transformers_model(config).eval()

        def hidden():
            with torch.no_grad():  # the pooled input norm of block l, as Hugging Face's own linear probe reads it
                states = peer.transformer(torch.tensor(tokens, dtype=torch.long), output_hidden_states=True)
                return peer.transformer.h[middle].ln_1(states.hidden_states[middle]).mean(1).numpy()

        found["transformers"] = hidden
    return found


def memory_bytes(kind: str) -> int:
    """This process's memory: "VmRSS" now, "VmHWM" at its peak.

    getrusage would count the memory of the process that started it, too.
    """
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(rf"{kind}:\s+(\d+) kB", status)[1])


def memory_of(name: str, shape: list[str]) -> dict:
    """Runs `name` in a process of its own."""
    command = [sys.executable, __file__, "--out=-", *shape, "--memory_of", name]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return {"did_not_run": done.stderr.strip().splitlines()[-1][:200]}
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, help="the JSON to write")
    parser.add_argument("--depth", type=int, default=12)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--memory_of", help="only print the peak memory of this one, as JSON")
    args = parser.parse_args()
    sizes = args.depth, args.width, args.batch_size
    if args.memory_of:
        run = runs(*sizes, [args.memory_of])[args.memory_of]
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        before = memory_bytes("VmRSS")
        run()
        print(json.dumps({"peak": (peak := memory_bytes("VmHWM")), "of_the_call": peak - before}))
        return

    seconds, failed = {}, {}
    functions = {}
    for name in ("ours", "transformers"):
        try:
            functions |= runs(*sizes, [name])
            functions[name]()
        except Exception as error:  # what does not run is part of the result
            failed[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
            functions.pop(name, None)
    for _ in range(args.repeats):
        for name, run in functions.items():
            start = time.perf_counter()
            run()
            seconds.setdefault(name, []).append(time.perf_counter() - start)
    ratios = {name: [a / b for a, b in zip(times, seconds["ours"], strict=True)] for name, times in seconds.items()}
    shape = [f"--depth={args.depth}", f"--width={args.width}", f"--batch_size={args.batch_size}"]
    memory = {name: memory_of(name, shape) for name in functions}
    results = {
        "what": "features of the middle layer, float32, 1,024 tokens, medians of alternating runs",
        "shape": dict(depth=args.depth, width=args.width, batch_size=args.batch_size, repeats=args.repeats),
        "median_s": {name: statistics.median(times) for name, times in seconds.items()},
        "times_ours": {name: statistics.median(ratio) for name, ratio in ratios.items()},
        "memory_bytes": memory,
        "did_not_run": failed,
    }
    print(json.dumps(results, indent=1))
    write(args.out, results)


if __name__ == "__main__":
    main()
