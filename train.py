"""Pretrain an Image GPT, fine-tune one to classify, or train a VQ-VAE that makes its tokens.

    python train.py --config=configs/digits.py --workdir=runs/digits
    python train.py --config=configs/finetune_digits.py --config.init_from=runs/digits --workdir=runs/digits-ft
    python train.py --config=configs/digits.py --workdir=runs/short --config.train.steps=50
    python train.py --config=configs/digits.py --workdir=runs/mine --config.data.source=npz:images.npz \\
        --config.data.image_size="(28,28)" --config.palette.colors=256
    python train.py --workdir=runs/digits --config.train.steps=4000

The same command with the same --workdir resumes the run. So does --workdir alone: the other fields are those of the
run. configs/base.py explains every field. At SIGTERM the run saves a checkpoint and exits with code 75. To use several
hosts, start the same command on each of them (docs/pods.md).
"""

import signal

from igpt.errors import end_at_sigterm
from igpt.huge_pages import FLAG, ask_for_huge_pages

if __name__ == "__main__":
    ask_for_huge_pages()  # may start this program anew, and therefore comes before the slow imports
    signal.signal(signal.SIGTERM, end_at_sigterm)  # they come before anything that could be saved

import dataclasses
import time
from collections.abc import Collection
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from igpt import finetune
from igpt.codes import Codes
from igpt.command import Parser
from igpt.compiler import keep_programs
from igpt.config import Config
from igpt.data.batches import Augmentation, Drops, TrainBatches, eval_batches
from igpt.data.classes import load_names
from igpt.data.examples import SPLITS, Source
from igpt.data.palette_fit import fit
from igpt.data.sources import open_source
from igpt.errors import UserError, reported
from igpt.files import as_path, check_workdir, storage_errors
from igpt.interop import load
from igpt.interop.hub import resolve
from igpt.palette import Palette
from igpt.plots import check_drawing, palette_picture
from igpt.run import restore
from igpt.run.changes import parse_changes
from igpt.run.cluster import add_process_arguments, exists, is_first_process, join_from
from igpt.run.directory import RunDirectory, locked
from igpt.run.flags import parse_with_config
from igpt.run.journal import Journal
from igpt.run.preemption import PreemptedError, StopSignal
from igpt.run.profile import Profile
from igpt.run.summary import describe, farewell
from igpt.sharding import check_batch_size, process_rows, to_devices
from igpt.state import TrainProgram, TrainState, build_program, run_batches
from igpt.tasks import TASKS
from igpt.tokenizer import Bytes, Tokenizer, check_same, find_tokenizer
from igpt.track.trackers import Trackers
from igpt.trained import Run


def run(
    config: ConfigDict | Config, workdir: str | Path, start_over: bool = False, allowed: Collection[str] = ()
) -> Run | Codes:
    """Trains until step config.train.steps. Returns the trained model, after fine-tuning the best, or the VQ-VAE.

    `allowed` names what may differ from the run that is resumed: see the flag --change. Raises UserError for a mistake
    in the input, before it writes any file of the run, and for an unreadable image, when it reads the image. Raises
    InUseError if another program trains in `workdir`, NonFiniteError if training diverges, and StorageError if the run
    cannot be saved. After SIGTERM it saves the run and raises PreemptedError.
    """
    config = Config.of(config, trains=True)
    kind = "finetune" if config.objective.classification else "train"
    with locked(workdir) as lock, Trackers(check_workdir(workdir), config.track, kind, is_first_process()) as trackers:
        return train_in(RunDirectory(workdir, config, start_over, allowed, lock), config, trackers)


