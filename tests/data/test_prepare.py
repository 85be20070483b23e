import multiprocessing
import os
import resource
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import train
from igpt.__main__ import main as run_igpt
from igpt.command import Parser
from igpt.data import prepare
from igpt.data.batches import Augmentation, TrainBatches, eval_batches
from igpt.data.examples import EncodedImages
from igpt.errors import UserError
from igpt.palette import Palette
from igpt.run.flags import parse_with_config
from tests.helpers import (
    PREPARE_HEIGHT,
    PREPARE_IMAGES,
    PREPARE_WIDTH,
    file_contents,
    open_prepare_source,
    prepare_settings,
)

AUGMENTATIONS = [
    {},
    {"pad": 2},
    {"pad": 2, "pad_mode": "edge", "flip": True},
    {"pad": 3, "pad_mode": "reflect", "flip": True, "probability": 0.6},
]


def test_batches_of_an_array_a_folder_and_prepared_tokens_are_equal(pictures, palette, tmp_path):
    names = dict(pictures)
    for kind, name in pictures.items():
        prepare.prepare(prepare_settings(name), str(palette), str(tmp_path / f"{kind}-out"), shard_images=11)
        names[f"prepared {kind}"] = f"tokens:{tmp_path / kind}-out"
    names["prepared twice"] = f"tokens:{tmp_path / 'twice'}"
    prepare.prepare(prepare_settings(names["prepared npz"]), str(palette), str(tmp_path / "twice"), shard_images=13)
    opened = {kind: open_prepare_source(name) for kind, name in names.items()}
    tokenizer = Palette.load(palette)
    names = {kind: source.class_names for kind, source in opened.items()}
    assert names.pop("folder") == names.pop("prepared folder") == ("class0", "class1", "class2")
    assert set(names.values()) == {None}
    for kind, source in opened.items():
        ours = opened["npz"]
        assert source.image_size == (PREPARE_HEIGHT, PREPARE_WIDTH) and source.channels == 3, kind
        for augmentation in AUGMENTATIONS:
            made, expected = (
                TrainBatches(part.train, tokenizer, 17, 5, Augmentation(**augmentation), slice(None))
                for part in (source, ours)
            )
            for step in (0, 2, 7):  # 7: across epochs
                for name in ("tokens", "label"):
                    np.testing.assert_array_equal(made[step][name], expected[step][name], err_msg=f"{kind} {step}")
        for split in ("train", "validation", "test"):
            pairs = zip(
                eval_batches(getattr(source, split), tokenizer, 8),
                eval_batches(getattr(ours, split), tokenizer, 8),
                strict=True,
            )
            for batch, expected in pairs:
                assert batch.keys() == expected.keys() == {"tokens", "label", "mask"}
                for name in batch:
                    np.testing.assert_array_equal(batch[name], expected[name], err_msg=f"{kind} {split}")


def test_one_process_and_two_write_the_same_files(pictures, palette, prepared_folder, tmp_path):
    prepare.prepare(prepare_settings(pictures["folder"]), str(palette), str(tmp_path / "two"), 11, workers=2)
    assert file_contents(tmp_path / "two") == file_contents(prepared_folder)
    assert len(file_contents(prepared_folder)) == 2 + 2 * (4 + 1 + 2)


def children_of(pid):
    return [int(child) for path in Path(f"/proc/{pid}/task").glob("*/children") for child in path.read_text().split()]


