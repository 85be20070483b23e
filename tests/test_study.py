"""The studies run each part once, and say that a finding holds only if intervals allow it."""

import json
import subprocess
import sys
from ast import literal_eval
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.helpers import ROOT


def literal(text):
    """The value of a flag."""
    try:
        return literal_eval(text)
    except (ValueError, SyntaxError):
        return text


@pytest.fixture
def benchmarks(monkeypatch):
    """Makes the modules of benchmarks/ importable."""
    monkeypatch.setattr(sys, "path", [str(ROOT / "benchmarks"), *sys.path])


@pytest.fixture
def study(benchmarks, tmp_path, monkeypatch):
    """Runs of which every command is kept in a list and leaves its folder."""
    from runs import Runs

    commands = []

    def run(command, check):
        commands.append(command[1:])
        for part in command:
            if part.startswith("--workdir="):
                (tmp_path / part.removeprefix("--workdir=")).mkdir(parents=True)

    monkeypatch.setattr(subprocess, "run", run)
    return lambda **options: (Runs("set", tmp_path, **options), commands)


def test_a_part_that_has_finished_is_not_run_again(study):
    for _ in range(2):
        runs, commands = study(seeds=2)
        runs.train("autoregressive_0", "configs/digits.py", **{"train.steps": 7})
        runs.probe("autoregressive_0", layers=(1, 2))
    assert [command[0] for command in commands] == ["train.py", "eval_probe.py"]
    assert "--config.train.steps=7" in commands[0] and "--config.layers=(1, 2)" in commands[1]
    assert set(runs.seconds()) == {"autoregressive_0", "autoregressive_0/probe"}


def test_only_the_parts_with_a_name_are_run(study):
    runs, commands = study(only="^joint|/probe$")
    for name in ("autoregressive_0", "joint_0", "not_joint_0"):
        runs.train(name, "configs/digits.py")
    runs.probe("autoregressive_0")
    runs.probe("autoregressive_0", "probes")
    assert [command[0] for command in commands] == ["train.py", "eval_probe.py"] and "joint_0" in commands[0][2]


def test_codes_and_pixels_train_and_are_tuned_for_the_same_flops(study):
    from study import run_fashion_codes

    from configs import fashion_mnist, fashion_mnist_codes
    from igpt.config import Config
    from igpt.flops import train_flops_per_image

    runs, commands = study()
    run_fashion_codes(runs)
    configs = {"fashion_mnist_codes": fashion_mnist_codes, "fashion_mnist": fashion_mnist}
    spent = {}
    for command in commands:
        flags = dict(part.removeprefix("--").split("=", 1) for part in command if part.startswith("--"))
        name = Path(flags.get("config", "")).stem
        if command[0] == "train.py" and name in configs:
            config = configs[name].get_config()
            for field, value in flags.items():
                section, _, leaf = field.removeprefix("config.").rpartition(".")
                if section in ("data", "palette", "train") and leaf in config[section]:
                    config[section][leaf] = type(config[section][leaf])(literal(value))
            config = Config.of(config)
            images = config.train.steps * config.train.batch_size
            spent.setdefault("joint" in flags["workdir"], []).append(images * train_flops_per_image(config.model))
    assert len(spent) == 2
    for codes, pixels in spent.values():
        assert pixels == pytest.approx(codes, rel=0.01)


def test_intervals_over_seeds_are_students(benchmarks):
    from study_findings import over_runs

    found = over_runs([1, 2, 3])
    assert found["mean"] == 2
    assert found["interval"] == pytest.approx([2 - 4.303 / 3**0.5, 2 + 4.303 / 3**0.5], rel=1e-3)  # a table's value
    assert over_runs([0.5])["interval"] is None


def probe_of(trained, untrained, raw):
    """The part of a probe.json that the first finding reads."""

    def layer(accuracy, number=0):
        fit = dict(test_accuracy=accuracy, interval=[accuracy - 0.05, accuracy + 0.05], neighbours=accuracy)
        return fit | dict(layer=number, converged=True)

    def network(accuracy):
        layers = [layer(0.1, 0), layer(accuracy, 1)]
        return dict(best_layer=1, test_accuracy=accuracy, layers=layers)

    return dict(pretrained=network(trained), random_init=network(untrained), raw_pixels=layer(raw))


