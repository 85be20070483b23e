"""Images in, token batches out: source -> split -> augment -> tokens, with batch = f(seed, step).

Nothing here carries state from one step to the next, so that resuming is asking for the next step, and every process
can compute its own rows of any batch: order, augmentation and rows depend on (seed, step) alone.
"""

import dataclasses
import math
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path

import grain.python as grain
import numpy as np
from ml_collections import ConfigDict
from PIL import Image, ImageOps

from igpt.errors import UserError
from igpt.palette import Palette

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")  # the decoders that strangers' files may reach


class DecodedTokens:
    """Images uint8 [N, H, W, 3] kept as their palette tokens [N, H W]: an array that decodes what is asked of it.

    The tokens stay wherever they are, such as in a mapped file. An index picks whole images, by a number, a slice or
    an array. Raises UserError naming `path` for tokens that the palette does not have, when it meets them.
    """

    dtype = np.dtype(np.uint8)

    def __init__(self, tokens: np.ndarray, palette: Palette, path: str):
        self.tokens, self.palette, self.path = tokens, palette, path
        side = math.isqrt(tokens.shape[1])
        self.shape = (len(tokens), side, side, 3)

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index) -> np.ndarray:
        if isinstance(index, tuple):  # goes on into the images, such as [..., :1]: NumPy knows how
            return np.asarray(self)[index]
        tokens = self.tokens[index]
        try:
            images = self.palette.decode(tokens)
        except UserError as error:
            raise UserError(f"{self.path}: {error}") from None
        return images.reshape(*tokens.shape[:-1], *self.shape[1:])

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        """All images at once: three bytes a token."""
        return np.asarray(self[:], dtype)


@dataclasses.dataclass(frozen=True)
class Split:
    """Images uint8 [N, H, W, 3] and, where the source has them, labels int32 [N]."""

    images: np.ndarray | DecodedTokens
    labels: np.ndarray | None

    def __len__(self) -> int:
        return len(self.images)


@dataclasses.dataclass(frozen=True)
class Source:
    """A data set in its three splits.

    `channels` is 1 where the images are grey, though they are stored as RGB. `palette` is that of a source whose images
    come as palette tokens.
    """

    name: str
    train: Split
    validation: Split
    test: Split
    channels: int
    palette: Palette | None = None

    @property
    def image_size(self) -> tuple[int, int]:
        return self.train.images.shape[1:3]


def load_source(name: str, fractions: tuple[float, float], split_seed: int = 0) -> Source:
    """Opens `digits`, `npz:PATH` or `openai:PREFIX`.

    `fractions` of the images go to validation and test, chosen by `split_seed`; the last source has splits of its own.
    """
    kind, _, argument = name.partition(":")
    match kind:
        case "digits":
            images, labels = _digits()
        case "npz" if argument:
            images, labels = _npz(argument)
        case "openai" if argument:
            return _openai(argument)
        case _:
            raise UserError(f"data.source is {name!r}; choose 'digits', 'npz:PATH' or 'openai:PREFIX'")
    channels = 1 if images.ndim == 3 else 3
    if channels == 1:
        images = np.repeat(images[..., None], 3, axis=-1)
    return Source(name, *_split(images, labels, fractions, split_seed), channels)


def open_source(settings: ConfigDict) -> Source:
    """The source of a run's `data` settings; UserError when its images are not of the configured kind."""
    fractions = (settings.validation_fraction, settings.test_fraction)
    source = load_source(settings.source, fractions, settings.split_seed)
    if source.image_size != tuple(settings.image_size) or source.channels != settings.channels:
        height, width = source.image_size
        raise UserError(
            f"{settings.source} has images of {height} x {width} with {source.channels} channel(s), the config says "
            f"{' x '.join(map(str, settings.image_size))} with {settings.channels}; set "
            f"--config.data.image_size='({height},{width})' --config.data.channels={source.channels}"
        )
    return source


def read_image(path: str, height: int, width: int, channels: int) -> np.ndarray:
    """An image file -> uint8 [height, width, 3]: its centre, cut to the aspect ratio and shrunk (bicubic)."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=FORMATS) as image:
                upright = ImageOps.exif_transpose(image).convert("L" if channels == 1 else "RGB").convert("RGB")
    except FileNotFoundError:
        raise UserError(f"there is no image {path}") from None
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise UserError(f"{path} is too large to open safely: {error}") from None
    except (OSError, ValueError, SyntaxError) as error:
        raise UserError(f"{path} cannot be read as an image ({', '.join(FORMATS)}): {error}") from None
    return np.asarray(ImageOps.fit(upright, (width, height), Image.Resampling.BICUBIC))


def _digits():
    """scikit-learn's handwritten digits: 1,797 images, 8 x 8, 17 grey levels (the UCI optical digits, test part)."""
    from sklearn.datasets import load_digits  # slow to import, and needed only here

    pixels, labels = load_digits(return_X_y=True)
    return np.round(pixels.reshape(-1, 8, 8) * 255 / 16).astype(np.uint8), labels.astype(np.int32)


