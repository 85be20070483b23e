"""Measures images to tokens on the CPU: our image processor beside transformers' PIL one, on the same images.

pip install -e ".[bench]"
python benchmarks/processor.py --out=benchmarks/results/processor_cpu.json

The images already have the target size, so nothing is resized. They are pieces of photographs, and noise, whose pixels
read our table of 32 MB at random places. transformers is timed twice: with all images in one call, like ours, and with
--peer_batch images per call. The second is faster, because transformers holds three copies of a float64 distance for
each pixel and cluster: 4 MiB per image and copy (13 GB for 1,024 images). Our first call fills the table and is
reported apart; the rates are of later calls.
"""

import argparse
import time

import numpy as np
from PIL import Image
from report import median_seconds, write
from sklearn.datasets import load_sample_images
from transformers.models.imagegpt.image_processing_pil_imagegpt import ImageGPTImageProcessorPil

from igpt.interop.processor import ImageGPTImageProcessor

SIDE = 32


def photo_images(rng: np.random.Generator, count: int) -> np.ndarray:
    """Random squares of scikit-learn's two photographs, scaled down: uint8 [count, 32, 32, 3]."""
    photos = [Image.fromarray(photo) for photo in load_sample_images().images]
    images = []
    for photo in (photos[i % len(photos)] for i in range(count)):
        side = int(rng.integers(2 * SIDE, min(photo.size) + 1))
        left, top = (int(rng.integers(0, length - side + 1)) for length in photo.size)
        square = photo.resize((SIDE, SIDE), Image.Resampling.BICUBIC, (left, top, left + side, top + side))
        images.append(np.asarray(square))
    return np.stack(images)


def noise_images(rng: np.random.Generator, count: int) -> np.ndarray:
    return rng.integers(0, 256, (count, SIDE, SIDE, 3), np.uint8)


def seconds_once(run) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def measure(images: np.ndarray, clusters: list, peer_batch: int, repeats: int) -> list[dict]:
    """A row of results for each form of the input. The very first call is timed separately."""
    ours, peer = (kind(clusters=clusters, size=SIDE) for kind in (ImageGPTImageProcessor, ImageGPTImageProcessorPil))
    forms = {
        "one array": images,
        "list of arrays": list(images),
        "list of PIL images": [Image.fromarray(image) for image in images],
    }

    def rate(processor, given, repeats):
        return len(given) / median_seconds(lambda: processor(given)["input_ids"], repeats)

    # All of ours comes first: the peer allocates gigabytes, and the machine is slower for a while afterwards.
    first = {"ours": len(images) / seconds_once(lambda: ours(images))}  # fills the table for these colours
    our_rates = {form: rate(ours, given, repeats) for form, given in forms.items()}
    our_tokens = ours(images, return_tensors="np")["input_ids"]

    first["transformers"] = len(images) / seconds_once(lambda: peer(images))
    rows = []
    for form, given in forms.items():
        rates = {
            "ours": our_rates[form],
            "transformers": rate(peer, given, 3),
            "transformers_in_batches": rate(peer, given[:peer_batch], repeats),
        }
        ratios = {who: rates["ours"] / theirs for who, theirs in rates.items() if who != "ours"}
        rows.append({"given_as": form, "images_per_s": rates, "speed_ratio": ratios})
    parts = [images[start : start + peer_batch] for start in range(0, len(images), peer_batch)]
    theirs = np.concatenate([peer(part, return_tensors="np")["input_ids"] for part in parts])
    differing = int(np.sum(our_tokens != theirs))
    rows[0] |= {"first_call_images_per_s": first, "tokens": theirs.size, "tokens_that_differ": differing}
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, help="the JSON to write")
    parser.add_argument("--images", type=int, default=1024)
    parser.add_argument("--peer_batch", type=int, default=64)
    parser.add_argument("--clusters", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=11)
    args = parser.parse_args()

    rows = []
    for seed, make in enumerate((photo_images, noise_images)):
        rng = np.random.default_rng(seed)
        clusters = rng.uniform(-1, 1, (args.clusters, 3)).tolist()  # new clusters each time, so that the table is empty
        for row in measure(make(rng, args.images), clusters, args.peer_batch, args.repeats):
            rows.append({"images": make.__name__.removesuffix("_images")} | row)
            rates = ", ".join(f"{who} {rate:,.0f}" for who, rate in row["images_per_s"].items())
            ratios = " and ".join(f"{ratio:,.0f}" for ratio in row["speed_ratio"].values())
            print(f"{rows[-1]['images']}, {row['given_as']}: images/s {rates}; {ratios} times", flush=True)
            if "first_call_images_per_s" in row:
                first = ", ".join(f"{who} {rate:,.0f}" for who, rate in row["first_call_images_per_s"].items())
                print(
                    f"  first call {first}; {row['tokens_that_differ']} of {row['tokens']:,} tokens differ", flush=True
                )
    settings = {"side": SIDE, **{name: value for name, value in vars(args).items() if name != "out"}}
    what = "32 x 32 images to tokens, medians; transformers is given all in a call, and peer_batch a call"
    write(args.out, {"what": what} | settings | {"rows": rows})


if __name__ == "__main__":
    main()