def finish(folder, run, probe, trained, *others):
    """Writes the probes of three seeds, whose accuracies differ a little."""
    for seed, shift in enumerate((-0.01, 0.0, 0.01)):
        place = folder / f"set_{run}_{seed}" / "probe"
        place.mkdir(parents=True)
        (place / "probe.json").write_text(json.dumps(probe(trained + shift, *others)))


@pytest.mark.parametrize(("untrained", "raw", "disjoint"), [(0.5, 0.34, True), (0.84, 0.34, False), (0.5, 0.82, False)])
def test_features_are_above_the_baselines_only_if_the_intervals_are_disjoint(study, tmp_path, untrained, raw, disjoint):
    from study_findings import findings

    runs, _ = study(seeds=3)
    finish(tmp_path, "autoregressive", probe_of, 0.85, untrained, raw)
    found = findings(runs)["1 accuracy by layer"]
    assert found["disjoint"] is disjoint and found["best_layers"] == [1, 1, 1]
    assert found["raw_pixels_interval"] == pytest.approx([raw - 0.05, raw + 0.05])
    assert found["best_pretrained"]["linear"]["mean"] == pytest.approx(0.85)


@pytest.mark.parametrize(("longer", "holds"), [(0.5, "yes"), (0.85, "undecided"), (0.99, "no")])
def test_bert_is_compared_at_equal_compute_and_at_equal_predictions(study, tmp_path, longer, holds):
    from study_findings import findings

    runs, _ = study(seeds=3)
    finish(tmp_path, "autoregressive", probe_of, 0.85, 0.5, 0.3)
    finish(tmp_path, "bert", probe_of, 0.6, 0.5, 0.3)
    assert "3 as many predicted positions" not in findings(runs)
    shifted = iter((longer - 0.02, longer + 0.01, longer + 0.03))
    finish(tmp_path, "bert_longer", lambda _, *others: probe_of(next(shifted), *others), 0, 0.5, 0.3)
    found = findings(runs)
    assert found["3 next pixels against BERT"]["next_pixels_beat_bert_in_the_probe"]["holds"] == "yes"
    compared = found["3 as many predicted positions"]
    assert compared["next_pixels_beat_bert_in_the_probe"]["holds"] == holds
    assert compared["bert_layers"][1]["mean"] == compared["probe"]["BERT"]["mean"]


def test_the_photographs_behind_the_digits_are_cut_once(benchmarks, tmp_path):
    from study import cut_photographs

    cut_photographs(tmp_path / "photographs")
    parts = sorted((tmp_path / "photographs").rglob("*.png"))
    pixels = np.stack([np.asarray(Image.open(part)) for part in parts])
    assert pixels.shape == (48, 106, 106, 3) and len({part.tobytes() for part in pixels}) == 48
    parts[0].unlink()
    cut_photographs(tmp_path / "photographs")
    assert len(list((tmp_path / "photographs").rglob("*.png"))) == 47


def test_tiles_cover_a_photograph_but_for_its_right_edge(benchmarks, tmp_path, monkeypatch):
    import tiles

    rng = np.random.default_rng(0)
    photograph = rng.integers(0, 256, (640, 710, 3), np.uint8)
    Image.fromarray(photograph).save(tmp_path / "one.png")
    Image.fromarray(photograph).resize((400, 320)).save(tmp_path / "two.png")
    files = [str(tmp_path / name) for name in ("one.png", "two.png")]
    monkeypatch.setattr(sys, "argv", ["tiles.py", f"--out={tmp_path / 'tiles'}", *files])
    tiles.main()
    made = sorted((tmp_path / "tiles" / "one").iterdir())
    whole = np.stack([np.asarray(Image.open(path)) for path in made]).reshape(10, 11, 64, 64, 3)
    np.testing.assert_array_equal(whole.transpose(0, 2, 1, 3, 4).reshape(640, 704, 3), photograph[:, :704])
    assert len(list((tmp_path / "tiles" / "two").iterdir())) == 10 * 12  # scaled to 640 x 800
