"""Runs in buckets keep the promises of runs on disks."""

import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

import igpt
import train
from igpt.bucket import FINISHED
from igpt.data.sources import open_source
from igpt.errors import UserError
from igpt.interop.export import export
from igpt.run import checkpoint, restore
from igpt.run.directory import set_aside
from igpt.sharding import make_mesh
from tests.helpers import (
    assert_bitwise_equal,
    losses,
    read_arrays,
    reading_settings,
    save_states,
    write_run,
)


def abstract_of(state):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def copy_up(folder, place):
    for path in folder.rglob("*"):
        if path.is_file():
            (place / path.relative_to(folder)).write_bytes(path.read_bytes())


def copy_down(place, folder):
    for path in place.files():
        copy = folder / path.relative_to(place)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())


@pytest.mark.parametrize("bucket_url", ["gs", pytest.param("s3", marks=pytest.mark.slow)], indirect=True)
def test_a_run_goes_on_in_a_bucket_after_a_plain_copy_and_back_bitwise(tiny_config, tmp_path, monkeypatch, bucket):
    tiny_config.model.residual_dropout = 0.1
    tiny_config.train.update(checkpoint_every=2, num_samples=1, sample_every=4)
    train.run(tiny_config, tmp_path / "whole")

    class Interrupted(Exception):
        pass

    def stop_after(workdir, step):
        def save_then_stop(checkpoints, state, saved):
            real_save(checkpoints, state, saved)
            if saved == step:
                raise Interrupted

        real_save = checkpoint.Checkpoints.save
        with monkeypatch.context() as patch, pytest.raises(Interrupted):
            patch.setattr(checkpoint.Checkpoints, "save", save_then_stop)
            train.run(tiny_config, workdir)

    stop_after(tmp_path / "parts", 2)
    copy_up(tmp_path / "parts", bucket)
    stop_after(str(bucket), 4)
    assert checkpoint.finished_steps(bucket) == [2, 4] and losses(bucket).keys() == {1, 2, 3, 4}
    assert {path.name for path in bucket.iterdir()} >= {"config.json", "palette.npy", "samples", "metrics.jsonl"}
    assert len(list(bucket.glob("events.*"))) == 2  # the first came with the copy
    shutil.rmtree(tmp_path / "parts")
    copy_down(bucket, tmp_path / "parts")
    train.run(tiny_config, tmp_path / "parts")
    assert_bitwise_equal(read_arrays(tmp_path / "whole", 6), read_arrays(tmp_path / "parts", 6))
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")


@pytest.mark.parametrize("bucket_url", ["s3"], indirect=True)
def test_a_state_is_restored_from_a_bucket_of_the_second_kind(bucket):
    state = save_states(bucket, make_mesh(), steps=(1,))
    assert restore.newest_sound_step(bucket) == 1
    assert_bitwise_equal(restore.state(bucket, abstract_of(state), 1), state)


@pytest.mark.parametrize("bucket_url", ["gs", pytest.param("s3", marks=pytest.mark.slow)], indirect=True)
def test_checkpoints_in_a_bucket_are_atomic_and_damage_is_moved_aside(bucket, capsys):
    mesh = make_mesh(fsdp=2, tensor=2)
    state = save_states(bucket, mesh, steps=(2, 3, 4))
    assert checkpoint.finished_steps(bucket) == [3, 4]
    (bucket / "checkpoints" / "4" / FINISHED).unlink()  # as if a kill had come before the save was finished
    assert checkpoint.finished_steps(bucket) == [3] and restore.newest_sound_step(bucket) == 3
    save_states(bucket, mesh, steps=(4,))
    assert checkpoint.finished_steps(bucket) == [3, 4]
    file = max((bucket / "checkpoints" / "4" / "optimizer").files(), key=lambda path: len(path.read_bytes()))
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    assert restore.newest_sound_step(bucket) == 3
    assert f"step 4 is damaged (optimizer/{str(file).partition('/optimizer/')[2]} differs" in capsys.readouterr().out
    assert (bucket / "damaged-4-1" / "optimizer").is_dir() and not (bucket / "checkpoints" / "4").exists()
    assert_bitwise_equal(restore.state(bucket, abstract_of(state), 3), state)


