import os

import numpy as np
import pytest
from PIL import Image

from igpt.data.examples import check_labels
from igpt.data.folder import list_images, printable
from igpt.errors import UserError
from tests.helpers import load_source, splits_of


def save(path, level=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (level, 0, 0)).save(path, {".jpg": "JPEG"}.get(path.suffix.lower(), "PNG"))


@pytest.fixture
def photos(tmp_path):
    """Classes of 7, 9 and 5 pictures, whose red is their index among all."""
    level = 0
    for name, count in (("ant", 7), ("bee", 9), ("cat", 5)):
        for i in range(count):
            save(tmp_path / "photos" / name / f"{i:02d}.png", level)
            level += 1
    return tmp_path / "photos"


def write_splits(photos, change=lambda lines: lines, newline="\n"):
    names = sorted(path.relative_to(photos).as_posix() for path in photos.rglob("*.png"))
    lines = [f"{name},{('train', 'train', 'validation', 'test')[i % 4]}" for i, name in enumerate(names)]
    path = photos.parent / "splits.csv"
    path.write_bytes(os.fsencode(newline.join(change(lines))))
    return str(path)


def test_sub_folders_are_classes_in_the_order_of_their_names(photos):
    source = load_source(f"folder:{photos}")
    assert source.image_size == (8, 8) and source.channels == 3 and [len(s) for s in splits_of(source)] == [15, 2, 4]
    assert source.palette is None and source.train.labels.dtype == np.int32
    seen = []
    for split in splits_of(source):
        place = split.images[:][:, 0, 0, 0]
        np.testing.assert_array_equal(split.labels, np.digitize(place, (7, 16)))
        seen.extend(place)
    np.testing.assert_array_equal(np.sort(seen), np.arange(21))


def test_a_split_seed_chooses_the_split_and_an_order_of_files_does_not(photos, monkeypatch):
    one, other = load_source(f"folder:{photos}"), load_source(f"folder:{photos}", split_seed=1)
    assert not np.array_equal(one.test.images[:], other.test.images[:])
    walk = os.walk
    monkeypatch.setattr(os, "walk", lambda *a, **k: ((w, f, n[::-1]) for w, f, n in walk(*a, **k)))
    again = load_source(f"folder:{photos}")
    for a, b in zip(splits_of(one), splits_of(again), strict=True):
        np.testing.assert_array_equal(a.images[:], b.images[:])
        np.testing.assert_array_equal(a.labels, b.labels)


def test_a_flat_folder_has_no_labels(tmp_path):
    for i in range(11):
        save(tmp_path / f"{i}.png")
    source = load_source(f"folder:{tmp_path}")
    assert [split.labels for split in splits_of(source)] == [None] * 3 and len(source.train) == 8
    with pytest.raises(UserError, match="labels are needed.*a folder into a sub-folder for each class"):
        check_labels(source.train)


def test_pictures_deep_in_a_class_are_of_that_class(photos):
    save(photos / "bee" / "deep" / "down" / "a.png")
    paths, labels = list_images(photos)
    assert len(paths) == 22 and dict(zip(paths, labels, strict=True))[str(photos / "bee/deep/down/a.png")] == 1


def test_endings_count_in_any_case_and_hidden_files_not_at_all(photos, capsys):
    save(photos / "ant" / "a.PNG")
    save(photos / "ant" / "b.JpG")
    for hidden in ("ant/.c.png", ".cache/d.png", "bee/.thumbs/e.png"):
        save(photos / hidden)
    paths, _ = list_images(photos)
    assert len(paths) == 23 and not any("/." in path for path in paths) and not capsys.readouterr().out


def test_files_passed_over_are_counted_in_one_message(photos, capsys, tmp_path):
    (photos / "readme.txt").write_text("")
    (photos / "ant" / "labels.csv").write_text("")
    save(tmp_path / "elsewhere" / "a.png")
    (photos / "bee" / "more").symlink_to(tmp_path / "elsewhere")
    assert len(list_images(photos)[0]) == 21
    assert capsys.readouterr().out.count("\n") == 1
    list_images(photos)
    assert "passed over 3 files that are no pictures by their names, or links to folders" in capsys.readouterr().out


def test_a_linked_class_is_a_class(photos, tmp_path):
    save(tmp_path / "elsewhere" / "a.png")
    (photos / "dog").symlink_to(tmp_path / "elsewhere")
    assert list_images(photos)[1].max() == 3


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: (p / "a.gif").write_bytes(b""), r"has 1 pictures of its own and 21 in sub-folders"),
        (lambda p: (p / "dog").mkdir(), r"has classes without pictures: dog; remove or fill them"),
        (lambda p: (p / "dog.png").mkdir(), r"has classes without pictures: dog\.png;"),
    ],
)
def test_a_folder_that_can_be_read_in_two_ways_is_refused(photos, make, message):
    make(photos)
    with pytest.raises(UserError, match=message):
        load_source(f"folder:{photos}")


def test_folders_that_hold_nothing_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"there is no folder .*absent"):
        load_source(f"folder:{tmp_path}/absent")
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(UserError, match=r"there is no folder .*notes\.txt"):
        load_source(f"folder:{tmp_path}/notes.txt")
    with pytest.raises(UserError, match=r"has no pictures: only files ending in \.png, .* are read"):
        load_source(f"folder:{tmp_path}")
    save(tmp_path / "a.png")
    with pytest.raises(UserError, match="1 images split into 1 for train, 0 for validation"):
        load_source(f"folder:{tmp_path}")


