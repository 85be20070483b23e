"""Pretrain an Image GPT, or fine-tune one to classify.

    python train.py --config=configs/digits.py --workdir=runs/digits
    python train.py --config=configs/finetune_digits.py --config.init_from=runs/digits --workdir=runs/digits-ft
    python train.py --config=configs/digits.py --workdir=runs/short --config.train.steps=50
    python train.py --config=configs/digits.py --workdir=runs/mine --config.data.source=npz:images.npz \\
        --config.data.image_size="(28,28)" --config.palette.colors=256

Run it again with the same --workdir and it goes on where it stopped. configs/base.py explains every field. At SIGTERM
it saves and ends with code 75. On several hosts the same command runs on each: docs/pods.md.
"""

import dataclasses
import time
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from igpt import config as configuration
from igpt import finetune, sample
from igpt.attention import check_dropout
from igpt.command import Parser
from igpt.data import batches as data
from igpt.data import sources
from igpt.data.examples import Source
from igpt.data.palette_fit import fit
from igpt.errors import NonFiniteError, UserError, reported
from igpt.files import check_workdir, told_of_storage
from igpt.interop import load as pretrained
from igpt.interop.hub import resolve
from igpt.loss import bits_per_dim, make_loss
from igpt.optim import make_optimizer
from igpt.palette import Palette
from igpt.plots import image_grid
from igpt.run import checkpoint
from igpt.run import cluster as launch
from igpt.run.flags import parse_with_config
from igpt.run.journal import Speed, Writer, progress_bar
from igpt.run.preemption import PreemptedError, StopSignal
from igpt.run.summary import describe, farewell
from igpt.sharding import check_batch_size, make_mesh, process_rows, to_devices
from igpt.state import abstract_state, create_state, make_eval_step, make_train_step

PROFILED = 3  # steps
MOST_SKIPPED = 20  # bad steps in a row: nothing good will come any more


