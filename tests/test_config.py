"""A whole configuration: made once, checked, settled for a device, and written as plain data."""

import dataclasses
import json
from types import SimpleNamespace

import pytest

from configs import base, imagenet, probe_digits
from igpt.config import OF_TRAINING, SECTIONS, Config
from igpt.errors import UserError
from igpt.model import ModelConfig
from igpt.run import changes
from tests.helpers import TINY_MODEL


def test_every_field_of_base_is_a_field_of_its_section():
    given = base.get_config()
    written = dataclasses.replace(Config.of(given, trains=True), tokenizer="runs/vqvae").to_dict()
    for name in SECTIONS:
        assert set(written[name]) == set(given[name]), name
    assert set(written) == {*SECTIONS, "seed", "init_from", "track", "program", "tokenizer"}
    of_a_palette = Config.of(given, trains=True).to_dict()  # as before there were VQ-VAEs
    assert set(written) - set(of_a_palette) == {"program", "tokenizer", "vqvae"}


def test_fields_that_may_change_on_resume_exist():
    known = Config.of(base.get_config(), trains=True).flat().keys()
    assert {*changes.FREE, *changes.WITH_A_WORD, *changes.OF_IMAGES} <= known


def test_a_configuration_is_the_same_after_json():
    config = Config.of(base.get_config(), trains=True)
    assert Config.of(json.loads(json.dumps(config.to_dict())), trains=True) == config
    assert Config.of(config) is config


def test_vocabulary_and_length_follow_from_palette_and_images():
    given = base.get_config()
    given.palette.colors, given.data.image_size = 17, (5, 7)
    model = Config.of(given).model
    assert (model.vocab_size, model.seq_len) == (17, 35)


@pytest.mark.parametrize(
    ("platform", "dtype", "attention"),
    [("cpu", "float32", "chunked"), ("gpu", "bfloat16", "cudnn"), ("tpu", "bfloat16", "chunked")],
)
def test_auto_is_settled_for_a_device(platform, dtype, attention):
    device = SimpleNamespace(platform=platform, device_kind="TPU v5 lite", compute_capability="8.0")
    config = Config.of(base.get_config())
    model = config.network(device)
    assert (model.dtype, model.attention, model.platform) == (dtype, attention, platform)
    assert model.scan_layers == ("yes" if platform == "tpu" else "no")
    assert config.model.dtype == config.model.attention == config.model.scan_layers == "auto"


@pytest.mark.parametrize(
    ("given", "word"), [("yes", "yes"), ("no", "no"), (True, "yes"), (False, "no"), ("False", "no"), ("true", "yes")]
)
def test_layers_are_scanned_as_asked_by_a_word_or_by_the_boolean_of_an_older_run(given, word):
    settings = base.get_config().to_dict()
    settings["model"]["scan_layers"] = given
    config = Config.of(settings)
    for platform in ("cpu", "tpu"):
        assert config.network(SimpleNamespace(platform=platform, device_kind="it")).scan_layers == word
    assert config.to_dict()["model"]["scan_layers"] == word  # so that a flag may name another word when a run resumes


def test_the_attention_of_a_mesh_is_chosen_for_the_heads_of_one_device():
    config = imagenet.get_config("s")
    device = SimpleNamespace(platform="tpu", device_kind="TPU v5 lite")
    assert Config.of(config).network(device).attention == "fused"
    assert Config.of(config).network(device, tensor=8).attention == "splash"  # one head of 64; our kernel takes two
    config.model.attention = "fused"  # as in runs that were started so, whose kernel splash replaces
    assert Config.of(config).network(device, tensor=8).attention == "fused"


def test_an_unknown_word_for_scanned_layers_is_refused():
    config = base.get_config()
    for word in ("maybe", "1"):
        config.model.scan_layers = word
        with pytest.raises(UserError, match=f"model.scan_layers is '{word}'; choose yes, no, auto"):
            Config.of(config)


def test_a_network_from_elsewhere_has_no_training():
    config = Config.of_network(ModelConfig(12, 2, 2, vocab_size=17, seq_len=35), (5, 7), 3)
    assert all(getattr(config, name) is None for name in OF_TRAINING) and config.data.source == ""
    assert Config.of(config.to_dict()) == config
    with pytest.raises(UserError, match="no training configuration: it has no optim, train, mesh"):
        Config.of(config.to_dict(), trains=True)


def test_a_configuration_of_another_kind_is_refused():
    with pytest.raises(UserError, match="no configuration of igpt: it has no data, palette, model"):
        Config.of(probe_digits.get_config())
    with pytest.raises(UserError, match="no training configuration: it has no optim, train, mesh"):
        Config.of(Config.of_network(TINY_MODEL, (8, 8), 1), trains=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train.steps": 0}, r"train\.steps is 0; it must be at least 1"),
        ({"train.on_bad_step": "cry"}, r"train\.on_bad_step is 'cry'; choose stop, skip"),
        ({"seed": -1}, "seed is -1; it must be at least 0"),
        ({"data.image_size": (8,)}, r"image_size is \(8,\)"),
        ({"data.channels": 2}, "channels is 2; choose 1"),
        ({"data.split_seed": -1}, "split_seed is -1"),
        ({"data.labels_per_class": -4}, "labels_per_class is -4"),
        ({"palette.colors": 0}, r"palette\.colors is 0"),
        ({"optim.clip_norm": -1.0}, "clip_norm is -1.0"),
        ({"optim.clip_norm": float("nan")}, "clip_norm is nan"),
        ({"optim.learning_rate": 0.0}, "learning_rate is 0.0; it must be above 0"),
        ({"optim.b2": 1.0}, r"optim\.b2 is 1\.0"),
        ({"optim.name": "sgd"}, r"optim\.name is 'sgd'; choose adam, muon"),
        ({"optim.schedule": "linear"}, r"optim\.schedule is 'linear'; choose cosine, constant"),
        ({"mesh.dcn_data": 0}, r"mesh\.dcn_data is 0"),
        ({"objective.eval_masks": 0}, "eval_masks is 0"),
        ({"objective.generative": 0.5}, "its weight must be 1"),
        ({"objective.generative": 0.0}, "nothing to learn"),
        ({"model.pixel_head": False}, r"no pixel can be predicted; set objective\.generative=0"),
        ({"objective.classification": 1.0}, r"classification is 1\.0, but model\.num_classes is 0; set both"),
        ({"model.num_classes": 3}, r"objective\.classification is 0\.0, but model\.num_classes is 3; set both"),
        ({"train.patience": 2}, "waits for a better validation accuracy, which only fine-tuning has"),
        ({"model.causal": False, "objective.drop_rate": 1.0}, "BERT drops a share between 0 and 1"),
    ],
)
def test_a_value_that_no_run_could_use_is_refused(changes, message):
    config = base.get_config()
    config.update_from_flattened_dict(changes)
    with pytest.raises(UserError, match=message):
        Config.of(config, trains=True)


def test_a_field_that_does_not_exist_suggests_the_nearest():
    content = Config.of(base.get_config()).to_dict()
    content["optim"]["learning_rat"] = content["optim"].pop("learning_rate")
    with pytest.raises(UserError, match=r"optim\.learning_rat is no field .*did you mean optim\.learning_rate\?"):
        Config.of(content)
