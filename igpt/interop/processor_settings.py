"""The settings of the image processor: defaults, checks, and those of transformers that are refused by name."""

import math
import reprlib

import numpy as np
from PIL import Image

from igpt.color_table import MAX_COLORS
from igpt.errors import UserError
from igpt.interop.documented import refusals

MAX_PIXELS = 1 << 24  # pixels per resized image
MAX_NUMBER = float(np.finfo(np.float32).max)  # a limit for settings, because pixel values are float32
REFUSED = refusals(  # settings of transformers' processors that would change something
    (
        "images are stretched to `size`, and nothing else",
        dict(do_center_crop=False, crop_size=None, do_pad=False, pad_size=None, default_to_square=True),
    ),
    (
        "pixels are those of transformers' PIL processor, on the CPU",
        dict(use_fast=False, backend="pil", device="cpu", disable_grouping=(True, False)),
    ),
    ("an image has as many tokens as `size` has pixels", dict(image_seq_length=None)),
)


def checked(name: str, value):
    """Converts the setting `name` to its type, and None to the default. Raises UserError if the value is invalid."""
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
    numbers = np.asarray(value, object).tolist()  # a list, or the unchanged scalar
    numbers = numbers if isinstance(numbers, list) else [numbers] * 3
    if len(numbers) != 3:
        raise UserError(f"{name} is {reprlib.repr(value)}; a number or three, one for each channel, are needed")
    numbers = [_number(name, number) for number in numbers]
    if name == "image_std" and 0.0 in numbers:
        raise UserError(f"image_std is {numbers}; pixels are divided by it, so it cannot contain 0")
    return numbers


def _size(name, value):
    if hasattr(value, "keys"):
        value = {key: length for key, length in dict(value).items() if length is not None}
        lengths = [value["height"], value["width"]] if set(value) == {"height", "width"} else []
    else:
        lengths = list(value) if isinstance(value, list | tuple) else [value] * 2
    whole = all(isinstance(length, int | np.integer) and not isinstance(length, bool) for length in lengths)
    if len(lengths) != 2 or not whole or min(lengths) < 1 or math.prod(map(int, lengths)) > MAX_PIXELS:
        allowed = f"{{'height': h, 'width': w}}, (h, w) or one number for both, up to {MAX_PIXELS:,} pixels"
        raise UserError(f"{name} is {reprlib.repr(value)}; give {allowed}: images are resized to exactly that")
    return {"height": int(lengths[0]), "width": int(lengths[1])}


def _filter(name, value):
    allowed = {
        choice.value: choice.name.lower() for choice in sorted(Image.Resampling)
    }  # the choices depend on Pillow's version
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value not in allowed:
        choices = ", ".join(f"{number} {word}" for number, word in allowed.items())
        raise UserError(f"{name} is {reprlib.repr(value)}; a filter of PIL is needed: {choices}")
    return int(value)


def _clusters(name, value):
    try:
        clusters = np.asarray(value)
    except (TypeError, ValueError, RuntimeError):
        clusters = np.empty(0, object)  # the rows differ in length, or it has no rows
    if clusters.dtype.kind not in "iuf" or clusters.shape[1:] != (3,) or not 1 <= len(clusters) <= MAX_COLORS:
        found = f"{clusters.dtype} {list(clusters.shape)}"
        raise UserError(f"{name} are {found}; numbers [V, 3], V from 1 to {MAX_COLORS}, are needed")
    if not (np.abs(clusters) <= MAX_NUMBER).all():
        raise UserError(f"{name} are not finite: they run from {clusters.min()} to {clusters.max()}")
    return clusters.astype(np.float64)


SETTINGS = {  # name: the default, and the function that checks and converts a value
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