def run(config: ConfigDict, workdir: str | Path, start_over: bool = False) -> dict:
    """Trains to config.train.steps and returns the last evaluation's metrics (none if it had already finished).

    Raises UserError for mistakes before anything is written, and for an unreadable image when it is met;
    NonFiniteError when training diverges, PreemptedError when it was told to stop and has saved, StorageError when it
    cannot save.
    """
    workdir = check_workdir(workdir)
    configuration.check(config)
    resuming = not start_over and bool(launch.agreed(np.array((workdir / "config.json").exists())))
    if resuming:
        launch.check_seen(workdir / "config.json")
        configuration.check_resumable(config, workdir)
    elif not start_over and checkpoint.agreed_steps(workdir):
        raise UserError(f"{workdir} has checkpoints but no config.json; --start_over sets them aside and begins anew")
    train = config.train

    # The mesh, and which rows of every batch are this process's to read.
    mesh = make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor, dcn_data=config.mesh.dcn_data)
    check_batch_size("train.batch_size", train.batch_size, train.accumulate, mesh)
    check_batch_size("train.eval_batch_size", train.eval_batch_size, 1, mesh)
    rows, eval_rows = process_rows(train.batch_size, mesh), process_rows(train.eval_batch_size, mesh)

    # Images become tokens.
    source = finetune.labelled(sources.open_source(config.data), config)
    palette = find_palette(config, workdir if resuming else None, source)
    if jax.process_count() > 1:  # k-means on another machine may differ in a last bit
        palette = Palette(launch.agreed(palette.centers))
    augmentation = data.Augmentation(
        config.data.pad, config.data.pad_mode, config.data.flip, config.data.augment_probability
    )
    drops = eval_drops = None
    if not config.model.causal:  # BERT
        drops = data.Drops(config.objective.drop_rate, 1, config.seed)
        eval_drops = dataclasses.replace(drops, masks=config.objective.eval_masks if config.model.num_classes else 1)
    batches = data.TrainBatches(source.train, palette, train.batch_size, config.seed, augmentation, rows, drops)

    # Everything about the state but its values: shapes, shardings, the compiled steps to be.
    model_config = configuration.model_config(config)
    check_dropout(model_config.attention, model_config.attention_dropout)
    optimizer, schedule = make_optimizer(config.optim, train.steps)
    graph, abstract = abstract_state(model_config, optimizer, mesh)
    loss = make_loss(graph, config.objective.generative, config.objective.classification)
    train_step = make_train_step(
        loss,
        optimizer,
        schedule,
        abstract,
        accumulate=train.accumulate,
        dropout_seed=config.seed if model_config.has_dropout else None,
    )
    eval_step = make_eval_step(loss)

    # Where the values come from: 1. this run's newest sound checkpoint; 2. config.init_from; 3. a fresh start.
    first_step = checkpoint.sound_step(workdir) if resuming else 0
    progress = checkpoint.Progress(evaluated_step=first_step)
    origin, starting_params = "fresh", None
    if first_step:
        state = checkpoint.restore(workdir, abstract, first_step)
        progress = checkpoint.progress_at(workdir, first_step) or progress
        origin = f"resumed after step {first_step}"
    elif config.init_from:
        pretrained.check_same_network(config.init_from, config)
        starting_params = pretrained.starting_params(config.init_from, mesh)
        origin = f"weights of {config.init_from}"
        if model_config.num_classes and "classifier" not in starting_params:
            origin += ", a new classifier"

    def due(step: int, every: int) -> bool:
        return step == train.steps or step % every == 0

    def ended_early() -> bool:
        return 0 < train.patience <= progress.evaluations_since

    unfinished = progress.evaluated_step < first_step and due(first_step, train.eval_every)
    stop = first_step if ended_early() else train.steps

    # From here on the run writes.
    launch.meet()  # nobody is still looking at what is there
    writes = jax.process_index() == 0
    with told_of_storage(workdir):
        if writes:
            if start_over:
                set_aside(workdir)
            workdir.mkdir(parents=True, exist_ok=True)
        launch.check_shared(workdir)
        if writes:
            configuration.save(config, workdir)
            palette.save(workdir / "palette.npy")
            if stop > first_step or unfinished:
                (workdir / "finetune.json").unlink(missing_ok=True)  # of an earlier end
        launch.meet()
        checkpoints = checkpoint.Checkpoints(workdir, train.max_to_keep, progress)
        writer = Writer(workdir, first_step, unfinished)
    if not first_step:
        state = create_state(model_config, optimizer, mesh, config.seed)
        if starting_params is not None:
            state = dataclasses.replace(state, params=finetune.merge_params(state.params, starting_params))
    if writes:
        describe(workdir, origin, config, model_config, state, mesh, source, palette)

    speed = Speed(model_config, train.batch_size)
    bar = progress_bar(first_step, train.steps)
    tell = bar.write if writes else lambda text: None
    started = time.perf_counter()
    evaluation, step = {}, first_step
    draws = train.num_samples and model_config.causal and config.objective.generative
    skipping = config.data.on_unreadable == "skip"
    skipped, skipped_in_a_row = int(state.opt_state.skipped), 0
    waiting = None  # (step, metrics) of the newest update: read only once the next one is under way

    def report(step: int, metrics: dict) -> None:
        nonlocal skipped, skipped_in_a_row
        metrics = {name: float(value) for name, value in jax.device_get(metrics).items()}
        bad = metrics["train/skipped"] > skipped
        skipped, skipped_in_a_row = int(metrics["train/skipped"]), skipped_in_a_row + 1 if bad else 0
        if bad:
            what = f"step {step}: loss {metrics['train/loss']}, gradient norm {metrics['train/grad_norm']}"
            if train.on_bad_step == "stop" or skipped_in_a_row == MOST_SKIPPED:
                raise NonFiniteError(bad_step(what, checkpoints.newest(), train.on_bad_step, skipped_in_a_row))
            tell(f"{what}: skipped, {skipped} so far")
        bar.update(step - bar.n)
        if step == first_step + 1:
            speed.restart(step)  # the first update waited for the compiler
            tell(f"step {step}: train/loss {metrics['train/loss']:.4f}")
        if bad or step % train.log_every == 0 or step in (first_step + 1, train.steps):
            metrics |= speed.read(step)
            if skipping:
                metrics["data/unreadable"] = len(source.unreadable)
            writer.write(step, metrics)
            rate = metrics.get("perf/images_per_sec")
            bar.set_postfix_str(f"loss {metrics['train/loss']:.4f}" + (f", {rate:.0f} images/s" if rate else ""))

    def look(step: int, signal: StopSignal) -> bool:
        """Evaluates and samples as is due; whether there is something new that has to be saved."""
        nonlocal evaluation
        improved = False
        if progress.evaluated_step < step and due(step, train.eval_every):
            held_out = data.eval_batches(source.validation, palette, train.eval_batch_size, eval_rows, eval_drops)
            found = evaluate(eval_step, state.params, held_out, train.eval_batch_size, mesh, signal)
            if found is None:  # told to stop: a resumed run begins with this evaluation
                return False
            evaluation, progress.evaluated_step = found, step
            if model_config.causal and config.objective.generative:
                nats = evaluation.get("eval/generative_loss", evaluation["eval/loss"])
                bits = bits_per_dim(nats, model_config.seq_len, *source.image_size, source.channels)
                evaluation["eval/bits_per_dim"] = bits
            writer.write(step, evaluation)
            if config.objective.classification:
                improved = progress.note(step, evaluation["eval/accuracy"])
            tell(f"step {step}: " + ", ".join(f"{name} {x:.4f}" for name, x in evaluation.items()))
            if ended_early():
                tell(f"step {step}: no better accuracy in {train.patience} evaluations, so training ends")
        if draws and due(step, train.sample_every) and not signal.requested():
            with_palette = pretrained.Pretrained(config, nnx.merge(graph, state.params), palette)
            images = sample.sample_images(with_palette, train.num_samples, config.seed)
            writer.write_samples(step, image_grid(images))
        return improved or ended_early()

    with jax.set_mesh(mesh), StopSignal() as signal, told_of_storage(workdir):
        profiling = False
        try:
            if unfinished:
                look(first_step, signal)
                if progress.evaluated_step == first_step:
                    checkpoints.save(state, first_step)  # again, with what the evaluation found
                if signal.requested() or ended_early():
                    stop = first_step
            for step, batch in enumerate(batches.iterate(first_step, stop, config.data.threads), first_step + 1):
                if step == train.profile_at:
                    jax.profiler.start_trace(workdir / "profile")
                    profiling = True
                state, metrics = train_step(state, to_devices(batch, train.batch_size, mesh))
                if profiling and step == min(train.profile_at + PROFILED - 1, stop):
                    jax.block_until_ready(state)
                    jax.profiler.stop_trace()
                    profiling = False
                if waiting is not None:
                    report(*waiting)
                waiting = step, metrics
                told = signal.requested()
                if not (told or any(due(step, train[f"{what}_every"]) for what in ("eval", "sample", "checkpoint"))):
                    continue
                report(*waiting)  # nothing is evaluated, shown or kept before it is known to be good
                waiting = None
                new = False if told else look(step, signal)
                told = signal.requested()
                if told or new or due(step, train.checkpoint_every):
                    checkpoints.save(state, step)
                if told:
                    break
                speed.restart(step)
                if ended_early():
                    break
            interrupted = signal.requested()
        finally:
            if profiling:
                jax.profiler.stop_trace()
            bar.close()
            writer.close()
            checkpoints.close()  # waits for the checkpoint that is being written
    if interrupted and not (step == train.steps == progress.evaluated_step or ended_early()):
        raise PreemptedError(
            f"SIGTERM came; the run is saved after step {step}, and the same command goes on from there"
        )

    if source.unreadable and writes:
        print(f"passed over {len(source.unreadable)} unreadable images, such as: {source.unreadable[0]}")
    unreported = step > first_step or unfinished or not launch.agreed(np.array((workdir / "finetune.json").exists()))
    if config.objective.classification and unreported and source.test.labels is not None:
        with told_of_storage(workdir):
            evaluation |= test_classifier(config, workdir, graph, abstract.params, source, palette, eval_drops, mesh)
    if writes:
        farewell(config, workdir, evaluation, time.perf_counter() - started, first_step, step)
    return evaluation


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


