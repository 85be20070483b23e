import os
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from igpt.data import sources
from igpt.data.examples import check_labels
from igpt.data.folder import list_images, printable, split_named
from igpt.errors import UserError
from tests.helpers import load_source, reading_settings, splits_of


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
    assert source.tokenizer is None and source.train.labels.dtype == np.int32
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
    paths, labels, *_ = list_images(photos)
    assert len(paths) == 22 and dict(zip(paths, labels, strict=True))[str(photos / "bee/deep/down/a.png")] == 1


@pytest.mark.parametrize("ending", ["PNG", "JpG", "jfif", "jpe", "TIF", "tiff"])
def test_endings_count_in_any_case(photos, ending):
    save(photos / "ant" / "a.png", 99)
    (photos / "ant" / "a.png").rename(photos / "ant" / f"a.{ending}")
    source = load_source(f"folder:{photos}")
    assert 99 in [image[0, 0, 0] for split in splits_of(source) for image in split.images[:]]


def test_nothing_is_said_where_every_file_is_read(photos, capsys):
    assert len(list_images(photos).paths) == 21 and not capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("ant/._00.png", "hidden"),  # macOS writes these beside pictures on foreign disks
        (".cache/d.png", "hidden"),
        ("bee/.ipynb_checkpoints/e.png", "hidden"),
        ("ant/@eaDir/00.png/SYNOPHOTO_THUMB_M.jpg", "of the system or thumbnails"),
        ("bee/#recycle/x.png", "of the system or thumbnails"),
        ("__MACOSX/ant/x.png", "of the system or thumbnails"),
        ("$RECYCLE.BIN/x.png", "of the system or thumbnails"),
    ],
)
def test_copies_and_thumbnails_are_passed_over_and_named(photos, capsys, name, kind):
    save(photos / name)
    listing = list_images(photos)
    assert len(listing.paths) == 21 and listing.class_names == ("ant", "bee", "cat")
    shown = "/".join(name.split("/")[: 2 if name[0].islower() else 1])
    assert capsys.readouterr().out == f"{photos}: passed over 1 {kind} (such as {shown})\n"


def test_everything_passed_over_is_counted_in_one_message(photos, capsys, tmp_path):
    (photos / "readme.txt").write_text("")
    (photos / "ant" / ".DS_Store").write_text("")
    (photos / "ant" / "labels.csv").write_text("")
    (photos / "ant" / "photo.heic").write_text("")
    save(tmp_path / "elsewhere" / "a.png")
    (photos / "bee" / "more").symlink_to(tmp_path / "elsewhere")
    assert len(list_images(photos).paths) == 21
    found = capsys.readouterr().out
    assert found.count("\n") == 1 and "passed over 3 no pictures by name (such as readme.txt)" in found
    assert "1 hidden (such as ant/.DS_Store)" in found and "1 linked inside of a class (such as bee/more)" in found


def test_a_linked_class_is_a_class(photos, tmp_path):
    save(tmp_path / "elsewhere" / "a.png")
    (photos / "dog").symlink_to(tmp_path / "elsewhere")
    assert list_images(photos).labels.max() == 3


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


def save_classes(folder, **counts):
    for name, count in counts.items():
        for i in range(count):
            save(folder / name / f"{i:02d}.png")


def names_in(split):
    """class name/file name of every picture of a split, and its label."""
    paths = [Path(split.images.files.paths[i]) for i in split.images.indices]
    return [f"{path.parent.name}/{path.name}" for path in paths], split.labels


@pytest.mark.parametrize(
    ("name", "split"),
    [
        *[
            (name, "train")
            for name in ("train", "TRAIN", "training", "train2017", "training_set", "seg_train", "trainA")
        ],
        *[(name, "validation") for name in ("val", "valid", "Validation", "val-2", "valid_images")],
        *[(name, "test") for name in ("test", "testing", "test1", "Test Images", "test_set")],
        *[(name, None) for name in ("trainer", "valley", "tester", "contest", "steam train", "value", "attest")],
    ],
)
def test_the_name_of_a_folder_says_its_split(name, split):
    assert split_named(name) == split


def test_sub_folders_that_name_splits_are_splits(tmp_path, capsys):
    save_classes(tmp_path / "train", ant=7, bee=5)
    save_classes(tmp_path / "val", bee=3)
    save_classes(tmp_path / "test1", ant=2, bee=1)
    source = load_source(f"folder:{tmp_path}")
    assert source.class_names == ("ant", "bee")
    assert [len(split) for split in splits_of(source)] == [12, 3, 3]
    for split in splits_of(source):
        names, labels = names_in(split)
        assert [source.class_names[label] for label in labels] == [name.split("/")[0] for name in names]
    names, labels = names_in(source.validation)
    assert labels.tolist() == [1, 1, 1]
    said = capsys.readouterr().out
    for part in ("train has 12 images for train", "val has 3 images for validation", "test1 has 3 images for test"):
        assert part in said


@pytest.mark.parametrize("names", [("train_1", "train_2"), ("train", "training"), ("train", "train_2", "test")])
def test_several_folders_of_one_split_are_this_split(tmp_path, names):
    save_classes(tmp_path / names[0], ant=7, bee=5)
    save_classes(tmp_path / names[1], bee=3, cat=6)
    if "test" in names:
        save_classes(tmp_path / "test", ant=2)
    source = load_source(f"folder:{tmp_path}")
    assert source.class_names == ("ant", "bee", "cat") and sum(map(len, splits_of(source)[:1])) > 10
    for split in splits_of(source):
        files, labels = names_in(split)
        assert [source.class_names[label] for label in labels] == [name.split("/")[0] for name in files]


