import dataclasses
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from igpt.errors import StorageError, UserError
from igpt.run import checkpoint, orbax_paths, restore
from igpt.sharding import make_mesh
from igpt.state import abstract_state, create_state
from tests.helpers import ROOT, RUN_MODEL, assert_trees_equal, default_optimizer, save_states


def test_what_one_mesh_wrote_another_reads(tmp_path):
    written = save_states(tmp_path, make_mesh(2, 2, 2))
    for sizes in ((1, 8, 1), (2, 1, 4), (8, 1, 1)):
        _, abstract = abstract_state(RUN_MODEL, default_optimizer(), make_mesh(*sizes))
        read = restore.state(tmp_path, abstract, 3)
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
        assert restore.progress_at(tmp_path, step) == progress
        assert restore.params(tmp_path, state.params)[1] == progress.best_step
    assert kept == {1: [1], 2: [2], 3: [2, 3], 4: [2, 4], 5: [5], 6: [5, 6]}
    assert restore.params(tmp_path, state.params, step=6)[1] == 6


def test_without_a_best_step_the_newest_is_read(tmp_path):
    state = save_states(tmp_path, make_mesh(), steps=(2, 4))
    assert restore.progress_at(tmp_path, 4) == checkpoint.Progress()
    assert restore.params(tmp_path, state.params)[1] == 4


def test_a_checkpoint_saved_again_has_the_newer_progress(tmp_path):
    state, progress = create_state(RUN_MODEL, default_optimizer(), make_mesh(), 0), checkpoint.Progress()
    with checkpoint.Checkpoints(tmp_path, 2, progress) as checkpoints:
        checkpoints.save(state, 3)
        progress.evaluated_step = 3
        checkpoints.save(state, 3)
    assert restore.progress_at(tmp_path, 3) == progress and checkpoint.finished_steps(tmp_path) == [3]


@pytest.mark.parametrize("name", ["run[1]", "what?*[a-z]", "50% (best) #2 {x}"])
def test_a_folder_may_have_any_name(tmp_path, name):
    written = save_states(tmp_path / name, make_mesh(2, 2, 2), steps=(1, 2, 3))
    _, abstract = abstract_state(RUN_MODEL, default_optimizer(), make_mesh())
    assert_trees_equal(written, restore.state(tmp_path / name, abstract, 3))
    assert checkpoint.finished_steps(tmp_path / name) == [2, 3] and restore.newest_sound_step(tmp_path / name) == 3


def test_a_checkpoint_that_cannot_be_read_back_replaces_none(tmp_path, monkeypatch):
    state = save_states(tmp_path / "run[1]", make_mesh(), steps=(1,))
    monkeypatch.setattr(orbax_paths.EtilsPath, "glob", orbax_paths.etils_glob)  # leaves out a part of the checkpoint
    with (
        pytest.raises(StorageError, match="step 2 could not be written.*step 1 is unchanged"),
        checkpoint.Checkpoints(tmp_path / "run[1]", max_to_keep=1) as checkpoints,
    ):
        checkpoints.save(state, 2)
    monkeypatch.undo()
    assert restore.newest_sound_step(tmp_path / "run[1]") == 1


def test_the_progress_of_a_newer_version_is_refused_by_name(tmp_path, monkeypatch):
    newer = dataclasses.make_dataclass("Newer", [("newest", int, 1)], bases=(checkpoint.Progress,))
    monkeypatch.setattr(checkpoint, "Progress", newer)
    save_states(tmp_path, make_mesh())
    monkeypatch.undo()
    with pytest.raises(UserError, match="3/progress was written by another version of igpt: .*'newest'"):
        restore.progress_at(tmp_path, 3)


READS_ANOTHER_NETWORK = """
import sys, time
from pathlib import Path
import jax
from igpt.errors import reported
from igpt.run import checkpoint, orbax_paths, restore

here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
other = {f"w{i}": jax.ShapeDtypeStruct((4 + i % 2,), "float32", sharding=here) for i in range(60)}
with reported():
    try:
        restore.params(Path(sys.argv[1]), other)
    finally:
        time.sleep(0.5)
"""


def test_a_failed_read_ends_in_one_message_without_tracebacks(tmp_path):
    checkpoint.save_params(tmp_path, {f"w{i}": jnp.ones(4) for i in range(60)}, 1)
    done = subprocess.run(
        [sys.executable, "-c", READS_ANOTHER_NETWORK, tmp_path], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "does not fit this network" in done.stderr, done
