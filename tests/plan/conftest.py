"""Configs and plans that several test files share."""

import jax
import pytest

from configs import imagenet
from igpt.plan import compiled


@pytest.fixture
def small_config():
    """small_config(**changes) -> configs/imagenet.py:s with two layers. It compiles in seconds."""

    def make(**changes):
        config = imagenet.get_config("s")
        config.model.depth = 2
        config.update_from_flattened_dict(changes)
        return config

    return make


@pytest.fixture
def cpu_config(monkeypatch, small_config):
    """A tiny config. Plans of it use this machine's eight CPU devices as if they were TPUs, without libtpu."""
    monkeypatch.setattr(compiled, "topology_devices", lambda topology, slices: jax.devices())
    monkeypatch.setenv("LIBTPU_INIT_ARGS", "")
    network = {"model.width": 64, "model.num_heads": 2, "data.image_size": (8, 8), "train.batch_size": 16}
    return small_config(**network)


@pytest.fixture
def cpu_plan(cpu_config):
    return compiled.compile_plan(cpu_config, "v5e:2x4")
