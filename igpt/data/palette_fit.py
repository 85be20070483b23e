"""Fits a palette to a source: the colours that best represent a sample of its pixels.

    igpt palette --source=folder:photos --colors=512 --pixels=1000000 --out=palette.npy
    igpt prepare --source=folder:photos --size=32 --palette=palette.npy --out=photos-32

Chooses training images at random, samples equally many pixels from each (at most --pixels in total), and clusters them
with k-means. The quantisation error is measured on pixels of validation images. The picture shows the palette and
eight images before and after. train.py computes the same palette for the same images, colours, pixels and seed.
"""

import argparse
import math
import warnings
from pathlib import Path

import numpy as np

from igpt.color_table import MAX_COLORS
from igpt.command import Parser, add_shared, at_least
from igpt.data.sources import add_source_arguments, load_source, source_settings
from igpt.errors import UserError
from igpt.files import check_writable, written
from igpt.palette import Palette
from igpt.plots import palette_picture, save_png
from igpt.progress import progress_bar

PIXELS_OF_AN_IMAGE = 64  # at least; with fewer, more images are needed, and decoding them takes longer than k-means
PIXELS_AT_ONCE = 1 << 18  # largest number of pixels of decoded images in memory at a time
MOST_TO_START_FROM = 1 << 16  # k-means++ chooses among this many colours; with all, it would be slower than k-means
MOST_ITERATIONS = 100
ITERATIONS_AT_ONCE = 5
SMALLEST_GAIN = 1e-3  # k-means ends when ITERATIONS_AT_ONCE iterations lower the error by at most this share


