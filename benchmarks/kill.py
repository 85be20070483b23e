"""Tests that interrupted runs resume exactly: SIGKILL at random moments, SIGTERM at random steps.

python benchmarks/kill.py --out=benchmarks/results/kill_cpu.json
python benchmarks/kill.py --workdir=gs://bucket/kills --emulator --steps=60 --kills=10 --kills_of_two=10 --signals=0 \
    --out=benchmarks/results/kill_gs_cpu.json
python benchmarks/kill.py --program=vqvae --kills=10 --kills_of_two=5 --signals=0 --steps=60 \
    --out=benchmarks/results/kill_vqvae_cpu.json

A run on eight CPU devices (data 2 x fsdp 2 x tensor 2, dropout, evaluations, checkpoints) is killed and restarted, 30
times in all; a run of two processes 10 times; a run that receives SIGTERM 20 times. When a run finishes earlier, a new
one starts. Every run must finish with the parameters, optimizer state, progress and losses of an undisturbed run, byte
for byte. A seed says after how many further steps and how much later a run is killed, every fifth time while it starts;
what a process does at that moment is up to chance.

With --workdir, the killed runs live there, for instance in a bucket; the undisturbed one stays on the local disk.
--emulator starts a server on loopback that stands in for Google's (tests/gcs_server.py) or Amazon's (moto).
"""

import argparse
import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
from report import write

from igpt.files import AnyPath, as_path, is_bucket, remove_tree
from igpt.run import checkpoint, restore
from igpt.run.orbax_paths import known_to_orbax

ROOT = Path(__file__).parents[1]
EVAL_EVERY = 5  # often, so that some kills hit an evaluation
FIELDS = [
    "--config=configs/digits.py", "--config.train.batch_size=32", "--config.train.num_samples=0",
    "--config.train.log_every=1", f"--config.train.eval_every={EVAL_EVERY}", "--config.train.checkpoint_every=7",
    "--config.mesh.fsdp=2", "--config.mesh.tensor=2",
]  # fmt: skip
PROGRAMS = {
    "igpt": [
        "--config.model.width=32", "--config.model.depth=2", "--config.model.num_heads=4",
        "--config.model.residual_dropout=0.1",
    ],
    "vqvae": [
        "--config.program=vqvae", "--config.optim.name=adam", "--config.vqvae.codes=32", "--config.vqvae.width=8",
        "--config.vqvae.code_width=8", "--config.vqvae.residual_width=8",
    ],
}  # fmt: skip


