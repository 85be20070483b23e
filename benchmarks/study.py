"""Repeats the findings of Chen et al. 2020 on real images, at a size that a laptop can train.

python benchmarks/study.py --workdir=runs/study --out=docs/results
python benchmarks/study.py --workdir=runs/study --out=docs/results --data=scattered_fashion --idx=FOLDER
python benchmarks/study.py --workdir=runs/study --out=docs/results --data=fashion_mnist --idx=FOLDER
python benchmarks/study.py --workdir=runs/study --out=docs/results --data=fashion_codes --idx=FOLDER

1. accuracy by layer, compared with raw pixels and random initialisation; pooling by attention;
2. probe accuracy against validation loss, over the checkpoints of a run;
3. next pixels compared with BERT at equal compute, and at equally many predicted positions;
4. fine-tuning: joint, classes only, from scratch;
5. few labels: a probe on features, a probe on pixels, and training from scratch;
6. codes of a VQ-VAE (28 x 28 pixels as 7 x 7 codes) compared with pixels (14 x 14) at equal compute, with
   --data=fashion_codes. The VQ-VAE, which all seeds share, does not count;
7. accuracy by layer in colour: on black, on parts of two photographs, and on the tiles of WORKDIR/tiles, if
   benchmarks/tiles.py has put photographs there.

Every part is a seeded run of train.py or eval_probe.py in a new process, stored under --workdir. A part that has
finished is not run again, so the study can be stopped and continued; with other settings it is refused. --summarize
runs nothing and reads what exists. FOLDER holds the four IDX files of Fashion-MNIST's release; its images are scaled
down to 14 x 14.
"""

import argparse
import gzip
import itertools
import os
import shutil
from pathlib import Path

import numpy as np
from PIL import Image
from report import write
from runs import Runs
from sklearn.datasets import load_sample_images
from study_findings import findings
from study_picture import draw
from tiles import cut

from igpt.errors import UserError, reported
from igpt.flops import train_flops_per_image
from igpt.model import ModelConfig

# A classifier of ten classes, at a constant learning rate.
CLASSIFIER = {"model.num_classes": 10, "objective.classification": 1.0, "optim.schedule": "constant"}


def fine_tune(study: Runs, config: str, seed: int, fields: dict, gently: dict | None = None) -> None:
    """Fine-tunes the network of a seed with the joint loss and for classes only, and trains another from scratch.

    `gently` has more fields for the two that are fine-tuned, such as a lower learning rate.
    """
    start = {"seed": seed, "init_from": study.path(f"autoregressive_{seed}"), **fields, **(gently or {})}
    study.train(f"joint_{seed}", config, **start)
    study.train(f"classes_{seed}", config, **start, **{"objective.generative": 0.0})
    study.train(f"scratch_{seed}", config, seed=seed, **fields)


def run_digits(study: Runs) -> None:
    config, finetune = "configs/digits.py", "configs/finetune_digits.py"
    adam = {"optim.name": "adam", "optim.learning_rate": 3e-3, "optim.warmup_steps": 150}  # as in the paper
    adam |= {"data.augment_probability": 0.8, "train.steps": 2600}
    often = adam | {"train.eval_every": 260, "train.checkpoint_every": 260, "train.max_to_keep": 10}
    often |= {"train.sample_every": 650}
    few = {"train.steps": 500, "train.batch_size": 20, "optim.learning_rate": 1e-3}
    for seed in study.seeds:
        study.train(f"autoregressive_{seed}", config, seed=seed, **often)
        study.probe(f"autoregressive_{seed}", seed=seed + 100, labels_per_class=(4, 25, 100), concatenate=3)
        pretrained = {"seed": seed, "init_from": study.path(f"autoregressive_{seed}")}
        study.train(f"joint_{seed}", finetune, **pretrained)
        if seed >= 3:  # more seeds serve one question only: does fine-tuning beat the probe?
            continue
        upper = {"layers": (2, 3, 4), "baselines": False}
        study.probe(f"autoregressive_{seed}", "probes", seed=seed + 100, steps="all", **upper)
        study.train(f"bert_{seed}", config, seed=seed, **often, **{"model.causal": False})
        study.probe(f"bert_{seed}", seed=seed + 100, baselines=False)
        study.train(f"classes_{seed}", finetune, **pretrained, **{"objective.generative": 0.0})
        study.train(f"scratch_{seed}", finetune, seed=seed)
        bert = {"seed": seed, "init_from": study.path(f"bert_{seed}"), "model.causal": False}
        study.train(f"bert_joint_{seed}", finetune, **bert)
        for k in (4, 25, 100):
            subset = {"data.labels_per_class": k, "data.subset_seed": seed}
            study.train(f"scratch_{k}_labels_{seed}", finetune, seed=seed, **few, **subset)


