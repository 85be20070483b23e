"""Measures whether transformers' pipeline gives an exported classifier's own classes, with and without SOS.

pip install -e ".[bench]"
python train.py --config=configs/digits.py --workdir=runs/digits --config.train.steps=1300 \\
    --config.optim.name=adam --config.optim.learning_rate=3e-3 --config.optim.warmup_steps=150
python train.py --config=configs/finetune_digits.py --config.init_from=runs/digits --workdir=runs/digits-ft \\
    --config.train.steps=400
python train.py --config=configs/finetune_digits.py --config.init_from=runs/digits --workdir=runs/digits-hf \\
    --config.train.steps=400 --config.model.sos=False
python benchmarks/pipeline.py --models runs/digits-ft runs/digits-hf --out=benchmarks/results/pipeline_digits.json

Each run is exported. Its test images are written as PNG files, which transformers' image-classification pipeline reads
from the export, and igpt's own `predict` from the run.
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
import transformers
from PIL import Image
from report import write

import igpt
from igpt.data.classes import full_names
from igpt.data.sources import open_source
from igpt.interop.export import export
from igpt.predict import predict


def compare(ref: str, folder: Path) -> dict:
    """The test accuracy of a run in igpt and in the pipeline, and on how many images they agree."""
    pretrained = igpt.load(ref)
    test = open_source(pretrained.config.data).test
    shares = predict(pretrained, test)
    names = full_names(pretrained.class_names, shares.shape[1])
    ours = np.array(names)[shares.argmax(axis=1)]
    files = [str(folder / f"{i}.png") for i in range(len(test))]
    for file, image in zip(files, test.images[:], strict=True):
        Image.fromarray(image).save(file)
    directory = export(ref, folder / "export")
    found = transformers.pipeline("image-classification", model=str(directory), device="cpu")(files, top_k=1)
    theirs = np.array([best["label"] for (best,) in found])
    true = np.array(names)[test.labels]
    scores = np.array([best["score"] for (best,) in found])
    return {
        "model": ref,
        "sos": pretrained.model.config.sos,
        "step": pretrained.step,
        "images": len(test),
        "igpt_accuracy": float(np.mean(ours == true)),
        "pipeline_accuracy": float(np.mean(theirs == true)),
        "same_class": int(np.sum(ours == theirs)),
        "largest_difference_of_the_best_probability": float(np.abs(scores - shares.max(axis=1)).max()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", required=True, help="fine-tuned runs")
    parser.add_argument("--out", required=True, help="the JSON to write")
    args = parser.parse_args()
    results = []
    for ref in args.models:
        with tempfile.TemporaryDirectory() as folder:
            results.append(compare(ref, Path(folder)))
        print(results[-1])
    write(args.out, {"what": "classes of test images by igpt and by transformers' pipeline", "runs": results})


if __name__ == "__main__":
    main()
