import numpy as np
import pytest
from PIL import Image

import train
from igpt import config as configuration
from igpt import data, palette, probe
from igpt.data import Augmentation, DecodedTokens, Split, TrainBatches, eval_batches, load_source
from igpt.errors import UserError

FRACTIONS = (0.1, 0.2)


def numbered_split(count=23, size=5):
    """Images that tell their own index, and labels that do too."""
    images = np.zeros((count, size, size, 3), np.uint8)
    images[:] = np.arange(count)[:, None, None, None]
    return Split(images, np.arange(count, dtype=np.int32))


def batches_of(split, rows=slice(None), batch_size=7, seed=3, **augmentation):
    greys = palette.Palette(np.repeat(np.arange(256)[:, None] / 127.5 - 1, 3, axis=1))
    return TrainBatches(split, greys, batch_size, seed, Augmentation(**augmentation), rows)


@pytest.fixture
def write_openai(tmp_path):
    """write_openai(trX=...) -> PREFIX of a small data set in OpenAI's files; None leaves one out."""

    def write(clusters=None, **arrays):
        rng = np.random.default_rng(0)
        if clusters is None:
            clusters = rng.uniform(-1, 1, (17, 3)).astype(np.float32)
        for split, count in (("tr", 43), ("va", 11), ("te", 7)):
            arrays.setdefault(f"{split}X", rng.integers(0, len(clusters), (count, 25), np.uint16))
            arrays.setdefault(f"{split}Y", np.eye(3, dtype=np.float32)[rng.integers(0, 3, count)])
        np.save(tmp_path / "kmeans_centers.npy", clusters)
        for suffix, array in arrays.items():
            if array is not None:
                np.save(tmp_path / f"small_{suffix}.npy", array)
        return f"{tmp_path}/small"

    return write


def splits_of(source):
    return source.train, source.validation, source.test


def assert_equal(a, b):
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name])


def test_digits_have_seventeen_grey_levels_and_fixed_disjoint_splits():
    source, again = load_source("digits", FRACTIONS), load_source("digits", FRACTIONS)
    assert source.image_size == (8, 8) and source.channels == 1
    splits = (source.train, source.validation, source.test)
    assert [len(split) for split in splits] == [1258, 180, 359]
    assert len(np.unique(np.concatenate([split.images for split in splits]))) == 17
    np.testing.assert_array_equal(source.test.images, again.test.images)
    other = load_source("digits", FRACTIONS, split_seed=1)
    assert not np.array_equal(source.test.images, other.test.images)


def test_splits_share_no_example(write_npz):
    images = np.arange(50, dtype=np.uint8)[:, None, None] * np.ones((1, 2, 2), np.uint8)
    source = load_source(f"npz:{write_npz(images=images)}", FRACTIONS)
    seen = np.concatenate([split.images[:, 0, 0, 0] for split in (source.train, source.validation, source.test)])
    np.testing.assert_array_equal(np.sort(seen), np.arange(50))


def test_an_epoch_holds_every_example_once_and_the_next_in_another_order():
    batches = batches_of(numbered_split(count=21))
    first = np.concatenate([batches[step]["label"] for step in range(3)])
    second = np.concatenate([batches[step]["label"] for step in range(3, 6)])
    np.testing.assert_array_equal(np.sort(first), np.arange(21))
    np.testing.assert_array_equal(np.sort(second), np.arange(21))
    assert not np.array_equal(first, second)


def test_an_epoch_that_ends_inside_a_batch_loses_nothing():
    batches = batches_of(numbered_split(count=23))
    labels = np.concatenate([batches[step]["label"] for step in range(23)])
    np.testing.assert_array_equal(np.bincount(labels), np.full(23, 7))


def test_a_batch_depends_on_seed_and_step_alone():
    ours = batches_of(numbered_split(), pad=2)
    in_order = list(ours.iterate(0, 9, threads=3))
    for step in (8, 0, 5):
        assert_equal(in_order[step], batches_of(numbered_split(), pad=2)[step])
    assert_equal(next(batches_of(numbered_split(), pad=2).iterate(6, 9)), in_order[6])
    other = batches_of(numbered_split(), pad=2, seed=4)[0]
    assert not np.array_equal(other["label"], in_order[0]["label"])