def sample_pixels(images, most: int, seed: int) -> tuple[np.ndarray, int]:
    """Returns at most `most` pixels, uint8 [n, 3], of images uint8 [N, H, W, 3], and the number of images used.

    `seed` chooses the images and pixels, the same number of pixels in each image. Images are read a few at a time.
    """
    count, height, width, _ = images.shape
    rng = np.random.default_rng((seed, 3))
    of_each = min(height * width, max(PIXELS_OF_AN_IMAGE, most // count), most)
    chosen = np.sort(rng.permutation(count)[: most // of_each])  # sorted, so that the disk is read in order
    pixels = np.empty((len(chosen), of_each, 3), np.uint8)
    at_once = max(1, PIXELS_AT_ONCE // (height * width))
    with progress_bar(total=len(chosen), unit="image", desc="sample") as bar:
        for start in range(0, len(chosen), at_once):
            read = images[chosen[start : start + at_once]].reshape(-1, height * width, 3)
            for row, image in enumerate(read, start):
                pixels[row] = image if of_each == len(image) else image[rng.choice(len(image), of_each, replace=False)]
            bar.update(len(read))
    return pixels.reshape(-1, 3), len(chosen)


def fit(images, colors: int, seed: int = 0, max_pixels: int = 1_000_000) -> Palette:
    """Fits a palette to at most `max_pixels` sampled pixels of images uint8 [N, H, W, 3]: see `fit_pixels`."""
    pixels, _ = sample_pixels(images, max_pixels, seed)
    return fit_pixels(pixels, colors, seed)


def fit_pixels(pixels: np.ndarray, colors: int, seed: int = 0, flag: str = "palette.colors") -> Palette:
    """Clusters pixels uint8 [N, 3] by k-means. If they have exactly `colors` different colours, these are the palette.

    Raises UserError if they have fewer. `flag` is the name of the number of colours in the message.
    """
    if colors > MAX_COLORS:
        raise UserError(f"{flag} is {colors}; a palette has at most {MAX_COLORS} colours, since tokens take 16 bits")
    distinct, counts = np.unique(pixels, axis=0, return_counts=True)
    if len(distinct) < colors:
        raise UserError(
            f"{flag} is {colors}, but the {len(pixels):,} pixels looked at have only {len(distinct)} different "
            f"colours; set {flag}={len(distinct)}"
        )
    points = distinct / 127.5 - 1.0
    if len(distinct) == colors:
        return of_centers(points)
    from sklearn.cluster import KMeans, kmeans_plusplus  # slow to import
    from sklearn.exceptions import ConvergenceWarning

    some = np.random.default_rng((seed, 5)).permutation(len(points))[: max(MOST_TO_START_FROM, 2 * colors)]
    centers, _ = kmeans_plusplus(points[some], colors, sample_weight=counts[some], random_state=seed)
    error = math.inf
    with progress_bar(total=MOST_ITERATIONS, unit="iteration", desc="k-means") as bar:
        for _ in range(0, MOST_ITERATIONS, ITERATIONS_AT_ONCE):
            kmeans = KMeans(colors, init=centers, n_init=1, max_iter=ITERATIONS_AT_ONCE, tol=0, random_state=seed)
            with warnings.catch_warnings(action="ignore", category=ConvergenceWarning):
                centers = kmeans.fit(points, sample_weight=counts).cluster_centers_
            before, error = error, kmeans.inertia_ / counts.sum() / 3 * 127.5**2
            bar.set_postfix_str(f"mean squared error {error:.3f}", refresh=False)
            bar.update(ITERATIONS_AT_ONCE)
            if before - error <= SMALLEST_GAIN * before < math.inf:
                break
    return of_centers(centers)


def of_centers(centers: np.ndarray) -> Palette:
    """Makes a palette of centres [V, 3]. Sorts them from dark to light, so that the given order does not matter."""
    centers = np.clip(centers, -1.0, 1.0)
    return Palette(centers[np.lexsort((*centers.T[::-1], centers.sum(axis=1)))].astype(np.float32))


def quantisation_error(palette: Palette, pixels: np.ndarray) -> tuple[float, float]:
    """The mean squared error over all channels of pixels uint8 [n, 3], in bytes^2, and the same error as PSNR in dB."""
    error = np.square(palette.decode(palette.encode(pixels)) - pixels.astype(np.float64)).mean()
    return float(error), 10 * math.log10(255**2 / error) if error else math.inf


def add_arguments(parser: Parser) -> None:
    add_source_arguments(parser, size="32")
    parser.add_argument("--colors", type=at_least(1), default=512, help="in the palette (default 512, as in the paper)")
    parser.add_argument("--pixels", type=at_least(1), default=1_000_000, help="most pixels sampled (default 1000000)")
    add_shared(parser, "seed")
    parser.add_argument("--out", required=True, help="the .npy to write")
    parser.add_argument("--picture", default="", help="a .png to write: the palette, and images before and after")
    parser.add_argument("--overwrite", action="store_true", help="replace existing files")


def run(args: argparse.Namespace) -> None:
    """Fits a palette with the flags of the command line, and writes it."""
    _check_out(args)
    source = load_source(source_settings(args))
    pixels, looked_at = sample_pixels(source.train.images, args.pixels, args.seed)
    print(f"{len(pixels):,} pixels of {looked_at:,} of {len(source.train):,} images")
    palette = fit_pixels(pixels, args.colors, args.seed, flag="--colors")
    held_out, others = sample_pixels(source.validation.images, max(1, args.pixels // 10), args.seed)
    error, psnr = quantisation_error(palette, held_out)
    with written(f"--out={args.out}"):  # after all that an unreadable image may stop
        palette.save(args.out)
    print(
        f"wrote {args.out}: {palette.vocab_size} colours. On {len(held_out):,} pixels of {others:,} other images: "
        f"mean squared error {error:.4g} (bytes squared, a channel), PSNR {psnr:.2f} dB"
    )
    if args.picture:
        chosen = np.random.default_rng((args.seed, 4)).permutation(len(source.validation))[:8]
        before = source.validation.images[np.sort(chosen)]
        after = palette.decode(palette.encode(before))
        with written(f"--picture={args.picture}"):
            save_png(palette_picture(palette.decode(np.arange(palette.vocab_size)), before, after), args.picture)
        print(f"wrote {args.picture}: the palette, and {len(before)} images before (above) and after (below)")
    if source.unreadable:
        print(f"passed over {len(source.unreadable)} unreadable images, such as: {source.unreadable[0]}")


def _check_out(args: argparse.Namespace) -> None:
    """Raises UserError if the output files exist or cannot be written. Runs before the fit, which takes minutes."""
    check_writable(args.out, "--out", ".npy")
    if args.picture:
        check_writable(args.picture, "--picture", ".png")
    there = [path for path in (args.out, args.picture) if path and Path(path).exists()]
    if there and not args.overwrite:
        raise UserError(f"{' and '.join(there)} exist(s) already; name another file, or give --overwrite")
