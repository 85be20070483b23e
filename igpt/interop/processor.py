"""Images -> resized, rescaled, normalised, quantised: Hugging Face's documented ImageGPT image processor, exactly.

Every step after the resize is a function of a byte and its channel, so pixel values are a lookup among 256 x 3 floats
and tokens a lookup in a `ColorTable`. Pixel values equal those of transformers' PIL processor (5.23) bit for bit. So do
tokens, but for near ties: there the distance is expanded, with pixels rounded to float32; here it is float64.
"""

import difflib
import functools
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from PIL import Image

from igpt.errors import UserError
from igpt.files import read_json, write_text
from igpt.interop.hub import resolve
from igpt.interop.pixels import rgb_batches
from igpt.interop.processor_settings import SETTINGS, checked
from igpt.palette import BYTE_LEVELS, ColorTable, Palette

FILE_NAME = "preprocessor_config.json"
TYPES = {  # every spelling that names this processor, in files old and new
    "image_processor_type": ("ImageGPTImageProcessor", "ImageGPTImageProcessorFast", "ImageGPTImageProcessorPil"),
    "feature_extractor_type": ("ImageGPTFeatureExtractor",),
}


class BatchFeature(dict):
    """What a processor returns: a dict whose keys are attributes too."""

    def __getattr__(self, name: str):
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"there is no {name!r} here, only {', '.join(self)}") from None


