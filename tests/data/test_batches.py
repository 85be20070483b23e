import dataclasses
import json
import threading

import jax
import numpy as np
import pytest
from PIL import Image

import eval_probe
import train
from configs import probe_digits
from igpt import errors, palette
from igpt.data.batches import Augmentation, Drops, TrainBatches, eval_batches
from igpt.data.examples import ArrayImages, EncodedImages, Split
from igpt.data.images import Preprocess
from igpt.errors import UserError
from igpt.probe.features import raw_pixels
from tests.helpers import GREY_PALETTE, assert_trees_equal, load_source


def numbered_split(count=23, size=5):
    """Images and labels that are equal to their index."""
    images = np.zeros((count, size, size, 3), np.uint8)
    images[:] = np.arange(count)[:, None, None, None]
    return Split(ArrayImages(images), np.arange(count, dtype=np.int32))


def batches_of(split, rows=slice(None), batch_size=7, seed=3, **augmentation):
    greys = palette.Palette(np.repeat(np.arange(256)[:, None] / 127.5 - 1, 3, axis=1))
    return TrainBatches(split, greys, batch_size, seed, Augmentation(**augmentation), rows)


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
        assert_trees_equal(in_order[step], batches_of(numbered_split(), pad=2)[step])
    assert_trees_equal(next(batches_of(numbered_split(), pad=2).iterate(6, 9)), in_order[6])
    other = batches_of(numbered_split(), pad=2, seed=4)[0]
    assert not np.array_equal(other["label"], in_order[0]["label"])


def test_processes_read_disjoint_rows_of_the_same_augmented_batch():
    images = np.random.default_rng(0).integers(0, 256, (23, 5, 5, 1), np.uint8).repeat(3, axis=-1)
    split = Split(ArrayImages(images), np.arange(23, dtype=np.int32))
    whole = batches_of(split, pad=1, flip=True, probability=0.5)[4]
    parts = [batches_of(split, rows, pad=1, flip=True, probability=0.5)[4] for rows in (slice(0, 3), slice(3, 7))]
    assert_trees_equal(whole, {name: np.concatenate([part[name] for part in parts]) for name in whole})


def test_a_process_touches_only_its_own_images():
    class Recorder(ArrayImages):
        touched = []

        def read(self, indices, draws=None):
            self.touched.extend(indices)
            return super().read(indices, draws)

    batches_of(Split(Recorder(numbered_split().images.array), None), rows=slice(2, 5))[0]
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


@pytest.mark.parametrize("rate", [0.15, 0.5])
def test_every_position_is_dropped_as_often_as_the_rate_says(rate):
    drops = Drops(rate, masks=5, seed=1)
    for kept in (drops.of_step(3, 4000, slice(None), 25)[:, 0], drops.of_images(np.arange(800), 25).reshape(-1, 25)):
        expected, spread = 4000 * rate, 4000 * rate * (1 - rate)
        chi_square = (((~kept).sum(axis=0) - expected) ** 2 / spread).sum()
        assert 8 < chi_square < 53  # of 25 degrees of freedom: 0.1 % on either side
        assert abs(np.corrcoef(kept, rowvar=False) - np.eye(25)).max() < 0.07  # independently of each other


def test_training_masks_depend_on_seed_and_step_but_not_on_processes():
    drops = Drops(0.3, seed=1)
    whole = drops.of_step(6, 8, slice(None), 25)
    assert whole.shape == (8, 1, 25)
    np.testing.assert_array_equal(whole, Drops(0.3, seed=1).of_step(6, 8, slice(None), 25))
    parts = [drops.of_step(6, 8, rows, 25) for rows in (slice(0, 3), slice(3, 8))]
    np.testing.assert_array_equal(whole, np.concatenate(parts))
    others = drops.of_step(7, 8, slice(None), 25), Drops(0.3, seed=2).of_step(6, 8, slice(None), 25)
    assert len(np.unique(np.concatenate([whole, *others]), axis=0)) == 24