def train_in(run: RunDirectory, config: Config, trackers: Trackers) -> Run | Codes:
    """Trains in a fresh or a resumed run directory, which no other program uses. Returns and raises like `run`."""
    train, mesh = config.train, config.mesh.make()
    if config.objective.classification:
        check_drawing()  # the confusion matrix is drawn at the end

    # `program` holds shapes, shardings and the compiled step functions. `igpt plan` compiles the same functions.
    program = build_program(config, mesh)

    # The tokenizer turns the source's images into tokens. The seed and the step determine every batch.
    source = run.same_images(open_source(config.data))
    source = finetune.labelled(source, config, *known_classes(config, run))
    tokenizer = choose_tokenizer(config, run, source)
    batches = training_batches(config, source, tokenizer, mesh)

    # Initial values come from 1. this run's newest undamaged checkpoint; 2. config.init_from; 3. random initialisation.
    state, origin = starting_state(config, run, program)
    wait_for_compiler = compile_ahead(config, run, program, batches, source, tokenizer)

    # From here on the run writes files.
    opened = run.opened(tokenizer, finetune.output_names(source, config))
    with StopSignal() as signal, opened as checkpoints, storage_errors(run.path), jax.set_mesh(mesh):
        describe(run.path, origin, config, program.model, state, mesh, source, tokenizer)
        started = time.perf_counter()
        trackers.open(config.flat(), run.first_step, run.evaluation_is_missing)
        if trackers.others and tokenizer.file and not run.is_resumed:
            trackers.picture(0, tokenizer.kind, drawn_tokenizer(tokenizer, source))
        profile = Profile(run.path, train.profile_at, train.steps)
        skipped = int(state.opt_state.skipped)
        with Journal(run, checkpoints, trackers, program.model, source, skipped) as journal, profile:
            evaluator = Evaluator(config, run, program, source, tokenizer, journal, signal)
            step, last_step = run.first_step, run.last_step
            if run.evaluation_is_missing:  # an earlier start was stopped before or during the evaluation
                evaluator(state.params, step)
                if not run.evaluation_is_missing:
                    journal.save(state, step)  # saves the step again, now with the evaluation's result
                last_step = step if signal.requested() else run.last_step

            with journal.doing("compiling"):
                wait_for_compiler()
            steps = batches.iterate(run.first_step, last_step, config.data.threads)
            for step, batch in enumerate(steps, run.first_step + 1):
                profile.before(step)
                state, metrics = program.train_step(state, to_devices(batch, train.batch_size, mesh))
                profile.after(step, state)
                journal.add(step, metrics)  # reads the metrics of the previous step, so that the device never waits

                stopping = signal.requested()
                intervals = (train.eval_every, train.sample_every, train.checkpoint_every)
                if not (stopping or any(train.is_due(step, every) for every in intervals)):
                    continue
                journal.settle()  # raises if this step diverged, so that it is neither evaluated nor saved
                run.check_lock()

                must_save = not stopping and evaluator(state.params, step)
                stopping = signal.requested()
                if stopping or must_save or train.is_due(step, train.checkpoint_every):
                    journal.save(state, step)
                if stopping or run.has_ended_early:
                    break
                journal.restart_clock(step)
            stopping = signal.requested()

    is_complete = step == train.steps == run.progress.evaluated_step or run.has_ended_early
    if stopping and not is_complete:
        raise PreemptedError(
            f"SIGTERM came; the run is saved after step {step}. The same command resumes it from there"
        )
    evaluation = evaluator.latest
    is_tested = step == run.first_step and not evaluation and exists(run.path / "finetune.json")
    if config.objective.classification and source.test.labels is not None and not is_tested:
        evaluation |= test_classifier(config, run, program, source, tokenizer, trackers, step)
    seconds = time.perf_counter() - started
    params, best_step = state.params, step
    if config.objective.classification:  # the best checkpoint, which `igpt.load` would load
        with storage_errors(run.path):
            params, best_step = restore.params(run.path, program.abstract.params)
    names, model = finetune.output_names(source, config), nnx.merge(program.graph, params)
    trained = load.Pretrained(config, model, tokenizer, best_step, names)
    result = TASKS[config.program].result(run.path, trained, evaluation)
    farewell(run, step, evaluation, seconds, source)
    return result


def known_classes(config: Config, run: RunDirectory) -> tuple[tuple[str, ...] | None, str]:
    """The class names that the classifier already has, and whose they are: the resumed run's, or those of init_from."""
    if run.is_resumed:
        return load_names(run.path), str(run.path)
    return load.class_names_of(resolve(config.init_from)) if config.init_from else None, f"init_from={config.init_from}"


