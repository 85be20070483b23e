"""A run's journal. It writes JSON lines and TensorBoard events, shows progress and speed, and detects bad steps.

Metrics are named `split/name`. If there are several processes, only process 0 writes.
"""

import contextlib
import json
import math
import os
import time
from pathlib import Path

import jax

from igpt.data.examples import Source
from igpt.errors import NonFiniteError
from igpt.files import write_text
from igpt.flops import PEAK_FLOPS, train_flops_per_image
from igpt.model import ModelConfig
from igpt.plots import save_png
from igpt.progress import progress_bar
from igpt.run.checkpoint import Checkpoints
from igpt.run.cluster import is_first_process
from igpt.run.directory import RunDirectory
from igpt.run.tensorboard import Event, EventsWriter, SessionLog, image, scalar

FLUSH_SECONDS = 30  # how often TensorBoard events are flushed to disk
MAX_SKIPPED = 20  # training ends after so many bad steps in a row


class Journal:
    """Records every step of a run. It reads a step's metrics while the next step runs, so that the device never waits.

    `skipped` is the number of bad steps that the starting state has already counted.
    """

    def __init__(self, run: RunDirectory, checkpoints: Checkpoints, model: ModelConfig, source: Source, skipped: int):
        config, self.checkpoints, self.first_step = run.config, checkpoints, run.first_step
        self.train = config.train
        self.unreadable = source if config.data.on_unreadable == "skip" else None
        self.skipped, self.skipped_in_a_row = skipped, 0
        self.writer = Writer(run.path, run.first_step, run.evaluation_is_missing)
        self.speed = Speed(model, config.train.batch_size)
        shown = dict(unit="step", disable=not is_first_process())
        self.bar = progress_bar(total=config.train.steps, initial=run.first_step, **shown)
        self._unread = None  # (step, metrics) of the newest step, whose metrics are not read yet

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.bar.close()
        self.writer.close()

    def add(self, step: int, metrics: dict) -> None:
        """Stores the metrics of the step that was just dispatched, and records the metrics of the previous step."""
        self.settle()
        self._unread = step, metrics

    def settle(self) -> None:
        """Waits for the metrics of the newest step and records them. Raises NonFiniteError if training must end."""
        if self._unread is not None:
            (step, metrics), self._unread = self._unread, None
            self._record(step, {name: float(value) for name, value in jax.device_get(metrics).items()})

    def _record(self, step: int, metrics: dict) -> None:
        is_bad = self._check(step, metrics)
        self.bar.update(step - self.bar.n)
        if step == self.first_step + 1:
            self.speed.restart(step)  # the first step includes the time of compilation
            self.print(f"step {step}: train/loss {metrics['train/loss']:.4f}")
        if is_bad or step % self.train.log_every == 0 or step in (self.first_step + 1, self.train.steps):
            metrics |= self.speed.read(step)
            if self.unreadable:
                metrics["data/unreadable"] = len(self.unreadable.unreadable)
            self.writer.write(step, metrics)
            rate = metrics.get("perf/images_per_sec")
            speed = f", {rate:.0f} images/s" if rate else ""
            self.bar.set_postfix_str(f"loss {metrics['train/loss']:.4f}{speed}", refresh=False)

    def _check(self, step: int, metrics: dict) -> bool:
        """Returns whether the optimizer skipped this step. Raises NonFiniteError if training must end."""
        is_bad = metrics["train/skipped"] > self.skipped
        self.skipped = int(metrics["train/skipped"])
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if is_bad else 0
        if not is_bad:
            return False
        what = f"step {step}: loss {metrics['train/loss']}, gradient norm {metrics['train/grad_norm']}"
        if self.train.on_bad_step == "stop" or self.skipped_in_a_row == MAX_SKIPPED:
            raise NonFiniteError(self._how_to_continue(what))
        self.print(f"{what}: skipped, {self.skipped} so far")
        return True

    def _how_to_continue(self, what: str) -> str:
        newest = self.checkpoints.newest()
        there = f"The newest checkpoint is that of step {newest}" if newest else "There is no checkpoint yet"
        if self.train.on_bad_step == "skip":
            return f"{what}. It is bad step {self.skipped_in_a_row} in a row, so training ends. {there}."
        return (
            f"{what}. {there}. To resume past it, run the same command with --config.train.on_bad_step=skip. If it "
            "happens again, try a lower optim.learning_rate, a longer optim.warmup_steps or optim.clip_norm=1 in a new "
            "--workdir."
        )

    def evaluated(self, step: int, metrics: dict) -> None:
        """Writes and prints the metrics of an evaluation."""
        self.writer.write(step, metrics)
        self.print(f"step {step}: " + ", ".join(f"{name} {x:.4f}" for name, x in metrics.items()))

    def sampled(self, step: int, picture) -> None:
        """Writes a grid of samples, uint8 [H, W, 3]."""
        self.writer.write_samples(step, picture)

    def restart_clock(self, step: int) -> None:
        """Restarts the clock, so that the speed does not include the time of evaluating, sampling and saving."""
        self.speed.restart(step)

    def print(self, text: str) -> None:
        """Prints a line above the progress bar."""
        if is_first_process():
            self.bar.write(text)


