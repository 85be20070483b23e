import dataclasses

import pytest

from configs import digits, probe_digits
from igpt.errors import UserError
from igpt.probe.config import SGD, ProbeConfig

SECTIONS = ("sgd", "attention", "mesh")


def test_every_field_of_the_config_file_is_a_field_of_the_class():
    config = probe_digits.get_config()
    typed = ProbeConfig.of(config)
    values = dataclasses.asdict(typed)
    nested = {f"{part}.{name}": value for part in SECTIONS for name, value in values.pop(part).items()}
    del nested["mesh.dcn_data"]  # a probe uses one slice
    given = {name: value for name, value in config.to_dict().items() if name not in SECTIONS}
    given |= {f"{part}.{name}": value for part in SECTIONS for name, value in config[part].items()}
    assert values | nested == given
    assert isinstance(typed.sgd, SGD) and typed.sgd.steps == 2000
    with pytest.raises(dataclasses.FrozenInstanceError):
        typed.seed = 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(labels_per_class=(0,)), r"labels_per_class is \(0,\)"),
        (dict(solver="svm"), "solver is 'svm'; choose auto, newton, lbfgs, sgd"),
        (dict(inverse_penalties=(1.0, 0.0)), "inverse_penalties is"),
        (dict(inverse_penalties=()), "inverse_penalties is"),
        (dict(sgd=dict(learning_rates=(-1.0,))), "sgd.learning_rates is"),
        (dict(sgd=dict(steps=0)), "sgd.steps is 0; it must be at least 1"),
        (dict(sgd=dict(weight_decay=-0.1)), "sgd.weight_decay is -0.1"),
        (dict(mesh=dict(cpu_devices=-1)), "mesh.cpu_devices is -1"),
        (dict(concatenate=-1), "concatenate is -1"),
        (dict(eval_masks=-1), "eval_masks is -1"),
        (dict(subsets=0), "subsets is 0"),
        (dict(max_iter=0), "max_iter is 0"),
        (dict(seed=-1), "seed is -1"),
    ],
)
def test_values_that_no_probe_could_use_are_refused(changes, message):
    config = probe_digits.get_config()
    config.update(changes)
    with pytest.raises(UserError, match=message):
        ProbeConfig.of(config)


def test_a_missing_field_is_named():
    config = probe_digits.get_config()
    del config.layers
    with pytest.raises(UserError, match="has no layers; start from configs/probe.py"):
        ProbeConfig.of(config)
    config = probe_digits.get_config()
    del config.sgd.steps
    with pytest.raises(UserError, match=r"has no sgd\.steps; start from"):
        ProbeConfig.of(config)


def test_an_unknown_field_is_named_with_the_nearest_known_one():
    config = probe_digits.get_config()
    config.sgd.batchsize = 3
    with pytest.raises(
        UserError, match=r"sgd\.batchsize is no field of a configuration; did you mean sgd\.batch_size\?"
    ):
        ProbeConfig.of(config)
    config = probe_digits.get_config()
    config.qqq = 3
    with pytest.raises(UserError, match="qqq is no field of a configuration; there are seed, steps"):
        ProbeConfig.of(config)


def test_a_training_configuration_is_refused():
    with pytest.raises(UserError, match="no probe configuration: it has no sgd, attention, solver"):
        ProbeConfig.of(digits.get_config())
