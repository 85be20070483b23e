"""The image processor's settings: their names, their defaults, and what each may be."""

import math
import reprlib

import numpy as np
from PIL import Image

from igpt.errors import UserError
from igpt.palette import MAX_COLORS

MAX_PIXELS = 1 << 24  # of a resized image
MAX_NUMBER = float(np.finfo(np.float32).max)  # pixel values are float32


def checked(name: str, value):
    """The value as it is used, None standing for the default; UserError, naming the setting, where there is none."""
    default, check = SETTINGS[name]
    value = default if value is None else value
    return None if value is None else check(name, value)


def _flag(name, value):
    if not isinstance(value, bool | np.bool_):
        raise UserError(f"{name} is {reprlib.repr(value)}; True or False is needed")
    return bool(value)


def _number(name, value):
    number = isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)
    if not number or not abs(value) <= MAX_NUMBER:
        raise UserError(f"{name} is {reprlib.repr(value)}; a finite number is needed")
    return float(value)


def _three_numbers(name, value):
    try:
        numbers = list(value) if np.ndim(value) else [value] * 3
    except (TypeError, ValueError):
        numbers = []
    if len(numbers) != 3:
        raise UserError(f"{name} is {reprlib.repr(value)}; a number or three, one for each channel, are needed")
    numbers = [_number(name, number) for number in numbers]
    if name == "image_std" and 0.0 in numbers:
        raise UserError(f"image_std is {numbers}; pixels are divided by it, so it cannot hold 0")
    return numbers


def _size(name, value):
    if hasattr(value, "keys"):
        value = {key: length for key, length in dict(value).items() if length is not None}
        lengths = [value["height"], value["width"]] if set(value) == {"height", "width"} else []
    else:
        lengths = list(value) if isinstance(value, list | tuple) else [value] * 2
    whole = all(isinstance(length, int | np.integer) and not isinstance(length, bool) for length in lengths)
    if len(lengths) != 2 or not whole or min(lengths) < 1 or math.prod(map(int, lengths)) > MAX_PIXELS:
        raise UserError(
            f"{name} is {reprlib.repr(value)}; {{'height': h, 'width': w}}, (h, w) or one number for both is "
            f"allowed, up to {MAX_PIXELS:,} pixels. Image GPT resizes to an exact size: shortest_edge and the like do "
            "not apply"
        )
    return {"height": int(lengths[0]), "width": int(lengths[1])}


def _filter(name, value):
    allowed = {choice.value: choice.name.lower() for choice in sorted(Image.Resampling)}  # newer Pillows have more
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value not in allowed:
        choices = ", ".join(f"{number} {word}" for number, word in allowed.items())
        raise UserError(f"{name} is {reprlib.repr(value)}; a filter of PIL is needed: {choices}")
    return int(value)


def _clusters(name, value):
    try:
        clusters = np.asarray(value)
    except (TypeError, ValueError, RuntimeError):
        clusters = np.empty(0, object)  # rows of several lengths, or no rows at all
    if clusters.dtype.kind not in "iuf" or clusters.shape[1:] != (3,) or not 1 <= len(clusters) <= MAX_COLORS:
        raise UserError(
            f"{name} are {clusters.dtype} {list(clusters.shape)}; numbers [V, 3], V from 1 to {MAX_COLORS}, are needed"
        )
    if not (np.abs(clusters) <= MAX_NUMBER).all():
        raise UserError(f"{name} are not finite: they run from {clusters.min()} to {clusters.max()}")
    return clusters.astype(np.float64)


SETTINGS = {  # name: its default, and what makes of a value the one that is used
    "clusters": (None, _clusters),
    "do_resize": (True, _flag),
    "size": ({"height": 256, "width": 256}, _size),
    "resample": (2, _filter),
    "do_rescale": (True, _flag),
    "rescale_factor": (1 / 255, _number),
    "do_normalize": (True, _flag),
    "image_mean": ([0.5] * 3, _three_numbers),
    "image_std": ([0.5] * 3, _three_numbers),
    "do_color_quantize": (True, _flag),
    "do_convert_rgb": (None, _flag),
}
