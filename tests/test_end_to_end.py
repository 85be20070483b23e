"""From images to a probe, samples and completions, through the commands a user types."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

import eval_probe
import train
from configs import digits, probe_digits
from igpt.__main__ import main as run_igpt


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A shrunk digits run, trained just enough to be better than chance."""
    config = digits.get_config()
    config.model.update(width=32, depth=2, num_heads=2)
    config.train.update(steps=60, batch_size=32, eval_every=60, eval_batch_size=40, sample_every=60, num_samples=4)
    config.train.checkpoint_every = 60
    config.optim.warmup_steps = 5
    config.mesh.cpu_devices = 0
    workdir = tmp_path_factory.mktemp("end_to_end") / "run"
    train.run(config, workdir)
    return workdir


def test_sampling_needs_only_the_run_directory(trained, tmp_path):
    """The package and the run are enough: no train.py, no configs/, no data set."""
    moved = tmp_path / "moved"
    shutil.copytree(trained, moved)
    command = [sys.executable, "-m", "igpt", "sample", f"--model={moved}", "--num=3", f"--out={tmp_path}/samples.png"]
    environment = {"PATH": "/usr/bin:/bin", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    picture = np.asarray(Image.open(tmp_path / "samples.png"))
    assert picture.shape == (2 * 66 + 2, 2 * 66 + 2, 3)


def test_photos_of_any_size_are_completed(trained, tmp_path):
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 70, 3), np.uint8)).save(tmp_path / "photo.jpg")
    out = tmp_path / "completions.png"
    run_igpt(
        ["sample", f"--model={trained}", f"--complete={tmp_path}/photo.jpg", "--num=3", "--keep=0.25", f"--out={out}"]
    )
    picture = np.asarray(Image.open(out))
    assert picture.shape == (66 + 2, 5 * 66 + 2, 3)
    shown, first, original = (picture[2:66, 2 + 66 * i : 66 + 66 * i] for i in (0, 1, 4))
    np.testing.assert_array_equal(shown[:16], original[:16])
    np.testing.assert_array_equal(first[:16], original[:16])
    assert (shown[16:] == 255).all()


def test_held_out_images_are_completed(trained, tmp_path):
    run_igpt(["sample", f"--model={trained}", "--complete=test", "--images=2", "--num=1", f"--out={tmp_path}/c.png"])
    assert np.asarray(Image.open(tmp_path / "c.png")).shape == (2 * 66 + 2, 3 * 66 + 2, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model=absent"], "no directory absent"),
        (["--num=0"], "--num is 0"),
        (["--step=7"], "no checkpoint of step 7; it has [60]"),
        (["--complete=absent.png"], "no image absent.png"),
        (["--temperature=-1"], "temperature is -1.0"),
        (["--keep=1.5", "--complete=test"], "keep is 1.5"),
    ],
)
def test_a_mistake_in_sampling_ends_in_one_message_and_exit_code_2(trained, tmp_path, capsys, arguments, message):
    with pytest.raises(SystemExit) as stopped:
        run_igpt(["sample", f"--model={trained}", f"--out={tmp_path}/s.png", *arguments])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "s.png").exists()


def test_the_probe_reports_every_layer_beside_its_baselines(trained, tmp_path):
    config = probe_digits.get_config()
    config.inverse_penalties = (0.1,)
    results = eval_probe.run(config, trained, tmp_path / "probe")
    assert json.loads((tmp_path / "probe" / "probe.json").read_text())["step"] == 60
    assert (tmp_path / "probe" / "probe.png").exists()
    for name in ("pretrained", "random_init"):
        assert [layer["layer"] for layer in results[name]["layers"]] == [0, 1, 2]
    best = results["pretrained"]["test_accuracy"]
    assert best > results["random_init"]["test_accuracy"] + 0.05 and best > 0.5
    assert results["raw_pixels"]["test_accuracy"] > 0.9
    assert results["images"] == {"train": 1258, "validation": 180, "test": 359}
    printed = eval_probe.table(results)
    assert "raw pixels" in printed and "<- best on validation" in printed
