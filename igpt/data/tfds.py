"""A data set of tensorflow_datasets as a data source: single records are read at random, without TensorFlow.

This needs ArrayRecord files. A data set that is absent is downloaded and prepared in this format, which does need
TensorFlow (pip install "igpt[tfds]").
"""

import difflib

import numpy as np
import tensorflow_datasets as tfds

from igpt.data.arrays import split_indices
from igpt.data.examples import EncodedImages, Source, Split
from igpt.data.images import Preprocess, UnreadableImage
from igpt.data.settings import DataConfig
from igpt.errors import UserError, first_line

ARRAY_RECORD = tfds.core.FileFormat.ARRAY_RECORD
STILL_ENCODED = {"image": tfds.decode.SkipDecoding()}  # igpt.data.images decodes them, within bounds
LOOKED_AT = 100  # records that are searched for labels which the data set does not declare
UNREAD = np.iinfo(np.int32).min  # stands for a label that was not read yet; -1 is the data sets' own sign for no label


class Records:
    """The records of one split by number: encoded images with a name for messages, as EncodedImages takes them.

    Reading an image also keeps its label in `known`, so that it is not read again.
    """

    def __init__(self, data_source, features: tfds.features.FeaturesDict, name: str):
        self.data_source, self.features, self.name = data_source, features, name
        self.known = np.full(len(data_source), UNREAD, np.int32) if "label" in features else None

    def __len__(self) -> int:
        return len(self.data_source)

    def __getitem__(self, number: int) -> tuple[bytes, str]:
        name = f"{self.name} record {number}"
        try:
            record = self.features.deserialize_example_np(self.data_source[number], decoders=STILL_ENCODED)
        except Exception as error:  # the reader raises anything on damaged files
            raise UnreadableImage(f"{name} cannot be read: {first_line(error)}; prepare the data set again") from None
        if self.known is not None:
            self.known[number] = record["label"]
        return record["image"], name


class Labels:
    """Labels int32 [N] of some records, read when they are indexed by a number, a slice or an array."""

    dtype = np.dtype(np.int32)
    ndim = 1

    def __init__(self, records: Records, numbers: np.ndarray):
        self.records, self.numbers = records, numbers
        self.shape = numbers.shape

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index) -> np.ndarray | np.int32:
        numbers, known = self.numbers[index], self.records.known
        asked = np.unique(numbers)
        for number in asked[known[asked] == UNREAD].tolist():
            self.records[number]  # keeps the label in `known`
        return known[numbers]

    def classes(self) -> np.ndarray:
        """The classes that the data set declares and those of its first records. Reads all if none are declared.

        Searching every record of ImageNet would read its 140 GB.
        """
        declared = self.records.features["label"]
        if not isinstance(declared, tfds.features.ClassLabel) or declared.num_classes is None:
            return np.unique(self)
        return np.union1d(np.arange(declared.num_classes), self[:LOOKED_AT])

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        return np.asarray(self[:], dtype)


def open_tfds(name: str, settings: DataConfig) -> Source:
    """Opens a data set by the name that tfds.builder takes.

    A part of its split "train" is held out for validation. Its "test" is the test split, or its "validation" where
    "test" is absent or has no labels, as with ImageNet. Without both, another part of "train" is held out for test.
    Splits of other names are ignored.
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

    train = read("train")
    for official in ("test", "validation"):
        if official in builder.info.splits and builder.info.splits[official].num_examples:
            test = read(official)
            if not labelled or Labels(test, np.arange(1))[0] >= 0:
                break
    else:
        test = None
    numbers = split_indices(len(train), settings, test is not None, f"training records of {source_name}")
    if test is not None:
        numbers[2] = np.arange(len(test))
    preprocess, skip = Preprocess.of(settings), settings.on_unreadable == "skip"
    splits = []
    for records, some in zip((train, train, train if test is None else test), numbers, strict=True):
        images = EncodedImages(records, preprocess, settings.channels, skip, some)
        splits.append(Split(images, Labels(records, some) if labelled else None))
    return Source(source_name, *splits, settings.channels)


def prepared_builder(name: str, data_dir: str) -> tfds.core.DatasetBuilder:
    """The builder of a data set in ArrayRecord files. Downloads and prepares an absent one. Raises UserError."""
    try:
        builder = tfds.builder(name, data_dir=data_dir or None)
    except tfds.core.DatasetNotFoundError:
        known = tfds.list_builders(with_community_datasets=False)
        close = difflib.get_close_matches(name.partition("/")[0].partition(":")[0], known)
        raise UserError(
            f"tensorflow_datasets knows no data set {name!r}, and data.data_dir={data_dir or '(default)'} holds none; "
            + (f"close to it: {', '.join(close)}" if close else "all are listed on tensorflow.org/datasets/catalog")
        ) from None
    except Exception as error:  # builders are code of third parties, which raises anything
        raise UserError(f"tfds:{name} cannot be opened: {first_line(error)}") from None
    if not builder.is_prepared():
        _prepare(name, builder)
        builder = tfds.builder(name, data_dir=data_dir or None)  # a new builder reads which files there are now
    found = {file_format.value for file_format in builder.info.available_file_formats()}
    if ARRAY_RECORD.value not in found:
        raise UserError(
            f"tfds:{name} lies in {builder.data_dir} as {', '.join(sorted(found))}, which cannot be read at random; "
            f"give another data.data_dir to prepare it there as {ARRAY_RECORD.value}, or move that folder away"
        )
    return builder


def _prepare(name: str, builder: tfds.core.DatasetBuilder) -> None:
    try:
        import tensorflow  # noqa: F401 - fails before a long download, not after it
    except ImportError:
        raise UserError(
            f"tfds:{name} is not prepared in {builder.data_dir}, and preparing it needs TensorFlow (reading does not): "
            f'pip install "igpt[tfds]" and repeat it, or set data.data_dir to where its {ARRAY_RECORD.value} files are'
        ) from None
    try:
        # The prepared files in Google's bucket have another format.
        config = tfds.download.DownloadConfig(try_download_gcs=False)
        builder.download_and_prepare(file_format=ARRAY_RECORD, download_config=config)
    except Exception as error:  # no network, a full disk, files to fetch by hand, ...
        if builder.is_prepared():
            return  # another process was faster
        raise UserError(
            f"tfds:{name} could not be prepared in {builder.data_dir}: {type(error).__name__}: {error}\n"
            f"Repair that and run this again, or set data.data_dir to where its {ARRAY_RECORD.value} files are."
        ) from error


def _image_and_label(name: str, builder: tfds.core.DatasetBuilder) -> tfds.features.FeaturesDict:
    """The features that are read: an image and, where there is one, an integer label. Raises UserError for others.

    tfds.decode.PartialDecoding would also select them, but imports TensorFlow.
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
