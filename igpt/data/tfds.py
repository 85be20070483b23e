"""Opens a data set of tensorflow_datasets as a data source. Reads single records in any order, without TensorFlow.

The data set must be in ArrayRecord files. If there are no files, it is downloaded and prepared in this format. Only
this preparation needs TensorFlow (pip install -e ".[tfds]").
"""

import difflib

import numpy as np
import tensorflow_datasets as tfds

from igpt.data.arrays import divide
from igpt.data.classes import distinct_names, full_names
from igpt.data.examples import SPLITS, EncodedImages, Source, Split
from igpt.data.images import Preprocess, UnreadableImage
from igpt.data.settings import DataConfig
from igpt.errors import UserError, first_line

ARRAY_RECORD = tfds.core.FileFormat.ARRAY_RECORD
STILL_ENCODED = {"image": tfds.decode.SkipDecoding()}  # igpt.data.images decodes the images, with limits
LOOKED_AT = 100  # number of first records that are searched for labels without a declared class
UNREAD = np.iinfo(np.int32).min  # marks labels that have not been read; -1 marks missing labels in data sets


class Records:
    """The records of one split: encoded images and their names for messages. EncodedImages takes them as `files`.

    Reading an image also stores its label in `known`, so that the label needs no second read.
    """

    def __init__(self, data_source, features: tfds.features.FeaturesDict, name: str):
        self.data_source, self.features, self.name = data_source, features, name
        self.known = np.full(len(data_source), UNREAD, np.int32) if "label" in features else None
        self.num_classes = _num_classes(features)

    @property
    def identity(self) -> str:
        """The data set with its version, the split and its number of records."""
        info, split = self.data_source.dataset_info, self.data_source.split
        return f"{info.full_name} {split} {len(self)}"

    def __len__(self) -> int:
        return len(self.data_source)

    def __getitem__(self, number: int) -> tuple[bytes, str]:
        name = f"{self.name} record {number}"
        try:
            record = self.features.deserialize_example_np(self.data_source[number], decoders=STILL_ENCODED)
        except Exception as error:  # the reader may raise any exception
            raise UnreadableImage(f"{name} cannot be read: {first_line(error)}; prepare the data set again") from None
        if self.known is not None:
            label, count = int(record["label"]), self.num_classes
            if count and not -1 <= label < count:
                declared = f"the data set declares {count} classes, 0 to {count - 1}"
                raise UserError(f"{name} has the label {label}, but {declared}; repair it and prepare it again")
            try:
                self.known[number] = label
            except OverflowError:
                raise UserError(f"{name} has the label {label}; number the classes from 0 on") from None
        return record["image"], name


class Labels:
    """Labels int32 [N] of some records, read when they are indexed by a number, a slice or an array.

    With a `table`, int32 [C + 1], the label i becomes `table[i]`; its last entry is for -1, a missing label.
    """

    dtype = np.dtype(np.int32)
    ndim = 1

    def __init__(self, records: Records, numbers: np.ndarray, table: np.ndarray | None = None, skip: bool = False):
        self.records, self.numbers, self.table, self.skip = records, numbers, table, skip
        self.shape = numbers.shape

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index) -> np.ndarray | np.int32:
        return self._named(self._read(self.numbers[index]))

    def _read(self, numbers: np.ndarray | np.integer, skip: bool = False) -> np.ndarray | np.int32:
        """The labels in the records of these numbers. With `skip`, UNREAD where a record cannot be read."""
        known, asked = self.records.known, np.unique(numbers)
        for number in asked[known[asked] == UNREAD].tolist():
            try:
                self.records[number]  # stores the label in `known`
            except UnreadableImage:
                if not skip:
                    raise
        return known[numbers]

    def _named(self, labels: np.ndarray | np.int32) -> np.ndarray | np.int32:
        return labels if self.table is None else self.table[labels]

    def renumbered(self, table: np.ndarray) -> "Labels":
        return Labels(self.records, self.numbers, table, self.skip)

    def classes(self) -> np.ndarray:
        """The declared classes, and the labels of the first records. Reads all labels if no classes are declared.

        Otherwise it does not read all labels, because this would read all 140 GB of ImageNet. With `skip`, records that
        cannot be read have no label here.
        """
        if not self.records.num_classes:
            return np.unique(self._found_in(self.numbers))
        numbers = np.arange(self.records.num_classes) if self.table is None else self.table[:-1]
        return np.union1d(numbers, self._found_in(self.numbers[:LOOKED_AT]))

    def readable(self) -> np.ndarray:
        """The indices of all labels. With `skip`, without those of records that cannot be read."""
        return np.flatnonzero(self._read(self.numbers, self.skip) != UNREAD)

    def _found_in(self, numbers: np.ndarray) -> np.ndarray:
        """The labels of these records that can be read."""
        labels = self._read(numbers, self.skip)
        return self._named(labels[labels != UNREAD])

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        return np.asarray(self[:], dtype)


