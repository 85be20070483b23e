"""Puts small images at random places of a larger canvas, so that no pixel has a meaning of its own.

In training, places are a function of (seed, step), as crops are. In evaluation, an image always has the same place.
"""

import numpy as np
from PIL import Image

from igpt.data.examples import ArrayImages, Images, Source, Split
from igpt.data.settings import FILTERS, DataConfig
from igpt.errors import UserError

MOST_BACKGROUNDS = 1024  # pictures of a split that are kept in memory, each at twice the canvas's height and width
PURPOSE = 5  # the second number of the seeds of evaluation: see TrainBatches


class ScatteredImages(Images):
    """Small images [n, h, w, 3] on canvases of (H, W). Row i is image i % n: more rows than images have more places.

    `key` makes the places of evaluation. `backgrounds`, uint8 [m, 2 H, 2 W, 3], are cut to the canvas at random.
    `unreadable` names the pictures that were passed over for them.
    """

    draws = 9  # scale, top, left, red, green, blue, background, its top, its left

    def __init__(self, small: ArrayImages, settings: DataConfig, key: tuple, rows: np.ndarray, backgrounds=None):
        self.small, self.settings, self.key, self.rows, self.backgrounds = small, settings, key, rows, backgrounds
        self.shape = (len(rows), *settings.image_size, 3)

    def take(self, indices: np.ndarray) -> "ScatteredImages":
        taken = ScatteredImages(self.small, self.settings, self.key, self.rows[indices], self.backgrounds)
        taken.unreadable = self.unreadable
        return taken

    def read(self, indices: np.ndarray, draws: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        indices = np.where(indices < 0, indices + len(self), indices)
        rows = self.rows[indices]
        if draws is None:
            draws = np.array([np.random.default_rng((*self.key, row)).random(self.draws) for row in rows.tolist()])
            draws = draws.reshape(len(rows), self.draws)  # also without rows
        small = self.small.read(rows % len(self.small))[0]
        images = np.zeros((len(rows), *self.shape[1:]), np.uint8)
        for image, canvas, numbers in zip(small, images, draws, strict=True):
            self._draw(image, canvas, numbers)
        return images, indices

    def _draw(self, image: np.ndarray, canvas: np.ndarray, draws: np.ndarray) -> None:
        """Draws one small image on its canvas, which is black before."""
        settings, (H, W, _) = self.settings, canvas.shape
        low, high = settings.scatter_scale
        if (low, high) != (1.0, 1.0):
            scale = low + draws[0] * (high - low)
            size = tuple(max(1, round(scale * side)) for side in image.shape[1::-1])
            image = np.asarray(Image.fromarray(image).resize(size, FILTERS[settings.filter]))
        if settings.scatter_color:
            color = draws[3:6] / max(draws[3:6].max(), 1e-9)  # as bright as can be
            image = np.round(image * color).astype(np.uint8)
        if self.backgrounds is not None:
            background = self.backgrounds[int(draws[6] * len(self.backgrounds))]
            top, left = (int(draws[7 + axis] * (size + 1)) for axis, size in enumerate((H, W)))
            canvas[:] = background[top : top + H, left : left + W]
        height, width, _ = image.shape
        top, left = int(draws[1] * (H - height + 1)), int(draws[2] * (W - width + 1))
        part = canvas[top : top + height, left : left + width]
        part[:] = np.abs(part.astype(np.int16) - image)  # as in MNIST-M (Ganin and Lempitsky 2015, section 4.1)


def scatter(source: Source, settings: DataConfig, backgrounds: Source | None) -> Source:
    """Scatters the images of `source`, which are in memory, over canvases of `settings.image_size`.

    Each split has backgrounds of its own. Training images have `scatter_copies` places each, as far as they are read
    without random numbers; validation and test images have one. Raises UserError if a canvas is too small.
    """
    largest = tuple(round(settings.scatter_scale[1] * side) for side in source.image_size)
    if any(side > room for side, room in zip(largest, settings.image_size, strict=True)):
        found, room = (" x ".join(map(str, size)) for size in (largest, settings.image_size))
        raise UserError(
            f"{settings.source} has images of up to {found}, which do not fit on a canvas of {room}; set a larger "
            "data.image_size or a smaller data.scatter_scale"
        )

    def scattered(number: int, name: str, split: Split) -> Split:
        copies = settings.scatter_copies if name == "train" else 1
        pictures = None
        if backgrounds is not None and len(split):
            pictures = _pictures(getattr(backgrounds, name), name, settings)
        rows, key = np.arange(copies * len(split)), (settings.split_seed, PURPOSE, number)
        images = ScatteredImages(split.images, settings, key, rows, pictures)
        if pictures is not None:
            images.unreadable = getattr(backgrounds, name).images.unreadable
        return Split(images, None if split.labels is None else np.tile(split.labels, copies))

    splits = [scattered(number, *named) for number, named in enumerate(source.splits().items())]
    in_color = settings.scatter_color or backgrounds is not None
    names = source.class_names
    return Source(settings.source, *splits, 3 if in_color else source.channels, class_names=names)


def background_settings(settings: DataConfig) -> DataConfig:
    """How the pictures of the backgrounds are read: twice as large as the canvas, so that there is a part to choose."""
    size = tuple(2 * side for side in settings.image_size)
    how = dict(image_size=size, preprocess="shrink", channels=3)
    return settings.without_places(source=settings.scatter_background, **how)


def _pictures(split: Split, name: str, settings: DataConfig) -> np.ndarray:
    """The first pictures of a split of the backgrounds. Raises UserError for none, and if tokens have another size."""
    given = f"data.scatter_background={settings.scatter_background}"
    if not len(split):
        raise UserError(f"{given} has no pictures for the {name} split")
    (height, width), (H, W) = split.images.shape[1:3], settings.image_size
    if (height, width) != (2 * H, 2 * W):
        raise UserError(
            f"{given} has pictures of {height} x {width}, but a canvas of {H} x {W} takes {2 * H} x {2 * W}; give the "
            f"pictures themselves, which are resized, or prepare them with --size={2 * H}x{2 * W}"
        )
    return np.asarray(split.images[:MOST_BACKGROUNDS])
