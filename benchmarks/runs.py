"""Runs of train.py and eval_probe.py in processes of their own, each at most once. The studies consist of them."""

import json
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path


class Runs:
    """Runs under one folder, named after a data set. A run that has finished is not run again.

    `only` is a regular expression: other runs are passed over.
    """

    def __init__(self, name: str, workdir: Path, seeds: int = 1, only: str = ""):
        self.name, self.workdir, self.seeds, self.only = name, workdir, range(seeds), only
        self.log = workdir / f"{name}_seconds.json"

    def path(self, run: str) -> Path:
        return self.workdir / f"{self.name}_{run}"

    def train(self, run: str, config: str, **fields) -> None:
        """Runs train.py to its end, unless that has been done."""
        fields = fields | {"train.num_samples": 16 if run.startswith("autoregressive") else 0}
        self.once(run, f"train.py --config={config} --workdir={self.path(run)}", fields, self.path(run) / "finished")

    def probe(self, run: str, folder: str = "probe", **fields) -> None:
        """Runs eval_probe.py on a run, unless that has been done."""
        model, place = self.path(run), self.path(run) / folder
        command = f"eval_probe.py --config=configs/probe_digits.py --model={model} --workdir={place}"
        fields = {"inverse_penalties": (0.01, 0.1, 1.0, 10.0, 100.0)} | fields
        self.once(f"{run}/{folder}", command, fields, place / "finished")

    def once(self, what: str, command: str, fields: dict, finished: Path) -> None:
        """Runs a command of Python's, unless the file `finished` exists, and writes that file."""
        if finished.exists() or not re.search(self.only, what):
            return
        command += "".join(f" --config.{name}={shlex.quote(str(value))}" for name, value in fields.items())
        print(f"\n$ python {command}", flush=True)
        start = time.perf_counter()
        subprocess.run([sys.executable, *shlex.split(command)], check=True)
        seconds = self.seconds() | {what: time.perf_counter() - start}
        self.log.write_text(json.dumps(seconds, indent=1) + "\n")
        finished.write_text(command + "\n")

    def seconds(self) -> dict:
        return json.loads(self.log.read_text()) if self.log.exists() else {}

    def read(self, run: str, file: str) -> list[dict]:
        """The JSON `file` of a run, for each seed that has one."""
        paths = [self.path(f"{run}_{seed}") / file for seed in self.seeds]
        return [json.loads(path.read_text()) for path in paths if path.exists()]
