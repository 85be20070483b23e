"""Measures how fast images become batches, and whether the device waits for them. On the CPU, medians of repeats.

pip install -e ".[bench]"
python benchmarks/data.py --out=benchmarks/results/data_cpu.json

There are five parts:
1. prepared tokens to batches;
2. uint8 images to tokens;
3. JPEG files to tokens on one thread, beside Pillow's decoding alone;
4. a training step of configs/digits.py with the real loader, beside the same step on a batch kept on the device;
5. scattering images over canvases, as a share of the training step that reads them.
The fourth part alternates between its two sides, because the speed of a machine drifts, and compares their medians.
"""

import argparse
import io
import statistics
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
from PIL import Image
from report import write

sys.path.insert(0, str(Path(__file__).parents[1]))  # for configs/

from configs import digits, scattered_digits, scattered_fashion
from igpt.config import Config
from igpt.data.batches import Augmentation, TrainBatches
from igpt.data.examples import EncodedImages, Split
from igpt.data.images import Preprocess, decode
from igpt.data.prepare import prepare
from igpt.data.prepared import open_prepared
from igpt.data.sources import open_source
from igpt.palette import Palette
from igpt.sharding import all_devices, make_mesh, to_devices
from igpt.state import build_program

SIDE, COLORS, BATCH = 32, 512, 128


