"""Data sets of the datasets library: local files, and a stand-in for the hub."""

import io
import json
import os
import shutil

import datasets
import numpy as np
import pyarrow.parquet
import pytest
from PIL import Image

from igpt.data import hf_stream, prepare
from igpt.data.batches import Augmentation, TrainBatches
from igpt.data.examples import check_labels
from igpt.data.fingerprint import fingerprint
from igpt.data.images import Preprocess, decode
from igpt.data.settings import DataConfig
from igpt.data.sources import load_source
from igpt.errors import UserError
from igpt.files import read_json
from igpt.palette import Palette
from tests.helpers import reading_settings

PNG = b"\x89PNG"
TRAIN, TEST, NAMES = 31, 5, ["ant", "bee", "cat"]
PALETTE = Palette(np.random.default_rng(3).uniform(-1, 1, (17, 3)).astype(np.float32))


def encoded(number: int) -> bytes:
    """PNG and JPEG in turn, each of another size, grey and transparent ones among them."""
    rng, file = np.random.default_rng(number), io.BytesIO()
    mode = ("RGB", "RGB", "RGBA", "L")[number % 4]
    shape = (8 + number % 5, 9 + number % 7, *((len(mode),) if len(mode) > 1 else ()))
    Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).save(file, "JPEG" if number % 4 == 1 else "PNG")
    return file.getvalue()


def table(numbers, image="image", label="label", kind=None):
    """A data set of the library; a label is its number modulo 3."""
    kind = kind or datasets.ClassLabel(names=NAMES)
    features = datasets.Features({image: datasets.Image(), label: kind, "note": datasets.Value("string")})
    columns = {image: [{"bytes": encoded(i), "path": f"{i}.png"} for i in numbers], "note": ["aside" for _ in numbers]}
    labels = [i % 3 if kind.dtype != "string" else NAMES[i % 3] for i in numbers]
    return datasets.Dataset.from_dict(columns | {label: labels}, features=features)


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """The same images as parquet, as Arrow files, as saved by the library, and as a folder of pictures."""
    root = tmp_path_factory.mktemp("hf")
    train, test = table(range(TRAIN)), table(range(TRAIN, TRAIN + TEST))
    datasets.disable_progress_bars()
    for split, part in (("train", train), ("test", test)):
        (root / "parquet" / "data").mkdir(parents=True, exist_ok=True)
        part.to_parquet(root / "parquet" / "data" / f"{split}-00000-of-00001.parquet", batch_size=7)
        for i, row in enumerate(part.cast_column("image", datasets.Image(decode=False))):
            folder = root / "pictures" / split / NAMES[row["label"]]
            folder.mkdir(parents=True, exist_ok=True)
            content = row["image"]["bytes"]
            (folder / f"{i:03d}{'.png' if content.startswith(PNG) else '.jpg'}").write_bytes(content)
    datasets.DatasetDict(train=train, test=test).save_to_disk(root / "saved")
    return root


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """The library's cache in a folder of the tests."""
    folder = tmp_path_factory.getbasetemp() / "hf-cache"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "datasets")
    monkeypatch.setattr(datasets.config, "HF_CACHE_HOME", str(folder))


def opened(place, whole=False, **fields):
    fields = dict(image_size=(7, 5), preprocess="shrink", validation_fraction=0.2, split_seed=4) | fields
    return load_source(reading_settings(f"hf:{place}", **fields), whole)


def theirs(part, row):
    """An image as the library decodes it, as RGB on white, brought to the model's size."""
    image = part[row]["image"]
    if image.mode == "RGBA":
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return Preprocess((7, 5), "shrink")(image.convert("RGB"), None, "")


@pytest.mark.parametrize("kind", ["parquet", "saved", "pictures", "parquet/data/train-00000-of-00001.parquet"])
def test_the_library_reads_what_we_read_image_by_image(places, kind):
    source = opened(places / kind)
    assert source.class_names == tuple(NAMES)
    data = datasets.load_from_disk(places / kind) if kind == "saved" else None
    how = ("parquet", dict(data_files=str(places / kind))) if kind.endswith("parquet") and "/" in kind else None
    data = data or (datasets.load_dataset(how[0], **how[1]) if how else datasets.load_dataset(str(places / kind)))
    count = len(data["train"])
    numbers = np.concatenate([source.train.images.indices, source.validation.images.indices])
    own_test = "test" in data
    assert sorted(numbers) == list(range(count)) if own_test else len(numbers) < count
    for split in (source.train, source.validation, source.test):
        images, used = split.read(np.arange(len(split)))
        assert np.array_equal(used, np.arange(len(split)))
        for image, label, number in zip(images, split.labels, split.images.indices, strict=True):
            part, row = (data["test"], number - count) if number >= count else (data["train"], number)
            assert np.abs(image.astype(int) - theirs(part, int(row))).max() <= 1  # the blend with white may round up
            assert label == part[int(row)]["label"]


