"""A table of the nearest of V centres for all 2^24 byte colours: as exact as a full search, as fast as a lookup."""

import functools
import os
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np

MAX_COLORS = 65535  # the largest number of centres: every index, and UNKNOWN, must fit into uint16
UNKNOWN = np.uint16(65535)  # the entry of a colour whose nearest centre is not computed yet
EDGE = 16  # the colour cube is filled in cells of 16 x 16 x 16 colours
PARALLEL_PIXELS = 1 << 19  # for fewer pixels, starting several threads costs more time than it saves
PIXELS_PER_LOOKUP = 1 << 16  # few enough that their codes and indices fit into the processor's cache
BYTE_LEVELS = np.repeat((np.arange(256) / 127.5 - 1.0)[:, None], 3, axis=1)  # byte b stands for b / 127.5 - 1


class ColorTable:
    """Maps a colour to the index of its nearest centre. Each cell of the colour cube is computed at its first use.

    centers: float64 [V, 3] with V up to 65535. levels: float64 [256, 3]; byte b stands for levels[b, c] in channel c.
    An entry is the argmin over centres of the float64 squared distance (red + green + blue). Ties: the first centre.
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
        self._nearest = np.full(1 << 24, UNKNOWN, np.uint16)  # indexed by red | green << 8 | blue << 16
        self._cube = self._nearest.reshape(16, EDGE, 16, EDGE, 16, EDGE)  # a view: cell and offset of blue, green, red

    def encode(self, images: np.ndarray, dtype=np.int32) -> np.ndarray:
        """[..., 3] uint8 -> [...] indices of the nearest centres."""
        pixels = images.reshape(-1, 3)
        nearest = np.empty(len(pixels), dtype)
        if len(pixels) < PARALLEL_PIXELS or (cores := os.cpu_count() or 1) == 1:
            self._encode_run(pixels, nearest)
        else:  # threads help, because NumPy releases the interpreter's lock during a lookup
            first, *others = zip(np.array_split(pixels, cores), np.array_split(nearest, cores), strict=True)
            futures = [_threads(os.getpid()).submit(self._encode_run, *run) for run in others]
            self._encode_run(*first)
            for future in futures:
                future.result()
        return nearest.reshape(images.shape[:-1])

    def _encode_run(self, pixels: np.ndarray, nearest: np.ndarray) -> None:
        octets = np.zeros((min(len(pixels), PIXELS_PER_LOOKUP), 8), np.uint8)
        codes = octets.view("<i8")[:, 0]  # a colour's code: its three bytes, read as one integer
        found = np.empty(len(codes), np.uint16)
        look_up = functools.partial(self._nearest.take, mode="clip")  # codes are in range, and "raise" would copy `out`
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
                if self._cube[blue, -1, green, -1, red, -1] == UNKNOWN:  # otherwise another thread has filled the cell
                    self._fill(red, green, blue)

    def _fill(self, red, green, blue) -> None:
        """Computes the 4096 entries of one cell. It compares only centres that can be nearest to a colour of the cell.

        Rounding is monotonic, and bounds and distances are summed in the same order. The bounds therefore hold for the
        computed distances to the last bit, and no centre that ties is excluded.
        """
        at_least, at_most = (x[0, red] + x[1, green] + x[2, blue] for x in (self._at_least, self._at_most))
        candidates = np.flatnonzero(at_least <= at_most.min())
        by_channel = [
            np.square(self.levels[EDGE * run : EDGE * run + EDGE, channel, None] - self.centers[candidates, channel])
            for channel, run in enumerate((red, green, blue))
        ]
        nearest = np.empty((EDGE, EDGE, EDGE), np.uint16)  # axes blue, green, red, as in the table
        reds_at_once = max(1, (1 << 17) // (EDGE * EDGE * len(candidates)))  # so that distances fit into the cache
        for start in range(0, EDGE, reds_at_once):
            reds = slice(start, start + reds_at_once)
            red_green = by_channel[0][reds] + by_channel[1][:, None]  # [green, red, candidates]
            for level, distance in enumerate(by_channel[2]):
                nearest[level, :, reds] = candidates[(red_green + distance).argmin(-1)]
        self._cube[blue, :, green, :, red, :] = nearest


@functools.cache
def _threads(process: int) -> ThreadPoolExecutor:
    """The thread pool of a process, started once: a start takes a fifth of the time of encoding a million pixels.

    `process` is the id of the process, because a forked process cannot use the threads of its parent.
    """
    return ThreadPoolExecutor(os.cpu_count())
