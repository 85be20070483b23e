import json

import jax
import numpy as np
import pytest

from igpt.metrics import PEAK_FLOPS, Speed, Writer, train_flops_per_image, wilson_interval
from igpt.model import PRESETS, ModelConfig


def lines(path):
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def test_records_are_json_lines_that_survive_a_restart_without_repeats(tmp_path):
    writer = Writer(tmp_path, first_step=0)
    for step in range(1, 6):
        writer.write(step, {"train/loss": np.float32(step)})
    writer.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "train/lo')  # the kill came in the middle of a line
    writer = Writer(tmp_path, first_step=3)
    writer.write(4, {"train/loss": 40.0})
    writer.close()
    assert [(record["step"], record["train/loss"]) for record in lines(tmp_path)] == [(1, 1), (2, 2), (3, 3), (4, 40)]
    assert list(tmp_path.glob("events.*"))


def test_grids_are_written_as_pictures(tmp_path):
    writer = Writer(tmp_path, first_step=0)
    writer.write_samples(7, np.zeros((4, 6, 3), np.uint8))
    writer.close()
    assert (tmp_path / "samples" / "0000007.png").read_bytes().startswith(b"\x89PNG")


def test_only_process_0_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    writer = Writer(tmp_path, first_step=0)
    writer.write(1, {"train/loss": 1.0})
    writer.write_samples(1, np.zeros((4, 6, 3), np.uint8))
    writer.close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("preset", "giga"), [("s", 0.530), ("m", 2.95), ("l", 8.61), ("l48", 9.18), ("xl", 45.3)])
def test_flops_are_six_a_parameter_and_half_the_attention(preset, giga):
    config = ModelConfig(**PRESETS[preset])
    assert np.isclose(train_flops_per_image(config) / config.seq_len / 1e9, giga, rtol=0.005)


def test_speed_is_images_over_time_and_an_unknown_device_has_no_mfu(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("igpt.metrics.time.perf_counter", lambda: now[0])
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


def test_the_interval_is_wilsons():
    np.testing.assert_allclose(wilson_interval(50, 100), (0.4038, 0.5962), atol=1e-4)
    low, high = wilson_interval(100, 100)
    assert 0.96 < low < high <= 1.0
