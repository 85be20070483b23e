import re
import resource
import tracemalloc

import numpy as np
import pytest
from PIL import Image

from igpt.__main__ import main as run_igpt
from igpt.data import palette_fit
from igpt.data.examples import DecodedTokens, EncodedImages
from igpt.data.images import Preprocess
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
    np.testing.assert_array_equal(Palette(centers).decode(np.array([0])), [[0, 128, 255]])  # 127.5 is halfway: to even
    assert Palette(centers).decode(np.array([1]))[0, 2] == 2


def test_grey_levels_are_kept_exactly_when_there_is_room():
    levels = np.array([0, 3, 17, 128, 254, 255], np.uint8)
    images = np.repeat(np.random.default_rng(0).permutation(np.tile(levels, 6)).reshape(1, 6, 6, 1), 3, axis=-1)
    fitted = palette_fit.fit(images, colors=6)
    np.testing.assert_array_equal(fitted.decode(np.arange(6))[:, 0], levels)
    np.testing.assert_array_equal(fitted.decode(fitted.encode(images)), images)


def test_fit_finds_clusters_and_is_a_function_of_the_seed():
    rng = np.random.default_rng(0)
    truth = np.array([[20, 30, 200], [220, 40, 30], [40, 210, 60]])
    images = np.clip(truth[rng.integers(0, 3, (4, 16, 16))] + rng.integers(-4, 5, (4, 16, 16, 3)), 0, 255)
    images = images.astype(np.uint8)
    fitted = palette_fit.fit(images, colors=3, seed=1)
    found = fitted.decode(np.arange(3)).astype(int)
    assert sorted(np.abs(found[:, None] - truth).max(-1).argmin(1)) == [0, 1, 2]
    assert np.abs(found[:, None] - truth).max(-1).min(1).max() <= 2
    np.testing.assert_array_equal(palette_fit.fit(images, colors=3, seed=1).centers, fitted.centers)


def test_fit_looks_at_no_more_pixels_than_it_may(monkeypatch):
    import sklearn.cluster

    seen = []

    class Spy(sklearn.cluster.KMeans):
        def fit(self, x, sample_weight=None):
            seen.append(sample_weight.sum())
            return super().fit(x, sample_weight=sample_weight)

    monkeypatch.setattr(sklearn.cluster, "KMeans", Spy)
    images = np.random.default_rng(0).integers(0, 256, (9, 31, 31, 3), np.uint8)
    palette_fit.fit(images, colors=5, max_pixels=1000)
    assert seen == [1000]


def test_fit_says_how_many_colours_there_are_when_too_many_are_asked_for():
    with pytest.raises(UserError, match=r"palette.colors is 9.*2 pixels.*only 2.*palette.colors=2"):
        palette_fit.fit(np.array([[[[0, 0, 0], [9, 9, 9]]]], np.uint8), colors=9)


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
        random_palette().decode(np.array([37]))


def lazily(images):
    """The same images, decoded when they are asked for."""
    return EncodedImages([(image, f"image {i}") for i, image in enumerate(images)], Preprocess(images.shape[1:3]))


def smooth_images(count=23, side=13):
    small = np.random.default_rng(8).integers(0, 256, (count, 3, 3, 3), np.uint8)
    return np.stack([np.asarray(Image.fromarray(image).resize((side, side))) for image in small])


def test_fit_gives_images_that_are_not_in_memory_the_palette_of_those_that_are():
    images = smooth_images()
    ours = Palette(np.random.default_rng(9).uniform(-1, 1, (53, 3)).astype(np.float32))
    tokens = ours.encode(images)
    decoded = DecodedTokens(tokens.reshape(len(images), -1), ours, "tokens", images.shape[1:3])
    for lazy, whole in ((lazily(images), images), (decoded, ours.decode(tokens))):
        np.testing.assert_array_equal(
            palette_fit.fit(lazy, colors=11).centers, palette_fit.fit(whole, colors=11).centers
        )


