"""Arrays of images that a notebook shows as pictures."""

import io
from pathlib import Path

import numpy as np
from PIL import Image

from igpt.files import check_writable
from igpt.plots import image_grid, save_png


class Pictures(np.ndarray):
    """A uint8 array [N, H, W, 3], which a notebook shows as a grid, or [N, num, H, W, 3], with a row for each of N.

    It is an ordinary array in every other respect. `images.view(Pictures)` makes one without a copy.
    """

    @property
    def are_images(self) -> bool:
        """Whether the array still has images: an index or a computation may give an array of another kind."""
        return self.dtype == np.uint8 and self.ndim in (3, 4, 5) and self.shape[-1] == 3 and self.size > 0

    def grid(self) -> np.ndarray:
        """The images in one picture, uint8 [height, width, 3]."""
        columns = self.shape[1] if self.ndim == 5 else 0
        return image_grid(np.asarray(self).reshape(-1, *self.shape[-3:]), columns)

    def save(self, path: str | Path) -> None:
        """Writes the grid as PNG."""
        check_writable(path, suffix=".png")
        save_png(self.grid(), path)

    def _repr_png_(self) -> bytes | None:
        if not self.are_images:
            return None
        file = io.BytesIO()
        Image.fromarray(self.grid()).save(file, format="PNG")
        return file.getvalue()

    def __repr__(self) -> str:
        if not self.are_images:
            return repr(np.asarray(self))
        return f"Pictures {' x '.join(map(str, self.shape))}"
