"""OpenAI's encoded data sets: splits, labels and palette, and files of the wrong kind."""

import contextlib

import numpy as np
import pytest

import train
from igpt.config import Config
from igpt.data.batches import Augmentation, TrainBatches, eval_batches
from igpt.data.examples import ArrayImages, DecodedTokens, Split
from igpt.errors import UserError
from igpt.palette import Palette
from igpt.probe.features import raw_pixels
from igpt.run.directory import RunDirectory, load_config
from tests.helpers import assert_trees_equal, load_source, splits_of


def test_openai_files_bring_their_splits_labels_and_palette(write_openai):
    labels = {
        "trY": np.arange(43) % 3,
        "vaY": np.eye(3, dtype=bool)[np.arange(11) % 3],
    }  # numbers do as well as one-hot
    prefix = write_openai(**labels)
    source = load_source(f"openai:{prefix}")
    assert source.image_size == (5, 5) and source.channels == 3 and [len(s) for s in splits_of(source)] == [43, 11, 7]
    np.testing.assert_array_equal(source.tokenizer.centers, np.load(f"{prefix[:-5]}kmeans_centers.npy"))
    np.testing.assert_array_equal(source.train.labels, np.arange(43) % 3)
    np.testing.assert_array_equal(source.validation.labels, np.arange(11) % 3)
    np.testing.assert_array_equal(source.test.labels, np.load(f"{prefix}_teY.npy").argmax(axis=1))
    assert {split.labels.dtype.name for split in splits_of(source)} == {"int32"}
    for split, name in zip(splits_of(source), ("tr", "va", "te"), strict=True):
        tokens = np.load(f"{prefix}_{name}X.npy").reshape(-1, 5, 5)
        np.testing.assert_array_equal(source.tokenizer.encode(split.images[:]), tokens)


def test_openai_files_without_labels_and_with_grey_clusters_are_read(write_openai):
    clusters = np.linspace(-1, 1, 17, dtype=np.float32)[:, None].repeat(3, axis=1)
    source = load_source(f"openai:{write_openai(clusters, trY=None, vaY=None, teY=None)}")
    assert source.channels == 1 and [split.labels for split in splits_of(source)] == [None] * 3


def test_decoded_tokens_are_indexed_like_the_images_they_stand_for(write_openai):
    images = load_source(f"openai:{write_openai()}").train.images
    whole = np.asarray(images)
    assert isinstance(images, DecodedTokens) and not isinstance(images, np.ndarray)
    assert images.shape == whole.shape == (43, 5, 5, 3) and images.dtype == whole.dtype == np.uint8
    for index in (4, -1, np.int64(2), slice(3, 20, 4), slice(None), np.array([7, 0, 7]), [5], np.array([], int)):
        np.testing.assert_array_equal(images[index], whole[index])
    for index in ((..., slice(1)), (slice(2, 5), 0), (3, ..., 1)):
        np.testing.assert_array_equal(images[index], whole[index])
    assert images[4].dtype == np.uint8


def test_openai_tokens_stay_in_their_files(write_openai):
    for split in splits_of(load_source(f"openai:{write_openai()}")):
        assert isinstance(split.images.tokens, np.memmap) and not split.images.tokens.flags.writeable


@pytest.mark.parametrize("augmentation", [{}, {"flip": True, "pad": 1, "pad_mode": "reflect", "probability": 0.7}])
@pytest.mark.parametrize("dtype", [np.uint8, np.int64, np.uint64])
def test_batches_of_openai_tokens_equal_those_of_their_images(write_openai, write_npz, augmentation, dtype):
    tokens = np.random.default_rng(1).integers(0, 17, (43, 25)).astype(dtype)
    source = load_source(f"openai:{write_openai(trX=tokens)}")
    path = write_npz(images=source.tokenizer.decode(tokens).reshape(43, 5, 5, 3), labels=source.train.labels)
    arrays = np.load(path)
    decoded = Split(ArrayImages(arrays["images"]), arrays["labels"])

    def batches(split):
        return TrainBatches(split, source.tokenizer, 7, 3, Augmentation(**augmentation), slice(None))

    for step in (0, 5, 8):
        assert_trees_equal(batches(source.train)[step], batches(decoded)[step])
    for ours, theirs in zip(
        eval_batches(source.train, source.tokenizer, 10), eval_batches(decoded, source.tokenizer, 10), strict=True
    ):
        assert_trees_equal(ours, theirs)
    for ours, theirs in zip(*(raw_pixels(split, 3) for split in (source.train, decoded)), strict=True):
        np.testing.assert_array_equal(ours[0], theirs[0])