def test_interrupted_or_killed_it_ends_its_processes_and_keeps_shards(palette, tmp_path):
    (tmp_path / "photos").mkdir()
    photo = Image.fromarray(np.random.default_rng(2).integers(0, 256, (30, 40, 3), np.uint8)).resize((800, 600))
    for i in range(300):
        photo.rotate(i).save(tmp_path / "photos" / f"{i:03d}.jpg")
    common = [f"--source=folder:{tmp_path}/photos", "--size=7x5", f"--palette={palette}", "--shard_images=7"]

    def finished():
        return {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.tokens.npy")}

    for end, code in ((signal.SIGINT, 130), (signal.SIGTERM, 75), (signal.SIGKILL, -9)):
        before = finished()
        command = [sys.executable, "-m", "igpt", "prepare", *common, f"--out={tmp_path}/out", "--workers=2"]
        run = subprocess.Popen(
            command,
            stderr=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
            # What a shell starts in the background ignores SIGINT, and so would its children.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        while len(finished()) == len(before) and run.poll() is None:
            time.sleep(0.005)
        workers = children_of(run.pid)
        if end == signal.SIGINT:
            os.killpg(run.pid, end)  # as a terminal does
        else:
            run.send_signal(end)
        _, errors = run.communicate(timeout=20)
        assert run.returncode == code and "Traceback" not in errors, errors
        assert len(workers) >= 2 and len(before) < len(finished()) < 44, errors
        for _ in range(3000):
            if not any(Path(f"/proc/{pid}/exe").exists() for pid in workers):
                break
            time.sleep(0.01)
        else:
            pytest.fail("worker processes outlive the command")
    assert "interrupted" not in errors
    before = finished()
    (tmp_path / "out" / "train-00029.tokens.npy.partial").write_bytes(b"half a shard")
    for out in ("out", "at-once"):
        run_igpt(["prepare", *common, f"--out={tmp_path / out}", "--workers=1"])
    assert before.items() <= finished().items() and len(finished()) == 44
    assert file_contents(tmp_path / "out") == file_contents(tmp_path / "at-once")


def test_a_worker_process_that_dies_ends_the_command_with_a_message(
    pictures, palette, prepared_folder, tmp_path, monkeypatch
):
    wait = prepare.futures.wait

    def wait_after_a_death(*args):
        os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
        return wait(*args)

    monkeypatch.setattr(prepare.futures, "wait", wait_after_a_death)
    arguments = prepare_settings(pictures["folder"]), str(palette), str(tmp_path / "out"), 11
    with pytest.raises(UserError, match=r"ended from outside.*want of memory.*fewer --workers"):
        prepare.prepare(*arguments, workers=2)
    prepare.prepare(*arguments, workers=1)
    assert file_contents(tmp_path / "out") == file_contents(prepared_folder)


def test_a_users_mistake_in_a_worker_is_reported_as_it_is(pictures, palette, tmp_path):
    (tmp_path / "folder" / "class1" / "030.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"class1/030\.png cannot be read"):
        prepare.prepare(prepare_settings(pictures["folder"]), str(palette), str(tmp_path / "out"), 11, workers=2)


def test_a_full_disk_is_reported_and_leaves_nothing_half_written(pictures, palette, prepared_folder, tmp_path):
    arguments = prepare_settings(pictures["npz"]), str(palette), str(tmp_path / "out"), 41
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))
    try:
        with pytest.raises(UserError, match=r"train-00000\.tokens\.npy cannot be written: .*What is finished stays"):
            prepare.prepare(*arguments)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list((tmp_path / "out").glob("*.partial")) and not list((tmp_path / "out").glob("*tokens.npy"))
    assert prepare.prepare(*arguments)["train"] == 43


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"image_size": (8, 5), "preprocess": "shrink"},
            r"data\.image_size is \[7, 5\] there, \[8, 5\] here; data\.pre",
        ),
        ({"split_seed": 1}, r"prepared otherwise: data\.split_seed is None there, 1 here\. Name a new"),
        ({"source": "npz"}, r"prepared otherwise: class_names is \['class0'"),
        ({"palette": 1}, r"palette_sha256 is"),
        ({"shard_images": 12}, r"shard_images is 11 there, 12 here"),
        ({"picture": 1}, r"images\.train is 43 there, 44 here"),
        ({"renamed": 1}, r"prepared otherwise: its images have changed since\. Name a new"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_directory_prepared_otherwise_is_refused(pictures, palette, prepared_folder, change, message):
    change = dict(change)
    source = pictures[change.pop("source", "folder")]
    if change.pop("palette", None):
        Palette(np.zeros((37, 3), np.float32)).save(palette)
    if change.pop("picture", None):
        Image.new("RGB", (PREPARE_WIDTH, PREPARE_HEIGHT)).save(
            prepared_folder.parent / "folder" / "class2" / "more.png"
        )
    if change.pop("renamed", None):
        (prepared_folder.parent / "folder" / "class2" / "060.png").rename(
            prepared_folder.parent / "folder/class2/6.png"
        )
    shard_images = change.pop("shard_images", 11)
    before = file_contents(prepared_folder)
    with pytest.raises(UserError, match=message):
        prepare.prepare(
            prepare_settings(source, **change), str(palette), str(prepared_folder), shard_images=shard_images
        )
    assert file_contents(prepared_folder) == before


def test_directories_of_other_things_and_files_are_left_alone(pictures, palette, tmp_path):
    for out, message in (
        ("folder", "no prepared directory"),
        ("palette.npy", "is a file"),
        ("palette.npy/x", "cannot"),
    ):
        with pytest.raises(UserError, match=message):
            prepare.prepare(prepare_settings(pictures["npz"]), str(palette), str(tmp_path / out))
    assert {path.name for path in (tmp_path / "folder").iterdir()} == {"class0", "class1", "class2"}


def test_unreadable_images_stop_it_or_are_left_out_named_and_counted(pictures, palette, tmp_path, capsys):
    source = open_prepare_source(pictures["folder"])
    train_files, test_files = (
        [images.files[i][0] for i in images.indices] for images in (source.train.images, source.test.images)
    )
    broken = [*train_files[11:22], train_files[23], test_files[3]]  # a whole shard among them
    for path in broken:
        path.write_bytes(path.read_bytes()[:50])
    command = ["prepare", f"--source={pictures['folder']}", "--size=7x5", f"--palette={palette}", "--shard_images=11"]
    command += ["--workers=1", "--preprocess=none"]
    with pytest.raises(SystemExit) as stopped:
        run_igpt([*command, f"--out={tmp_path}/stop"])
    assert stopped.value.code == 2
    assert f"error: {train_files[11]} cannot be read" in capsys.readouterr().err
    run_igpt([*command, f"--out={tmp_path}/stop", "--on_unreadable=skip"])  # what the message says; it goes on
    assert "passed over 13 that cannot be read, named in " in capsys.readouterr().out
    for _ in range(2):  # a second time everything is finished, and the count is the same
        run_igpt([*command, f"--out={tmp_path}/skip", "--on_unreadable=skip"])
        assert "passed over 13 that cannot be read, named in " in capsys.readouterr().out
    run_igpt([*command, f"--out={tmp_path}/skip"])  # nothing is left to be read, and so nothing to stop at
    assert "passed over 13 that cannot be read, named in " in capsys.readouterr().out
    named = "".join(path.read_text() for path in sorted((tmp_path / "skip").glob("*.unreadable.txt")))
    assert len(named.splitlines()) == 13 and all(str(path) in named for path in broken)
    opened = open_prepare_source(f"tokens:{tmp_path}/skip")
    kept = [i for i, path in enumerate(train_files) if path not in broken]
    np.testing.assert_array_equal(opened.train.labels, source.train.labels[kept])
    expected = Palette.load(palette).encode(source.train.images[np.array(kept)])
    np.testing.assert_array_equal(opened.train.images.grids(slice(None)), expected)


def test_a_folder_may_be_renamed_and_a_bucket_is_refused(pictures, palette, prepared_folder, tmp_path):
    before = file_contents(prepared_folder)
    (tmp_path / "folder").rename(tmp_path / "elsewhere")
    arguments = str(palette), str(prepared_folder)
    prepare.prepare(prepare_settings(f"folder:{tmp_path}/elsewhere"), *arguments, shard_images=11)
    changed = {name for name, content in file_contents(prepared_folder).items() if before[name] != content}
    assert {Path(name).name for name in changed} <= {"prepared.json"}
    with pytest.raises(UserError, match="is a bucket; write to a local or mounted path"):
        prepare.prepare(prepare_settings(f"folder:{tmp_path}/elsewhere"), str(palette), "gs://bucket/tokens")


def test_other_images_are_refused_with_the_flags_of_the_command(palette, tmp_path, capsys):
    with pytest.raises(SystemExit):
        run_igpt(
            [
                "prepare",
                "--source=digits",
                "--size=7",
                "--channels=1",
                "--preprocess=none",
                f"--palette={palette}",
                f"--out={tmp_path}/o",
            ]
        )
    assert "set --size=8x8 --channels=1. To resize them, set --preprocess=shrink" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run_igpt(["prepare", "--source=digits", "--size=7", f"--palette={palette}", f"--out={tmp_path}/o"])
    assert capsys.readouterr().err.endswith("set --size=7x7 --channels=1\n")  # resizing would change no channels
    for wrong, message in (("--size=x", "--size=x; give a number"), ("--workers=0", "--workers is 0; it must")):
        with pytest.raises(SystemExit):
            run_igpt(["prepare", "--source=digits", "--size=8", f"--palette={palette}", f"--out={tmp_path}/o", wrong])
        assert message in capsys.readouterr().err


def test_few_images_are_in_memory_at_a_time_and_opening_reads_none(pictures, palette, tmp_path, monkeypatch):
    read, seen = EncodedImages.read, []
    monkeypatch.setattr(EncodedImages, "read", lambda self, at, *a: (seen.append(len(at)), read(self, at, *a))[1])
    monkeypatch.setattr(prepare, "PIXELS_AT_ONCE", 3 * PREPARE_HEIGHT * PREPARE_WIDTH + 1)
    prepare.prepare(prepare_settings(pictures["folder"]), str(palette), str(tmp_path / "out"))
    assert max(seen) == 3 and sum(seen) == PREPARE_IMAGES
    for split in ("train", "validation", "test"):
        shards = getattr(open_prepare_source(f"tokens:{tmp_path}/out"), split).images.tokens
        assert all(isinstance(part.base, np.memmap) and not part.flags.writeable for part in shards.parts)


def test_the_hint_runs_as_it_stands(pictures, palette, tmp_path, monkeypatch, capsys):
    out = tmp_path / "my photos"
    run_igpt(["prepare", f"--source={pictures['folder']}", "--size=7x5", f"--palette={palette}", f"--out={out}"])
    said, _, hint = capsys.readouterr().out.partition("next:\n")
    assert "classes: 3 (class0: 21, class1: 20, class2: 20)" in said
    program, script, *hint = shlex.split(hint)
    assert (program, script) == ("python", "train.py")
    small = {"steps": 1, "num_samples": 0, "batch_size": 8, "eval_batch_size": 8}
    model = {"depth": 1, "width": 16, "num_heads": 2}
    parser = Parser("train.py", "")
    parser.add_argument("--workdir")
    args = parse_with_config(parser, [*hint, *(f"--config.train.{k}={v}" for k, v in small.items())])
    args.config.model.update(model)
    args.config.mesh.cpu_devices = 0
    assert args.workdir == "runs/my photos"
    monkeypatch.chdir(tmp_path)

    def describe(*_):  # all is checked, opened and written by then; the rest is training
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "describe", describe)
    with pytest.raises(KeyboardInterrupt):
        train.run(args.config, args.workdir)
    np.testing.assert_array_equal(np.load("runs/my photos/palette.npy"), np.load(palette))
