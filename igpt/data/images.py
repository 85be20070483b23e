"""Converts untrusted image files to uint8 RGB at the model's size: decodes them with limits, then crops and resizes.

Sizes and crops follow Chen et al. 2020: appendix A.1 for ImageNet, section 3.4 for CIFAR. The paper does not name its
resampling filter.
"""

import dataclasses
import io
import itertools
import os
import stat
import warnings
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from igpt.data.settings import FILTERS, DataConfig
from igpt.errors import UserError

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")  # untrusted files are never passed to Pillow's other decoders
MAX_PIXELS = 1 << 26  # pixels per image; MAX_PIXELS and MAX_BYTES keep the memory of every decoder below 1 GB
MAX_WEBP_PIXELS = 1 << 25  # lower than MAX_PIXELS, because the WebP decoder keeps several copies of an image
MAX_BYTES = 1 << 27  # bytes per file
MAX_SCANNED = 1 << 36  # pixels x scans of a progressive JPEG; decoding this many takes some seconds
TILE = 2048  # larger images are converted in squares of this side, so that temporary copies are small
TIFF_COMPRESSIONS = ("raw", "packbits", "tiff_lzw", "tiff_adobe_deflate", "tiff_deflate", "jpeg", "group3", "group4")
TILE_WIDTH, TILE_HEIGHT, BITS_PER_SAMPLE, SAMPLE_FORMAT, PHOTOMETRIC = 322, 323, 258, 339, 262  # tags of TIFF
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # EXIF orientation -> the operation that turns the image upright

# Silences Pillow's warnings about unusual metadata. Set here once, because all threads share the warning filters.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")


class UnreadableImage(UserError):
    """Raised for an image that cannot be used. The message names the file."""


def decode(content: bytes | Path, name: str, channels: int = 3) -> Image.Image:
    """Decodes the first frame of a file to upright RGB on a white background. With channels=1 the result is grey RGB.

    Raises UnreadableImage for files that are damaged, of another format, or too large. The size is checked before the
    pixels are decoded.
    """
    if isinstance(content, Path):
        content = _read(content, name)
    check_bytes(len(content), name)
    try:
        image = Image.open(io.BytesIO(content), formats=FORMATS)
        _check_bounds(image, content, name)
        _check_tiff(image, name)
        image.load()
        upright = UPRIGHT.get(orientation(image))
        image = _rgb(image, channels)
        return image if upright is None else image.transpose(upright)
    except (MemoryError, UserError):  # a file within the limits is not the cause of a MemoryError
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):  # Pillow's own limit is much higher
        raise UnreadableImage(f"{name} is too large; the limit is {MAX_PIXELS:,} pixels: shrink it first") from None
    except UnidentifiedImageError:
        raise UnreadableImage(f"{name} cannot be read as an image: it is no {', '.join(FORMATS)} file") from None
    except Exception as error:  # decoders may raise any exception for damaged files
        reason = str(error) or type(error).__name__
        raise UnreadableImage(f"{name} cannot be read as an image, it is damaged: {reason}") from None


def _read(path: Path, name: str) -> bytes:
    """Reads a whole file. Decoders that read in parts would trust a damaged header that announces too many bytes."""
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):  # reading a pipe might never end
            raise UnreadableImage(f"{name} is no file")
        check_bytes(status.st_size, name)
        return path.read_bytes()
    except FileNotFoundError:
        raise UnreadableImage(f"there is no image {name}") from None
    except OSError as error:
        raise UnreadableImage(f"{name} cannot be opened: {error.strerror}") from None


def check_bytes(count: int, name: str) -> None:
    """Raises UnreadableImage for an encoded image of more than MAX_BYTES bytes."""
    if count > MAX_BYTES:
        raise UnreadableImage(f"{name} has {count:,} bytes; the limit is {MAX_BYTES:,}: shrink it first")


def _check_bounds(image: Image.Image, content: bytes, name: str) -> None:
    pixels = image.width * image.height
    if image.format == "TIFF":  # a tile is decoded whole, and may be larger than the image
        pixels = max(pixels, image.tag_v2.get(TILE_WIDTH, 0) * image.tag_v2.get(TILE_HEIGHT, 0))
    most = MAX_WEBP_PIXELS if image.format == "WEBP" else MAX_PIXELS
    if pixels > most:
        size = f"{image.width} x {image.height}"
        raise UnreadableImage(f"{name} has {size} pixels; the limit is {most:,}: shrink it first")
    scans = content.count(b"\xff\xda")  # may be too high: metadata can contain these bytes by chance
    is_jpeg = image.format in ("JPEG", "MPO") or image.info.get("compression") == "jpeg"
    if is_jpeg and scans * pixels > MAX_SCANNED:
        raise UnreadableImage(f"{name} would be drawn in {scans} passes, which takes minutes: save it again")


def _check_tiff(image: Image.Image, name: str) -> None:
    """Raises UnreadableImage for a TIFF file whose values have no known scale, or that needs a rare decoder."""
    if image.format != "TIFF":
        return
    bits, kinds = image.tag_v2.get(BITS_PER_SAMPLE, (1,)), image.tag_v2.get(SAMPLE_FORMAT, (1,))
    kind = {1: "unsigned integers", 2: "signed integers", 3: "floats"}.get(kinds[0], "values of unknown kind")
    inverted = bits == (16,) and image.tag_v2.get(PHOTOMETRIC) == 0  # Pillow would not turn the values around
    if {*kinds} != {1} or not {*bits} <= {1, 2, 4, 8, 16} or inverted:
        found = f"{max(bits)}-bit {kind}{' where 0 is white' if inverted else ''}"
        raise UnreadableImage(f"{name} is a TIFF of {found}; save it with 8 or 16 bits, unsigned, where 0 is black")
    if (compression := image.info.get("compression")) not in TIFF_COMPRESSIONS:
        raise UnreadableImage(f"{name} is a TIFF compressed by {compression}; save it again, as LZW or Deflate")


