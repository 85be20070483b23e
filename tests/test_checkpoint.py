import jax
import numpy as np
import pytest

import igpt
from configs import base
from igpt import checkpoint
from igpt import config as configuration
from igpt.errors import UserError
from igpt.model import ModelConfig
from igpt.optim import make_optimizer
from igpt.palette import Palette
from igpt.sharding import make_mesh
from igpt.state import abstract_state, create_state

TINY = ModelConfig(width=16, depth=2, num_heads=4, vocab_size=17, seq_len=64)


def optimizer():
    return make_optimizer(base.get_config().optim, steps=9)[0]


def saved(tmp_path, mesh, steps=(3,), seed=0):
    state = create_state(TINY, optimizer(), mesh, seed)
    with checkpoint.open_checkpoints(tmp_path, max_to_keep=2) as checkpoints:
        for step in steps:
            checkpoint.save(checkpoints, state, step)
    return state


def assert_equal(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


@pytest.mark.parametrize("sizes", [(1, 8, 1), (2, 1, 4), (8, 1, 1)])
def test_what_one_mesh_wrote_another_reads(tmp_path, sizes):
    written = saved(tmp_path, make_mesh(2, 2, 2))
    mesh = make_mesh(*sizes)
    _, abstract = abstract_state(TINY, optimizer(), mesh)
    with checkpoint.open_checkpoints(tmp_path, 2) as checkpoints:
        read = checkpoint.restore(checkpoints, abstract, 3)
    assert_equal(written, read)
    assert jax.tree.map(lambda x: x.sharding, read) == jax.tree.map(lambda x: x.sharding, abstract)


def test_only_the_newest_are_kept(tmp_path):
    saved(tmp_path, make_mesh(), steps=(1, 2, 3, 4))
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["3", "4"]


def run_directory(path, **model):
    """A run directory as train.py leaves it, without the training."""
    config = base.get_config()
    config.palette.colors = 17
    config.model.update(dict(width=16, depth=2, num_heads=4) | model)
    path.mkdir(exist_ok=True)
    configuration.save(config, path)
    Palette(np.linspace(-1, 1, 17)[:, None].repeat(3, axis=1)).save(path / "palette.npy")
    return config


def test_a_model_is_rebuilt_from_its_run_directory_alone(tmp_path):
    run_directory(tmp_path, attention="cudnn")  # trained on a GPU
    state = saved(tmp_path, make_mesh(2, 2, 2))
    pretrained = igpt.load(tmp_path)
    assert pretrained.step == 3 and pretrained.palette.vocab_size == 17
    assert pretrained.model.config.width == 16 and pretrained.config.data.image_size == [8, 8]
    np.testing.assert_array_equal(pretrained.model.blocks.up.kernel[...], state.params["blocks"]["up"]["kernel"])
    tokens = np.random.default_rng(0).integers(0, 17, (2, 64))
    assert np.allclose(pretrained.model(tokens), 0)  # the head is still zero


def test_a_step_can_be_named_and_a_missing_one_lists_those_there_are(tmp_path):
    run_directory(tmp_path)
    saved(tmp_path, make_mesh(), steps=(2, 4))
    assert igpt.load(tmp_path, step=2).step == 2
    with pytest.raises(UserError, match=r"no checkpoint of step 3; it has \[2, 4\]"):
        igpt.load(tmp_path, step=3)


def test_directories_that_hold_no_model_are_refused(tmp_path):
    with pytest.raises(UserError, match="no run directory"):
        igpt.load(tmp_path / "absent")
    with pytest.raises(UserError, match="no config.json"):
        igpt.load(tmp_path)
    run_directory(tmp_path)
    with pytest.raises(UserError, match="no finished checkpoint yet"):
        igpt.load(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(UserError, match="no finished checkpoint yet"):
        igpt.load(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json is damaged"):
        igpt.load(tmp_path)


def test_a_palette_of_another_size_is_refused(tmp_path):
    run_directory(tmp_path)
    Palette(np.zeros((5, 3), np.float32)).save(tmp_path / "palette.npy")
    with pytest.raises(UserError, match=r"has 5 colours, but palette\.colors is 17"):
        igpt.load(tmp_path)


def test_weights_of_another_network_are_refused(tmp_path):
    config = run_directory(tmp_path)
    checkpoint.check_same_network(str(tmp_path), config)
    config.model.width, config.data.image_size = 32, (4, 4)
    with pytest.raises(UserError, match="another network: seq_len is 64 there, 16 here; width is 16 there, 32 here"):
        checkpoint.check_same_network(str(tmp_path), config)