def test_a_run_on_openai_tokens_keeps_their_palette(write_openai, tiny_config, tmp_path):
    prefix = write_openai()
    tiny_config.data.update(source=f"openai:{prefix}", image_size=(5, 5), channels=3, pad=1, flip=True)
    tiny_config.train.update(steps=2, eval_every=2, eval_batch_size=8, num_samples=0, checkpoint_every=2)
    tiny_config.palette.colors = 16
    with pytest.raises(UserError, match=r"small has 17 colours, but palette\.colors is 16"):
        train.run(tiny_config, tmp_path / "run")
    tiny_config.palette.colors = 17
    assert np.isfinite(train.run(tiny_config, tmp_path / "run").evaluation["eval/loss"])
    centers = np.load(tmp_path / "kmeans_centers.npy")
    np.testing.assert_array_equal(np.load(tmp_path / "run" / "palette.npy"), centers)
    assert load_config(tmp_path / "run").data.source == f"openai:{prefix}"


def test_a_palette_that_is_given_comes_before_that_of_the_source(write_openai, tiny_config, tmp_path):
    source = load_source(f"openai:{write_openai()}")
    Palette(np.zeros((17, 3), np.float32)).save(tmp_path / "mine.npy")
    tiny_config.palette.path, tiny_config.palette.colors = str(tmp_path / "mine.npy"), 17
    config = Config.of(tiny_config, trains=True)
    run = RunDirectory(tmp_path / "run", config)
    assert not train.choose_tokenizer(config, run, source).centers.any()
    with run.opened(Palette.load(tmp_path / "mine.npy")):
        pass
    assert not train.choose_tokenizer(config, RunDirectory(tmp_path / "run", config), source).centers.any()


def test_a_resumed_run_reads_no_tokens_of_another_palette(write_openai, tiny_config, tmp_path):
    tiny_config.palette.colors = 17
    config = Config.of(tiny_config, trains=True)
    with RunDirectory(tmp_path / "run", config).opened(Palette(np.zeros((17, 3), np.float32))):
        pass
    resumed, source = RunDirectory(tmp_path / "run", config), load_source(f"openai:{write_openai()}")
    with pytest.raises(UserError, match=r"data\.source=openai:.* has another palette than .*/run, whose network"):
        train.choose_tokenizer(config, resumed, source)


def test_a_resumed_run_takes_a_palette_elsewhere_only_if_it_is_equal(tiny_config, tmp_path):
    tiny_config.palette.update(colors=17, path=str(tmp_path / "mine.npy"))
    Palette(np.zeros((17, 3), np.float32)).save(tmp_path / "mine.npy")
    config = Config.of(tiny_config, trains=True)
    with RunDirectory(tmp_path / "run", config).opened(Palette.load(tmp_path / "mine.npy")):
        pass
    (tmp_path / "mine.npy").rename(tmp_path / "moved.npy")
    Palette(np.ones((17, 3), np.float32)).save(tmp_path / "other.npy")
    for name, message in (("moved", ""), ("other", "has another palette than"), ("absent", "absent.npy")):
        tiny_config.palette.path = str(tmp_path / f"{name}.npy")
        config = Config.of(tiny_config, trains=True)
        resumed = RunDirectory(tmp_path / "run", config, allowed=["palette.path"])
        with pytest.raises(UserError, match=message) if message else contextlib.nullcontext():
            train.choose_tokenizer(config, resumed, load_source("digits"))


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"vaX": None}, r"no file .*small_vaX\.npy"),
        ({"vaY": None}, r"there is .*_trY\.npy, .*_teY\.npy, but no .*_vaY\.npy; .* all splits, or none"),
        ({"trY": None, "teY": None}, r"there is .*_vaY\.npy, but no .*_trY\.npy, .*_teY\.npy;"),
        ({"trX": np.zeros((43, 25))}, r"small_trX\.npy is float64 \[43, 25\]; palette tokens are integers"),
        ({"trX": np.zeros((43, 5, 5), int)}, r"small_trX\.npy is int64 \[43, 5, 5\]; .* \[N, T\]"),
        ({"trX": np.zeros((0, 25), int)}, r"small_trX\.npy"),
        ({"teX": np.zeros((7, 23), int)}, r"small_teX\.npy has 23 tokens an image, which is no square"),
        ({"teX": np.zeros((7, 16), int)}, r"differ in size: .*trX\.npy \[43, 25\], .*teX\.npy \[7, 16\]"),
        ({"vaX": np.full((11, 25), 17)}, r"small_vaX\.npy: tokens run from 17 to 17; its palette has 0\.\.16"),
        ({"vaX": np.full((11, 25), -1)}, r"small_vaX\.npy: tokens run from -1 to -1"),
        ({"trX": np.array([[{}]], object)}, r"small_trX\.npy cannot be read as a \.npy of numbers"),
        ({"trY": np.zeros(42, int)}, r"small_trY\.npy is int64 \[42\]; integers \[43\] or one-hot rows \[43, C\]"),
        ({"teY": np.zeros(7)}, r"small_teY\.npy is float64 \[7\]; integers \[7\]"),
        ({"teY": np.zeros((7, 3, 1))}, r"small_teY\.npy is float64 \[7, 3, 1\]"),
        ({"teY": np.zeros((7, 3))}, r"small_teY\.npy: the rows from 0 on are not all one-hot"),
        ({"teY": np.tile([0.5, 0.5, 0], (7, 1))}, r"small_teY\.npy: the rows from 0 on are not all one-hot"),
        ({"teY": np.tile([2, 0, 0], (7, 1))}, r"small_teY\.npy: the rows from 0 on are not all one-hot"),
    ],
)
def test_openai_files_of_the_wrong_kind_are_refused(write_openai, arrays, message):
    with pytest.raises(UserError, match=message):
        load_source(f"openai:{write_openai(**arrays)}")


