"""Measures how long `import igpt` and `import train` take in a new process, before and now.

pip install -e ".[torch]"
python benchmarks/imports.py --before=DIR --out=benchmarks/results/imports_cpu.json

DIR is a checkout of an earlier version (git worktree add DIR 22119cf). The versions take turns. torch must be
installed: the earlier version imported it for TensorBoard's files. The first import of each version, which reads the
disk, is left out of the median.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

from report import write

ROOT = Path(__file__).parents[1]
CODE = """
import json, sys, time
wall, own = time.perf_counter(), time.process_time()
import {module}
times = {{"seconds": time.perf_counter() - wall, "processor_seconds": time.process_time() - own}}
print(json.dumps(times | {{"imports_torch": "torch" in sys.modules}}))
"""


def imported(root: Path, module: str) -> dict:
    """Imports a module of a checkout in a new process."""
    environment = os.environ | {"PYTHONPATH": str(root), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", CODE.format(module=module)]
    return json.loads(subprocess.run(command, cwd=root, env=environment, check=True, capture_output=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, required=True, help="a checkout of an earlier version")
    parser.add_argument("--out", required=True, help="the JSON to write")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    results = {"what": "seconds of an import in a new process"}
    for module in ("igpt", "train"):
        found = {"before": [], "now": []}
        for _ in range(args.repeats):
            found["before"].append(imported(args.before.resolve(), module))
            found["now"].append(imported(ROOT, module))
        middle = {name: statistics.median(one["seconds"] for one in each[1:]) for name, each in found.items()}
        print(module, {name: round(seconds, 3) for name, seconds in middle.items()}, flush=True)
        results[module] = found | {"median_seconds": middle, "ratio": middle["before"] / middle["now"]}
    write(args.out, results)


if __name__ == "__main__":
    main()