def find_palette(config: ConfigDict, resumed: Path | None, source: Source) -> Palette:
    """That of the run resumed, else of the model it starts from, else the file given, else the source's, else a fit.

    UserError where a model's palette is not that of the file or of the source's tokens.
    """
    if resumed and (resumed / "palette.npy").exists():
        origin, palette = resumed, pretrained.palette_of(resumed)
    elif config.init_from:
        origin, palette = config.init_from, pretrained.palette_of(resolve(config.init_from))
        named = Palette.load(config.palette.path) if config.palette.path else None
        pretrained.check_same_palette(palette, f"init_from={origin}", named, f"palette.path={config.palette.path}")
        pretrained.check_same_palette(palette, f"init_from={origin}", source.palette, f"data.source={source.name}")
    elif config.palette.path:
        origin, palette = config.palette.path, Palette.load(config.palette.path)
    elif source.palette is not None:
        origin, palette = source.name, source.palette
    else:
        return fit(source.train.images, config.palette.colors, config.seed, config.palette.max_pixels)
    pretrained.check_palette_size(palette, config, origin)
    return palette


def bad_step(what: str, newest: int | None, on_bad_step: str, in_a_row: int) -> str:
    """The message for a step that ends a run, with the ways to go on."""
    there = f"The newest checkpoint is that of step {newest}" if newest else "There is no checkpoint yet"
    if on_bad_step == "skip":
        return f"{what}. It was the last of {in_a_row} bad steps in a row, so that training ends. {there}."
    return (
        f"{what}. {there}. To resume past it, run the same command with --config.train.on_bad_step=skip. If it comes "
        "again, try a lower optim.learning_rate, a longer optim.warmup_steps or optim.clip_norm=1 in a new --workdir."
    )


