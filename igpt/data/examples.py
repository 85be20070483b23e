"""Examples by index, wherever they lie: in memory, in encoded files, or as palette tokens in mapped files."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int
from PIL import Image

from igpt.data.images import Preprocess, UnreadableImage, decode
from igpt.errors import UserError
from igpt.palette import Palette


class Chosen(Sequence):
    """Some of a sequence's entries, read when they are asked for."""

    def __init__(self, entries: Sequence, indices: np.ndarray):
        self.entries, self.indices = entries, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int):
        return self.entries[int(self.indices[index])]


class EncodedImages:
    """Images uint8 [N, H, W, 3] that are decoded and brought to size when they are asked for.

    `files[i]` is (bytes, a path, or an array [h, w, 3]; a name for messages). What cannot be read raises
    UserError, or with `skip` is replaced by the next image that can be, and counted in `unreadable`.
    """

    dtype = np.dtype(np.uint8)

    def __init__(self, files: Sequence, preprocess: Preprocess, channels: int = 3, skip: bool = False):
        self.files, self.preprocess, self.channels, self.skip = files, preprocess, channels, skip
        self.shape = (len(files), *preprocess.size, 3)
        self.unreadable = {}  # index -> what is wrong with it

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index) -> np.ndarray:
        """Whole images, as evaluation sees them, by a number, a slice or an array."""
        if isinstance(index, tuple):  # goes on into the images: NumPy knows how
            return np.asarray(self)[index]
        if isinstance(index, slice):
            index = np.arange(len(self))[index]
        images, _ = self.read(np.atleast_1d(index))
        return images if np.ndim(index) else images[0]

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        return np.asarray(self[:], dtype)

    def read(self, indices: np.ndarray, draws: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Images [n, H, W, 3] and the indices of which they are. `draws` [n, 3] in [0, 1): random training crops."""
        indices = np.where(indices < 0, indices + len(self), indices)
        images, used = np.empty((len(indices), *self.shape[1:]), np.uint8), np.array(indices)
        for row in range(len(indices)):
            images[row], used[row] = self._readable(int(indices[row]), None if draws is None else draws[row])
        return images, used

    def _readable(self, index: int, draws) -> tuple[np.ndarray, int]:
        for _ in range(len(self)):
            if index not in self.unreadable:
                try:
                    content, name = self.files[index]
                    if isinstance(content, np.ndarray):
                        image = Image.fromarray(content)
                    else:
                        image = decode(content, name, self.channels)
                    return self.preprocess(image, draws, name), index
                except UnreadableImage as error:
                    if not self.skip:
                        raise UserError(f"{error}. data.on_unreadable=skip passes over such images") from None
                    self.unreadable[index] = str(error)
            index = (index + 1) % len(self)
        first = self.unreadable[min(self.unreadable)]
        raise UserError(f"none of {len(self)} images can be read; the first: {first}")


class DecodedTokens:
    """Images uint8 [N, H, W, 3] kept as their palette tokens [N, H W]: an array that decodes what is asked of it.

    The tokens stay wherever they are, such as in a mapped file. An index picks whole images, by a number, a slice or
    an array. Raises UserError naming `path` for tokens that the palette does not have, when it meets them.
    """

    dtype = np.dtype(np.uint8)

    def __init__(self, tokens, palette: Palette, path: str, image_size: tuple[int, int]):
        self.tokens, self.palette, self.path = tokens, palette, path
        self.shape = (len(tokens), *image_size, 3)

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index) -> np.ndarray:
        if isinstance(index, tuple):  # goes on into the images, such as [..., :1]: NumPy knows how
            return np.asarray(self)[index]
        return self.palette.decode(self.grids(index))

    def grids(self, index) -> np.ndarray:
        """The tokens themselves, int32 [..., H, W]."""
        tokens = self.tokens[index]
        if tokens.size and not (tokens.min() >= 0 and tokens.max() < self.palette.vocab_size):
            raise UserError(
                f"{self.path}: tokens run from {tokens.min()} to {tokens.max()}; its palette has "
                f"0..{self.palette.vocab_size - 1}"
            )
        return tokens.astype(np.int32).reshape(*tokens.shape[:-1], *self.shape[1:3])

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        """All images at once: three bytes a token."""
        return np.asarray(self[:], dtype)


@dataclasses.dataclass(frozen=True)
class Split:
    """Examples by index: images uint8 [N, H, W, 3] and, where the source has them, labels int32 [N]."""

    images: np.ndarray | EncodedImages | DecodedTokens
    labels: np.ndarray | Sequence | None

    def __len__(self) -> int:
        return len(self.images)

    def read(self, indices: np.ndarray, draws: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Images [n, H, W, 3], and their indices: others than asked for where an image could not be read."""
        if isinstance(self.images, EncodedImages):
            return self.images.read(indices, draws)
        return self.images[indices], indices

    def readable(self) -> "Split":
        """The same without the images that cannot be read, each with its label; encoded ones are decoded once."""
        if not isinstance(self.images, EncodedImages):
            return self
        asked = np.arange(len(self))
        images, used = self.images.read(asked)
        kept = used == asked
        return Split(images[kept], None if self.labels is None else self.labels[kept])

    def take(self, indices: np.ndarray) -> "Split":
        """The examples at these indices, in this order."""
        images = self.images
        if isinstance(images, EncodedImages):
            images = EncodedImages(Chosen(images.files, indices), images.preprocess, images.channels, images.skip)
        elif isinstance(images, DecodedTokens):
            images = DecodedTokens(images.tokens[indices], images.palette, images.path, images.shape[1:3])
        else:
            images = images[indices]
        return Split(images, None if self.labels is None else self.labels[indices])

    @property
    def crops_at_random(self) -> bool:
        """Whether `read` has a use for draws."""
        return isinstance(self.images, EncodedImages) and self.images.preprocess.kind == "crop"

    def holds_tokens_of(self, tokenizer) -> bool:
        """Whether `images.grids` are the very tokens that `tokenizer` would make."""
        return isinstance(self.images, DecodedTokens) and np.array_equal(
            self.images.palette.centers, getattr(tokenizer, "centers", None)
        )


def check_labels(train: Split, *others: Split, num_classes: int = 0) -> None:
    """Raises UserError unless every split has labels and training covers two classes, all of them below num_classes.

    num_classes 0: any integers will do. A data set that declares its classes is taken at its word.
    """
    if any(split.labels is None for split in (train, *others)):
        raise UserError(
            "labels are needed, and this source has none; add an integer array 'labels' to an .npz, or sort the "
            "pictures of a folder into a sub-folder for each class"
        )
    trained = _classes(train)
    classes = np.unique(np.concatenate([trained, *map(_classes, others)]))
    if num_classes and not (classes[0] >= 0 and classes[-1] < num_classes):
        raise UserError(
            f"the labels run from {classes[0]} to {classes[-1]}, but model.num_classes is {num_classes}, which allows "
            f"0 to {num_classes - 1}; "
            + (f"set model.num_classes={classes[-1] + 1}" if classes[0] >= 0 else "number the classes from 0 on")
        )
    if len(trained) < 2:
        raise UserError(f"all training images have the label {train.labels[0]}; two classes or more are needed")


def _classes(split: Split) -> np.ndarray:
    """Ascending; labels that are read one by one know better than to read them all."""
    return split.labels.classes() if hasattr(split.labels, "classes") else np.unique(split.labels)


def few_labels(labels: Int[np.ndarray, "N"], per_class: int, seed: int) -> Int[np.ndarray, "n"]:
    """The indices of `per_class` examples of each class, drawn by `seed` and sorted: the low-data sets of section 4.7.

    Those of a smaller number are among those of a larger one. Raises UserError where a class has fewer examples.
    """
    classes, counts = np.unique(labels, return_counts=True)
    if counts.min() < per_class:
        scarce = classes[counts.argmin()]
        raise UserError(
            f"{per_class} labels of each class were asked for, but class {scarce} has only {counts.min()} training "
            f"examples; choose {counts.min()} or fewer"
        )
    chosen = [
        np.random.default_rng((seed, index)).permutation(np.flatnonzero(labels == label))[:per_class]
        for index, label in enumerate(classes)
    ]
    return np.sort(np.concatenate(chosen))


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

    @property
    def unreadable(self) -> list[str]:
        """What was wrong with each image that this process has passed over so far, in the order of the images."""
        encoded = [part.images for part in (self.train, self.validation, self.test)]
        found = [images.unreadable for images in encoded if isinstance(images, EncodedImages)]
        return [texts[i] for texts in found for i in sorted(texts)]  # sorted: other threads may be adding to it
