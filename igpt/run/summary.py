"""The texts that train.py prints: a description of the run before it, the result and the next commands after it."""

import shlex

import jax
import numpy as np

from igpt import huge_pages
from igpt.compiler import kept_programs
from igpt.config import Config, ObjectiveConfig
from igpt.data.classes import class_counts
from igpt.data.examples import EncodedImages, Source
from igpt.data.settings import DataConfig
from igpt.data.sources import FLAGS
from igpt.files import AnyPath, is_bucket, read_json
from igpt.loss import marginal_entropy
from igpt.model import ModelConfig
from igpt.run.cluster import is_first_process
from igpt.run.directory import RunDirectory
from igpt.tokenizer import Tokenizer
from igpt.vqvae import VQConfig


def describe(
    workdir,
    origin: str,
    config: Config,
    model: ModelConfig | VQConfig,
    state,
    mesh,
    source: Source,
    tokenizer: Tokenizer,
):
    """Prints a description of the run, with all values that were chosen automatically. Only process 0 prints."""
    if not is_first_process():
        return
    count = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    lines = {"igpt": _about_igpt, "vqvae": _about_vqvae}[config.program](config, model, count, source, tokenizer)
    classes, axes = class_counts(source), " x ".join(f"{name} {size}" for name, size in mesh.shape.items())
    print(
        f"run      {workdir} ({origin})\n"
        f"data     {source.name}: {len(source.train)} images for training, {len(source.validation)} for validation, "
        f"{len(source.test)} for test\n" + (f"classes  {classes}\n" if classes else "") + f"{lines}"
        f"{', huge pages' if huge_pages.in_use() else ''}; compiled programs: {kept_programs()}\n"
        f"devices  {jax.device_count()} {jax.devices()[0].device_kind}, {jax.process_count()} process(es), mesh {axes}",
        flush=True,
    )


def _about_igpt(config: Config, model: ModelConfig, count: int, source: Source, tokenizer: Tokenizer) -> str:
    # Fewer of files, which must be decoded. The first images may all be of one class.
    some = source.train.some_indices(1000 if isinstance(source.train.images, EncodedImages) else 10_000)
    tokens, _ = source.train.encode(tokenizer, some)
    predicted = tokens.reshape(len(tokens), -1)[:, model.first_predicted :]
    marginal = marginal_entropy(predicted, model.vocab_size)
    return (
        f"tokens   {model.seq_len} an image, {model.vocab_size} {tokenizer.noun}; "
        f"uniform: {np.log(model.vocab_size):.4f} nats a token, each {tokenizer.place}'s marginal: {marginal:.4f}\n"
        f"model    width {model.width}, depth {model.depth}, {model.num_heads} heads of {model.head_size}: "
        f"{count:,} parameters{', reads no SOS' if model.first_predicted else ''}\n"
        f"learns   {learning_goal(config.objective, model, tokenizer.place)}: {config.train.steps:,} steps of "
        f"{config.train.batch_size} images\n"
        f"compute  {model.dtype}, attention {model.attention}, remat {model.remat}"
    )


def _about_vqvae(config: Config, model: VQConfig, count: int, source: Source, tokenizer: Tokenizer) -> str:
    rows, columns = model.grid(*source.image_size)
    bits = rows * columns * np.log2(model.codes)
    return (
        f"codes    {rows} x {columns} an image, {model.codes} codes of width {model.code_width}: "
        f"{bits:.0f} bits an image\n"
        f"model    width {model.width}, {model.residual_blocks} residual blocks: {count:,} parameters\n"
        f"learns   to reconstruct images: {config.train.steps:,} steps of {config.train.batch_size} images\n"
        "compute  float32"
    )


def learning_goal(objective: ObjectiveConfig, model: ModelConfig, place: str) -> str:
    """Describes the parts of the loss and their weights in words. `place` is what a token stands for."""
    tokens = f"the next {place}" if model.causal else f"{objective.drop_rate:.0%} of the {place}s, dropped (BERT)"
    parts = ((objective.generative, tokens), (objective.classification, f"{model.num_classes} classes"))
    return " + ".join(what if weight == 1 else f"{weight:g} x {what}" for weight, what in parts if weight)