def start(workdir: AnyPath, steps: int, processes: int) -> list[subprocess.Popen]:
    """Starts train.py with a total of eight CPU devices."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    started = []
    for index in range(processes):
        arguments = [*FIELDS, f"--workdir={workdir}", f"--config.train.steps={steps}"]
        arguments += [f"--config.mesh.cpu_devices={8 // processes}"]
        if processes > 1:
            arguments += [f"--coordinator=localhost:{port}", f"--processes={processes}", f"--process={index}"]
        started.append(
            subprocess.Popen(
                [sys.executable, "train.py", *arguments],
                cwd=ROOT,
                env=os.environ | {"JAX_PLATFORMS": "cpu"},
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
        )
    return started


def finish(workdir: AnyPath, steps: int, processes: int) -> None:
    """Runs train.py undisturbed."""
    codes = [process.wait() for process in start(workdir, steps, processes)]
    if any(codes):
        raise SystemExit(f"an undisturbed run exited with {codes}; run the same command of train.py to see why")


def records(workdir: AnyPath) -> list[dict]:
    """The complete lines of metrics.jsonl."""
    try:
        lines = (workdir / "metrics.jsonl").read_text().splitlines(keepends=True)
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def outcome(workdir: AnyPath, steps: int) -> tuple[dict, list[dict], dict]:
    """What must be equal: the bytes of every array of the last checkpoint, the records without speed, the progress."""
    leaves = jax.tree_util.tree_leaves_with_path(read_arrays(workdir, steps))
    arrays = {jax.tree_util.keystr(path): np.asarray(leaf).tobytes() for path, leaf in leaves}
    known = [{k: v for k, v in record.items() if not k.startswith("perf/")} for record in records(workdir)]
    return arrays, known, vars(restore.progress_at(workdir, steps))


def read_arrays(workdir: AnyPath, step: int) -> dict:
    """All arrays of a checkpoint as NumPy arrays, independent of the mesh: {"params": ..., "optimizer": ...}."""
    found = {}
    with ocp.StandardCheckpointer() as reader:
        for item in ("params", "optimizer"):
            path = known_to_orbax(workdir / checkpoint.FOLDER / str(step) / item)
            shapes = reader.metadata(path).item_metadata.tree
            found[item] = reader.restore(path, jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), shapes))
    return found


def phase(workdir: AnyPath) -> str:
    """What the run was doing when it was killed, according to its files."""
    if not (found := records(workdir)):
        return "before the first step"
    saves = list((workdir / "checkpoints").iterdir())
    named = {str(step) for step in checkpoint.finished_steps(workdir)} if is_bucket(workdir) else None
    if any(path.name not in named if named is not None else not path.name.isdigit() for path in saves):
        return "during a save"
    return "during an evaluation" if found[-1]["step"] % EVAL_EVERY == 0 and "eval/loss" not in found[-1] else "between"


def await_moment(workdir: AnyPath, process: subprocess.Popen, rng: random.Random) -> None:
    """Waits for a moment to kill: while the run starts (one in five), or within 0.5 s of a random further step."""
    if rng.random() < 0.2:
        more, later = 0, rng.uniform(0.5, 8.0)
    else:
        more, later = rng.randint(1, 25), rng.uniform(0.0, 0.5)
    wanted = len(records(workdir)) + more
    while process.poll() is None and len(records(workdir)) < wanted:
        time.sleep(0.01)
    deadline = time.monotonic() + later
    while process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)


def kill_runs(folder: AnyPath, whole, steps: int, processes: int, kills: int, rng: random.Random) -> dict:
    """Kills and restarts runs until there were `kills`, and counts finished runs that differ from `whole`."""
    phases, ended, differing, run = Counter(), 0, 0, 0
    while sum(phases.values()) < kills:
        run += 1
        workdir = folder / f"killed-{processes}-{run}"
        while True:
            running = start(workdir, steps, processes)
            if sum(phases.values()) < kills:
                await_moment(workdir, running[0], rng)
                if running[0].poll() is None:
                    phases[phase(workdir)] += 1
                    for process in rng.sample(running, len(running)):
                        process.kill()
                        time.sleep(rng.uniform(0.0, 0.5) if processes > 1 else 0.0)
            codes = [process.wait() for process in running]
            if not any(codes):
                break
            # We send SIGKILL. Its peer then fails in a collective (1) or is aborted by JAX's runtime (-6), unless
            # it has just finished (0).
            if not {-signal.SIGKILL} <= set(codes) <= {-signal.SIGKILL, -signal.SIGABRT, 1, 0}:
                raise SystemExit(f"a killed run exited with {codes}; expected are -9, and -6, 1 or 0 of a peer")
        ended += 1
        differing += outcome(workdir, steps) != whole
        count = f"{sum(phases.values())} kills {dict(phases)}"
        print(f"{processes} process(es): run {run} finished, {count}, {differing} differ")
        remove_tree(workdir)
    return {"processes": processes, "kills": kills, "phases": dict(phases), "runs": ended, "differing": differing}


def terminate_runs(folder: AnyPath, whole, steps: int, signals: int, rng: random.Random) -> dict:
    """Sends SIGTERM at random steps, and counts the runs that saved their last step and exited with code 75 or 0."""
    saved, sent, run, differing, seconds = 0, 0, 0, 0, []
    while sent < signals:
        run += 1
        workdir = folder / f"terminated-{run}"
        while True:
            before = len(records(workdir))
            [process] = start(workdir, steps, 1)
            more = rng.randint(1, 25)
            while process.poll() is None and (sent == signals or len(records(workdir)) < before + more):
                time.sleep(0.01)
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
                at = time.monotonic()
                sent += 1
                code = process.wait()
                seconds.append(time.monotonic() - at)
                last = max(record["step"] for record in records(workdir))
                steps_kept = checkpoint.finished_steps(workdir)
                saved += code in (0, 75) and bool(steps_kept) and steps_kept[-1] == last
                if code == 75:
                    continue
            if process.wait() == 0:
                break
            raise SystemExit(f"a run that received SIGTERM exited with {process.returncode}; expected are 75 and 0")
        differing += outcome(workdir, steps) != whole
        print(f"SIGTERM: run {run} finished, {saved} of {sent} saved, {differing} differ")
        remove_tree(workdir)
    return {
        "signals": signals,
        "saved": saved,
        "runs": run,
        "differing": differing,
        "seconds_to_end": {"median": float(np.median(seconds)), "most": max(seconds)},
    }


@contextlib.contextmanager
def emulator(workdir: str):
    """Runs a server that has the bucket of `workdir`, and names it in the environment."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    url, google = f"http://127.0.0.1:{port}", workdir.startswith("gs://")
    module = ["tests/gcs_server.py", f"--port={port}"] if google else ["-m", "moto.server", "-H127.0.0.1", f"-p{port}"]
    quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    server = subprocess.Popen([sys.executable, *module], cwd=ROOT, **quiet)
    try:
        while True:
            with contextlib.suppress(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port)):
                break
            time.sleep(0.1)
        if google:
            os.environ["TENSORSTORE_GCS_HTTP_URL"] = url
        else:
            os.environ |= {"AWS_ENDPOINT_URL": url, "AWS_ACCESS_KEY_ID": "any", "AWS_SECRET_ACCESS_KEY": "any"}
            bucket = workdir.removeprefix("s3://").partition("/")[0]
            urllib.request.urlopen(urllib.request.Request(f"{url}/{bucket}", method="PUT")).close()
        yield
    finally:
        server.kill()
        server.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, help="the JSON to write")
    parser.add_argument("--workdir", help="where the killed runs live (default: a temporary folder)")
    parser.add_argument("--emulator", action="store_true", help="start a server for the bucket of --workdir")
    parser.add_argument("--program", choices=PROGRAMS, default="igpt", help="what trains")
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--kills_of_two", type=int, default=10)
    parser.add_argument("--signals", type=int, default=20)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    FIELDS.extend(PROGRAMS[args.program])
    rng, begun = random.Random(args.seed), time.monotonic()
    results = {
        "what": "runs killed at random moments compared with an undisturbed one, byte by byte",
        "program": args.program,
        "steps": args.steps,
        "workdir": (args.workdir or "a local folder") + (", emulated on loopback" if args.emulator else ""),
    }
    server = emulator(args.workdir) if args.emulator else contextlib.nullcontext()
    with tempfile.TemporaryDirectory() as name, server:
        folder = Path(name)
        whole = {}
        place = as_path(args.workdir) if args.workdir else folder
        for processes in [
            number for number, wanted in ((1, args.kills + args.signals), (2, args.kills_of_two)) if wanted
        ]:
            finish(folder / f"whole-{processes}", args.steps, processes)
            whole[processes] = outcome(folder / f"whole-{processes}", args.steps)
        if args.kills:
            results["one process, 8 devices"] = kill_runs(place, whole[1], args.steps, 1, args.kills, rng)
        if args.kills_of_two:
            killed = kill_runs(place, whole[2], args.steps, 2, args.kills_of_two, rng)
            results["two processes of 4 devices"] = killed
        if args.signals:
            results["SIGTERM"] = terminate_runs(place, whole[1], args.steps, args.signals, rng)
    results["seconds"] = time.monotonic() - begun
    write(args.out, results)
    bad = sum(part["differing"] for part in results.values() if isinstance(part, dict))
    saved = results["SIGTERM"]["saved"] if args.signals else 0
    if bad or saved != args.signals:
        raise SystemExit(
            f"{bad} runs differ, {saved} of {args.signals} signals were followed by a save; see {args.out}"
        )


if __name__ == "__main__":
    main()
