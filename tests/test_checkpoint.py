import jax
import numpy as np
import pytest

from configs import base
from igpt import checkpoint
from igpt.model import ModelConfig
from igpt.optim import make_optimizer
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
