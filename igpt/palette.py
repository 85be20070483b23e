"""uint8 colours <-> palette tokens (Chen et al. 2020, section 3.1: k-means on RGB, 512 colours in the paper).

A palette is V centres in [-1, 1]^3, where a byte b stands for b / 127.5 - 1. A token is the index of the nearest
centre. Images are [..., H, W, 3] uint8, tokens [..., H, W] int32; raster order is a reshape away.
"""

import os
from pathlib import Path

import numpy as np

from igpt.errors import UserError

UNKNOWN = np.uint16(65535)  # a colour whose nearest centre has not been asked for yet
MAX_COLORS = 65535


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
        # One entry for each of the 2^24 colours, filled when first met: exact, and from then on a single lookup.
        self._nearest = np.full(1 << 24, UNKNOWN, np.uint16)

    @property
    def vocab_size(self) -> int:
        return len(self.centers)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of tokens that an image of this size becomes: a token a pixel."""
        return height, width

    def encode(self, images: np.ndarray) -> np.ndarray:
        """[..., 3] uint8 -> [...] int32: argmin over centres of the float64 squared distance, the first on ties."""
        images = np.asarray(images)
        if images.dtype != np.uint8 or images.shape[-1:] != (3,):
            raise UserError(f"encode takes uint8 images [..., 3], not {images.dtype} {list(images.shape)}")
        channels = images.astype(np.uint32)
        codes = channels[..., 0] << 16 | channels[..., 1] << 8 | channels[..., 2]
        tokens = self._nearest[codes]
        if (tokens == UNKNOWN).any():
            new = np.unique(codes[tokens == UNKNOWN])
            self._nearest[new] = nearest_centers(new, self.centers)
            tokens = self._nearest[codes]
        return tokens.astype(np.int32)

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
            np.save(file, self.centers)
        os.replace(partial, path)

    @classmethod
    def load(cls, path) -> "Palette":
        """Reads a .npy of shape [V, 3]; ours, or OpenAI's kmeans_centers.npy."""
        try:
            centers = np.load(path, allow_pickle=False)
        except FileNotFoundError:
            raise UserError(f"there is no palette at {path}") from None
        except (ValueError, OSError, EOFError) as error:
            raise UserError(f"{path} is not a palette: a .npy file of floats [V, 3] was expected ({error})") from None
        try:
            return cls(centers)
        except UserError as error:
            raise UserError(f"{path}: {error}") from None


def nearest_centers(codes: np.ndarray, centers: np.ndarray) -> np.ndarray:
    """Colours packed as 0xRRGGBB [M] -> index of the nearest centre [M] uint16, in float64."""
    centers = centers.astype(np.float64)
    nearest = np.empty(len(codes), np.uint16)
    for start in range(0, len(codes), 4096):  # a chunk of distances fits the cache
        chunk = codes[start : start + 4096]
        distance = np.zeros((len(chunk), len(centers)))
        for channel, shift in enumerate((16, 8, 0)):
            value = (chunk >> shift & 255) / 127.5 - 1.0
            distance += (value[:, None] - centers[:, channel]) ** 2
        nearest[start : start + len(chunk)] = distance.argmin(axis=1)
    return nearest


def fit(images: np.ndarray, colors: int, seed: int = 0, max_pixels: int = 1_000_000) -> Palette:
    """k-means on the colours of uint8 images [N, H, W, 3]; with exactly `colors` distinct colours, those colours.

    A random sample of `max_pixels` pixels is clustered when there are more. Raises UserError when the images have
    fewer colours than were asked for. Centres are sorted, dark to light, so that a palette does not depend on the
    order in which k-means found them.
    """
    pixels = images.reshape(-1, 3)
    distinct = np.unique(pixels, axis=0) if len(pixels) <= max_pixels else None
    if distinct is None or len(distinct) > colors:
        if len(pixels) > max_pixels:
            chosen = np.random.default_rng(seed).choice(len(pixels), max_pixels, replace=False)
            pixels = pixels[np.sort(chosen)]
        distinct, counts = np.unique(pixels, axis=0, return_counts=True)
    if len(distinct) < colors:
        raise UserError(
            f"palette.colors is {colors}, but the {len(pixels):,} pixels looked at have only {len(distinct)} different "
            f"colours; set palette.colors={len(distinct)}"
        )
    if len(distinct) == colors:
        centers = distinct / 127.5 - 1.0
    else:
        from sklearn.cluster import KMeans  # slow to import, and needed only here

        kmeans = KMeans(colors, n_init=1, max_iter=100, random_state=seed)
        centers = kmeans.fit(distinct / 127.5 - 1.0, sample_weight=counts).cluster_centers_
    centers = np.clip(centers, -1.0, 1.0)
    brightness = centers.sum(axis=1)
    return Palette(centers[np.lexsort((*centers.T[::-1], brightness))].astype(np.float32))
