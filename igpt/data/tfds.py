"""A data set of tensorflow_datasets as a data source: records are read one by one where they lie, without TensorFlow.

That takes ArrayRecord files. A data set that is not there yet is downloaded and prepared as such, which does take
TensorFlow (pip install "igpt[tfds]").
"""

import difflib
from collections.abc import Sequence

import numpy as np
import tensorflow_datasets as tfds

from igpt.data.examples import EncodedImages, Source, Split
from igpt.data.images import Preprocess, UnreadableImage
from igpt.errors import UserError

ARRAY_RECORD = tfds.core.FileFormat.ARRAY_RECORD
STILL_ENCODED = {"image": tfds.decode.SkipDecoding()}  # igpt.images decodes them, within bounds
LOOKED_AT = 100  # records, for labels other than those that the data set declares
UNREAD = np.iinfo(np.int32).min  # a label that was not looked at yet; -1 is how data sets say that they have none


class Records:
    """The records of one split. Labels are kept once their record was read, so that images bring them along."""

    def __init__(self, data_source, features: tfds.features.FeaturesDict, name: str):
        self.data_source, self.features, self.name = data_source, features, name
        self.known = np.full(len(data_source), UNREAD, np.int32) if "label" in features else None

    def __len__(self) -> int:
        return len(self.data_source)

    def image(self, number: int) -> tuple[bytes, str]:
        """The encoded image, and a name for messages."""
        name = f"{self.name} record {number}"
        try:
            record = self.features.deserialize_example_np(self.data_source[number], decoders=STILL_ENCODED)
        except Exception as error:  # the reader raises anything on damaged files
            raise UnreadableImage(f"{name} cannot be read: {_first_line(error)}; prepare the data set again") from None
        if self.known is not None:
            self.known[number] = record["label"]
        return record["image"], name

    def labels(self, numbers: np.ndarray) -> np.ndarray:
        """int32, in the shape of `numbers`. Reads the records whose labels are not known."""
        for number in np.unique(numbers[self.known[numbers] == UNREAD]):
            self.image(int(number))
        return self.known[numbers]


class Files(Sequence):
    """Some of the records' images, in the form in which EncodedImages reads them."""

    def __init__(self, records: Records, numbers: np.ndarray):
        self.records, self.numbers = records, numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> tuple[bytes, str]:
        return self.records.image(int(self.numbers[index]))


class Labels(Sequence):
    """Labels int32 [N] of some of the records: an array that reads what is asked of it, all of it only at np.asarray.

    An index is a number, a slice or an array.
    """

    dtype = np.dtype(np.int32)
    ndim = 1

    def __init__(self, records: Records, numbers: np.ndarray):
        self.records, self.numbers = records, numbers
        self.shape = numbers.shape

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index) -> np.ndarray | np.int32:
        numbers = self.numbers[index]
        labels = self.records.labels(np.atleast_1d(numbers))
        return labels if np.ndim(numbers) else labels[0]

    def classes(self) -> np.ndarray:
        """Those that the data set declares and those of the first records; of all where it declares none.

        To look for them in every record of ImageNet would be to read its 140 GB.
        """
        declared = self.records.features["label"]
        if not isinstance(declared, tfds.features.ClassLabel) or declared.num_classes is None:
            return np.unique(self)
        return np.union1d(np.arange(declared.num_classes), self[:LOOKED_AT])

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        return np.asarray(self[:], dtype)


def open_tfds(
    name: str,
    data_dir: str,
    fractions: tuple[float, float],
    split_seed: int,
    preprocess: Preprocess,
    channels: int,
    skip: bool,
) -> Source:
    """Opens a data set by the name that tfds.builder takes, in `data_dir` or, where that is empty, its own default.

    Of its split "train" the first of `fractions` is held out for validation. The test split is its own: "test", or
    "validation" where there is no test or one without labels, as with ImageNet; where there is neither, the second of
    `fractions`. Splits of other names are left alone.
    """
    source_name = f"tfds:{name}"
    builder = prepared_builder(name, data_dir)
    labelled = _check_features(source_name, builder)
    if "train" not in builder.info.splits:
        found = ", ".join(builder.info.splits) or "none"
        raise UserError(f"{source_name} has no split 'train' to learn from; it has {found}: choose another data set")

    # No other features are looked at. PartialDecoding, made for that, imports TensorFlow.
    features = tfds.features.FeaturesDict(
        {key: builder.info.features[key] for key in (("image", "label") if labelled else ("image",))}
    )

    def read(split: str) -> Records:
        try:
            data_source = builder.as_data_source(
                split, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES, file_format=ARRAY_RECORD
            )
        except Exception as error:
            raise UserError(f"{source_name}, split {split!r}, cannot be opened: {_first_line(error)}") from None
        return Records(data_source, features, f"{source_name} {split}")

    train = read("train")
    for official in ("test", "validation"):
        if official in builder.info.splits and builder.info.splits[official].num_examples:
            test = read(official)
            if not labelled or test.labels(np.array([0]))[0] >= 0:
                break
    else:
        test = None
    train_part, validation_part, test_part = _split(source_name, len(train), fractions, split_seed, test is not None)
    if test is None:
        test = train
    else:
        test_part = np.arange(len(test))

    def part(records: Records, numbers: np.ndarray) -> Split:
        images = EncodedImages(Files(records, numbers), preprocess, channels, skip)
        return Split(images, Labels(records, numbers) if labelled else None)

    return Source(source_name, part(train, train_part), part(train, validation_part), part(test, test_part), channels)


