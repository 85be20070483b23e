"""Data sets of tensorflow_datasets: prepared once with TensorFlow, read without it."""

import concurrent.futures
import contextlib
import dataclasses
import errno
import io
import multiprocessing
import os
import pickle
import re
import shutil
import subprocess
import sys
from types import ModuleType
from unittest import mock

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from igpt.data.arrays import of_arrays
from igpt.data.batches import Augmentation, TrainBatches, eval_batches
from igpt.data.classes import with_classes
from igpt.data.examples import check_labels, few_labels
from igpt.data.images import Preprocess, UnreadableImage
from igpt.data.settings import DataConfig
from igpt.data.tfds import UNREAD, Labels, Records, _class_names, _has_labels, _prepare, open_tfds
from igpt.errors import UserError
from igpt.palette import Palette
from tests.helpers import ROOT

TRAIN, TEST = 31, 5
PALETTE = Palette(np.random.default_rng(3).uniform(-1, 1, (17, 3)).astype(np.float32))


def tile(number: int) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, (7, 5, 3), dtype=np.uint8)


def photo(number: int) -> bytes:
    """PNG and JPEG in turn, each of another size."""
    rng, file = np.random.default_rng(number), io.BytesIO()
    pixels = rng.integers(0, 256, (8 + number % 5, 9 + number % 7, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, "JPEG" if number % 2 else "PNG")
    return file.getvalue()


def prepare(folder: str) -> dict[str, str]:
    """Makes small data sets; returns what went wrong, by name. Runs in a process that may import TensorFlow."""

    def builder(name, features, splits, example):
        def info(self):
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def split_generators(self, dl_manager):
            return {
                split: ((number, example(number)) for number in range(*numbers)) for split, numbers in splits.items()
            }

        fields = {"VERSION": tfds.core.Version("1.0.0"), "_info": info, "_split_generators": split_generators}
        fields |= {"_generate_examples": None, "__module__": __name__}  # no such method: the splits are generators
        return type(name.title().replace("_", ""), (tfds.core.GeneratorBasedBuilder,), fields)

    colour, label = tfds.features.Image(shape=(None, None, 3)), tfds.features.ClassLabel(num_classes=100)
    builder(
        "photos",
        {"image": colour, "label": label, "note": tfds.features.Text()},
        {"train": (0, TRAIN), "test": (TRAIN, TRAIN + TEST), "unlabelled": (90, 99)},
        lambda number: {"image": io.BytesIO(photo(number)), "label": number, "note": "aside"},
    )
    builder(
        "tiles",
        {"image": tfds.features.Image(shape=(7, 5, 3)), "label": tfds.features.Scalar(np.int64)},
        {"train": (0, TRAIN), "validation": (40, 43), "test": (50, 57)},
        lambda number: {"image": tile(number), "label": -1 if number >= 50 else number},
    )
    builder(
        "thirds",
        {"image": tfds.features.Image(shape=(7, 5, 3)), "label": tfds.features.Scalar(np.int64)},
        {"train": (0, TRAIN), "validation": (40, 43), "test": (50, 57)},
        lambda number: {"image": tile(number), "label": number},
    )
    builder("bare", {"image": colour}, {"train": (0, TRAIN)}, lambda number: {"image": tile(number)})
    builder("texts", {"note": tfds.features.Text()}, {"train": (0, 2)}, lambda number: {"note": "none"})
    builder("only_test", {"image": colour}, {"test": (0, 2)}, lambda number: {"image": tile(number)})
    builder("broken", {"image": colour}, {"train": (0, 2)}, lambda number: 1 / 0)
    old = builder("old", {"image": colour}, {"train": (0, 3)}, lambda number: {"image": tile(number)})
    old(data_dir=folder).download_and_prepare(file_format="tfrecord")
    errors = {}
    for name in ("photos", "tiles", "thirds", "bare", "texts", "only_test", "broken", "old"):
        try:
            opened(name, folder)
        except UserError as error:
            errors[name] = str(error)
    return errors


def opened(name: str, folder: str, skip: bool = False):
    return open_tfds(name, settings_of(f"tfds:{name}", folder, name != "tiles", 0.2, 0.1, skip))


def settings_of(source: str, folder: str, shrink: bool, validation: float, test: float, skip: bool) -> DataConfig:
    fields = dict(validation_fraction=validation, test_fraction=test, split_seed=4, data_dir=folder)
    fields |= dict(preprocess="shrink" if shrink else "none", on_unreadable="skip" if skip else "stop")
    return DataConfig(source, (7, 5), 3, **fields)


@pytest.fixture(scope="session")
def prepared(tmp_path_factory):
    """The folder of the data sets, and the errors met while they were made."""
    folder = str(tmp_path_factory.mktemp("tfds"))
    with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return folder, pool.submit(prepare, folder).result()


def records_of(split) -> np.ndarray:
    return split.images.indices


def test_images_and_labels_are_read_as_they_were_written(prepared):
    source = opened("photos", prepared[0])
    for split in (source.train, source.validation, source.test):
        images, used = split.read(np.arange(len(split)))
        labels = np.asarray(split.labels)
        assert np.array_equal(used, np.arange(len(split))) and labels.dtype == np.int32
        for image, label in zip(images, labels, strict=True):
            original = Image.open(io.BytesIO(photo(label)))
            assert np.array_equal(image, Preprocess((7, 5), "shrink")(original, None, ""))
    assert sorted([*source.train.labels, *source.validation.labels]) == list(range(TRAIN))
    assert sorted(source.test.labels) == list(range(TRAIN, TRAIN + TEST))


def test_validation_is_held_out_of_train_by_the_split_seed(prepared):
    first = opened("photos", prepared[0])
    assert (len(first.train), len(first.validation), len(first.test)) == (25, 6, TEST)
    order = np.random.default_rng(4).permutation(TRAIN)
    assert np.array_equal(records_of(first.train), order[:25])
    assert np.array_equal(records_of(first.validation), order[25:])


def test_all_three_official_splits_are_used_as_they_are(prepared):
    source = opened("thirds", prepared[0])
    assert sorted(source.validation.labels) == [40, 41, 42] and sorted(source.test.labels) == [*range(50, 57)]
    assert sorted(source.train.labels) == [*range(TRAIN)]


def test_without_test_labels_the_official_validation_split_is_the_test(prepared):
    source = opened("tiles", prepared[0])
    assert sorted(source.test.labels) == [40, 41, 42]
    assert len(source.train) + len(source.validation) == TRAIN


def test_without_official_splits_the_fractions_decide(prepared):
    source = opened("bare", prepared[0])
    assert source.train.labels is None
    parts = [records_of(part) for part in (source.train, source.validation, source.test)]
    assert [len(part) for part in parts] == [22, 6, 3]
    assert sorted(np.concatenate(parts)) == list(range(TRAIN))


def test_batches_equal_those_of_the_same_images_in_an_array(prepared):
    source = opened("tiles", prepared[0])
    numbers = np.concatenate([np.asarray(source.train.labels), np.asarray(source.validation.labels)])
    order = np.random.default_rng(4).permutation(TRAIN)
    images, labels = np.empty((TRAIN, 7, 5, 3), np.uint8), np.empty(TRAIN, np.int32)
    images[order], labels[order] = [tile(number) for number in numbers], numbers
    arrays = of_arrays(images, labels, settings_of("arrays", "", False, 5 / 31, 1 / 31, False))
    made = [
        TrainBatches(train, PALETTE, 5, 0, Augmentation(pad=1, flip=True), slice(None)).iterate(0, 9, threads=3)
        for train in (source.train, arrays.train)
    ]
    for ours, theirs in zip(*made, strict=True):
        assert np.array_equal(ours["tokens"], theirs["tokens"]) and np.array_equal(ours["label"], theirs["label"])


def test_labels_are_read_when_they_are_asked_for_and_not_before(prepared):
    source = opened("photos", prepared[0])
    labels = source.train.labels
    known = labels.records.known
    assert isinstance(labels, Labels) and len(labels) == 25 and labels.shape == (25,) and (known == UNREAD).all()
    asked = labels[np.array([3, 8])]
    assert np.array_equal(asked, [labels[3], labels[8]]) and np.sum(known != UNREAD) == 2
    source.train.read(np.array([5]))  # an image brings its label
    assert np.sum(known != UNREAD) == 3
    assert np.array_equal(labels[2:5], np.asarray(labels)[2:5])
    assert np.array_equal(np.asarray(labels) == labels, np.ones(25, bool))


def test_labels_are_checked_against_declared_classes_without_reading_all(prepared, monkeypatch):
    monkeypatch.setattr("igpt.data.tfds.LOOKED_AT", 4)
    source = opened("photos", prepared[0])
    check_labels(source.train, num_classes=100)
    assert np.sum(source.train.labels.records.known != UNREAD) == 4
    with pytest.raises(UserError, match="from 0 to 99, but model.num_classes is 10, "):
        check_labels(source.train, num_classes=10)
    undeclared = opened("tiles", prepared[0]).train
    assert np.array_equal(undeclared.labels.classes(), np.unique(undeclared.labels))


def test_names_are_those_that_the_data_set_declares(prepared):
    features = {"label": tfds.features.ClassLabel(names=["ant", "bee"])}
    assert _class_names("tfds:it", tfds.features.FeaturesDict(features)) == ("ant", "bee")
    assert [opened(name, prepared[0]).class_names for name in ("photos", "tiles", "bare")] == [None] * 3


def test_labels_are_renumbered_by_name_when_they_are_read(prepared, monkeypatch):
    monkeypatch.setattr("igpt.data.tfds.LOOKED_AT", 4)
    names = tuple(f"kind {i}" for i in range(100))
    source = dataclasses.replace(opened("photos", prepared[0]), class_names=names)
    mapped = with_classes(source, names[::-1], "a model")
    assert np.sum(mapped.train.labels.records.known != UNREAD) == 0
    check_labels(mapped.train, num_classes=100)
    assert np.array_equal(mapped.train.labels[:7], 99 - opened("photos", prepared[0]).train.labels[:7])
    few = with_classes(source, (*names, "another"), "a model").train.labels
    assert np.array_equal(few.classes(), np.arange(100))


def test_a_label_that_does_not_fit_is_named(prepared):
    records = opened("tiles", prepared[0]).train.labels.records
    features = mock.Mock(deserialize_example_np=lambda *_, **__: {"image": b"", "label": np.int64(1 << 32)})
    records.features = features
    with pytest.raises(UserError, match="tfds:tiles train record 3 has the label 4294967296; number the classes"):
        records[3]


@pytest.mark.parametrize("label", [100, -2])
def test_a_label_of_no_declared_class_is_named(prepared, label):
    records = opened("photos", prepared[0]).train.labels.records
    records.features = mock.Mock(deserialize_example_np=lambda *_, **__: {"image": b"", "label": np.int64(label)})
    message = f"tfds:photos train record 3 has the label {label}, but the data set declares 100 classes, 0 to 99"
    with pytest.raises(UserError, match=message):
        records[3]


def test_images_without_a_label_are_refused_where_labels_are_needed(prepared):
    train = opened("photos", prepared[0]).train
    train.labels.records.known[train.images.indices[[2, 5]]] = -1
    with pytest.raises(UserError, match="some images of train have no label; "):
        check_labels(train)


def test_many_threads_read_what_one_reads(prepared):
    one, many = opened("photos", prepared[0]), opened("photos", prepared[0])
    expected, _ = one.train.read(np.arange(25))
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        for images in pool.map(lambda _: many.train.read(np.arange(25))[0], range(16)):
            assert np.array_equal(images, expected)


def test_a_source_in_use_can_be_sent_to_another_process(prepared):
    source = opened("photos", prepared[0])
    expected, _ = source.train.read(np.arange(25))
    copy = pickle.loads(pickle.dumps(source))
    assert np.array_equal(copy.train.read(np.arange(25))[0], expected)
    assert np.array_equal(copy.train.labels, source.train.labels)


READ = """
import sys
import numpy as np
from igpt.data.batches import eval_batches
from igpt.data.settings import DataConfig
from igpt.data.tfds import open_tfds
from igpt.palette import Palette

fields = dict(validation_fraction=0.2, test_fraction=0.1, split_seed=4, preprocess="shrink", data_dir=sys.argv[1])
source = open_tfds("photos", DataConfig("tfds:photos", (7, 5), 3, **fields))
palette = Palette(np.random.default_rng(3).uniform(-1, 1, (17, 3)).astype(np.float32))
batches = list(eval_batches(source.test, palette, 3))
assert not [name for name in sys.modules if name.partition(".")[0] in ("tensorflow", "torch")]
np.savez(sys.argv[2], *[batch["tokens"] for batch in batches], *[batch["label"] for batch in batches])
"""


def test_reading_works_in_a_process_in_which_importing_tensorflow_raises(prepared, tmp_path):
    (tmp_path / "tensorflow").mkdir()
    (tmp_path / "tensorflow" / "__init__.py").write_text("raise RuntimeError('TensorFlow was imported')")
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}

    def python(*arguments):
        return subprocess.run([sys.executable, *arguments], env=env, cwd=tmp_path, capture_output=True, text=True)

    assert "TensorFlow was imported" in python("-c", "import tensorflow").stderr
    done = python("-c", READ, prepared[0], str(tmp_path / "batches.npz"))
    assert done.returncode == 0, done.stderr
    expected = list(eval_batches(opened("photos", prepared[0]).test, PALETTE, 3))
    with np.load(tmp_path / "batches.npz") as arrays:
        found = list(arrays.values())
    for array, batch in zip(found, [b["tokens"] for b in expected] + [b["label"] for b in expected], strict=True):
        assert np.array_equal(array, batch)


