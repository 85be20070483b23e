"""Runs of train.py and eval_probe.py in processes of their own, each at most once. The studies consist of them."""

import json
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

from igpt.errors import UserError


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
        command = ["train.py", f"--config={config}", f"--workdir={self.path(run)}"]
        self.once(run, command, fields, self.path(run) / "finished")

    def probe(self, run: str, folder: str = "probe", **fields) -> None:
        """Runs eval_probe.py on a run, unless that has been done."""
        model, place = self.path(run), self.path(run) / folder
        command = ["eval_probe.py", "--config=configs/probe_digits.py", f"--model={model}", f"--workdir={place}"]
        fields = {"inverse_penalties": (0.01, 0.1, 1.0, 10.0, 100.0)} | fields
        self.once(f"{run}/{folder}", command, fields, place / "finished")

    def once(self, what: str, command: list[str], fields: dict, finished: Path) -> None:
        """Runs a command of Python's, unless the file `finished` exists, and writes the command into that file.

        Raises UserError if the file holds a command with other settings.
        """
        if not re.search(self.only, what):
            return
        command = [*command, *(f"--config.{name}={value}" for name, value in fields.items())]
        if finished.exists():
            then, now = without_folders(shlex.split(finished.read_text())), without_folders(command)
            if then != now:
                before, after = (" ".join(sorted(some)) or "nothing" for some in (then - now, now - then))
                problem = f"{what} has finished with other settings: {before} then, and now {after}"
                raise UserError(f"{problem}; name another --workdir, or remove the folder of this run")
            return
        print(f"\n$ python {shlex.join(command)}", flush=True)
        start = time.perf_counter()
        subprocess.run([sys.executable, *command], check=True)
        seconds = self.seconds() | {what: time.perf_counter() - start}
        self.log.write_text(json.dumps(seconds, indent=1) + "\n")
        finished.write_text(shlex.join(command) + "\n")

    def seconds(self) -> dict:
        return json.loads(self.log.read_text()) if self.log.exists() else {}

    def read(self, run: str, file: str) -> dict[int, dict]:
        """The JSON `file` of a run by seed, for each seed that has one."""
        paths = {seed: self.path(f"{run}_{seed}") / file for seed in self.seeds}
        return {seed: json.loads(path.read_text()) for seed, path in paths.items() if path.exists()}


def without_folders(command: list[str]) -> set[str]:
    """The words of a command, whose paths keep only their last part: a study may be moved."""
    return {re.sub(r"[^=:]*/", "", word) for word in command}
