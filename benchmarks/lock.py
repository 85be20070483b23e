"""Tests that two runs never work in one workdir, and that a lock whose owner was killed needs no hand.

python benchmarks/lock.py --out=benchmarks/results/lock_cpu.json

20 times, two runs of train.py start in one workdir, a random time apart. When one is refused and the other has learned
some steps, the other gets SIGKILL. A third run starts at once, resumes, and gets SIGTERM. A run is "at work" from the
first to the last time that it creates, moves or opens to write a file below the workdir, besides those of locks.
"""

import argparse
import importlib
import itertools
import json
import multiprocessing
import os
import random
import signal
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


def work(workdir: Path, name: str) -> None:
    """Runs train.py in this process. Writes its messages to WORKDIR.NAME.log, and changes of files to .trace."""
    with Path(f"{workdir}.{name}.log").open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    trace = Path(f"{workdir}.{name}.trace").open("w", buffering=1)  # noqa: SIM115 - stays open until the process ends

    def hook(event: str, arguments: tuple) -> None:
        changes = event in ("os.rename", "os.remove") or (
            event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+")
        )
        path = os.path.abspath(str(arguments[0])) if changes else ""
        if path.startswith(f"{workdir}/") and not os.path.basename(path).startswith("running-"):
            trace.write(f"{time.monotonic()} {event} {path}\n")

    sys.addaudithook(hook)
    os.chdir(ROOT)
    importlib.import_module("train").main([f"--workdir={workdir}", *FIELDS])


def start(workdir: Path, name: str) -> multiprocessing.Process:
    """Starts train.py in a new process, from one that has already imported it."""
    process = multiprocessing.get_context("forkserver").Process(target=work, args=(workdir, name))
    process.start()
    return process


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
    while all(run.is_alive() for run in runs.values()) or not (
        lines.exists() and lines.read_text().count("\n") >= learned
    ):
        time.sleep(0.02)
        if not any(run.is_alive() for run in runs.values()):
            raise SystemExit(f"both runs ended, with {[run.exitcode for run in runs.values()]}; see {workdir}.*.log")
    [winner] = [run for run in runs.values() if run.is_alive()]
    [(name, loser)] = [(name, run) for name, run in runs.items() if run is not winner]
    said = Path(f"{workdir}.{name}.log").read_text()
    winner.kill()

    begun, third = time.monotonic(), start(workdir, "third")
    log = Path(f"{workdir}.third.log")
    while third.is_alive() and not (log.exists() and "train/loss" in log.read_text()):
        time.sleep(0.02)
    seconds = time.monotonic() - begun
    third.terminate()
    for run in (loser, winner, third):
        run.join()
    codes = {"refused": loser.exitcode, "killed": winner.exitcode, "third": third.exitcode}
    return {
        "apart": apart,
        "codes": codes,
        "named": f"in use by process {winner.pid} on " in said,
        "two_at_work": overlap(workdir, ["first", "second", "third"]),
        "third_had_a_checkpoint": "(resumed after step" in log.read_text(),
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
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        os.environ |= {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
        os.environ |= {"JAX_COMPILATION_CACHE_DIR": f"{name}/cache", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
        multiprocessing.get_context("forkserver").set_forkserver_preload(["train"])
        for number in range(args.trials):
            # Most starts are so close that both run's first looks at the workdir may coincide.
            apart = rng.choice((0.0, rng.uniform(0.0, 0.1), rng.uniform(0.0, 5.0)))
            trials.append(trial(Path(name) / f"run-{number}", apart, rng.randint(1, 60)))
            print(json.dumps(trials[-1]), flush=True)
    good = {"refused": 1, "killed": -signal.SIGKILL, "third": 75}
    failed = [
        one for one in trials if one["codes"] != good or one["two_at_work"] or one["locks_left"] or not one["named"]
    ]
    results = {"what": "two runs started in one workdir, SIGKILL to the one at work, and a third run", "trials": trials}
    write(args.out, results | {"failed": len(failed)})
    if failed:
        raise SystemExit(f"{len(failed)} of {len(trials)} trials failed; see {args.out}")


if __name__ == "__main__":
    main()
