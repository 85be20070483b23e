"""Sources held in memory: scikit-learn's digits and .npz files."""

import zipfile

import numpy as np
import pytest

from igpt.errors import UserError
from tests.helpers import load_source


def test_digits_have_seventeen_grey_levels_and_fixed_disjoint_splits():
    source, again = load_source("digits"), load_source("digits")
    assert source.image_size == (8, 8) and source.channels == 1
    splits = (source.train, source.validation, source.test)
    assert [len(split) for split in splits] == [1258, 180, 359]
    assert len(np.unique(np.concatenate([split.images for split in splits]))) == 17
    np.testing.assert_array_equal(source.test.images, again.test.images)
    other = load_source("digits", split_seed=1)
    assert not np.array_equal(source.test.images, other.test.images)


def test_splits_share_no_example(write_npz):
    images = np.arange(50, dtype=np.uint8)[:, None, None] * np.ones((1, 2, 2), np.uint8)
    source = load_source(f"npz:{write_npz(images=images)}")
    seen = np.concatenate([split.images[:, 0, 0, 0] for split in (source.train, source.validation, source.test)])
    np.testing.assert_array_equal(np.sort(seen), np.arange(50))


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"pictures": np.zeros((9, 4, 4), np.uint8)}, r"no array 'images' \(it has pictures\)"),
        ({"images": np.zeros((9, 4, 4))}, r"'images' is float64; uint8.*convert"),
        ({"images": np.zeros((9, 4, 4, 4), np.uint8)}, r"shape \[9, 4, 4, 4\]"),
        ({"images": np.zeros((9, 4, 4), np.uint8), "labels": np.zeros(8, int)}, r"'labels' is int64 \[8\].*\[9\]"),
        ({"images": np.zeros((3, 4, 4), np.uint8)}, r"3 images split into"),
        ({"labels": np.array([0, 1 << 32] * 9)}, r"'labels' run from 0 to 4294967296; number the classes from 0 on"),
        ({"labels": np.array([0, -(1 << 40)] * 9)}, r"'labels' run from -1099511627776 to 0"),
        ({"labels": np.array([0, (1 << 64) - 1] * 9, np.uint64)}, r"'labels' run from 0 to 18446744073709551615"),
        ({"names": np.array(["a", "b"])}, r"'labels' run from 0 to 2, and there are 2 'names'; give a name for every"),
        ({"names": np.array(["a", "b", "a"])}, r"'names' has 2 classes of the name 'a'"),
        ({"names": np.arange(3)}, r"'names' is int64 \[3\]; text \[C\] is needed"),
        ({"test_images": np.zeros((2, 5, 4), np.uint8)}, r"images of all splits need one size, and labels in all or"),
        ({"test_images": np.zeros((2, 4, 4), np.uint8)}, r"need one size, and labels in all or none"),
        ({"test_images": np.zeros((2, 4, 4), float)}, r"'test_images' is float64; uint8.*convert"),
    ],
)
def test_an_npz_of_the_wrong_kind_is_refused(write_npz, arrays, message):
    if not {"images", "pictures"} & arrays.keys():
        arrays = {"images": np.zeros((18, 4, 4), np.uint8), "labels": np.arange(18) % 3} | arrays
    with pytest.raises(UserError, match=message):
        load_source(f"npz:{write_npz(**arrays)}")


def test_an_npz_that_unpacks_to_more_than_the_machines_memory_is_refused(tmp_path, monkeypatch):
    np.savez_compressed(tmp_path / "zeros.npz", images=np.zeros((1000, 16, 16), np.uint8), more=np.zeros(10**6))
    monkeypatch.setattr("igpt.data.arrays.machine_memory", lambda: 300_000)
    assert len(load_source(f"npz:{tmp_path}/zeros.npz", validation_fraction=0.1).train)  # other arrays are not unpacked
    monkeypatch.setattr("igpt.data.arrays.machine_memory", lambda: 256_000)
    with pytest.raises(UserError, match="zeros.npz: its arrays unpack to 0.0 GB, and this machine has 0.0 GB"):
        load_source(f"npz:{tmp_path}/zeros.npz")


def test_an_npz_with_a_damaged_member_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "damaged.npz", "w") as file:
        file.writestr("images.npy", b"junk")
    with pytest.raises(UserError, match="cannot be read as an .npz of plain arrays: images is no array"):
        load_source(f"npz:{tmp_path}/damaged.npz")


def test_names_of_an_npz_belong_to_its_labels(write_npz):
    arrays = dict(images=np.zeros((18, 4, 4), np.uint8), labels=np.arange(18) % 3)
    assert load_source(f"npz:{write_npz(**arrays)}").class_names is None
    names = ("ant", "bee", "été")
    for given in (names, np.char.encode(names, "utf-8")):
        assert load_source(f"npz:{write_npz(**arrays, names=given)}").class_names == names


def test_an_npz_may_bring_splits_of_its_own(write_npz, capsys):
    def arrays(first, count, prefix=""):
        images = np.arange(first, first + count, dtype=np.uint8)[:, None, None] * np.ones((1, 2, 2), np.uint8)
        return {f"{prefix}images": images, f"{prefix}labels": np.arange(first, first + count)}

    train, validation, test = arrays(0, 20), arrays(20, 3, "validation_"), arrays(23, 5, "test_")
    cases = ((train | test, [18, 2, 5]), (train | validation, [16, 3, 4]), (train | validation | test, [20, 3, 5]))
    for given, sizes in cases:
        source = load_source(f"npz:{write_npz(**given, notes=np.zeros(1))}")
        parts = (source.train, source.validation, source.test)
        assert [len(part) for part in parts] == sizes
        for part in parts:
            np.testing.assert_array_equal(part.images[:, 0, 0, 0], part.labels)
        assert sorted(np.concatenate([part.labels for part in parts])) == sorted(
            np.concatenate([array for name, array in given.items() if name.endswith("labels")])
        )
        if "test_labels" in given:
            np.testing.assert_array_equal(source.test.labels, np.arange(23, 28))
        assert "passed over the arrays notes" in capsys.readouterr().out


def test_sources_that_cannot_be_read_are_named(tmp_path):
    with pytest.raises(UserError, match=r"no file .*absent\.npz"):
        load_source(f"npz:{tmp_path}/absent.npz")
    (tmp_path / "text.npz").write_text("hello")
    with pytest.raises(UserError, match=r"text\.npz cannot be read"):
        load_source(f"npz:{tmp_path}/text.npz")
    np.savez(tmp_path / "pickle.npz", images=np.array([{}], object))
    with pytest.raises(UserError, match=r"pickle\.npz cannot be read"):
        load_source(f"npz:{tmp_path}/pickle.npz")
    np.save(tmp_path / "single.npy", np.zeros((9, 4, 4), np.uint8))
    with pytest.raises(UserError, match=r"single\.npy is a single \.npy array"):
        load_source(f"npz:{tmp_path}/single.npy")
