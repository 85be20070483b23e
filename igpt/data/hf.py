"""The source `hf:NAME`: image data sets of the `datasets` library, from the Hugging Face hub or from local files.

    hf:ylecun/mnist    hf:uoft-cs/cifar100,label=fine_label    hf:photos.parquet    hf:folder

The library fetches the data and keeps them as Arrow files, which are mapped from disk. It decodes no image: the encoded
bytes are decoded by igpt.data.images, with limits. pip install -e ".[datasets]"
"""

import functools
import hashlib
import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from igpt.data.arrays import as_int32, divide
from igpt.data.classes import distinct_names, full_names, listed
from igpt.data.examples import SPLITS, EncodedImages, Source, Split
from igpt.data.folder import split_named
from igpt.data.images import Preprocess, UnreadableImage, check_bytes
from igpt.data.settings import DataConfig
from igpt.errors import UserError, first_line

OPTIONS = ("config", "revision", "image", "label")
FILES = {".parquet": "parquet", ".arrow": "arrow"}  # ending of a local file -> the library's reader
LABELS = ("int", "uint", "bool", "string", "large_string")  # types of columns that can be labels
PLACES = "give a data set of the hub, such as hf:ylecun/mnist, or a local folder, .parquet or .arrow file"
SAMPLED = 64  # rows whose bytes tell a data set from others


class Place(NamedTuple):
    """What hf:NAME,option=value names: a hub id or a local path, and the options."""

    name: str
    options: dict[str, str]

    @property
    def folder(self) -> Path | None:
        """The folder of local data. None for the hub."""
        path = Path(self.name)
        return None if not path.exists() else path if path.is_dir() else path.parent


class Data(NamedTuple):
    """An opened data set: the library's data sets by split, the columns, and the class names.

    label: the column of labels, or None. numbers: for labels that are text, the number of each class.
    """

    splits: dict[str, Any]
    image: str
    label: str | None
    class_names: tuple[str, ...] | None
    numbers: dict[str, int] | None = None


class Rows:
    """The encoded images of all splits, one after the other, and their names. EncodedImages takes them as `files`."""

    def __init__(self, data: Data, place: Place, source: str):
        from datasets import config
        from huggingface_hub import constants

        self.parts = [part.with_format("arrow") for part in data.splits.values()]
        self.names, self.image, self.source = [*data.splits], data.image, source
        self.starts = np.cumsum([0, *map(len, self.parts)])
        folders = (place.folder, config.HF_CACHE_HOME, config.HF_DATASETS_CACHE, constants.HF_HUB_CACHE)
        # The library may give the path behind a symbolic link.
        paths = (find(folder) for folder in folders if folder for find in (os.path.abspath, os.path.realpath))
        self.folders = [os.path.join(path, "") for path in paths]

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, number: int) -> tuple[bytes | Path, str]:
        which = int(np.searchsorted(self.starts, number, side="right")) - 1
        row = int(number - self.starts[which])
        name = f"{self.source} {self.names[which]} row {row}"
        try:
            value = self.parts[which][row].column(self.image)[0]
        except Exception as error:  # damaged files raise exceptions of many types
            raise UnreadableImage(f"{name} cannot be read: {first_line(error)}; fetch the data set again") from None
        return content_of(value, name, self.folders)

    @functools.cached_property
    def identity(self) -> str:
        """The splits with their numbers of rows, and a digest of the bytes of some rows, or of their files' names."""
        digest = hashlib.sha256()
        for number in np.linspace(0, len(self) - 1, SAMPLED).astype(int).tolist():
            try:
                content, _ = self[number]
            except UnreadableImage:
                content = b"unreadable"
            digest.update(content if isinstance(content, bytes) else os.fsencode(content.name))
        counts = " ".join(f"{name}:{len(part)}" for name, part in zip(self.names, self.parts, strict=True))
        return f"{self.image} {counts} {digest.hexdigest()}"


def content_of(value, name: str, folders: list[str]) -> tuple[bytes | Path, str]:
    """The encoded image in an Arrow scalar, bytes or {"bytes", "path"}, and its name for messages.

    Raises UnreadableImage if there is none, if it is too large, or if its path leads out of `folders`: a data set must
    not name files of this machine.
    """
    fields = dict(value.items()) if hasattr(value, "items") and value.is_valid else {"bytes": value}
    stored, path = fields.get("bytes"), fields.get("path")
    path = path.as_py() if path is not None else None
    if stored is not None and stored.is_valid:
        name += f" ({os.path.basename(path)})" if path else ""
        buffer = stored.as_buffer()
        check_bytes(buffer.size, name)
        return buffer.to_pybytes(), name
    if not path:
        raise UnreadableImage(f"{name} has no image")
    if not os.path.abspath(path).startswith(tuple(folders)):
        raise UnreadableImage(f"{name} is the file {path}, which is not in the data set's folder: put its bytes there")
    return Path(path), f"{name} ({os.path.basename(path)})"