def test_batches_equal_those_of_the_same_pictures_in_a_folder(places):
    """A folder sorts its files as the library does, so that even the order of the batches agrees."""
    folder = load_source(
        reading_settings(f"folder:{places}/pictures", image_size=(7, 5), preprocess="shrink", split_seed=4)
        | {"validation_fraction": 0.2}
    )
    source = opened(places / "pictures")
    made = [
        TrainBatches(train, PALETTE, 5, 0, Augmentation(pad=1, flip=True), slice(None)).iterate(0, 4, threads=3)
        for train in (source.train, folder.train)
    ]
    for ours, other in zip(*made, strict=True):
        assert np.array_equal(ours["tokens"], other["tokens"]) and np.array_equal(ours["label"], other["label"])


def test_validation_is_held_out_by_the_split_seed_and_all_images_can_be_test_images(places):
    source = opened(places / "parquet")
    order = np.random.default_rng(4).permutation(TRAIN)
    assert np.array_equal(source.train.images.indices, order[:25])
    assert np.array_equal(source.validation.images.indices, order[25:])
    assert len(opened(places / "parquet", whole=True).test) == TRAIN + TEST


def test_columns_are_those_of_the_training_split_and_not_of_the_first(tmp_path):
    parts = {"extra": table(range(4)).remove_columns("label"), "train": table(range(12))}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "saved")
    source = opened(tmp_path / "saved", test_fraction=0.1)
    assert source.class_names == tuple(NAMES) and source.train.labels is not None


def splits_of(tmp_path, capsys, **parts):
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "saved")
    source = opened(tmp_path / "saved", test_fraction=0.1)
    return [len(part) for part in source.splits().values()], capsys.readouterr().out


def test_splits_of_its_own_are_used_and_others_named(tmp_path, capsys):
    found, printed = splits_of(
        tmp_path, capsys, train=table(range(20)), valid=table(range(4)), test=table(range(3)), extra=table(range(5))
    )
    assert found == [20, 4, 3] and "passed over the splits extra" in printed


def test_without_labelled_test_images_the_validation_split_is_the_test(tmp_path, capsys):
    unlabelled = table(range(7)).cast_column("label", datasets.Value("int64")).map(lambda row: {"label": -1})
    unlabelled = unlabelled.cast_column("label", datasets.ClassLabel(names=NAMES))
    found, printed = splits_of(tmp_path, capsys, train=table(range(20)), validation=table(range(4)), test=unlabelled)
    assert found == [16, 4, 4] and "passed over the splits test" in printed


def test_one_split_of_any_name_is_divided_by_the_fractions(tmp_path, capsys):
    found, _ = splits_of(tmp_path, capsys, full=table(range(20)))
    assert found == [14, 4, 2]


@pytest.mark.parametrize(
    ("kind", "names"),
    [(datasets.Value("string"), ("ant", "bee", "cat")), (datasets.Value("uint8"), None)],
    ids=["text", "numbers"],
)
def test_labels_may_be_text_or_plain_numbers(tmp_path, kind, names):
    table(range(12), kind=kind).save_to_disk(tmp_path / "saved")
    source = opened(tmp_path / "saved")
    assert source.class_names == names
    assert np.array_equal(source.train.labels, source.train.images.indices % 3)
    check_labels(source.train, num_classes=3)


