import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image
from transformers.models.imagegpt.image_processing_pil_imagegpt import ImageGPTImageProcessorPil

import igpt
from configs import base
from igpt.config import Config
from igpt.errors import UserError
from igpt.interop.import_run import import_directory
from igpt.interop.load import check_same_network, data_settings
from igpt.palette import Palette
from igpt.run import checkpoint
from igpt.run.directory import RunDirectory
from igpt.sample import sample_images
from igpt.sharding import make_mesh
from igpt.state import create_state
from tests.helpers import RUN_MODEL, default_optimizer, learn_with_heads, save_states, write_run_config


def test_a_model_is_rebuilt_from_its_run_directory_alone(tmp_path):
    write_run_config(tmp_path, attention="cudnn")  # trained on a GPU
    state = save_states(tmp_path, make_mesh(2, 2, 2))
    pretrained = igpt.load(tmp_path)
    assert pretrained.step == 3 and pretrained.tokenizer.vocab_size == 17
    assert pretrained.model.config.width == 16 and pretrained.config.data.image_size == (8, 8)
    np.testing.assert_array_equal(pretrained.model.blocks.up.kernel[...], state.params["blocks"]["up"]["kernel"])
    tokens = np.random.default_rng(0).integers(0, 17, (2, 64))
    assert np.allclose(pretrained.model(jnp.asarray(tokens)), 0)  # the head is still zero


def test_a_step_can_be_chosen_and_a_missing_one_lists_the_others(tmp_path):
    write_run_config(tmp_path)
    save_states(tmp_path, make_mesh(), steps=(2, 4))
    assert igpt.load(tmp_path, step=2).step == 2
    with pytest.raises(UserError, match=r"no checkpoint of step 3; it has \[2, 4\]"):
        igpt.load(tmp_path, step=3)