def run_scattered_digits(study: Runs) -> None:
    run_scattered(study, "configs/scattered_digits.py", {})


def run_scattered_fashion(study: Runs) -> None:
    source = {"data.source": f"scattered:npz:{study.workdir}/fashion_mnist.npz", "train.eval_batch_size": 100}
    held_out = {"data.validation_fraction": 1 / 70, "data.test_fraction": 2 / 70}  # 1,000 and 2,000 images
    run_scattered(study, "configs/scattered_fashion.py", source | held_out)


def run_scattered(study: Runs, config: str, fields: dict) -> None:
    """All findings on images at random places. Whoever wants a part of them gives --only."""
    few, many = study.workdir / "photographs", study.workdir / "tiles"
    cut_photographs(few)
    often = fields | {"train.eval_every": 100, "train.checkpoint_every": 100, "train.max_to_keep": 5}
    classifier = fields | {"model.num_classes": 10, "objective.classification": 1.0}
    short = classifier | {"train.steps": 250, "train.eval_every": 50, "train.checkpoint_every": 50}
    # All the steps that pretraining and fine-tuning take together.
    long = classifier | {"train.steps": 750, "train.eval_every": 50, "train.checkpoint_every": 50}
    probe, steps_of_bert = {"train_images": 4000}, round(500 / 0.15)  # BERT predicts 15 % of the positions
    longer = fields | {"train.steps": steps_of_bert, "train.eval_every": 500, "train.checkpoint_every": 1000}
    bert, alone = {"model.causal": False}, {"baselines": False, **probe}
    pooled = {"pool": "attention", "layers": (4, 6, 8), "neighbours": 0}
    for seed in study.seeds:
        study.train(f"autoregressive_{seed}", config, seed=seed, **often)
        study.probe(f"autoregressive_{seed}", seed=seed + 100, labels_per_class=(4, 25, 100), subsets=3, **probe)
    for seed in study.seeds:
        fine_tune(study, config, seed, short, {"optim.learning_rate": 2e-3})
    colors = {"color": few} | ({"color_on_many": many} if many.exists() else {})
    for name, seed in itertools.product(colors, study.seeds):
        study.train(f"{name}_{seed}", f"{config}:folder:{colors[name]}", seed=seed, **often)
        study.probe(f"{name}_{seed}", seed=seed + 100, **probe)
    in_color = {"data.scatter_color": True, "data.channels": 3, "palette.colors": 64}
    for seed in study.seeds:
        study.train(f"color_on_black_{seed}", config, seed=seed, **often, **in_color)
        study.probe(f"color_on_black_{seed}", seed=seed + 100, **probe)
    longest = fields | {"train.steps": 2000, "train.eval_every": 500, "train.checkpoint_every": 500}
    study.train("color_longer_0", f"{config}:folder:{few}", **longest)  # does more training help?
    study.probe("color_longer_0", seed=100, **alone)
    for seed in study.seeds:
        study.train(f"bert_{seed}", config, seed=seed, **often, **bert)
        study.probe(f"bert_{seed}", seed=seed + 100, **alone)
    for seed in study.seeds:  # each checkpoint costs a pass over the images
        study.probe(f"autoregressive_{seed}", "probes", seed=seed + 100, steps="all", **alone)
        study.probe(f"autoregressive_{seed}", "attention", seed=seed + 100, **pooled, **alone)
    for seed in study.seeds:
        study.train(f"long_scratch_{seed}", config, seed=seed, **long)
    for seed in study.seeds:
        study.train(f"bert_longer_{seed}", config, seed=seed, **longer, **bert)
        study.probe(f"bert_longer_{seed}", seed=seed + 100, **alone)