def test_batches_carry_the_masks_of_their_step_and_rows():
    greys = palette.Palette(np.repeat(np.arange(256)[:, None] / 127.5 - 1, 3, axis=1))
    drops = Drops(0.3, seed=1)
    for rows in (slice(None), slice(2, 5)):
        batch = TrainBatches(numbered_split(), greys, 7, 3, Augmentation(), rows, drops)[4]
        np.testing.assert_array_equal(batch["keep"], drops.of_step(4, 7, rows, 25))
        without = batches_of(numbered_split(), rows)[4]
        assert_trees_equal(without, {name: batch[name] for name in without})  # and masks change nothing else


def test_evaluation_masks_belong_to_the_image_not_to_the_batch_and_differ():
    greys = palette.Palette(np.repeat(np.arange(256)[:, None] / 127.5 - 1, 3, axis=1))
    drops = Drops(0.3, masks=4, seed=1)

    def masks(*args):
        batches = list(eval_batches(numbered_split(count=23), greys, *args, drops=drops))
        kept = np.concatenate([batch["keep"][batch["mask"] > 0] for batch in batches])
        return kept, np.concatenate([batch["label"][batch["mask"] > 0] for batch in batches])

    kept, labels = masks(10)
    assert kept.shape == (23, 4, 25) and len(np.unique(kept.reshape(-1, 25), axis=0)) == 92
    for other, of_images in (masks(23), masks(4, slice(1, 3))):
        np.testing.assert_array_equal(other, kept[of_images])
    assert not np.array_equal(Drops(0.3, 4, seed=2).of_images(labels, 25), kept)


def test_a_batch_larger_than_the_data_is_refused():
    with pytest.raises(UserError, match="batch_size is 99.*only 23"):
        batches_of(numbered_split(), batch_size=99)


def write_photos(folder, bad=(), count=29):
    """Writes noise in two classes, some of it damaged; returns all of it undamaged, uint8 [N, 8, 8, 3]."""
    rng = np.random.default_rng(6)
    pictures = rng.integers(0, 256, (count, 8, 8, 3), np.uint8)
    for i, picture in enumerate(pictures):
        path = folder / "ab"[i % 2] / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(path)
        if i in bad:
            path.write_bytes(path.read_bytes()[:60])
    return pictures


COLORS = palette.Palette(np.random.default_rng(4).uniform(-1, 1, (61, 3)))
CROPS = dict(preprocess="crop", short_side=(9, 13), crop=7, image_size=(5, 5))


@pytest.mark.parametrize("bad", [(), (3, 4, 17)])
@pytest.mark.parametrize("processes", [1, 2, 4])
def test_processes_together_read_one_batch_with_crops_and_skipped_images(tmp_path, bad, processes):
    write_photos(tmp_path / "photos", bad)

    def opened(rows):
        source = load_source(f"folder:{tmp_path}/photos", on_unreadable="skip", **CROPS)  # each has its own
        augmentation = Augmentation(pad=1, pad_mode="reflect", flip=True, probability=0.7)
        return source, TrainBatches(source.train, COLORS, 8, 5, augmentation, rows)

    each = 8 // processes
    _, whole = opened(slice(None))
    parts = [opened(slice(i * each, (i + 1) * each)) for i in range(processes)]
    for step in (0, 1, 6):
        shares = [batches[step] for _, batches in parts]
        assert_trees_equal(whole[step], {name: np.concatenate([part[name] for part in shares]) for name in whole[step]})
    evaluated = [
        [list(eval_batches(source.validation, COLORS, 8, batches.rows)) for source, batches in parts],
        [list(eval_batches(opened(slice(None))[0].validation, COLORS, 8))],
    ]
    for batch, shares in zip(evaluated[1][0], zip(*evaluated[0], strict=True), strict=True):
        assert_trees_equal(batch, {name: np.concatenate([part[name] for part in shares]) for name in batch})