def test_sub_folders_named_like_splits_are_not_taken_for_classes(tmp_path):
    for name in ("train/ant", "train/bee", "val/ant", "val/bee"):
        save(tmp_path / name / "a.png")
    with pytest.raises(UserError, match=r"are train, val, which name splits; .*open folder:.*/train, or"):
        load_source(f"folder:{tmp_path}")
    assert list_images(tmp_path / "train")[1].tolist() == [0, 1]


def test_a_folder_that_may_not_be_listed_is_named(photos, monkeypatch):
    scan = os.scandir

    def guarded(path):
        if str(path).endswith("bee"):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", guarded)
    with pytest.raises(UserError, match=r"bee cannot be listed: Permission denied"):
        list_images(photos)


def test_one_class_trains_and_is_refused_by_the_probe(tmp_path):
    for i in range(11):
        save(tmp_path / "ant" / f"{i}.png")
    source = load_source(f"folder:{tmp_path}")
    assert not source.train.labels.any()
    with pytest.raises(UserError, match="all training images have the label 0; two classes or more are needed"):
        check_labels(*splits_of(source))


def test_names_that_are_no_text_are_read_and_can_be_printed(photos):
    name = os.fsdecode(b"caf\xe9.png")
    save(photos / "ant" / "plain.png", 99)
    (photos / "ant" / "plain.png").rename(photos / "ant" / name)
    (photos / "ant" / "wrong\udcff.png").write_text("no image")
    assert printable(name) == r"caf\xe9.png" and printable("größe.png") == "größe.png"
    source = load_source(f"folder:{photos}", split_file=write_splits(photos), on_unreadable="skip")
    assert 99 in [image[0, 0, 0] for split in splits_of(source) for image in split.images[:]]
    assert r"ant/wrong\xff.png cannot be read as an image" in source.unreadable[0] and source.unreadable[0].encode()


@pytest.mark.parametrize("newline", ["\n", "\r\n", "\n\n"])
def test_a_split_file_decides(photos, newline):
    save(photos / "ant" / "a, b.png")
    splits = write_splits(photos, lambda lines: ["\ufeff" + lines[0].replace(",", " , "), *lines[1:], ""], newline)
    source = load_source(f"folder:{photos}", split_file=splits)
    assert [len(split) for split in splits_of(source)] == [12, 5, 5]
    paths = sorted(path for path in photos.rglob("*.png"))
    images = source.validation.images
    assert [images.files.paths[i] for i in images.indices] == [str(path) for path in paths[2::4]]
    classes = [["ant", "bee", "cat"].index(path.parent.name) for path in paths[2::4]]
    np.testing.assert_array_equal(source.validation.labels, classes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda lines: [*lines, "cat/99.png,test"], r"line 22: there is no picture 'cat/99\.png' in .*'path,split'"),
        (lambda lines: [*lines, lines[3]], r"line 22: 'ant/03\.png' was named before"),
        (lambda lines: ["path,split", *lines], r"line 1: 'split' is no split; train, validation, test are"),
        (lambda lines: [lines[0], "", "ant/01.png", *lines[2:]], r"line 3: 'ant/01\.png' is no split"),
        (lambda lines: lines[:-2], r"has no line for 2 pictures, such as cat/03\.png"),
        (lambda lines: [line.replace("validation", "test") for line in lines], "puts no picture into validation"),
        (lambda lines: [], "has no line for 21 pictures"),
    ],
)
def test_mistakes_of_a_split_file_are_reported_with_their_line(photos, change, message):
    with pytest.raises(UserError, match=rf"splits\.csv.*{message}"):
        load_source(f"folder:{photos}", split_file=write_splits(photos, change))


def test_split_files_that_cannot_be_used_are_named(photos, tmp_path):
    with pytest.raises(UserError, match=r"data\.split_file=.*absent\.csv cannot be read: No such file"):
        load_source(f"folder:{photos}", split_file=f"{tmp_path}/absent.csv")
    with pytest.raises(UserError, match=r"data\.split_file=.* cannot be read: Is a directory"):
        load_source(f"folder:{photos}", split_file=f"{tmp_path}")
    (tmp_path / "image.csv").write_bytes(bytes(range(256)))
    with pytest.raises(UserError, match=r"image\.csv, line 1"):
        load_source(f"folder:{photos}", split_file=f"{tmp_path}/image.csv")
    with pytest.raises(UserError, match=r"data\.split_file is mine\.csv, but only folder:PATH"):
        load_source("digits", split_file="mine.csv")


@pytest.mark.parametrize("policy", ["stop", "skip"])
def test_other_kinds_of_entries_with_a_pictures_name_are_unreadable_images(photos, policy):
    os.mkfifo(photos / "ant" / "pipe.png")
    (photos / "bee" / "dangling.png").symlink_to(photos / "absent.png")
    (photos / "cat" / "folder.png").mkdir()
    source = load_source(f"folder:{photos}", on_unreadable=policy)
    if policy == "stop":
        with pytest.raises(UserError, match=r"(pipe|dangling)\.png.*data\.on_unreadable=skip passes over"):
            [split.images[:] for split in splits_of(source)]
    else:
        everything = [np.arange(len(split)) for split in splits_of(source)]
        used = [split.read(indices)[1] for split, indices in zip(splits_of(source), everything, strict=True)]
        assert sum((one == other).sum() for one, other in zip(used, everything, strict=True)) == 21
        assert len(source.unreadable) == 2 and "dangling" in "".join(source.unreadable)
