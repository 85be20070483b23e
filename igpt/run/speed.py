"""How fast a run is, how long the rest of it takes, and what would be shorter."""

import dataclasses
import time

import jax

from igpt.config import TrainConfig
from igpt.flops import PEAK_FLOPS, train_flops_per_image
from igpt.model import ModelConfig
from igpt.vqvae import VQConfig

LONG = 3600.0  # seconds; a run that takes longer says so after its first steps
MEASURED_STEPS, MEASURED_SECONDS = 3, 5.0  # what the estimate needs at least
NEWEST = 0.02  # the share of the newest step in the mean, so that the estimate follows a machine that gets busier


class Speed:
    """Images per second, and the share of the devices' peak FLOP/s, since the last reading."""

    def __init__(self, config: ModelConfig | VQConfig, batch_size: int):
        counts = isinstance(config, ModelConfig)  # the FLOPs of a VQ-VAE are not counted
        has_mfu = counts and config.dtype != "float32"
        self.flops, self.batch_size = train_flops_per_image(config) if counts else 0.0, batch_size
        device = jax.devices()[0].device_kind
        # Longer names come first, because "TPU v5 lite" also begins with "TPU v5".
        known = [name for name in sorted(PEAK_FLOPS, key=len, reverse=True) if device.startswith(name)]
        self.peak = PEAK_FLOPS[known[0]] * jax.device_count() if known and has_mfu else None
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


class TimeLeft:
    """Estimates the rest of a run from its steps, from the second on, and from the pauses between them.

    A pause is the time in which a run evaluates, draws and saves. The first step is left out, because it may compile.
    """

    def __init__(self, train: TrainConfig, last_step: int):
        self.last_step = last_step
        self.pause_every = min(train.eval_every, train.sample_every, train.checkpoint_every)
        self.steps, self.step_seconds, self.pauses, self.pause_seconds, self.time = 0, 0.0, 0, 0.0, None

    def stepped(self) -> None:
        """A step has ended."""
        now = time.perf_counter()
        if self.time is not None:
            self.steps += 1
            self.step_seconds += (now - self.time - self.step_seconds) * max(1 / self.steps, NEWEST)
        self.time = now

    def paused(self) -> None:
        """A pause has ended, which began with the end of a step."""
        now = time.perf_counter()
        if self.time is not None:
            self.pauses += 1
            self.pause_seconds += (now - self.time - self.pause_seconds) / self.pauses
        self.time = now

    def after(self, step: int) -> float | None:
        """The seconds that are left after a step; None before the end of the second step."""
        if not self.steps:
            return None
        left = max(0, self.last_step - step)
        return left * self.step_seconds + left // self.pause_every * self.pause_seconds

    def is_measured(self) -> bool:
        """Whether enough steps were measured for advice."""
        return self.steps >= MEASURED_STEPS and self.steps * self.step_seconds >= MEASURED_SECONDS

    def advice(self, step: int, model: ModelConfig | VQConfig, image_size: tuple[int, int], is_fresh: bool) -> str:
        """If the rest takes over an hour: how long, and what would be shorter. Otherwise "".

        A fresh run may still choose smaller images or a smaller network; FLOPs say how much shorter these are.
        """
        seconds = self.after(step) or 0.0
        if seconds <= LONG:
            return ""
        left = self.last_step - step
        steps = step + max(1, int(LONG / seconds * left))
        text = f"time     about {duration(seconds)} more here: {left:,} steps of {self.step_seconds:.2g} s"
        if not is_fresh or not isinstance(model, ModelConfig):
            return text
        height, width = image_size
        half = height // 2 * (width // 2)
        smaller = {
            f"images of {height // 2} x {width // 2}": dict(seq_len=model.seq_len * half // (height * width)),
            "half the model.width": dict(width=model.width // 2, mlp_width=model.mlp_width // 2),
        }
        flops = train_flops_per_image(model)
        shorter = [f"--config.train.steps={steps} takes an hour"]
        for what, change in smaller.items():
            if min(change.values()) >= 16 and (model.width // 2) % model.num_heads == 0:
                part = train_flops_per_image(dataclasses.replace(model, **change)) / flops
                shorter.append(f"{what} about {duration(seconds * part)}")
        return f"{text}\nshorter  {', '.join(shorter)}"


def duration(seconds: float) -> str:
    """A time in two of its units: 0:07, 12:03, 3 h 20 min, 2 days 5 h."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes_of_hour = divmod(minutes, 60)
    days, hours_of_day = divmod(hours, 24)
    if days:
        return f"{days} day{'s' * (days > 1)} {hours_of_day} h"
    return f"{hours} h {minutes_of_hour} min" if hours else f"{minutes}:{rest:02d}"
