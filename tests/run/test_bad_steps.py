"""A loss that is not finite stops the run, or is skipped."""

import jax
import numpy as np
import pytest

import train
from igpt import loss as loss_module
from igpt.data import batches as data
from igpt.errors import NonFiniteError
from tests.helpers import assert_bitwise_equal, losses, read_arrays, records


def test_a_loss_that_is_not_finite_stops_at_the_last_good_checkpoint(tiny_config, tmp_path, monkeypatch):
    real = loss_module.next_pixel

    def poisoned(logits, tokens):  # when the head has grown more than three updates can explain
        return real(logits, tokens) * jax.numpy.where(abs(logits).max() > 0.2, jax.numpy.nan, 1.0)

    monkeypatch.setattr(loss_module, "next_pixel", poisoned)
    tiny_config.train.update(steps=40, checkpoint_every=1, eval_every=40, sample_every=40, num_samples=0)
    with pytest.raises(NonFiniteError, match=r"step \d+: loss nan.*checkpoint is that of step \d+.*learning_rate"):
        train.run(tiny_config, tmp_path / "run")
    steps = [int(path.name) for path in (tmp_path / "run" / "checkpoints").iterdir()]
    finite = losses(tmp_path / "run")
    assert max(steps) == max(finite) and np.isfinite(list(finite.values())).all()
    arrays = read_arrays(tmp_path / "run", max(steps))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(arrays["params"]))


def test_a_run_that_skips_continues_past_the_step_that_stopped_it(tiny_config, tmp_path, monkeypatch, capsys):
    real = loss_module.next_pixel

    def poisoned(logits, tokens):  # only the batch of one step, every time it is used
        here = tokens.shape == bad.shape and (tokens == bad).all()
        return real(logits, tokens) * jax.numpy.where(here, jax.numpy.nan, 1.0)

    batches = {}
    real_get = data.TrainBatches.__getitem__

    def remembered(self, step):
        batches[step] = real_get(self, step)
        return batches[step]

    tiny_config.train.update(steps=8, checkpoint_every=3, eval_every=8, num_samples=0)
    monkeypatch.setattr(data.TrainBatches, "__getitem__", remembered)
    train.run(tiny_config, tmp_path / "clean")
    bad = batches[4]["tokens"]
    monkeypatch.setattr(loss_module, "next_pixel", poisoned)
    with pytest.raises(NonFiniteError, match=r"step 5: loss nan.*newest .* that of step 3.*on_bad_step=skip"):
        train.run(tiny_config, tmp_path / "run")
    tiny_config.train.on_bad_step = "skip"
    capsys.readouterr()
    train.run(tiny_config, tmp_path / "run")
    output = capsys.readouterr()
    assert "resumed after step 3" in output.out and "step 5: loss nan" in output.out + output.err
    assert losses(tmp_path / "run").keys() == {1, 2, 3, 4, 6, 7, 8}
    assert records(tmp_path / "run")[-2]["train/skipped"] == 1
    train.run(tiny_config, tmp_path / "skipped")
    assert_bitwise_equal(read_arrays(tmp_path / "run", 8), read_arrays(tmp_path / "skipped", 8))
    assert losses(tmp_path / "run")[4] == losses(tmp_path / "clean")[4]
    assert losses(tmp_path / "run")[7] != losses(tmp_path / "clean")[7]


def test_nothing_but_bad_steps_ends_a_run_that_skips(tiny_config, tmp_path, monkeypatch):
    monkeypatch.setattr(loss_module, "next_pixel", lambda logits, tokens: logits[:, 0, 0] + jax.numpy.nan)
    tiny_config.train.update(steps=60, on_bad_step="skip", eval_every=60, sample_every=60, checkpoint_every=60)
    with pytest.raises(NonFiniteError, match="step 20: .* bad step 20 in a row.*There is no checkpoint yet"):
        train.run(tiny_config, tmp_path / "run")
