"""Images without a label, and labels outside of the classes that a data set declares."""

import datasets
import numpy as np
import pyarrow
import pytest
from PIL import Image

from igpt.data import prepare
from igpt.data.batches import Augmentation, TrainBatches
from igpt.data.classes import class_counts
from igpt.data.examples import check_classes, check_labels
from igpt.errors import UserError
from igpt.finetune import labelled
from igpt.palette import Palette
from tests.helpers import configured, open_prepare_source, prepare_settings, splits_of
from tests.image_files import encode_image

NAMES = ("ant", "bee", "cat")
MISSING = r"images of train have no label; .* every image needs one.* hf:NAME,label=COLUMN"


def save_data_set(folder, labels, kind=None):
    """Saves 7 x 5 pictures with these labels as the library does, which checks labels only when it encodes them."""
    kind = kind or datasets.ClassLabel(names=NAMES)
    features = datasets.Features({"image": datasets.Image(), "label": kind})
    content = [{"bytes": encode_image(Image.new("RGB", (5, 7), (i, 0, 0))), "path": None} for i in range(len(labels))]
    given = datasets.Dataset.from_dict({"image": content, "label": [0] * len(labels)}, features=features)
    table = given.with_format("arrow")[:].set_column(1, "label", pyarrow.array(labels, pyarrow.int64()))
    rows = datasets.table.InMemoryTable(table)
    datasets.Dataset(rows, info=datasets.DatasetInfo(features=features)).save_to_disk(folder)
    return f"hf:{folder}"


@pytest.fixture(params=["declared", "numbers"])
def unlabelled(request, tmp_path):
    """A data set of 30 pictures: those with even numbers have no label."""
    kind = None if request.param == "declared" else datasets.Value("int64")
    return save_data_set(tmp_path / "saved", [None, 0, None, 1, None, 2] * 5, kind)


def test_images_without_a_label_are_refused_where_labels_are_needed(unlabelled):
    source = open_prepare_source(unlabelled)
    count = np.sum(source.train.labels == -1)
    assert 0 < count < len(source.train)
    few = configured(**{"data.labels_per_class": 1})
    classifier = configured(**{"model.num_classes": 3, "objective.classification": 1.0})
    for refuses in (
        lambda: check_labels(*splits_of(source)),
        lambda: labelled(source, few),
        lambda: labelled(source, classifier, NAMES, "a model"),
    ):
        with pytest.raises(UserError, match=f"{count} {MISSING}"):
            refuses()
    with pytest.raises(UserError, match=r"\d images have no label;"):
        check_classes([source.test], num_classes=3)


def test_images_without_a_label_are_learned_from_where_none_is_needed(unlabelled, palette):
    source = open_prepare_source(unlabelled)
    batch = TrainBatches(source.train, Palette.load(palette), 4, 0, Augmentation(), slice(None))[0]
    assert batch["tokens"].shape == (4, 35) and labelled(source, configured()) is source
    assert open_prepare_source(f"{unlabelled},label=").train.labels is None


def test_fine_tuning_needs_the_label_of_every_image_that_it_reads(tmp_path):
    source = open_prepare_source(save_data_set(tmp_path / "saved", [0, 1, 2] * 10))
    classifier = configured(**{"model.num_classes": 3, "objective.classification": 1.0})
    assert all(split.needs_labels for split in labelled(source, classifier).splits().values())
    assert not any(split.needs_labels for split in labelled(source, configured()).splits().values())


def test_prepared_tokens_know_that_images_had_no_label(unlabelled, palette, tmp_path):
    prepare.prepare(prepare_settings(unlabelled), str(palette), str(tmp_path / "out"))
    prepare.prepare(prepare_settings(f"tokens:{tmp_path}/out"), str(palette), str(tmp_path / "again"))
    for folder in ("out", "again"):
        with pytest.raises(UserError, match=MISSING):
            check_labels(open_prepare_source(f"tokens:{tmp_path}/{folder}").train)


def test_minus_one_is_a_class_like_others_where_labels_are_the_users_own(write_npz, palette, tmp_path):
    pictures = np.random.default_rng(0).integers(0, 256, (30, 7, 5, 3), np.uint8)
    path = write_npz(images=pictures, labels=np.arange(30) % 2 * 2 - 1)
    prepare.prepare(prepare_settings(f"npz:{path}"), str(palette), str(tmp_path / "out"))
    for place in (f"npz:{path}", f"tokens:{tmp_path}/out"):
        source = open_prepare_source(place)
        check_labels(*splits_of(source))
        assert class_counts(source) == "2 (-1: 15, 1: 15)"


def test_missing_labels_are_counted_beside_the_classes(tmp_path):
    source = open_prepare_source(save_data_set(tmp_path / "saved", [None, 0, 1, 1, None] * 6))
    assert class_counts(source) == "3 (ant: 6, bee: 12, cat: 0), 12 images without a label"


@pytest.mark.parametrize("labels", [[0, 1, 2, 3], [0, 1, 2, 7], [0, 1, -2, 2]])
def test_a_label_of_no_declared_class_is_refused(tmp_path, labels):
    place = save_data_set(tmp_path / "saved", labels * 6)
    found = f"the labels run from {min(labels)} to {max(labels)}"
    with pytest.raises(UserError, match=f"{place}: {found}, but it declares 3 classes, .* 0 to 2; -1 .* repair"):
        open_prepare_source(place)


def test_declared_classes_and_missing_labels_are_read(tmp_path):
    source = open_prepare_source(save_data_set(tmp_path / "saved", [2, -1, 0, 1] * 6))
    assert set(np.concatenate([split.labels for split in splits_of(source)])) == {-1, 0, 1, 2}