def run_fashion_mnist(study: Runs) -> None:
    config = "configs/fashion_mnist.py"
    small = {
        "data.source": f"npz:{study.workdir}/fashion_mnist_14.npz",
        "data.image_size": "(14,14)",
        "data.flip": False,
        "data.validation_fraction": 2 / 70,
        "palette.colors": 16,
        "model.depth": 6,
        "train.eval_batch_size": 100,
    }
    often = {"train.eval_every": 500, "train.checkpoint_every": 500, "train.max_to_keep": 8}
    long = small | often | {"train.steps": 4000, "train.sample_every": 4000}
    tuned = CLASSIFIER | {
        "optim.learning_rate": 5e-4,
        "train.steps": 3000,
        "train.eval_every": 250,
        "train.checkpoint_every": 250,
    }
    few = tuned | {"train.steps": 300, "train.eval_every": 100, "optim.learning_rate": 1e-3}
    probe = {"train_images": 10_000, "batch_size": 100}
    for seed in study.seeds:
        study.train(f"autoregressive_{seed}", config, seed=seed, **long)
        study.probe(f"autoregressive_{seed}", seed=seed + 100, labels_per_class=(4, 25, 400), concatenate=3, **probe)
        fine_tune(study, config, seed, small | tuned)
        for k in (4, 25, 400):
            subset = {"data.labels_per_class": k, "data.subset_seed": seed}
            study.train(f"scratch_{k}_labels_{seed}", config, seed=seed, **small, **few, **subset)
        study.train(f"bert_{seed}", config, seed=seed, **long, **{"model.causal": False})
        study.probe(f"bert_{seed}", seed=seed + 100, baselines=False, eval_masks=5, **probe)
        # Five masks make each evaluation five times as long, so there are fewer.
        bert = {"init_from": study.path(f"bert_{seed}"), "model.causal": False, "train.eval_every": 500}
        study.train(f"bert_joint_{seed}", config, **small, **tuned | {"seed": seed} | bert)


