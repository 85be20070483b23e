import jax
import pytest

from igpt.run import checkpoint
from igpt.sharding import make_mesh
from igpt.state import abstract_state, create_state
from tests.helpers import RUN_MODEL, assert_trees_equal, default_optimizer, save_states


@pytest.mark.parametrize("sizes", [(1, 8, 1), (2, 1, 4), (8, 1, 1)])
def test_what_one_mesh_wrote_another_reads(tmp_path, sizes):
    written = save_states(tmp_path, make_mesh(2, 2, 2))
    mesh = make_mesh(*sizes)
    _, abstract = abstract_state(RUN_MODEL, default_optimizer(), mesh)
    read = checkpoint.restore(tmp_path, abstract, 3)
    assert_trees_equal(written, read)
    assert jax.tree.map(lambda x: x.sharding, read) == jax.tree.map(lambda x: x.sharding, abstract)


def test_only_the_newest_are_kept(tmp_path):
    save_states(tmp_path, make_mesh(), steps=(1, 2, 3, 4))
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["3", "4"]


def test_progress_counts_evaluations_since_the_best_one():
    progress = checkpoint.Progress()
    evaluations = ((2, 0.0), (4, 0.5), (6, 0.5), (8, 0.1))
    assert [progress.note(step, accuracy) for step, accuracy in evaluations] == [True, True, False, False]
    assert progress == checkpoint.Progress(best_step=4, best_accuracy=0.5, evaluations_since=2)


def test_the_best_step_is_kept_and_read_first_until_a_better_one_comes(tmp_path):
    state, progress = create_state(RUN_MODEL, default_optimizer(), make_mesh(), 0), checkpoint.Progress()
    kept = {}
    for step, accuracy in ((1, 0.2), (2, 0.8), (3, 0.1), (4, 0.7), (5, 0.9), (6, 0.8)):
        with checkpoint.Checkpoints(tmp_path, 1, progress) as checkpoints:
            progress.note(step, accuracy)
            checkpoints.save(state, step)
        kept[step] = checkpoint.finished_steps(tmp_path)
        assert checkpoint.progress_at(tmp_path, step) == progress
        assert checkpoint.restore_params(tmp_path, state.params)[1] == progress.best_step
    assert kept == {1: [1], 2: [2], 3: [2, 3], 4: [2, 4], 5: [5], 6: [5, 6]}
    assert checkpoint.restore_params(tmp_path, state.params, step=6)[1] == 6


def test_without_a_best_step_the_newest_is_read(tmp_path):
    state = save_states(tmp_path, make_mesh(), steps=(2, 4))
    assert checkpoint.progress_at(tmp_path, 4) == checkpoint.Progress()
    assert checkpoint.restore_params(tmp_path, state.params)[1] == 4


def test_a_checkpoint_saved_again_has_the_newer_progress(tmp_path):
    state, progress = create_state(RUN_MODEL, default_optimizer(), make_mesh(), 0), checkpoint.Progress()
    with checkpoint.Checkpoints(tmp_path, 2, progress) as checkpoints:
        checkpoints.save(state, 3)
        progress.evaluated_step = 3
        checkpoints.save(state, 3)
    assert checkpoint.progress_at(tmp_path, 3) == progress and checkpoint.finished_steps(tmp_path) == [3]
