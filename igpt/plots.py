"""Pictures: grids of images, palettes, confusion matrices, losses by step, and accuracy by layer."""

import colorsys
import contextlib
import io
import math
import os
import sys
from collections.abc import Sequence

import numpy as np
from PIL import Image

from igpt.errors import UserError, first_line
from igpt.files import whole


def image_grid(images: np.ndarray, columns: int = 0, min_side: int = 64, gap: int = 2) -> np.ndarray:
    """Puts images, uint8 [N, H, W, 3], row by row into one picture, uint8 [height, width, 3].

    With `columns` 0 the grid is about square. Small images are enlarged by the smallest whole factor that makes their
    longer side at least `min_side` pixels long.
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


def palette_picture(colors: np.ndarray | None, before: np.ndarray, after: np.ndarray, columns: int = 32) -> np.ndarray:
    """Draws the colours, uint8 [V, 3], and below them images [N, H, W, 3] before and after quantisation.

    Each row has `columns` colours. The rows are sorted from dark to light, and the colours in a row by hue.
    Without colours, only the images.
    """
    images = image_grid(np.concatenate([before, after]), columns=len(before), min_side=128)
    if colors is None:
        return images
    columns = min(columns, len(colors))
    colors = colors[np.argsort(colors @ (0.299, 0.587, 0.114), kind="stable")]  # brightness: the luma of ITU-R BT.601
    rows = [colors[start : start + columns] for start in range(0, len(colors), columns)]
    wide = max(1, (images.shape[1] - 4) // columns)
    high = min(wide, 64)
    swatches = np.full((len(rows) * high, columns * wide, 3), 255, np.uint8)
    for i, row in enumerate(rows):
        row = row[np.argsort([colorsys.rgb_to_hsv(*color) for color in row / 255.0], axis=0)[:, 0]]
        swatches[i * high : (i + 1) * high, : len(row) * wide] = row.repeat(wide, axis=0)
    width, gap = max(swatches.shape[1] + 4, images.shape[1]), 8
    picture = np.full((2 + len(swatches) + gap + len(images), width, 3), 255, np.uint8)
    picture[2 : 2 + len(swatches), 2 : 2 + swatches.shape[1]] = swatches
    picture[-len(images) :, : images.shape[1]] = images
    return picture


def save_png(picture: np.ndarray, path) -> None:
    """Writes uint8 [H, W, 3] as PNG. If it cannot write the whole file, it raises OSError and leaves no file."""
    with whole(path) as file:
        Image.fromarray(picture).save(file, format="PNG")


def confusion_picture(counts: np.ndarray, path, class_names: Sequence[str] | None = None) -> None:
    """Draws a confusion matrix of counts, [true class, predicted class]. Shades show shares of the true class."""
    shares = 100 * counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    accuracy = np.trace(counts) / counts.sum()
    with _figure(path, width=6.0, height=5.4) as axes:
        image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=100)
        axes.set(xlabel="predicted class", ylabel="true class", title=f"test accuracy {accuracy:.2%}")
        if len(counts) <= 20:
            axes.set(xticks=range(len(counts)), yticks=range(len(counts)))
            if class_names:
                names = [name if len(name) <= 20 else f"{name[:19]}..." for name in class_names]
                names = [name.replace("$", r"\$") for name in names]  # "$" would begin a formula
                names = [name if _has_glyphs(name) else str(i) for i, name in enumerate(names)]
                axes.set_xticklabels(names, rotation=90)
                axes.set_yticklabels(names)
            for (row, column), count in np.ndenumerate(counts):
                if count:
                    color = "white" if shares[row, column] > 50 else "black"
                    axes.text(column, row, str(count), ha="center", va="center", color=color, fontsize=8)
        axes.figure.colorbar(image, label="% of the true class")


def _has_glyphs(text: str) -> bool:
    """Whether matplotlib's fonts have every letter of a text. It draws a box for another one, and warns."""
    from matplotlib.font_manager import FontProperties, findfont, get_font

    fonts = [get_font(findfont(FontProperties(family=[family]))) for family in FontProperties().get_family()]
    return all(any(font.get_char_index(ord(letter)) for font in fonts) for letter in text)


