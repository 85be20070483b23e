"""Pretrain an Image GPT, or fine-tune one to classify.

    python train.py --config=configs/digits.py --workdir=runs/digits
    python train.py --config=configs/finetune_digits.py --config.init_from=runs/digits --workdir=runs/digits-ft
    python train.py --config=configs/digits.py --workdir=runs/short --config.train.steps=50
    python train.py --config=configs/digits.py --workdir=runs/mine --config.data.source=npz:images.npz \\
        --config.data.image_size="(28,28)" --config.palette.colors=256

Run it again with the same --workdir and it goes on where it stopped. configs/base.py explains every field.
"""

import dataclasses
import json
import math
import os
import time
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from igpt import checkpoint, data, finetune, pretrained, sample, sources
from igpt import config as configuration
from igpt import palette as palettes
from igpt.attention import check_dropout
from igpt.errors import NonFiniteError, UserError
from igpt.examples import EncodedImages, Source
from igpt.loss import bits_per_dim, make_loss, marginal_entropy
from igpt.metrics import Speed, Writer, progress_bar
from igpt.model import ModelConfig
from igpt.optim import make_optimizer
from igpt.palette import Palette
from igpt.plots import image_grid
from igpt.sharding import check_batch_size, make_mesh, process_rows, to_devices
from igpt.state import abstract_state, create_state, make_eval_step, make_train_step