def _npz(path: str):
    """Arrays `images` uint8 [N, H, W] or [N, H, W, 3] and, optionally, integer `labels` [N]."""
    try:
        arrays = np.load(path, allow_pickle=False)
        if isinstance(arrays, np.ndarray):
            raise UserError(f"{path} is a single .npy array; save it with np.savez(path, images=...)")
        with arrays:
            if "images" not in arrays:
                raise UserError(
                    f"{path} has no array 'images' (it has {', '.join(arrays.files) or 'none'}); "
                    "save it with np.savez(path, images=..., labels=...)"
                )
            images = arrays["images"]
            labels = arrays.get("labels")
    except FileNotFoundError:
        raise UserError(f"there is no file {path}") from None
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} cannot be read as an .npz of plain arrays: {error}") from None
    if images.dtype != np.uint8:
        raise UserError(
            f"{path}: 'images' is {images.dtype}; uint8 (0..255) is needed, so convert first, for instance with "
            "np.round(images * 255).astype(np.uint8) if they lie in [0, 1]"
        )
    if images.ndim not in (3, 4) or images.shape[3:] not in ((), (3,)) or 0 in images.shape:
        raise UserError(f"{path}: 'images' has shape {list(images.shape)}; [N, H, W] or [N, H, W, 3] is needed")
    if labels is not None:
        if labels.shape != images.shape[:1] or labels.dtype.kind not in "iu":
            raise UserError(
                f"{path}: 'labels' is {labels.dtype} {list(labels.shape)}; integers [{len(images)}] are needed, "
                "one for every image"
            )
        labels = labels.astype(np.int32)
    return images, labels


def _openai(prefix: str) -> Source:
    """OpenAI's encoded data sets, as their download.py leaves them; every split is a pair of files.

    PREFIX_{tr,va,te}X.npy: palette tokens [N, T], integers, a square image a row. PREFIX_{tr,va,te}Y.npy, which may be
    absent: labels, integers [N] or one-hot [N, C]. Beside them kmeans_centers.npy: the palette. Tokens stay in their
    files; encoding an image that this palette decoded returns its tokens, but where two centres round to equal bytes.
    """
    paths = [f"{prefix}_{split}X.npy" for split in ("tr", "va", "te")]
    arrays = {path: _map_tokens(path) for path in paths}
    if len({tokens.shape[1] for tokens in arrays.values()}) > 1:
        found = ", ".join(f"{path} {list(tokens.shape)}" for path, tokens in arrays.items())
        raise UserError(f"the splits' images differ in size: {found}; encode all three alike")
    clusters = Path(paths[0]).with_name("kmeans_centers.npy")
    if not clusters.exists():
        raise UserError(f"there is no {clusters}; the palette that these tokens index belongs beside them")
    palette = Palette.load(clusters)
    splits = []
    for path, tokens in arrays.items():
        images = DecodedTokens(tokens, palette, path)
        images[:1000]  # another data set's palette shows at once; what the rest holds, when it is read
        splits.append(Split(images, _openai_labels(path.removesuffix("X.npy") + "Y.npy", len(tokens))))
    grey = bool((palette.centers == palette.centers[:, :1]).all())
    return Source(f"openai:{prefix}", *splits, channels=1 if grey else 3, palette=palette)


def _map_tokens(path: str) -> np.ndarray:
    tokens = _map_array(path)
    if tokens.dtype.kind not in "iu" or tokens.ndim != 2 or 0 in tokens.shape:
        raise UserError(f"{path} is {tokens.dtype} {list(tokens.shape)}; palette tokens are integers [N, T]")
    if math.isqrt(tokens.shape[1]) ** 2 != tokens.shape[1]:
        raise UserError(f"{path} has {tokens.shape[1]} tokens an image, which is no square; 32 x 32 images have 1024")
    return tokens


def _openai_labels(path: str, count: int) -> np.ndarray | None:
    """int32 [N]; a few rows at a time, as ImageNet's one-hot labels take gigabytes."""
    if not Path(path).exists():
        return None
    labels = _map_array(path)
    kinds = {1: "iu", 2: "iufb"}.get(labels.ndim, "")
    if labels.dtype.kind not in kinds or len(labels) != count:
        raise UserError(
            f"{path} is {labels.dtype} {list(labels.shape)}; integers [{count}] or one-hot rows [{count}, C] are "
            "needed, one for every image"
        )
    if labels.ndim == 1:
        return labels.astype(np.int32)
    classes = np.empty(count, np.int32)
    for start in range(0, count, 4096):
        rows = labels[start : start + 4096]
        if not ((rows != 0).sum(axis=1) == 1).all() or not (rows.sum(axis=1) == 1).all():
            raise UserError(f"{path}: the rows from {start} on are not all one-hot, a single 1 among zeros")
        classes[start : start + 4096] = rows.argmax(axis=1)
    return classes


