"""Speed is that of the steps alone; the time left is known from the second step on; a long run says so."""

import jax
import numpy as np
import pytest

from igpt.flops import PEAK_FLOPS, train_flops_per_image
from igpt.model import ModelConfig
from igpt.run.speed import Speed, TimeLeft, duration
from tests.helpers import configured

MODEL = ModelConfig(width=64, depth=2, num_heads=2, vocab_size=17, seq_len=1024)


@pytest.fixture
def now(monkeypatch):
    """The clock, which the test moves."""
    seconds = [100.0]
    monkeypatch.setattr("igpt.run.speed.time.perf_counter", lambda: seconds[0])
    return seconds


def test_speed_is_images_over_time_and_an_unknown_device_has_no_mfu(now, monkeypatch):
    config = ModelConfig(width=16, depth=2, num_heads=4, dtype="bfloat16")
    speed = Speed(config, batch_size=8)
    now[0] += 4.0
    assert speed.read(10) == {"perf/images_per_sec": 20.0}
    assert speed.read(10) == {}
    now[0] += 100.0
    speed.restart(10)
    now[0] += 1.0
    assert speed.read(11) == {"perf/images_per_sec": 8.0}
    monkeypatch.setitem(PEAK_FLOPS, jax.devices()[0].device_kind, 1e12)
    speed = Speed(config, batch_size=8)
    now[0] += 2.0
    read = speed.read(1)
    assert np.isclose(read["perf/mfu"], 4 * train_flops_per_image(config) / 1e12 / jax.device_count())


def train_config(steps, every=10_000):
    changes = {"train.steps": steps, "train.eval_every": every, "train.sample_every": every}
    return configured(**changes | {"train.checkpoint_every": every}).train


def test_the_time_left_is_told_from_the_second_step_on_and_ignores_the_compilation(now):
    left = TimeLeft(train_config(100), last_step=100)
    now[0] += 60.0  # compiles
    left.stepped()
    assert left.after(1) is None
    now[0] += 2.0
    left.stepped()
    assert left.after(2) == 98 * 2.0


def test_the_time_left_counts_the_pauses_that_are_still_to_come(now):
    left = TimeLeft(train_config(40, every=10), last_step=40)
    for _ in range(10):
        now[0] += 1.0
        left.stepped()
    assert left.after(10) == pytest.approx(30.0)
    now[0] += 5.0
    left.paused()
    assert left.after(10) == pytest.approx(30.0 + 3 * 5.0)


def test_the_time_left_follows_a_machine_that_becomes_slower(now):
    left = TimeLeft(train_config(1000), last_step=1000)
    for seconds in [1.0] * 300 + [3.0] * 300:
        now[0] += seconds
        left.stepped()
    assert 2.9 < left.after(999) <= 3.0


def measured(now, steps, seconds):
    left = TimeLeft(train_config(steps), last_step=steps)
    for _ in range(4):
        now[0] += seconds
        left.stepped()
    return left


def test_a_run_of_more_than_an_hour_says_how_long_and_what_would_be_shorter(now):
    text = measured(now, 20_004, 3.6).advice(4, MODEL, (32, 32), is_fresh=True)
    assert "about 20 h 0 min more here: 20,000 steps of 3.6 s" in text
    assert "--config.train.steps=1004 takes an hour" in text
    half = MODEL.__class__(width=64, depth=2, num_heads=2, vocab_size=17, seq_len=256)
    part = train_flops_per_image(half) / train_flops_per_image(MODEL)
    assert f"images of 16 x 16 about {duration(72_000 * part)}" in text and "half the model.width about " in text


def test_a_resumed_run_is_not_told_to_change_what_it_cannot(now):
    text = measured(now, 20_004, 3.6).advice(4, MODEL, (32, 32), is_fresh=False)
    assert "about 20 h 0 min" in text and "shorter" not in text


def test_a_short_run_gets_no_advice_and_no_run_before_it_was_measured(now):
    assert measured(now, 900, 3.6).advice(4, MODEL, (32, 32), is_fresh=True) == ""
    assert not measured(now, 900, 1.0).is_measured() and measured(now, 900, 2.0).is_measured()


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(7, "0:07"), (723, "12:03"), (12_000, "3 h 20 min"), (86_400 + 5 * 3600, "1 day 5 h"), (200_000, "2 days 7 h")],
)
def test_a_duration_is_told_in_two_units(seconds, text):
    assert duration(seconds) == text
