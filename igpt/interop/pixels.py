"""Converts images to uint8 RGB: PIL images of every mode, arrays of either layout, nested lists of numbers.

If Hugging Face's processor can read an input, the result is the same. This module can also convert grey, 16-bit, CMYK
and similar images, for which that processor fails. Transparent images get a white background, as do_convert_rgb gives.
"""

import os
import warnings
from collections.abc import Iterator

import numpy as np
from PIL import Image

from igpt.data.images import UPRIGHT, lay_on_white, orientation, scale_to_bytes
from igpt.errors import UserError

LAYOUTS = ("channels_first", "channels_last", "none")
CHANNELS = (1, 3, 4)  # grey, RGB, RGBA


def rgb_batches(
    images, layout: str | None = None, convert_rgb: bool = False, upright: bool = False
) -> tuple[list[np.ndarray], list[bool]]:
    """Images in any form -> uint8 [N, H, W, 3] for each image (N = 1) or 4-D array, in the given order.

    The second list is True for each array of floats in [0, 1], which are converted to bytes as 255 * value. If any
    float of a call is above 1, all floats must be whole numbers from 0 to 255. `layout` is the layout of arrays. If it
    is None, the channel axis is the first of the two possible axes that has 1, 3 or 4 entries. A colour that an RGB
    PIL image marks as transparent is kept, unless `convert_rgb` is set. With `upright`, a PIL image is turned as its
    metadata says. Raises UserError if an input is not an image.
    """
    if layout is not None and layout not in LAYOUTS:
        raise UserError(f"input_data_format is {layout!r}; choose one of {', '.join(LAYOUTS)}, or None to infer it")
    arrays = list(_arrays(images, layout, convert_rgb, upright))
    if not arrays:
        raise UserError("no images were given; a PIL image, an array, or a list of them is needed")
    if any(array.dtype.kind in "iu" and array.max(initial=0) == 1 for array, _ in arrays):
        allowed = "if they are shares, give floats in [0, 1]; if they are black and white, give bools"
        warnings.warn(f"integer pixels are 0 and 1 only, nearly black on the scale of 0..255; {allowed}", stacklevel=2)
    up_to_one = all(array.max(initial=0) <= 1 for array, _ in arrays if array.dtype.kind == "f")
    batches = [_rgb(_bytes(array, up_to_one), place) for array, place in arrays]
    return batches, [up_to_one and array.dtype.kind == "f" for array, _ in arrays]


def _arrays(images, layout: str | None, convert_rgb: bool, upright: bool) -> Iterator[tuple[np.ndarray, str | None]]:
    """Walks nested lists and yields (array, layout), an image or a batch. A nested list of numbers is one array."""
    if isinstance(images, str | bytes | os.PathLike):
        raise UserError(f"{str(images)[:80]!r} is a name, not an image; open it first: PIL.Image.open(...)")
    if isinstance(images, Image.Image):
        yield _decoded(images, convert_rgb, upright), "channels_last"
    elif hasattr(images, "__array__"):
        yield _as_numpy(images), layout
    elif isinstance(images, list | tuple):
        innermost = images
        while isinstance(innermost, list | tuple) and len(innermost):
            innermost = innermost[0]
        if isinstance(innermost, int | float | np.generic):
            try:
                yield np.asarray(images), layout
                return
            except ValueError:  # the lists differ in length, and may be images of different sizes
                pass
        for image in images:
            yield from _arrays(image, layout, convert_rgb, upright)
    else:
        raise UserError(f"an image cannot be a {type(images).__name__}; give PIL images, arrays, or lists of numbers")


def _as_numpy(image) -> np.ndarray:
    if hasattr(image, "detach"):  # a torch tensor, which may track gradients or be on another device
        image = image.detach().cpu()
    try:
        return np.asarray(image)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"a {type(image).__name__} cannot be read as a numpy array: {error}") from None