def _map_array(path: str) -> np.ndarray:
    """The array of a .npy file, in the file."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise UserError(f"there is no file {path}") from None
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} cannot be read as a .npy of numbers: {error}; fetch it again") from None
    if not isinstance(array, np.ndarray):
        raise UserError(f"{path} is an .npz of several arrays; a .npy is needed")
    return array


def _split(images, labels, fractions, seed) -> tuple[Split, Split, Split]:
    validation, test = (round(fraction * len(images)) for fraction in fractions)
    train = len(images) - validation - test
    if min(train, validation, test) < 1:
        raise UserError(
            f"{len(images)} images split into {train} for training, {validation} for validation and {test} for test; "
            "each needs at least one, so give more images or change data.validation_fraction and data.test_fraction"
        )
    order = np.random.default_rng(seed).permutation(len(images))
    parts = np.split(order, [train, train + validation])
    return tuple(Split(images[part], None if labels is None else labels[part]) for part in parts)


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """With probability `probability` an image is padded by `pad` pixels, cropped at random, and flipped by a coin."""

    pad: int = 0
    pad_mode: str = "constant"  # constant (black), edge or reflect
    flip: bool = False
    probability: float = 1.0

    def __post_init__(self):
        if self.pad_mode not in ("constant", "edge", "reflect"):
            raise UserError(f"data.pad_mode is {self.pad_mode!r}; choose constant, edge or reflect")
        if self.pad < 0 or not 0.0 <= self.probability <= 1.0:
            raise UserError(
                f"data.pad is {self.pad} and data.augment_probability {self.probability}; "
                "the pad is at least 0 pixels, the probability between 0 and 1"
            )

    def __call__(self, images: np.ndarray, rng: np.random.Generator, rows: slice, batch_size: int) -> np.ndarray:
        """Augments `rows` of a batch. The draws are made for the whole batch, so that its split changes nothing."""
        _, height, width, _ = images.shape
        applied = rng.random(batch_size)[rows] < self.probability
        offsets = rng.integers(0, 2 * self.pad + 1, (2, batch_size))[:, rows]
        flips = (rng.random(batch_size)[rows] < 0.5) & applied & self.flip
        if self.pad:
            top, left = np.where(applied, offsets, self.pad)
            around = [(0, 0), (self.pad, self.pad), (self.pad, self.pad), (0, 0)]
            example = np.arange(len(images))[:, None, None]
            row = (top[:, None] + np.arange(height))[:, :, None]
            column = (left[:, None] + np.arange(width))[:, None, :]
            images = np.pad(images, around, self.pad_mode)[example, row, column]
        return np.where(flips[:, None, None, None], images[:, :, ::-1], images)


class TrainBatches:
    """Training batches, random access: `batches[step]` is this process's rows of batch f(seed, step)."""

    def __init__(self, split: Split, tokenizer, batch_size: int, seed: int, augmentation: Augmentation, rows: slice):
        if batch_size > len(split):
            raise UserError(f"train.batch_size is {batch_size}, but there are only {len(split)} training images")
        self.split, self.tokenizer, self.batch_size = split, tokenizer, batch_size
        self.seed, self.augmentation, self.rows = seed, augmentation, rows
        self._epoch_order = (None, None)

    def __getitem__(self, step: int) -> dict:
        indices = self._indices(np.arange(step * self.batch_size, (step + 1) * self.batch_size)[self.rows])
        # Streams 0 and 1 of a seed, here and below, keep order and augmentation independent of each other.
        rng = np.random.default_rng((self.seed, 1, step))
        images = self.augmentation(self.split.images[indices], rng, self.rows, self.batch_size)
        return _batch(images, self.split.labels, indices, self.tokenizer)

    def _indices(self, positions: np.ndarray) -> np.ndarray:
        """The example at each position of the endless stream of epochs, every epoch in an order of its own."""
        epochs, within = np.divmod(positions, len(self.split))
        indices = np.empty_like(positions)
        for epoch in np.unique(epochs):
            indices[epochs == epoch] = self._order(epoch)[within[epochs == epoch]]
        return indices

    def _order(self, epoch: int) -> np.ndarray:
        cached, order = self._epoch_order
        if cached != epoch:
            order = np.random.default_rng((self.seed, 0, epoch)).permutation(len(self.split))
            self._epoch_order = (epoch, order)
        return order

    def iterate(self, start: int, stop: int, threads: int = 1, ahead: int = 4) -> Iterator[dict]:
        """Batches start, ..., stop - 1 in order, made by `threads` background threads up to `ahead` steps early."""
        steps = grain.MapDataset.range(start, stop).map(self.__getitem__)
        return iter(steps.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=ahead)))


def eval_batches(split: Split, tokenizer, batch_size: int, rows: slice = slice(None)) -> Iterator[dict]:
    """Every example exactly once, in order. The last batch is padded with example 0, and `mask` is 0.0 there."""
    for start in range(0, len(split), batch_size):
        positions = np.arange(start, start + batch_size)[rows]
        mask = positions < len(split)
        indices = np.where(mask, positions, 0)
        batch = _batch(split.images[indices], split.labels, indices, tokenizer)
        yield batch | {"mask": mask.astype(np.float32)}


def _batch(images, labels, indices, tokenizer) -> dict:
    batch = {"tokens": tokenizer.encode(images).reshape(len(images), -1)}
    return batch if labels is None else batch | {"label": labels[indices]}
