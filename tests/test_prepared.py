import numpy as np
import pytest

from igpt.prepared import Shards


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