def probe_curve(results: dict, path) -> None:
    """Draws the accuracy of each layer from eval_probe.py's results, with 95 % intervals, and baselines if present."""
    curves = (("pretrained", "pretrained", "tab:blue"), ("random_init", "random initialisation", "tab:gray"))
    with _figure(path, width=6.4, height=4.8) as axes:
        for name, label, color in curves:
            if name not in results:
                continue
            fits = results[name]["layers"]
            layers = [fit["layer"] for fit in fits]
            accuracy, low, high = 100 * np.array([(fit["test_accuracy"], *fit["interval"]) for fit in fits]).T
            axes.plot(layers, accuracy, "o-", color=color, label=label)
            axes.fill_between(layers, low, high, color=color, alpha=0.15, linewidth=0)
            if "neighbours" in fits[0]:
                votes = [100 * fit["neighbours"] for fit in fits]
                axes.plot(layers, votes, ":", color=color, label=f"{label}, nearest neighbours")
        if "raw_pixels" in results:
            pixels = results["raw_pixels"]
            axes.axhline(100 * pixels["test_accuracy"], color="tab:orange", linestyle="--", label="raw pixels")
            if "neighbours" in pixels:
                votes, label = 100 * pixels["neighbours"], "raw pixels, nearest neighbours"
                axes.axhline(votes, color="tab:orange", linestyle=":", label=label)
        ticks = layers[:: math.ceil(len(layers) / 25)]  # more of them overlap
        axes.set(xlabel="layer", ylabel="test accuracy (%)", xticks=ticks, title="probe by layer")
        axes.figure.legend(loc="outside lower center", ncols=2)  # inside, it would lie over a curve
        axes.grid(alpha=0.3)


def loss_curve(curves: dict[str, dict[int, float]], path, ylabel: str) -> None:
    """Draws losses over the training steps: {label: {step: loss}}. `ylabel` says which loss, and in which unit."""
    with _figure(path, width=6.4, height=4.0) as axes:
        for label, curve in curves.items():
            if curve:
                steps = sorted(curve)
                axes.plot(steps, [curve[step] for step in steps], "." if len(steps) == 1 else "-", label=label)
        axes.set(xlabel="step", ylabel=ylabel)
        axes.legend()
        axes.grid(alpha=0.3)


def check_drawing() -> None:
    """Raises UserError if matplotlib cannot draw. Call this function before work that ends in a figure."""
    try:
        _figure_class()(figsize=(1, 1)).savefig(io.BytesIO(), format="png")
    except Exception as error:  # a broken installation or configuration raises exceptions of any type
        problem = f"matplotlib cannot draw the results ({first_line(error)})"
        raise UserError(f"{problem}; repair its installation or its configuration") from error


def _figure_class():
    """matplotlib's Figure, which is slow to import. pyplot would use global state and a notebook's back end.

    The import fails if MPLBACKEND names a back end that is not installed, as a shell inherits it from a notebook.
    Therefore the variable is hidden during the import, and then set as matplotlib would have set it.
    """
    backend = None if "matplotlib" in sys.modules else os.environ.pop("MPLBACKEND", None)
    from matplotlib import rcParams
    from matplotlib.figure import Figure

    if backend is not None:
        os.environ["MPLBACKEND"] = backend
        with contextlib.suppress(ValueError):
            rcParams["backend"] = backend
    return Figure


@contextlib.contextmanager
def _figure(path, width: float, height: float):
    """Yields the axes of a figure, and writes it as PNG when the block ends. The size is in inches."""
    figure = _figure_class()(figsize=(width, height), layout="constrained")
    yield figure.subplots()
    with whole(path) as file:
        figure.savefig(file, dpi=120, format="png")
