"""Measures training steps on the CPU: ours beside transformers' ImageGPT in PyTorch, eager and under torch.compile.

pip install -e ".[bench]"
python benchmarks/training.py --out=benchmarks/results/training_cpu.json

Each contestant lives in a process of its own, which waits while another one computes: they alternate, and each has its
own peak of memory. Ours starts as train.py does, with huge pages where they help. So does one of the eager peers.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from report import write

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # for configs/

CASES = {  # case -> (fields of the model, colours, side of the image, images in a batch, steps in a turn, turns)
    "digits, batch 16": (dict(width=128, depth=4, num_heads=4), 17, 8, 16, 20, 7),
    "digits, batch 64": (dict(width=128, depth=4, num_heads=4), 17, 8, 64, 5, 7),
    "width 512, depth 4, 1,024 tokens, batch 4": (dict(width=512, depth=4, num_heads=8), 512, 32, 4, 1, 5),
    "iGPT-S, 1,024 tokens, batch 1": (dict(width=512, depth=24, num_heads=8), 512, 32, 1, 1, 3),
}
KINDS = ("ours", "eager", "eager, huge pages", "torch.compile")


def ours(case: str):
    """Returns a function that makes one update."""
    import jax

    from configs import digits
    from igpt.config import Config
    from igpt.sharding import make_mesh, to_devices
    from igpt.state import build_program

    model, colors, side, batch_size, *_ = CASES[case]
    config = digits.get_config()
    config.model.update(model)
    config.palette.colors, config.data.image_size, config.train.batch_size = colors, (side, side), batch_size
    mesh = make_mesh()
    program = build_program(Config.of(config, trains=True), mesh)
    state = program.create_state(seed=0)
    batch = to_devices({"tokens": tokens(case)}, batch_size, mesh)

    def update():
        nonlocal state
        with jax.set_mesh(mesh):
            state, metrics = program.train_step(state, batch)
            jax.block_until_ready((state, metrics))

    return update


def theirs(case: str, compiled: bool):
    """Returns a function that makes one update of the peer."""
    import torch
    from peer import transformers_model

    from igpt.model import ModelConfig

    fields, colors, side, *_ = CASES[case]
    model = transformers_model(ModelConfig(**fields, vocab_size=colors, seq_len=side * side)).train()
    forward = torch.compile(model) if compiled else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0)
    targets = torch.from_numpy(tokens(case)).long()
    inputs = torch.cat([torch.full_like(targets[:, :1], colors), targets[:, :-1]], dim=1)

    def update():
        logits = forward(inputs, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        loss.item()

    return update


def tokens(case: str) -> np.ndarray:
    _, colors, side, batch_size, *_ = CASES[case]
    return np.random.default_rng(0).integers(0, colors, (batch_size, side * side)).astype(np.int32)


def work(case: str, kind: str) -> None:
    """For each line on stdin, makes a turn's updates and prints the seconds of each and the peak of memory so far."""
    update = ours(case) if kind == "ours" else theirs(case, kind == "torch.compile")
    for _ in range(2):
        update()
    print("ready", flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        for _ in range(CASES[case][4]):
            update()
        seconds = (time.perf_counter() - start) / CASES[case][4]
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(json.dumps({"seconds": seconds, "peak": peak}), flush=True)


def start(case: str, kind: str) -> subprocess.Popen:
    from igpt import huge_pages

    environment = dict(os.environ) | {"JAX_PLATFORMS": "cpu"}
    if kind in ("ours", "eager, huge pages") and huge_pages.are_useful([]):
        environment["GLIBC_TUNABLES"] = f"{huge_pages.TUNABLE}=1"
    command = [sys.executable, __file__, "--out=", "--cases", case, f"--worker={kind}"]
    worker = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    while worker.stdout.readline() not in ("ready\n", ""):
        continue
    return worker


def measure(case: str) -> dict:
    workers = {kind: start(case, kind) for kind in KINDS}
    found = {kind: [] for kind in KINDS}
    for _ in range(CASES[case][5]):
        for kind, worker in workers.items():
            worker.stdin.write("go\n")
            worker.stdin.flush()
            found[kind].append(json.loads(worker.stdout.readline()))
    for worker in workers.values():
        worker.stdin.close()
        worker.wait()
    seconds = {kind: [turn["seconds"] for turn in turns] for kind, turns in found.items()}
    ratio = {  # the median of the ratios of neighbouring turns
        kind: statistics.median(peer / mine for peer, mine in zip(seconds[kind], seconds["ours"], strict=True))
        for kind in KINDS[1:]
    }
    return {
        "case": case,
        "seconds": {kind: statistics.median(each) for kind, each in seconds.items()},
        "times_as_fast_as": ratio,
        "peak_bytes": {kind: turns[-1]["peak"] for kind, turns in found.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, help="the JSON to write")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), help="default: all")
    parser.add_argument("--worker", choices=KINDS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return work(args.cases[0], args.worker)
    rows = []
    for case in args.cases:
        rows.append(measure(case))
        row = rows[-1]
        print(f"{case}: {row['seconds']['ours']:.4f} s a step", end="")
        print("".join(f"; {ratio:.2f} x {kind}" for kind, ratio in row["times_as_fast_as"].items()), flush=True)
    write(args.out, {"what": "one update, float32, medians; peers: transformers' ImageGPT", "rows": rows})


if __name__ == "__main__":
    main()