def orientation(image: Image.Image) -> int | None:
    try:
        return image.getexif().get(ExifTags.Base.Orientation)
    except MemoryError:
        raise
    except Exception:  # the pixels can be read even if the metadata is damaged
        return None


def _rgb(image: Image.Image, channels: int) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info and channels == 3:
        return image
    width, height = image.size
    if max(width, height) <= TILE:
        return _convert(image, channels)
    whole = Image.new("RGB", image.size)
    for left, top in itertools.product(range(0, width, TILE), range(0, height, TILE)):
        tile = image.crop((left, top, min(left + TILE, width), min(top + TILE, height)))
        whole.paste(_convert(tile, channels), (left, top))
    return whole


def _convert(image: Image.Image, channels: int) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits per pixel: Pillow would clip the values instead of scaling them
        grey = np.asarray(image).astype(np.int64)
        scaled = scale_to_bytes(np.clip(grey, 0, 65535))
        scaled[grey == image.info.get("transparency", -1)] = 255
        image = Image.fromarray(scaled)
    if image.mode.endswith(("A", "a")) or "transparency" in image.info:
        image = Image.fromarray(lay_on_white(np.asarray(image.convert("RGBA"))))
    return image.convert("L").convert("RGB") if channels == 1 else image.convert("RGB")


def scale_to_bytes(values: np.ndarray) -> np.ndarray:
    """Integers from 0 to 65535 -> uint8 of the same shape, divided by 257 and rounded to the nearest."""
    return ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)


def lay_on_white(rgba: np.ndarray) -> np.ndarray:
    """uint8 [..., 4] -> uint8 [..., 3]: colours blended with white by their alpha, rounded to the nearest."""
    alpha = rgba[..., 3:].astype(np.uint16)
    return ((alpha * rgba[..., :3] + (255 - alpha) * 255 + 127) // 255).astype(np.uint8)


@dataclasses.dataclass(frozen=True)
class Preprocess:
    """Converts images to `size` (height, width).

    kind "none": images must have that size. "shrink": the largest centred part with the aspect ratio of `size` is
    resized. "crop": the paper's method for ImageNet. In training, the shorter side is resized to a random length within
    `short_side`, and a random square of side `crop` is cut out and resized. In evaluation, the shorter side is resized
    to `crop`, and the centred square is cut out and resized.
    """

    size: tuple[int, ...]  # height, width
    kind: str = "none"
    short_side: tuple[int, ...] = (256, 384)
    crop: int = 224
    filter: str = "bicubic"

    @classmethod
    def of(cls, settings: DataConfig) -> "Preprocess":
        return cls(settings.image_size, settings.preprocess, settings.short_side, settings.crop, settings.filter)

    def __call__(self, image: Image.Image, draws: np.ndarray | None, name: str) -> np.ndarray:
        """Returns uint8 [height, width, 3]. `draws`: three numbers in [0, 1) for a training crop, None in evaluation.

        Raises UnreadableImage if the kind is "none" and the image has another size.
        """
        height, width = self.size
        if self.kind == "shrink":
            image = image.resize((width, height), FILTERS[self.filter], box=_centred(image.size, width / height))
        elif self.kind == "crop":
            image = self._square(image, draws).resize((width, height), FILTERS[self.filter])
        elif image.size != (width, height):
            raise UnreadableImage(
                f"{name} has {image.height} x {image.width} pixels, data.image_size is {height} x {width}; set "
                "data.preprocess (or --preprocess) to shrink or crop"
            )
        return np.asarray(image)

    def _square(self, image: Image.Image, draws) -> Image.Image:
        """Resizes the image and cuts out a square. Only the pixels of the square are computed."""
        low, high = self.short_side
        short = self.crop if draws is None else low + int(draws[0] * (high - low + 1))
        scale = short / min(image.size)
        scaled = [max(short, round(side * scale)) for side in image.size]
        across_down = (0.5, 0.5) if draws is None else draws[1:]
        start = [int(at * (side - self.crop + 1)) for at, side in zip(across_down, scaled, strict=True)]
        end = [at + self.crop for at in start]
        box = [at * side / of for at, side, of in zip(start + end, image.size * 2, scaled * 2, strict=True)]
        return image.resize((self.crop, self.crop), FILTERS[self.filter], box=tuple(box))


def _centred(size: tuple[int, int], aspect: float) -> tuple[float, float, float, float]:
    """Returns the largest centred box (left, top, right, bottom) with an aspect ratio width / height."""
    width, height = size
    if width > height * aspect:
        margin = (width - height * aspect) / 2
        return margin, 0, width - margin, height
    margin = max(0.0, height - width / aspect) / 2  # rounding makes it negative where the aspect ratios are equal
    return 0, margin, width, height - margin


def read_image(path: str, settings: DataConfig) -> np.ndarray:
    """Reads an image file as uint8 [height, width, 3], preprocessed as for evaluation."""
    return Preprocess.of(settings)(decode(Path(path), path, settings.channels), None, path)