def test_processes_read_disjoint_rows_of_the_same_augmented_batch():
    images = np.random.default_rng(0).integers(0, 256, (23, 5, 5, 1), np.uint8).repeat(3, axis=-1)
    split = Split(images, np.arange(23, dtype=np.int32))
    whole = batches_of(split, pad=1, flip=True, probability=0.5)[4]
    parts = [batches_of(split, rows, pad=1, flip=True, probability=0.5)[4] for rows in (slice(0, 3), slice(3, 7))]
    assert_equal(whole, {name: np.concatenate([part[name] for part in parts]) for name in whole})


def test_a_process_touches_only_its_own_images():
    class Recorder:
        shape = (23, 5, 5, 3)
        touched = []

        def __len__(self):
            return 23

        def __getitem__(self, indices):
            self.touched.extend(indices)
            return numbered_split().images[indices]

    batches_of(Split(Recorder(), None), rows=slice(2, 5))[0]
    assert len(Recorder.touched) == 3


def test_a_random_crop_is_a_window_of_the_padded_image():
    images = np.random.default_rng(0).integers(1, 256, (64, 4, 5, 3), np.uint8)
    cropped = Augmentation(pad=1)(images, np.random.default_rng(1), slice(0, 64), 64)
    padded = np.pad(images, [(0, 0), (1, 1), (1, 1), (0, 0)])
    offsets = set()
    for image, around in zip(cropped, padded, strict=True):
        found = [(y, x) for y in range(3) for x in range(3) if np.array_equal(image, around[y : y + 4, x : x + 5])]
        assert len(found) == 1
        offsets.update(found)
    assert len(offsets) == 9  # every shift occurs


def test_augmentation_applies_as_often_as_its_probability_says():
    images = np.random.default_rng(0).integers(1, 256, (2000, 3, 3, 3), np.uint8)
    flipped = Augmentation(flip=True, probability=0.3)(images, np.random.default_rng(1), slice(0, 2000), 2000)
    changed = (flipped != images).any(axis=(1, 2, 3)).mean()
    assert 0.11 < changed < 0.19  # 0.3 x 1/2


def test_evaluation_sees_every_example_exactly_once():
    greys = palette.Palette(np.repeat(np.arange(256)[:, None] / 127.5 - 1, 3, axis=1))
    seen, sizes = [], set()
    for batch in eval_batches(numbered_split(count=23), greys, batch_size=10):
        seen.extend(batch["label"][batch["mask"] == 1.0])
        sizes.add(batch["tokens"].shape)
    np.testing.assert_array_equal(seen, np.arange(23))
    assert sizes == {(10, 25)}


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
        load_source(f"npz:{write_npz(**arrays)}", FRACTIONS)


def test_sources_that_cannot_be_read_are_named(tmp_path):
    with pytest.raises(UserError, match=r"no file .*absent\.npz"):
        load_source(f"npz:{tmp_path}/absent.npz", FRACTIONS)
    (tmp_path / "text.npz").write_text("hello")
    with pytest.raises(UserError, match=r"text\.npz cannot be read"):
        load_source(f"npz:{tmp_path}/text.npz", FRACTIONS)
    np.savez(tmp_path / "pickle.npz", images=np.array([{}], object))
    with pytest.raises(UserError, match=r"pickle\.npz cannot be read"):
        load_source(f"npz:{tmp_path}/pickle.npz", FRACTIONS)
    np.save(tmp_path / "single.npy", np.zeros((9, 4, 4), np.uint8))
    with pytest.raises(UserError, match=r"single\.npy is a single \.npy array"):
        load_source(f"npz:{tmp_path}/single.npy", FRACTIONS)
    with pytest.raises(UserError, match="'mnist'; choose 'digits', 'npz:PATH' or"):
        load_source("mnist", FRACTIONS)


def test_a_batch_larger_than_the_data_is_refused():
    with pytest.raises(UserError, match="batch_size is 99.*only 23"):
        batches_of(numbered_split(), batch_size=99)


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "1", "LA"])
def test_image_files_of_every_mode_are_read(tmp_path, mode):
    Image.new("RGB", (30, 20), (200, 30, 60)).convert(mode).save(tmp_path / "image.png")
    image = data.read_image(tmp_path / "image.png", 8, 8, channels=3)
    assert image.shape == (8, 8, 3) and image.dtype == np.uint8


def test_images_that_cannot_be_read_are_refused(tmp_path):
    (tmp_path / "text.png").write_text("hello")
    with pytest.raises(UserError, match=r"text\.png cannot be read as an image"):
        data.read_image(tmp_path / "text.png", 8, 8, 3)
    with pytest.raises(UserError, match=r"no image .*absent\.png"):
        data.read_image(tmp_path / "absent.png", 8, 8, 3)