def test_a_split_without_a_folder_is_held_out_of_training(tmp_path):
    save_classes(tmp_path / "train", ant=20, bee=20)
    save_classes(tmp_path / "test", ant=3, bee=4)
    source = load_source(f"folder:{tmp_path}")
    assert [len(split) for split in splits_of(source)] == [36, 4, 7]
    (tmp_path / "test").rename(tmp_path / "val")
    source = load_source(f"folder:{tmp_path}")
    assert [len(split) for split in splits_of(source)] == [32, 7, 8]
    (tmp_path / "val").rename(tmp_path.parent / f"{tmp_path.name}-elsewhere")
    assert [len(split) for split in splits_of(load_source(f"folder:{tmp_path}"))] == [28, 4, 8]


def test_splits_may_be_flat_and_then_have_no_labels(tmp_path):
    for name in ("train", "test"):
        for i in range(9):
            save(tmp_path / name / f"{i}.png")
    source = load_source(f"folder:{tmp_path}")
    assert [len(split) for split in splits_of(source)] == [8, 1, 9]
    assert source.class_names is None and source.test.labels is None


def test_test_images_without_classes_are_passed_over_where_others_have_them(tmp_path, capsys):
    save_classes(tmp_path / "train", ant=9, bee=9)
    save(tmp_path / "test1" / "a.png")
    source = load_source(f"folder:{tmp_path}")
    assert [len(split) for split in splits_of(source)] == [12, 2, 4] and source.test.labels is not None
    assert "passed over test1, which has no classes" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("folders", "message"),
    [
        (
            ("train/ant", "test/ant", "test/bee"),
            r"test has classes that the training .*: bee\. .* are ant, bee, .* ant;",
        ),
        (("test1/ant", "test2/ant"), r"are splits, test, and none of them is train; add it, or open"),
        (("train/ant", "test/ant", "dog"), r"name splits \(test, train\), but also other pictures, such as in dog"),
        (("ant/train", "ant/test", "bee"), r"sub-folders of .*/ant name splits \(test, train\).*into the splits"),
        (("data/train", "data/test"), r"name splits.*; open folder:.*/data, or set data\.split_file"),
        (("test/ant", "test/bee"), r"are splits, test, and none of them is train; add it, or open"),
    ],
)
def test_folders_that_mix_classes_and_splits_are_refused(tmp_path, folders, message):
    for name in folders:
        save(tmp_path / "photos" / name / "a.png")
    with pytest.raises(UserError, match=message):
        load_source(f"folder:{tmp_path}/photos")


def test_classes_beside_others_may_be_called_like_a_split(tmp_path):
    save_classes(tmp_path, boat=5, car=5, train=5)
    save_classes(tmp_path, train_2=5)
    source = load_source(f"folder:{tmp_path}")
    assert source.class_names == ("boat", "car", "train", "train_2") and sum(map(len, splits_of(source))) == 20


def test_a_split_file_overrules_folders_that_name_splits(tmp_path):
    save_classes(tmp_path / "photos" / "ant", train=3, test=3)
    source = load_source(f"folder:{tmp_path}/photos", split_file=write_splits(tmp_path / "photos"))
    assert source.class_names == ("ant",) and [len(split) for split in splits_of(source)] == [4, 1, 1]


def test_all_images_can_be_opened_unsplit(photos, tmp_path):
    whole = sources.load_source(reading_settings(f"folder:{photos}"), whole=True)
    assert [len(split) for split in splits_of(whole)] == [0, 0, 21]
    save_classes(tmp_path / "one" / "test", ant=1)
    whole = sources.load_source(reading_settings(f"folder:{tmp_path}/one"), whole=True)
    assert [len(split) for split in splits_of(whole)] == [0, 0, 1] and whole.class_names == ("ant",)


@pytest.mark.parametrize("on_disk", ["NFC", "NFD"])
@pytest.mark.parametrize("in_file", ["NFC", "NFD"])
def test_a_split_file_and_a_disk_may_write_accents_in_two_ways(photos, on_disk, in_file):
    name = unicodedata.normalize(on_disk, "été.png")
    save(photos / unicodedata.normalize(on_disk, "éléphant") / name)
    normalised = write_splits(photos, lambda lines: [unicodedata.normalize(in_file, line) for line in lines])
    source = load_source(f"folder:{photos}", split_file=normalised)
    assert sum(map(len, splits_of(source))) == 22 and source.class_names[-1] == "éléphant"


def test_two_folders_of_one_name_are_refused(photos):
    for form in ("NFC", "NFD"):
        save(photos / unicodedata.normalize(form, "é") / "a.png")
    with pytest.raises(UserError, match="has 2 classes of the name 'é'; rename them"):
        load_source(f"folder:{photos}")


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


def test_a_split_file_takes_names_that_begin_with_a_space(photos):
    (photos / "ant").rename(photos / " ant")
    source = load_source(f"folder:{photos}", split_file=write_splits(photos))
    assert sum(map(len, splits_of(source))) == 21 and source.class_names[0] == " ant"


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