def test_training_crops_follow_seed_and_step(write_npz):
    pictures = np.random.default_rng(6).integers(0, 256, (29, 8, 8, 3), np.uint8)
    split = load_source(f"npz:{write_npz(images=pictures)}", **CROPS).train

    def batches(seed):
        return TrainBatches(split, COLORS, len(split), seed, Augmentation(), slice(None))

    def sorted_tokens(batch):
        return np.sort(batch["tokens"], axis=None)

    (evaluated,) = eval_batches(split, COLORS, len(split))
    one = batches(3)[0]
    for other in (batches(3)[1], batches(4)[0], evaluated):  # the same images in another order, and cut elsewhere
        assert not np.array_equal(sorted_tokens(one), sorted_tokens(other))
    assert_trees_equal(one, batches(3)[0])


@pytest.mark.parametrize("policy", ["stop", "skip"])
def test_a_run_that_resumes_at_any_step_sees_the_same_next_batch(tmp_path, policy):
    write_photos(tmp_path / "photos", bad=(3, 4, 17) if policy == "skip" else ())

    def iterate(start, threads):
        source = load_source(f"folder:{tmp_path}/photos", on_unreadable=policy, **CROPS)
        augmentation = Augmentation(pad=1, flip=True)
        return TrainBatches(source.train, COLORS, 7, 5, augmentation, slice(None)).iterate(start, 11, threads)

    whole = list(iterate(0, 1))
    for start in np.random.default_rng(1).integers(1, 11, 3):
        resumed = list(iterate(int(start), threads=3))
        assert len(resumed) == 11 - start
        for ours, theirs in zip(resumed, whole[start:], strict=True):
            assert_trees_equal(ours, theirs)


@pytest.mark.parametrize("settings", [dict(image_size=(8, 8)), dict(image_size=(5, 4), preprocess="shrink"), CROPS])
def test_a_folder_and_an_npz_of_its_pictures_give_the_same_tokens(tmp_path, write_npz, settings):
    pictures = write_photos(tmp_path / "photos")
    order = np.argsort(np.arange(29) % 2, kind="stable")  # a folder is read class by class
    path = write_npz(images=pictures[order], labels=order % 2)
    one, other = (load_source(name, **settings) for name in (f"folder:{tmp_path}/photos", f"npz:{path}"))
    augmentation = Augmentation(pad=1, flip=True)
    streams = [
        TrainBatches(source.train, COLORS, 7, 5, augmentation, slice(None)).iterate(0, 9, threads)
        for source, threads in ((one, 3), (other, 1))
    ]
    for ours, theirs in zip(*streams, strict=True):
        assert_trees_equal(ours, theirs)
    for split in ("validation", "test"):
        for ours, theirs in zip(
            *(eval_batches(getattr(source, split), COLORS, 4) for source in (one, other)), strict=True
        ):
            assert_trees_equal(ours, theirs)
    for ours, theirs in zip(*(raw_pixels(source.train, 3) for source in (one, other)), strict=True):
        jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_an_image_that_takes_the_place_of_another_brings_its_own_label():
    files = [(b"damaged" if i in (3, 4, 17) else np.full((5, 5, 3), i, np.uint8), f"photo {i}") for i in range(23)]
    split = Split(EncodedImages(files, Preprocess((5, 5)), skip=True), np.arange(23, dtype=np.int32))
    batch = batches_of(split, batch_size=23)[0]  # tokens and labels are both the index
    np.testing.assert_array_equal(batch["tokens"], np.repeat(batch["label"][:, None], 25, axis=1))
    assert sorted(split.images.unreadable) == [3, 4, 17] and not set(batch["label"]) & {3, 4, 17}


def test_a_batch_refuses_an_image_without_a_label_only_where_each_needs_one():
    """Labels in files are not all read before fine-tuning starts."""
    split = Split(ArrayImages(np.zeros((4, 3, 3, 3), np.uint8)), np.array([0, 1, -1, 1], np.int32), True)
    assert next(eval_batches(split, GREY_PALETTE, 4))["label"][2] == -1
    needing = dataclasses.replace(split, needs_labels=True)
    with pytest.raises(UserError, match="an image has no label; here every image needs one: remove such images"):
        next(eval_batches(needing, GREY_PALETTE, 4))
    with pytest.raises(UserError, match="an image has no label"):
        TrainBatches(needing, GREY_PALETTE, 4, 0, Augmentation(), slice(None))[0]
    numbers = dataclasses.replace(needing, may_lack_labels=False)  # -1 is a class like any other
    assert next(eval_batches(numbers, GREY_PALETTE, 4))["label"][2] == -1