def photographs(count: int, height: int, width: int) -> np.ndarray:
    """Smooth random images with a little noise, which compress like photographs: uint8 [count, height, width, 3]."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (count, max(2, height // 10), max(2, width // 10), 3), np.uint8)
    smooth = [np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC)) for image in coarse]
    return np.clip(np.stack(smooth) + rng.normal(0, 4, (count, height, width, 3)), 0, 255).astype(np.uint8)


def rate(run, images: int, repeats: int) -> float:
    """Images per second in the median run, after one run that warms up."""
    run()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return images / statistics.median(seconds)


def prepared_into_batches(folder: Path, palette: Palette, repeats: int) -> float:
    np.savez(folder / "images.npz", images=photographs(20_000, SIDE, SIDE))
    palette.save(folder / "palette.npy")
    settings = digits.get_config().data.to_dict() | {
        "source": f"npz:{folder}/images.npz", "image_size": (SIDE, SIDE), "channels": 3,
    }  # fmt: skip
    prepare(settings, str(folder / "palette.npy"), str(folder / "tokens"), shard_images=2048)
    split = open_prepared(str(folder / "tokens")).train
    batches = TrainBatches(split, palette, BATCH, 0, Augmentation(), slice(0, BATCH))
    steps = len(split) // BATCH
    return rate(lambda: [batches[step] for step in range(steps)], steps * BATCH, repeats)


def bytes_into_tokens(palette: Palette, repeats: int) -> float:
    images = photographs(2048, SIDE, SIDE)
    return rate(lambda: palette.encode(images), len(images), repeats)


def jpegs_into_tokens(palette: Palette, repeats: int) -> dict:
    files = []
    for image in photographs(50, 375, 500):
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "JPEG", quality=90)
        files.append((buffer.getvalue(), "a photograph"))
    rates = {
        "kilobytes": statistics.mean(len(content) for content, _ in files) / 1000,
        "pillow_decoding_alone": rate(lambda: [decode(*file) for file in files], len(files), repeats),
    }
    for kind in ("shrink", "crop"):
        split = Split(EncodedImages(files, Preprocess((SIDE, SIDE), kind)), None)
        indices, draws = np.arange(len(files)), np.random.default_rng(0).random((len(files), 3))
        rates[kind] = rate(lambda s=split, i=indices, d=draws: palette.encode(s.read(i, d)[0]), len(files), repeats)
    return rates


def loader_beside_a_resident_batch(rounds: int, steps: int) -> dict:
    config = Config.of(digits.get_config(), trains=True)
    source, mesh = open_source(config.data), make_mesh()
    program, size = build_program(config, mesh), config.train.batch_size
    state = program.create_state(seed=0)
    palette = Palette(np.repeat(np.linspace(-1, 1, config.palette.colors)[:, None], 3, axis=1))
    augmentation = Augmentation.of(config.data)
    batches = TrainBatches(source.train, palette, size, 0, augmentation, slice(0, size))

    def run(given) -> float:
        nonlocal state
        start, waiting = time.perf_counter(), None
        for batch in given:
            state, metrics = program.train_step(state, batch)
            if waiting is not None:
                jax.block_until_ready(waiting)  # like train.py, which keeps one step in flight
            waiting = metrics
        jax.block_until_ready(waiting)
        return (time.perf_counter() - start) / steps

    with jax.set_mesh(mesh):
        resident = to_devices(batches[0], size, mesh)

        def loaded(first: int):
            for batch in batches.iterate(first, first + steps, config.data.threads):
                yield to_devices(batch, size, mesh)

        seconds = {"loader": [], "resident": []}
        for number in range(rounds + 1):
            order = ("loader", "resident") if number % 2 else ("resident", "loader")  # neither side always goes first
            for name in order:
                time_a_step = run(loaded(number * steps) if name == "loader" else [resident] * steps)
                seconds[name] += [time_a_step] if number else []  # the first round compiles
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    slower = statistics.median(a / b for a, b in zip(seconds["loader"], seconds["resident"], strict=True)) - 1
    return {"seconds_a_step": medians, "slower_by": slower, "rounds": rounds, "steps_a_round": steps}


def scattering(config, rounds: int, steps: int) -> dict:
    """Seconds to scatter a batch of images, beside the seconds of a training step on a batch that is made already.

    Both are medians over rounds of `steps` batches, which alternate.
    """
    config = Config.of(config, trains=True)
    source, mesh, size = open_source(config.data), make_mesh(), config.train.batch_size
    images, program = source.train.images, build_program(config, mesh)
    state, rng = program.create_state(seed=0), np.random.default_rng(0)
    seconds = {"scatter": [], "train": []}
    with jax.set_mesh(mesh):
        batch = to_devices({"tokens": np.zeros((size, program.model.seq_len), np.int32)}, size, mesh)
        for number in range(rounds + 1):
            indices = rng.integers(0, len(images), (steps, size))
            draws = rng.random((steps, size, images.draws))
            start = time.perf_counter()
            for step in range(steps):
                images.read(indices[step], draws[step])
            middle = time.perf_counter()
            for _ in range(steps):
                state, metrics = program.train_step(state, batch)
            jax.block_until_ready(metrics)
            times = middle - start, time.perf_counter() - middle
            for name, value in zip(seconds, times, strict=True):
                seconds[name] += [value / steps] if number else []  # the first round compiles
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    share = statistics.median(a / b for a, b in zip(*seconds.values(), strict=True))
    return {"seconds_a_step": medians, "share_of_a_step": share}


def scattered_sources(folder: Path, rounds: int, steps: int = 20) -> dict:
    """Grey digits, and random images of 28 x 28 that are shrunk, coloured and put on pictures."""
    np.savez(folder / "small.npz", images=np.random.default_rng(0).integers(0, 256, (2000, 28, 28), np.uint8))
    np.savez(folder / "pictures.npz", images=photographs(200, 40, 40))
    in_color = scattered_fashion.get_config(f"npz:{folder}/pictures.npz")
    in_color.data.source = f"scattered:npz:{folder}/small.npz"
    configs = {"digits, 12 x 12": scattered_digits.get_config(), "28 x 28 on pictures, 16 x 16": in_color}
    return {name: scattering(config, rounds, steps) for name, config in configs.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, help="the JSON to write")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--rounds", type=int, default=15, help="rounds of the comparison of training steps")
    args = parser.parse_args()
    all_devices(digits.get_config().mesh.cpu_devices)

    palette = Palette(np.random.default_rng(1).uniform(-1, 1, (COLORS, 3)))
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        results["prepared_images_per_s_into_batches"] = prepared_into_batches(Path(folder), palette, args.repeats)
        results["scattering"] = scattered_sources(Path(folder), args.rounds)
    results["images_per_s_quantised"] = bytes_into_tokens(palette, args.repeats)
    results["jpegs_500_x_375_per_s_on_one_thread"] = jpegs_into_tokens(palette, args.repeats)
    results["training_step"] = loader_beside_a_resident_batch(args.rounds, steps=100)
    for name, value in results.items():
        print(f"{name}: {value}")
    settings = {"side": SIDE, "colors": COLORS, "batch_size": BATCH, "repeats": args.repeats}
    write(args.out, {"what": "the data path, medians"} | settings | results)


if __name__ == "__main__":
    main()