class ImageGPTImageProcessor:
    """Images of any kind -> `input_ids` [B, H * W], or `pixel_values` [B, 3, H, W] without do_color_quantize.

    clusters [V, 3]: the palette, in the units of normalised pixels ([-1, 1] by default). size: {"height", "width"}, a
    number or (height, width); the aspect ratio is not kept. resample: a filter of PIL, by enum or number. image_mean,
    image_std: a number or three. do_convert_rgb: whatever it is, all other modes become RGB; True also lays on white
    the colour that an RGB file names transparent. None means the default. Other names are kept in `extra`, and
    to_dict gives them back.
    Raises UserError for a value that cannot be meant, naming it.
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
        self.clusters = checked("clusters", clusters)
        self.do_resize = checked("do_resize", do_resize)
        self.size = checked("size", size)
        self.resample = checked("resample", resample)
        self.do_rescale = checked("do_rescale", do_rescale)
        self.rescale_factor = checked("rescale_factor", rescale_factor)
        self.do_normalize = checked("do_normalize", do_normalize)
        self.image_mean = checked("image_mean", image_mean)
        self.image_std = checked("image_std", image_std)
        self.do_color_quantize = checked("do_color_quantize", do_color_quantize)
        self.do_convert_rgb = checked("do_convert_rgb", do_convert_rgb)
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
        """Tokens int64 or pixel values float32 of a batch; what is not None overrides a setting for this call.

        images: see `pixels.rgb_batches`; floats in [0, 1] count as rescaled already, whatever do_rescale is, and are
        rounded to bytes. return_tensors: None (a list of numpy arrays), "np", "jax" (int32 unless JAX's x64 is on),
        "pt" or "tf". data_format: where pixel_values has its channels.
        """
        given = locals()
        chosen = {name: getattr(self, name) if given.get(name) is None else given[name] for name in SETTINGS}
        settings = SimpleNamespace(**{name: checked(name, value) for name, value in chosen.items()})
        if settings.do_color_quantize and settings.clusters is None:
            raise UserError(
                "do_color_quantize is True without clusters; give clusters [V, 3] or do_color_quantize=False"
            )
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
            raise UserError(
                "the images differ in size; a tensor needs do_resize=True, or return_tensors=None for a list"
            )
        if settings.do_color_quantize:
            table = _color_table(settings.clusters.tobytes(), _levels(settings, scale).tobytes())
            tokens = [table.encode(batch, np.int64).reshape(len(batch), -1) for batch in batches]
            return BatchFeature(input_ids=_returned(tokens, return_tensors))
        values = [_pixel_values(batch, settings, scale, data_format) for batch in batches]
        return BatchFeature(pixel_values=_returned(values, return_tensors))

    def palette(self) -> Palette:
        """The clusters as this library's tokenizer; UserError where they do not lie in [-1, 1]."""
        if self.clusters is None:
            raise UserError("this image processor has no clusters, so there is no palette in it")
        return Palette(checked("clusters", self.clusters))

    @classmethod
    def from_pretrained(cls, ref, *, revision=None, **overrides) -> "ImageGPTImageProcessor":
        """Reads preprocessor_config.json from a directory, that file itself, or a hub id (at a `revision`)."""
        path = Path(ref)
        if not path.exists():
            path = Path(resolve(ref, revision))
        if path.is_dir():
            path = path / FILE_NAME
        settings = read_json(path)
        try:
            return cls.from_dict(settings, **overrides)
        except UserError as error:
            raise UserError(f"{path}: {error}") from None

    @classmethod
    def from_dict(cls, settings, **overrides) -> "ImageGPTImageProcessor":
        """What to_dict gave, or a file of any transformers version; UserError for another processor's.

        Only files may name what is unknown here, and keep it; an override has to be a setting.
        """
        if not isinstance(settings, dict):
            raise UserError(f"an image processor's settings are a JSON object, not a {type(settings).__name__}")
        for field, names in TYPES.items():
            if settings.get(field) not in (None, *names):
                raise UserError(f"{field} is {settings[field]!r}, another processor's; {names[0]!r} is needed")
        if unknown := set(overrides) - set(SETTINGS):
            raise UserError(f"{', '.join(sorted(unknown))}: no such setting; there are {', '.join(SETTINGS)}")
        naming = (*TYPES, "processor_class")
        return cls(**{name: value for name, value in settings.items() if name not in naming} | overrides)

    def to_dict(self) -> dict:
        """Every setting as JSON has it. do_convert_rgb and clusters are left out while they are None."""
        named = {name: checked(name, getattr(self, name)) for name in SETTINGS}
        if self.clusters is not None:
            named["clusters"] = named["clusters"].tolist()
        named = {name: value for name, value in named.items() if value is not None}
        return self.extra | named | {"image_processor_type": "ImageGPTImageProcessor"}

    def to_json_string(self) -> str:
        try:
            return json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n"
        except TypeError as error:
            raise UserError(f"the image processor's extra settings cannot be written as JSON: {error}") from None

    def save_pretrained(self, directory) -> list[str]:
        """Writes preprocessor_config.json, whole or not at all; transformers reads it. Returns its path in a list."""
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


ImageGPTFeatureExtractor = ImageGPTImageProcessor  # its older name, gone from transformers 5


def _resized(batch: np.ndarray, settings) -> np.ndarray:
    height, width = settings.size["height"], settings.size["width"]
    if batch.shape[1:3] == (height, width):  # PIL, too, would only copy it
        return batch
    images = (Image.fromarray(image).resize((width, height), settings.resample) for image in batch)
    return np.stack([np.asarray(image) for image in images])


def _levels(settings, scale: float) -> np.ndarray:
    """What each byte stands for in each channel, float64 [256, 3]; by default exactly the palette's levels."""
    if settings.do_normalize and scale == 1 / 255 and settings.image_mean == settings.image_std == [0.5] * 3:
        return BYTE_LEVELS
    levels = np.repeat(np.arange(256.0)[:, None] * scale, 3, axis=1)
    return (levels - settings.image_mean) / settings.image_std if settings.do_normalize else levels


@functools.lru_cache(maxsize=4)  # 32 MB each
def _color_table(centers: bytes, levels: bytes) -> ColorTable:
    return ColorTable(np.frombuffer(centers).reshape(-1, 3), np.frombuffer(levels).reshape(256, 3))


def _pixel_values(batch: np.ndarray, settings, scale: float, data_format: str) -> np.ndarray:
    """uint8 [N, H, W, 3] -> float32, rounded where transformers rounds: after rescaling and after each step."""
    levels = np.repeat((np.arange(256.0) * scale).astype(np.float32)[:, None], 3, axis=1)
    if settings.do_normalize:
        levels = (levels - np.float32(settings.image_mean)) / np.float32(settings.image_std)
    values = np.empty((len(batch), 3, *batch.shape[1:3]), np.float32)
    for channel in range(3):
        values[:, channel] = levels[:, channel][batch[..., channel]]
    return values if data_format == "channels_first" else np.ascontiguousarray(np.moveaxis(values, 1, -1))


def _returned(batches: list[np.ndarray], kind: str | None):
    """Batches in the container that was asked for; only a list can hold images of several sizes."""
    match kind:
        case None:
            return [image for batch in batches for image in batch]
        case "np":
            return batches[0]
        case "jax":
            import jax.numpy as jnp

            return jnp.asarray(batches[0])
        case "pt" | "tf":
            package = {"pt": "torch", "tf": "tensorflow"}[str(getattr(kind, "value", kind))]
            try:  # neither is needed for anything else here, so neither need be installed
                if kind == "pt":
                    import torch

                    return torch.from_numpy(batches[0])
                import tensorflow

                return tensorflow.constant(batches[0])
            except ImportError:
                raise UserError(f"return_tensors={kind!r} needs {package}: pip install {package}") from None
    raise UserError(f"return_tensors is {kind!r}; choose None, 'np', 'jax', 'pt' or 'tf'")