def test_igpt_and_its_scripts_import_no_other_framework():
    others = "'tensorflow', 'torch', 'tensorflow_datasets'"
    code = f"import sys, igpt, train, eval_probe; print([name for name in ({others}) if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_what_is_not_prepared_needs_tensorflow_and_says_so(monkeypatch, tmp_path):
    (tmp_path / "tensorflow.py").write_text("raise ImportError('not installed')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "tensorflow", raising=False)
    with pytest.raises(UserError, match=r'(?s)cifar10 is not prepared in .*pip install -e "\.\[tfds\]"'):
        opened("cifar10", str(tmp_path / "data"))
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("prepared_meanwhile", [True, False])
def test_of_several_processes_that_prepare_a_data_set_the_slower_go_on(monkeypatch, tmp_path, prepared_meanwhile):
    def fail(**_):
        raise OSError(errno.ENOTEMPTY, "Directory not empty")

    monkeypatch.setitem(sys.modules, "tensorflow", ModuleType("tensorflow"))
    builder = mock.Mock(tfds.core.DatasetBuilder, data_dir=tmp_path)
    builder.configure_mock(download_and_prepare=fail, is_prepared=lambda: prepared_meanwhile)
    expected = contextlib.nullcontext() if prepared_meanwhile else pytest.raises(UserError, match="Directory not empty")
    with expected:
        _prepare("mnist", builder)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("old", "as tfrecord, which cannot be read at random; give another data.data_dir"),
        ("texts", "no images under the name 'image'; it has note"),
        ("only_test", "no split 'train' to learn from; it has test"),
        ("broken", "could not be prepared in .*division by zero"),
    ],
)
def test_data_sets_that_cannot_be_used_are_refused(prepared, name, message):
    _, errors = prepared
    assert set(errors) == {"old", "texts", "only_test", "broken"}
    assert re.search(message, errors[name], re.DOTALL), errors[name]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cifar11", "no data set 'cifar11', and the directory .*similar names: .*cifar10"),
        ("cifar10:9.9.9", "cifar10:9.9.9 cannot be opened: .*9.9.9"),
        ("imagenet_resized/31x31", "31x31"),
    ],
)
def test_names_that_do_not_exist_are_refused(tmp_path, name, message):
    with pytest.raises(UserError, match=message) as error:
        opened(name, str(tmp_path))
    assert len(str(error.value)) < 600


