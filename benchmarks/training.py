"""Measures training steps: ours beside PyTorch, alternating, each in a process of its own.

pip install -e ".[bench]"
python benchmarks/training.py --out=benchmarks/results/training_cpu.json
python benchmarks/training.py --device=gpu --out=benchmarks/results/training_gpu.json

On CPUs, in float32, the peer is transformers' ImageGPT, eager and under torch.compile. Ours starts as train.py does,
with huge pages where they help. So does one of the eager peers. On one GPU, in bfloat16, the peer is our network in
PyTorch with scaled_dot_product_attention under torch.compile (twin.py), and the model FLOPs utilisation is printed
beside its goal. --tiny tries a small network on whatever device there is.

All processes live at once and take turns, each waiting while another one computes. A GPU of 80 GB has no room for two
networks of size L: with --apart, one process after the other makes its turns and ends, twice over.
"""

import argparse
import json
import os

# JAX allocates a GPU's memory as it needs it, up to 95 %.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")

import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
from report import write

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # for configs/

SIZES = {  # as in igpt.model.PRESETS, which imports JAX
    "S": dict(width=512, depth=24, num_heads=8),
    "M": dict(width=1024, depth=36, num_heads=8),
    "L": dict(width=1536, depth=48, num_heads=16),
}


class Case(NamedTuple):
    """A network and its batch; each process makes `steps` updates a turn, for `turns` turns. `goal` is an MFU."""

    model: dict
    colors: int
    side: int
    batch_size: int
    steps: int
    turns: int
    goal: float | None = None


CASES = {
    "digits, batch 16": Case(dict(width=128, depth=4, num_heads=4), 17, 8, 16, 20, 7),
    "digits, batch 64": Case(dict(width=128, depth=4, num_heads=4), 17, 8, 64, 5, 7),
    "width 512, depth 4, 1,024 tokens, batch 4": Case(dict(width=512, depth=4, num_heads=8), 512, 32, 4, 1, 5),
    "iGPT-S, 1,024 tokens, batch 1": Case(SIZES["S"], 512, 32, 1, 1, 3),
}
GPU_CASES = {
    "iGPT-S": Case(SIZES["S"], 512, 32, 32, 10, 5, goal=0.35),
    "iGPT-M": Case(SIZES["M"], 512, 32, 16, 5, 5, goal=0.47),
    "iGPT-L": Case(SIZES["L"], 512, 32, 16, 5, 5, goal=0.50),
}
TINY = Case(dict(width=32, depth=2, num_heads=2), 17, 8, 2, 1, 2, goal=0.35)
KINDS = {
    "cpu": ("ours", "eager", "eager, huge pages", "torch.compile"),
    "gpu": ("ours", "torch.compile, SDPA"),
}
ROUNDS_APART = 2
PAUSE_S = 1.0  # before each turn: threads of the process that computed before may still spin, waiting for work


def case_of(args) -> tuple[str, Case]:
    """The first case that the command line names, with the changes that it asks for."""
    name = args.cases[0]
    case = TINY if args.tiny else (GPU_CASES if args.device == "gpu" else CASES)[name]
    return name, case._replace(batch_size=args.batch_size) if args.batch_size else case


def ours(case: Case):
    """Returns (a function that makes one update, a function that tells the peak of memory on the device)."""
    import jax

    from configs import digits
    from igpt.config import Config
    from igpt.sharding import make_mesh, to_devices
    from igpt.state import build_program

    config = digits.get_config()
    config.optim.name = "adam"  # as the peer's AdamW
    config.model.update(case.model)
    config.palette.colors, config.data.image_size = case.colors, (case.side, case.side)
    config.train.batch_size = case.batch_size
    mesh = make_mesh(devices=jax.devices()[:1])
    program = build_program(Config.of(config, trains=True), mesh)
    state = program.create_state(seed=0)
    batch = to_devices({"tokens": tokens(case)}, case.batch_size, mesh)
    program.compile_ahead(batch, batch | {"mask": np.ones(case.batch_size, np.float32)})()  # as train.py does

    def update():
        nonlocal state
        with jax.set_mesh(mesh):
            state, metrics = program.train_step(state, batch)
            jax.block_until_ready((state, metrics))

    stats = jax.devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        return update, lambda: jax.devices()[0].memory_stats()["peak_bytes_in_use"]
    return update, of_process


def theirs(case: Case, kind: str):
    """As `ours`, for a peer."""
    import torch

    from igpt.model import ModelConfig, count_params

    network = ModelConfig(**case.model, vocab_size=case.colors, seq_len=case.side**2)
    device = "cuda" if "SDPA" in kind and torch.cuda.is_available() else "cpu"
    if kind == "torch.compile, SDPA":
        from twin import Twin

        model = Twin(network).to(device)
        assert sum(p.numel() for p in model.parameters()) == count_params(network), "the twin is another network"
        torch.set_float32_matmul_precision("high")
        call = torch.compile(model)
    else:
        from peer import transformers_model

        model = transformers_model(network).train()
        compiled = torch.compile(model) if kind == "torch.compile" else model

        def call(inputs):
            return compiled(inputs, use_cache=False).logits

    fused = dict(fused=True) if device == "cuda" else {}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0, **fused)
    targets = torch.from_numpy(tokens(case)).long().to(device)
    inputs = torch.cat([torch.full_like(targets[:, :1], case.colors), targets[:, :-1]], dim=1)

    def update():
        with torch.autocast(device, torch.bfloat16, enabled="SDPA" in kind):
            logits = call(inputs)
        loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        loss.item()  # waits for the device

    return update, torch.cuda.max_memory_allocated if device == "cuda" else of_process