def test_directories_that_hold_no_model_are_refused(tmp_path):
    with pytest.raises(UserError, match="there is no directory"):
        igpt.load(tmp_path / "absent")
    with pytest.raises(UserError, match="no config.json"):
        igpt.load(tmp_path)
    write_run_config(tmp_path)
    with pytest.raises(UserError, match="no finished checkpoint yet"):
        igpt.load(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(UserError, match="no finished checkpoint yet"):
        igpt.load(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json cannot be read as JSON"):
        igpt.load(tmp_path)


def test_a_palette_of_another_size_is_refused(tmp_path):
    write_run_config(tmp_path)
    Palette(np.zeros((5, 3), np.float32)).save(tmp_path / "palette.npy")
    with pytest.raises(UserError, match=r"has 5 colours, but palette\.colors is 17"):
        igpt.load(tmp_path)


def test_a_run_directory_older_than_fine_tuning_loads_and_resumes(tmp_path):
    config = write_run_config(tmp_path)
    state = save_states(tmp_path, make_mesh())
    old = json.loads((tmp_path / "config.json").read_text())
    for section, name in (("data", "labels_per_class"), ("data", "subset_seed"), ("train", "patience")):
        del old[section][name]
    del old["objective"]
    old["optim"]["spike_sigma"] = 0.0  # an option that was removed
    (tmp_path / "config.json").write_text(json.dumps(old))
    RunDirectory(tmp_path, Config.of(config))
    pretrained = igpt.load(tmp_path)
    assert pretrained.step == 3 and pretrained.config.objective.generative == 1.0
    assert pretrained.config.train.patience == 0
    np.testing.assert_array_equal(pretrained.model.blocks.up.kernel[...], state.params["blocks"]["up"]["kernel"])
    config.data.labels_per_class = 4
    with pytest.raises(UserError, match="data.labels_per_class: 0 there, 4 here"):
        RunDirectory(tmp_path, Config.of(config))


def test_a_fine_tuned_run_loads_its_best_step_or_the_chosen_one(tmp_path):
    write_run_config(tmp_path)
    progress, mesh = checkpoint.Progress(), make_mesh()
    with checkpoint.Checkpoints(tmp_path, 1, progress) as checkpoints:
        for step, accuracy in ((2, 0.9), (4, 0.5)):
            progress.note(step, accuracy)
            checkpoints.save(create_state(RUN_MODEL, default_optimizer(), mesh, seed=step), step)
    one, other = igpt.load(tmp_path), igpt.load(tmp_path, step=4)
    assert (one.step, other.step) == (2, 4)
    for step, pretrained in ((2, one), (4, other)):
        expected = create_state(RUN_MODEL, default_optimizer(), mesh, seed=step).params["blocks"]["up"]["kernel"]
        np.testing.assert_array_equal(pretrained.model.blocks.up.kernel[...], expected)


def test_a_run_may_add_a_classifier_and_leave_out_either_head(tmp_path):
    config = write_run_config(tmp_path, num_classes=5)
    for heads in (dict(num_classes=5), dict(num_classes=0), dict(pixel_head=False, num_classes=5)):
        config.model.update(heads)
        check_same_network(str(tmp_path), Config.of(learn_with_heads(config)))
    config.model.num_classes = 3
    with pytest.raises(UserError, match=r"classifier of 5 classes, model\.num_classes is 3; set model\.num_classes=5"):
        check_same_network(str(tmp_path), Config.of(learn_with_heads(config)))
    config = write_run_config(tmp_path, pixel_head=False, num_classes=7)
    check_same_network(str(tmp_path), Config.of(learn_with_heads(config)))
    config.model.pixel_head = True
    with pytest.raises(UserError, match="has no head for pixels"):
        check_same_network(str(tmp_path), Config.of(learn_with_heads(config)))


def test_weights_of_another_network_are_refused(tmp_path):
    config = write_run_config(tmp_path)
    check_same_network(str(tmp_path), Config.of(learn_with_heads(config)))
    config.model.width, config.data.image_size = 32, (4, 4)
    with pytest.raises(UserError, match="another network: width is 16 there, 32 here; seq_len is 64 there, 16 here"):
        check_same_network(str(tmp_path), Config.of(learn_with_heads(config)))


def test_a_hugging_face_directory_equals_the_run_imported_from_it(hf, tmp_path):
    one, other = igpt.load(hf), igpt.load(import_directory(hf, tmp_path / "run"))
    assert one.config.to_dict() == other.config.to_dict() and one.step == other.step == 0
    np.testing.assert_array_equal(one.tokenizer.centers, other.tokenizer.centers)
    states = (nnx.to_pure_dict(nnx.state(pretrained.model)) for pretrained in (one, other))
    jax.tree.map(np.testing.assert_array_equal, *states)
    np.testing.assert_array_equal(*(sample_images(pretrained, num=2, seed=5) for pretrained in (one, other)))


@pytest.mark.parametrize("resample", [None, *Image.Resampling])
def test_pictures_are_resized_with_the_filter_of_the_directory_s_processor(hf_copy, resample):
    settings = json.loads((hf_copy / "preprocessor_config.json").read_text())
    del settings["resample"]  # then it is bilinear
    settings |= {} if resample is None else {"resample": resample}
    (hf_copy / "preprocessor_config.json").write_text(json.dumps(settings))
    picture = Image.fromarray(np.random.default_rng(5).integers(0, 256, (35, 49, 3), np.uint8))
    expected = ImageGPTImageProcessorPil.from_pretrained(hf_copy)(picture, return_tensors="np")["input_ids"]
    pretrained = igpt.load(hf_copy)
    found = pretrained.tokenizer.encode(pretrained.prepared(picture, "shrink"))
    np.testing.assert_array_equal(found.reshape(1, -1), expected)


def test_a_hugging_face_directory_has_no_steps(hf):
    with pytest.raises(UserError, match="it has no checkpoint of step 3"):
        igpt.load(hf, step=3)


def test_weights_may_come_from_a_hugging_face_directory(hf):
    config = igpt.load(hf).config
    check_same_network(str(hf), config)
    other = dataclasses.replace(config, model=dataclasses.replace(config.model, use_bias=False))
    with pytest.raises(UserError, match="another network: use_bias is True there, False here"):
        check_same_network(str(hf), other)


def test_another_source_does_not_inherit_the_split_file():
    config = base.get_config()
    config.data.update(source="folder:photos", split_file="split.txt")
    config = Config.of(config)
    assert data_settings(config, source=None, preprocess="crop").split_file == "split.txt"
    assert data_settings(config, source="folder:photos").split_file == "split.txt"
    assert data_settings(config, source="digits").split_file == ""