@pytest.fixture
def damaged(prepared, tmp_path):
    """A copy of the data sets in which some training records of "photos" cannot be read."""
    (record,) = (shutil.copytree(prepared[0], tmp_path / "copy") / "photos" / "1.0.0").glob("*train*")
    content = bytearray(record.read_bytes())
    found = content.find(photo(2)[10:40])  # as good as any: no image is compressed once more
    content[found : found + 8] = bytes(8)
    record.write_bytes(content)
    return str(tmp_path / "copy")


def test_damaged_records_are_refused_or_passed_over_and_counted(damaged):
    with pytest.raises(UserError, match=r"photos train record \d+ cannot be read"):
        opened("photos", damaged).train.read(np.arange(25))
    source = opened("photos", damaged, skip=True)
    _, used = source.train.read(np.arange(25))
    assert 1 <= len(source.unreadable) < 5
    assert np.array_equal(np.flatnonzero(used != np.arange(25)), sorted(source.train.images.unreadable))


@pytest.mark.parametrize("read", [check_labels, lambda split: few_labels(split.labels, 1, seed=0)])
def test_labels_are_read_where_damaged_records_are_passed_over(damaged, read):
    with pytest.raises(UserError, match=r"photos train record \d+ cannot be read"):
        read(opened("photos", damaged).train)
    read(opened("photos", damaged, skip=True).train)


def test_few_labels_come_from_records_that_can_be_read(damaged):
    train = opened("photos", damaged, skip=True).train
    chosen = few_labels(train.labels, 1, seed=0)  # every image has a class of its own
    _, used = train.read(np.arange(len(train)))
    np.testing.assert_array_equal(chosen, np.flatnonzero(used == np.arange(len(train))))
    assert len(chosen) < len(train)


def test_a_damaged_first_record_does_not_decide_whether_there_are_labels():
    class Damaged(Records):
        def __init__(self):
            self.known, self.num_classes = np.full(3, UNREAD, np.int32), 5

        def __len__(self):
            return 3

        def __getitem__(self, number):
            if number == 0:
                raise UnreadableImage("record 0 cannot be read")
            self.known[number] = 4

    assert _has_labels(Damaged(), skip=True)
    with pytest.raises(UnreadableImage, match="record 0"):
        _has_labels(Damaged(), skip=False)
