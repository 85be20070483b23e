"""A run's directory: whether the run is fresh or resumed, its progress, and the files that it writes.

    WORKDIR/config.json, images.json, palette.npy, checkpoints/STEP/, metrics.jsonl, events.*, samples/, finetune.json

Decisions that must be the same on all processes are made here. Only process 0 writes.
"""

import contextlib
import json
from collections.abc import Collection, Iterator, Sequence

import jax
import numpy as np

from igpt.config import Config
from igpt.data.classes import listed, save_names
from igpt.data.examples import Source
from igpt.data.fingerprint import digest_of, fingerprint
from igpt.errors import UserError
from igpt.files import AnyPath, check_workdir, is_bucket, read_json, storage_errors, write_json
from igpt.lock import InUseError, Lock, lock_files
from igpt.palette import Palette
from igpt.run import changes, checkpoint, restore
from igpt.run.cluster import all_processes, barrier, broadcast, check_seen, check_shared, exists, is_first_process
from igpt.state import TrainProgram, TrainState
from igpt.tokenizer import FILES, Tokenizer, load_tokenizer


class RunDirectory:
    """The directory of one run, and the run's progress. The constructor writes no file.

    `allowed` are the changes that the user allows to a resumed run, as `changes.parse_changes` returns them. `lock` is
    this process's lock of the directory, if it has one. Raises UserError if the workdir cannot be written, holds a run
    with another configuration, or holds checkpoints without a config.json.
    """

    def __init__(
        self,
        workdir: str | AnyPath,
        config: Config,
        start_over: bool = False,
        allowed: Collection[str] = (),
        lock: Lock | None = None,
    ):
        self.path, self.config, self.start_over = check_workdir(workdir), config, start_over
        self.allowed, self.lock = allowed, lock
        self.before = config  # the configuration at the last start
        self.changed = []  # what differs from it, in words
        self.source, self.images, self.images_digest = None, None, ""  # set by `same_images`
        self.has_new_images = False
        if start_over:
            check_start_over(self.path)
        self.is_resumed = not start_over and exists(self.path / "config.json")
        if self.is_resumed:
            check_seen(self.path / "config.json")
            self.before = load_config(self.path)
            self.changed = changes.changed_fields(self.before, config, self.path, allowed)
        elif not start_over and checkpoint.common_steps(self.path):
            raise UserError(
                f"{self.path} has checkpoints but no config.json; --start_over renames it and trains from step 0"
            )
        self.first_step, self.progress = 0, checkpoint.Progress()

    def same_images(self, source: Source) -> Source:
        """Returns the source. Raises UserError if its images are not those of the resumed run, or differ on a process.

        The user may allow other images. Every process must call this method; process 0 compares.
        """
        self.source, self.images = source, fingerprint(source)
        self.images_digest = digest_of(self.images)
        digest = np.frombuffer(bytes.fromhex(self.images_digest), np.int32)
        if not all_processes(np.array_equal(broadcast(digest), digest)):
            raise UserError(
                f"{source.name} does not hold the same images on every host; make all hosts see the same files"
            )
        is_compared = self.is_resumed and is_first_process()
        changed = changes.changed_images(self.path, source, self.images) if is_compared else []
        self.has_new_images = not all_processes(not changed)
        if self.has_new_images and changes.DATA not in self.allowed:
            raise changes.images_error(self.path, changed)
        self.changed += changed
        return source

    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer of the resumed run, or None for a fresh run."""
        there = self.is_resumed and any((self.path / name).exists() for name in FILES)
        return load_tokenizer(self.path) if there else None

    def restore(self, program: TrainProgram) -> TrainState | None:
        """Restores the newest undamaged checkpoint; sets `first_step` and `progress`. Returns None if none exists.

        Renames damaged checkpoints. Raises UserError if all checkpoints are damaged, or if they do not fit the network.
        """
        self.first_step = restore.newest_sound_step(self.path) if self.is_resumed else 0
        if not self.first_step:
            return None
        if self.first_step > self.config.train.steps:
            raise UserError(
                f"train.steps is {self.config.train.steps}, but {self.path} has already learned {self.first_step} "
                f"steps; give at least that number"
            )
        state = restore.state(self.path, program.abstract, self.first_step)
        known = restore.progress_at(self.path, self.first_step)
        self.progress = known or checkpoint.Progress(evaluated_step=self.first_step)
        # Accuracies on other images do not count. An earlier start may have been killed after it recorded the new ones.
        if self.has_new_images or (self.progress.images and self.progress.images != self.images_digest):
            self.progress = checkpoint.Progress(tokenizer=self.progress.tokenizer)
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
    def opened(
        self, tokenizer: Tokenizer, class_names: Sequence[str] | None = None
    ) -> Iterator[checkpoint.Checkpoints]:
        """Writes configuration, tokenizer and class names, yields the run's Checkpoints. StorageError if that fails.

        Raises UserError before that if a resumed run has learnt tokens of another tokenizer.
        class_names: those of the classifier's outputs. A directory with a config.json has them all.
        """
        check_tokenizer(self.path, self.progress, tokenizer)
        self.progress.tokenizer, self.progress.images = tokenizer.digest, self.images_digest
        barrier()  # process 0 renames an old run only after all processes have read it
        with storage_errors(self.path):
            if is_first_process():
                if self.start_over:
                    self._set_aside()
                self.path.mkdir(parents=True, exist_ok=True)
            check_shared(self.path)
            if is_first_process():
                self._report_changes()
                if class_names:
                    save_names(class_names, self.path)
                save_config(self.config, self.path)
                if self.source is not None:
                    changes.record_images(self.path, self.source, self.images)
                tokenizer.save(self.path / tokenizer.file)
                if self.last_step > self.first_step or self.evaluation_is_missing:
                    (self.path / "finetune.json").unlink(missing_ok=True)  # the old result is out of date
            barrier()
            # At the end of the block, Checkpoints waits for the running save.
            with checkpoint.Checkpoints(self.path, self.config.train.max_to_keep, self.progress) as checkpoints:
                yield checkpoints

    def check_lock(self) -> None:
        """Raises StorageError if another program has taken this directory over: see `Lock.check`."""
        if self.lock is not None:
            self.lock.check()

    def _set_aside(self) -> None:
        aside = set_aside(self.path)
        if aside is not None and self.lock is not None and not is_bucket(self.path):
            self.lock.follow(aside)

    def _report_changes(self) -> None:
        """Prints what changed since the last start, and adds it to changes.jsonl."""
        if not self.changed:
            return
        text = changes.learning_rate_text(self.before, self.config, self.first_step)
        changed = [*self.changed, *([text] if text else [])]
        print("".join(f"changed  {line}\n" for line in changed), end="", flush=True)
        with (self.path / "changes.jsonl").open("a") as file:
            file.write(json.dumps({"after_step": self.first_step, "changed": changed}) + "\n")

    def same_palette(self, palette: Palette) -> Palette:
        """Broadcasts process 0's palette, because k-means on another machine may differ in the last bit."""
        return Palette(broadcast(palette.centers))


