"""Image files of strangers -> uint8 RGB at the model's size: decoded within bounds, then cropped and shrunk.

Sizes and crops of ImageNet: Chen et al. 2020, appendix A.1; of CIFAR: section 3.4. The paper does not name its filter.
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

from igpt.errors import UserError

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")  # the decoders that strangers' files may reach
MAX_PIXELS = 1 << 26  # of a file; with MAX_BYTES it keeps every decoder below 1 GB
MAX_WEBP_PIXELS = 1 << 25  # its decoder holds several copies
MAX_BYTES = 1 << 27
MAX_SCANNED = 1 << 36  # pixels times passes over them, of a progressive JPEG: some seconds
TILE = 2048  # larger images are converted in squares of this side, to keep the copies small
FILTERS = {filter.name.lower(): filter for filter in Image.Resampling}
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # by EXIF's orientation

# Pillow's remarks on odd metadata. Once for all: a filter around each call would be no thread's own.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")


class UnreadableImage(UserError):
    """An image that cannot be used. Its message names the file."""


def decode(content: bytes | Path, name: str, channels: int = 3) -> Image.Image:
    """A file's first frame, upright, in RGB (by way of grey where `channels` is 1; transparency is laid on white).

    Raises UnreadableImage for what is damaged, of no known format, or too large, before its pixels are decoded.
    """
    content = _read(content, name) if isinstance(content, Path) else content
    if len(content) > MAX_BYTES:
        raise UnreadableImage(f"{name} has {len(content):,} bytes; at most {MAX_BYTES:,} are opened: shrink it first")
    try:
        image = Image.open(io.BytesIO(content), formats=FORMATS)
        _check_bounds(image, content, name)
        image.load()
        upright = UPRIGHT.get(_orientation(image))
        image = _rgb(image, channels)
        return image if upright is None else image.transpose(upright)
    except (MemoryError, UserError):  # within these bounds, memory that runs out is not the file's fault
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):  # for sizes far above our own bound
        raise UnreadableImage(f"{name} is too large: at most {MAX_PIXELS:,} pixels are opened: shrink it") from None
    except UnidentifiedImageError:
        raise UnreadableImage(f"{name} cannot be read as an image: it is no {', '.join(FORMATS)} file") from None
    except Exception as error:  # decoders raise anything on damaged files
        reason = str(error) or type(error).__name__
        raise UnreadableImage(f"{name} cannot be read as an image, it is damaged: {reason}") from None


def _read(path: Path, name: str) -> bytes:
    """The content of a file; whole, as decoders believe a damaged header that asks for more than there is."""
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):  # a pipe would never end
            raise UnreadableImage(f"{name} is no file")
        if status.st_size > MAX_BYTES:
            raise UnreadableImage(
                f"{name} has {status.st_size:,} bytes; at most {MAX_BYTES:,} are opened: shrink it first"
            )
        return path.read_bytes()
    except FileNotFoundError:
        raise UnreadableImage(f"there is no image {name}") from None
    except OSError as error:
        raise UnreadableImage(f"{name} cannot be opened: {error.strerror}") from None


def _check_bounds(image: Image.Image, content: bytes, name: str) -> None:
    pixels = image.width * image.height
    most = MAX_WEBP_PIXELS if image.format == "WEBP" else MAX_PIXELS
    if pixels > most:
        raise UnreadableImage(
            f"{name} has {image.width} x {image.height} pixels; at most {most:,} are opened: shrink it first"
        )
    scans = content.count(b"\xff\xda")  # perhaps a few more, by chance, in what is no image data
    if image.format in ("JPEG", "MPO") and scans * pixels > MAX_SCANNED:
        raise UnreadableImage(f"{name} would be drawn in {scans} passes, which takes minutes: save it anew")


def _orientation(image: Image.Image) -> int | None:
    try:
        return image.getexif().get(ExifTags.Base.Orientation)
    except MemoryError:
        raise
    except Exception:  # damaged notes on sound pixels
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
    if image.mode.startswith("I"):  # 16 bits a pixel, which Pillow would clip and not scale
        grey = np.asarray(image).astype(np.int64)
        scaled = ((np.clip(grey, 0, 65535) + 128) // 257).astype(np.uint8)
        scaled[grey == image.info.get("transparency", -1)] = 255
        image = Image.fromarray(scaled)
    if image.mode.endswith(("A", "a")) or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("L").convert("RGB") if channels == 1 else image.convert("RGB")


@dataclasses.dataclass(frozen=True)
class Preprocess:
    """How an image becomes one of `size` (height, width). Raises UserError naming a field that makes no sense.

    kind "none": it has that size already. "shrink": the largest centred part of that aspect ratio, shrunk. "crop", as
    the paper treats ImageNet: in training the shorter side becomes a random length of `short_side`, a random square of
    `crop` is cut out and shrunk; in evaluation the shorter side becomes `crop` and the square is the centre's.
    """

    size: tuple[int, ...]  # height, width
    kind: str = "none"
    short_side: tuple[int, ...] = (256, 384)
    crop: int = 224
    filter: str = "bicubic"

    def __post_init__(self):
        if len(self.size) != 2 or min(self.size) < 1:
            raise UserError(f"data.image_size is {tuple(self.size)}; give height and width, such as (32, 32)")
        if self.kind not in ("none", "shrink", "crop"):
            raise UserError(f"data.preprocess is {self.kind!r}; choose none, shrink or crop")
        if self.filter not in FILTERS:
            raise UserError(f"data.filter is {self.filter!r}; choose one of {', '.join(FILTERS)}")
        if len(self.short_side) != 2 or not 1 <= self.crop <= self.short_side[0] <= self.short_side[1]:
            raise UserError(
                f"data.crop is {self.crop} and data.short_side {tuple(self.short_side)}; a crop must fit into the "
                "shorter side, whose least length comes first"
            )

    def __call__(self, image: Image.Image, draws: np.ndarray | None, name: str) -> np.ndarray:
        """uint8 [height, width, 3]. `draws`: three numbers in [0, 1) for a training crop, None for evaluation."""
        height, width = self.size
        resample = FILTERS[self.filter]
        match self.kind:
            case "none":
                if image.size != (width, height):
                    raise UnreadableImage(
                        f"{name} has {image.height} x {image.width} pixels, data.image_size is {height} x {width}; set "
                        "data.preprocess to shrink or crop"
                    )
            case "shrink":
                image = image.resize((width, height), resample, box=_centred(image.size, width / height))
            case "crop":
                image = self._square(image, draws).resize((width, height), resample)
        return np.asarray(image)

    def _square(self, image: Image.Image, draws) -> Image.Image:
        """The crop of the image that is resized first; but only what is cut out is computed."""
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
    """The largest centred box (left, top, right, bottom) of an aspect ratio width / height."""
    width, height = size
    if width > height * aspect:
        margin = (width - height * aspect) / 2
        return margin, 0, width - margin, height
    margin = (height - width / aspect) / 2
    return 0, margin, width, height - margin


def read_image(path: str, height: int, width: int, channels: int) -> np.ndarray:
    """An image file -> uint8 [height, width, 3]: its centre, cut to the aspect ratio and shrunk (bicubic)."""
    return Preprocess((height, width), "shrink")(decode(Path(path), path, channels), None, path)