def choose_tokenizer(config: Config, run: RunDirectory, source: Source) -> Tokenizer:
    """The first tokenizer that exists: the resumed run's, init_from's, the named one, the tokens', a new palette.

    config.tokenizer names a VQ-VAE, palette.path a palette. Raises UserError if the tokenizer does not fit the model's
    vocabulary and length, or if the named one or the tokens' is another than that of the run or of init_from.
    """
    if config.program == "vqvae":
        return Bytes()
    resumed, init_from = run.tokenizer(), config.init_from
    by_colors = config.tokenizer == "palette"
    field, path = ("palette.path", config.palette.path) if by_colors else ("tokenizer", config.tokenizer)
    name = f"{field}={path}"
    # A resumed run has its own copy. A palette elsewhere, and a VQ-VAE that is still there, must be equal to it.
    has_moved = by_colors and resumed and path != run.before.palette.path
    is_read = path and (not resumed or has_moved or (not by_colors and exists(as_path(path))))
    named = find_tokenizer(path) if is_read else None
    if isinstance(named, Palette) and not by_colors:
        raise UserError(f"{name} is a palette; name it in palette.path, and leave tokenizer=palette")
    if resumed:
        origin, tokenizer = run.path, resumed
        check_same(tokenizer, origin, named, name)
        if not path:  # a named tokenizer also encodes the images of tokens
            check_same(tokenizer, origin, source.tokenizer, f"data.source={source.name}")
    elif init_from:
        origin, tokenizer = init_from, load.tokenizer_of(resolve(init_from))
        check_same(tokenizer, f"init_from={origin}", named, name)
        check_same(tokenizer, f"init_from={origin}", source.tokenizer, f"data.source={source.name}")
    elif named is not None:
        origin, tokenizer = path, named
    elif source.tokenizer is not None:
        origin, tokenizer = source.name, source.tokenizer
    else:
        palette = fit(source.train.images, config.palette.colors, config.seed, config.palette.max_pixels)
        return run.same_palette(palette)
    load.check_fits(tokenizer, config, origin)
    return tokenizer


def drawn_tokenizer(tokenizer: Tokenizer, source: Source, count: int = 8) -> np.ndarray:
    """Draws the colours of a palette, and images of the validation split before and after quantisation."""
    before = source.validation.images[:count]
    return palette_picture(tokenizer.colors, before, tokenizer.decode(tokenizer.encode(before)))


def training_batches(config: Config, source: Source, tokenizer: Tokenizer, mesh) -> TrainBatches:
    """This process's rows of every training batch."""
    batch_size = config.train.batch_size
    check_batch_size("train.eval_batch_size", config.train.eval_batch_size, 1, mesh)
    drops = None if config.model.causal else Drops(config.objective.drop_rate, 1, config.seed)
    rows = process_rows(batch_size, mesh)
    augmentation = Augmentation.of(config.data)
    return TrainBatches(source.train, tokenizer, batch_size, config.seed, augmentation, rows, drops)


def compile_ahead(config: Config, run: RunDirectory, program: TrainProgram, batches: TrainBatches, source, tokenizer):
    """Starts to compile the steps for the run's first batch, unless it is finished: see `TrainProgram.compile_ahead`.

    The returned function waits until they are ready.
    """
    if run.first_step == run.last_step:
        return lambda: None
    train, mesh = config.train, program.mesh
    rows = process_rows(train.eval_batch_size, mesh)
    held_out = next(eval_batches(source.validation, tokenizer, train.eval_batch_size, rows, evaluation_drops(config)))
    first = to_devices(batches[run.first_step], train.batch_size, mesh)
    return program.compile_ahead(first, to_devices(held_out, train.eval_batch_size, mesh))


def evaluation_drops(config: Config) -> Drops | None:
    """BERT's masks for evaluation: one, or several that vote if there are classes. None for a causal model."""
    if config.model.causal:
        return None
    masks = config.objective.eval_masks if config.model.num_classes else 1
    return Drops(config.objective.drop_rate, masks, config.seed)


def starting_state(config: Config, run: RunDirectory, program: TrainProgram) -> tuple[TrainState, str]:
    """Returns the state that training starts from, and a short text that names its origin."""
    if (state := run.restore(program)) is not None:
        return state, f"resumed after step {run.first_step}"
    if not config.init_from:
        return program.create_state(config.seed), "fresh"
    theirs = load.check_same_network(config.init_from, config)
    pretrained = load.starting_params(config.init_from, program.mesh)
    state = program.create_state(config.seed)
    state = dataclasses.replace(state, params=finetune.merge_params(state.params, pretrained))
    new = ", a new classifier" if program.model.num_classes and "classifier" not in pretrained else ""
    before = f", learnt with{'' if theirs.sos else 'out'} SOS" if theirs.sos != program.model.sos else ""
    return state, f"weights of {config.init_from}{before}{new}"