def open_hf(place: str, settings: DataConfig, whole: bool = False) -> Source:
    """Opens a data set with random access. With `whole`, all images are test images. UserError if it cannot be used.

    Its own splits are used as they are. If it has a validation split and no test split with labels, the test images are
    the validation split, as for ImageNet. Splits that are missing are held out of "train".
    """
    where = parse(place)
    data = load(where, settings.source)
    rows = Rows(data, where, settings.source)
    own = {split: np.arange(*rows.starts[i : i + 2]) for i, split in enumerate(data.splits)}
    labels = None
    if data.label is not None:
        columns = [part.with_format("arrow").select_columns([data.label])[:] for part in data.splits.values()]
        labels = np.concatenate([label_numbers(column.column(0), data, settings.source) for column in columns])
    images = EncodedImages(rows, Preprocess.of(settings), settings.channels, settings.on_unreadable == "skip")
    taken = map(Split(images, labels, may_lack_labels=True).take, divide(own, settings, whole))
    return Source(settings.source, *taken, settings.channels, class_names=data.class_names)


def parse(place: str) -> Place:
    """Reads NAME,option=value,... Raises UserError for an option that is not known."""
    if Path(place).exists():
        return Place(place, {})
    name, *given = place.split(",")
    options = dict(item.partition("=")[::2] for item in given)
    if unknown := [option for option in options if option not in OPTIONS]:
        known = f"there are {', '.join(OPTIONS)}, as in hf:NAME,label=COLUMN"
        raise UserError(f"hf:{place} has the option {unknown[0]!r}; {known}")
    return Place(name, options)


def load(place: Place, source: str, streaming: bool = False) -> Data:
    """Opens a data set with the library, as mapped files or as streams, and finds splits, columns and classes."""
    try:
        import datasets
    except ImportError:
        raise UserError(f'{source} needs the datasets library: pip install -e ".[datasets]"') from None
    datasets.logging.set_verbosity_error()
    path, options = Path(place.name), place.options
    try:
        if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
            if streaming:
                raise UserError(f"{source} is on the disk, as the library saves it; leave --stream out")
            found = datasets.load_from_disk(place.name)
        elif path.is_file():
            if path.suffix not in FILES:
                raise UserError(f"{source} is a file that ends in {path.suffix!r}; {', '.join(FILES)} are read")
            found = datasets.load_dataset(FILES[path.suffix], data_files=place.name, streaming=streaming)
        else:
            how = dict(revision=options.get("revision"), streaming=streaming)
            found = datasets.load_dataset(place.name, options.get("config") or None, **how)
    except UserError:
        raise
    except Exception as error:  # the library and the network raise exceptions of many types
        raise UserError(f"{source} cannot be opened: {first_line(error)}; {PLACES}") from None
    found = found if isinstance(found, dict) else {"train": found}
    train = min(found, key=lambda name: (name != "train", split_named(name) != "train"))  # else the first
    return _with_splits(found, _columns(found[train].features, options, source), source)


def _columns(features, options: dict[str, str], source: str) -> tuple:
    """The columns of images and labels, and the class names. Raises UserError if a choice is missing or impossible."""
    import datasets

    if features is None:
        raise UserError(f"{source} states no columns; prepare it as parquet with features, and open that")
    kinds = {"image": datasets.Image, "label": datasets.ClassLabel}
    chosen = {}
    for what, kind in kinds.items():
        candidates = [name for name, feature in features.items() if isinstance(feature, kind)]
        name = options.get(what, what if what in features else None)
        if name is None and len(candidates) > 1:
            one = f"hf:NAME,{what}={candidates[0]}"
            raise UserError(f"{source} has several columns of {what}s: {', '.join(candidates)}; choose one, as {one}")
        chosen[what] = name if name is not None else next(iter(candidates), None)
    image, label = chosen["image"], chosen["label"] or None
    if image not in features or not _holds_images(features[image]):
        found = ", ".join(f"{name} ({type(feature).__name__})" for name, feature in features.items())
        raise UserError(f"{source} has no column of images; it has {found}: name it, as hf:NAME,image=COLUMN")
    if label is None:
        return image, None, None
    kind = features.get(label)
    if not (isinstance(kind, datasets.ClassLabel) or _is_value(kind, LABELS)):
        found = "is missing" if kind is None else f"is no single number or text, but {type(kind).__name__}"
        raise UserError(
            f"{source}: the column {label!r} {found}; name another, as hf:NAME,label=COLUMN, or none: label="
        )
    names = distinct_names(kind.names, source) if isinstance(kind, datasets.ClassLabel) and kind.names else None
    return image, label, None if names == full_names(None, len(names or ())) else names


