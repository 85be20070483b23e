"""uint8 colours <-> palette tokens (Chen et al. 2020, section 3.1: k-means on RGB, 512 colours in the paper).

    igpt palette --source=folder:photos --colors=512 --out=palette.npy

A palette is V centres in [-1, 1]^3, where a byte b stands for b / 127.5 - 1. A token is the index of the nearest
centre. Images are [..., H, W, 3] uint8, tokens [..., H, W] int32; raster order is a reshape away.
"""

import functools
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from igpt.errors import UserError

UNKNOWN = np.uint16(65535)  # a colour whose nearest centre has not been asked for yet
MAX_COLORS = 65535
EDGE = 16  # the colour cube is filled in cells of 16 x 16 x 16 colours
MANY = 1 << 19  # pixels from which on several threads are worth their start
CHUNK = 1 << 16  # pixels looked up at a time: their codes and tokens stay in the cache
BYTE_LEVELS = np.repeat((np.arange(256) / 127.5 - 1.0)[:, None], 3, axis=1)


class ColorTable:
    """The nearest of V centres for each of the 2^24 byte colours, found when first met: from then on a lookup.

    centers: float64 [V, 3], V up to 65535. levels: float64 [256, 3], where levels[b, c] is what byte b stands for in
    channel c. Entries are argmin over centres of the float64 squared distance, summed red, green, blue; first on ties.
    """

    def __init__(self, centers: np.ndarray, levels: np.ndarray):
        self.centers = centers.astype(np.float64)
        self.levels = levels.astype(np.float64)
        # Squared distance of each centre from each run of 16 levels, per channel [3, 16, V]: at least, at most.
        runs = self.levels.T.reshape(3, -1, EDGE)
        low, high, center = runs.min(2)[..., None], runs.max(2)[..., None], self.centers.T[:, None]
        self._at_least = np.square(np.maximum(np.maximum(low - center, center - high), 0.0))
        self._at_most = np.square(np.maximum(high - center, center - low))
        self._filling = threading.Lock()
        self._nearest = np.full(1 << 24, UNKNOWN, np.uint16)  # at red | green << 8 | blue << 16

    def encode(self, images: np.ndarray, dtype=np.int32) -> np.ndarray:
        """[..., 3] uint8 -> [...] indices of the nearest centres."""
        pixels = images.reshape(-1, 3)
        nearest = np.empty(len(pixels), dtype)
        if len(pixels) < MANY or (cores := os.cpu_count() or 1) == 1:
            self._encode_run(pixels, nearest)
        else:  # NumPy lets go of the interpreter while it looks up
            first, *others = zip(np.array_split(pixels, cores), np.array_split(nearest, cores), strict=True)
            waiting = [_threads(os.getpid()).submit(self._encode_run, *run) for run in others]
            self._encode_run(*first)
            for run in waiting:
                run.result()
        return nearest.reshape(images.shape[:-1])

    def _encode_run(self, pixels: np.ndarray, nearest: np.ndarray) -> None:
        octets = np.zeros((min(len(pixels), CHUNK), 8), np.uint8)
        codes = octets.view("<i8")[:, 0]  # a byte a channel is the code already: nothing to shift
        found = np.empty(len(codes), np.uint16)
        for start in range(0, len(pixels), CHUNK):
            chunk = pixels[start : start + CHUNK]
            rows = slice(len(chunk))
            for channel in range(3):
                octets[rows, channel] = chunk[:, channel]
            self._look_up(codes[rows], found[rows])
            if found[rows].max() == UNKNOWN:
                self._fill_cells_of(chunk[found[rows] == UNKNOWN])
                self._look_up(codes[rows], found[rows])
            nearest[start : start + CHUNK] = found[rows]

    def _look_up(self, codes: np.ndarray, found: np.ndarray) -> None:
        np.take(self._nearest, codes, out=found, mode="clip")  # codes are in range; "raise" would copy to be sure

    def _fill_cells_of(self, colors: np.ndarray) -> None:
        cells = (colors // EDGE).astype(np.intp)
        cube = self._nearest.reshape(16, EDGE, 16, EDGE, 16, EDGE)
        for cell in np.unique(cells @ (1, 16, 256)):
            red, green, blue = cell % 16, cell // 16 % 16, cell // 256
            with self._filling:
                if cube[blue, -1, green, -1, red, -1] == UNKNOWN:  # no other thread has filled it meanwhile
                    self._fill(red, green, blue)

    def _fill(self, red: np.integer, green: np.integer, blue: np.integer) -> None:
        """Computes the 4096 entries of one cell, looking only at centres that may be nearest to one of its colours.

        Rounding never reverses an order, so the bounds, summed as the distances are, hold for computed distances to
        the last bit, and centres that tie are all kept.
        """
        cell = (red, green, blue)
        at_least, at_most = (
            (bound[0, red] + bound[1, green]) + bound[2, blue] for bound in (self._at_least, self._at_most)
        )
        candidates = np.flatnonzero(at_least <= at_most.min())
        by_channel = [
            np.square(self.levels[EDGE * run : EDGE * run + EDGE, channel, None] - self.centers[candidates, channel])
            for channel, run in enumerate(cell)
        ]
        nearest = np.empty((EDGE, EDGE, EDGE), np.uint16)  # blue, green, red, as in the table
        reds_at_once = max(1, (1 << 17) // (EDGE * EDGE * len(candidates)))  # distances that fit the cache
        for start in range(0, EDGE, reds_at_once):
            reds = slice(start, start + reds_at_once)
            red_green = by_channel[0][reds] + by_channel[1][:, None]  # [green, red, candidates]
            for level, distance in enumerate(by_channel[2]):
                nearest[level, :, reds] = candidates[(red_green + distance).argmin(-1)]
        cube = self._nearest.reshape(16, EDGE, 16, EDGE, 16, EDGE)
        cube[blue, :, green, :, red, :] = nearest


@functools.cache
def _threads(process: int) -> ThreadPoolExecutor:
    """Kept: to start them anew takes a fifth of the time of encoding a million pixels. A forked process has its own."""
    return ThreadPoolExecutor(os.cpu_count())


class Palette:
    """The first tokenizer: encode, decode, vocab_size, grid. Raises UserError for centres that cannot be a palette."""

    def __init__(self, centers: np.ndarray):
        centers = np.asarray(centers)
        if centers.ndim != 2 or centers.shape[1] != 3 or not 1 <= len(centers) <= MAX_COLORS:
            raise UserError(f"a palette has shape [V, 3] with V from 1 to {MAX_COLORS}, not {list(centers.shape)}")
        if centers.dtype.kind != "f" or not (np.abs(centers) <= 1.0).all():
            raise UserError(
                f"palette centres are floats in [-1, 1] (byte / 127.5 - 1); these are {centers.dtype}"
                + (f" from {np.min(centers)} to {np.max(centers)}" if centers.dtype.kind in "fiu" else "")
            )
        self.centers = centers.astype(np.float32)
        self._table = ColorTable(self.centers, BYTE_LEVELS)

    @property
    def vocab_size(self) -> int:
        return len(self.centers)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of tokens that an image of this size becomes: a token a pixel."""
        return height, width

    def encode(self, images: np.ndarray, dtype=np.int32) -> np.ndarray:
        """[..., 3] uint8 -> [...] integers: argmin over centres of the float64 squared distance, the first on ties."""
        images = np.asarray(images)
        if images.dtype != np.uint8 or images.shape[-1:] != (3,):
            raise UserError(f"encode takes uint8 images [..., 3], not {images.dtype} {list(images.shape)}")
        return self._table.encode(images, dtype)

    def decode(self, tokens: np.ndarray) -> np.ndarray:
        """[...] int -> [..., 3] uint8 by the released rule round(127.5 (c + 1)), halves to even (src/run.py)."""
        tokens = np.asarray(tokens)
        if tokens.size and not (tokens.min() >= 0 and tokens.max() < self.vocab_size):
            raise UserError(
                f"tokens run from {tokens.min()} to {tokens.max()}; this palette has 0..{self.vocab_size - 1}"
            )
        return np.round(127.5 * (self.centers.astype(np.float64) + 1.0)).astype(np.uint8)[tokens]

    def save(self, path) -> None:
        """Writes float32 [V, 3] as .npy, whole or not at all."""
        partial = Path(f"{path}.partial")
        with partial.open("wb") as file:
            write_array(file, self.centers)
        os.replace(partial, path)

    @classmethod
    def load(cls, path) -> "Palette":
        """Reads a .npy of shape [V, 3], ours or OpenAI's kmeans_centers.npy.

        Says so when colours are there twice: it is allowed, but the later ones are never used.
        """
        try:
            centers = np.load(path, allow_pickle=False)
        except FileNotFoundError:
            raise UserError(f"there is no palette at {path}") from None
        except (ValueError, OSError, EOFError) as error:
            raise UserError(f"{path} is not a palette: a .npy file of floats [V, 3] was expected ({error})") from None
        try:
            return cls(centers)._checked(path)
        except UserError as error:
            raise UserError(f"{path}: {error}") from None

    def _checked(self, path) -> "Palette":
        if twice := self.vocab_size - len(np.unique(self.centers, axis=0)):
            print(f"{path}: {twice} of {self.vocab_size} colours repeat earlier ones, and are never used")
        return self


def write_array(file, array: np.ndarray) -> None:
    """np.save, which on a full disk loses the end of an array without a word."""
    header = np.lib.format.header_data_from_array_1_0(array)
    np.lib.format.write_array_header_1_0(file, header)
    file.write(np.ascontiguousarray(array).data)
