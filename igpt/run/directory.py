"""A run's directory: whether the run is fresh or resumed, its progress, and the files that it writes.

    WORKDIR/config.json, palette.npy, checkpoints/STEP/, metrics.jsonl, events.*, samples/, finetune.json

Decisions that must be the same on all processes are made here. Only process 0 writes.
"""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from igpt.config import Config
from igpt.data.classes import save_names
from igpt.errors import UserError
from igpt.files import check_workdir, read_json, storage_errors, write_json
from igpt.palette import Palette
from igpt.run import checkpoint
from igpt.run.cluster import barrier, broadcast, check_seen, check_shared, exists, is_first_process
from igpt.state import TrainProgram, TrainState

# Fields that may change when a run is resumed: they affect how it is carried out, not what a training step computes.
FREE_ON_RESUME = (
    *("data.data_dir", "data.on_unreadable", "data.threads"),
    *("mesh.data", "mesh.fsdp", "mesh.tensor", "mesh.dcn_data", "mesh.cpu_devices"),
    *("model.attention", "model.remat", "model.scan_layers"),
    *("train.log_every", "train.eval_every", "train.eval_batch_size", "train.sample_every", "train.num_samples"),
    *("train.checkpoint_every", "train.max_to_keep", "train.patience", "train.on_bad_step", "train.profile_at"),
)


class RunDirectory:
    """The directory of one run, and the run's progress. The constructor writes no file.

    Raises UserError if the workdir cannot be written, holds a run with another configuration, or holds checkpoints
    without a config.json.
    """

    def __init__(self, workdir: str | Path, config: Config, start_over: bool = False):
        self.path, self.config, self.start_over = check_workdir(workdir), config, start_over
        self.is_resumed = not start_over and exists(self.path / "config.json")
        if self.is_resumed:
            check_seen(self.path / "config.json")
            check_resumable(config, self.path)
        elif not start_over and checkpoint.common_steps(self.path):
            raise UserError(
                f"{self.path} has checkpoints but no config.json; --start_over renames it and trains from step 0"
            )
        self.first_step, self.progress = 0, checkpoint.Progress()

    def palette(self) -> Palette | None:
        """The palette of the resumed run, or None for a fresh run."""
        path = self.path / "palette.npy"
        return Palette.load(path) if self.is_resumed and path.exists() else None

    def restore(self, program: TrainProgram) -> TrainState | None:
        """Restores the newest undamaged checkpoint; sets `first_step` and `progress`. Returns None if none exists.

        Renames damaged checkpoints. Raises UserError if all checkpoints are damaged, or if they do not fit the network.
        """
        self.first_step = checkpoint.newest_sound_step(self.path) if self.is_resumed else 0
        if not self.first_step:
            return None
        state = checkpoint.restore(self.path, program.abstract, self.first_step)
        known = checkpoint.progress_at(self.path, self.first_step)
        self.progress = known or checkpoint.Progress(evaluated_step=self.first_step)
        return state

    @property
    def evaluation_is_missing(self) -> bool:
        """Whether the run stopped after it saved a step, but before it finished the evaluation of that step."""
        train = self.config.train
        return self.progress.evaluated_step < self.first_step and train.is_due(self.first_step, train.eval_every)

    @property
    def has_ended_early(self) -> bool:
        """Whether the last `train.patience` evaluations brought no better accuracy."""
        return self.progress.is_over(self.config.train.patience)

    @property
    def last_step(self) -> int:
        """The step after which the run ends."""
        return self.first_step if self.has_ended_early else self.config.train.steps

    @contextlib.contextmanager
    def opened(self, palette: Palette, class_names: Sequence[str] | None = None) -> Iterator[checkpoint.Checkpoints]:
        """Writes configuration, palette and class names, and yields the run's Checkpoints. StorageError if that fails.

        class_names: those of the classifier's outputs. A directory with a config.json has them all.
        """
        barrier()  # process 0 renames an old run only after all processes have read it
        with storage_errors(self.path):
            if is_first_process():
                if self.start_over:
                    set_aside(self.path)
                self.path.mkdir(parents=True, exist_ok=True)
            check_shared(self.path)
            if is_first_process():
                if class_names:
                    save_names(class_names, self.path)
                save_config(self.config, self.path)
                palette.save(self.path / "palette.npy")
                if self.last_step > self.first_step or self.evaluation_is_missing:
                    (self.path / "finetune.json").unlink(missing_ok=True)  # the old result is out of date
            barrier()
            # At the end of the block, Checkpoints waits for the running save.
            with checkpoint.Checkpoints(self.path, self.config.train.max_to_keep, self.progress) as checkpoints:
                yield checkpoints

    def same_palette(self, palette: Palette) -> Palette:
        """Broadcasts process 0's palette, because k-means on another machine may differ in the last bit."""
        return Palette(broadcast(palette.centers))


def set_aside(workdir: Path) -> None:
    """Renames the directory of an earlier run to WORKDIR.old-N, so that --start_over deletes nothing."""
    if not (workdir.is_dir() and any(workdir.iterdir())):
        return
    workdir = workdir.absolute()  # the path "." has no name to extend
    number = 1
    while (aside := workdir.with_name(f"{workdir.name}.old-{number}")).exists():
        number += 1
    workdir.rename(aside)
    print(f"renamed the earlier run to {aside}")


def save_config(config: Config, workdir: Path) -> None:
    """Writes workdir/config.json completely or not at all."""
    write_json(workdir / "config.json", config.to_dict(), indent=2)


def load_config(workdir: Path) -> Config:
    """Reads workdir/config.json. Raises UserError if it is missing, damaged or no configuration of igpt."""
    path = workdir / "config.json"
    if not path.exists():
        raise UserError(f"{workdir} is not a run directory: it has no config.json")
    content = read_json(path)
    try:
        if isinstance(content.get("optim"), dict) and not content["optim"].get("spike_sigma"):
            content["optim"].pop("spike_sigma", None)  # earlier versions had this field; 0 turned it off
        return Config.of(content)
    except UserError as error:
        raise UserError(f"{path} is damaged, or was written by another version of igpt: {error}") from None


def check_resumable(config: Config, workdir: Path) -> None:
    """Raises UserError, which names every differing field, if `workdir` holds a run with another configuration."""
    there, here = load_config(workdir).flat(), config.flat()
    differing = [
        f"  {name}: {there.get(name, 'absent')!r} there, {here.get(name, 'absent')!r} here"
        for name in sorted(there.keys() | here.keys())
        if there.get(name) != here.get(name) and name not in FREE_ON_RESUME
    ]
    if differing:
        raise UserError(
            f"{workdir} holds a run with another configuration:\n" + "\n".join(differing) + "\n"
            "Give another --workdir, or --start_over to rename the old run and train from step 0, or "
            f"--config.init_from={workdir} with another --workdir to start from its weights."
        )
