"""Hugging Face's documented ImageGPT image processor: images to tokens, or to normalised pixel values.

Images are resized, rescaled, normalised and quantised. Every step after the resize depends only on a byte and its
channel. So pixel values are looked up among 256 x 3 floats, and tokens in a `ColorTable`.
Source: the PIL processor of transformers 5.23. Pixel values equal its values bit for bit. Tokens may differ only if two
clusters are almost equally near: transformers expands the distance in float32, and this module computes it in float64.
"""

import difflib
import functools
import json
import math
import reprlib
from pathlib import Path
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
from PIL import Image

from igpt.color_table import BYTE_LEVELS, MAX_COLORS, ColorTable
from igpt.errors import UserError
from igpt.files import read_json, write_text
from igpt.interop.hub import resolve
from igpt.interop.pixels import rgb_batches
from igpt.palette import Palette

FILE_NAME = "preprocessor_config.json"
MAX_PIXELS = 1 << 24  # pixels per resized image
MAX_NUMBER = float(np.finfo(np.float32).max)  # a limit for settings, because pixel values are float32
TYPES = {  # field -> the names of this processor in files of all versions
    "image_processor_type": ("ImageGPTImageProcessor", "ImageGPTImageProcessorFast", "ImageGPTImageProcessorPil"),
    "feature_extractor_type": ("ImageGPTFeatureExtractor",),
}


class BatchFeature(dict):
    """The result of a processor: a dict whose keys are also attributes."""

    def __getattr__(self, name: str):
        if name in self:
            return self[name]
        raise AttributeError(f"there is no {name!r}, only {', '.join(self)}")


class ImageGPTImageProcessor:
    """Images of any kind -> `input_ids` [B, H * W], or `pixel_values` [B, 3, H, W] without do_color_quantize.

    clusters [V, 3]: the palette, in the units of normalised pixels ([-1, 1] by default). size: {"height", "width"}, a
    number or (height, width); images are stretched to it. resample: a filter of PIL, by enum or number. image_mean,
    image_std: a number or three. do_convert_rgb: images always become RGB; True also turns the colour white that an
    RGB file marks as transparent. A setting that is None has the default in SETTINGS. `extra` keeps unknown settings,
    and to_dict returns them. Raises UserError, which names the setting, for an invalid value.
    """

    model_input_names = ("input_ids",)

    def __init__(
        self,
        clusters=None,
        do_resize=True,
        size=None,
        resample=Image.Resampling.BILINEAR,
        do_rescale=True,
        rescale_factor=1 / 255,
        do_normalize=True,
        image_mean=None,
        image_std=None,
        do_color_quantize=True,
        do_convert_rgb=None,
        **extra,
    ):
        given = locals()
        for name in SETTINGS:
            setattr(self, name, checked(name, given[name]))
        for name in extra:
            if similar := difflib.get_close_matches(name, SETTINGS, n=1, cutoff=0.85):
                raise UserError(f"the image processor has no {name!r}; did you mean {similar[0]!r}?")
        self.extra = extra

    def __call__(self, images, **overrides) -> BatchFeature:
        return self.preprocess(images, **overrides)

    def preprocess(
        self,
        images,
        do_resize=None,
        size=None,
        resample=None,
        do_rescale=None,
        rescale_factor=None,
        do_normalize=None,
        image_mean=None,
        image_std=None,
        do_color_quantize=None,
        clusters=None,
        return_tensors=None,
        data_format="channels_first",
        input_data_format=None,
        do_convert_rgb=None,
    ) -> BatchFeature:
        """Returns tokens (int64) or pixel values (float32). In this call, arguments that are not None replace settings.

        images: see `pixels.rgb_batches`; floats in [0, 1] are rounded to bytes, and count as already rescaled.
        return_tensors: None (a list of numpy arrays), "np", "jax" (int32 unless JAX's x64 is on) or "pt".
        data_format: the position of the channels in pixel_values, "channels_first" or "channels_last".
        """
        given = locals()
        chosen = {name: getattr(self, name) if given[name] is None else given[name] for name in SETTINGS}
        settings = SimpleNamespace(**{name: checked(name, value) for name, value in chosen.items()})
        if settings.do_color_quantize and settings.clusters is None:
            raise UserError("do_color_quantize is True without clusters; give them [V, 3], or do_color_quantize=False")
        if data_format not in ("channels_first", "channels_last"):
            raise UserError(f"data_format is {data_format!r}; choose channels_first or channels_last")
        batches, rescaled = rgb_batches(images, input_data_format, bool(settings.do_convert_rgb))
        scale = settings.rescale_factor if settings.do_rescale else 1.0
        if not settings.do_rescale and any(rescaled):
            if not all(rescaled):
                raise UserError("floats in [0, 1] and integers in one call need do_rescale=True, or two calls")
            scale = 1 / 255
        if settings.do_resize:
            batches = [_resized(batch, settings) for batch in batches]
        if len({batch.shape[1:] for batch in batches}) == 1:
            batches = [np.concatenate(batches)] if len(batches) > 1 else batches
        elif return_tensors is not None:
            raise UserError("the images differ in size; give do_resize=True for a tensor, or return_tensors=None")
        if settings.do_color_quantize:
            table = _color_table(settings.clusters.tobytes(), _levels(settings, scale).tobytes())
            tokens = [table.encode(batch, np.int64).reshape(len(batch), -1) for batch in batches]
            return BatchFeature(input_ids=_returned(tokens, return_tensors))
        values = [_pixel_values(batch, settings, scale, data_format) for batch in batches]
        return BatchFeature(pixel_values=_returned(values, return_tensors))

    def palette(self) -> Palette:
        """The clusters as a palette. Raises UserError if there are none, or if they are not in [-1, 1]."""
        if self.clusters is None:
            raise UserError("this image processor has no clusters, and so no palette; give clusters [V, 3]")
        return Palette(checked("clusters", self.clusters))

    @classmethod
    def from_pretrained(cls, ref, *, revision=None, **overrides) -> "ImageGPTImageProcessor":
        """Reads preprocessor_config.json. `ref` is that file, its directory, or a hub id with a `revision`."""
        path = Path(ref) if Path(ref).is_file() else resolve(ref, revision) / FILE_NAME
        settings = read_json(path)
        try:
            return cls.from_dict(settings, **overrides)
        except UserError as error:
            raise UserError(f"{path}: {error}") from None

    @classmethod
    def from_dict(cls, settings, **overrides) -> "ImageGPTImageProcessor":
        """Reads a dict that `to_dict` or any version of transformers wrote. UserError if it is of another processor.

        `overrides` replace settings. Unknown names in `settings` are kept, but unknown overrides are an error.
        """
        if not isinstance(settings, dict):
            raise UserError(f"an image processor's settings are a JSON object, not a {type(settings).__name__}")
        for field, names in TYPES.items():
            if settings.get(field) not in (None, *names):
                raise UserError(f"{field} is {settings[field]!r}, another processor's; {names[0]!r} is needed")
        if unknown := set(overrides) - set(SETTINGS):
            raise UserError(f"there is no setting {', '.join(sorted(unknown))}; choose from {', '.join(SETTINGS)}")
        naming = (*TYPES, "processor_class")
        return cls(**{name: value for name, value in settings.items() if name not in naming} | overrides)

    def to_dict(self) -> dict:
        """Every setting as a JSON value. do_convert_rgb and clusters are left out if they are None."""
        named = {name: value for name in SETTINGS if (value := checked(name, getattr(self, name))) is not None}
        if self.clusters is not None:
            named["clusters"] = named["clusters"].tolist()
        return self.extra | named | {"image_processor_type": "ImageGPTImageProcessor"}

    def to_json_string(self) -> str:
        """The text of preprocessor_config.json."""
        try:
            return json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n"
        except TypeError as error:
            raise UserError(f"the image processor's extra settings cannot be written as JSON: {error}") from None

    def save_pretrained(self, directory) -> list[str]:
        """Writes preprocessor_config.json, which transformers can read. Returns a list with its path."""
        path = Path(directory) / FILE_NAME
        text = self.to_json_string()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except FileExistsError:
            raise UserError(f"{directory} is a file; name a directory to save into") from None
        write_text(path, text)
        return [str(path)]

    def __eq__(self, other) -> bool:
        return isinstance(other, ImageGPTImageProcessor) and self.to_dict() == other.to_dict()

    __hash__ = None

    def __repr__(self) -> str:
        colors = "no clusters" if self.clusters is None else f"{len(self.clusters)} clusters"
        shown = {name: value for name, value in self.to_dict().items() if name != "clusters" and name in SETTINGS}
        changed = "".join(f", {name}={value}" for name, value in shown.items() if value != checked(name, None))
        return f"{type(self).__name__}({colors}{changed})"


