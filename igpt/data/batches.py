"""Makes batches of tokens from examples: reads, augments and encodes images. A batch is a function of (seed, step).

The order of examples, augmentation, crops and masks depend on nothing else. So a resumed run continues with its next
step, and every process computes only its own rows of a batch.
"""

import dataclasses
from collections.abc import Iterator

import numpy as np
from jaxtyping import Bool, Int

from igpt.data.examples import Split
from igpt.data.settings import DataConfig
from igpt.errors import UserError

AHEAD = 4  # batches that are prepared before the device needs them
Rows = slice | Int[np.ndarray, "n"]  # the rows of a batch that this process reads: see sharding.process_rows


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """Pads an image by `pad` pixels, crops it at random to its size and, with `flip`, mirrors it with probability 1/2.

    An image is augmented with probability `probability`. The other images remain unchanged.
    """

    pad: int = 0
    pad_mode: str = "constant"  # constant (black), edge or reflect
    flip: bool = False
    probability: float = 1.0

    @classmethod
    def of(cls, settings: DataConfig) -> "Augmentation":
        return cls(settings.pad, settings.pad_mode, settings.flip, settings.augment_probability)

    def __call__(
        self, images: np.ndarray, rng: np.random.Generator, rows: Rows, batch_size: int, black: int = 0
    ) -> np.ndarray:
        """Augments images [n, H, W, 3], or their tokens [n, H, W]: `rows` of a batch. Padding is `black`.

        Random numbers are drawn for the whole batch, so that the result does not depend on the number of processes.
        """
        height, width = images.shape[1:3]
        applied = rng.random(batch_size)[rows] < self.probability
        offsets = rng.integers(0, 2 * self.pad + 1, (2, batch_size))[:, rows]
        if self.pad:
            top, left = np.where(applied, offsets, self.pad)
            around = [(0, 0), (self.pad, self.pad), (self.pad, self.pad), (0, 0)][: images.ndim]
            filled = {"constant_values": black} if self.pad_mode == "constant" else {}
            example = np.arange(len(images))[:, None, None]
            row = (top[:, None] + np.arange(height))[:, :, None]
            column = (left[:, None] + np.arange(width))[:, None, :]
            images = np.pad(images, around, self.pad_mode, **filled)[example, row, column]
        if not self.flip:
            return images
        flips = ((rng.random(batch_size)[rows] < 0.5) & applied).reshape(-1, *[1] * (images.ndim - 1))
        return np.where(flips, images[:, :, ::-1], images)


@dataclasses.dataclass(frozen=True)
class Drops:
    """Masks of the BERT objective (Chen et al. 2020, section 2.1): each position is dropped with probability `rate`.

    A mask is True where a position is kept. Training draws a new mask for each image in each step. In evaluation an
    image always has the same `masks` masks.
    """

    rate: float = 0.15
    masks: int = 1
    seed: int = 0

    def of_step(self, step: int, batch_size: int, rows: Rows, length: int) -> Bool[np.ndarray, "n 1 T"]:
        draws = np.random.default_rng((self.seed, 3, step)).random((batch_size, 1, length), np.float32)
        return draws[rows] >= self.rate

    def of_images(self, indices: np.ndarray, length: int) -> Bool[np.ndarray, "n M T"]:
        draws = [np.random.default_rng((self.seed, 4, i)).random((self.masks, length), np.float32) for i in indices]
        return np.stack(draws) >= self.rate


class EpochOrder:
    """Maps positions in an endless stream of epochs to indices of examples. Each epoch has its own random order."""

    def __init__(self, count: int, seed: int):
        self.count, self.seed = count, seed
        self._newest = (None, None)

    def __getitem__(self, positions: np.ndarray) -> np.ndarray:
        epochs, within = np.divmod(positions, self.count)
        indices = np.empty_like(positions)
        for epoch in np.unique(epochs).tolist():
            newest, order = self._newest  # both values in one read: another thread may replace the pair
            if newest != epoch:
                order = np.random.default_rng((self.seed, 0, epoch)).permutation(self.count)
                self._newest = (epoch, order)
            indices[epochs == epoch] = order[within[epochs == epoch]]
        return indices