def test_openai_files_bring_their_splits_labels_and_palette(write_openai):
    labels = {
        "trY": np.arange(43) % 3,
        "vaY": np.eye(3, dtype=bool)[np.arange(11) % 3],
    }  # numbers do as well as one-hot
    prefix = write_openai(**labels)
    source = load_source(f"openai:{prefix}", FRACTIONS)
    assert source.image_size == (5, 5) and source.channels == 3 and [len(s) for s in splits_of(source)] == [43, 11, 7]
    np.testing.assert_array_equal(source.palette.centers, np.load(f"{prefix[:-5]}kmeans_centers.npy"))
    np.testing.assert_array_equal(source.train.labels, np.arange(43) % 3)
    np.testing.assert_array_equal(source.validation.labels, np.arange(11) % 3)
    np.testing.assert_array_equal(source.test.labels, np.load(f"{prefix}_teY.npy").argmax(axis=1))
    assert {split.labels.dtype.name for split in splits_of(source)} == {"int32"}
    for split, name in zip(splits_of(source), ("tr", "va", "te"), strict=True):
        tokens = np.load(f"{prefix}_{name}X.npy").reshape(-1, 5, 5)
        np.testing.assert_array_equal(source.palette.encode(split.images[:]), tokens)


def test_openai_files_without_labels_and_with_grey_clusters_are_read(write_openai):
    clusters = np.linspace(-1, 1, 17, dtype=np.float32)[:, None].repeat(3, axis=1)
    source = load_source(f"openai:{write_openai(clusters, trY=None, vaY=None, teY=None)}", FRACTIONS)
    assert source.channels == 1 and [split.labels for split in splits_of(source)] == [None] * 3


def test_decoded_tokens_are_indexed_like_the_images_they_stand_for(write_openai):
    images = load_source(f"openai:{write_openai()}", FRACTIONS).train.images
    whole = np.asarray(images)
    assert isinstance(images, DecodedTokens) and not isinstance(images, np.ndarray)
    assert images.shape == whole.shape == (43, 5, 5, 3) and images.dtype == whole.dtype == np.uint8
    for index in (4, -1, np.int64(2), slice(3, 20, 4), slice(None), np.array([7, 0, 7]), [5], np.array([], int)):
        np.testing.assert_array_equal(images[index], whole[index])
    for index in ((..., slice(1)), (slice(2, 5), 0), (3, ..., 1)):
        np.testing.assert_array_equal(images[index], whole[index])
    assert images[4].dtype == np.uint8


def test_openai_tokens_stay_in_their_files(write_openai):
    for split in splits_of(load_source(f"openai:{write_openai()}", FRACTIONS)):
        assert isinstance(split.images.tokens, np.memmap) and not split.images.tokens.flags.writeable


@pytest.mark.parametrize("augmentation", [{}, {"flip": True, "pad": 1, "pad_mode": "reflect", "probability": 0.7}])
@pytest.mark.parametrize("dtype", [np.uint8, np.int64, np.uint64])
def test_batches_of_openai_tokens_equal_those_of_their_images(write_openai, write_npz, augmentation, dtype):
    tokens = np.random.default_rng(1).integers(0, 17, (43, 25)).astype(dtype)
    source = load_source(f"openai:{write_openai(trX=tokens)}", FRACTIONS)
    path = write_npz(images=source.palette.decode(tokens).reshape(43, 5, 5, 3), labels=source.train.labels)
    arrays = np.load(path)
    decoded = Split(arrays["images"], arrays["labels"])

    def batches(split):
        return TrainBatches(split, source.palette, 7, 3, Augmentation(**augmentation), slice(None))

    for step in (0, 5, 8):
        assert_equal(batches(source.train)[step], batches(decoded)[step])
    for ours, theirs in zip(
        eval_batches(source.train, source.palette, 10), eval_batches(decoded, source.palette, 10), strict=True
    ):
        assert_equal(ours, theirs)
    np.testing.assert_array_equal(probe.raw_pixels(source.train, 3), probe.raw_pixels(decoded, 3))