@dataclasses.dataclass
class Evaluator:
    """Evaluates and draws samples after the steps where they are due. `latest` has the last evaluation's metrics."""

    config: Config
    run: RunDirectory
    program: TrainProgram
    source: Source
    tokenizer: Tokenizer
    journal: Journal
    signal: StopSignal
    latest: dict = dataclasses.field(default_factory=dict)

    def __call__(self, params: dict, step: int) -> bool:
        """Returns whether this step must be saved, because it is the best one or because training ends early.

        SIGTERM interrupts the evaluation; the resumed run then repeats it.
        """
        train, progress, improved = self.config.train, self.run.progress, False
        if progress.evaluated_step < step and train.is_due(step, train.eval_every):
            with self.journal.doing("evaluating"):
                metrics = evaluate(self.config, self.program, params, self.source, self.tokenizer, self.signal)
            if metrics is None:
                return False
            self.latest, progress.evaluated_step = metrics, step
            self.journal.evaluated(step, metrics)
            if self.config.objective.classification:
                improved = progress.note(step, metrics["eval/accuracy"])
            if self.run.has_ended_early:
                self.journal.print(f"step {step}: no better accuracy in {train.patience} evaluations: training ends")
        if train.num_samples and train.is_due(step, train.sample_every) and not self.signal.requested():
            with self.journal.doing("drawing"):
                model = load.Pretrained(self.config, nnx.merge(self.program.graph, params), self.tokenizer)
                picture = TASKS[self.config.program].picture(model, self.source)
            if picture is not None:
                self.journal.sampled(step, picture)
        return improved or self.run.has_ended_early


def evaluate(config: Config, program: TrainProgram, params: dict, source: Source, tokenizer, signal) -> dict | None:
    """Returns the metrics eval/..., which are means over all validation images, or None if SIGTERM interrupts it."""
    batch_size, mesh, sums = config.train.eval_batch_size, program.mesh, []
    rows = process_rows(batch_size, mesh)
    batches = eval_batches(source.validation, tokenizer, batch_size, rows, evaluation_drops(config))
    for sums_of_batch in run_batches(program.eval_step, params, batches, batch_size, mesh):
        sums.append(sums_of_batch)
        if signal.requested():
            return None
    count = sum(number for _, number in sums)
    means = {name: sum(values[name] for values, _ in sums) / count for name in sums[0][0]}
    return {f"eval/{name}": value for name, value in program.eval_metrics(means, tokenizer.bits_name).items()}


def test_classifier(
    config: Config, run: RunDirectory, program: TrainProgram, source: Source, tokenizer, trackers: Trackers, step: int
) -> dict:
    """Returns the metric test/accuracy of the best checkpoint. Writes finetune.json and confusion.png.

    `step` is the run's last step, where the trackers record the result.
    """
    with storage_errors(run.path):
        params, best = restore.params(run.path, program.abstract.params)
        drops, batch_size = evaluation_drops(config), config.train.eval_batch_size
        counts = finetune.confusion(program.graph, params, source, tokenizer, drops, batch_size, program.mesh)
        images = {name: len(getattr(source, name)) for name in SPLITS}
        images["test"] = int(counts.sum())  # some may be unreadable
        accuracy = run.progress.best_accuracy
        details = {"source": source.name, "images": images, "step": best, "validation_accuracy": accuracy}
        results = finetune.report(run.path, counts, details, finetune.output_names(source, config))
        metrics = {"test/accuracy": results["test_accuracy"]}
        trackers.picture(step, "confusion", run.path / "confusion.png")
        trackers.summary(step, metrics | {"test/step": best})
        return metrics


def parser() -> Parser:
    """Returns the parser of all flags except --config."""
    parser = Parser("train.py", __doc__)
    parser.add_argument(
        "--workdir", required=True, help="where the run lives: config, tokenizer, checkpoints, metrics, samples"
    )
    parser.add_argument("--start_over", action="store_true", help="rename an earlier run and train from step 0")
    parser.add_argument(
        "--change",
        default="",
        help="what may differ from the run that is resumed: data, or fields such as "
        "optim.learning_rate, with commas between them",
    )
    pages = "whether to use memory pages of 2 MiB on Linux (default on)"
    parser.add_argument(FLAG, default="on", choices=("on", "off"), help=pages)
    add_process_arguments(parser)
    return parser


def main(argv: list[str] | None = None) -> None:
    with reported():
        args = parse_with_config(parser(), argv, resumes=True)
        config, allowed = Config.of(args.config, trains=True), parse_changes(args.change)
        keep_programs(args.compilation_cache)
        join_from(args, config.mesh.cpu_devices, saves_at_sigterm=True)
        run(config, args.workdir, args.start_over, allowed)


if __name__ == "__main__":
    main()
