"""`igpt.load` gives a model with methods, which do what the commands do."""

import dataclasses
import errno
import json

import jax
import numpy as np
import pytest
from flax import nnx
from PIL import ExifTags, Image

import igpt
import train
from igpt import predict, sample
from igpt.__main__ import main as run_igpt
from igpt.errors import UserError
from igpt.loss import masks_of
from igpt.sharding import make_mesh
from igpt.trained import Run
from tests.helpers import write_run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return igpt.load(write_run(tmp_path_factory.mktemp("trained") / "run", source="", steps=(2,), depth=2))


@pytest.fixture(scope="module")
def photo(tmp_path_factory):
    pixels = np.random.default_rng(0).integers(0, 256, (23, 31, 4), np.uint8)
    path = tmp_path_factory.mktemp("photo") / "photo.png"
    Image.fromarray(pixels).save(path)
    return path


def test_a_run_is_one_line_and_still_a_tuple(run):
    assert repr(run) == (
        f"<igpt.Run {run.path}, step 2: 4 x 5 pixels of 17 colours, causal, width 16, depth 2, 7,104 parameters>"
    )
    config, model, palette, step, names = run
    assert (config.model.depth, model.config.width, palette.vocab_size, step, names) == (2, 16, 17, 2, None)
    assert isinstance(run, igpt.Pretrained)


def test_sampling_gives_the_bytes_of_the_command(run, tmp_path):
    run_igpt(["sample", f"--model={run.path}", "--num=5", "--seed=3", "--top_k=9", f"--out={tmp_path}/command.png"])
    images = run.sample(5, seed=3, top_k=9)
    assert images.shape == (5, 4, 5, 3) and images.dtype == np.uint8
    assert images._repr_png_() == (tmp_path / "command.png").read_bytes()


def test_a_full_disk_under_a_command_is_told_with_its_flag(run, monkeypatch, tmp_path, capsys):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(sample, "save_png", full)
    with pytest.raises(SystemExit) as stopped:
        run_igpt(["sample", f"--model={run.path}", "--num=1", f"--out={tmp_path}/a.png"])
    assert stopped.value.code == 2
    assert f"--out={tmp_path}/a.png cannot be written: No space left on device" in capsys.readouterr().err


def test_completing_a_picture_gives_the_bytes_of_the_command(run, photo, tmp_path):
    flags = ["--keep=0.5", "--num=3", "--seed=4", f"--complete={photo}", f"--out={tmp_path}/command.png"]
    run_igpt(["sample", f"--model={run.path}", *flags])
    found = run.complete(Image.open(photo), keep=0.5, num=3, seed=4)
    assert found.shape == (1, 3, 4, 5, 3)
    command = np.asarray(Image.open(tmp_path / "command.png"))  # the given part, three continuations, the original
    step = command.shape[1] // 5
    for i, image in enumerate(found[0]):
        left = 2 + (i + 1) * step
        np.testing.assert_array_equal(command[2 : 2 + 4 * 13 : 13, left : left + 5 * 13 : 13], image)


def test_a_model_of_scattered_images_takes_other_pictures_as_they_are(photo, write_npz, tmp_path, capsys):
    path = write_run(tmp_path / "run", "scattered:digits", steps=(2,), depth=1, num_classes=3)
    config = json.loads((path / "config.json").read_text())
    config["data"].update(scatter_copies=3, scatter_scale=[0.3, 0.5])
    (path / "config.json").write_text(json.dumps(config))
    run = igpt.load(path)
    assert run.complete(Image.open(photo), num=2).shape == (1, 2, 4, 5, 3)
    run_igpt(["predict", f"--model={path}", "--preprocess=shrink", str(photo)])
    other = write_npz(images=np.zeros((9, 4, 5), np.uint8), labels=np.arange(9) % 3)
    run_igpt(["evaluate", f"--model={path}", f"--source=npz:{other}", "--split=all"])
    assert "photo.png: " in capsys.readouterr().out


def test_predictions_are_those_of_the_command(named_run, tmp_path):
    folder, images, _ = named_run
    run = igpt.load(folder)
    Image.fromarray(images[0]).save(tmp_path / "a.png")
    run_igpt(["predict", f"--model={folder}", f"{tmp_path}/a.png", f"--json={tmp_path}/found.json"])
    (of_file,) = json.loads((tmp_path / "found.json").read_text())["files"]
    assert run.predict(Image.open(tmp_path / "a.png")) == [of_file["classes"]]
    best = run.predict(images[:2, ..., None], top=1)
    assert [len(found) for found in best] == [1, 1] and best[0][0]["class"] == of_file["classes"][0]["class"]


def test_a_picture_that_was_taken_upright_or_lying_is_read_upright_as_by_the_command(named_run, tmp_path):
    folder, images, _ = named_run
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    Image.fromarray(np.rot90(images[0]).copy()).save(tmp_path / "lying.png", exif=exif)
    run = igpt.load(folder)
    np.testing.assert_array_equal(run.prepared(Image.open(tmp_path / "lying.png"))[0, ..., 0], images[0])
    run_igpt(["predict", f"--model={folder}", f"{tmp_path}/lying.png", f"--json={tmp_path}/found.json"])
    (of_file,) = json.loads((tmp_path / "found.json").read_text())["files"]
    assert run.predict(Image.open(tmp_path / "lying.png")) == [of_file["classes"]]


