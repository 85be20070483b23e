import numpy as np
import pytest

from igpt.color_table import BYTE_LEVELS, ColorTable


def random_table():
    return ColorTable(np.random.default_rng(0).uniform(-1, 1, (37, 3)), BYTE_LEVELS)


def brute_force(image, centers):
    return np.square(image[:, None] / 127.5 - 1.0 - centers).sum(-1).argmin(1)


def centers_that_are_hard():
    """Centres for which pruning or ties could go wrong: in clusters, repeated, or exactly halfway between colours."""
    rng = np.random.default_rng(3)
    few, many = rng.uniform(-1, 1, (7, 3)), rng.uniform(-1, 1, (512, 3))
    return {
        "uniform": many,
        "one colour": few[:1],
        "two colours": few[:2],
        "in clusters": np.clip(few[rng.integers(0, 7, 512)] + rng.normal(0, 0.01, (512, 3)), -1, 1),
        "each twice": np.tile(many[:256], (2, 1)),
        "on a lattice": rng.permutation(np.stack(np.meshgrid(*[[51, 102, 153]] * 3), -1).reshape(-1, 3)) / 127.5 - 1,
        "black and white": np.array([[1.0] * 3, [-1.0] * 3] * 2),
    }


@pytest.mark.parametrize("name", centers_that_are_hard())
def test_a_sample_of_all_colours_gets_the_float64_argmin(name):
    centers = centers_that_are_hard()[name]
    ours = ColorTable(centers, BYTE_LEVELS)
    cells = np.random.default_rng(4).choice(1 << 12, 97, replace=False) << 4  # 16 shades of red in each of 97 cells
    codes = (cells & 0xF00) << 12 | (cells & 0xF0) << 8 | (cells & 0xF) << 4
    colors = np.stack([codes >> 16, codes >> 8 & 255, codes & 255], -1)[:, None] + np.arange(16)[:, None] * [1, 0, 0]
    corners = np.stack(np.meshgrid(*[[0, 15, 16, 255]] * 3), -1).reshape(-1, 3)
    image = np.concatenate([colors.reshape(-1, 3), corners]).astype(np.uint8)
    np.testing.assert_array_equal(ours.encode(image), brute_force(image, centers))


@pytest.mark.slow
@pytest.mark.parametrize("name", centers_that_are_hard())
def test_each_of_the_16777216_colours_gets_the_float64_argmin(name):
    centers = centers_that_are_hard()[name]
    ours = ColorTable(centers, BYTE_LEVELS)
    red, green, blue = (np.square(BYTE_LEVELS[:, c, None] - centers[:, c]) for c in range(3))
    shades = np.stack(np.meshgrid(np.arange(256), np.arange(256), indexing="ij"), -1)
    for shade in range(256):
        image = np.concatenate([np.full((256, 256, 1), shade), shades], -1).astype(np.uint8)
        nearest = [(red[shade] + g + blue).argmin(1) for g in green]
        np.testing.assert_array_equal(ours.encode(image), nearest)


@pytest.mark.parametrize(
    "levels",
    [np.arange(256.0), 2 - np.arange(256.0) / 64, np.zeros(256), np.random.default_rng(0).permutation(256) / 50 - 3],
    ids=["bytes", "falling", "all the same", "in no order"],
)
def test_a_table_may_give_bytes_any_levels(levels):
    levels = levels[:, None] * [1.0, 0.5, 1.25]
    centers = np.random.default_rng(5).uniform(-2, 2, (53, 3))
    image = np.random.default_rng(6).integers(0, 256, (601, 3), np.uint8)
    values = np.stack([levels[image[:, channel], channel] for channel in range(3)], -1)
    nearest = np.square(values[:, None] - centers).sum(-1).argmin(1)
    np.testing.assert_array_equal(ColorTable(centers, levels).encode(image), nearest)


def test_images_of_many_pixels_and_of_none_are_encoded_alike():
    ours = random_table()
    image = np.random.default_rng(7).integers(0, 256, (2, 191, 193, 3), np.uint8)  # more than one lookup
    some = image[:, 97:99].copy()
    np.testing.assert_array_equal(ours.encode(image)[:, 97:99], random_table().encode(some))
    np.testing.assert_array_equal(ours.encode(np.moveaxis(image, 1, 2)), np.swapaxes(ours.encode(image), 1, 2))
    assert ours.encode(image[:0]).shape == (0, 191, 193) and ours.encode(image).dtype == np.int32


def test_only_the_cells_of_colours_that_were_used_are_computed(monkeypatch):
    filled = []
    fill = ColorTable._fill
    monkeypatch.setattr(ColorTable, "_fill", lambda self, *cell: (filled.append(cell), fill(self, *cell)))
    ours = random_table()
    colors = np.array([[255, 0, 17], [254, 15, 16], [3, 3, 3], [16, 3, 3]], np.uint8)
    for count in (3, 3, 4):
        ours.encode(colors[:count])
    assert sorted(map(tuple, filled)) == [(0, 0, 0), (1, 0, 0), (15, 0, 1)]