def test_a_run_on_openai_tokens_keeps_their_palette(write_openai, tiny_config, tmp_path):
    prefix = write_openai()
    tiny_config.data.update(source=f"openai:{prefix}", image_size=(5, 5), channels=3, pad=1, flip=True)
    tiny_config.train.update(steps=2, eval_every=2, eval_batch_size=8, num_samples=0, checkpoint_every=2)
    tiny_config.palette.colors = 16
    with pytest.raises(UserError, match=r"small has 17 colours, but palette\.colors is 16"):
        train.run(tiny_config, tmp_path / "run")
    tiny_config.palette.colors = 17
    assert np.isfinite(train.run(tiny_config, tmp_path / "run")["eval/loss"])
    centers = np.load(tmp_path / "kmeans_centers.npy")
    np.testing.assert_array_equal(np.load(tmp_path / "run" / "palette.npy"), centers)
    assert configuration.load(tmp_path / "run").data.source == f"openai:{prefix}"


def test_a_palette_that_is_given_comes_before_that_of_the_source(write_openai, tiny_config, tmp_path):
    source = load_source(f"openai:{write_openai()}", FRACTIONS)
    palette.Palette(np.zeros((17, 3), np.float32)).save(tmp_path / "mine.npy")
    tiny_config.palette.path, tiny_config.palette.colors = str(tmp_path / "mine.npy"), 17
    assert not train.find_palette(tiny_config, None, source).centers.any()


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"vaX": None}, r"no file .*small_vaX\.npy"),
        ({"trX": np.zeros((43, 25))}, r"small_trX\.npy is float64 \[43, 25\]; palette tokens are integers"),
        ({"trX": np.zeros((43, 5, 5), int)}, r"small_trX\.npy is int64 \[43, 5, 5\]; .* \[N, T\]"),
        ({"trX": np.zeros((0, 25), int)}, r"small_trX\.npy"),
        ({"teX": np.zeros((7, 23), int)}, r"small_teX\.npy has 23 tokens an image, which is no square"),
        ({"teX": np.zeros((7, 16), int)}, r"differ in size: .*trX\.npy \[43, 25\], .*teX\.npy \[7, 16\]"),
        ({"vaX": np.full((11, 25), 17)}, r"small_vaX\.npy: tokens run from 17 to 17; this palette has 0\.\.16"),
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
        load_source(f"openai:{write_openai(**arrays)}", FRACTIONS)


def test_a_damaged_openai_file_or_a_missing_palette_is_named(write_openai, tmp_path):
    prefix = write_openai()
    whole = (tmp_path / "small_teX.npy").read_bytes()
    for keep in (0, 20, 200):
        (tmp_path / "small_teX.npy").write_bytes(whole[:keep])
        with pytest.raises(UserError, match=r"small_teX\.npy cannot be read"):
            load_source(f"openai:{prefix}", FRACTIONS)
    with (tmp_path / "small_teX.npy").open("wb") as file:
        np.savez(file, tokens=np.zeros((7, 25), int))
    with pytest.raises(UserError, match=r"small_teX\.npy is an \.npz of several arrays"):
        load_source(f"openai:{prefix}", FRACTIONS)
    (tmp_path / "small_teX.npy").write_bytes(whole)
    (tmp_path / "kmeans_centers.npy").unlink()
    with pytest.raises(UserError, match=r"no .*kmeans_centers\.npy; the palette that these tokens index"):
        load_source(f"openai:{prefix}", FRACTIONS)


def test_a_wrong_token_far_into_a_file_is_named_when_it_is_met(write_openai):
    tokens = np.zeros((1013, 25), np.int32)
    tokens[1009, 3] = 99
    images = load_source(f"openai:{write_openai(trX=tokens, trY=None)}", FRACTIONS).train.images
    images[:1009]
    with pytest.raises(UserError, match=r"small_trX\.npy: tokens run from 0 to 99"):
        images[np.array([1009])]
    batches = TrainBatches(Split(images, None), palette.Palette(np.zeros((1, 3))), 1013, 0, Augmentation(), slice(None))
    with pytest.raises(UserError, match=r"small_trX\.npy: tokens run from 0 to 99"):
        next(batches.iterate(0, 1))


def test_the_labels_of_more_images_than_are_read_at_a_time_are_whole(write_openai):
    classes = np.random.default_rng(2).integers(0, 5, 4099)
    arrays = {"trX": np.zeros((4099, 1), np.uint8), "vaX": np.zeros((3, 1), int), "teX": np.zeros((3, 1), int)}
    prefix = write_openai(**arrays, trY=np.eye(5, dtype=np.float64)[classes], vaY=None, teY=None)
    np.testing.assert_array_equal(load_source(f"openai:{prefix}", FRACTIONS).train.labels, classes)
