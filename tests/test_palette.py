import resource

import numpy as np
import pytest

from igpt.errors import UserError
from igpt.palette import BYTE_LEVELS, ColorTable, Palette


def random_palette(colors=37, seed=0):
    return Palette(np.random.default_rng(seed).uniform(-1, 1, (colors, 3)).astype(np.float32))


def brute_force(images, centers):
    values = images.reshape(-1, 1, 3) / 127.5 - 1.0
    distances = np.square(values - centers.astype(np.float64)).sum(-1)
    return distances.argmin(1).reshape(images.shape[:-1])


def palettes_that_are_hard():
    """Centres in clusters, twice, and exactly halfway between colours: where pruning and ties could go wrong."""
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


@pytest.mark.parametrize("name", palettes_that_are_hard())
def test_a_sample_of_all_colours_gets_the_float64_argmin(name):
    ours = Palette(palettes_that_are_hard()[name])
    cells = np.random.default_rng(4).choice(1 << 12, 97, replace=False) << 4  # 16 shades of red in each of 97 cells
    codes = (cells & 0xF00) << 12 | (cells & 0xF0) << 8 | (cells & 0xF) << 4
    colors = np.stack([codes >> 16, codes >> 8 & 255, codes & 255], -1)[:, None] + np.arange(16)[:, None] * [1, 0, 0]
    corners = np.stack(np.meshgrid(*[[0, 15, 16, 255]] * 3), -1).reshape(-1, 3)
    image = np.concatenate([colors.reshape(-1, 3), corners]).astype(np.uint8)
    np.testing.assert_array_equal(ours.encode(image), brute_force(image, ours.centers))


@pytest.mark.slow
@pytest.mark.parametrize("name", palettes_that_are_hard())
def test_each_of_the_16777216_colours_gets_the_float64_argmin(name):
    ours = Palette(palettes_that_are_hard()[name])
    red, green, blue = (np.square(BYTE_LEVELS[:, c, None] - ours.centers.astype(np.float64)[:, c]) for c in range(3))
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
    ours = random_palette()
    image = np.random.default_rng(7).integers(0, 256, (2, 191, 193, 3), np.uint8)  # more than one chunk
    some = image[:, 97:99].copy()
    np.testing.assert_array_equal(ours.encode(image)[:, 97:99], random_palette().encode(some))
    np.testing.assert_array_equal(ours.encode(np.moveaxis(image, 1, 2)), np.swapaxes(ours.encode(image), 1, 2))
    assert ours.encode(image[:0]).shape == (0, 191, 193) and ours.encode(image).dtype == np.int32


def test_only_the_cells_of_colours_that_were_met_are_computed(monkeypatch):
    filled = []
    fill = ColorTable._fill
    monkeypatch.setattr(ColorTable, "_fill", lambda self, *cell: (filled.append(cell), fill(self, *cell)))
    ours = random_palette()
    colors = np.array([[255, 0, 17], [254, 15, 16], [3, 3, 3], [16, 3, 3]], np.uint8)
    for met in (3, 3, 4):
        ours.encode(colors[:met])
    assert sorted(map(tuple, filled)) == [(0, 0, 0), (1, 0, 0), (15, 0, 1)]


def test_encode_equals_the_float64_argmin():
    images = np.random.default_rng(1).integers(0, 256, (5, 13, 11, 3), np.uint8)
    ours = random_palette()
    np.testing.assert_array_equal(ours.encode(images), brute_force(images, ours.centers))


def test_a_second_encoding_from_the_filled_table_is_the_same():
    images = np.random.default_rng(2).integers(0, 256, (3, 7, 7, 3), np.uint8)
    ours = random_palette()
    np.testing.assert_array_equal(ours.encode(images), ours.encode(images))


def test_ties_go_to_the_first_centre():
    centers = np.array([[0.5, 0, 0], [-0.5, 0, 0], [0.5, 0, 0]], np.float32)
    image = np.array([[[255, 127, 127], [0, 127, 127]]], np.uint8)
    np.testing.assert_array_equal(Palette(centers).encode(image), [[0, 1]])
    between = Palette(np.array([[1, 1, 1], [-1, -1, -1], [1, 1, 1]], np.float32))
    np.testing.assert_array_equal(between.encode(np.full((1, 1, 3), 255, np.uint8)), [[0]])


def test_decoding_and_encoding_again_changes_nothing():
    ours = random_palette(colors=64)
    tokens = np.arange(64).reshape(8, 8)
    assert len(np.unique(ours.decode(tokens).reshape(-1, 3), axis=0)) == 64
    np.testing.assert_array_equal(ours.encode(ours.decode(tokens)), tokens)


def test_decode_rounds_by_the_released_rule():
    centers = np.array([[-1, 0, 1], [0.5 / 127.5 - 1, 1.5 / 127.5 - 1, 2.4 / 127.5 - 1]], np.float64)
    np.testing.assert_array_equal(Palette(centers).decode([0]), [[0, 128, 255]])  # 127.5 is halfway: to even
    assert Palette(centers).decode([1])[0, 2] == 2


def test_saved_and_loaded_it_is_the_same(tmp_path):
    ours = random_palette()
    ours.save(tmp_path / "palette.npy")
    np.testing.assert_array_equal(Palette.load(tmp_path / "palette.npy").centers, ours.centers)
    assert [path.name for path in tmp_path.iterdir()] == ["palette.npy"]


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((5, 4), np.float32), r"shape \[V, 3\].*\[5, 4\]"),
        (np.zeros((4, 3), np.uint8), r"floats in \[-1, 1\].*uint8"),
        (np.full((4, 3), 7.0), r"floats in \[-1, 1\].*7.0"),
        (np.full((4, 3), np.nan), r"floats in \[-1, 1\]"),
    ],
)
def test_what_cannot_be_a_palette_is_refused(tmp_path, array, message):
    np.save(tmp_path / "p.npy", array)
    with pytest.raises(UserError, match=message):
        Palette.load(tmp_path / "p.npy")


def test_unreadable_and_pickled_palettes_are_refused(tmp_path):
    with pytest.raises(UserError, match="no palette at"):
        Palette.load(tmp_path / "absent.npy")
    (tmp_path / "text.npy").write_text("hello")
    with pytest.raises(UserError, match="is not a palette"):
        Palette.load(tmp_path / "text.npy")
    np.save(tmp_path / "pickle.npy", np.array([{"a": 1}], object), allow_pickle=True)
    with pytest.raises(UserError, match="is not a palette"):
        Palette.load(tmp_path / "pickle.npy")


def test_images_and_tokens_of_another_kind_are_refused():
    with pytest.raises(UserError, match="uint8"):
        random_palette().encode(np.zeros((2, 2, 3)))
    with pytest.raises(UserError, match=r"0\.\.36"):
        random_palette().decode([37])


def test_colours_that_are_there_twice_are_told(tmp_path, capsys):
    ours = random_palette().centers
    np.save(tmp_path / "once.npy", ours)
    np.save(tmp_path / "twice.npy", np.concatenate([ours, ours[:2], ours[:1]]))
    Palette.load(tmp_path / "once.npy")
    assert not capsys.readouterr().out
    Palette.load(tmp_path / "twice.npy")
    assert capsys.readouterr().out == f"{tmp_path}/twice.npy: 3 of 40 colours repeat earlier ones, and are never used\n"


def test_a_palette_that_does_not_fit_on_the_disk_is_an_error_and_not_a_shorter_file(tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))
    try:
        with pytest.raises(OSError):
            random_palette(200).save(tmp_path / "palette.npy")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not (tmp_path / "palette.npy").exists()