class TrainBatches:
    """Training batches, which can be read in any order: `batches[step]` has this process's rows of the batch of `step`.

    A batch has "tokens" int32 [n, T], "label" int32 [n] if the split has labels, and with `drops` "keep" bool
    [n, 1, T]. Raises UserError if the split is smaller than a batch, or if an image cannot be read.
    """

    def __init__(
        self, split: Split, tokenizer, batch_size: int, seed: int, augmentation: Augmentation, rows: Rows, drops=None
    ):
        if batch_size > (count := len(split)):
            raise UserError(f"train.batch_size is {batch_size}, but there are only {count} training images; lower it")
        self.split, self.tokenizer, self.batch_size = split, tokenizer, batch_size
        self.seed, self.augmentation, self.rows, self.drops = seed, augmentation, rows, drops
        self.stores_tokens, self.black = split.holds_tokens_of(tokenizer), 0
        if self.stores_tokens and tokenizer.is_per_pixel:
            self.black = int(tokenizer.encode(np.zeros((1, 1, 3), np.uint8)).item())
        elif self.stores_tokens and (augmentation.pad or augmentation.flip):
            raise UserError(
                f"the images are stored as {tokenizer.noun} of a {tokenizer.kind}: those of a shifted or mirrored "
                "image are others. Set data.pad=0 and data.flip=False, or learn from the images themselves"
            )
        self.order = EpochOrder(len(split), seed)

    def __getitem__(self, step: int) -> dict:
        indices = self.order[np.arange(step * self.batch_size, (step + 1) * self.batch_size)[self.rows]]
        # The second number of a seed is its purpose, so that purposes are independent: order (0), augmentation (1),
        # crops (2), masks (3, 4), places of scattered images in evaluation (5), some examples of a split (6). A purpose
        # in last place is never 0, because NumPy pads seeds with zeros: (0,) and (0, 0) are the same seed as (0, 0, 0).
        rng = np.random.default_rng((self.seed, 1, step))
        if self.stores_tokens:
            grids = self.split.images.grids(indices)
            tokens = self.augmentation(grids, rng, self.rows, self.batch_size, self.black)
        else:
            shape = self.batch_size, self.split.images.draws
            draws = np.random.default_rng((self.seed, 2, step)).random(shape)[self.rows]
            images, indices = self.split.read(indices, draws)
            tokens = self.tokenizer.encode(self.augmentation(images, rng, self.rows, self.batch_size))
        batch = _batch(tokens, self.split, indices)
        if self.drops is None:
            return batch
        return batch | {"keep": self.drops.of_step(step, self.batch_size, self.rows, batch["tokens"].shape[1])}

    def iterate(self, start: int, stop: int, threads: int = 1) -> Iterator[dict]:
        """Yields batches start, ..., stop - 1 in order. `threads` threads prepare the next AHEAD, or one each."""
        import grain.python as grain  # the import is slow

        steps = grain.MapDataset.range(start, stop).map(self.__getitem__)
        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(AHEAD, threads))
        return iter(steps.to_iter_dataset(options))


def eval_batches(
    split: Split, tokenizer, batch_size: int, rows: Rows = slice(None), drops: Drops | None = None
) -> Iterator[dict]:
    """Yields batches like those of `TrainBatches`, with "mask" float32 [n]. Each example occurs once, in order.

    The mask is 0.0 for images that could not be read, and for copies of example 0 that fill the last batch.
    """
    for start in range(0, len(split), batch_size):
        positions = np.arange(start, start + batch_size)[rows]
        wanted = np.where(positions < len(split), positions, 0)
        tokens, used = split.encode(tokenizer, wanted)
        mask = (positions < len(split)) & (used == wanted)
        batch = _batch(tokens, split, used) | {"mask": mask.astype(np.float32)}
        if drops is not None:
            batch["keep"] = drops.of_images(used, batch["tokens"].shape[1])
        yield batch


def _batch(tokens: np.ndarray, split: Split, indices: np.ndarray) -> dict[str, np.ndarray]:
    batch = {"tokens": tokens.reshape(len(tokens), -1)}
    return batch if split.labels is None else batch | {"label": split.labels_of(indices)}
