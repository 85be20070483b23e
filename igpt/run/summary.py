"""What train.py says on the terminal: before a run, what is about to happen; after it, what came of it."""

import json
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict

from igpt.data.examples import EncodedImages, Source
from igpt.loss import marginal_entropy
from igpt.model import ModelConfig
from igpt.palette import Palette


def describe(
    workdir, origin, config: ConfigDict, model: ModelConfig, state, mesh, source: Source, palette: Palette
) -> None:
    """Says what is about to run: nothing that was chosen automatically stays unsaid."""
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
        f"learns   {_learns(config.objective, model)}: {config.train.steps:,} steps of {config.train.batch_size} "
        "images\n"
        f"compute  {model.dtype}, attention {model.attention}, remat {model.remat}\n"
        f"devices  {jax.device_count()} {jax.devices()[0].device_kind}, {jax.process_count()} process(es), mesh {axes}",
        flush=True,
    )


def _learns(objective: ConfigDict, model: ModelConfig) -> str:
    """What the loss is made of."""
    pixels = "the next pixel" if model.causal else f"{objective.drop_rate:.0%} of the pixels, dropped (BERT)"
    parts = ((objective.generative, pixels), (objective.classification, f"{model.num_classes} classes"))
    return " + ".join(what if weight == 1 else f"{weight:g} x {what}" for weight, what in parts if weight)


def farewell(config: ConfigDict, workdir, evaluation: dict, seconds: float, first_step: int, step: int) -> None:
    """The result, and what one would want to run next."""
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
        print(f"  igpt export --model={workdir} --out=hf_classifier")
    elif model.causal:
        print(f"  igpt sample --model={workdir} --num=16 --out=samples.png")
        print(f"  igpt sample --model={workdir} --complete=test --num=7 --out=completions.png")
