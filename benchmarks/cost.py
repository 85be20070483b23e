"""Measures how a training step's time and memory grow with depth, width, tokens and batch: exponents, on the CPU.

python benchmarks/cost.py --out=benchmarks/results/cost_cpu.json

From a middle network, one size at a time is halved and doubled. A line through the logarithms gives its exponent, for
the measured step and for what is expected: the FLOPs of igpt/flops.py, and the bytes that XLA plans for the step. Each
case runs in a process of its own. Time is processor time, which other programs on the machine hardly change. Memory is
the process's peak in training, minus what it holds before the network exists.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from report import write

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # for configs/

MIDDLE = {"depth": 4, "width": 256, "tokens": 256, "batch": 4}
SIZES = {"depth": (2, 4, 8), "width": (128, 256, 512), "tokens": (64, 256, 1024), "batch": (2, 4, 8)}
TINY = {"depth": 2, "width": 32, "tokens": 16, "batch": 2}
HEAD_SIZE, COLORS = 32, 512


def run_case(case: dict, repeats: int) -> dict:
    """Seconds and bytes of a training step, measured and expected, in this process."""
    import jax

    from configs import digits
    from igpt.config import Config
    from igpt.flops import train_flops_per_image
    from igpt.plan.compiled import abstract_batch
    from igpt.sharding import make_mesh, to_devices
    from igpt.state import build_program

    config, side = digits.get_config(), round(case["tokens"] ** 0.5)
    config.optim.name = "adam"  # whose cost does not depend on the batch as Muon's does
    config.model.update(width=case["width"], depth=case["depth"], num_heads=case["width"] // HEAD_SIZE)
    config.data.image_size, config.palette.colors, config.train.batch_size = (side, side), COLORS, case["batch"]
    config, mesh = Config.of(config, trains=True), make_mesh(devices=jax.devices()[:1])
    program = build_program(config, mesh)
    with jax.set_mesh(mesh):
        batch = abstract_batch(config, program.model, mesh)
        compiled = program.train_step.lower(program.abstract, batch).compile()
        plan, before = compiled.memory_analysis(), memory("VmRSS")
        state = program.create_state(seed=0)
        Path("/proc/self/clear_refs").write_text("5")  # forgets the peak, which the compiler may have reached
        tokens = np.random.default_rng(0).integers(0, COLORS, (case["batch"], case["tokens"])).astype(np.int32)
        batch = to_devices({"tokens": tokens}, case["batch"], mesh)
        seconds, processor_seconds = [], []
        for _ in range(repeats + 1):
            start, used = time.perf_counter(), time.process_time()
            state, _ = jax.block_until_ready(compiled(state, batch))
            seconds.append(time.perf_counter() - start)
            processor_seconds.append(time.process_time() - used)
    return {
        "seconds": statistics.median(seconds[1:]),
        "processor_seconds": statistics.median(processor_seconds[1:]),
        "bytes": memory("VmHWM") - before,
        "flops": train_flops_per_image(program.model) * case["batch"],
        "planned_bytes": plan.argument_size_in_bytes + plan.temp_size_in_bytes,
    }


def memory(field: str) -> int:
    """A field of this process's status in bytes: VmRSS is what it holds now, VmHWM the peak."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def exponent(sizes: list, values: list) -> float:
    """The slope of a line through the logarithms."""
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, help="the JSON to write")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--tiny", action="store_true", help="a small network, to try the command")
    parser.add_argument("--case", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case:
        print(json.dumps(run_case(args.case, args.repeats)))
        return
    middle, sizes = MIDDLE, SIZES
    if args.tiny:
        middle, sizes = TINY, {name: (size, 4 * size) for name, size in TINY.items()}
    cases = {json.dumps(middle | {name: size}): None for name in sizes for size in sizes[name]}
    for case in cases:
        command = [sys.executable, __file__, "--out=", f"--repeats={args.repeats}", f"--case={case}"]
        environment = os.environ | {"JAX_PLATFORMS": "cpu"}
        printed = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout
        cases[case] = json.loads(printed.splitlines()[-1])
        result = cases[case]
        used = f"{result['processor_seconds']:.3f} s of processor time, {result['bytes'] / 2**20:.0f} MiB"
        print(f"{case}: {used}", flush=True)
    found = {}
    for name in sizes:
        measured = [cases[json.dumps(middle | {name: size})] for size in sizes[name]]
        found[name] = {key: exponent(sizes[name], [each[key] for each in measured]) for key in measured[0]}
        line = "time {processor_seconds:.2f} (FLOPs {flops:.2f}), memory {bytes:.2f} (planned {planned_bytes:.2f})"
        print(f"{name}: {line.format(**found[name])}")
    rows = [json.loads(case) | result for case, result in cases.items()]
    write(args.out, {"what": "a training step, float32, medians", "exponents": found, "rows": rows})


if __name__ == "__main__":
    main()
