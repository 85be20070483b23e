"""Sources held in memory: scikit-learn's digits and .npz files."""

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
    ],
)
def test_an_npz_of_the_wrong_kind_is_refused(write_npz, arrays, message):
    with pytest.raises(UserError, match=message):
        load_source(f"npz:{write_npz(**arrays)}")


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
