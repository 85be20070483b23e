"""Measures the first minutes: from Enter to the first step, to a sample, and to the end of the README's first command.

pip install -e .
python benchmarks/start.py --before=DIR --out=benchmarks/results/start_cpu.json

Cold starts have an empty folder for compiled programs, warm ones the folder of the start before. DIR is a checkout of
an earlier version (git worktree add DIR 78b1d87): both versions train the quickstart's network in turn, each from cold.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from report import write

ROOT = Path(__file__).parents[1]
TRAIN = ["train.py", "--config=configs/digits.py"]


def run(root: Path, words: list, cache: Path, until: str = "") -> tuple[float, str]:
    """The seconds until a line starts with `until`, or until the end, and the output so far."""
    environment = os.environ | {"PYTHONPATH": str(root), "XDG_CACHE_HOME": str(cache), "JAX_PLATFORMS": "cpu"}
    begun, lines = time.perf_counter(), []
    options = dict(cwd=root, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    process = subprocess.Popen([sys.executable, *map(str, words)], **options)
    seconds = None
    for line in process.stdout:
        lines.append(line)
        if until and seconds is None and line.startswith(until):
            seconds = time.perf_counter() - begun
    if process.wait() or (until and seconds is None):
        raise SystemExit("".join(lines))
    return seconds or time.perf_counter() - begun, "".join(lines)


def starts(folder: Path) -> dict:
    """Cold and warm: the seconds to the first step, and those of a command that samples one image."""
    found = {}
    for kind in ("cold", "warm"):
        workdir = folder / f"run-{kind}"
        words = [*TRAIN, f"--workdir={workdir}", "--config.train.steps=1"]
        step, _ = run(ROOT, words, folder / "programs", until="step 1:")
        sample = ["-m", "igpt", "sample", f"--model={workdir}", "--num=1", f"--out={folder}/{kind}.png"]
        found[kind] = {"first_step": step, "sample": run(ROOT, sample, folder / "programs")[0]}
        print(kind, found[kind], flush=True)
    return found


def whole_command(root: Path, folder: Path, name: str) -> dict:
    """The seconds of the README's first command, and its validation loss."""
    seconds, text = run(root, [*TRAIN, f"--workdir={folder}/{name}"], folder / f"programs-{name}")
    loss = float(re.search(r"validation loss ([\d.]+)", text)[1])
    print(name, seconds, loss, flush=True)
    return {"seconds": seconds, "validation_loss": loss}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, help="the JSON to write")
    parser.add_argument("--before", type=Path, help="a checkout of an earlier version, to train with both")
    parser.add_argument("--repeats", type=int, default=1, help="of the whole command")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        results = {"starts": starts(Path(folder))}
        if args.before:
            versions = {"before": args.before.resolve(), "now": ROOT}
            pairs = [(name, i) for i in range(args.repeats) for name in versions]
            trained = [(name, whole_command(versions[name], Path(folder), f"{name}-{i}")) for name, i in pairs]
            results["quickstart"] = {name: [each for whose, each in trained if whose == name] for name in versions}
    write(args.out, {"what": "seconds from Enter, digits, cold and warm"} | results)


if __name__ == "__main__":
    main()