def _resized(batch: np.ndarray, settings) -> np.ndarray:
    height, width = settings.size["height"], settings.size["width"]
    if batch.shape[1:3] == (height, width):  # no need to resize: PIL would copy the images unchanged
        return batch
    images = (Image.fromarray(image).resize((width, height), settings.resample) for image in batch)
    return np.stack([np.asarray(image) for image in images])


def _levels(settings, scale: float) -> np.ndarray:
    """The pixel value of each byte in each channel, float64 [256, 3]. Default settings give exactly BYTE_LEVELS."""
    if settings.do_normalize and scale == 1 / 255 and settings.image_mean == settings.image_std == [0.5] * 3:
        return BYTE_LEVELS
    levels = np.repeat(np.arange(256.0)[:, None] * scale, 3, axis=1)
    return (levels - settings.image_mean) / settings.image_std if settings.do_normalize else levels


@functools.lru_cache(maxsize=4)  # each table takes 32 MB
def _color_table(centers: bytes, levels: bytes) -> ColorTable:
    return ColorTable(np.frombuffer(centers).reshape(-1, 3), np.frombuffer(levels).reshape(256, 3))


def _pixel_values(batch: np.ndarray, settings, scale: float, data_format: str) -> np.ndarray:
    """uint8 [N, H, W, 3] -> float32. Rounds to float32 after each step of the arithmetic, like transformers."""
    levels = np.repeat((np.arange(256.0) * scale).astype(np.float32)[:, None], 3, axis=1)
    if settings.do_normalize:
        levels = (levels - np.float32(settings.image_mean)) / np.float32(settings.image_std)
    channels = [levels[:, channel][batch[..., channel]] for channel in range(3)]
    return np.stack(channels, axis=1 if data_format == "channels_first" else -1)


def _returned(batches: list[np.ndarray], kind: str | None):
    """Converts batches to tensors of `kind`. If `kind` is None, returns a list; only then may image sizes differ."""
    if kind is None:
        return [image for batch in batches for image in batch]
    if kind == "np":
        return batches[0]
    if kind == "jax":
        return jnp.asarray(batches[0])
    if kind == "pt":
        try:  # torch is optional: nothing else in this module needs it
            import torch
        except ImportError:
            raise UserError("return_tensors='pt' needs torch: pip install torch") from None
        return torch.from_numpy(batches[0])
    raise UserError(f"return_tensors is {kind!r}; choose None, 'np', 'jax' or 'pt'")


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
