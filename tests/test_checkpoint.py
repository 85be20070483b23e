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


def test_progress_counts_evaluations_since_the_best_and_equal_is_not_better():
    progress = checkpoint.Progress()
    evaluations = ((2, 0.0), (4, 0.5), (6, 0.5), (8, 0.1))
    assert [progress.note(step, accuracy) for step, accuracy in evaluations] == [True, True, False, False]
    assert progress == checkpoint.Progress(best_step=4, best_accuracy=0.5, evaluations_since=2)


def test_the_best_is_kept_however_old_read_first_and_given_up_for_a_better_one(tmp_path):
    state, progress = create_state(TINY, optimizer(), make_mesh(), 0), checkpoint.Progress()
    kept = {}
    for step, accuracy in ((1, 0.2), (2, 0.8), (3, 0.1), (4, 0.7), (5, 0.9), (6, 0.8)):
        with checkpoint.open_checkpoints(tmp_path, 1, progress) as checkpoints:
            progress.note(step, accuracy)
            checkpoint.save(checkpoints, state, step, progress)
        kept[step] = checkpoint.finished_steps(tmp_path)
        assert checkpoint.progress_at(tmp_path, step) == progress
        assert checkpoint.restore_params(tmp_path, state.params)[1] == progress.best_step
    assert kept == {1: [1], 2: [2], 3: [2, 3], 4: [2, 4], 5: [5], 6: [5, 6]}
    assert checkpoint.restore_params(tmp_path, state.params, step=6)[1] == 6


def test_a_run_without_progress_has_its_newest_read(tmp_path):
    state = saved(tmp_path, make_mesh(), steps=(2, 4))
    assert checkpoint.progress_at(tmp_path, 4) is None
    assert checkpoint.restore_params(tmp_path, state.params)[1] == 4
