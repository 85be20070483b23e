"""The mistakes that a probe reports before it computes anything."""

import datasets
import numpy as np
import pytest
from PIL import Image

import eval_probe
from igpt.data import prepare
from igpt.errors import UserError
from igpt.interop.load import outline
from igpt.palette import Palette
from igpt.probe import fit as probe_module
from igpt.probe.config import ProbeConfig
from igpt.probe.selection import probed_images
from tests.helpers import (
    GREY_PALETTE,
    PROBE_HEIGHT,
    PROBE_IMAGES,
    PROBE_WIDTH,
    grey_pictures,
    probe_config,
    write_run,
)
from tests.image_files import encode_image


def home_of(name: str):
    """The module that calls the function of this name."""
    return eval_probe if hasattr(eval_probe, name) else probe_module


@pytest.fixture
def no_compute(monkeypatch):
    """Makes every computation fail the test."""

    def compute(*args, **kwargs):
        raise AssertionError("computed before the mistake was reported")

    for name in ("stream_features", "raw_pixels", "keep_features", "fit_probe", "load", "untrained"):
        monkeypatch.setattr(home_of(name), name, compute)


def refused(config, ref, workdir, message):
    with pytest.raises(UserError, match=message):
        eval_probe.run(config, ref, workdir)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(layers=(4,)), r"layers is \(4,\); this model has layers 0 to 3"),
        (dict(layers=(-1, 2)), "this model has layers 0 to 3"),
        (dict(steps="3"), r"no checkpoint of step 3; it has \[2, 4\]"),
        (dict(steps="2,last"), "steps is '2,last'; give numbers"),
        (dict(labels_per_class=(4, 99)), "99 labels of each class were asked for, but class . has only"),
        (dict(train_images=106), "train_images is 106; .* has 105 training images"),
        (dict(source="digits"), "has images of 8 x 8"),
        (dict(source="npz:absent.npz"), "there is no file absent.npz"),
        (dict(batch_size=42), "batch_size 42 does not divide into 8"),
        (dict(solver="sgd", sgd=dict(batch_size=30)), "sgd.batch_size 30 does not divide into 8"),
        (dict(mesh=dict(data=3)), "mesh .* but there are 8"),
        (dict(mesh=dict(data=1, tensor=8)), "cannot be split over mesh.tensor=8"),
        (dict(features_out="absent/features.npz"), "features_out=absent/features.npz cannot be written"),
        (dict(features_out="."), "features_out=. cannot be written"),
        (dict(seed=-1), "seed is -1"),
        (dict(pool="grid:99"), "cannot be cut into 99 x 99 parts"),
    ],
)
def test_a_mistake_in_a_setting_is_reported_before_any_computation(no_compute, trained, tmp_path, changes, message):
    refused(probe_config(**changes), trained, tmp_path / "probe", message)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("labels", "message"),
    [(None, "labels are needed"), (np.full(PROBE_IMAGES, 7), "all training images have the label 7")],
)
def test_a_probe_needs_labels_of_two_classes(no_compute, trained, tmp_path, write_npz, labels, message):
    path = write_npz(images=grey_pictures()[0], **({} if labels is None else {"labels": labels}))
    refused(probe_config(source=f"npz:{path}"), trained, tmp_path / "probe", message)
    assert not (tmp_path / "probe").exists()


def test_a_probe_refuses_images_without_a_label(no_compute, trained, tmp_path):
    images, labels = grey_pictures()
    content = [{"bytes": encode_image(Image.fromarray(image)), "path": None} for image in images]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    columns = {"image": content, "label": [None if label == 2 else int(label) for label in labels]}
    datasets.Dataset.from_dict(columns, features=features).save_to_disk(tmp_path / "saved")
    message = r"\d+ images of train have no label; .*label=COLUMN"
    refused(probe_config(source=f"hf:{tmp_path}/saved"), trained, tmp_path / "probe", message)


def test_the_models_own_settings_do_not_change(trained, source, capsys):
    shapes = outline(trained)
    before = shapes.config.to_dict()
    config = probe_config(
        train_images=9, source=source, preprocess="none", validation_fraction=0.5, data_dir="elsewhere"
    )
    chosen = probed_images(ProbeConfig.of(config), shapes, str(trained))
    assert len(chosen.train) == 9 and len(chosen.validation) == 75
    assert capsys.readouterr().out.startswith("classes  3 (dark: ")
    assert shapes.config.to_dict() == before


def test_tokens_of_another_palette_are_refused(no_compute, trained, source, tmp_path):
    GREY_PALETTE.save(tmp_path / "same.npy")
    Palette(GREY_PALETTE.centers[::-1].copy()).save(tmp_path / "other.npy")
    settings = dict(source=source, image_size=(PROBE_HEIGHT, PROBE_WIDTH), channels=1)
    for name in ("same", "other"):
        prepare.prepare(settings, str(tmp_path / f"{name}.npy"), str(tmp_path / name))
    config = probe_config(source=f"tokens:{tmp_path / 'other'}")
    refused(config, trained, tmp_path / "probe", "has another palette than")
    assert not (tmp_path / "probe").exists()
    config.source = f"tokens:{tmp_path / 'same'}"
    with pytest.raises(AssertionError, match="computed"):
        eval_probe.run(config, trained, tmp_path / "probe")


def test_a_missing_or_unfinished_model_is_refused(no_compute, trained, source, tmp_path):
    refused(probe_config(), "absent", tmp_path / "probe", "no directory absent")
    write_run(tmp_path / "unfinished", source, steps=())
    for steps in ("", "all", "2"):
        refused(probe_config(steps=steps), tmp_path / "unfinished", tmp_path / "probe", "no finished checkpoint")
    write_run(tmp_path / "elsewhere", "", steps=(1,))
    refused(probe_config(), tmp_path / "elsewhere", tmp_path / "probe", "set --config.source")
    assert not (tmp_path / "probe").exists()


def test_a_workdir_that_cannot_be_made_is_refused(no_compute, trained, tmp_path):
    (tmp_path / "file").write_text("kept")
    for workdir in (tmp_path / "file", tmp_path / "file" / "probe"):
        refused(probe_config(), trained, workdir, "--workdir=.* cannot be written: .* is no writable folder")
    refused(probe_config(), trained, "az://bucket/probe", "begin with gs:// or s3://")
    assert (tmp_path / "file").read_text() == "kept" and len(list(tmp_path.iterdir())) == 1
