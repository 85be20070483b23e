"""Tests that two runs never work in one workdir, and that a lock whose owner was killed needs no hand.

python benchmarks/lock.py --out=benchmarks/results/lock_cpu.json

20 times, two runs of train.py start in one workdir, a random time apart. When one is refused and the other has learned
some steps, the other gets SIGKILL. A third run starts at once, resumes, and gets SIGTERM. A run is "at work" from the
first to the last time that it creates, moves or opens to write a file below the workdir, besides those of locks.
"""

import argparse
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from report import write

ROOT = Path(__file__).parents[1]
FIELDS = [
    "--config=configs/digits.py", "--config.model.width=16", "--config.model.depth=1", "--config.model.num_heads=2",
    "--config.train.batch_size=8", "--config.train.num_samples=0", "--config.train.log_every=1",
    "--config.train.eval_every=1000000", "--config.train.checkpoint_every=20", "--config.train.steps=1000000",
]  # fmt: skip
# Runs train.py, and writes a line with the time for each of its accesses to the workdir that change something.
TRACED = """
import os, runpy, sys, time
workdir, trace = os.path.abspath(sys.argv[1]), open(sys.argv[2], "a", buffering=1)
del sys.argv[1:3]

def hook(event, arguments):
    changes = event in ("os.rename", "os.remove", "shutil.rmtree") or (
        event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+")
    )
    path = str(arguments[0]) if changes else ""
    if os.path.abspath(path).startswith(workdir + os.sep) and not os.path.basename(path).startswith("running-"):
        trace.write(f"{time.monotonic()} {event} {path}\\n")

sys.addaudithook(hook)
sys.argv[0] = "train.py"
runpy.run_path("train.py", run_name="__main__")
"""


def start(workdir: Path, name: str) -> subprocess.Popen:
    """Starts train.py with a trace WORKDIR.NAME.trace and its messages in WORKDIR.NAME.log."""
    trace, log = (Path(f"{workdir}.{name}.{kind}") for kind in ("trace", "log"))
    command = [sys.executable, "-c", TRACED, str(workdir), str(trace), f"--workdir={workdir}", *FIELDS]
    cache = {"JAX_COMPILATION_CACHE_DIR": f"{workdir.parent}/cache", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    environment = os.environ | {"JAX_PLATFORMS": "cpu"} | cache
    with log.open("w") as file:
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=file)


def times(workdir: Path, name: str) -> list[float]:
    """The times at which a run changed something in the workdir."""
    path = Path(f"{workdir}.{name}.trace")
    return [float(line.split()[0]) for line in path.read_text().splitlines()] if path.exists() else []


def overlap(workdir: Path, names: list[str]) -> bool:
    """Whether one run changed something between the first and the last change of another one."""
    spans = sorted((min(found), max(found)) for name in names if (found := times(workdir, name)))
    return any(after[0] <= before[1] for before, after in itertools.pairwise(spans))


def trial(workdir: Path, apart: float, learned: int) -> dict:
    """Two runs `apart` seconds from each other; SIGKILL to the one that works, after `learned` steps; a third run."""
    runs = {"first": start(workdir, "first")}
    time.sleep(apart)
    runs["second"] = start(workdir, "second")
    lines = workdir / "metrics.jsonl"
    while not (lines.exists() and lines.read_text().count("\n") >= learned):
        time.sleep(0.02)
    while all(process.poll() is None for process in runs.values()):
        time.sleep(0.02)  # until the other one is refused
    refused = {name: process for name, process in runs.items() if process.poll() is not None}
    [(loser, process)] = refused.items()
    said = Path(f"{workdir}.{loser}.log").read_text()
    winner = next(process for name, process in runs.items() if name != loser)
    winner.send_signal(signal.SIGKILL)
    begun, third = time.monotonic(), start(workdir, "third")
    log = Path(f"{workdir}.third.log")
    while third.poll() is None and "train/loss" not in log.read_text():
        time.sleep(0.02)
    seconds = time.monotonic() - begun
    third.send_signal(signal.SIGTERM)
    codes = {"refused": process.returncode, "killed": winner.wait(), "third": third.wait()}
    return {
        "apart": apart,
        "codes": codes,
        "named": f"in use by process {winner.pid} on " in said,
        "two_at_work": overlap(workdir, ["first", "second", "third"]),
        "third_resumed": "(resumed after step" in log.read_text() or learned < 20,
        "seconds_to_its_first_step": seconds,
        "locks_left": len(list(workdir.glob("running-*"))),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, help="the JSON to write")
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng, trials = random.Random(args.seed), []
    with tempfile.TemporaryDirectory() as name:
        for number in range(args.trials):
            # Most starts are so close that both run's first looks at the workdir may coincide.
            apart = rng.choice((0.0, rng.uniform(0.0, 0.1), rng.uniform(0.0, 5.0)))
            trials.append(trial(Path(name) / f"run-{number}", apart, rng.randint(1, 60)))
            print(json.dumps(trials[-1]), flush=True)
    good = {"refused": 1, "killed": -signal.SIGKILL, "third": 75}
    failed = [one for one in trials if one["codes"] != good or one["two_at_work"] or one["locks_left"]]
    failed += [one for one in trials if not (one["named"] and one["third_resumed"])]
    results = {"what": "two runs started in one workdir, SIGKILL to the one at work, and a third run", "trials": trials}
    write(args.out, results | {"failed": len(failed)})
    if failed:
        raise SystemExit(f"{len(failed)} of {len(trials)} trials failed; see {args.out}")


if __name__ == "__main__":
    main()
