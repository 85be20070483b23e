import json
import resource
import struct

import jax
import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog

from igpt.flops import PEAK_FLOPS, train_flops_per_image
from igpt.model import ModelConfig
from igpt.run.journal import Speed, Writer


def lines(path):
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def test_records_are_json_lines_that_survive_a_restart_without_repeats(tmp_path):
    writer = Writer(tmp_path, first_step=0)
    for step in range(1, 6):
        writer.write(step, {"train/loss": np.float32(step)})
    writer.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "train/lo')  # killed in the middle of a line
    writer = Writer(tmp_path, first_step=3)
    writer.write(4, {"train/loss": 40.0})
    writer.close()
    assert [(record["step"], record["train/loss"]) for record in lines(tmp_path)] == [(1, 1), (2, 2), (3, 3), (4, 40)]


def test_a_record_whose_line_has_no_end_yet_gets_one(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "train/loss": 1.0}')
    writer = Writer(tmp_path, first_step=1)
    writer.write(2, {"train/loss": 2.0})
    writer.close()
    assert [record["step"] for record in lines(tmp_path)] == [1, 2]


def events(path):
    """The events as TensorBoard reads them. A record is a length, its checksum, an event and its checksum."""
    content, found = path.read_bytes(), []
    while content:
        (length,) = struct.unpack("<Q", content[:8])
        found.append(Event.FromString(content[12 : 12 + length]))
        content = content[16 + length :]
    return found


def test_tensorboard_gets_every_number_and_picture_and_each_restart(tmp_path):
    writer = Writer(tmp_path, first_step=3)
    writer.write(4, {"train/loss": 2.5, "perf/images_per_sec": 7.0})
    writer.write_samples(4, np.zeros((4, 6, 3), np.uint8))
    writer.close()
    version, start, *rest = events(next(tmp_path.glob("events.*")))
    assert version.file_version == "brain.Event:2"
    assert start.step == 4 and start.session_log.status == SessionLog.START
    values = {value.tag: value for event in rest for value in event.summary.value if event.step == 4}
    assert values["train/loss"].simple_value == 2.5 and values["perf/images_per_sec"].simple_value == 7.0
    assert (values["samples"].image.height, values["samples"].image.width) == (4, 6) and len(values) == 3


def test_a_full_disk_under_tensorboard_raises_at_once_but_not_on_closing(tmp_path, monkeypatch):
    monkeypatch.setattr("igpt.run.journal.FLUSH_SECONDS", 0)
    writer = Writer(tmp_path, first_step=0)
    writer.write(1, {"train/loss": 1.0})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (next(tmp_path.glob("events.*")).stat().st_size, before[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            writer.write(2, {"train/loss": 1.0})
        writer.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [record["step"] for record in lines(tmp_path)] == [1, 2]


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


def test_speed_is_images_over_time_and_an_unknown_device_has_no_mfu(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("igpt.run.journal.time.perf_counter", lambda: now[0])
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