@contextlib.contextmanager
def locked(workdir: str | AnyPath) -> Iterator[Lock | None]:
    """Holds the lock of a directory for all processes. Yields it on process 0, and None on the others.

    Raises UserError if the directory cannot be written, and InUseError, on every process, if another program uses it.
    """
    workdir, problem = check_workdir(workdir), None
    with contextlib.ExitStack() as stack:
        lock = Lock(workdir, frees_at_sigterm=jax.process_count() == 1) if is_first_process() else None
        try:
            if lock is not None:
                stack.enter_context(lock)
        except UserError as error:
            problem = error
        if not all_processes(problem is None):
            raise problem or InUseError(f"{workdir} is in use or cannot be written; the message of process 0 says more")
        yield lock


def check_start_over(workdir: AnyPath) -> None:
    """Raises UserError if a directory has files, but no run: --start_over would rename somebody's other folder.

    A bucket as a whole is refused, too, because it cannot be renamed.
    """
    if is_bucket(workdir) and str(workdir.parent).endswith("//"):
        raise UserError(f"{workdir} is a whole bucket, which --start_over cannot rename; name a folder in it")
    names = sorted(path.name for path in workdir.iterdir()) if workdir.is_dir() else []
    others = [name for name in names if not name.startswith("running-")]
    if others and not any(name.startswith(("config.json", "checkpoints", "damaged-")) for name in names):
        raise UserError(f"{workdir} holds {listed(others)}, but no run to start over; name another directory")


def set_aside(workdir: AnyPath) -> AnyPath | None:
    """Renames the directory of an earlier run to WORKDIR.old-N, so that --start_over deletes nothing. Returns its name.

    Returns None if there is no earlier run.
    """
    earlier = sorted(set(workdir.iterdir()) - set(lock_files(workdir))) if workdir.is_dir() else []
    if not earlier:
        return None
    # The path "." has no name to extend. Of a link, the folder is renamed, so that the new run lies where it points.
    workdir = workdir.resolve() if not is_bucket(workdir) and workdir.is_symlink() else workdir.absolute()
    number = 1
    while (aside := workdir.with_name(f"{workdir.name}.old-{number}")).exists():
        number += 1
    if is_bucket(workdir):
        for path in earlier:  # one by one, so that the lock's file stays
            path.rename(aside / path.name)
    else:
        workdir.rename(aside)
        workdir.mkdir()  # for a link that would point nowhere
    print(f"renamed the earlier run to {aside}")
    return aside


def save_config(config: Config, workdir: AnyPath) -> None:
    """Writes workdir/config.json completely or not at all."""
    write_json(workdir / "config.json", config.to_dict(), indent=2)


def check_tokenizer(workdir: AnyPath, progress: checkpoint.Progress | None, tokenizer: Tokenizer) -> None:
    """Raises UserError if a checkpoint has learnt tokens of another tokenizer than the one in its run."""
    if progress and progress.tokenizer and progress.tokenizer != tokenizer.digest:
        problem = f"{workdir / tokenizer.file} is another file than the one whose tokens this run has learnt"
        raise UserError(f"{problem}; restore it from a copy")


def load_config(workdir: AnyPath) -> Config:
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
