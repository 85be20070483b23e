import io
import threading

import numpy as np
import pytest
from PIL import Image

from igpt.data.batches import EpochOrder
from igpt.data.examples import (
    ArrayImages,
    DecodedTokens,
    EncodedImages,
    Source,
    Split,
    check_classes,
    check_labels,
    few_labels,
)
from igpt.data.images import Preprocess
from igpt.errors import UserError
from igpt.palette import Palette

BAD = {3, 4, 11, 22}


def picture(level, size=(9, 7)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, (level, 0, 0)).save(file, "PNG")
    return file.getvalue()


def encoded_images(bad=BAD, count=23, skip=False, kind="shrink"):
    """Pictures whose red is their index; those in `bad` are damaged."""
    files = [(b"damaged" if i in bad else picture(i), f"photo {i}") for i in range(count)]
    return EncodedImages(files, Preprocess((4, 5), kind), skip=skip)


def places(images) -> list[int]:
    return images[:, 0, 0, 0].tolist()


@pytest.mark.parametrize("in_memory", [False, True])
def test_images_are_indexed_like_an_array(in_memory):
    whole = np.asarray(encoded_images(bad=()))
    images = ArrayImages(whole) if in_memory else encoded_images(bad=())
    assert images.shape == whole.shape == (23, 4, 5, 3) and images.dtype == whole.dtype == np.uint8
    for index in (4, -1, np.int64(2), slice(3, 20, 4), slice(None), np.array([7, 0, 7]), [5], np.array([], int)):
        np.testing.assert_array_equal(images[index], whole[index])
    for index in ((..., slice(1)), (slice(2, 5), 0), (3, ..., 1)):
        np.testing.assert_array_equal(images[index], whole[index])


def test_an_unreadable_image_stops_and_is_named():
    images = encoded_images()
    with pytest.raises(UserError, match=r"photo 3 cannot be read as an image.* data\.on_unreadable=skip passes over"):
        images.read(np.array([0, 3, 1]))
    assert places(images[[0, 1, 2, 5]]) == [0, 1, 2, 5] and not images.unreadable


def test_an_unreadable_image_is_replaced_by_the_next_one_that_can_be_read():
    images = encoded_images(skip=True)
    found, used = images.read(np.array([2, 3, 4, 5, 22, 3]))
    assert used.tolist() == places(found) == [2, 5, 5, 5, 0, 5]
    assert images.unreadable.keys() == {3, 4, 22} and "photo 22" in images.unreadable[22]
    images.read(np.arange(23))
    assert images.unreadable.keys() == BAD  # each counted once
    assert all(f"photo {i} " in text for i, text in images.unreadable.items())


