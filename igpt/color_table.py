"""The nearest of V centres for each of the 2^24 byte colours: exact like a brute-force search, fast like a lookup."""

import functools
import os
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np

MAX_COLORS = 65535  # centres, so that an index and UNKNOWN fit into uint16
UNKNOWN = np.uint16(65535)  # the entry of a colour that is not computed yet
EDGE = 16  # the colour cube is filled in cells of 16 x 16 x 16 colours
PARALLEL_PIXELS = 1 << 19  # for fewer pixels, starting several threads costs more time than it saves
PIXELS_PER_LOOKUP = 1 << 16  # so that their codes and indices stay in the processor's cache
BYTE_LEVELS = np.repeat((np.arange(256) / 127.5 - 1.0)[:, None], 3, axis=1)  # byte b stands for b / 127.5 - 1


class ColorTable:
    """Index of the nearest centre by colour. A colour's cell is computed at its first use, then looked up.

    centers: float64 [V, 3] with V up to 65535. levels: float64 [256, 3]; byte b stands for levels[b, c] in channel c.
    An entry is the argmin over centres of the float64 squared distance, summed red, green, blue; the first on ties.
    """

    def __init__(self, centers: np.ndarray, levels: np.ndarray):
        self.centers = centers.astype(np.float64)
        self.levels = levels.astype(np.float64)
        # Bounds on the squared distance of each centre from each run of 16 levels, per channel: [3, 16, V].
        runs = self.levels.T.reshape(3, -1, EDGE)
        low, high, center = runs.min(2)[..., None], runs.max(2)[..., None], self.centers.T[:, None]
        self._at_least = np.square(np.maximum(np.maximum(low - center, center - high), 0.0))
        self._at_most = np.square(np.maximum(high - center, center - low))
        self._filling = threading.Lock()
        self._nearest = np.full(1 << 24, UNKNOWN, np.uint16)  # at index red | green << 8 | blue << 16
        self._cube = self._nearest.reshape(16, EDGE, 16, EDGE, 16, EDGE)  # a view: blue, green, red

    def encode(self, images: np.ndarray, dtype=np.int32) -> np.ndarray:
        """[..., 3] uint8 -> [...] indices of the nearest centres."""
        pixels = images.reshape(-1, 3)
        nearest = np.empty(len(pixels), dtype)
        if len(pixels) < PARALLEL_PIXELS or (cores := os.cpu_count() or 1) == 1:
            self._encode_run(pixels, nearest)
        else:  # NumPy releases the interpreter lock while it looks up
            first, *others = zip(np.array_split(pixels, cores), np.array_split(nearest, cores), strict=True)
            futures = [_threads(os.getpid()).submit(self._encode_run, *run) for run in others]
            self._encode_run(*first)
            for future in futures:
                future.result()
        return nearest.reshape(images.shape[:-1])

    def _encode_run(self, pixels: np.ndarray, nearest: np.ndarray) -> None:
        octets = np.zeros((min(len(pixels), PIXELS_PER_LOOKUP), 8), np.uint8)
        codes = octets.view("<i8")[:, 0]  # one byte for each channel already makes the code, without any shift
        found = np.empty(len(codes), np.uint16)
        look_up = functools.partial(self._nearest.take, mode="clip")  # codes are valid; mode "raise" would copy `out`
        for start in range(0, len(pixels), PIXELS_PER_LOOKUP):
            chunk = pixels[start : start + PIXELS_PER_LOOKUP]
            rows = slice(len(chunk))
            for channel in range(3):
                octets[rows, channel] = chunk[:, channel]
            look_up(codes[rows], out=found[rows])
            if found[rows].max() == UNKNOWN:
                self._fill_cells_of(chunk[found[rows] == UNKNOWN])
                look_up(codes[rows], out=found[rows])
            nearest[start : start + PIXELS_PER_LOOKUP] = found[rows]

    def _fill_cells_of(self, colors: np.ndarray) -> None:
        cells = np.unique((colors // EDGE).astype(np.intp) @ (256, 16, 1))
        for red, green, blue in zip(*np.unravel_index(cells, (16, 16, 16)), strict=True):
            with self._filling:
                if self._cube[blue, -1, green, -1, red, -1] == UNKNOWN:  # else another thread filled it meanwhile
                    self._fill(red, green, blue)

    def _fill(self, red, green, blue) -> None:
        """Computes the 4096 entries of one cell from only those centres that can be nearest to one of its colours.

        Rounding is monotonic, and bounds and distances are summed in the same order. So the bounds hold for the
        computed distances to the last bit, and all centres that tie stay candidates.
        """
        at_least, at_most = (x[0, red] + x[1, green] + x[2, blue] for x in (self._at_least, self._at_most))
        candidates = np.flatnonzero(at_least <= at_most.min())
        by_channel = [
            np.square(self.levels[EDGE * run : EDGE * run + EDGE, channel, None] - self.centers[candidates, channel])
            for channel, run in enumerate((red, green, blue))
        ]
        nearest = np.empty((EDGE, EDGE, EDGE), np.uint16)  # blue, green, red, as in the table
        reds_at_once = max(1, (1 << 17) // (EDGE * EDGE * len(candidates)))  # so that the distances fit the cache
        for start in range(0, EDGE, reds_at_once):
            reds = slice(start, start + reds_at_once)
            red_green = by_channel[0][reds] + by_channel[1][:, None]  # [green, red, candidates]
            for level, distance in enumerate(by_channel[2]):
                nearest[level, :, reds] = candidates[(red_green + distance).argmin(-1)]
        self._cube[blue, :, green, :, red, :] = nearest


@functools.cache
def _threads(process: int) -> ThreadPoolExecutor:
    """The threads of a process, kept: starting them again takes a fifth of the time of encoding a million pixels.

    `process` is its id, because a forked process cannot use the threads of its parent.
    """
    return ThreadPoolExecutor(os.cpu_count())