def test_a_sample_takes_equally_many_pixels_of_images_chosen_by_the_seed_a_few_at_a_time(monkeypatch):
    images = np.zeros((4001, 11, 13, 3), np.uint8)
    images[..., 0], images[..., 1] = np.arange(4001)[:, None, None] // 256, np.arange(4001)[:, None, None] % 256
    images[..., 2] = np.arange(143).reshape(11, 13)
    monkeypatch.setattr(palette_fit, "PIXELS_AT_ONCE", 7 * 143)
    for most, of_each in ((1000, 64), (500_000, 124), (10**9, 143), (5, 5)):
        pixels, looked_at = palette_fit.sample_pixels(images, most, seed=1)
        assert len(pixels) == looked_at * of_each <= most and looked_at == min(4001, most // of_each)
        of = pixels[:, 0].astype(int) * 256 + pixels[:, 1]
        assert set(np.bincount(of)) <= {0, of_each}
        assert len(np.unique(of * 143 + pixels[:, 2])) == len(pixels)  # no pixel twice
    some = [palette_fit.sample_pixels(lazily(images), 1000, seed)[0] for seed in (1, 1, 2)]
    np.testing.assert_array_equal(some[0], some[1])
    assert not np.array_equal(some[0], some[2])
    spread = np.unique(some[0].reshape(-1, 64, 3)[:, 0, 0])
    assert len(spread) > 5  # over the whole of the source


def test_sampling_holds_a_few_images_in_memory_and_never_all():
    class Blank:
        shape = (20_000, 64, 64, 3)  # 246 MB

        def __getitem__(self, index):
            return np.zeros((len(index), 64, 64, 3), np.uint8)

    tracemalloc.start()
    palette_fit.sample_pixels(Blank(), 100_000, 0)
    assert tracemalloc.get_traced_memory()[1] < 8e6
    tracemalloc.stop()


def test_k_means_on_a_sample_is_as_good_as_scikit_learns_and_a_function_of_the_seed():
    pixels = smooth_images(97).reshape(-1, 3)
    ours, again, other = (palette_fit.fit_pixels(pixels, 19, seed) for seed in (3, 3, 4))
    np.testing.assert_array_equal(ours.centers, again.centers)
    assert not np.array_equal(ours.centers, other.centers)
    theirs = palette_fit.fit(pixels, 19, seed=3)
    (error, psnr), (reference, _) = (palette_fit.quantisation_error(made, pixels) for made in (ours, theirs))
    assert error < 1.05 * reference
    by_hand = np.square(ours.decode(brute_force(pixels, ours.centers)) / 1.0 - pixels).mean()
    np.testing.assert_allclose([error, psnr], [by_hand, 20 * np.log10(255) - 10 * np.log10(by_hand)])


def test_the_command_fits_writes_and_reports_an_exact_palette(tmp_path, capsys):
    out, picture = tmp_path / "greys.npy", tmp_path / "greys.png"
    command = ["palette", "--source=digits", "--preprocess=none", "--colors=17", f"--out={out}", f"--picture={picture}"]
    run_igpt(command)
    said = capsys.readouterr().out
    assert "80,512 pixels of 1,258 of 1,258 images" in said
    assert re.search(r"17 colours\. On 11,520 pixels of 180 other images: .* error 0 .*PSNR inf dB", said)
    greys = np.round(np.arange(17) * 255 / 16)
    np.testing.assert_array_equal(Palette.load(out).decode(np.arange(17)), greys[:, None].repeat(3, axis=1))
    assert Image.open(picture).size[0] > 8 * 128
    with pytest.raises(SystemExit) as refused:
        run_igpt(command)
    assert refused.value.code == 2
    assert f"{out} and {picture} exist(s) already; name another file, or give --overwrite" in capsys.readouterr().err
    run_igpt([*command, "--overwrite"])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            "--colors=18",
            "--colors=18, but the 80,512 pixels looked at have only 17 different colours; give --colors=17",
        ),
        ("--pixels=0", "--pixels is 0; it must be at least 1"),
        ("--out=palette.png", "palettes are .npy files"),
        ("--out=absent/palette.npy", "name a file in an existing, writable folder"),
        ("--picture=palette.gif", "pictures are written as PNG"),
        ("--source=nothing", "choose digits"),
        ("--size=4y4", "--size=4y4; give a number"),
    ],
)
def test_the_command_refuses_what_it_cannot_do(tmp_path, monkeypatch, capsys, changed, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as refused:
        run_igpt(["palette", "--source=digits", "--preprocess=none", "--colors=17", "--out=p.npy", changed])
    assert refused.value.code == 2 and message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


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