def test_columns_are_found_by_their_kind_or_named(tmp_path):
    named = table(range(12), image="img", label="fine")
    named.save_to_disk(tmp_path / "one")
    assert opened(tmp_path / "one").class_names == tuple(NAMES)
    assert opened(f"{tmp_path / 'one'},label=").train.labels is None
    two = named.add_column("coarse", [0] * 12).cast_column("coarse", datasets.ClassLabel(names=["beast"]))
    two.save_to_disk(tmp_path / "two")
    assert opened(f"{tmp_path / 'two'},label=coarse").class_names == ("beast",)
    for given, message in (
        ("two", "has several columns of labels: fine, coarse; choose one, as hf:NAME,label=fine"),
        ("two,label=note2", "the column 'note2' is missing; name another"),
        ("one,image=note", "has no column of images; it has .*note \\(Value\\).*hf:NAME,image=COLUMN"),
        ("two,labels=fine", "has the option 'labels'; there are config, revision, image, label"),
        ("absent", "cannot be opened: .*give a data set of the hub"),
    ):
        with pytest.raises(UserError, match=message):
            opened(tmp_path / given)


def saved_with(tmp_path, *values):
    """A data set of one good image, and then images of these contents."""
    features = datasets.Features({"image": datasets.Image()})
    images = [{"bytes": encoded(0), "path": None}, *values]
    datasets.Dataset.from_dict({"image": images}, features=features).save_to_disk(tmp_path / "saved")
    return tmp_path / "saved"


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"bytes": b"no image", "path": "a.png"}, r"train row 1 \(a.png\) cannot be read as an image: it is no PNG"),
        ({"bytes": encoded(2)[:60], "path": None}, "train row 1 cannot be read as an image"),
        ({"bytes": b"%!PS-Adobe", "path": "a.eps"}, r"\(a.eps\) cannot be read as an image: it is no PNG, JPEG"),
        (None, "train row 1 has no image"),
    ],
    ids=["text", "cut short", "another format", "nothing"],
)
def test_bad_images_are_refused_by_name_or_skipped(tmp_path, value, message):
    place = saved_with(tmp_path, value, {"bytes": encoded(3), "path": None})
    fields = dict(validation_fraction=0.34, test_fraction=0.33)
    images = opened(place, whole=True, **fields).test
    with pytest.raises(UserError, match=message):
        images.read(np.arange(3))
    skipping = opened(place, whole=True, on_unreadable="skip", **fields).test
    _, used = skipping.read(np.arange(3))
    assert used.tolist() == [0, 2, 2] and list(skipping.images.unreadable) == [1]


def test_images_are_decoded_with_our_limits_and_never_by_the_library(places, monkeypatch):
    def fail(*_, **__):
        raise AssertionError("the library decoded an image")

    monkeypatch.setattr(datasets.Image, "decode_example", fail)
    monkeypatch.setattr("igpt.data.images.MAX_BYTES", 100)
    with pytest.raises(UserError, match=r"train row \d+ .* bytes; the limit is 100"):
        opened(places / "saved").train.read(np.arange(3))


def test_a_data_set_cannot_name_files_of_the_machine(tmp_path):
    (tmp_path / "private.png").write_bytes(encoded(1))
    features = datasets.Features({"image": datasets.Image()})
    rows = datasets.Dataset.from_dict({"image": [str(tmp_path / "private.png")] * 4}, features=features)
    (tmp_path / "data").mkdir()
    raw = rows.with_format("arrow")[:]
    pyarrow.parquet.write_table(raw, tmp_path / "data" / "train.parquet")
    with pytest.raises(UserError, match=r"row \d is the file .*private.png, which is not in the data set's folder"):
        opened(tmp_path / "data", whole=True).test.read(np.arange(1))


def test_the_fingerprint_knows_the_images_wherever_they_lie(places, tmp_path):
    shutil.copytree(places / "parquet", tmp_path / "moved")
    one, moved = fingerprint(opened(places / "parquet")), fingerprint(opened(tmp_path / "moved"))
    assert json.dumps(one) == json.dumps(moved)
    table(range(1, TRAIN + 1)).to_parquet(tmp_path / "moved" / "data" / "train-00000-of-00001.parquet")
    os.utime(tmp_path / "moved" / "data" / "train-00000-of-00001.parquet", (1, 1))
    assert fingerprint(opened(tmp_path / "moved"))["splits"] != one["splits"]


