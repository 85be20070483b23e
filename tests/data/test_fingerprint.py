"""The fingerprint of a source: equal wherever the same images lie, different whatever changes in them."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from igpt.data import fingerprint as module
from igpt.data.fingerprint import differences, file_splits, fingerprint
from igpt.data.prepare import prepare
from igpt.palette import Palette
from tests.helpers import GREY_PALETTE, load_source, prepare_settings, reading_settings


@pytest.fixture
def photos(tmp_path):
    for name, count in (("ant", 7), ("bee", 9), ("cat", 5)):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", (8, 8), (i, 0, 0)).save(tmp_path / "photos" / name / f"{i:02d}.png")
    return tmp_path / "photos"


def of(folder):
    source = load_source(f"folder:{folder}")
    return json.loads(json.dumps(fingerprint(source))), file_splits(source)


def changes(there, here):
    return "\n".join(differences(there[0], here[0], there[1], here[1]))


def test_a_folder_that_was_moved_is_the_same(photos, tmp_path, monkeypatch):
    there = of(photos)
    assert sum(split["images"] for split in there[0]["splits"].values()) == 21 == len(there[0]["sizes"])
    shutil.move(photos, tmp_path / "elsewhere")
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert of(tmp_path / "elsewhere") == of(".") == of("../elsewhere/") == there and changes(there, of(".")) == ""


def test_an_added_picture_and_what_it_does_to_the_split_are_named(photos):
    there = of(photos)
    shutil.copy(photos / "bee" / "00.png", photos / "bee" / "new.png")
    here = of(photos)
    said = changes(there, here)
    moved = [file for file in there[1] if there[1][file] != here[1][file]]
    learned = sum(here[1][file] == "train" for file in moved)
    assert learned > 0
    assert said.splitlines() == [
        "1 file added: bee/new.png",
        f"{len(moved)} old files in another split; {learned} of them were held out, and would be learned. A random "
        "split is drawn anew when the number of files changes",
    ]


def test_a_new_class_and_removed_files_are_named(photos):
    there = of(photos)
    shutil.copytree(photos / "cat", photos / "ape")
    for i in range(5):
        (photos / "bee" / f"{i:02d}.png").unlink()
    said = changes(there, of(photos))
    assert "5 files added: ape/00.png, ape/01.png, ape/02.png, ..." in said and "5 files removed: bee/00.png" in said
    assert "1 folder new: ape, so labels may have other numbers" in said


def test_a_picture_of_another_size_and_a_renamed_one_are_named(photos):
    there = of(photos)
    Image.effect_noise((8, 8), 50).save(photos / "ant" / "03.png")
    assert changes(there, of(photos)) == "1 file of another size: ant/03.png"
    (photos / "ant" / "04.png").rename(photos / "ant" / "0400.png")
    assert "1 file removed: ant/04.png" in changes(there, of(photos))


def test_another_split_of_the_same_files_is_another_source(photos):
    there, source = of(photos), load_source(f"folder:{photos}", split_seed=1)
    said = differences(there[0], fingerprint(source), there[1], file_splits(source))
    assert len(said) == 1 and "old files in another split" in said[0] and "drawn anew" not in said[0]


def test_only_some_sizes_are_looked_up_in_a_large_folder(photos, monkeypatch):
    monkeypatch.setattr(module, "SIZED", 5)
    there = of(photos)
    assert 3 <= len(there[0]["sizes"]) <= 6
    (photos / "ant" / "new.png").write_bytes((photos / "ant" / "00.png").read_bytes())
    assert "size" not in changes(there, of(photos))


@pytest.mark.parametrize("preprocess", ["none", "shrink"], ids=["as they are", "resized"])
def test_arrays_are_known_by_their_bytes(write_npz, tmp_path, preprocess):
    images, labels = np.random.default_rng(0).integers(0, 256, (40, 9, 9, 3), np.uint8), np.arange(40) % 3
    size = (9, 9) if preprocess == "none" else (8, 8)

    def read(**arrays):
        return fingerprint(load_source(f"npz:{write_npz(**arrays)}", image_size=size, preprocess=preprocess))

    there = read(images=images, labels=labels)
    assert read(images=images.copy(), labels=labels) == there and differences(there, there, {}, {}) == []
    other, fewer = images.copy(), read(images=images[:-1], labels=labels[:-1])
    other[7, 2, 3, 1] ^= 1
    [said] = differences(there, read(images=other, labels=labels), {}, {})
    assert said.endswith(": other images, or another split")
    assert "train: other labels" in differences(there, read(images=images, labels=labels + 1), {}, {})
    assert "train: 28 images there, 27 here" in differences(there, fewer, {}, {})


def test_prepared_tokens_are_known_by_labels_and_sampled_rows(write_npz, tmp_path):
    rng, prints = np.random.default_rng(0), {}
    images, labels = rng.integers(0, 256, (61, 7, 5, 3), np.uint8), np.arange(61, dtype=np.int32) % 3
    GREY_PALETTE.save(tmp_path / "palette.npy")
    other = Palette(GREY_PALETTE.centers * 0.9)
    other.save(tmp_path / "other.npy")
    for name, some, palette in (
        ("one", images, "palette.npy"),
        ("images", 255 - images, "palette.npy"),
        ("palette", images, "other.npy"),
    ):
        settings = prepare_settings(f"npz:{write_npz(images=some, labels=labels)}")
        prepare(settings, str(tmp_path / palette), str(tmp_path / name), shard_images=16)
        prints[name] = fingerprint(load_source(f"tokens:{tmp_path / name}"))
    shutil.move(tmp_path / "one", tmp_path / "moved")
    assert fingerprint(load_source(f"tokens:{tmp_path / 'moved'}")) == prints["one"]
    for name in ("images", "palette"):
        assert "train: other images, or another split" in differences(prints["one"], prints[name], {}, {})


def test_another_kind_of_source_is_named(photos):
    digits = fingerprint(load_source(**reading_settings("digits", channels=1)))
    there = of(photos)
    assert differences(there[0], digits, there[1], {}) == ["the source was of the kind folder, and is digits"]
