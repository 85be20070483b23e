"""Reads examples by index from memory, from encoded image files, or from mapped files of tokens."""

import abc
import dataclasses
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
from jaxtyping import Int
from PIL import Image

from igpt.data.images import Preprocess, UnreadableImage, decode
from igpt.errors import UserError
from igpt.tokenizer import Tokenizer

SPLITS = ("train", "validation", "test")


class Images(abc.ABC):
    """Images uint8 [N, H, W, 3] that are read when they are indexed: by a number, a slice, an array or a tuple."""

    dtype = np.dtype(np.uint8)
    shape: tuple[int, int, int, int]
    draws = 3  # random numbers for each image that `read` takes in training
    tokenizer: Tokenizer | None = None  # set if the images are stored as tokens, which `grids` returns
    unreadable: Mapping[int, str] = MappingProxyType({})  # index -> the reason why the image cannot be read

    @abc.abstractmethod
    def read(self, indices: np.ndarray, draws: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Returns images [n, H, W, 3] and the indices of those that were read.

        With `skip`, the next readable image stands in for one that is not. `draws` [n, self.draws] are random numbers
        in [0, 1), which choose the training crops. Without them, images are preprocessed as for evaluation.
        """

    @abc.abstractmethod
    def take(self, indices: np.ndarray) -> "Images":
        """Returns the images at these indices, in this order, without reading them."""

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index) -> np.ndarray:
        if isinstance(index, tuple):  # parts of images, such as [..., :1]
            return np.asarray(self)[index]
        if isinstance(index, slice):
            index = np.arange(len(self))[index]
        images, _ = self.read(np.atleast_1d(index))
        return images if np.ndim(index) else images[0]

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        return np.asarray(self[:], dtype)


class ArrayImages(Images):
    """Images in memory: an array uint8 [N, H, W, 3]."""

    def __init__(self, array: np.ndarray):
        self.array, self.shape = array, array.shape

    def read(self, indices: np.ndarray, draws: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        return self.array[indices], indices

    def take(self, indices: np.ndarray) -> "ArrayImages":
        return ArrayImages(self.array[indices])

    def __getitem__(self, index) -> np.ndarray:
        return self.array[index]


class EncodedImages(Images):
    """Images that are decoded and resized each time they are read.

    Image i is `files[indices[i]]`, by default `files[i]`: a pair of its content (bytes, a path, or an array [h, w, 3])
    and a name for messages. An image that cannot be read raises UserError. With `skip`, the next readable image
    replaces it instead, and `unreadable` records the reason.
    """

    def __init__(self, files, preprocess: Preprocess, channels: int = 3, skip: bool = False, indices=None):
        self.files, self.preprocess, self.channels, self.skip = files, preprocess, channels, skip
        self.indices = np.arange(len(files)) if indices is None else indices
        self.shape = (len(self.indices), *preprocess.size, 3)
        self.unreadable = {}

    def read(self, indices: np.ndarray, draws: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        indices = np.where(indices < 0, indices + len(self), indices)
        images, used = np.empty((len(indices), *self.shape[1:]), np.uint8), np.array(indices)
        for row in range(len(indices)):
            images[row], used[row] = self._first_readable(int(indices[row]), None if draws is None else draws[row])
        return images, used

    def take(self, indices: np.ndarray) -> "EncodedImages":
        return EncodedImages(self.files, self.preprocess, self.channels, self.skip, self.indices[indices])

    def _first_readable(self, index: int, draws) -> tuple[np.ndarray, int]:
        """Reads the image at `index`. With `skip`, the next readable image replaces an unreadable one."""
        for _ in range(len(self)):
            if index not in self.unreadable:
                try:
                    content, name = self.files[int(self.indices[index])]
                    if isinstance(content, np.ndarray):
                        image = Image.fromarray(content)
                    else:
                        image = decode(content, name, self.channels)
                    return self.preprocess(image, draws, name), index
                except UnreadableImage as error:
                    if not self.skip:
                        remedy = (
                            "skip passes over such images (igpt palette, prepare and evaluate: --on_unreadable=skip)"
                        )
                        raise UserError(f"{error}. data.on_unreadable={remedy}; or remove it") from None
                    self.unreadable[index] = str(error)
            index = (index + 1) % len(self)
        raise UserError(f"none of {len(self)} images can be read; the first: {self.unreadable[min(self.unreadable)]}")


class DecodedTokens(Images):
    """Images that are stored as tokens [N, T], such as in a mapped file, and decoded each time they are read.

    Raises UserError, which names `path`, if a token that is read is none of the tokenizer.
    """

    def __init__(self, tokens, tokenizer: Tokenizer, path: str, image_size: tuple[int, int]):
        self.tokens, self.tokenizer, self.path = tokens, tokenizer, path
        self.shape = (len(tokens), *image_size, 3)

    def read(self, indices: np.ndarray, draws: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        return self.tokenizer.decode(self.grids(indices)), indices

    def take(self, indices: np.ndarray) -> "DecodedTokens":
        return DecodedTokens(self.tokens[indices], self.tokenizer, self.path, self.shape[1:3])

    def grids(self, index) -> np.ndarray:
        """Returns the tokens without decoding them, int32 [..., h, w]."""
        tokens = self.tokens[index]
        if tokens.size and not (tokens.min() >= 0 and tokens.max() < self.tokenizer.vocab_size):
            found = f"tokens run from {tokens.min()} to {tokens.max()}"
            raise UserError(f"{self.path}: {found}; its {self.tokenizer.kind} has 0..{self.tokenizer.vocab_size - 1}")
        return tokens.astype(np.int32).reshape(*tokens.shape[:-1], *self.tokenizer.grid(*self.shape[1:3]))


@dataclasses.dataclass(frozen=True)
class Split:
    """The examples of a split: images uint8 [N, H, W, 3] and, if the source has them, labels int32 [N].

    Labels are an array, or an object that reads labels when it is indexed like an array. With `may_lack_labels`, -1
    marks an image without a label; otherwise -1 is a class, as labels may be any integers. With `needs_labels`, too,
    `labels_of` refuses such images: labels in files are not all read before.
    """

    images: Images
    labels: Any
    may_lack_labels: bool = False
    needs_labels: bool = False

    def __len__(self) -> int:
        return len(self.images)

    def read(self, indices: np.ndarray, draws: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        return self.images.read(indices, draws)

    def labels_of(self, indices: np.ndarray) -> Int[np.ndarray, "n"]:
        """The labels at these indices. Raises UserError if one is missing that is needed."""
        labels = self.labels[indices]
        if self.needs_labels and self.may_lack_labels and -1 in labels:
            raise UserError(_missing_labels("an image", "has"))
        return labels

    def take(self, indices: np.ndarray) -> "Split":
        """Returns the examples at these indices, in this order."""
        labels = None if self.labels is None else self.labels[indices]
        return dataclasses.replace(self, images=self.images.take(indices), labels=labels)

    def some(self, count: int) -> "Split":
        """Returns `count` random examples in the order of the split, the same ones in every call."""
        return self.take(self.some_indices(count))

    def some_indices(self, count: int) -> Int[np.ndarray, "n"]:
        """Returns the sorted indices of `count` random examples, the same ones in every call."""
        return np.sort(np.random.default_rng((0, 6)).permutation(len(self))[:count])  # 6: see TrainBatches

    def renumbered(self, table: np.ndarray) -> "Split":
        """Returns the examples with the label `table[label]` for each label."""
        if self.labels is None:
            return self
        in_memory = isinstance(self.labels, np.ndarray)
        labels = table[self.labels] if in_memory else self.labels.renumbered(table)
        return dataclasses.replace(self, labels=labels)

    def holds_tokens_of(self, tokenizer) -> bool:
        """Whether the images are stored as tokens of `tokenizer`, so that they need not be encoded."""
        stored = self.images.tokenizer
        return stored is not None and stored.digest == getattr(tokenizer, "digest", None)

    def encode(self, tokenizer, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns tokens [n, h, w] for evaluation, and the indices of the images that were read: see `Images.read`."""
        if self.holds_tokens_of(tokenizer):
            return self.images.grids(indices), indices
        images, used = self.read(indices)
        return tokenizer.encode(images), used


def check_labels(train: Split, *others: Split, num_classes: int = 0) -> None:
    """Raises UserError unless every image has a label in 0..num_classes - 1, and training has at least two classes.

    `others` are the validation and the test split. With num_classes 0, labels may be any integers. A class that the
    data set declares counts even without an example. Of labels in files, only the first are read.
    """
    splits = dict(zip(SPLITS, (train, *others), strict=False))
    if lacking := [name for name, split in splits.items() if split.labels is None]:
        whose = "this source has" if len(lacking) == len(splits) else f"the images of {', '.join(lacking)} have"
        raise UserError(
            f"labels are needed, and {whose} none; add an integer array 'labels' to an .npz, or sort the "
            "pictures of a folder into a sub-folder for each class"
        )
    for name, split in splits.items():
        _refuse_missing(split, f" of {name}")
    check_classes((train, *others), num_classes)
    if len(_classes(train)) < 2:
        raise UserError(f"all training images have the label {train.labels[0]}; two classes or more are needed")


def check_classes(splits: Sequence[Split], num_classes: int) -> None:
    """Raises UserError if a label of these splits is missing, or not in 0..num_classes - 1. 0 allows any label."""
    for split in splits:
        _refuse_missing(split)
    classes = np.unique(np.concatenate([_classes(split) for split in splits]))
    if num_classes and not (classes[0] >= 0 and classes[-1] < num_classes):
        raise UserError(
            f"the labels run from {classes[0]} to {classes[-1]}, but model.num_classes is {num_classes}, which allows "
            f"0 to {num_classes - 1}; "
            + (f"set model.num_classes={classes[-1] + 1}" if classes[0] >= 0 else "number the classes from 0 on")
        )


def _refuse_missing(split: Split, whose: str = "") -> None:
    if split.may_lack_labels and -1 in _classes(split):
        count = np.count_nonzero(split.labels == -1) if isinstance(split.labels, np.ndarray) else "some"
        raise UserError(_missing_labels(f"{count} images{whose}", "have"))


def _missing_labels(which: str, have: str) -> str:
    remedy = "remove such images from the data set, or name another column of labels, as hf:NAME,label=COLUMN"
    return f"{which} {have} no label; here every image needs one: {remedy}"


def _classes(split: Split) -> np.ndarray:
    """The classes in ascending order. Labels in files have a method `classes`, which avoids reading every label."""
    return split.labels.classes() if hasattr(split.labels, "classes") else np.unique(split.labels)


def few_labels(labels: Any, per_class: int, seed: int) -> Int[np.ndarray, "n"]:
    """Sorted indices of `per_class` random examples of each class, for low-data sets (Chen et al. 2020, section 4.7).

    With the same seed, a larger set contains every smaller set. Raises UserError if a class has too few examples.
    `labels` are those of a `Split`. In files they may have a method `readable`, which leaves out damaged records.
    """
    readable = labels.readable() if hasattr(labels, "readable") else np.arange(len(labels))
    labels = labels[readable]
    classes, counts = np.unique(labels, return_counts=True)
    if counts.min() < per_class:
        scarce = classes[counts.argmin()]
        raise UserError(
            f"{per_class} labels of each class were asked for, but class {scarce} has only {counts.min()} training "
            f"examples; choose {counts.min()} or fewer"
        )
    chosen = [
        np.random.default_rng((seed, index)).permutation(readable[labels == label])[:per_class]
        for index, label in enumerate(classes)
    ]
    return np.sort(np.concatenate(chosen))


@dataclasses.dataclass(frozen=True)
class Source:
    """A data set with its three splits.

    `channels` is 1 if the images are grey, although their arrays are RGB. `tokenizer` is None unless the images are
    stored as tokens. `class_names[i]` is the name of class i; None: the classes have numbers only.
    """

    name: str
    train: Split
    validation: Split
    test: Split
    channels: int
    tokenizer: Tokenizer | None = None
    class_names: tuple[str, ...] | None = None

    def splits(self) -> dict[str, Split]:
        return {name: getattr(self, name) for name in SPLITS}

    @property
    def image_size(self) -> tuple[int, int]:
        return self.train.images.shape[1:3]

    @property
    def unreadable(self) -> list[str]:
        """The reasons why this process has skipped images so far, in the order of the images."""
        found = [split.images.unreadable for split in self.splits().values()]
        return [reasons[i] for reasons in found for i in sorted(reasons)]  # a copy: other threads may add reasons