def evaluate(eval_step, params, batches, batch_size: int, mesh, signal: StopSignal) -> dict | None:
    """eval/...: means over every held-out image; None when told to stop meanwhile."""
    sums = []
    for batch in batches:
        sums.append(eval_step(params, to_devices(batch, batch_size, mesh)))
        if len(sums) > 1:
            sums[-2] = jax.device_get(sums[-2])  # the device is one batch ahead, not an evaluation
        if signal.requested():
            return None
    sums[-1] = jax.device_get(sums[-1])
    count = sum(number for _, number in sums)
    return {f"eval/{name}": float(sum(values[name] for values, _ in sums) / count) for name in sums[0][0]}


def test_classifier(config, workdir, graph, abstract_params, source: Source, palette, drops, mesh) -> dict:
    """test/...: of a fine-tuned network's best checkpoint. Writes finetune.json and confusion.png."""
    params, step = checkpoint.restore_params(workdir, abstract_params)
    counts = finetune.confusion(graph, params, source, palette, drops, config.train.eval_batch_size, mesh)
    best = checkpoint.progress_at(workdir, checkpoint.finished_steps(workdir)[-1])
    images = {name: len(getattr(source, name)) for name in ("train", "validation", "test")}
    details = {"source": source.name, "images": images, "step": step, "validation_accuracy": best.best_accuracy}
    return {"test/accuracy": finetune.report(workdir, counts, details)["test_accuracy"]}


def parser() -> Parser:
    """The flags of this script; `parse_with_config` adds those of the config file."""
    flags = Parser("train.py", __doc__)
    flags.add_argument(
        "--workdir", required=True, help="where the run lives: config, palette, checkpoints, metrics, samples"
    )
    flags.add_argument(
        "--start_over", action="store_true", help="set an earlier run in --workdir aside (renamed) and begin anew"
    )
    launch.add_arguments(flags)
    return flags


def main(argv: list[str] | None = None) -> None:
    with reported():
        args = parse_with_config(parser(), argv)
        launch.join_from(args, saves_at_sigterm=True)
        configuration.check(args.config)
        if args.config.mesh.cpu_devices:
            jax.config.update("jax_num_cpu_devices", args.config.mesh.cpu_devices)
        run(args.config, args.workdir, args.start_over)


if __name__ == "__main__":
    main()
