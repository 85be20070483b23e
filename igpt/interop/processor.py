"""Hugging Face's documented ImageGPT image processor: images to tokens, or to normalised pixel values.

Images are resized, rescaled, normalised and quantised. Every step after the resize depends only on a byte and its
channel. So pixel values are looked up among 256 x 3 floats, and tokens in a `ColorTable`.
Source: the PIL processor of transformers 5.24. Pixel values equal its values bit for bit. Tokens may differ only if two
clusters are almost equally near: transformers expands the distance in float32, and this module computes it in float64.
"""

import difflib
import functools
import json
import warnings
from pathlib import Path
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
from PIL import Image

from igpt.color_table import BYTE_LEVELS, ColorTable
from igpt.errors import UserError
from igpt.files import read_json, write_text
from igpt.interop.documented import OF_FETCHING, OF_UPLOADING, check_refused, fetching, folder_to_save
from igpt.interop.hub import PROCESSOR, resolve
from igpt.interop.pixels import rgb_batches
from igpt.interop.processor_settings import REFUSED, SETTINGS, checked
from igpt.palette import Palette, other_units

TYPES = tuple(  # the names of this processor in files of all versions
    f"ImageGPT{name}" for name in ("ImageProcessor", "ImageProcessorFast", "ImageProcessorPil", "FeatureExtractor")
)
CALL = {"data_format": "channels_first", "return_tensors": None, "input_data_format": None}  # and the defaults
TYPE_FIELDS = ("image_processor_type", "feature_extractor_type")


