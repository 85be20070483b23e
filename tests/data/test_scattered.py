"""Small images at random places: the same place for an image in every evaluation, and for a step in every run."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from igpt.data import prepare
from igpt.data.batches import Augmentation, TrainBatches
from igpt.data.examples import ArrayImages
from igpt.data.fingerprint import fingerprint
from igpt.data.scattered import ScatteredImages
from igpt.data.settings import DataConfig
from igpt.data.sources import open_source
from igpt.errors import UserError
from igpt.palette import Palette

IMAGES = np.random.default_rng(0).integers(1, 256, (23, 3, 5), np.uint8)  # no black pixels: all can be found again
LABELS = np.arange(23) % 4
GREY = Palette(np.linspace(-1, 1, 256, dtype=np.float32)[:, None].repeat(3, axis=1))


def settings(path, **fields) -> DataConfig:
    return DataConfig(source=f"scattered:npz:{path}", image_size=(7, 11), channels=1, **fields)


def on_pictures(path, background: str) -> DataConfig:
    return dataclasses.replace(settings(path, scatter_background=background), channels=3)


@pytest.fixture
def path(write_npz):
    return write_npz(images=IMAGES, labels=LABELS)


def place(canvas: np.ndarray) -> tuple[int, int]:
    """The top left corner of the only image on a black canvas [H, W, 3]."""
    rows, columns = (np.flatnonzero(canvas[..., 0].any(axis=axis)) for axis in (1, 0))
    return rows[0], columns[0]


def number(canvas: np.ndarray) -> int:
    """The number in IMAGES of the whole image on a black canvas."""
    top, left = place(canvas)
    return int(np.flatnonzero((canvas[top : top + 3, left : left + 5, 0] == IMAGES).all(axis=(1, 2)))[0])


def test_every_image_lies_whole_on_a_black_canvas_with_its_label(path):
    for split in open_source(settings(path)).splits().values():
        for canvas, label in zip(split.images[:], split.labels, strict=True):
            assert np.count_nonzero(canvas[..., 0]) == 15 and label == LABELS[number(canvas)]


def test_images_are_at_all_places_equally_often(path):
    train = open_source(settings(path, scatter_copies=200)).train
    places, counts = np.unique([place(canvas) for canvas in train.images[:]], axis=0, return_counts=True)
    assert len(places) == 5 * 7  # (7 - 3 + 1) x (11 - 5 + 1)
    expected = len(train) / 35
    assert np.sum((counts - expected) ** 2 / expected) < 80  # chi-square with 34 degrees of freedom: p = 1e-5


def test_an_image_has_the_same_place_in_every_evaluation(path):
    images = open_source(settings(path)).train.images
    order = np.random.default_rng(1).permutation(len(images))
    np.testing.assert_array_equal(images.take(order)[:], images[:][order])
    np.testing.assert_array_equal(images.read(order[:3])[0], images[:][order[:3]])
    np.testing.assert_array_equal(open_source(settings(path)).train.images[:], images[:])
    assert not np.array_equal(open_source(settings(path, split_seed=1)).train.images[:], images[:])


def batches(path, rows=slice(None), seed=0):
    split = open_source(settings(path)).train
    return TrainBatches(split, GREY, 8, seed, Augmentation(), rows)


def test_training_places_depend_on_the_seed_and_the_step_alone(path):
    one = batches(path)
    np.testing.assert_array_equal(one[3]["tokens"], batches(path)[3]["tokens"])
    canvases = [GREY.decode(one[step]["tokens"].reshape(-1, 7, 11)) for step in (0, 2, 4)]  # of three epochs
    places = [{number(canvas): place(canvas) for canvas in some} for some in canvases]
    both = set(places[0]) & set(places[1]) | set(places[1]) & set(places[2])
    assert both and any(len({found.get(image) for found in places} - {None}) > 1 for image in both)
    assert not np.array_equal(one[3]["tokens"], batches(path, seed=1)[3]["tokens"])


def test_processes_read_the_parts_of_one_batch(path):
    whole = batches(path)[5]["tokens"]
    np.testing.assert_array_equal(np.concatenate([batches(path, slice(0, 3))[5]["tokens"], whole[3:]]), whole)
    np.testing.assert_array_equal(batches(path, slice(3, 8))[5]["tokens"], whole[3:])


def test_no_image_of_another_split_is_in_training(path):
    splits = open_source(settings(path, scatter_copies=3)).splits()
    found = {name: {number(canvas) for canvas in split.images[:]} for name, split in splits.items()}
    assert not found["train"] & (found["validation"] | found["test"]) and len(found["train"]) == 16
    learnt = {number(c) for step in range(9) for c in GREY.decode(batches(path)[step]["tokens"].reshape(-1, 7, 11))}
    assert learnt == found["train"]


def test_copies_have_places_of_their_own_and_the_label_of_their_image(path):
    train = open_source(settings(path, scatter_copies=3)).train
    assert len(train) == 48 and len(open_source(settings(path, scatter_copies=3)).test) == 5
    places = [[place(canvas) for canvas in train.images[copy * 16 : (copy + 1) * 16]] for copy in range(3)]
    assert places[0] != places[1] != places[2] != places[0]
    assert train.labels.tolist() == [LABELS[number(canvas)] for canvas in train.images[:]]


def test_a_coloured_image_on_a_picture_is_their_difference():
    small = np.random.default_rng(2).integers(0, 256, (1, 3, 5, 3), np.uint8)
    pictures = np.random.default_rng(3).integers(0, 256, (2, 14, 22, 3), np.uint8)
    how = DataConfig("scattered:digits", (7, 11), 3, scatter_color=True)
    images = ScatteredImages(ArrayImages(small), how, (0,), np.arange(1), pictures)
    draws = np.array([[0.9, 0.5, 0.999, 0.2, 0.4, 0.1, 0.6, 0.25, 0.999]])
    canvas = pictures[1, 2 : 2 + 7, 11 : 11 + 11].astype(int)
    canvas[2:5, 6:11] = np.abs(canvas[2:5, 6:11] - np.round(small[0] * [0.5, 1.0, 0.25]).astype(int))
    np.testing.assert_array_equal(images.read(np.arange(1), draws)[0][0], canvas)


def test_scales_are_drawn_between_the_smallest_and_the_largest(write_npz):
    path = write_npz(images=np.full((40, 4, 4), 255, np.uint8))
    images = open_source(settings(path, scatter_scale=(0.5, 1.5))).train.images[:]
    sides = {tuple(len(np.flatnonzero(canvas[..., 0].any(axis=axis))) for axis in (0, 1)) for canvas in images}
    assert sides == {(side, side) for side in (2, 3, 4, 5, 6)}


def test_backgrounds_of_a_split_are_of_the_same_split_of_the_pictures(path, tmp_path):
    pictures = np.arange(20, dtype=np.uint8)[:, None, None, None].repeat(40, 1).repeat(40, 2).repeat(3, 3) * 10
    np.savez(tmp_path / "pictures.npz", images=pictures)
    source = open_source(on_pictures(path, f"npz:{tmp_path}/pictures.npz"))
    seen = {name: set(np.unique(split.images.backgrounds)) for name, split in source.splits().items()}
    assert not seen["train"] & seen["test"] and len(seen["train"]) == 14 and len(seen["test"]) == 4


def test_backgrounds_that_cannot_be_read_are_named(path, tmp_path):
    for number in range(20):
        Image.new("RGB", (40, 40), (number, 0, 0)).save(tmp_path / f"{number:02}.png")
    for number in (3, 11):
        (tmp_path / f"{number:02}.png").write_bytes(b"no picture")
    how = on_pictures(path, f"folder:{tmp_path}")
    with pytest.raises(UserError, match=r"(03|11)\.png"):
        open_source(how)
    source = open_source(dataclasses.replace(how, on_unreadable="skip"))
    source = dataclasses.replace(source, train=source.train.take(np.arange(5)))
    assert sorted(Path(reason.split(" ")[0]).name for reason in source.unreadable) == ["03.png", "11.png"]


@pytest.mark.parametrize("size", [(8, 8), (64, 64), (22, 14)])
def test_backgrounds_that_cannot_be_resized_have_the_size_that_is_needed(path, tmp_path, size):
    pictures = np.random.default_rng(1).integers(0, 256, (20, *size, 3), np.uint8)
    np.savez(tmp_path / "pictures.npz", images=pictures)
    GREY.save(tmp_path / "grey.npy")
    how = dict(source=f"npz:{tmp_path}/pictures.npz", image_size=size, channels=3)
    prepare.prepare(how, str(tmp_path / "grey.npy"), str(tmp_path / "out"))
    message = f"tokens:.*out has pictures of {size[0]} x {size[1]}, .* 7 x 11 takes 14 x 22; .* --size=14x22"
    with pytest.raises(UserError, match=message):
        open_source(settings(path, scatter_background=f"tokens:{tmp_path}/out"))


def test_other_options_are_other_images(path):
    prints = [fingerprint(open_source(settings(path, **f))) for f in ({}, {}, {"scatter_copies": 2}, {"split_seed": 1})]
    assert prints[0] == prints[1] and prints[0] != prints[2] and prints[0] != prints[3]
    assert fingerprint(open_source(settings(path, scatter_scale=(0.5, 1.0)))) != prints[0]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"image_size": (2, 11)}, "images of up to 3 x 5, which do not fit on a canvas of 2 x 11"),
        ({"scatter_scale": (1.0, 3.0)}, "up to 9 x 15, which do not fit on a canvas of 7 x 11"),
        ({"scatter_scale": (2.0, 1.0)}, r"give \(smallest, largest\)"),
        ({"scatter_copies": 0}, "data.scatter_copies is 0; it must be at least 1"),
        ({"preprocess": "shrink"}, "placed, not resized"),
        ({"source": "digits", "scatter_color": True}, "use scattered:digits"),
        ({"source": "folder:x", "scatter_color": True}, "only digits and npz:FILE can be scattered; leave these"),
        (
            {"channels": 3, "scatter_background": "npzz:a"},
            "data.scatter_background=npzz:a: data.source is 'npzz:a'",
        ),
        ({"source": "scattered:folder:x"}, "choose digits, .* scattered:digits or scattered:npz:PATH"),
        ({"source": "scattered:scattered:digits"}, "choose digits"),
        ({"scatter_color": True}, "images of 7 x 11 with 3 channel"),
    ],
)
def test_options_that_cannot_be_are_refused_in_words(path, fields, message):
    with pytest.raises(UserError, match=message):
        open_source(DataConfig.of(vars(settings(path)) | fields))


def test_the_fingerprint_knows_the_backgrounds_wherever_they_lie(path, tmp_path):
    pictures = np.random.default_rng(1).integers(0, 256, (20, 14, 22, 3), np.uint8)
    for name, content in (("one", pictures), ("moved", pictures), ("other", pictures[::-1])):
        np.savez(tmp_path / f"{name}.npz", images=content)
    one, moved, other = (
        fingerprint(open_source(on_pictures(path, f"npz:{tmp_path}/{name}.npz"))) for name in ("one", "moved", "other")
    )
    assert one == moved and one != other
