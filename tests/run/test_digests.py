"""The digests of a checkpoint's files, and the difference between damage and a failed read."""

import errno
import json

import jax
import jax.numpy as jnp
import pytest

from igpt.errors import StorageError
from igpt.run import checkpoint, digests, restore
from igpt.run.digests import DIGESTS, damage
from igpt.sharding import make_mesh
from igpt.state import TrainState
from tests.helpers import save_states


def test_a_checkpoint_has_the_digest_of_every_file_of_its_items(tmp_path):
    save_states(tmp_path, make_mesh(2, 4))
    folder = tmp_path / "checkpoints" / "3"
    files = {
        str(path.relative_to(folder))
        for item in checkpoint.ITEMS
        for path in (folder / item).rglob("*")
        if path.is_file()
    }
    assert (
        files - {f"{item}/commit_success.txt" for item in checkpoint.ITEMS}
        <= json.loads((folder / DIGESTS).read_text()).keys()
    )
    assert damage(checkpoint.folder_of(tmp_path, 3)) == ""


def checkpoint_of(directory):
    with checkpoint.Checkpoints(directory, 1) as checkpoints:
        checkpoints.save(TrainState(jnp.int32(1), {"w": jnp.ones(3)}, {"m": jnp.zeros(3)}), 1)
    return directory


def test_a_file_that_cannot_be_read_now_is_no_damage_and_nothing_is_moved(tmp_path, monkeypatch):
    def stale(path):
        raise OSError(errno.ESTALE, "Stale file handle", str(path))

    workdir = checkpoint_of(tmp_path)
    monkeypatch.setattr(digests, "_digest", stale)
    with pytest.raises(StorageError, match="cannot be read .*Stale file handle.*move it away"):
        restore.newest_sound_step(workdir)
    monkeypatch.undo()
    assert restore.newest_sound_step(workdir) == 1


def test_a_file_that_only_another_host_misses_is_no_damage(tmp_path, monkeypatch):
    workdir = checkpoint_of(tmp_path)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(digests, "broadcast", lambda mine: mine)  # this is process 0
    monkeypatch.setattr(digests, "all_processes", lambda mine: False)
    with pytest.raises(StorageError, match="is complete on process 0, but not on another.*the same directory"):
        damage(checkpoint.folder_of(workdir, 1))
    files = [path for path in (workdir / "checkpoints" / "1" / "params").rglob("*") if path.is_file()]
    max(files, key=lambda path: path.stat().st_size).unlink()
    assert "is missing" in damage(checkpoint.folder_of(workdir, 1))
