"""What a VQ-VAE keeps of images, beside palettes, and what a model of its codes draws.

    python benchmarks/vqvae.py --vqvae=runs/fashion-vqvae --model=runs/fashion-codes \\
        --out=docs/results/vqvae_fashion_mnist.json

All tokenizers encode and decode all validation images. PSNR is that of the mean square error over all of them, with
pixels from 0 to 255; null if no pixel changes. Perplexity is that of the tokens of all these images. Pictures are
written beside the JSON: reconstructions (images, the first palette, VQ-VAE), and of the model samples and completions.
"""

import argparse
from pathlib import Path

import numpy as np
from report import write
from study_findings import best_layer

import igpt
from igpt.data.palette_fit import fit
from igpt.data.sources import open_source
from igpt.files import read_json
from igpt.plots import image_grid, save_png
from igpt.run.directory import load_config
from igpt.sample import completion_picture
from igpt.tokenizer import find_tokenizer
from igpt.track.lines import records

AT_ONCE = 1000


def measured(tokenizer, images) -> dict:
    """PSNR, perplexity and tokens in use over all images."""
    counts, error = np.zeros(tokenizer.vocab_size), 0.0
    for start in range(0, len(images), AT_ONCE):
        some = np.asarray(images[start : start + AT_ONCE])
        tokens = tokenizer.encode(some)
        counts += np.bincount(tokens.ravel(), minlength=tokenizer.vocab_size)
        error += float(((tokenizer.decode(tokens).astype(np.float64) - some) ** 2).mean() * len(some))
    share, error = counts[counts > 0] / counts.sum(), error / len(images)
    per_image = counts.sum() / len(images)
    return {
        "vocab_size": tokenizer.vocab_size,
        "tokens_per_image": per_image,
        "bits_per_image": per_image * np.log2(tokenizer.vocab_size),
        "psnr": 10 * np.log10(255**2 / error) if error else None,
        "perplexity": float(np.exp(-(share * np.log(share)).sum())),
        "tokens_in_use": int((counts > 0).sum()),
    }


def probed(path: Path) -> dict:
    """Test accuracies of a probe: by layer, of the layer that validation chose, and of the baselines."""
    probe = read_json(path)
    found = {
        name: [layer["test_accuracy"] for layer in probe[name]["layers"]] for name in ("pretrained", "random_init")
    }
    return found | {"best": best_layer(probe), "raw_pixels": probe["raw_pixels"]["test_accuracy"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vqvae", required=True, help="the run of a VQ-VAE")
    grey = "sizes of palettes; 256 colours keep every grey (default 32 256)"
    parser.add_argument("--colors", type=int, nargs="+", default=[32, 256], help=grey)
    parser.add_argument("--model", default="", help="the run of a model of its codes")
    parser.add_argument("--tuned", default="", help="the run that fine-tuned that model; its probe is in MODEL/probe")
    parser.add_argument("--out", required=True, help="the JSON to write")
    args = parser.parse_args()
    config, base = load_config(Path(args.vqvae)), args.out.removesuffix(".json")
    source, codes = open_source(config.data), find_tokenizer(args.vqvae)
    images = source.validation.images
    palettes = {n: fit(source.train.images, n, config.seed, config.palette.max_pixels) for n in args.colors}
    results = {"vqvae": args.vqvae, "source": source.name, "validation_images": len(images)}
    results |= {"steps": config.train.steps, "of_vqvae": measured(codes, images)}
    results["of_palettes"] = {colors: measured(one, images) for colors, one in palettes.items()}
    shown = np.asarray(images[:16])
    rows = [shown, *[one.decode(one.encode(shown)) for one in (palettes[args.colors[0]], codes)]]
    save_png(image_grid(np.concatenate(rows), columns=len(shown), min_side=56), f"{base}_reconstructions.png")
    if args.model:
        run = igpt.load(args.model)
        last = [record for record in records(run.path) if "eval/loss" in record][-1]
        results["model"] = {name: last[name] for name in last if name == "step" or name.startswith("eval/")}
        results["model"]["bits_per_image"] = last["eval/loss"] * run.model.config.seq_len / np.log(2)
        if args.tuned:
            results["probe"] = probed(run.path / "probe" / "probe.json")
            tuned = read_json(Path(args.tuned) / "finetune.json")
            results["fine-tuned"] = {name: tuned[name] for name in ("step", "test_accuracy", "interval")}
        save_png(image_grid(run.sample(32), columns=16, min_side=56), f"{base}_samples.png")
        given = np.asarray(source.test.images[:4])
        completions = completion_picture(codes, given, 0.5, run.complete(given, keep=0.5, num=7))
        save_png(completions, f"{base}_completions.png")
    write(args.out, results)


if __name__ == "__main__":
    main()
