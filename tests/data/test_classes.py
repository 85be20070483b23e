"""Class names, and how the labels of two sources meet."""

import dataclasses
import unicodedata

import numpy as np
import pytest

from igpt.data.classes import class_counts, distinct_names, full_names, load_names, save_names, with_classes
from igpt.data.examples import ArrayImages, Source, Split
from igpt.errors import UserError


def source_of(labels, class_names=None):
    """A source whose three splits have 4 images with these labels."""
    split = Split(ArrayImages(np.zeros((4, 2, 3, 3), np.uint8)), None if labels is None else np.array(labels, np.int32))
    return Source("npz:mine", split, split, split, channels=3, class_names=class_names)


def test_labels_meet_by_name_in_any_order():
    source = with_classes(source_of([0, 1, 2, 1], ("cat", "ant", "bee")), ("ant", "bee", "cat"), "runs/model")
    assert source.class_names == ("ant", "bee", "cat")
    for split in source.splits().values():
        assert split.labels.tolist() == [2, 0, 1, 0] and split.labels.dtype == np.int32


def test_a_source_with_some_of_the_classes_keeps_their_numbers():
    source = with_classes(source_of([0, 1, 1, 0], ("bee", "cat")), ("ant", "bee", "cat"), "runs/model")
    assert source.test.labels.tolist() == [1, 2, 2, 1]


def test_an_unknown_class_is_refused_with_both_lists():
    source = source_of([0, 1, 1, 0], ("bee", "dog"))
    message = r"runs/model does not know 1 classes of npz:mine: dog\. It has .* ant, bee, cat; npz:mine has bee, dog\."
    with pytest.raises(UserError, match=message):
        with_classes(source, ("ant", "bee", "cat"), "runs/model")


def test_without_names_on_both_sides_numbers_meet_numbers():
    bare, named = source_of([0, 1, 1, 2]), source_of([0, 1, 1, 2], ("x", "y", "z"))
    for source in (with_classes(bare, ("ant", "bee", "cat"), "m"), with_classes(named, None, "m"), named):
        assert source.test.labels.tolist() == [0, 1, 1, 2]
    assert with_classes(bare, ("ant", "bee", "cat"), "m").class_names == ("ant", "bee", "cat")
    assert with_classes(source_of(None), ("ant", "bee"), "m").test.labels is None


def test_a_missing_label_stays_missing():
    source = with_classes(source_of([-1, 1, 0, -1], ("bee", "ant")), ("ant", "bee"), "runs/model")
    assert source.test.labels.tolist() == [-1, 0, 1, -1]


def test_one_name_in_two_unicode_forms_is_one_class():
    decomposed = unicodedata.normalize("NFD", "café")
    assert decomposed != "café" and distinct_names([decomposed, "tea"], "it") == ("café", "tea")
    with pytest.raises(UserError, match="it has 2 classes of the name 'café'; rename them"):
        distinct_names(["café", decomposed], "it")


def test_classes_without_a_name_are_called_by_number():
    assert full_names(None, 3) == ("0", "1", "2") and full_names(("ant",), 3) == ("ant", "1", "2")
    assert full_names(("ant", "bee", "cat"), 2) == ("ant", "bee")


def test_classes_are_counted_in_one_line_shortened_if_they_are_many():
    assert class_counts(source_of([0, 2, 2, 2], ("ant", "bee", "cat"))) == "3 (ant: 3, bee: 0, cat: 9)"
    assert class_counts(source_of([0, 2, 2, 2])) == "2 (0: 3, 2: 9)" and class_counts(source_of(None)) == ""
    many = class_counts(source_of([0, 1, 1, 29], tuple(f"c{i}" for i in range(30))))
    assert many == "30 (c0: 3, c1: 6, c2: 0, ..., c29: 3; 0 to 6 images each)"


def test_labels_that_are_not_in_memory_are_not_counted():
    class Lazy(list):
        pass

    split = dataclasses.replace(source_of([0, 0, 1, 1]).train, labels=Lazy([0, 0, 1, 1]))
    source = Source("tfds:mine", split, split, split, channels=3, class_names=("ant", "bee"))
    assert class_counts(source) == "ant, bee"


def test_names_are_kept_in_a_file_that_a_person_can_read(tmp_path):
    assert load_names(tmp_path) is None
    save_names(("größe", "猫", 'a "b"'), tmp_path)
    assert load_names(tmp_path) == ("größe", "猫", 'a "b"')
    assert "größe" in (tmp_path / "classes.json").read_text(encoding="utf-8")


DAMAGED = ('{"class_names": "ant"}', '{"class_names": [1, 2]}', "[", '{"class_names": ["a", "a"]}')


@pytest.mark.parametrize("text", DAMAGED)
def test_a_damaged_file_of_names_is_named(tmp_path, text):
    (tmp_path / "classes.json").write_text(text)
    with pytest.raises(UserError, match=r"classes\.json"):
        load_names(tmp_path)