def _next_of_vqvae(config: Config, workdir: AnyPath) -> list[str]:
    """The commands that encode images with a VQ-VAE, and train a model on its codes."""
    path, data, model = shlex.quote(str(workdir)), config.data, config.vqvae
    height, width = data.image_size
    out = shlex.quote(f"{workdir.name if is_bucket(workdir) else workdir}-codes")  # codes are prepared on a disk
    flags = {
        "source": data.source,
        "size": f"{height}x{width}",
        "channels": data.channels,
        "preprocess": data.preprocess,
    }
    flags |= {name: value for name in FLAGS if (value := getattr(data, name)) != getattr(DataConfig, name)}
    given = " ".join(f"--{name}={shlex.quote(str(value))}" for name, value in flags.items())  # the same three splits
    fields = f"--config.vqvae.codes={model.codes} --config.vqvae.stride={model.stride}"
    if data.source.startswith("scattered:"):  # each step has other images, which no file holds
        return [f"python train.py --config=CONFIG --config.tokenizer={path} {fields} ..."]
    return [
        f"igpt prepare {given} --tokenizer={path} --out={out}",
        f"python train.py --config=CONFIG --config.data.source=tokens:{out} --config.tokenizer={path} {fields} ...",
    ]


def how_to_go_on(run: RunDirectory) -> str:
    """The command that continues a finished run, or the field that ends it early."""
    if run.has_ended_early:
        return " A larger train.patience, or 0, goes on."
    more = f"--config.train.steps={2 * run.config.train.steps}"
    return f" To go on: python train.py --workdir={shlex.quote(str(run.path))} {more}"


def farewell(run: RunDirectory, step: int, evaluation: dict, seconds: float, source: Source) -> None:
    """Prints the result and the commands that usually follow. Only process 0 prints. A probe needs labels."""
    if not is_first_process():
        return
    config, workdir = run.config, run.path
    if source.unreadable:
        print(f"passed over {len(source.unreadable)} unreadable images, such as: {source.unreadable[0]}")
    if run.first_step == step:
        print(f"{workdir} had already finished its {step} steps.{how_to_go_on(run)}")
    else:
        minutes, seconds = divmod(round(seconds), 60)
        unit = "" if config.objective.classification or config.program == "vqvae" else " nats a token"
        print(f"finished step {step} in {minutes}:{seconds:02d}; validation loss {evaluation['eval/loss']:.4f}{unit}")
        if (grid := workdir / "samples" / f"{step:07d}.png").exists():
            print(f"samples: {grid}")
    if (workdir / "finetune.json").exists():
        results = read_json(workdir / "finetune.json")
        low, high = results["interval"]
        print(
            f"best on validation after step {results['step']}: test accuracy {100 * results['test_accuracy']:.1f} % "
            f"[{100 * low:.1f}, {100 * high:.1f}] of {results['images']['test']} images; {workdir}/confusion.png"
        )
    vqvae = config.program == "vqvae"
    if commands := _next_of_vqvae(config, workdir) if vqvae else _next_of_igpt(config, workdir, source):
        print("next:")
        print("\n".join(f"  {command}" for command in commands))


def _next_of_igpt(config: Config, workdir: AnyPath, source: Source) -> list[str]:
    model, probe = shlex.quote(str(workdir)), shlex.quote(f"{workdir}/probe")
    commands = []
    if source.train.labels is not None:
        commands.append(f"python eval_probe.py --config=configs/probe.py --model={model} --workdir={probe}")
    if config.objective.classification:
        resized = " --preprocess=shrink" if config.data.preprocess == "none" else ""  # a photo has some other size
        commands.append(f"igpt predict --model={model}{resized} photo.png")
    if config.model.causal and config.objective.classification:
        commands.append(f"igpt export --model={model} --out=hf_classifier")
    elif config.model.causal:
        if config.model.sos:
            commands.append(f"igpt sample --model={model} --num=16 --out=samples.png")
        commands.append(f"igpt sample --model={model} --complete=test --num=7 --out=completions.png")
    return commands