class Speed:
    """Images per second, and the share of the devices' peak FLOP/s, since the last reading."""

    def __init__(self, config: ModelConfig, batch_size: int):
        self.flops, self.batch_size = train_flops_per_image(config), batch_size
        device = jax.devices()[0].device_kind
        # Longer names come first, because "TPU v5 lite" also begins with "TPU v5".
        known = [name for name in sorted(PEAK_FLOPS, key=len, reverse=True) if device.startswith(name)]
        self.peak = PEAK_FLOPS[known[0]] * jax.device_count() if known and config.dtype != "float32" else None
        self.restart(0)

    def restart(self, step: int) -> None:
        """Starts a new interval after `step`."""
        self.step, self.time = step, time.perf_counter()

    def read(self, step: int) -> dict:
        """The metrics perf/... of the steps since the last reading or restart. Empty if there were no steps."""
        if step == self.step:
            return {}
        rate = (step - self.step) * self.batch_size / (time.perf_counter() - self.time)
        self.restart(step)
        mfu = {} if self.peak is None else {"perf/mfu": rate * self.flops / self.peak}
        return {"perf/images_per_sec": rate} | mfu


class Writer:
    """Writes metrics.jsonl (one record per line), TensorBoard events and sample grids. Only process 0 writes."""

    def __init__(self, workdir: Path, first_step: int, evaluation_is_missing: bool = False):
        """Drops old records of steps after `first_step`, and its old evaluation if `evaluation_is_missing`."""
        self.active = is_first_process()
        if not self.active:
            return
        path = workdir / "metrics.jsonl"
        _drop_records_after(path, first_step, evaluation_is_missing)
        self.lines = path.open("a")
        # This thread writes the events: the thread of tensorboardX's SummaryWriter would fail silently on a full disk.
        self.events = EventsWriter(str(workdir / "events"))
        self._write_event(first_step + 1, session_log=SessionLog(status=SessionLog.START))  # hides outdated events
        self.flush_at = 0.0
        self.samples = workdir / "samples"

    def write(self, step: int, values: dict) -> None:
        """Writes the metrics of one step. It flushes the JSON line before it returns."""
        if not self.active:
            return
        values = {name: float(value) for name, value in values.items() if math.isfinite(value)}  # JSON has no NaN
        self.lines.write(json.dumps({"step": step} | values) + "\n")
        self.lines.flush()
        for name, value in values.items():
            self._write_event(step, summary=scalar(name, value))
        if time.monotonic() > self.flush_at:
            self._flush()

    def write_samples(self, step: int, picture) -> None:
        """Writes a grid, uint8 [H, W, 3], as samples/STEP.png and to TensorBoard."""
        if not self.active:
            return
        self.samples.mkdir(exist_ok=True)
        save_png(picture, self.samples / f"{step:07d}.png")
        self._write_event(step, summary=image("samples", picture, dataformats="HWC"))
        self._flush()

    def close(self) -> None:
        """Closes the files. It ignores OSError, because an earlier write has already reported a full disk."""
        if self.active:
            for file in (self.lines, self.events):
                with contextlib.suppress(OSError):
                    file.close()

    def _write_event(self, step: int, **content) -> None:
        self.events.write_event(Event(step=step, wall_time=time.time(), **content))

    def _flush(self) -> None:
        self.events.flush()
        os.fsync(self.lines.fileno())  # a mounted bucket stores a file only when it is synced or closed
        self.flush_at = time.monotonic() + FLUSH_SECONDS


def _drop_records_after(path: Path, step: int, evaluation_is_missing: bool) -> None:
    """Removes the records that a killed run wrote and the resumed run will write again."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        with contextlib.suppress(ValueError, KeyError):  # skips a line that the kill cut off
            record = json.loads(line)
            if record["step"] < step + 1 - (evaluation_is_missing and "eval/loss" in record):
                kept.append(line + "\n")
    write_text(path, "".join(kept))