def test_predicting_again_compiles_nothing(named_run, monkeypatch):
    traced = []
    monkeypatch.setattr(predict, "masks_of", lambda batch: traced.append(batch) or masks_of(batch))
    run = igpt.load(named_run[0])
    expected = run.predict(named_run[1][:2, ..., None])
    traced.clear()
    assert run.predict(named_run[1][:2, ..., None]) == expected and not traced


def test_images_of_the_model_s_size_are_not_cropped_and_others_are_as_asked(named_run):
    run, images = igpt.load(named_run[0]), named_run[1][:4, ..., None]
    data = dataclasses.replace(run.config.data, preprocess="crop")
    cropping = Run.of(run._replace(config=dataclasses.replace(run.config, data=data)), run.path)
    np.testing.assert_array_equal(cropping.features(images), run.features(images))
    assert cropping.predict(images) == run.predict(images)
    large = np.repeat(np.repeat(images, 3, axis=1), 2, axis=2)
    with pytest.raises(UserError, match=r"image 0 has 12 x 10 pixels.*shrink or crop$"):
        run.features(large)
    for how in ("shrink", "crop"):
        prepared = run.prepared(large, how)
        np.testing.assert_array_equal(run.features(large, preprocess=how), run.features(prepared))
        assert run.predict(large, preprocess=how) == run.predict(prepared)


def test_features_are_those_of_the_network(run):
    images = run.sample(3)
    tokens = run.tokenizer.encode(images).reshape(3, -1)
    expected = jax.jit(lambda model, tokens: model.features(tokens))(run.model, tokens)
    np.testing.assert_allclose(run.features(images), expected, atol=1e-5)
    np.testing.assert_allclose(run.features(images, 1, batch_size=2), expected[1], atol=1e-5)
    np.testing.assert_allclose(run.features(images, np.int64(1)), expected[1], atol=1e-5)
    np.testing.assert_allclose(run.features(images, (2, 0)), expected[np.array([2, 0])], atol=1e-5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda run: run.features(run.sample(1), 3), r"layers is \(3,\); this model has layers 0 to 2"),
        (lambda run: run.predict(run.sample(1)), "has no classifier; fine-tune it first"),
        (lambda run: run.complete("photo.png"), "is a name, not an image"),
        (lambda run: run.complete(np.zeros((8, 8), np.uint8), keep=1.0), "keep is 1.0"),
        (lambda run: run.features(np.zeros((9, 9, 3), np.uint8)), "image 0 has 9 x 9 pixels"),
    ],
)
def test_a_mistake_is_explained(run, call, message):
    with pytest.raises(UserError, match=message):
        call(run)


def test_nothing_and_batches_of_nothing_are_refused(run, photo):
    for call in (
        lambda: run.sample(0),
        lambda: run.complete(Image.open(photo), num=0),
        lambda: run.sample(2, batch_size=0),
    ):
        with pytest.raises(UserError, match="were asked for; give at least 1 of each"):
            call()
    images = run.sample(1)
    for name, value in (("top", 0), ("top", -1), ("masks", 0), ("batch_size", 0), ("batch_size", -1)):
        with pytest.raises(UserError, match=f"{name} is {value}; give a whole number of at least 1"):
            run.predict(images, **{name: value})
    with pytest.raises(UserError, match="batch_size is 0; give a whole number"):
        run.features(images, batch_size=0)
    for layers in (np.array(1.0), np.array([0, 1.5]), ()):
        with pytest.raises(UserError, match="layers is .*; give whole numbers"):
            run.features(images, layers)


def test_a_model_on_several_devices_samples_the_same(run):
    split = igpt.load(run.path, mesh=make_mesh(4, 1, 2))
    assert split.mesh.shape == {"data": 4, "fsdp": 1, "tensor": 2}
    np.testing.assert_array_equal(split.sample(3), run.sample(3))
    np.testing.assert_allclose(split.features(run.sample(3)), run.features(run.sample(3)), atol=1e-5)


def test_training_returns_the_run_that_can_be_loaded(tiny_config, tmp_path):
    tiny_config.train.num_samples = 0
    trained = train.run(tiny_config, tmp_path / "run")
    loaded = igpt.load(tmp_path / "run")
    assert trained.step == loaded.step == 6 and trained.path == loaded.path and trained.metrics() == loaded.metrics()
    for one, other in zip(*(jax.tree.leaves(nnx.state(run.model)) for run in (trained, loaded)), strict=True):
        np.testing.assert_array_equal(one, other)
    assert [record["step"] for record in loaded.metrics()] == [1, 2, 3, 3, 4, 5, 6, 6]
    assert trained.evaluation.items() <= loaded.metrics()[-1].items() and loaded.evaluation == {}