class BatchFeature(dict):
    """The result of a processor: a dict whose keys are also attributes."""

    def __getattr__(self, name: str):
        if name in self:
            return self[name]
        raise AttributeError(f"there is no {name!r}, only {', '.join(self)}")

    @property
    def data(self) -> dict:
        return dict(self)

    def to(self, *args, **kwargs) -> "BatchFeature":
        """Moves PyTorch's tensors with their own `to`, and returns itself. Other arrays stay: JAX places its own."""
        for name, value in self.items():
            if hasattr(value, "is_floating_point"):  # integers keep their type, as in transformers
                given = args if value.is_floating_point() else [x for x in args if "dtype" not in type(x).__name__]
                options = {key: x for key, x in kwargs.items() if key != "dtype" or value.is_floating_point()}
                self[name] = value.to(*given, **options) if given or options else value
        return self


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
        do_normalize=True,
        do_color_quantize=True,
        *,
        do_rescale=True,
        rescale_factor=1 / 255,
        image_mean=None,
        image_std=None,
        do_convert_rgb=None,
        **extra,
    ):
        given = locals()
        check_refused("the image processor", extra, REFUSED)
        for name in SETTINGS:
            setattr(self, name, checked(name, given[name]))
        for name in extra:
            if similar := difflib.get_close_matches(name, SETTINGS, n=1, cutoff=0.85):
                raise UserError(f"the image processor has no {name!r}; did you mean {similar[0]!r}?")
        self.extra = extra

    def __call__(self, images, *args, **overrides) -> BatchFeature:
        return self.preprocess(images, *args, **overrides)

    def preprocess(
        self,
        images,
        do_resize=None,
        size=None,
        resample=None,
        do_normalize=None,
        do_color_quantize=None,
        clusters=None,
        return_tensors=None,
        data_format=None,
        input_data_format=None,
        *,
        do_rescale=None,
        rescale_factor=None,
        image_mean=None,
        image_std=None,
        do_convert_rgb=None,
        **refused,
    ) -> BatchFeature:
        """Returns tokens (int64) or pixel values (float32). In this call, arguments that are not None replace settings.

        Arguments have the order of transformers 4, whose page lists them; those of transformers 5 have names only.
        images: see `pixels.rgb_batches`; floats in [0, 1] are rounded to bytes, and count as already rescaled.
        return_tensors: None (a list of numpy arrays), "np", "jax" (int32 unless JAX's x64 is on) or "pt".
        data_format: the position of the channels in pixel_values, "channels_first" (the default) or "channels_last".
        """
        given = locals()
        check_refused("preprocess", refused, REFUSED, known=(*SETTINGS, *CALL))
        data_format, return_tensors, input_data_format = (
            next((value for value in (given[name], self.extra.get(name)) if value is not None), default)
            for name, default in CALL.items()
        )
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
            levels = _levels(settings, scale)
            table = _color_table(settings.clusters.tobytes(), levels.tobytes())
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
    def from_pretrained(cls, ref, **overrides) -> "ImageGPTImageProcessor | tuple":
        """Reads preprocessor_config.json. `ref` is that file, its directory, or a hub id; only that file is fetched.

        `overrides`: revision, subfolder and the other arguments of FETCHING, and those of `from_dict`.
        """
        where = fetching(overrides)
        path = Path(ref) if Path(ref).is_file() else resolve(ref, files=[PROCESSOR], **where) / PROCESSOR
        overrides = check_refused("the image processor's from_pretrained", overrides, OF_FETCHING)
        settings = read_json(path)
        try:
            return cls.from_dict(settings, **overrides)
        except UserError as error:
            raise UserError(f"{path}: {error}") from None

    @classmethod
    def from_dict(cls, settings, **overrides) -> "ImageGPTImageProcessor | tuple":
        """Reads a dict that `to_dict` or any version of transformers wrote. UserError if it is of another processor.

        `overrides` replace settings. Unknown names in `settings` are kept, but unknown overrides are an error, or with
        return_unused_kwargs=True the second result.
        """
        if not isinstance(settings, dict):
            raise UserError(f"an image processor's settings are a JSON object, not a {type(settings).__name__}")
        for field in TYPE_FIELDS:
            if settings.get(field) not in (None, *TYPES):
                raise UserError(f"{field} is {settings[field]!r}, another processor's; {TYPES[0]!r} is needed")
        return_unused = overrides.pop("return_unused_kwargs", False)
        overrides = check_refused("the image processor", overrides, REFUSED)
        unused = {name: overrides.pop(name) for name in overrides.keys() - SETTINGS.keys()}
        if unused and not return_unused:
            raise UserError(f"there is no setting {', '.join(sorted(unused))}; choose from {', '.join(SETTINGS)}")
        naming = (*TYPE_FIELDS, "processor_class", "self")  # "self" would be no setting, but our own first argument
        made = cls(**{name: value for name, value in settings.items() if name not in naming} | overrides)
        return (made, unused) if return_unused else made

    @classmethod
    def from_json_file(cls, path) -> "ImageGPTImageProcessor":
        """Reads a file of `to_json_file` or of transformers."""
        return cls.from_dict(read_json(Path(path)))

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

    def to_json_file(self, path) -> None:
        """Writes the text of `to_json_string`."""
        write_text(path, self.to_json_string())

    def save_pretrained(self, directory, push_to_hub: bool = False) -> list[str]:
        """Writes preprocessor_config.json, which transformers can read. Returns a list with its path."""
        check_refused("save_pretrained", {"push_to_hub": push_to_hub}, OF_UPLOADING)
        text = self.to_json_string()
        path = folder_to_save(directory) / PROCESSOR
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
    """The table of clusters and of the pixel value of each byte. Warns if they are not in the same units."""
    clusters, values = np.frombuffer(centers).reshape(-1, 3), np.frombuffer(levels).reshape(256, 3)
    low, high, span = values.min(), values.max(), np.ptp(values) or 1.0
    least, most = clusters.min(), clusters.max()
    outside = least < low - 0.1 * span or most > high + 0.1 * span  # clusters are means of pixels
    scaled = 2 * (least - low) / span - 1, 2 * (most - low) / span - 1
    if outside or (len(clusters) > 1 and (most - least < 0.1 * span or other_units(*scaled))):
        found = f"the clusters lie in [{least:.3g}, {most:.3g}], pixel values in [{low:.3g}, {high:.3g}]"
        remedy = "convert the clusters, or correct do_rescale, do_normalize, image_mean and image_std"
        warnings.warn(f"{found}: they seem to be in other units; {remedy}", stacklevel=3)
    return ColorTable(clusters, values)


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