def test_a_folder_of_pictures_is_the_same_in_another_place_and_behind_a_link(places, tmp_path):
    shutil.copytree(places / "pictures", tmp_path / "moved")
    (tmp_path / "link").symlink_to(places / "pictures")
    one, *others = (opened(place) for place in (places / "pictures", tmp_path / "moved", tmp_path / "link"))
    for other in others:
        assert json.dumps(fingerprint(one)) == json.dumps(fingerprint(other))
        np.testing.assert_array_equal(one.train.images[:3], other.train.images[:3])


def test_decoding_agrees_with_files_on_disk(places):
    content, name = opened(places / "parquet").train.images.files[0]
    assert name.endswith("train row 0 (0.png)") and decode(content, name).size == (9, 8)


# Streams


def prepared(place, palette, out, stream, **fields):
    settings = reading_settings(f"hf:{place}", image_size=(7, 5), preprocess="shrink", **fields)
    return prepare.prepare(settings, str(palette), str(out), shard_images=7, workers=1 + stream, stream=stream)


def contents(folder):
    """The files of a prepared directory; of the plan what does not depend on how it was made."""
    found = {path.name: path.read_bytes() for path in folder.iterdir()}
    return found | {"prepared.json": json.loads(found["prepared.json"]) | {"images_sha256": None, "stream": None}}


@pytest.mark.parametrize("kind", ["parquet", "pictures"])
def test_a_stream_is_prepared_to_the_same_files_as_without_streaming(places, palette, tmp_path, kind):
    counts = [prepared(places / kind, palette, tmp_path / str(stream), stream) for stream in (False, True)]
    assert counts[0] == counts[1]
    assert contents(tmp_path / "False") == contents(tmp_path / "True")


@pytest.mark.parametrize("after", [1, 3, 5])
def test_an_interrupted_stream_continues_with_the_same_bytes(places, palette, tmp_path, monkeypatch, after):
    monkeypatch.setattr(hf_stream, "AT_ONCE", 5)
    monkeypatch.setattr(hf_stream, "SAVE_EVERY", 5)
    prepared(places / "parquet", palette, tmp_path / "whole", stream=True)
    real, calls = Palette.encode, []

    def encode(*args):
        calls.append(args)
        if len(calls) == after + 1:
            raise KeyboardInterrupt
        return real(*args)

    with monkeypatch.context() as cut:
        cut.setattr(Palette, "encode", encode)
        with pytest.raises(KeyboardInterrupt):
            prepared(places / "parquet", palette, tmp_path / "cut", stream=True)
    state = read_json(tmp_path / "cut" / "stream" / "progress.json")
    assert state["done"] == 5 * after
    calls.clear()
    with monkeypatch.context() as counted:
        counted.setattr(Palette, "encode", lambda *args: calls.append(args) or real(*args))
        prepared(places / "parquet", palette, tmp_path / "cut", stream=True)
    assert sum(len(images) for _, images in calls) == TRAIN + TEST - 5 * after
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


def test_shards_of_two_streams_of_one_length_are_not_mixed(places, palette, tmp_path):
    prepared(places / "parquet", palette, tmp_path / "out", stream=True)
    shutil.copytree(places / "parquet", tmp_path / "others")
    with pytest.raises(UserError, match="data.source is"):
        prepared(tmp_path / "others", palette, tmp_path / "out", stream=True)


def test_unreadable_images_of_a_stream_are_refused_by_name_or_skipped_and_listed(palette, tmp_path):
    bad = [{"bytes": b"no image", "path": "bad.png"}, *({"bytes": encoded(i), "path": None} for i in range(8))]
    data = datasets.load_from_disk(saved_with(tmp_path, *bad))
    (tmp_path / "data").mkdir()
    data.to_parquet(tmp_path / "data" / "train.parquet")
    with pytest.raises(UserError, match=r"train row 1 \(bad.png\) .*--on_unreadable=skip passes over"):
        prepared(tmp_path / "data", palette, tmp_path / "stopped", stream=True)
    counts = [
        prepared(tmp_path / "data", palette, tmp_path / str(stream), stream, on_unreadable="skip")
        for stream in (False, True)
    ]
    assert counts[0] == counts[1] and counts[1]["unreadable"] == 1
    assert contents(tmp_path / "False") == contents(tmp_path / "True")


