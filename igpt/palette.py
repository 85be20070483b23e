"""uint8 colours <-> palette tokens (Chen et al. 2020, section 3.1: k-means on RGB, 512 colours in the paper).

    igpt palette --source=folder:photos --colors=512 --out=palette.npy

A palette is V centres in [-1, 1]^3, where byte b stands for b / 127.5 - 1. A token is the index of the nearest
centre. Images are [..., H, W, 3] uint8 and tokens are [..., H, W] integers; a reshape gives the raster order.
"""

from pathlib import Path

import numpy as np

from igpt.color_table import BYTE_LEVELS, MAX_COLORS, ColorTable
from igpt.errors import UserError
from igpt.files import expand_home, whole, write_array


class Palette:
    """Turns images into tokens and back. Raises UserError if `centers` has a wrong shape, type or range."""

    def __init__(self, centers: np.ndarray):
        centers = np.asarray(centers)
        if centers.ndim != 2 or centers.shape[1] != 3 or not 1 <= len(centers) <= MAX_COLORS:
            raise UserError(f"a palette has shape [V, 3] with V from 1 to {MAX_COLORS}, not {list(centers.shape)}")
        if centers.dtype.kind != "f" or not (np.abs(centers) <= 1.0).all():
            given = f" from {np.min(centers)} to {np.max(centers)}" if centers.dtype.kind in "fiu" else ""
            raise UserError(f"palette centres are floats in [-1, 1] (byte / 127.5 - 1), not {centers.dtype}{given}")
        self.centers = centers.astype(np.float32)
        self._table = ColorTable(self.centers, BYTE_LEVELS)

    @property
    def vocab_size(self) -> int:
        return len(self.centers)

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
            raise UserError(f"encode takes uint8 images [..., 3], not {images.dtype} {list(images.shape)}")
        return self._table.encode(images, dtype)

    def decode(self, tokens: np.ndarray) -> np.ndarray:
        """[...] int -> [..., 3] uint8: round(127.5 (c + 1)), halves rounded to even, as in OpenAI's src/run.py."""
        tokens = np.asarray(tokens)
        if tokens.size and not (tokens.min() >= 0 and tokens.max() < self.vocab_size):
            raise UserError(f"tokens run from {tokens.min()} to {tokens.max()}; allowed are 0..{self.vocab_size - 1}")
        return np.round(127.5 * (self.centers.astype(np.float64) + 1.0)).astype(np.uint8)[tokens]

    def save(self, path: Path | str) -> None:
        """Writes float32 [V, 3] as .npy. If it cannot write the whole file, it raises OSError and leaves no file."""
        with whole(path) as file:
            write_array(file, self.centers)

    @classmethod
    def load(cls, path: Path | str) -> "Palette":
        """Reads a .npy file of shape [V, 3]: one that `save` wrote, or OpenAI's kmeans_centers.npy.

        Prints a warning if a colour repeats. Such a palette is allowed, but `encode` never uses the later copies.
        """
        try:
            palette = cls(np.load(expand_home(path), allow_pickle=False))
        except FileNotFoundError:
            raise UserError(f"there is no palette at {path}") from None
        except (ValueError, OSError, EOFError) as error:
            raise UserError(f"{path} is not a palette: a .npy file of floats [V, 3] was expected ({error})") from None
        except UserError as error:
            raise UserError(f"{path}: {error}") from None
        if repeats := palette.vocab_size - len(np.unique(palette.centers, axis=0)):
            print(f"{path}: {repeats} of {palette.vocab_size} colours repeat earlier ones, and are never used")
        return palette
