"""What TensorBoard, W&B and trackio keep of pretraining, fine-tuning and a probe is what metrics.jsonl has.

With the real packages: pip install -e ".[test,wandb,trackio]". W&B is offline, and trackio's store is in a new folder.
"""

import json
import os
import subprocess
import sys

import pytest

from tests.helpers import ROOT
from tests.track.read_back import as_float32, of_lines, of_tensorboard, of_trackio, of_wandb

ALL = "--config.track=('tensorboard','wandb','trackio')"
SMALL = [
    *("--config.model.width=16", "--config.model.depth=2", "--config.train.batch_size=8", "--config.train.steps=8"),
    *("--config.train.log_every=1", "--config.train.eval_every=4", "--config.train.checkpoint_every=4"),
    "--config.optim.warmup_steps=2",
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with one run of pretraining, killed and resumed, one of fine-tuning, and one probe."""
    folder = tmp_path_factory.mktemp("tracked")
    own = {"WANDB_MODE": "offline", "TRACKIO_DIR": str(folder / "trackio"), "JAX_PLATFORMS": "cpu"}

    def start(script, *flags):
        command = [sys.executable, script, *flags, ALL]
        done = subprocess.run(command, cwd=ROOT, env=os.environ | own, capture_output=True, text=True, timeout=1200)
        return done.returncode, done.stdout + done.stderr

    pretraining = [f"--workdir={folder}/pretrained", "--config=configs/digits.py", *SMALL]
    killed = "import os, sys, time, train; from igpt.track.trackers import Trackers; real = Trackers.scalars\n"
    killed += "def scalars(self, step, values):\n    real(self, step, values)\n    step == 6 and leave()\n"
    killed += "def leave():\n    while '4' not in os.listdir(f'{sys.argv[1][10:]}/checkpoints'): time.sleep(0.1)\n"
    killed += "    time.sleep(3)\n    os._exit(9)\n"
    killed += "Trackers.scalars = scalars; train.main()"
    code, output = start("-c", killed, *pretraining)
    assert code == 9, output
    tuning = ["--config=configs/finetune_digits.py", f"--config.init_from={folder}/pretrained", *SMALL]
    tuning += [f"--workdir={folder}/tuned", "--config.optim.warmup_steps=0"]
    probing = ["--config=configs/probe.py", f"--model={folder}/pretrained", f"--workdir={folder}/probe"]
    probing += ["--config.inverse_penalties=(0.1,)", "--config.steps=all", "--config.baselines=False"]
    for script, flags in (("train.py", pretraining), ("train.py", tuning), ("eval_probe.py", probing)):
        code, output = start(script, *flags)
        assert code == 0 and "warning: " not in output, output
    return folder


EXPECTED = {
    "pretrained": ({"palette", "samples"}, {"train/loss", "eval/loss", "eval/bits_per_dim"}, ("optim.b2", 0.95)),
    "tuned": ({"palette", "confusion"}, {"eval/accuracy", "test/accuracy", "test/step"}, ("model.num_classes", 10)),
    "probe": ({"probe"}, {"probe/accuracy_layer_02", "probe/accuracy", "probe/best_layer"}, ("sgd.steps", 2000)),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", EXPECTED)
def test_every_tracker_has_the_numbers_of_metrics_jsonl_the_pictures_and_the_settings(runs, name):
    pictures, names, (field, value) = EXPECTED[name]
    lines = of_lines(runs / name)
    identity = json.loads((runs / name / "trackers.json").read_text())["trackio"]
    assert names <= {name for _, name in lines}
    for kept, expected in (
        (of_tensorboard(runs / name), as_float32(lines)),
        (of_wandb(runs / name), lines),
        (of_trackio(runs / "trackio" / "igpt.db", identity), lines),
    ):
        # The killed start measured the speed of step 5. The resumed one cannot: it is its first step.
        assert kept[0].keys() - expected.keys() <= {(5, "perf/images_per_sec")}
        assert {key: kept[0].get(key) for key in expected} == expected
        assert kept[1] == pictures
        assert kept[2][field] == value


@pytest.mark.slow
def test_a_killed_run_goes_on_under_its_own_id(runs):
    files = list((runs / "pretrained" / "wandb").glob("offline-run-*/run-*.wandb"))
    known = json.loads((runs / "pretrained" / "trackers.json").read_text())
    assert len(files) == 2 and {path.stem for path in files} == {f"run-{known['wandb']}"}
    assert {step for step, name in of_lines(runs / "pretrained") if name == "train/loss"} == set(range(1, 9))
