"""A run's journal. It hands metrics and pictures to the trackers, shows progress and speed, and detects bad steps.

Metrics are named `split/name`. If there are several processes, only process 0 writes.
"""

import contextlib

import jax

from igpt.data.examples import Source
from igpt.errors import NonFiniteError
from igpt.model import ModelConfig
from igpt.plots import save_png
from igpt.progress import doing, progress_bar
from igpt.run.checkpoint import Checkpoints
from igpt.run.cluster import is_first_process
from igpt.run.directory import RunDirectory
from igpt.run.speed import Speed, TimeLeft, duration
from igpt.state import TrainState
from igpt.track.trackers import Trackers
from igpt.vqvae import VQConfig

# The time left is an entry of the postfix: tqdm's own estimate would include the compilation.
BAR = "{desc}{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]"
MAX_SKIPPED = 20  # training ends after so many bad steps in a row


class Journal:
    """Records every step of a run. It reads a step's metrics while the next step runs, so that the device never waits.

    `skipped` is the number of bad steps that the starting state has already counted. The trackers are open.
    """

    def __init__(
        self,
        run: RunDirectory,
        checkpoints: Checkpoints,
        trackers: Trackers,
        model: ModelConfig | VQConfig,
        source: Source,
        skipped: int,
    ):
        config, self.checkpoints, self.trackers, self.first_step = run.config, checkpoints, trackers, run.first_step
        self.train, self.samples, self.model = config.train, run.path / "samples", model
        self.image_size, self.is_fresh = config.data.image_size, not run.is_resumed
        self.unreadable = source if config.data.on_unreadable == "skip" else None
        self.skipped, self.skipped_in_a_row = skipped, 0
        self.speed = Speed(model, config.train.batch_size)
        self.time_left, self.advises = TimeLeft(config.train, run.last_step), True
        self.shown = {}  # what stands behind the bar
        options = dict(unit="step", disable=not is_first_process(), bar_format=BAR)
        self.bar = progress_bar(total=config.train.steps, initial=run.first_step, **options)
        self._unread = None  # (step, metrics) of the newest step, whose metrics are not read yet

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.bar.close()

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
        self.time_left.stepped()
        if step == self.first_step + 1:
            self.speed.restart(step)  # the first step includes the time of compilation
            self.print(f"step {step}: train/loss {metrics['train/loss']:.4f}")
        if is_bad or step % self.train.log_every == 0 or step in (self.first_step + 1, self.train.steps):
            metrics |= self.speed.read(step)
            if self.unreadable:
                metrics["data/unreadable"] = len(self.unreadable.unreadable)
            self.trackers.scalars(step, metrics)
            self.shown["loss"] = f"loss {metrics['train/loss']:.4f}"
            if rate := metrics.get("perf/images_per_sec"):
                self.shown["speed"] = f"{rate:.0f} images/s"
        self._show(step)

    def _show(self, step: int) -> None:
        """Moves the bar to a step: the time left, losses and speed. A run that will take long says so once."""
        if (seconds := self.time_left.after(step)) is not None:
            self.shown["left"] = f"{duration(seconds)} left"
        texts = [self.shown[name] for name in ("left", "loss", "eval", "speed") if name in self.shown]
        self.bar.set_postfix_str(", ".join(texts), refresh=False)
        self.bar.update(step - self.bar.n)
        if self.advises and self.time_left.is_measured():
            self.advises = False
            if advice := self.time_left.advice(step, self.model, self.image_size, self.is_fresh):
                self.print(advice)

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
        """Records and prints the metrics of an evaluation."""
        self.trackers.scalars(step, metrics)
        self.shown["eval"] = f"eval {metrics['eval/loss']:.4f}"
        self.print(f"step {step}: " + ", ".join(f"{name} {x:.4f}" for name, x in metrics.items()))

    def sampled(self, step: int, picture) -> None:
        """Writes a grid of samples, uint8 [H, W, 3], as samples/STEP.png, and records it."""
        if is_first_process():
            self.samples.mkdir(exist_ok=True)
            save_png(picture, self.samples / f"{step:07d}.png")
        self.trackers.picture(step, "samples", picture)

    def save(self, state: TrainState, step: int) -> None:
        """Saves a checkpoint, after all records up to it are stored: a resumed run does not write them again."""
        with self.doing("saving"):
            self.trackers.flush()
            self.checkpoints.save(state, step)

    def doing(self, what: str) -> contextlib.AbstractContextManager:
        """Shows before the bar what the block does: compiling, evaluating, drawing or saving."""
        return doing(self.bar, what)

    def restart_clock(self, step: int) -> None:
        """Restarts the clock, so that the speed does not include the time of evaluating, sampling and saving."""
        self.speed.restart(step)
        self.time_left.paused()

    def print(self, text: str) -> None:
        """Prints a line above the progress bar."""
        if is_first_process():
            self.bar.write(text)