def _holds_images(feature) -> bool:
    import datasets

    return (
        isinstance(feature, datasets.Image)
        or _is_value(feature, ("binary", "large_binary"))
        or (isinstance(feature, dict) and "bytes" in feature)
    )


def _is_value(feature, kinds: tuple[str, ...]) -> bool:
    return str(getattr(feature, "dtype", "")).rstrip("0123456789") in kinds and type(feature).__name__ == "Value"


def _with_splits(found: dict, columns: tuple, source: str) -> Data:
    """The data set with its splits in the order of SPLITS. Prints the names of splits that it passes over."""
    image, label, class_names = columns
    theirs = {split: split for split in SPLITS if split in found}  # our split -> the library's name of it
    for name in found:
        if (split := split_named(name)) and split not in theirs:
            theirs[split] = name
    if "train" not in theirs:
        if len(found) > 1:
            raise UserError(f"{source} has the splits {', '.join(found)}, and none of them is train; choose another")
        theirs = {"train": next(iter(found))}
    if label and "test" in theirs and _is_unlabelled(found[theirs["test"]], label):
        del theirs["test"]
    if "test" not in theirs and "validation" in theirs:
        theirs["test"] = theirs.pop("validation")
    if others := [name for name in found if name not in theirs.values()]:
        print(f"{source}: passed over the splits {', '.join(others)}")
    splits = {split: found[theirs[split]] for split in SPLITS if split in theirs}
    for split, part in splits.items():
        if any(part.features.get(column) != splits["train"].features[column] for column in (image, label) if column):
            needed = listed([column for column in (image, label) if column])
            raise UserError(f"{source}: {split} has other columns than train; all splits need the same {needed}")
    data = Data(splits, image, label, class_names)
    return data if not label or class_names or not _is_text(splits["train"], label) else _numbered(data, source)


def _is_text(part, label: str) -> bool:
    return "string" in str(getattr(part.features[label], "dtype", ""))


def _numbered(data: Data, source: str) -> Data:
    """Numbers classes that are text in the order of their names. Reads the whole column of labels."""
    if not hasattr(data.splits["train"], "__len__"):
        raise UserError(f"{source}: its labels are text, so a stream does not know the classes; leave --stream out")
    texts = set()
    for part in data.splits.values():
        texts |= {text for text in part.unique(data.label) if text is not None}
    names = sorted(texts)
    numbers = {name: i for i, name in enumerate(names)}
    return data._replace(class_names=distinct_names(names, source), numbers=numbers)


def _is_unlabelled(part, label: str) -> bool:
    """Whether there is no column of labels, or the first example has no label: ImageNet's test images have -1."""
    if label not in (part.features or {}):
        return True
    first = next(iter(part.select_columns([label]).take(1)), {}).get(label)
    return first is None or (not isinstance(first, str) and first < 0)


def label_numbers(column, data: Data, source: str) -> np.ndarray:
    """An Arrow column of labels as int32. A missing label is -1. Raises UserError for a class that is not declared."""
    if data.numbers is not None:
        return np.array([data.numbers.get(text, -1) for text in column.to_pylist()], np.int32)
    try:
        labels = np.asarray(column.cast("int64").fill_null(-1).to_numpy())
    except ValueError as error:  # a number above the largest int64
        raise UserError(f"{source}: the labels are no classes: {first_line(error)}") from None
    labels = as_int32(labels, f"{source}: the labels")
    declared = getattr(data.splits["train"].features[data.label], "num_classes", None)
    if declared and len(labels) and not -1 <= labels.min() <= labels.max() < declared:
        found = f"the labels run from {labels.min()} to {labels.max()}, but it declares {declared} classes"
        remedy = "-1 marks a missing label: repair the data set, or name another column, as hf:NAME,label=COLUMN"
        raise UserError(f"{source}: {found}, which are 0 to {declared - 1}; {remedy}")
    return labels
