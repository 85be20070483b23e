"""Palettes fitted to a source: exact colours where there is room, else k-means on a sample of pixels."""

import re
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.cluster import KMeans

import train
from igpt.__main__ import main as run_igpt
from igpt.config import Config
from igpt.data import palette_fit
from igpt.data.examples import ArrayImages, DecodedTokens, EncodedImages
from igpt.data.images import Preprocess
from igpt.data.sources import load_source
from igpt.errors import UserError
from igpt.palette import Palette
from igpt.run.directory import RunDirectory
from tests.helpers import prepare_settings


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
    assert set(seen) == {999}  # 111 of each image


def test_more_colours_than_tokens_can_name_are_refused_before_the_fit():
    pixels = np.stack(np.unravel_index(np.arange(70_000), (64, 64, 64)), axis=-1).astype(np.uint8)
    with pytest.raises(UserError, match="palette.colors is 65536; a palette has at most 65535 colours"):
        palette_fit.fit_pixels(pixels, 65_536)


def test_fit_says_how_many_colours_there_are_when_too_many_are_asked_for():
    with pytest.raises(UserError, match=r"palette.colors is 9.*2 pixels.*only 2.*palette.colors=2"):
        palette_fit.fit(np.array([[[[0, 0, 0], [9, 9, 9]]]], np.uint8), colors=9)


def lazily(images):
    """The same images, decoded when they are read."""
    return EncodedImages([(image, f"image {i}") for i, image in enumerate(images)], Preprocess(images.shape[1:3]))


def smooth_images(count=23, side=13):
    small = np.random.default_rng(8).integers(0, 256, (count, 3, 3, 3), np.uint8)
    return np.stack([np.asarray(Image.fromarray(image).resize((side, side))) for image in small])


def test_images_in_memory_in_files_and_as_tokens_give_the_same_palette():
    images = smooth_images()
    ours = Palette(np.random.default_rng(9).uniform(-1, 1, (53, 3)).astype(np.float32))
    tokens = ours.encode(images)
    decoded = DecodedTokens(tokens.reshape(len(images), -1), ours, "tokens", images.shape[1:3])
    for lazy, whole in ((lazily(images), images), (decoded, ArrayImages(ours.decode(tokens)))):
        fitted = [palette_fit.fit(one, colors=11, max_pixels=2000).centers for one in (lazy, whole)]
        np.testing.assert_array_equal(*fitted)


@pytest.mark.parametrize("pixels", [500, 10**6])
def test_training_and_the_command_find_the_same_palette(tiny_config, tmp_path, write_npz, pixels):
    path = write_npz(images=smooth_images())
    tiny_config.data.update(source=f"npz:{path}", image_size=(13, 13), channels=3)
    tiny_config.palette.update(colors=11, max_pixels=pixels)
    tiny_config.seed = 5
    config = Config.of(tiny_config, trains=True)
    trained = train.choose_tokenizer(config, RunDirectory(tmp_path / "run", config), load_source(config.data))
    common = [f"--source=npz:{path}", "--size=13", "--preprocess=none", "--colors=11", f"--pixels={pixels}"]
    run_igpt(["palette", *common, "--seed=5", f"--out={tmp_path}/palette.npy"])
    np.testing.assert_array_equal(Palette.load(tmp_path / "palette.npy").centers, trained.centers)


def test_a_sample_takes_equally_many_pixels_of_images_chosen_by_seed(monkeypatch):
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
    assert len(spread) > 5  # over the whole source


def test_sampling_holds_a_few_images_in_memory_and_never_all():
    class Blank:
        shape = (20_000, 64, 64, 3)  # 246 MB

        def __getitem__(self, index):
            return np.zeros((len(index), 64, 64, 3), np.uint8)

    tracemalloc.start()
    palette_fit.sample_pixels(Blank(), 100_000, 0)
    assert tracemalloc.get_traced_memory()[1] < 8e6
    tracemalloc.stop()


def test_k_means_is_as_good_as_scikit_learns_and_a_function_of_the_seed():
    pixels = smooth_images(97).reshape(-1, 3)
    ours, again, other = (palette_fit.fit_pixels(pixels, 19, seed) for seed in (3, 3, 4))
    np.testing.assert_array_equal(ours.centers, again.centers)
    assert not np.array_equal(ours.centers, other.centers)
    values = pixels / 127.5 - 1
    theirs = palette_fit.of_centers(KMeans(19, n_init=1, random_state=3).fit(values).cluster_centers_)
    (error, psnr), (reference, _) = (palette_fit.quantisation_error(made, pixels) for made in (ours, theirs))
    assert error < 1.05 * reference
    nearest = np.square(values[:, None] - ours.centers.astype(np.float64)).sum(-1).argmin(1)
    by_hand = np.square(ours.decode(nearest) / 1.0 - pixels).mean()
    np.testing.assert_allclose([error, psnr], [by_hand, 20 * np.log10(255) - 10 * np.log10(by_hand)])


def test_an_unreadable_picture_leaves_no_palette_unless_it_is_passed_over(tmp_path, capsys):
    (tmp_path / "photos").mkdir()
    for i in range(20):
        Image.new("RGB", (5, 7), (i, 10 * i, 0)).save(tmp_path / "photos" / f"{i:02d}.png")
    command = ["palette", f"--source=folder:{tmp_path}/photos", "--size=5", "--colors=3", f"--out={tmp_path}/p.npy"]
    held_out = load_source(prepare_settings(f"folder:{tmp_path}/photos")).validation.images
    Path(held_out.files[held_out.indices[0]][0]).write_bytes(b"no picture")
    with pytest.raises(SystemExit):
        run_igpt(command)
    assert "igpt palette, prepare and evaluate: --on_unreadable=skip" in capsys.readouterr().err
    assert not (tmp_path / "p.npy").exists()
    run_igpt([*command, "--on_unreadable=skip"])
    assert (tmp_path / "p.npy").exists() and "passed over 1 unreadable images" in capsys.readouterr().out


def test_the_command_fits_writes_and_reports_an_exact_palette(tmp_path, capsys):
    out, picture = tmp_path / "greys.npy", tmp_path / "greys.png"
    command = ["palette", "--source=digits", "--preprocess=none", "--colors=17", f"--out={out}", f"--picture={picture}"]
    run_igpt(command)
    printed = capsys.readouterr().out
    assert "80,512 pixels of 1,258 of 1,258 images" in printed
    assert re.search(r"17 colours\. On 11,520 pixels of 180 other images: .* error 0 .*PSNR inf dB", printed)
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
            "--colors is 18, but the 80,512 pixels looked at have only 17 different colours; set --colors=17",
        ),
        ("--pixels=0", "--pixels is 0; it must be at least 1"),
        ("--out=palette.png", "--out=palette.png: this file is written as .npy; give a name that ends in .npy"),
        ("--out=absent/palette.npy", "--out=absent/palette.npy cannot be written: No such file or directory"),
        ("--picture=palette.gif", "--picture=palette.gif: this file is written as .png"),
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