def open_tfds(name: str, settings: DataConfig) -> Source:
    """Opens the data set `name`, as tfds.builder calls it. Raises UserError if it cannot be used.

    Its own splits "train", "validation" and "test" are used as they are. If "test" is missing or has no labels, as in
    ImageNet, the test images are the split "validation". Splits that are missing then are held out of "train". Other
    splits are ignored.
    """
    source_name = settings.source
    builder = prepared_builder(name, settings.data_dir)
    features = _image_and_label(source_name, builder)
    labelled = "label" in features
    if "train" not in builder.info.splits:
        found = ", ".join(builder.info.splits) or "none"
        raise UserError(f"{source_name} has no split 'train' to learn from; it has {found}: choose another data set")

    def read(split: str) -> Records:
        try:
            data_source = builder.as_data_source(
                split, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES, file_format=ARRAY_RECORD
            )
        except Exception as error:
            raise UserError(f"{source_name}, split {split!r}, cannot be opened: {first_line(error)}") from None
        return Records(data_source, features, f"{source_name} {split}")

    own, skip = {"train": read("train")}, settings.on_unreadable == "skip"
    for official in ("test", "validation"):
        if official in builder.info.splits and builder.info.splits[official].num_examples:
            records = read(official)
            if not labelled or _has_labels(records, skip):
                own[official] = records
    if "test" not in own and "validation" in own:
        own["test"] = own.pop("validation")
    numbers = divide({split: np.arange(len(records)) for split, records in own.items()}, settings)
    preprocess = Preprocess.of(settings)
    splits = []
    for split, some in zip(SPLITS, numbers, strict=True):
        records = own.get(split, own["train"])
        images = EncodedImages(records, preprocess, settings.channels, skip, some)
        splits.append(Split(images, Labels(records, some, skip=skip) if labelled else None, may_lack_labels=True))
    return Source(source_name, *splits, settings.channels, class_names=_class_names(source_name, features))


def _has_labels(records: Records, skip: bool) -> bool:
    """Whether the first record has a label, and is not marked as without one. With `skip`, the first readable one."""
    for number in range(len(records)):
        try:
            return bool(Labels(records, np.arange(number, number + 1))[0] >= 0)
        except UnreadableImage:
            if not skip:
                raise
    return False


def _num_classes(features: tfds.features.FeaturesDict) -> int:
    """The number of classes that a data set declares. 0 if it declares none: its labels may then be any integers."""
    label = dict(features.items()).get("label")
    return (label.num_classes or 0) if isinstance(label, tfds.features.ClassLabel) else 0


def _class_names(source_name: str, features: tfds.features.FeaturesDict) -> tuple[str, ...] | None:
    """The names that a data set declares. None if it has none: the library then makes names of the numbers."""
    if not _num_classes(features):
        return None
    names = distinct_names(features["label"].names, source_name)
    return None if names == full_names(None, len(names)) else names


def prepared_builder(name: str, data_dir: str) -> tfds.core.DatasetBuilder:
    """Returns a data set's builder. Prepares a missing data set. UserError if it is unknown or not in ArrayRecord."""
    try:
        builder = tfds.builder(name, data_dir=data_dir or None)
    except tfds.core.DatasetNotFoundError:
        known = tfds.list_builders(with_community_datasets=False)
        close = difflib.get_close_matches(name.partition("/")[0].partition(":")[0], known)
        similar = f"similar names: {', '.join(close)}" if close else ""
        raise UserError(
            f"tensorflow_datasets knows no data set {name!r}, and the directory "
            f"data.data_dir={data_dir or '(default)'} has none of that name; "
            + (similar or "all names are listed on tensorflow.org/datasets/catalog")
        ) from None
    except Exception as error:  # builders are third-party code and may raise any exception
        raise UserError(f"tfds:{name} cannot be opened: {first_line(error)}") from None
    if not builder.is_prepared():
        _prepare(name, builder)
        builder = tfds.builder(name, data_dir=data_dir or None)  # a new builder finds the new files
    found = {file_format.value for file_format in builder.info.available_file_formats()}
    if ARRAY_RECORD.value not in found:
        raise UserError(
            f"tfds:{name} lies in {builder.data_dir} as {', '.join(sorted(found))}, which cannot be read at random; "
            f"give another data.data_dir to prepare it there as {ARRAY_RECORD.value}, or move that folder away"
        )
    return builder


def _prepare(name: str, builder: tfds.core.DatasetBuilder) -> None:
    try:
        import tensorflow  # noqa: F401 - fails before the long download if TensorFlow is missing
    except ImportError:
        raise UserError(
            f"tfds:{name} is not prepared in {builder.data_dir}, and preparing it needs TensorFlow (reading does not): "
            f'pip install -e ".[tfds]" and repeat it, or set data.data_dir to where its {ARRAY_RECORD.value} files are'
        ) from None
    try:
        # The prepared files that Google offers for download are in another format.
        config = tfds.download.DownloadConfig(try_download_gcs=False)
        builder.download_and_prepare(file_format=ARRAY_RECORD, download_config=config)
    except Exception as error:  # no network, a full disk, files that must be fetched by hand, ...
        if builder.is_prepared():
            return  # another process has prepared it meanwhile
        raise UserError(
            f"tfds:{name} could not be prepared in {builder.data_dir}: {type(error).__name__}: {error}\n"
            f"Repair that and run this again, or set data.data_dir to where its {ARRAY_RECORD.value} files are."
        ) from error


def _image_and_label(name: str, builder: tfds.core.DatasetBuilder) -> tfds.features.FeaturesDict:
    """The features to read: an image and, if there is one, an integer label. UserError if they have other types.

    tfds.decode.PartialDecoding would also select these features, but it imports TensorFlow.
    """
    features = {key: feature for key, feature in builder.info.features.items() if key in ("image", "label")}
    image, label = features.get("image"), features.get("label")
    if not isinstance(image, tfds.features.Image):
        found = ", ".join(builder.info.features)
        raise UserError(f"{name} has no images under the name 'image'; it has {found}: choose another data set")
    if image.np_dtype not in (np.uint8, np.uint16):
        raise UserError(f"{name} has images of {np.dtype(image.np_dtype)}; 8 or 16 bit integers are read")
    if label is not None and (label.shape != () or not np.issubdtype(label.np_dtype, np.integer)):
        raise UserError(f"{name} has a feature 'label' that is no single integer but {label}: choose another data set")
    return tfds.features.FeaturesDict(features)
