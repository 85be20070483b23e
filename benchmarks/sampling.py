"""Measures sampling on the CPU: ours and transformers' generate(), alternating, beside the bound of memory bandwidth.

pip install -e ".[bench]"
python benchmarks/sampling.py --out=benchmarks/results/sampling_cpu.json

A step must read every parameter, and the filled part of the cache, from memory: their bytes, divided by the bandwidth
that a sum over a large array reaches in the same run, bound the time of a step from below.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import jax
import numpy as np
import torch
from flax import nnx
from peer import transformers_model
from report import write

from igpt.bandwidth import bytes_to_draw, memory_bandwidth
from igpt.draw import Sampling, image_keys
from igpt.model import ImageGPT, ModelConfig
from igpt.sample import sample_tokens

MODELS = {
    "digits": ModelConfig(width=128, depth=4, num_heads=4, vocab_size=17, seq_len=64),
    "width 128": ModelConfig(width=128, depth=4, num_heads=4, vocab_size=512, seq_len=256),
    "width 512": ModelConfig(width=512, depth=4, num_heads=8, vocab_size=512, seq_len=1024),
}


def with_random_head(config: ModelConfig) -> ImageGPT:
    """A new model with a random head: with the initial zeros, draws would be uniform."""
    model = ImageGPT(config, nnx.Rngs(0))
    model.head.kernel[...] = jax.random.normal(jax.random.key(1), model.head.kernel.shape) * 0.1
    return model


def peers(config: ModelConfig, batch_size: int, top_k: int, names: list[str]) -> dict:
    """{name: a function of the length: transformers' generate()}, with the given caches, eager or compiled."""
    start = torch.full((batch_size, 1), config.vocab_size)

    def generator(peer, **options):
        def generate(length=config.seq_len):
            with torch.no_grad():  # one token fewer than ours, because it has no position for the last prediction
                peer.generate(start, max_length=length, do_sample=True, top_k=top_k, **options)

        return generate

    peer, static, found = transformers_model(config).eval(), dict(cache_implementation="static"), {}
    if "dynamic" in names:
        found["transformers, dynamic cache"] = generator(peer)
    if "static" in names:
        found["transformers, static cache"] = generator(peer, **static, disable_compile=True)
    if "compiled" in names:
        compiled = transformers_model(config).eval()
        compiled.forward = torch.compile(compiled.forward)
        found["transformers, static cache, torch.compile"] = generator(compiled, **static)
    return found


def timed(run) -> float:
    start = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - start


def measure(config: ModelConfig, batch_size: int, top_k: int, repeats: int, names: list[str]) -> dict:
    """Trials, in each of which all take one turn: {name: seconds}. What fails is named, and the others go on."""
    model, keys, nothing = with_random_head(config), image_keys(0, batch_size), np.zeros((batch_size, 0), np.int32)
    runs = {"ours": lambda: sample_tokens(model, nothing, keys, Sampling(top_k=top_k))}
    runs |= peers(config, batch_size, top_k, names)
    first, failed, trials = {}, {}, []
    for name, run in list(runs.items()):
        try:
            first[name] = timed(run if name == "ours" else lambda run=run: run(16))  # compiles, or warms up
        except Exception as error:  # what does not run is part of the result
            failed[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
            del runs[name]
    for _ in range(repeats):
        speed = memory_bandwidth()
        seconds = {name: timed(run) for name, run in runs.items()}
        trials.append({"bytes_per_s": max(speed, memory_bandwidth()), "seconds": seconds})
    return {"first_call_s": first, "did_not_run": failed, "trials": trials}


def summary(config: ModelConfig, batch_size: int, trials: list[dict]) -> dict:
    """Medians over the trials: speeds, ratios of times within a trial, and the share of the bound that ours reaches."""
    tokens, must_read = batch_size * config.seq_len, bytes_to_draw(config, batch_size, 1, config.seq_len + 1)
    seconds = {}
    for trial in trials:
        for name, took in trial["seconds"].items():
            seconds.setdefault(name, []).append((took, took / trial["seconds"]["ours"]))
    speeds = [trial["bytes_per_s"] for trial in trials]
    shares = [must_read / trial["bytes_per_s"] / trial["seconds"]["ours"] for trial in trials]
    return {
        "tokens_per_s": {name: tokens / statistics.median(t for t, _ in pairs) for name, pairs in seconds.items()},
        "times_ours": {name: statistics.median(ratio for _, ratio in pairs) for name, pairs in seconds.items()},
        "number_of_trials": {name: len(pairs) for name, pairs in seconds.items()},
        "bandwidth_gb_per_s": statistics.median(speeds) / 1e9,
        "bound_tokens_per_s": tokens * statistics.median(speeds) / must_read,
        "share_of_bound": statistics.median(shares),
    }


def merged(path: str, rows: list[dict]) -> list[dict]:
    """The rows of the JSON file `path`, if there is one, with those of `rows`. Trials of the same case are joined."""
    cases = {}
    earlier = json.loads(Path(path).read_text())["rows"] if Path(path).exists() else []
    for row in earlier + rows:
        case = cases.setdefault((row["model"], row["batch_size"]), row | {"trials": []})
        case["trials"] = case["trials"] + row["trials"]
        for name in ("first_call_s", "did_not_run"):
            case[name] = case[name] | row[name]
    ordered = sorted(cases.values(), key=lambda row: (list(MODELS).index(row["model"]), row["batch_size"]))
    return [row | summary(MODELS[row["model"]], row["batch_size"], row["trials"]) for row in ordered]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, help="the JSON to write")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--batch_sizes", nargs="+", type=int, default=[8, 32])
    parser.add_argument("--top_k", type=int, default=40)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--peers", nargs="*", choices=("dynamic", "static", "compiled"), default=["dynamic", "static"])
    parser.add_argument("--merge", action="store_true", help="keep the trials of --out, and add to them")
    args = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")

    rows = []
    for name in args.models:
        config = MODELS[name]
        for batch_size in args.batch_sizes:
            top_k = min(args.top_k, config.vocab_size)
            found = measure(config, batch_size, top_k, args.repeats, args.peers)
            row = {"model": name, "tokens": config.seq_len, "batch_size": batch_size, "top_k": top_k} | found
            row |= summary(config, batch_size, found["trials"])
            rows.append(row)
            rates = ", ".join(f"{who} {rate:.0f}" for who, rate in row["tokens_per_s"].items())
            bound = f"bound {row['bound_tokens_per_s']:.0f} at {row['bandwidth_gb_per_s']:.1f} GB/s"
            print(f"{name}, {batch_size} images: tokens/s {rates}; {bound}: {row['share_of_bound']:.0%}", flush=True)
    what = "unconditional sampling, float32, medians of alternating runs"
    write(args.out, {"what": what, "top_k": args.top_k, "rows": merged(args.out, rows) if args.merge else rows})


if __name__ == "__main__":
    main()
