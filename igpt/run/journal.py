"""What a run reports: JSON lines and TensorBoard on disk, a progress bar on the terminal, and its speed.

Names are `split/name`. Only process 0 of a multi-process run writes.
"""

import contextlib
import json
import math
import os
import time
from pathlib import Path

import jax
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import image, scalar
from tqdm import tqdm

from igpt.flops import PEAK_FLOPS, train_flops_per_image
from igpt.model import ModelConfig
from igpt.plots import save_png

FLUSH_SECONDS = 30  # that TensorBoard may be behind


class Speed:
    """Images per second, and the share of the devices' peak, since the last reading."""

    def __init__(self, config: ModelConfig, batch_size: int):
        self.flops, self.batch_size = train_flops_per_image(config), batch_size
        device = jax.devices()[0].device_kind
        # Longest name first: "TPU v5 lite" is not a "TPU v5".
        known = [name for name in sorted(PEAK_FLOPS, key=len, reverse=True) if device.startswith(name)]
        self.peak = PEAK_FLOPS[known[0]] * jax.device_count() if known and config.dtype != "float32" else None
        self.restart(0)

    def restart(self, step: int) -> None:
        """Starts a new interval: after anything that is not training, such as compiling or evaluating."""
        self.step, self.time = step, time.perf_counter()

    def read(self, step: int) -> dict:
        """perf/... of the steps since the last reading or restart; nothing when there were none."""
        if step == self.step:
            return {}
        rate = (step - self.step) * self.batch_size / (time.perf_counter() - self.time)
        self.restart(step)
        mfu = {} if self.peak is None else {"perf/mfu": rate * self.flops / self.peak}
        return {"perf/images_per_sec": rate} | mfu


class Writer:
    """metrics.jsonl (a record a line), TensorBoard events and sample grids of one run; silent but on process 0."""

    def __init__(self, workdir: Path, first_step: int, unfinished: bool = False):
        """A run that resumes after `first_step`; `unfinished`: that step's evaluation is still to come."""
        self.active = jax.process_index() == 0
        if not self.active:
            return
        path = workdir / "metrics.jsonl"
        _forget_after(path, first_step, unfinished)
        self.lines = path.open("a")
        # Written here and now: a thread, as of tensorboardX's SummaryWriter, ends when the disk is full, unnoticed.
        self.events = EventsWriter(str(workdir / "events"))
        self._tell_tensorboard(first_step + 1, session_log=SessionLog(status=SessionLog.START))  # hides an earlier end
        self.flush_at = 0.0
        self.samples = workdir / "samples"

    def write(self, step: int, values: dict) -> None:
        """Numbers of one step, on disk when this returns."""
        if not self.active:
            return
        values = {name: float(value) for name, value in values.items() if math.isfinite(value)}  # JSON has no NaN
        self.lines.write(json.dumps({"step": step} | values) + "\n")
        self.lines.flush()
        for name, value in values.items():
            self._tell_tensorboard(step, summary=scalar(name, value))
        if time.monotonic() > self.flush_at:
            self._flush()

    def write_samples(self, step: int, picture) -> None:
        """A grid, uint8 [H, W, 3], as samples/STEP.png and in TensorBoard."""
        if not self.active:
            return
        self.samples.mkdir(exist_ok=True)
        save_png(picture, self.samples / f"{step:07d}.png")
        self._tell_tensorboard(step, summary=image("samples", picture, dataformats="HWC"))
        self._flush()

    def close(self) -> None:
        if self.active:
            for file in (self.lines, self.events):
                with contextlib.suppress(OSError):  # of what could not be written before, and was told then
                    file.close()

    def _tell_tensorboard(self, step: int, **content) -> None:
        self.events.write_event(Event(step=step, wall_time=time.time(), **content))

    def _flush(self) -> None:
        self.events.flush()  # to the disk itself, which takes its time
        os.fsync(self.lines.fileno())  # a mounted bucket keeps what was synced or closed
        self.flush_at = time.monotonic() + FLUSH_SECONDS


def _forget_after(path: Path, step: int, unfinished: bool) -> None:
    """Drops what a killed run wrote and its successor will write again: records later than `step`, and perhaps its
    evaluation."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            record = json.loads(line)
            if record["step"] < step + 1 - (unfinished and "eval/loss" in record):
                kept.append(line + "\n")
        except (ValueError, KeyError):  # the line that was being written when the run was killed
            continue
    partial = path.with_suffix(".partial")
    partial.write_text("".join(kept))
    os.replace(partial, path)


def progress_bar(first_step: int, steps: int) -> tqdm:
    """Steps done and time left. Silent but on process 0."""
    return tqdm(total=steps, initial=first_step, unit="step", disable=jax.process_index() != 0, dynamic_ncols=True)