def test_a_reason_that_a_kill_cut_off_is_written_anew(palette, tmp_path, monkeypatch):
    bad = [{"bytes": b"no image", "path": f"bad{i}.png"} for i in range(9)]
    good = [{"bytes": encoded(i), "path": None} for i in range(9)]
    data = datasets.load_from_disk(saved_with(tmp_path, *(one for pair in zip(bad, good, strict=True) for one in pair)))
    (tmp_path / "data").mkdir()
    data.to_parquet(tmp_path / "data" / "train.parquet")
    prepared(tmp_path / "data", palette, tmp_path / "whole", stream=True, on_unreadable="skip")
    monkeypatch.setattr(hf_stream, "AT_ONCE", 4)
    monkeypatch.setattr(hf_stream, "SAVE_EVERY", 4)
    real, saves = hf_stream.Staged._save, []

    def killed(staged, files, progress):
        real(staged, files, progress)
        saves.append(progress["done"])
        if len(saves) == 2:
            files[-1].write("12")  # the beginning of a line
            files[-1].flush()
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(hf_stream.Staged, "_save", killed)
        prepared(tmp_path / "data", palette, tmp_path / "cut", stream=True, on_unreadable="skip")
    prepared(tmp_path / "data", palette, tmp_path / "cut", stream=True, on_unreadable="skip")
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


def test_a_test_split_without_the_column_of_labels_is_passed_over(tmp_path):
    unlabelled = table(range(4)).remove_columns("label")
    datasets.DatasetDict(train=table(range(12)), test=unlabelled).save_to_disk(tmp_path / "saved")
    source = opened(tmp_path / "saved", validation_fraction=0.2, test_fraction=0.2)
    assert source.test.labels is not None and len(source.test) == 2


def test_a_data_set_of_the_hub_is_read_and_streamed(places, palette, hub, tmp_path, monkeypatch):
    state, _ = hub
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", os.environ["HF_ENDPOINT"])
    files = {f"data/{path.name}": path.read_bytes() for path in (places / "parquet" / "data").iterdir()}
    state.add("someone/beasts", files, kind="datasets")
    prepared("someone/beasts", palette, tmp_path / "hub", stream=True)
    prepared(places / "parquet", palette, tmp_path / "local", stream=False)
    assert not [path for path in (tmp_path / "home").rglob("*") if path.is_file() and path.suffix == ".arrow"]
    ours, theirs = contents(tmp_path / "hub"), contents(tmp_path / "local")
    assert {name: ours[name] for name in ours if "tokens" in name} == {n: theirs[n] for n in theirs if "tokens" in n}
    source = opened("someone/beasts")
    assert np.array_equal(source.test.images[:], opened(places / "parquet").test.images[:])


def test_a_hub_that_fails_after_a_stream_was_opened_is_told(places, hub, monkeypatch):
    state, _ = hub
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", os.environ["HF_ENDPOINT"])
    files = {f"data/{path.name}": path.read_bytes() for path in (places / "parquet" / "data").iterdir()}
    state.add("someone/beasts", files, kind="datasets")
    stream = hf_stream.Stream(DataConfig.of(reading_settings("hf:someone/beasts")))
    state.repos.clear()
    with pytest.raises(UserError, match="hf:someone/beasts cannot be opened: .*; give a data set of the hub"):
        stream.fingerprint()


def test_a_repository_of_pictures_is_fetched_and_never_streamed(places, palette, hub, tmp_path, monkeypatch):
    state, _ = hub
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", os.environ["HF_ENDPOINT"])
    root = places / "pictures"
    files = {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}
    state.add("someone/pictures", files, kind="datasets")
    with pytest.raises(UserError, match="cannot be streamed in a fixed order; leave --stream out"):
        prepared("someone/pictures", palette, tmp_path / "streamed", stream=True)
    source, local = opened("someone/pictures"), opened(root)
    assert np.array_equal(source.test.images[:], local.test.images[:])
    assert np.array_equal(source.test.labels, local.test.labels)


def test_streams_say_what_they_cannot_read(places, palette, tmp_path):
    with pytest.raises(UserError, match="is on the disk, as the library saves it; leave --stream out"):
        prepared(places / "saved", palette, tmp_path / "out", stream=True)
    settings = reading_settings(f"folder:{places}/pictures", image_size=(7, 5))
    with pytest.raises(UserError, match="--stream is for hf:NAME, not for folder:.*every source is read in parts"):
        prepare.prepare(settings, str(palette), str(tmp_path / "out"), stream=True)
