"""Pictures: grids of images, and accuracy by layer."""

import math
import os
from pathlib import Path

import numpy as np
from PIL import Image

from igpt.errors import UserError


def image_grid(images: np.ndarray, columns: int = 0, min_side: int = 64, gap: int = 2) -> np.ndarray:
    """uint8 [N, H, W, 3] -> one picture [.., .., 3], row by row, small images enlarged pixel by pixel.

    `columns` 0 makes the grid about square. Images are scaled by a whole factor until they measure `min_side`.
    """
    count, height, width, _ = images.shape
    columns = columns or math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    scale = max(1, math.ceil(min_side / max(height, width)))
    cell_height, cell_width = height * scale + gap, width * scale + gap
    picture = np.full((rows * cell_height + gap, columns * cell_width + gap, 3), 255, np.uint8)
    for i, image in enumerate(images.repeat(scale, axis=1).repeat(scale, axis=2)):
        top, left = gap + i // columns * cell_height, gap + i % columns * cell_width
        picture[top : top + height * scale, left : left + width * scale] = image
    return picture


def check_writable(path) -> None:
    """Raises UserError before hours of work go into a picture that cannot be written."""
    folder = Path(path).absolute().parent
    if Path(path).suffix.lower() != ".png":
        raise UserError(f"{path}: pictures are written as PNG; give a name that ends in .png")
    if not (folder.is_dir() and os.access(folder, os.W_OK)) or Path(path).is_dir():
        raise UserError(f"{path} cannot be written; name a file in an existing, writable folder")


def save_png(picture: np.ndarray, path) -> None:
    """Writes uint8 [H, W, 3] as PNG, whole or not at all."""
    partial = Path(f"{path}.partial")
    Image.fromarray(picture).save(partial, format="PNG")
    os.replace(partial, path)


def probe_curve(results: dict, path) -> None:
    """Accuracy by layer of `eval_probe.py`'s results, with 95 % intervals, beside its baselines."""
    import matplotlib

    matplotlib.use("Agg")  # a file, never a window
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 4.0), layout="constrained")
    for name, label, color in (
        ("pretrained", "pretrained", "tab:blue"),
        ("random_init", "random initialisation", "tab:gray"),
    ):
        layers = results[name]["layers"]
        accuracy = np.array([layer["test_accuracy"] for layer in layers])
        low, high = np.array([layer["interval"] for layer in layers]).T
        index = [layer["layer"] for layer in layers]
        axes.plot(index, 100 * accuracy, "o-", color=color, label=label)
        axes.fill_between(index, 100 * low, 100 * high, color=color, alpha=0.15, linewidth=0)
    pixels = results["raw_pixels"]["test_accuracy"]
    axes.axhline(100 * pixels, color="tab:orange", linestyle="--", label="raw pixels")
    axes.set(xlabel="layer", ylabel="linear probe, test accuracy (%)", xticks=index)
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120, format="png")
    plt.close(figure)
