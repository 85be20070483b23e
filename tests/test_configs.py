"""Every shipped configuration can be built, and the ways of getting one wrong are told apart."""

import importlib
import re
from pathlib import Path

import pytest

from configs import base, probe_digits
from igpt import config as configuration
from igpt.errors import UserError
from igpt.optim import make_optimizer
from igpt.sharding import check_batch_size, make_mesh
from igpt.state import abstract_state

ROOT = Path(__file__).parents[1]
TRAINABLE = [path.stem for path in (ROOT / "configs").glob("*.py") if not path.stem.startswith("probe_")]


@pytest.mark.parametrize("name", TRAINABLE)
def test_a_shipped_config_builds_its_whole_state_abstractly(name):
    config = importlib.import_module(f"configs.{name}").get_config()
    configuration.check(config)
    optimizer, _ = make_optimizer(config.optim, config.train.steps)
    mesh = make_mesh(*(config.mesh[axis] for axis in ("data", "fsdp", "tensor")))
    check_batch_size("train.batch_size", config.train.batch_size, config.train.accumulate, mesh)
    check_batch_size("train.eval_batch_size", config.train.eval_batch_size, 1, mesh)
    _, state = abstract_state(configuration.model_config(config), optimizer, mesh)
    assert state.params["head"]["kernel"].shape == (config.model.width, config.palette.colors)


def test_every_field_is_explained_where_it_is_set():
    fields = [
        line for line in (ROOT / "configs" / "base.py").read_text().splitlines() if re.match(r"    \w+\.\w+ = ", line)
    ]
    assert [line for line in fields if "#" not in line and "ConfigDict()" not in line] == []


def test_a_config_survives_its_json(tmp_path):
    config = base.get_config()
    configuration.save(config, tmp_path)
    assert configuration.flatten(configuration.load(tmp_path)) == configuration.flatten(config)
    configuration.check_resumable(config, tmp_path)


def test_a_run_of_another_configuration_is_told_apart_field_by_field(tmp_path):
    config = base.get_config()
    configuration.save(config, tmp_path)
    config.model.width, config.seed = 256, 7
    with pytest.raises(UserError, match=r"(?s)model\.width: 512 there, 256 here.*seed: 0 there, 7 here.*--start_over"):
        configuration.check_resumable(config, tmp_path)


def test_how_a_run_is_carried_out_may_change_when_it_resumes(tmp_path):
    config = base.get_config()
    configuration.save(config, tmp_path)
    config.mesh.fsdp, config.model.attention, config.train.log_every = 2, "reference", 99
    configuration.check_resumable(config, tmp_path)


def test_arithmetic_may_not_change_when_a_run_resumes(tmp_path):
    config = base.get_config()
    configuration.save(config, tmp_path)
    config.model.attention_dropout = 0.5  # its name begins with that of a field that may
    with pytest.raises(UserError, match=r"model\.attention_dropout: 0\.0 there, 0\.5 here"):
        configuration.check_resumable(config, tmp_path)


def test_a_configuration_of_another_kind_is_refused():
    with pytest.raises(UserError, match="no configuration of ours: it has no data, palette"):
        configuration.check(probe_digits.get_config())


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("train.steps", 0, "train.steps is 0"),
        ("seed", -1, "seed is -1"),
        ("data.image_size", (8,), r"image_size is \(8,\)"),
        ("data.channels", 2, "channels is 2; choose 1"),
        ("data.split_seed", -1, "split_seed is -1"),
        ("optim.clip_norm", -1.0, "clip_norm is -1.0"),
    ],
)
def test_values_that_no_run_could_use_are_refused(field, value, message):
    config = base.get_config()
    config.update_from_flattened_dict({field: value})
    with pytest.raises(UserError, match=message):
        configuration.check(config)