def test_evaluation_masks_what_it_cannot_read(tmp_path):
    write_photos(tmp_path / "photos", bad=range(0, 29, 3))
    source = load_source(f"folder:{tmp_path}/photos", on_unreadable="skip", validation_fraction=0.4)
    images = source.validation.images
    names = [int(images.files.paths[i][-6:-4]) for i in images.indices]
    batches = list(eval_batches(source.validation, COLORS, 5))
    mask = np.concatenate([batch["mask"] for batch in batches])[: len(names)]
    labels = np.concatenate([batch["label"] for batch in batches])[: len(names)]
    np.testing.assert_array_equal(mask, [name % 3 > 0 for name in names])
    np.testing.assert_array_equal(labels[mask > 0], [name % 2 for name in names if name % 3])
    assert len(source.unreadable) == sum(name % 3 == 0 for name in names) > 0


def test_an_unreadable_image_stops_the_threads_that_read_ahead(tmp_path):
    write_photos(tmp_path / "photos", bad=[5])
    source = load_source(f"folder:{tmp_path}/photos", validation_fraction=0.04, test_fraction=0.04)
    assert any("05.png" in source.train.images.files.paths[i] for i in source.train.images.indices)
    for threads in (1, 3):
        batches = TrainBatches(source.train, COLORS, 7, 5, Augmentation(), slice(None)).iterate(0, 100, threads)
        with pytest.raises(UserError, match=r"a?b?/05\.png cannot be read as an image.*data\.on_unreadable=skip"):
            list(batches)


def test_as_many_batches_are_prepared_at_once_as_there_are_threads(monkeypatch):
    all_at_work = threading.Barrier(7, timeout=30)
    monkeypatch.setattr(TrainBatches, "__getitem__", lambda self, step: all_at_work.wait() >= 0 and {"step": step})
    assert [batch["step"] for batch in batches_of(numbered_split()).iterate(0, 7, threads=7)] == list(range(7))


def photo_config(tiny_config, tmp_path, policy):
    write_photos(tmp_path / "photos", bad=[3, 12], count=59)
    COLORS.save(tmp_path / "colors.npy")
    tiny_config.data.update(source=f"folder:{tmp_path}/photos", image_size=(4, 4), channels=3, preprocess="shrink")
    tiny_config.data.on_unreadable = policy
    tiny_config.palette.update(path=str(tmp_path / "colors.npy"), colors=61)
    tiny_config.train.update(steps=3, num_samples=0, eval_every=3, checkpoint_every=3, log_every=1)
    tiny_config.model.depth = 1
    return tiny_config


def test_training_stops_at_an_unreadable_image_with_its_name_and_code_two(tiny_config, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped, errors.reported():
        train.run(photo_config(tiny_config, tmp_path, "stop"), tmp_path / "run")
    assert stopped.value.code == 2
    assert ".png cannot be read as an image" in capsys.readouterr().err.splitlines()[-1]


def test_training_and_the_probe_count_and_report_skipped_images(tiny_config, tmp_path, capsys):
    assert np.isfinite(train.run(photo_config(tiny_config, tmp_path, "skip"), tmp_path / "run").evaluation["eval/loss"])
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [record["data/unreadable"] for record in records if "data/unreadable" in record][-1] >= 1
    assert "unreadable images, such as" in capsys.readouterr().out
    config = probe_digits.get_config()
    config.update(inverse_penalties=(1.0,), max_iter=20, batch_size=24)
    results = eval_probe.run(config, str(tmp_path / "run"), tmp_path / "probe")
    assert sum(results["images"].values()) == 57  # or there would be more labels than features
    assert "passed over 2 unreadable images" in capsys.readouterr().out