def test_what_replaces_an_image_does_not_depend_on_what_was_read_before():
    fresh, used_up = encoded_images(skip=True), encoded_images(skip=True)
    used_up.read(np.arange(23)[::-1])
    draws = np.random.default_rng(0).random((23, 3))
    for ours, theirs in zip(fresh.read(np.arange(23), draws), used_up.read(np.arange(23), draws), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_an_index_from_the_end_is_the_same_image():
    images = encoded_images(skip=True)
    assert images.read(np.array([-1, -23]))[1].tolist() == [0, 0] and images.unreadable.keys() == {22}


def test_an_image_is_decoded_again_and_again_but_a_bad_one_only_once():
    class Counting(list):
        opened = []

        def __getitem__(self, index):
            self.opened.append(index)
            return super().__getitem__(index)

    images = encoded_images(skip=True)
    images.files = Counting(images.files)
    for _ in range(3):
        images.read(np.arange(23))
    assert [Counting.opened.count(i) for i in (3, 11)] == [1, 1] and Counting.opened.count(5) == 9


@pytest.mark.parametrize("kind", ["shrink", "none"])
def test_where_nothing_can_be_read_the_first_reason_is_given(kind):
    bad = range(23) if kind == "shrink" else ()  # no image has the configured size
    reason = "photo 0 cannot be read" if kind == "shrink" else "photo 0 has 7 x 9 pixels.*set data.preprocess"
    with pytest.raises(UserError, match=f"none of 23 images can be read; the first: {reason}"):
        encoded_images(bad, skip=True, kind=kind).read(np.array([7]))


def test_random_crops_depend_on_their_draws_alone():
    noise = np.random.default_rng(0).integers(0, 256, (31, 37, 3), np.uint8)
    images = EncodedImages([(noise, "noise")] * 2, Preprocess((8, 8), "crop", (20, 30), 16))
    draws = np.array([[0.1, 0.2, 0.3], [0.1, 0.2, 0.3], [0.9, 0.8, 0.7]])
    one, same, other = images.read(np.array([0, 1, 0]), draws)[0]
    np.testing.assert_array_equal(one, same)
    assert (one != other).mean() > 0.5
    np.testing.assert_array_equal(images[0], images[1])  # the centre


def test_threads_count_each_bad_image_once_while_others_look():
    images = encoded_images(bad=set(range(0, 400, 2)), count=400, skip=True)
    source = Source("photos", *[Split(images, None)] * 3, channels=3)
    failures = []

    def read(order):
        try:
            for i in order:
                images.read(np.array([i]))
                source.unreadable  # noqa: B018
        except Exception as error:
            failures.append(error)

    orders = [np.random.default_rng(i).permutation(400) for i in range(6)]
    threads = [threading.Thread(target=read, args=(order,)) for order in orders]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures and images.unreadable.keys() == set(range(0, 400, 2))
    assert source.unreadable[:200] == [images.unreadable[i] for i in range(0, 400, 2)]


def test_few_labels_are_equally_many_of_each_class_and_part_of_larger_sets():
    labels = np.random.default_rng(0).choice([-3, 0, 7], 500, p=[0.2, 0.5, 0.3])
    larger = few_labels(labels, 25, seed=1)
    for per_class in (1, 4, 25):
        chosen = few_labels(labels, per_class, seed=1)
        assert {label: (labels[chosen] == label).sum() for label in (-3, 0, 7)} == dict.fromkeys((-3, 0, 7), per_class)
        assert set(chosen) <= set(larger) and list(chosen) == sorted(set(chosen))
    np.testing.assert_array_equal(larger, few_labels(labels, 25, seed=1))
    assert len(set(larger) & set(few_labels(labels, 25, seed=2))) < 40
    scarce = int((labels == -3).sum())
    with pytest.raises(UserError, match=f"class -3 has only {scarce} training examples; choose {scarce} or fewer"):
        few_labels(labels, scarce + 1, seed=1)


def test_examples_are_taken_in_order_wherever_they_are_stored():
    indices, labels = np.array([7, 0, 22, 3]), np.arange(23, dtype=np.int32)
    encoded = encoded_images(bad=(), skip=True)
    greys = Palette(np.repeat(np.arange(256)[:, None] / 127.5 - 1, 3, axis=1))
    tokens = DecodedTokens(np.arange(23)[:, None].repeat(20, axis=1), greys, "tokens.npy", (4, 5))
    for images in (ArrayImages(np.asarray(encoded)), encoded, tokens):
        taken = Split(images, labels).take(indices)
        assert type(taken.images) is type(images) and len(taken) == 4
        np.testing.assert_array_equal(taken.labels, indices)
        np.testing.assert_array_equal(np.asarray(taken.images)[:, 0, 0, 0], indices)
        np.testing.assert_array_equal(taken.read(np.array([2, 0]))[0], np.asarray(images)[[22, 7]])
        assert Split(images, None).take(indices).labels is None
    np.testing.assert_array_equal(tokens.grids(indices), Split(tokens, None).take(indices).images.grids(slice(None)))


def test_some_examples_are_the_same_random_ones_in_their_order():
    split = labelled_split(*range(500))
    chosen = split.some(40).labels
    np.testing.assert_array_equal(chosen, split.some(40).labels)
    assert len(set(chosen)) == 40 and list(chosen) == sorted(chosen) and np.ptp(chosen) > 400
    assert set(chosen) < set(split.some(41).labels)


def test_some_examples_are_not_the_first_that_a_run_learns():
    chosen, order = labelled_split(*range(500)).some(40).labels, EpochOrder(500, seed=0)[np.arange(40)]
    assert len(set(chosen) & set(order)) < 20


def test_what_is_taken_of_encoded_images_is_read_as_they_are():
    taken = Split(encoded_images(skip=True), None).take(np.array([2, 3, 5])).images
    assert taken.read(np.arange(3))[1].tolist() == [0, 2, 2] and "photo 3" in taken.unreadable[1]
    with pytest.raises(UserError, match="photo 3"):
        Split(encoded_images(), None).take(np.array([2, 3, 5])).images.read(np.arange(3))


def blank(count):
    return ArrayImages(np.zeros((count, 4, 5, 3), np.uint8))


def labelled_split(*labels):
    return Split(blank(len(labels)), np.array(labels, np.int32))


def test_a_test_split_of_one_class_has_classes_a_model_knows():
    check_classes([labelled_split(1, 1)], num_classes=2)
    with pytest.raises(UserError, match="from 2 to 2, but model.num_classes is 2"):
        check_classes([labelled_split(2, 2)], num_classes=2)


def test_labels_that_do_not_serve_are_refused():
    check_labels(labelled_split(0, 1), labelled_split(1), num_classes=2)
    check_labels(labelled_split(-5, 70))
    check_labels(labelled_split(-1, 1))
    for splits, classes, message in (
        ((Split(blank(2), None),), 0, "labels are needed, and this source has none; add"),
        ((labelled_split(0, 1), Split(blank(2), None)), 2, "labels are needed, and the images of validation have none"),
        ((Split(blank(2), None), labelled_split(1), Split(blank(2), None)), 0, "images of train, test have none; add"),
        ((labelled_split(4, 4), labelled_split(1)), 0, "all training images have the label 4; two classes or more"),
        ((labelled_split(0, 1), labelled_split(2)), 2, "from 0 to 2, but model.num_classes is 2.*num_classes=3"),
        ((labelled_split(1, 2),), 2, "from 1 to 2, .* allows 0 to 1; set model.num_classes=3"),
        ((labelled_split(0, 1), labelled_split(-1)), 2, "from -1 to 1, .* number the classes from 0 on"),
    ):
        with pytest.raises(UserError, match=message):
            check_labels(*splits, num_classes=classes)
