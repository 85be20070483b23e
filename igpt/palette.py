"""uint8 colours <-> palette tokens (Chen et al. 2020, section 3.1: k-means on RGB, 512 colours in the paper).

    igpt palette --source=folder:photos --colors=512 --out=palette.npy

A palette is V centres in [-1, 1]^3, where byte b stands for b / 127.5 - 1. A token is the index of the nearest
centre. Images are [..., H, W, 3] uint8 and tokens are [..., H, W] integers; a reshape gives the raster order.
"""

import functools
import hashlib
import warnings

import numpy as np

from igpt.color_table import BYTE_LEVELS, MAX_COLORS, ColorTable
from igpt.errors import UserError, first_line
from igpt.files import AnyPath, open_binary, whole, write_array


class Palette:
    """Turns images into tokens and back. Raises UserError if `centers` has a wrong shape, type or range.

    Warns if the centres fill only a part of [-1, 1] that other units fill: then they may be of those units.
    """

    file, kind, noun, bits_name = "palette.npy", "palette", "colours", "bits_per_dim"  # see igpt/tokenizer.py
    place, is_per_pixel, uses_all_cores = "pixel", True, False

    def __init__(self, centers: np.ndarray):
        centers = np.asarray(centers)
        if centers.ndim != 2 or centers.shape[1] != 3 or not 1 <= len(centers) <= MAX_COLORS:
            raise UserError(f"a palette has shape [V, 3] with V from 1 to {MAX_COLORS}, not {list(centers.shape)}")
        if centers.dtype.kind != "f" or not (np.abs(centers) <= 1.0).all():
            given = f" from {np.min(centers)} to {np.max(centers)}" if centers.dtype.kind in "fiu" else ""
            bytes_given = given and np.min(centers) >= 0 and np.max(centers) <= 255
            remedy = "; convert bytes with centers / 127.5 - 1" if bytes_given else ""
            allowed = "floats in [-1, 1] (byte / 127.5 - 1)"
            raise UserError(f"palette centres are {allowed}, not {centers.dtype}{given}{remedy}")
        if doubt := other_units(float(centers.min()), float(centers.max())):
            warnings.warn(f"-1 is black and 1 is white in a palette, but {doubt}", stacklevel=2)
        self.centers = centers.astype(np.float32, order="C")  # transposed arrays keep their order otherwise
        self._table = ColorTable(self.centers, BYTE_LEVELS)

    @property
    def vocab_size(self) -> int:
        return len(self.centers)

    @property
    def colors(self) -> np.ndarray:
        """The colours as bytes, uint8 [V, 3]."""
        return self.decode(np.arange(self.vocab_size))

    @property
    def content(self) -> np.ndarray:
        return self.centers

    @functools.cached_property
    def digest(self) -> str:
        return hashlib.sha256(self.centers.tobytes()).hexdigest()

    def fields(self, path) -> dict:
        """The fields of a configuration whose network reads these tokens, from the tokenizer at `path`."""
        return {"palette.colors": self.vocab_size}

    @property
    def channels(self) -> int:
        """1 if every colour is grey, else 3."""
        return 1 if (self.centers == self.centers[:, :1]).all() else 3

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """The numbers of rows and columns of tokens for an image of this size. Every pixel becomes one token."""
        return height, width

    def encode(self, images: np.ndarray, dtype=np.int32) -> np.ndarray:
        """[..., 3] uint8 -> [...] integers: argmin over centres of the float64 squared distance. Ties: first centre."""
        images = np.asarray(images)
        if images.dtype != np.uint8 or images.shape[-1:] != (3,):
            remedy = ""
            if images.dtype.kind == "f" and images.size and images.min() >= 0 and images.max() <= 1:
                remedy = "; convert floats in [0, 1] with np.round(images * 255).astype(np.uint8)"
            raise UserError(f"encode takes uint8 images [..., 3], not {images.dtype} {list(images.shape)}{remedy}")
        return self._table.encode(images, dtype)

    def decode(self, tokens: np.ndarray) -> np.ndarray:
        """[...] int -> [..., 3] uint8: round(127.5 (c + 1)), halves rounded to even, as in OpenAI's src/run.py."""
        tokens = np.asarray(tokens)
        if tokens.dtype.kind not in "iu":
            raise UserError(f"tokens are {tokens.dtype}; whole numbers are needed, the indices of colours")
        if tokens.size and not (tokens.min() >= 0 and tokens.max() < self.vocab_size):
            raise UserError(f"tokens run from {tokens.min()} to {tokens.max()}; allowed are 0..{self.vocab_size - 1}")
        return np.round(127.5 * (self.centers.astype(np.float64) + 1.0)).astype(np.uint8)[tokens]

    def save(self, path: AnyPath | str) -> None:
        """Writes float32 [V, 3] as .npy. If it cannot write the whole file, it raises OSError and leaves no file."""
        with whole(path) as file:
            write_array(file, self.centers)

    @classmethod
    def load(cls, path: AnyPath | str) -> "Palette":
        """Reads a .npy file of shape [V, 3]: one that `save` wrote, or OpenAI's kmeans_centers.npy.

        Prints a warning if a colour repeats. Such a palette is allowed, but `encode` never uses the later copies.
        """
        try:
            with open_binary(path) as file:
                palette = cls(np.load(file, allow_pickle=False))
        except FileNotFoundError:
            raise UserError(f"there is no palette at {path}") from None
        except UserError as error:
            raise UserError(f"{path}: {error}") from None
        except Exception as error:  # a damaged header raises exceptions of many types, MemoryError among them
            problem = f"a .npy file of floats [V, 3] was expected ({first_line(error)})"
            raise UserError(f"{path} is not a palette: {problem}") from None
        if repeats := palette.vocab_size - len(np.unique(palette.centers, axis=0)):
            print(f"{path}: {repeats} of {palette.vocab_size} colours repeat earlier ones, and are never used")
        return palette


def other_units(least: float, most: float) -> str:
    """Why centres from `least` to `most` are probably not in units of [-1, 1], and how to convert them, or ""."""
    if least >= 0.0:
        doubt, remedy = "none is darker than grey", "if they are shares of 255, give 2 * centers - 1"
    elif max(-least, most) <= 0.5:
        doubt, remedy = "none is near black or white", "if they are byte / 255 - 0.5, give 2 * centers"
    else:
        return ""
    return f"these centres lie in [{least:.3g}, {most:.3g}], and {doubt}; {remedy}"
