"""A run's directory: is the run fresh or resumed, where does it stand, and what does it write.

    WORKDIR/config.json, palette.npy, checkpoints/STEP/, metrics.jsonl, events.*, samples/, finetune.json

Whatever several processes must agree on is decided here; process 0 alone writes.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from igpt.config import Config
from igpt.errors import UserError
from igpt.files import check_workdir, read_json, storage_errors, write_json
from igpt.palette import Palette
from igpt.run import checkpoint
from igpt.run.cluster import barrier, broadcast, check_seen, check_shared, exists, is_first_process
from igpt.state import TrainProgram, TrainState

# Fields that change how a run is carried out, not what it computes: they may differ when it is resumed.
FREE_ON_RESUME = (
    *("data.data_dir", "data.on_unreadable", "data.threads"),
    *("mesh.data", "mesh.fsdp", "mesh.tensor", "mesh.dcn_data", "mesh.cpu_devices"),
    *("model.attention", "model.remat", "model.scan_layers"),
    *("train.log_every", "train.eval_every", "train.eval_batch_size", "train.sample_every", "train.num_samples"),
    *("train.checkpoint_every", "train.max_to_keep", "train.patience", "train.on_bad_step", "train.profile_at"),
)


class RunDirectory:
    """The directory of one run, and the run's progress. Creating the object writes nothing.

    Raises UserError for a workdir that cannot be written, that holds a run of another configuration, or checkpoints
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
                f"{self.path} has checkpoints but no config.json; --start_over sets them aside and begins anew"
            )
        self.first_step, self.progress = 0, checkpoint.Progress()

    def palette(self) -> Palette | None:
        """The palette of the run that is resumed; None for a fresh run."""
        path = self.path / "palette.npy"
        return Palette.load(path) if self.is_resumed and path.exists() else None

    def restore(self, program: TrainProgram) -> TrainState | None:
        """The state of the newest sound checkpoint, with `first_step` and `progress` set; None if there is none.

        Damaged checkpoints are moved away. Raises UserError if all are damaged, or of another network.
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
        """Whether the run stopped after a step was saved and before its evaluation was complete."""
        train = self.config.train
        return self.progress.evaluated_step < self.first_step and train.is_due(self.first_step, train.eval_every)

    @property
    def has_ended_early(self) -> bool:
        """Whether `train.patience` evaluations in a row brought no better accuracy."""
        return self.progress.is_over(self.config.train.patience)

    @property
    def last_step(self) -> int:
        """The step after which the run ends."""
        return self.first_step if self.has_ended_early else self.config.train.steps

    @contextlib.contextmanager
    def opened(self, palette: Palette) -> Iterator[checkpoint.Checkpoints]:
        """Writes configuration and palette, and gives the checkpoints to save to. Raises StorageError."""
        barrier()  # no process is still reading what will be set aside
        with storage_errors(self.path):
            if is_first_process():
                if self.start_over:
                    set_aside(self.path)
                self.path.mkdir(parents=True, exist_ok=True)
            check_shared(self.path)
            if is_first_process():
                save_config(self.config, self.path)
                palette.save(self.path / "palette.npy")
                if self.last_step > self.first_step or self.evaluation_is_missing:
                    (self.path / "finetune.json").unlink(missing_ok=True)  # the result of an earlier end
            barrier()
            # On exit it waits for the checkpoint that is being written.
            with checkpoint.Checkpoints(self.path, self.config.train.max_to_keep, self.progress) as checkpoints:
                yield checkpoints

    def same_palette(self, palette: Palette) -> Palette:
        """The palette of process 0, on every process: k-means on another machine may differ in a last bit."""
        return Palette(broadcast(palette.centers))


def set_aside(workdir: Path) -> None:
    """Renames an earlier run to WORKDIR.old-N, so that starting over loses nothing."""
    if not (workdir.is_dir() and any(workdir.iterdir())):
        return
    workdir = workdir.absolute()  # "." has no name to extend
    number = 1
    while (aside := workdir.with_name(f"{workdir.name}.old-{number}")).exists():
        number += 1
    workdir.rename(aside)
    print(f"set the earlier run aside as {aside}")


def save_config(config: Config, workdir: Path) -> None:
    """Writes workdir/config.json, complete or not at all."""
    write_json(workdir / "config.json", config.to_dict(), indent=2)


def load_config(workdir: Path) -> Config:
    """The configuration in workdir/config.json. Raises UserError if it is missing, damaged or not of igpt."""
    path = workdir / "config.json"
    if not path.exists():
        raise UserError(f"{workdir} is not a run directory: it has no config.json")
    content = read_json(path)
    try:
        if isinstance(content.get("optim"), dict) and not content["optim"].get("spike_sigma"):
            content["optim"].pop("spike_sigma", None)  # a field of earlier runs, unused where it was 0
        return Config.of(content)
    except UserError as error:
        raise UserError(f"{path} is damaged, or of another version of igpt: {error}") from None


def check_resumable(config: Config, workdir: Path) -> None:
    """Raises UserError if `workdir` holds a run of another configuration, and names every field that differs."""
    there, here = load_config(workdir).flat(), config.flat()
    differing = [
        f"  {name}: {there.get(name, 'absent')!r} there, {here.get(name, 'absent')!r} here"
        for name in sorted(there.keys() | here.keys())
        if there.get(name) != here.get(name) and name not in FREE_ON_RESUME
    ]
    if differing:
        raise UserError(
            f"{workdir} holds a run with another configuration:\n" + "\n".join(differing) + "\n"
            "Give another --workdir, or --start_over to set the old run aside and begin anew, or "
            f"--config.init_from={workdir} with another --workdir to start from its weights."
        )