def of_process() -> int:
    """The peak of this process's memory in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def tokens(case: Case) -> np.ndarray:
    return np.random.default_rng(0).integers(0, case.colors, (case.batch_size, case.side**2)).astype(np.int32)


def work(args) -> None:
    """For each line on stdin, makes a turn's updates and prints the seconds of each and the peak of memory so far.

    The first update of a turn is not timed: it finds the caches full of another process's data.
    """
    _, case = case_of(args)
    mine = args.worker.startswith("ours")
    update, peak = ours(case) if mine else theirs(case, args.worker)
    for _ in range(3):
        update()
    print("ready", flush=True)
    for _ in sys.stdin:
        update()
        start = time.perf_counter()
        for _ in range(case.steps):
            update()
        seconds = (time.perf_counter() - start) / case.steps
        print(json.dumps({"seconds": seconds, "peak": peak()}), flush=True)


def start(name: str, kind: str, args) -> subprocess.Popen:
    from igpt import huge_pages

    environment = dict(os.environ)
    if args.device == "cpu":
        environment["JAX_PLATFORMS"] = "cpu"
        if kind in ("ours", "eager, huge pages") and huge_pages.are_useful([]):
            environment["GLIBC_TUNABLES"] = f"{huge_pages.TUNABLE}=1"
    flags = [f"--device={args.device}", f"--batch_size={args.batch_size}"]
    flags += ["--tiny"] if args.tiny else []
    command = [sys.executable, __file__, "--out=", "--cases", name, f"--worker={kind}", *flags]
    worker = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    while (line := worker.stdout.readline()) != "ready\n":
        if not line:
            sys.exit(f"{name}: the process of {kind!r} ended before its first step")
    return worker


def take_turn(worker: subprocess.Popen) -> dict:
    time.sleep(PAUSE_S)
    worker.stdin.write("go\n")
    worker.stdin.flush()
    return json.loads(worker.stdout.readline())


def end(worker: subprocess.Popen) -> None:
    worker.stdin.close()
    worker.wait()


def measure(name: str, case: Case, args) -> dict:
    kinds = KINDS[args.device]
    found = {kind: [] for kind in kinds}
    if args.apart:
        for kind in kinds * ROUNDS_APART:
            worker = start(name, kind, args)
            found[kind] += [take_turn(worker) for _ in range(case.turns)]
            end(worker)
    else:
        workers = {kind: start(name, kind, args) for kind in kinds}
        for _ in range(case.turns):
            for kind, worker in workers.items():
                found[kind].append(take_turn(worker))
        for worker in workers.values():
            end(worker)
    seconds = {kind: [turn["seconds"] for turn in turns] for kind, turns in found.items()}
    ratio = {  # the median of the ratios of neighbouring turns
        kind: statistics.median(peer / mine for peer, mine in zip(seconds[kind], seconds["ours"], strict=True))
        for kind in kinds[1:]
    }
    return {
        "case": name,
        "batch_size": case.batch_size,
        "seconds": {kind: statistics.median(each) for kind, each in seconds.items()},
        "times_as_fast_as": ratio,
        "peak_bytes": {kind: turns[-1]["peak"] for kind, turns in found.items()},
    }


def utilisation(case: Case, row: dict) -> dict:
    """The causal MFU of each contestant on this GPU, beside the goal; none where the peak of the device is unknown."""
    import jax

    from igpt.flops import PEAK_FLOPS, train_flops_per_image
    from igpt.model import ModelConfig

    flops = train_flops_per_image(ModelConfig(**case.model, vocab_size=case.colors, seq_len=case.side**2))
    peak = PEAK_FLOPS.get(jax.devices()[0].device_kind)
    shares = {kind: peak and flops * case.batch_size / seconds / peak for kind, seconds in row["seconds"].items()}
    return {"mfu_causal": shares, "goal_mfu_causal": case.goal}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, help="the JSON to write")
    parser.add_argument("--device", choices=KINDS, default="cpu")
    parser.add_argument("--cases", nargs="+", choices=[*CASES, *GPU_CASES], help="default: all of the device")
    parser.add_argument("--batch_size", type=int, default=0, help="instead of each case's own")
    parser.add_argument("--apart", action="store_true", help="one process at a time, for GPUs of 80 GB")
    parser.add_argument("--tiny", action="store_true", help="a small network, to try the command")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    of_device, other = (GPU_CASES, "cpu") if args.device == "gpu" else (CASES, "gpu")
    for name in args.cases or ():
        if name not in of_device:
            parser.error(f"--cases {name} needs --device={other}")
    if args.worker:
        return work(args)
    kind = "bfloat16" if args.device == "gpu" else "float32"
    peer = "our network in PyTorch" if args.device == "gpu" else "transformers' ImageGPT"
    names, rows = args.cases or list(of_device), []
    for name in names:
        args.cases = [name]
        _, case = case_of(args)
        rows.append(row := measure(name, case, args))
        if args.device == "gpu":
            row |= utilisation(case, row)
        print(f"{name}: {row['seconds']['ours']:.4f} s a step", end="")
        print("".join(f"; {ratio:.2f} x {kind}" for kind, ratio in row["times_as_fast_as"].items()), end="")
        shares = row.get("mfu_causal", {}).items()
        print("".join(f"; MFU {kind} {share:.1%}" for kind, share in shares if share), end="")
        print(f" (goal {row['goal_mfu_causal']:.0%})" if "goal_mfu_causal" in row else "", flush=True)
        write(args.out, {"what": f"one update, {kind}, medians; peers: {peer}", "rows": rows})


if __name__ == "__main__":
    main()
