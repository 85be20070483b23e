import numpy as np
import pytest
from PIL import Image

from igpt import data, palette
from igpt.data import Augmentation, Split, TrainBatches, eval_batches, load_source
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
    with pytest.raises(UserError, match="'mnist'; choose 'digits' or"):
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