def run_fashion_codes(study: Runs) -> None:
    vqvae, tokens = study.path("vqvae"), study.path("tokens")
    study.train("vqvae", "configs/vqvae_fashion_mnist.py", **{"data.source": f"npz:{study.workdir}/fashion_mnist.npz"})
    fractions = ["--validation_fraction=0.07142857142857142", "--test_fraction=0.14285714285714285"]
    source = [f"--source=npz:{study.workdir}/fashion_mnist.npz", "--size=28", "--channels=1", "--preprocess=none"]
    prepare = ["-m", "igpt", "prepare", *source, *fractions, f"--tokenizer={vqvae}", f"--out={tokens}"]
    study.once("tokens", prepare, {}, study.path("tokens.finished"))

    codes = {"data.source": f"tokens:{tokens}", "tokenizer": vqvae}
    pixels = {"data.source": f"npz:{study.workdir}/fashion_mnist_14.npz", "data.image_size": "(14,14)"}
    pixels |= {"data.flip": False, "palette.colors": 16, "train.batch_size": 16, "train.eval_batch_size": 200}
    network = dict(width=128, depth=4, num_heads=4)
    images = train_flops_per_image(ModelConfig(**network, vocab_size=512, seq_len=49))  # FLOPs of an image of codes
    images /= train_flops_per_image(ModelConfig(**network, vocab_size=16, seq_len=196))  # in images of pixels
    tuned = CLASSIFIER | {"optim.learning_rate": 1e-3, "optim.warmup_steps": 0}

    def length(steps, evaluations):
        every = -(-steps // evaluations)
        return {"train.steps": steps, "train.eval_every": every, "train.checkpoint_every": every}

    ways = {  # configuration, its fields, steps of pretraining: 51,200 images of codes, or pixels for the same FLOPs
        "codes": ("configs/fashion_mnist_codes.py", codes, 51_200 / 64),
        "pixels": ("configs/fashion_mnist.py", pixels, 51_200 * images / 16),
    }
    for seed in study.seeds:
        for name, (config, fields, steps) in ways.items():
            pretraining = length(round(steps), 2) | {"train.sample_every": 10_000}
            study.train(f"{name}_{seed}", config, seed=seed, **fields, **pretraining)
            study.probe(f"{name}_{seed}", seed=seed + 100, train_images=4000, batch_size=100)
            start = {"seed": seed, "init_from": study.path(f"{name}_{seed}")}
            study.train(f"{name}_joint_{seed}", config, **start, **fields, **tuned, **length(round(steps / 2), 4))


RECIPES = {  # data set: its runs, the number of seeds
    "scattered_digits": (run_scattered_digits, 3),
    "scattered_fashion": (run_scattered_fashion, 3),
    "digits": (run_digits, 5),
    "fashion_mnist": (run_fashion_mnist, 1),
    "fashion_codes": (run_fashion_codes, 3),
}


def cut_photographs(folder: Path) -> None:
    """Writes 48 parts of the two photographs that scikit-learn brings along, as PNG."""
    if folder.exists():
        return
    partial = folder.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    for number, photograph in enumerate(load_sample_images().images):  # 427 x 640
        cut(Image.fromarray(photograph), 106, partial / str(number))
    partial.rename(folder)


def read_idx(idx: str | None, path: Path, shrink: int = 1) -> None:
    """Writes the 70,000 images of the IDX files as .npz, unless `path` exists.

    With `shrink`, each pixel is the mean of shrink x shrink. Raises UserError if no folder `idx` was given.
    """
    if path.exists():
        return
    if not idx:
        raise UserError("--idx is missing; give the folder of train-images-idx3-ubyte.gz and the other three files")

    def read(kind: str, header: int) -> bytes:
        parts = [Path(idx) / f"{part}-{kind}-ubyte.gz" for part in ("train", "t10k")]
        return b"".join(gzip.open(part).read()[header:] for part in parts)

    images = np.frombuffer(read("images-idx3", 16), np.uint8).reshape(-1, 28 // shrink, shrink, 28 // shrink, shrink)
    labels = np.frombuffer(read("labels-idx1", 8), np.uint8)
    partial = path.with_suffix(".partial")
    with partial.open("wb") as file:
        np.savez(file, images=np.round(images.mean(axis=(2, 4))).astype(np.uint8), labels=labels)
    os.replace(partial, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", required=True, help="the folder for all runs")
    parser.add_argument("--out", required=True, help="the folder for study_DATA.json and its picture")
    parser.add_argument("--data", choices=tuple(RECIPES), default="digits")
    parser.add_argument("--idx", help="the folder of Fashion-MNIST's IDX files")
    parser.add_argument(
        "--seeds", type=int, help="default: 3; for the digits 5 (3 of them with all runs), for fashion_mnist 1"
    )
    parser.add_argument("--only", default="", help="run only parts with such names, a regular expression: '^joint'")
    parser.add_argument("--summarize", action="store_true", help="run nothing, read the results that exist")
    args = parser.parse_args()

    workdir = Path(args.workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    study = Runs(args.data, workdir, args.seeds or RECIPES[args.data][1], args.only)
    needed = {"fashion_mnist": {"fashion_mnist_14.npz": 2}}
    needed["scattered_fashion"] = {"fashion_mnist.npz": 1}
    needed["fashion_codes"] = needed["fashion_mnist"] | {"fashion_mnist.npz": 1}
    if not args.summarize:
        for name, shrink in needed.get(args.data, {}).items():
            read_idx(args.idx, workdir / name, shrink)
        RECIPES[args.data][0](study)
    results = {
        "what": "test accuracies; intervals are 95 %: Student over seeds, Wilson within one run",
        "data": args.data,
        "seeds": list(study.seeds),
        "seconds": study.seconds(),
        "findings": findings(study),
    }
    write(f"{args.out}/study_{args.data}.json", results)
    draw(results["findings"], f"{args.out}/study_{args.data}.png")


if __name__ == "__main__":
    with reported():
        main()