def run(config: ConfigDict, workdir: str | Path, start_over: bool = False) -> dict:
    """Trains to config.train.steps and returns the last evaluation's metrics (none if it had already finished).

    Raises UserError before anything is written, NonFiniteError when training diverges.
    """
    workdir = check_workdir(workdir)
    configuration.check(config)
    resuming = (workdir / "config.json").exists() and not start_over
    if resuming:
        configuration.check_resumable(config, workdir)
    elif not start_over and checkpoint.finished_steps(workdir):
        raise UserError(f"{workdir} has checkpoints but no config.json; --start_over sets them aside and begins anew")
    train = config.train

    # The mesh, and which rows of every batch are this process's to read.
    mesh = make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    check_batch_size("train.batch_size", train.batch_size, train.accumulate, mesh)
    check_batch_size("train.eval_batch_size", train.eval_batch_size, 1, mesh)
    rows, eval_rows = process_rows(train.batch_size, mesh), process_rows(train.eval_batch_size, mesh)

    # Images become tokens.
    source = finetune.labelled(sources.open_source(config.data), config)
    palette = find_palette(config, workdir if resuming else None, source)
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

    # Where the values come from: 1. this run's newest checkpoint; 2. config.init_from; 3. a fresh start.
    first_step = max(checkpoint.finished_steps(workdir), default=0) if resuming else 0
    origin = f"resumed after step {first_step}" if first_step else "fresh"
    starting_params = None
    if config.init_from and not first_step:
        pretrained.check_same_network(config.init_from, config)
        starting_params = pretrained.starting_params(config.init_from, mesh)
        origin = f"weights of {config.init_from}"
        if model_config.num_classes and "classifier" not in starting_params:
            origin += ", a new classifier"
    progress = None  # of fine-tuning: when it was best
    if config.objective.classification:
        progress = (checkpoint.progress_at(workdir, first_step) if first_step else None) or checkpoint.Progress()

    def ended_early() -> bool:
        return progress is not None and 0 < train.patience <= progress.evaluations_since

    stop = first_step if ended_early() else train.steps

    # From here on the run writes.
    if start_over:
        set_aside(workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    if jax.process_index() == 0:
        configuration.save(config, workdir)
        palette.save(workdir / "palette.npy")
        if stop > first_step:
            (workdir / "finetune.json").unlink(missing_ok=True)  # of an earlier end
    checkpoints = checkpoint.open_checkpoints(workdir, train.max_to_keep, progress)
    if first_step:
        state = checkpoint.restore(checkpoints, abstract, first_step)
    else:
        state = create_state(model_config, optimizer, mesh, config.seed)
        if starting_params is not None:
            state = dataclasses.replace(state, params=finetune.merge_params(state.params, starting_params))
    describe(workdir, origin, model_config, state, mesh, source, palette)

    writer = Writer(workdir, first_step)
    speed = Speed(model_config, train.batch_size)
    bar = progress_bar(first_step, train.steps)
    started = time.perf_counter()
    evaluation, step = {}, first_step
    draws = train.num_samples and model_config.causal and config.objective.generative
    skipping = config.data.on_unreadable == "skip"
    waiting = None  # (step, metrics) of the newest update: read only once the next one is under way

    def report(step: int, metrics: dict) -> None:
        metrics = {name: float(value) for name, value in jax.device_get(metrics).items()}
        if not all(map(math.isfinite, metrics.values())):
            raise NonFiniteError(
                f"step {step}: loss {metrics['train/loss']}, gradient norm {metrics['train/grad_norm']}. The last good "
                f"checkpoint is that of step {checkpoints.latest_step() or 'none'}. Try a lower "
                "optim.learning_rate, a longer optim.warmup_steps or optim.clip_norm=1 in a new --workdir."
            )
        bar.update(step - bar.n)
        if step == first_step + 1:
            speed.restart(step)  # the first update waited for the compiler
            bar.write(f"step {step}: train/loss {metrics['train/loss']:.4f}")
        if step % train.log_every == 0 or step in (first_step + 1, train.steps):
            metrics |= speed.read(step)
            if skipping:
                metrics["data/unreadable"] = len(source.unreadable)
            writer.write(step, metrics)
            rate = metrics.get("perf/images_per_sec")
            bar.set_postfix_str(f"loss {metrics['train/loss']:.4f}" + (f", {rate:.0f} images/s" if rate else ""))

    try:
        with jax.set_mesh(mesh):
            for step, batch in enumerate(batches.iterate(first_step, stop, config.data.threads), first_step + 1):
                state, metrics = train_step(state, to_devices(batch, train.batch_size, mesh))
                if waiting is not None:
                    report(*waiting)
                waiting = step, metrics

                last = step == train.steps
                evaluating = last or step % train.eval_every == 0
                sampling = draws and (last or step % train.sample_every == 0)
                saving = last or step % train.checkpoint_every == 0
                if not (evaluating or sampling or saving):
                    continue
                report(*waiting)  # nothing is evaluated, shown or kept before it is known to be finite
                waiting = None
                if evaluating:
                    batches_once = data.eval_batches(
                        source.validation, palette, train.eval_batch_size, eval_rows, eval_drops
                    )
                    evaluation = evaluate(eval_step, state.params, batches_once, train.eval_batch_size, mesh)
                    if model_config.causal and config.objective.generative:
                        nats = evaluation.get("eval/generative_loss", evaluation["eval/loss"])
                        bits = bits_per_dim(nats, model_config.seq_len, *source.image_size, source.channels)
                        evaluation["eval/bits_per_dim"] = bits
                    writer.write(step, evaluation)
                    if progress is not None:
                        saving = progress.note(step, evaluation["eval/accuracy"]) or ended_early() or saving
                    bar.write(f"step {step}: " + ", ".join(f"{name} {x:.4f}" for name, x in evaluation.items()))
                if sampling:
                    model = nnx.merge(graph, state.params)
                    with_palette = pretrained.Pretrained(config, model, palette)
                    images = sample.sample_images(with_palette, train.num_samples, config.seed)
                    writer.write_samples(step, image_grid(images))
                if saving:  # last: a run that resumes from here has nothing of this step left to do
                    checkpoint.save(checkpoints, state, step, progress)
                speed.restart(step)
                if ended_early():
                    bar.write(f"step {step}: no better accuracy in {train.patience} evaluations, so training ends")
                    break
    finally:
        bar.close()
        writer.close()
        checkpoints.close()  # waits for the checkpoint that is being written

    if source.unreadable:
        print(f"passed over {len(source.unreadable)} unreadable images, such as: {source.unreadable[0]}")
    unreported = step > first_step or not (workdir / "finetune.json").exists()
    if progress is not None and unreported and source.test.labels is not None:
        evaluation |= test_classifier(config, workdir, graph, abstract.params, source, palette, eval_drops, mesh)
    farewell(config, workdir, evaluation, time.perf_counter() - started, first_step, step)
    return evaluation


def check_workdir(workdir: str | Path) -> Path:
    """The workdir as a path that this run can write to, or UserError."""
    if "://" in str(workdir):
        raise UserError(f"--workdir={workdir} is a bucket; for now a run directory has to be a local or mounted path")
    workdir = Path(workdir)
    nearest = next(path for path in (workdir.absolute(), *workdir.absolute().parents) if path.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise UserError(f"--workdir={workdir} cannot be written: {nearest} is no writable folder; name another place")
    return workdir


def set_aside(workdir: Path) -> None:
    """Renames an earlier run to WORKDIR.old-N, so that starting over loses nothing."""
    if not (workdir.is_dir() and any(workdir.iterdir())):
        return
    workdir = workdir.absolute()  # "." has no name to extend
    number = 1
    while (aside := workdir.with_name(f"{workdir.name}.old-{number}")).exists():
        number += 1
    if jax.process_index() == 0:
        workdir.rename(aside)
        print(f"set the earlier run aside as {aside}")


def find_palette(config: ConfigDict, resumed: Path | None, source: Source) -> Palette:
    """That of the run resumed, else of the model it starts from, else the file given, else the source's, else a fit.

    UserError where a model's palette is not that of the file or of the source's tokens.
    """
    if resumed and (resumed / "palette.npy").exists():
        origin, palette = resumed, pretrained.palette_of(resumed)
    elif config.init_from:
        origin, palette = config.init_from, pretrained.palette_of(pretrained.resolve(config.init_from))
        named = Palette.load(config.palette.path) if config.palette.path else None
        pretrained.check_same_palette(palette, f"init_from={origin}", named, f"palette.path={config.palette.path}")
        pretrained.check_same_palette(palette, f"init_from={origin}", source.palette, f"data.source={source.name}")
    elif config.palette.path:
        origin, palette = config.palette.path, Palette.load(config.palette.path)
    elif source.palette is not None:
        origin, palette = source.name, source.palette
    else:
        return palettes.fit(source.train.images, config.palette.colors, config.seed, config.palette.max_pixels)
    pretrained.check_palette_size(palette, config, origin)
    return palette


def describe(workdir, origin, model: ModelConfig, state, mesh, source: Source, palette: Palette) -> None:
    """Says what is about to run: nothing that was chosen automatically stays unsaid."""
    if jax.process_index() != 0:
        return
    count = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    in_files = isinstance(source.train.images, EncodedImages)
    tokens = palette.encode(source.train.images[: 1000 if in_files else 10_000])  # for each pixel's histogram
    axes = " x ".join(f"{name} {size}" for name, size in mesh.shape.items())
    print(
        f"run      {workdir} ({origin})\n"
        f"data     {source.name}: {len(source.train)} images for training, {len(source.validation)} for validation, "
        f"{len(source.test)} for test\n"
        f"tokens   {model.seq_len} an image, {model.vocab_size} colours; "
        f"uniform: {np.log(model.vocab_size):.4f} nats a token, each pixel's marginal: "
        f"{marginal_entropy(tokens.reshape(len(tokens), -1), model.vocab_size):.4f}\n"
        f"model    width {model.width}, depth {model.depth}, {model.num_heads} heads of {model.head_size}: "
        f"{count:,} parameters\n"
        f"compute  {model.dtype}, attention {model.attention}, remat {model.remat}\n"
        f"devices  {jax.device_count()} {jax.devices()[0].device_kind}, {jax.process_count()} process(es), mesh {axes}",
        flush=True,
    )


def evaluate(eval_step, params, batches, batch_size: int, mesh) -> dict:
    """eval/...: means over every held-out image."""
    sums = jax.device_get([eval_step(params, to_devices(batch, batch_size, mesh)) for batch in batches])
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


def farewell(config: ConfigDict, workdir, evaluation: dict, seconds: float, first_step: int, step: int) -> None:
    """The result, and what one would want to run next."""
    if jax.process_index() != 0:
        return
    model = config.model
    if first_step == step:
        print(f"{workdir} had already finished its {step} steps.")
    else:
        minutes, seconds = divmod(round(seconds), 60)
        unit = "" if config.objective.classification else " nats a token"
        print(f"finished step {step} in {minutes}:{seconds:02d}; validation loss {evaluation['eval/loss']:.4f}{unit}")
        if (grid := Path(workdir) / "samples" / f"{step:07d}.png").exists():
            print(f"samples: {grid}")
    if (workdir / "finetune.json").exists():
        results = json.loads((workdir / "finetune.json").read_text())
        low, high = results["interval"]
        print(
            f"best on validation after step {results['step']}: test accuracy {100 * results['test_accuracy']:.1f} % "
            f"[{100 * low:.1f}, {100 * high:.1f}] of {results['images']['test']} images; {workdir}/confusion.png"
        )
    print("next:")
    print(f"  python eval_probe.py --config=configs/probe_digits.py --model={workdir} --workdir={workdir}/probe")
    if model.causal and config.objective.classification:
        print(f"  python -m igpt.huggingface export --model={workdir} --out=hf_classifier")
    elif model.causal:
        print(f"  python -m igpt.sample --model={workdir} --num=16 --out=samples.png")
        print(f"  python -m igpt.sample --model={workdir} --complete=test --num=7 --out=completions.png")


def main(config: ConfigDict, workdir: str, start_over: bool) -> None:
    configuration.check(config)
    if config.mesh.cpu_devices:
        jax.config.update("jax_num_cpu_devices", config.mesh.cpu_devices)
    run(config, workdir, start_over)


if __name__ == "__main__":
    configuration.run_app(
        main,
        required={"workdir": "Where the run lives: config, palette, checkpoints, metrics, samples."},
        switches={"start_over": "Set an earlier run in --workdir aside (renamed, not deleted) and begin anew."},
    )
