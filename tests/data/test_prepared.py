"""A prepared directory is opened whole or not at all; its shards are one array."""

import json
from pathlib import Path

import numpy as np
import pytest

from igpt.data import prepare
from igpt.data.prepared import Shards
from igpt.errors import UserError
from igpt.palette import Palette
from tests.helpers import file_contents, open_prepare_source, prepare_settings


def test_rows_of_several_arrays_are_indexed_like_one():
    parts = [
        np.random.default_rng(i).integers(0, 9, (count, 5)).astype(np.uint16) for i, count in enumerate((7, 1, 11))
    ]
    rows, whole = Shards(parts), np.concatenate(parts)
    assert len(rows) == 19 and rows.shape == whole.shape
    for index in (0, 7, 18, np.int64(8), slice(None), slice(5, 10), slice(18, 2, -3), np.array([18, 0, 7, 7]), [3]):
        np.testing.assert_array_equal(rows[index], whole[index])
        assert rows[index].dtype == np.uint16
    np.testing.assert_array_equal(rows[np.array([], int)], whole[:0])


@pytest.mark.parametrize("index", [-1, -19, np.array([3, -2]), slice(-4, None)])
def test_rows_are_counted_from_the_end_too(index):
    parts = [np.arange(35).reshape(7, 5), np.arange(60).reshape(12, 5)]
    np.testing.assert_array_equal(Shards(parts)[index], np.concatenate(parts)[index])


@pytest.mark.parametrize("index", [19, -20, np.array([0, 19])])
def test_rows_that_there_are_not_are_refused(index):
    with pytest.raises(IndexError):
        Shards([np.zeros((7, 5)), np.zeros((12, 5))])[index]


DAMAGES = {
    "cut short": ("train-00001.tokens.npy", lambda path: path.write_bytes(path.read_bytes()[:-3]), "cannot be read"),
    "empty": ("train-00001.tokens.npy", lambda path: path.write_bytes(b""), "cannot be read"),
    "labels cut": ("test-00000.labels.npy", lambda path: path.write_bytes(path.read_bytes()[:-3]), "cannot be read"),
    "no labels": ("test-00000.labels.npy", Path.unlink, "no file .*labels"),
    "other labels": (
        "test-00000.labels.npy",
        lambda path: np.save(path, np.zeros(12, np.int32)),
        r"int32 \[12\].*\[11\]",
    ),
    "labels of no class": (
        "test-00000.labels.npy",
        lambda path: np.save(path, np.full(11, 3, np.int32)),
        "labels from 3 to 3; it has 3 classes",
    ),
    "a negative label": (
        "test-00000.labels.npy",
        lambda path: np.save(path, np.full(11, -2, np.int32)),
        "labels from -2 to -2; it has 3 classes",
    ),
    "other dtype": ("train-00001.tokens.npy", lambda path: np.save(path, np.zeros((11, 35), int)), r"int64 \[11, 35\]"),
    "other width": (
        "train-00001.tokens.npy",
        lambda path: np.save(path, np.zeros((11, 36), np.uint16)),
        r"\[11, 35\] is",
    ),
    "fewer rows": (
        "train-00001.tokens.npy",
        lambda path: np.save(path, np.zeros((10, 35), np.uint16)),
        r"\[11, 35\] is",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_shards_are_named_and_made_anew_by_the_same_command(pictures, palette, prepared_folder, name):
    file, damage, message = DAMAGES[name]
    before = file_contents(prepared_folder)
    damage(prepared_folder / file)
    with pytest.raises(UserError, match=rf"{message}[\s\S]*run the command that prepared it again") as error:
        open_prepare_source(f"tokens:{prepared_folder}")
    assert file in str(error.value)
    prepare.prepare(prepare_settings(pictures["folder"]), str(palette), str(prepared_folder), shard_images=11)
    assert file_contents(prepared_folder) == before


PLANS = {
    "no JSON": "{",
    "a list": "[]",
    "nothing": "{}",
    "later format": {"format": 2},
    "text for a number": {"shard_images": "11"},
    "no images": {"images": {"train": 43}},
    "a negative size": {"data": {"image_size": [-7, -5], "channels": 3}},
    "other channels": {"data": {"image_size": [7, 5], "channels": 4}},
    "names of no kind": {"class_names": "ant"},
    "too many images": {"images": {"train": 10**18, "validation": 1, "test": 1}},
}


@pytest.mark.parametrize("name", PLANS)
def test_a_damaged_plan_is_named(prepared_folder, name):
    path, change = prepared_folder / "prepared.json", PLANS[name]
    path.write_text(change if isinstance(change, str) else json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=r"prepared\.json|is unfinished"):
        open_prepare_source(f"tokens:{prepared_folder}")


def test_a_directory_of_an_earlier_version_has_no_names_and_can_be_continued(pictures, palette, prepared_folder):
    path = prepared_folder / "prepared.json"
    assert json.loads(path.read_text())["class_names"] == ["class0", "class1", "class2"]
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "class_names"}))
    before = file_contents(prepared_folder)
    (prepared_folder / "train-00001.tokens.npy").unlink()
    prepare.prepare(prepare_settings(pictures["folder"]), str(palette), str(prepared_folder), shard_images=11)
    assert file_contents(prepared_folder) == before
    assert open_prepare_source(f"tokens:{prepared_folder}").class_names is None


def test_unfinished_directories_other_palettes_and_other_tokens_are_named(prepared_folder, palette, tmp_path):
    with pytest.raises(UserError, match=r"no prepared directory: it has no prepared\.json"):
        open_prepare_source(f"tokens:{tmp_path}")
    tokens = np.load(prepared_folder / "train-00002.tokens.npy")
    tokens[3, 4] = 37
    np.save(prepared_folder / "train-00002.tokens.npy", tokens)
    images = open_prepare_source(f"tokens:{prepared_folder}").train.images
    images[:22]
    with pytest.raises(UserError, match=r"done: tokens run from 0 to 37; its palette has 0\.\.36"):
        images[20:30]
    (prepared_folder / "train-00002.tokens.npy").unlink()
    with pytest.raises(UserError, match=r"unfinished: shard 3 of 4 of train is missing; run the command"):
        open_prepare_source(f"tokens:{prepared_folder}")
    Palette(np.zeros((37, 3), np.float32)).save(prepared_folder / "palette.npy")
    with pytest.raises(UserError, match=r"palette\.npy is not the palette that the tokens were made with"):
        open_prepare_source(f"tokens:{prepared_folder}")