@pytest.mark.parametrize("bucket_url", ["gs"], indirect=True)
def test_a_checkpoint_that_replaces_another_in_a_bucket_may_be_interrupted(bucket, monkeypatch):
    mesh = make_mesh()
    save_states(bucket, mesh, steps=(3,))
    save_states(bucket, mesh, steps=(3,), seed=1)
    assert checkpoint.finished_steps(bucket) == [3] and not list(bucket.glob("replaced-*"))
    newer = read_arrays(bucket, 3)
    (bucket / "checkpoints" / "3").rename(bucket / "replaced-3")
    (bucket / "checkpoints" / "3" / "params" / "half").write_bytes(b"")  # the next save was killed
    assert restore.newest_sound_step(bucket) == 3 and not list(bucket.glob("replaced-*"))
    assert_bitwise_equal(read_arrays(bucket, 3), newer)


@pytest.mark.parametrize("bucket_url", ["gs"], indirect=True)
def test_models_and_data_in_a_bucket_are_found(bucket, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    images = np.arange(40 * 16, dtype=np.uint8).reshape(40, 4, 4)
    np.savez(tmp_path / "images.npz", images=images)
    copy_up(write_run(tmp_path / "run", "digits"), bucket / "run")
    assert igpt.load(str(bucket / "run")).step == 4
    copy_up(export(tmp_path / "run", tmp_path / "hf"), bucket / "hf")
    assert igpt.load(str(bucket / "hf")).tokenizer.vocab_size == 17  # from a local copy
    with pytest.raises(UserError, match="there is no model in .*/nothing"):
        igpt.load(str(bucket / "nothing"))

    place = bucket / "images.npz"
    place.write_bytes((tmp_path / "images.npz").read_bytes())
    settings = reading_settings(f"npz:{place}", image_size=(4, 4), channels=1)
    first, again = open_source(settings), open_source(settings)
    assert first.name == f"npz:{place}" and capsys.readouterr().out.count("fetched 1 file of") == 1
    np.testing.assert_array_equal(first.train.images[:], again.train.images[:])
    [copy] = Path(tmp_path / "cache").rglob("images.npz")
    copy.write_bytes(copy.read_bytes()[:-1] + b"?")  # a damaged copy is fetched again
    np.testing.assert_array_equal(open_source(settings).train.images[:], first.train.images[:])
    np.savez(tmp_path / "images.npz", images=images[::-1])  # and so is another file
    place.write_bytes((tmp_path / "images.npz").read_bytes())
    assert not np.array_equal(open_source(settings).train.images[:], first.train.images[:])
    assert capsys.readouterr().out.count("fetched 1 file of") == 2
    with pytest.raises(UserError, match="npz: and tokens: may be in a bucket"):
        open_source(reading_settings(f"folder:{bucket}"))
    with pytest.raises(UserError, match="there is nothing at"):
        open_source(reading_settings(f"npz:{bucket}/absent.npz"))


@pytest.mark.parametrize("bucket_url", ["gs"], indirect=True)
def test_starting_over_in_a_bucket_keeps_the_old_run_and_the_lock(bucket):
    for name in ("config.json", "checkpoints/3/params/a", "running-0.json"):
        (bucket / name).write_bytes(name.encode())
    aside = set_aside(bucket)
    assert str(aside) == f"{bucket}.old-1" and [path.name for path in bucket.iterdir()] == ["running-0.json"]
    assert (aside / "checkpoints/3/params/a").read_bytes() == b"checkpoints/3/params/a"
    assert set_aside(bucket) is None
