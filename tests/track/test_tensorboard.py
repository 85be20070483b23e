"""TensorBoard gets every number, picture and hyper-parameter; a full disk is noticed at once."""

import resource
import subprocess
import sys

import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import SessionLog
from tensorboardX.proto.plugin_hparams_pb2 import HParamsPluginData

from igpt.track import tensorboard
from igpt.track.tensorboard import TensorBoard
from tests.helpers import ROOT
from tests.track.read_back import events, of_tensorboard

CONFIG = {"train.steps": 7, "optim.b1": 0.5, "data.flip": True, "data.image_size": (8, 9), "data.source": "digits"}


def test_it_gets_every_number_and_picture_and_each_restart(tmp_path):
    writer = TensorBoard(tmp_path, CONFIG, after=3)
    writer.scalars(4, {"train/loss": 2.5, "perf/images_per_sec": 7.0})
    writer.picture(4, "samples", np.zeros((4, 6, 3), np.uint8))
    writer.summary(4, {"test/accuracy": 0.5})
    writer.close(failed=False)
    version, start, *rest = events(next(tmp_path.glob("events.*")))
    assert version.file_version == "brain.Event:2"
    assert start.step == 4 and start.session_log.status == SessionLog.START
    (samples,) = (value for event in rest for value in event.summary.value if value.tag == "samples")
    assert (samples.image.height, samples.image.width) == (4, 6)
    numbers, pictures, settings = of_tensorboard(tmp_path)
    assert numbers == {(4, "train/loss"): 2.5, (4, "perf/images_per_sec"): 7.0, (4, "test/accuracy"): 0.5}
    assert pictures == {"samples"} and settings == CONFIG | {"data.image_size": "(8, 9)"}


@pytest.mark.parametrize("failed", [False, True])
def test_a_session_is_marked_as_ended_unless_it_failed(tmp_path, failed):
    TensorBoard(tmp_path, CONFIG, after=0).close(failed)
    tags = {value.tag: value for event in events(next(tmp_path.glob("events.*"))) for value in event.summary.value}
    assert ("_hparams_/session_end_info" in tags) != failed
    content = tags["_hparams_/experiment"].metadata.plugin_data.content
    columns = [info.name.tag for info in HParamsPluginData.FromString(content).experiment.metric_infos]
    assert {"eval/loss", "test/accuracy", "probe/accuracy"} <= set(columns)


def test_two_starts_in_one_second_have_a_file_each_even_in_folders_that_end_in_one_bucket(tmp_path):
    names = []
    while len(names) < 2 or names[-1][:10] != names[-2][:10]:  # until two fall into one second
        folder = tmp_path / str(len(names))
        folder.mkdir()
        TensorBoard(folder, CONFIG, after=0).close(failed=False)
        names.append(next(folder.glob("events.*")).name.removeprefix("events.out.tfevents."))
    assert names[-1] != names[-2] and sorted(names) == names


def test_a_kill_loses_nothing_from_before_a_flush(tmp_path):
    writer = TensorBoard(tmp_path, CONFIG, after=0)
    writer.picture(0, "palette", np.zeros((4, 6, 3), np.uint8))  # the next flush is 30 seconds away
    writer.scalars(1, {"train/loss": 2.5})
    assert not of_tensorboard(tmp_path)[0]
    writer.flush()
    assert of_tensorboard(tmp_path)[0] == {(1, "train/loss"): 2.5}
    writer.close(failed=False)


def test_a_full_disk_raises_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(tensorboard, "FLUSH_SECONDS", 0)
    writer = TensorBoard(tmp_path, CONFIG, after=0)
    writer.scalars(1, {"train/loss": 1.0})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (next(tmp_path.glob("events.*")).stat().st_size, before[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            writer.scalars(2, {"train/loss": 1.0})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        writer.close(failed=True)


def test_starting_to_train_imports_no_torch_and_no_tracker():
    heavy = ("torch", "tensorflow", "matplotlib", "wandb", "trackio", "tensorboardX")
    code = f"import sys, train; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    code = "import sys, igpt.track.tensorboard; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
