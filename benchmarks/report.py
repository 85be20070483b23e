"""Timing, and results as JSON with the command, the machine and the versions. All benchmarks use it."""

import json
import os
import platform
import statistics
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import jax


def median_seconds(run, repeats: int) -> float:
    """The median time of run(). One more call before the measurement compiles and warms up."""
    jax.block_until_ready(run())
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(run())
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def machine() -> dict:
    """The command line, the device and processor, and the versions of the packages that are installed."""
    versions = {}
    for name in ("jax", "flax", "optax", "numpy", "torch", "transformers"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return {
        "command": " ".join(["python", *sys.argv]),
        "device": jax.devices()[0].device_kind,
        "cores": os.cpu_count(),
        "processor": platform.machine(),
        "python": platform.python_version(),
        "versions": versions,
    }


def write(path: str, results: dict) -> None:
    """Writes `results` and `machine()` to the JSON file `path`, and makes its folder."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(json.dumps(machine() | results, indent=1) + "\n")
    print(f"wrote {path}")
