"""The studies run each part once, and say that a finding holds only if intervals allow it."""

import json
import subprocess
import sys
from ast import literal_eval
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from igpt.errors import UserError
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


def test_a_part_that_finished_with_other_settings_is_not_taken_for_this_one(study):
    runs, commands = study()
    runs.train("joint_0", "configs/digits.py", **{"train.steps": 7, "seed": 1})
    with pytest.raises(UserError, match=r"joint_0 has finished with other settings: .*steps=7.*, and now .*steps=8"):
        runs.train("joint_0", "configs/digits.py", **{"train.steps": 8, "seed": 1})
    runs.train("joint_0", "configs/digits.py", **{"seed": 1, "train.steps": 7})
    runs.only = "^scratch"
    runs.train("joint_0", "configs/digits.py", **{"train.steps": 8})  # not asked for
    assert len(commands) == 1


def test_a_study_may_be_moved_and_its_folder_may_have_a_space(study, tmp_path):
    from runs import Runs

    runs, commands = study()
    moved = Runs("set", tmp_path / "a folder")
    for some in (runs, moved):
        some.train("joint_0", "configs/digits.py", **{"init_from": some.path("autoregressive_0")})
    assert f"--workdir={tmp_path}/a folder/set_joint_0" in commands[1]
    (moved.path("joint_0") / "finished").write_text((runs.path("joint_0") / "finished").read_text())
    moved.train("joint_0", "configs/digits.py", **{"init_from": moved.path("autoregressive_0")})
    assert len(commands) == 2


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
    assert found["disjoint"] is disjoint and found["best_pretrained"]["layers"] == [1, 1, 1]
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


def test_runs_are_compared_by_their_seed_and_not_by_their_position(study, tmp_path):
    from study_findings import findings

    runs, _ = study(seeds=3)
    finish(tmp_path, "autoregressive", probe_of, 0.85, 0.5, 0.3)
    finish(tmp_path, "bert", probe_of, 0.6, 0.5, 0.3)
    (tmp_path / "set_autoregressive_0" / "probe" / "probe.json").unlink()
    compared = findings(runs)["3 next pixels against BERT"]["next_pixels_beat_bert_in_the_probe"]
    assert compared["difference"]["values"] == pytest.approx([0.25, 0.25])


def test_a_comparison_of_which_one_side_has_not_run_is_left_out(study, tmp_path):
    from study_findings import findings

    runs, _ = study(seeds=1)
    for name in ("joint", "classes", "scratch"):
        place = tmp_path / f"set_{name}_0"
        place.mkdir()
        (place / "finetune.json").write_text(json.dumps({"test_accuracy": 0.5, "interval": [0.4, 0.6]}))
    assert "fine-tuning_beats_the_probe" not in findings(runs)["4 fine-tuning"]


def test_a_longer_run_in_colour_is_told_without_the_shorter_one(study, tmp_path):
    from study_findings import findings

    runs, _ = study(seeds=3)
    finish(tmp_path, "color_longer", probe_of, 0.85, 0.5, 0.3)
    (tmp_path / "set_color_longer_0" / "metrics.jsonl").write_text('{"train/loss": 1.0, "eval/loss": 2.0}\n')
    losses = findings(runs)["7 in colour, on photographs, longer"]["last_losses"]
    assert losses == {"color_longer": {"train/loss": 1.0, "eval/loss": 2.0}}


def test_equally_accurate_checkpoints_have_the_same_rank(study, tmp_path):
    from study_findings import findings

    runs, _ = study(seeds=1)
    steps = [dict(step=i, validation_loss=loss, test_accuracy=0.5) for i, loss in enumerate((3.0, 2.0, 1.0))]
    place = tmp_path / "set_autoregressive_0" / "probes"
    place.mkdir(parents=True)
    steps[0]["test_accuracy"] = 0.4
    (place / "probe.json").write_text(json.dumps({"checkpoints": steps}))
    found = findings(runs)["2 accuracy against validation loss"]["rank_correlation"]
    assert found["mean"] == pytest.approx(-(0.75**0.5))


def test_a_summary_needs_no_images(benchmarks, tmp_path, monkeypatch):
    import study

    flags = [f"--workdir={tmp_path}", f"--out={tmp_path}", "--data=fashion_mnist", "--summarize"]
    monkeypatch.setattr(sys, "argv", ["study.py", *flags])
    study.main()
    assert json.loads((tmp_path / "study_fashion_mnist.json").read_text())["findings"] == {}
    monkeypatch.setattr(sys, "argv", ["study.py", *flags[:-1]])
    with pytest.raises(UserError, match="--idx is missing"):
        study.main()


def test_every_benchmark_that_reads_a_config_finds_the_configs():
    for script in (ROOT / "benchmarks").glob("*.py"):
        path, found, _ = script.read_text().partition("\nfrom configs import ")
        assert not found or "sys.path.insert(0, " in path, f"{script.name} cannot import configs"


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
