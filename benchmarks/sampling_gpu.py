"""Measures sampling on a GPU in bfloat16: ours beside transformers' generate(), alternating, and the memory's bound.

pip install -e ".[bench]"
python benchmarks/sampling_gpu.py --out=benchmarks/results/sampling_gpu.json

The bound is that of benchmarks/sampling.py: every step reads all kernels and the filled part of the cache.
"""

import argparse
import gc
import os
import statistics

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch needs memory of the GPU, too

import dataclasses

import jax
import numpy as np
import torch
from peer import transformers_model
from report import write
from sampling import timed, with_random_head

from igpt.bandwidth import bytes_to_draw, memory_bandwidth
from igpt.draw import Sampling, image_keys
from igpt.model import PRESETS, ModelConfig
from igpt.sample import sample_tokens

GOALS = {"s": 90, "m": 30, "l": 15}  # images/s
BATCH_SIZES = {"s": 512, "m": 256, "l": 128}  # with these, caches take 26, 39 and 39 GB
WITH_PEER = ("s",)  # transformers takes a minute for a batch of s, and longer for others
WARM_UP = 16  # tokens that the peer draws before it is timed
TINY = ModelConfig(width=32, depth=2, num_heads=2, vocab_size=17, seq_len=64)


def theirs(config: ModelConfig, batch_size: int, top_k: int):
    """Returns a function that draws a batch of images with transformers' ImageGPT."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    peer = transformers_model(config).eval().to(device, torch.bfloat16)
    start = torch.full((batch_size, 1), config.vocab_size, device=device)

    def generate(length: int = config.seq_len):
        with torch.no_grad():  # one token fewer than ours, because it has no position for the last prediction
            drawn = peer.generate(start, max_length=length, do_sample=True, top_k=top_k)
        return drawn.cpu()  # waits for the device

    return generate


def measure(config: ModelConfig, batch_size: int, top_k: int, repeats: int, with_peer: bool) -> dict:
    model, keys, nothing = with_random_head(config), image_keys(0, batch_size), np.zeros((batch_size, 0), np.int32)
    runs = {"ours": lambda: sample_tokens(model, nothing, keys, Sampling(top_k=top_k))}
    first = timed(runs["ours"])  # compiles
    if with_peer:
        runs["transformers"] = theirs(config, batch_size, top_k)
        runs["transformers"](WARM_UP)
    seconds, speeds = {name: [] for name in runs}, [memory_bandwidth()]
    for _ in range(repeats):
        for name, run in runs.items():
            seconds[name].append(timed(run))
        speeds.append(memory_bandwidth())
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    bound = bytes_to_draw(config, batch_size, 1, config.seq_len + 1) / statistics.median(speeds)
    found = {
        "images_per_s": {name: batch_size / median for name, median in medians.items()},
        "first_call_s": first,
        "bandwidth_gb_per_s": statistics.median(speeds) / 1e9,
        "share_of_bound": bound / medians["ours"],
    }
    if with_peer:
        pairs = zip(seconds["ours"], seconds["transformers"], strict=True)
        found["times_as_fast"] = statistics.median(theirs / ours for ours, theirs in pairs)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, help="the JSON to write")
    parser.add_argument("--sizes", nargs="+", choices=GOALS, default=list(GOALS))
    parser.add_argument("--batch_size", type=int, default=0, help="instead of each size's own")
    parser.add_argument("--top_k", type=int, default=0, help="0: all tokens, as in the paper")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--tiny", action="store_true", help="a small network and 2 images, to try the command")
    args = parser.parse_args()
    settings, rows = {"top_k": args.top_k, "repeats": args.repeats}, []
    for size in args.sizes:
        config = dataclasses.replace(TINY if args.tiny else ModelConfig(**PRESETS[size]), dtype="bfloat16")
        batch_size = 2 if args.tiny else args.batch_size or BATCH_SIZES[size]
        rows.append({"size": size, "batch_size": batch_size, "goal_images_per_s": GOALS[size]})
        rows[-1] |= measure(config, batch_size, args.top_k, args.repeats, size in WITH_PEER)
        speed = rows[-1]["images_per_s"]
        print(
            f"{size}: {', '.join(f'{name} {rate:.1f}' for name, rate in speed.items())} images/s (goal {GOALS[size]}), "
            f"{rows[-1]['share_of_bound']:.0%} of the bound of memory",
            flush=True,
        )
        jax.clear_caches()
        gc.collect()
        torch.cuda.empty_cache()  # PyTorch would keep the memory of its model, and the next cache would find none
        write(args.out, {"what": "unconditional sampling, bfloat16, medians"} | settings | {"rows": rows})


if __name__ == "__main__":
    main()