def _decoded(image: Image.Image, convert_rgb: bool, upright: bool) -> np.ndarray:
    """A PIL image as uint8 [H, W, 3 or 4]. One of more than 8 bits per channel as [H, W], with its values unchanged."""
    try:
        if upright and (turn := UPRIGHT.get(orientation(image))) is not None:
            image = image.transpose(turn)
        if image.mode.startswith(("I", "F")):  # more than 8 bits per channel: I, I;16, I;16B and so on, and F
            numbers = np.asarray(image)
            # Pillow opens some 16-bit files in its 32-bit mode.
            deep = image.mode == "I" and numbers.size and numbers.min() >= 0 and 255 < numbers.max() <= 65535
            return numbers.astype(np.uint16) if deep else numbers
        if image.mode == "RGB" and not (convert_rgb and "transparency" in image.info):
            return np.asarray(image)
        if image.mode == "La":  # Pillow can convert La only to LA
            image = image.convert("LA")
        transparent = image.mode.endswith(("A", "a")) or image.info.get("transparency") is not None
        return np.asarray(image.convert("RGBA" if transparent else "RGB"))
    except (OSError, ValueError, SyntaxError) as error:  # PIL decodes a file only when its pixels are requested
        raise UserError(f"a PIL image of mode {image.mode} cannot be read as RGB: {error}") from None


def _bytes(pixels: np.ndarray, up_to_one: bool) -> np.ndarray:
    """Numbers of any type -> uint8 of the same shape. Numbers out of range are not clipped, but raise UserError."""
    kind = pixels.dtype.kind
    if pixels.dtype == np.uint8:
        return pixels
    if kind not in "biuf":
        raise UserError(f"pixels are {pixels.dtype}; integers, floats or bools are needed")
    if kind == "b":
        return pixels.astype(np.uint8) * np.uint8(255)
    if kind == "u" and pixels.dtype.itemsize == 2:
        return scale_to_bytes(pixels)
    if pixels.size and not (pixels.min() >= 0 and pixels.max() <= 255):
        allowed = "[0, 1], or whole numbers in 0..255" if kind == "f" else "0..255"
        raise UserError(f"pixels are {pixels.dtype} from {pixels.min()} to {pixels.max()}; scale them to {allowed}")
    if kind == "f":
        pixels = pixels.astype(np.float64)
        if up_to_one:
            return np.round(pixels * 255).astype(np.uint8)
        if not (pixels == np.round(pixels)).all():
            largest = pixels.max()
            raise UserError(f"floats up to {largest} have fractions; give all in [0, 1], or whole numbers in 0..255")
    return pixels.astype(np.uint8)


def _rgb(pixels: np.ndarray, layout: str | None) -> np.ndarray:
    """[H, W], or with layout "none" [N, H, W], or [(N,) C, H, W], or [(N,) H, W, C] -> [N, H, W, 3].

    Grey values are repeated for each channel. Transparent images get a white background.
    """
    shape = list(pixels.shape)
    grey = pixels.ndim == 2 or (pixels.ndim == 3 and layout == "none")
    if not (grey or pixels.ndim in (3, 4)) or (pixels.ndim == 4 and layout == "none"):
        raise UserError(f"an image array has shape {shape}; [H, W], [C, H, W], [H, W, C] or a 4-D batch is needed")
    if grey:
        pixels = pixels[..., None]
    elif layout is None and shape[-3] not in CHANNELS and shape[-1] not in CHANNELS:
        raise UserError(f"no axis of {shape} has 1, 3 or 4 channels; for grey images give input_data_format='none'")
    elif layout == "channels_first" or (layout is None and shape[-3] in CHANNELS):
        pixels = np.moveaxis(pixels, -3, -1)
    if pixels.shape[-1] not in CHANNELS:
        raise UserError(f"with {layout}, shape {shape} has {pixels.shape[-1]} channels; 1, 3 or 4 are allowed")
    if 0 in shape:
        raise UserError(f"an image array has shape {shape}, and so no pixels")
    pixels = pixels if pixels.ndim == 4 else pixels[None]
    if pixels.shape[-1] == 1:
        return np.repeat(pixels, 3, axis=-1)
    return lay_on_white(pixels) if pixels.shape[-1] == 4 else pixels