def prepared_builder(name: str, data_dir: str) -> tfds.core.DatasetBuilder:
    """The builder of a data set that lies ready as ArrayRecord; downloads and prepares it first where it must."""
    try:
        builder = tfds.builder(name, data_dir=data_dir or None)
    except tfds.core.DatasetNotFoundError:
        known = tfds.list_builders(with_community_datasets=False)
        close = difflib.get_close_matches(name.partition("/")[0].partition(":")[0], known)
        raise UserError(
            f"tensorflow_datasets knows no data set {name!r}, and data.data_dir={data_dir or '(default)'} holds none; "
            + (f"close to it: {', '.join(close)}" if close else "all are listed on tensorflow.org/datasets/catalog")
        ) from None
    except Exception as error:  # builders are anybody's code
        raise UserError(f"tfds:{name} cannot be opened: {_first_line(error)}") from None
    if not builder.is_prepared():
        _prepare(name, builder)
        builder = tfds.builder(name, data_dir=data_dir or None)  # which knows what is there now, whoever prepared it
    found = {file_format.value for file_format in builder.info.available_file_formats()}
    if ARRAY_RECORD.value not in found:
        raise UserError(
            f"tfds:{name} lies in {builder.data_dir} as {', '.join(sorted(found))}, which cannot be read at random; "
            f"give another data.data_dir to prepare it there as {ARRAY_RECORD.value}, or move that folder away"
        )
    return builder


def _prepare(name: str, builder: tfds.core.DatasetBuilder) -> None:
    try:
        import tensorflow  # noqa: F401 - tells whether it is there before a long download
    except ImportError:
        raise UserError(
            f"tfds:{name} is not prepared in {builder.data_dir}, and preparing it needs TensorFlow (reading does not): "
            'pip install "igpt[tfds]", then run this again; or set data.data_dir to where it is prepared as '
            f"{ARRAY_RECORD.value}"
        ) from None
    try:
        # What Google's bucket holds ready is in another format.
        config = tfds.download.DownloadConfig(try_download_gcs=False)
        builder.download_and_prepare(file_format=ARRAY_RECORD, download_config=config)
    except Exception as error:  # no network, no disk, files to be fetched by hand, anybody's code
        if builder.is_prepared():
            return  # another process was faster
        raise UserError(
            f"tfds:{name} could not be prepared in {builder.data_dir}: {type(error).__name__}: {error}\n"
            "Mend that and run this again, or set data.data_dir to where the data set is prepared as "
            f"{ARRAY_RECORD.value}."
        ) from error


def _check_features(name: str, builder: tfds.core.DatasetBuilder) -> bool:
    """Whether there are labels. Raises UserError for what is no data set of images in one class each, or in none."""
    features = dict(builder.info.features)
    image, label = features.get("image"), features.get("label")
    found = ", ".join(features)
    if not isinstance(image, tfds.features.Image):
        raise UserError(f"{name} has no images under the name 'image'; it has {found}: choose another data set")
    if image.np_dtype not in (np.uint8, np.uint16):
        raise UserError(f"{name} has images of {np.dtype(image.np_dtype)}; 8 or 16 bit integers are read")
    if label is None:
        return False
    if label.shape != () or not np.issubdtype(label.np_dtype, np.integer):
        raise UserError(f"{name} has a feature 'label' that is no single integer but {label}: choose another data set")
    return True


def _split(name: str, count: int, fractions, seed: int, has_test: bool) -> list[np.ndarray]:
    """The records of "train" for training, validation and test, the last one empty where the data set has its own."""
    validation, test = round(fractions[0] * count), 0 if has_test else round(fractions[1] * count)
    train = count - validation - test
    if min(train, validation) < 1 or (test < 1 and not has_test):
        raise UserError(
            f"the {count} training records of {name} split into {train} for training, {validation} for validation"
            + ("" if has_test else f" and {test} for test")
            + "; each needs at least one: change data.validation_fraction"
            + ("" if has_test else " and data.test_fraction")
        )
    return np.split(np.random.default_rng(seed).permutation(count), [train, train + validation])


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