def test_a_damaged_openai_file_or_a_missing_palette_is_named(write_openai, tmp_path):
    prefix = write_openai()
    whole = (tmp_path / "small_teX.npy").read_bytes()
    for keep in (0, 20, 200):
        (tmp_path / "small_teX.npy").write_bytes(whole[:keep])
        with pytest.raises(UserError, match=r"small_teX\.npy cannot be read"):
            load_source(f"openai:{prefix}")
    with (tmp_path / "small_teX.npy").open("wb") as file:
        np.savez(file, tokens=np.zeros((7, 25), int))
    with pytest.raises(UserError, match=r"small_teX\.npy is an \.npz of several arrays"):
        load_source(f"openai:{prefix}")
    (tmp_path / "small_teX.npy").write_bytes(whole)
    (tmp_path / "kmeans_centers.npy").unlink()
    with pytest.raises(UserError, match=r"no .*kmeans_centers\.npy; the palette that these tokens index"):
        load_source(f"openai:{prefix}")


def test_a_wrong_token_far_into_a_file_is_named_when_it_is_read(write_openai):
    tokens = np.zeros((1013, 25), np.int32)
    tokens[1009, 3] = 99
    images = load_source(f"openai:{write_openai(trX=tokens, trY=None, vaY=None, teY=None)}").train.images
    images[:1009]
    with pytest.raises(UserError, match=r"small_trX\.npy: tokens run from 0 to 99"):
        images[np.array([1009])]
    batches = TrainBatches(Split(images, None), Palette(np.zeros((1, 3))), 1013, 0, Augmentation(), slice(None))
    with pytest.raises(UserError, match=r"small_trX\.npy: tokens run from 0 to 99"):
        next(batches.iterate(0, 1))


def test_a_label_that_does_not_fit_is_named(write_openai):
    with pytest.raises(UserError, match=r"trY\.npy: labels run from 0 to 4294967296; number the classes"):
        load_source(f"openai:{write_openai(trY=np.array([0] * 42 + [1 << 32]))}")


def test_the_labels_of_more_images_than_are_read_at_a_time_are_whole(write_openai):
    classes = np.random.default_rng(2).integers(0, 5, 4099)
    labels = {"vaY": np.arange(3), "teY": np.arange(3)}
    arrays = {"trX": np.zeros((4099, 1), np.uint8), "vaX": np.zeros((3, 1), int), "teX": np.zeros((3, 1), int)}
    prefix = write_openai(**arrays, trY=np.eye(5, dtype=np.float64)[classes], **labels)
    np.testing.assert_array_equal(load_source(f"openai:{prefix}").train.labels, classes)
