"""Images brought to the size of the model: unchanged, shrunk, or cropped."""

import json

import numpy as np
import pytest
from PIL import Image

import igpt
from igpt import sample
from igpt.__main__ import main as run_igpt
from igpt.data.images import FILTERS, Preprocess, UnreadableImage
from igpt.page.answers import Answers
from tests.helpers import write_run
from tests.image_files import RANDOM_RGB, encode_image


def test_an_image_of_the_size_asked_for_is_left_alone():
    for kind in ("none", "shrink"):
        np.testing.assert_array_equal(
            Preprocess(RANDOM_RGB.shape[:2], kind)(Image.fromarray(RANDOM_RGB), None, "it"), RANDOM_RGB
        )
    with pytest.raises(UnreadableImage, match="it has 11 x 13 pixels, data.image_size is 11 x 11; set data.preprocess"):
        Preprocess((11, 11))(Image.fromarray(RANDOM_RGB), None, "it")


@pytest.mark.parametrize("filter", FILTERS)
def test_shrinking_takes_the_largest_part_in_the_centre(filter):
    photo = Image.effect_noise((101, 60), 90).convert("RGB")
    boxes = {(20, 10): (35.5, 0, 65.5, 60), (10, 20): (0, 4.75, 101, 55.25), (20, 20): (20.5, 0, 80.5, 60)}
    for size, box in boxes.items():
        expected = photo.resize(size[::-1], FILTERS[filter], box=box)
        np.testing.assert_array_equal(Preprocess(size, "shrink", filter=filter)(photo, None, "it"), expected)
    if filter == "box":
        means = np.asarray(photo)[:, 10:90].reshape(3, 20, 4, 20, 3).mean(axis=(1, 3))  # an 80 x 60 part
        found = Preprocess((3, 4), "shrink", filter="box")(photo.crop((10, 0, 90, 60)), None, "it")
        np.testing.assert_allclose(found, means, atol=1.0)


@pytest.mark.parametrize(("size", "there"), [((15, 21), (15, 21)), ((10, 14), (15, 21)), ((20, 28), (30, 42))])
def test_shrinking_takes_the_whole_of_an_image_of_the_same_shape(size, there):
    photo = Image.effect_noise(there[::-1], 90).convert("RGB")
    found = Preprocess(size, "shrink")(photo, None, "it")
    np.testing.assert_allclose(found, photo.resize(size[::-1], FILTERS["bicubic"]), atol=1)


def whole_then_cut(photo, draws, resample, low=37, high=53, crop=31, size=16):
    """The simple way: resize everything, cut, shrink."""
    short = crop if draws is None else low + int(draws[0] * (high - low + 1))
    width, height = (max(short, round(side * short / min(photo.size))) for side in photo.size)
    across, down = (0.5, 0.5) if draws is None else draws[1:]
    left, top = int(across * (width - crop + 1)), int(down * (height - crop + 1))
    cut = photo.resize((width, height), resample).crop((left, top, left + crop, top + crop))
    return np.asarray(cut.resize((size, size), resample)).astype(int)


@pytest.mark.parametrize("filter", FILTERS)
@pytest.mark.parametrize("shape", [(97, 61), (61, 97), (20, 23), (31, 31), (1, 1), (3, 400)])
def test_crops_are_those_of_the_image_resized_as_a_whole(filter, shape):
    across, down = np.meshgrid(np.arange(shape[1]), np.arange(shape[0]))
    slope = 190 / max(shape)  # so that a pixel next to the right one is seen to be wrong
    photo = Image.fromarray(np.stack([slope * across, slope * down, 0 * down], -1).astype(np.uint8))
    preprocess = Preprocess((16, 16), "crop", (37, 53), 31, filter)
    for draws in (None, *np.random.default_rng(8).random((9, 3)), np.zeros(3), np.full(3, 1 - 1e-12)):
        found = preprocess(photo, draws, "it").astype(int)[..., :2]
        # Pillow rounds between its two passes, and a hard-edged filter has ties: the mean error is below half a pixel.
        assert np.abs(found - whole_then_cut(photo, draws, FILTERS[filter])[..., :2]).mean() < 0.2 * max(slope, 1)


def test_training_crops_cover_every_corner_and_stay_inside():
    ramp = np.stack([*np.meshgrid(np.arange(64), np.arange(48)), np.zeros((48, 64))], -1)  # a pixel is its place
    photo = Image.fromarray((ramp * 4).astype(np.uint8))
    preprocess = Preprocess((32, 32), "crop", (48, 48), 32, "nearest")
    corners = set()
    for draws in np.random.default_rng(9).random((6000, 3)):
        cut = preprocess(photo, draws, "it")[..., :2] // 4
        np.testing.assert_array_equal(cut, cut[0, 0] + np.stack(np.meshgrid(np.arange(32), np.arange(32)), -1))
        corners.add(tuple(cut[0, 0]))
    assert corners == {(x, y) for x in range(33) for y in range(17)}
    np.testing.assert_array_equal(preprocess(photo, draws, "it"), preprocess(photo, draws.copy(), "it"))


def test_the_shorter_side_takes_every_length_in_its_range():
    preprocess, photo = Preprocess((8, 8), "crop", (37, 53), 31), Image.effect_noise((64, 48), 90).convert("RGB")
    seen = []
    photo.resize = lambda size, resample, box: seen.append(box) or Image.Image.resize(photo, size, resample, box=box)
    for draw in np.linspace(0, 1, 500, endpoint=False):
        preprocess(photo, np.array([draw, 0.5, 0.5]), "it")
    shorter = {round(31 * 48 / (bottom - top)) for _, top, _, bottom in seen}
    assert shorter == set(range(37, 54))


@pytest.mark.parametrize("shape", [(1, 1), (1, 5000), (5000, 1)])
def test_the_smallest_and_the_thinnest_images_are_brought_to_size(shape):
    photo = Image.new("RGB", shape, (10, 20, 30))
    for kind, draws in (("shrink", None), ("crop", None), ("crop", np.array([0.9, 0.9, 0.9]))):
        found = Preprocess((32, 24), kind)(photo, draws, "it")
        np.testing.assert_array_equal(found, np.full((32, 24, 3), (10, 20, 30)))


class Seen(Exception):
    """Ends a command as soon as it has read its picture."""


@pytest.mark.parametrize("filter", ["nearest", "box"])
def test_a_picture_to_complete_is_resized_by_the_filter_of_the_run(tmp_path, monkeypatch, filter):
    path = write_run(tmp_path / "run", "", steps=(2,), depth=1)  # 4 x 5 pixels, grey
    config = json.loads((path / "config.json").read_text())
    config["data"]["filter"] = filter
    (path / "config.json").write_text(json.dumps(config))
    photo = Image.effect_noise((25, 20), 90).convert("RGB")
    photo.save(tmp_path / "photo.png")
    expected = np.asarray(photo.resize((5, 4), FILTERS[filter]))

    def stop(_, images, *__):
        np.testing.assert_array_equal(images, expected[None])
        raise Seen

    run = igpt.load(path)
    np.testing.assert_array_equal(run.prepared(photo, "shrink"), expected[None])
    np.testing.assert_array_equal(Answers(run, train_images=1).picture(encode_image(photo)), expected)
    monkeypatch.setattr(sample, "complete_images", stop)
    with pytest.raises(Seen):
        run_igpt(["sample", f"--model={path}", f"--complete={tmp_path}/photo.png", f"--out={tmp_path}/a.png"])
