import json
import shutil
import subprocess
import sys
from types import SimpleNamespace
from unittest import mock

import jax
import numpy as np
import pytest

import train
from igpt import state, tasks
from igpt.config import Config
from igpt.data.examples import Source
from igpt.errors import UserError
from tests.helpers import ROOT, losses, records


def test_a_run_leaves_everything_that_it_promises(tiny_config, tmp_path, capsys):
    evaluation = train.run(tiny_config, tmp_path / "run").evaluation
    names = {path.name.split(".")[0] for path in (tmp_path / "run").iterdir()}
    assert names == {"config", "images", "palette", "checkpoints", "metrics", "events", "samples"}
    assert not list((tmp_path / "run").rglob("*.partial"))
    assert abs(losses(tmp_path / "run")[1] - np.log(17)) < 1e-5
    assert losses(tmp_path / "run")[6] < 2.7
    assert records(tmp_path / "run")[-1] == {"step": 6} | evaluation
    assert evaluation["eval/bits_per_dim"] == pytest.approx(evaluation["eval/loss"] / np.log(2))
    output = capsys.readouterr().out
    assert "the next pixel: 6 steps of 8 images" in output
    for shown in ("attention chunked", "float32", "1258 images", "mesh data 8", "eval_probe.py", "igpt sample"):
        assert shown in output


def test_a_run_without_labels_does_not_propose_a_probe(tiny_config, write_npz, tmp_path, capsys):
    images = np.random.default_rng(0).integers(0, 256, (60, 8, 8), np.uint8)
    tiny_config.data.source = f"npz:{write_npz(images=images)}"
    tiny_config.train.update(steps=1, num_samples=0)
    train.run(tiny_config, tmp_path / "run")
    output = capsys.readouterr().out
    assert "igpt sample" in output and "eval_probe.py" not in output


def test_bert_learns_dropped_pixels_from_ln_v_down_and_draws_no_samples(tiny_config, tmp_path, capsys):
    tiny_config.model.update(causal=False, depth=1)
    evaluation = train.run(tiny_config, tmp_path / "run").evaluation
    found = losses(tmp_path / "run")
    assert abs(found[1] - np.log(17)) < 1e-5 and max(found[5], found[6], evaluation["eval/loss"]) < found[1] - 0.1
    assert evaluation.keys() == {"eval/loss"}  # BERT has no likelihood, so no bits per dimension
    assert not (tmp_path / "run" / "samples").exists()
    output = capsys.readouterr().out
    assert "15% of the pixels, dropped (BERT): 6 steps of 8 images" in output
    assert "samples:" not in output and "igpt sample" not in output and "eval_probe.py" in output


@pytest.mark.parametrize(("fields", "draws"), [({}, 1), ({"sos": False}, 0), ({"causal": False}, 0)], ids=str)
def test_only_a_network_with_sos_draws_samples_while_it_trains(tiny_config, monkeypatch, fields, draws):
    tiny_config.model.update(fields)
    drawn = []
    monkeypatch.setattr(train.nnx, "merge", lambda *_: None)
    monkeypatch.setattr(tasks, "sample_images", lambda *_: drawn.append(1) or np.zeros((3, 8, 8, 3), np.uint8))
    run = SimpleNamespace(progress=SimpleNamespace(evaluated_step=6), has_ended_early=False)
    config, others = Config.of(tiny_config, trains=True), [mock.MagicMock(**{"requested.return_value": False})] * 5
    others[1] = mock.MagicMock(spec=Source)
    train.Evaluator(config, run, *others)({}, step=6)
    assert len(drawn) == draws


def test_a_finished_run_is_neither_compiled_nor_trained_further(
    tiny_config, finished_run, tmp_path, capsys, monkeypatch
):
    before = records(tmp_path / "run")
    capsys.readouterr()
    monkeypatch.setattr(state.TrainProgram, "compile_ahead", lambda *batches: pytest.fail("compiled"))
    train.run(tiny_config, tmp_path / "run")
    assert records(tmp_path / "run") == before
    output = capsys.readouterr().out
    assert "already finished its 6 steps" in output and "--config.train.steps=12" in output


def test_a_finished_run_goes_on_to_more_steps_at_another_rate(tiny_config, finished_run, tmp_path, capsys):
    tiny_config.train.steps = 8
    tiny_config.optim.update(learning_rate=1e-3, schedule="constant")
    with pytest.raises(UserError, match="add --change=optim.learning_rate,optim.schedule to go on"):
        train.run(tiny_config, tmp_path / "run")
    train.run(tiny_config, tmp_path / "run", allowed=["optim.learning_rate", "optim.schedule"])
    assert "the learning rate after step 6 is 0.001 instead of 0, and then stays there" in capsys.readouterr().out
    rates = {record["step"]: record["train/learning_rate"] for record in records(tmp_path / "run") if len(record) > 4}
    assert sorted(rates) == list(range(1, 9)) and rates[6] < rates[2] and rates[7] == rates[8] == pytest.approx(1e-3)
    with pytest.raises(UserError, match="train.steps is 7, but .* has already learned 8 steps"):
        tiny_config.train.steps = 7
        train.run(tiny_config, tmp_path / "run", allowed=["train.steps"])


def test_metrics_of_a_step_are_read_only_after_the_next_was_dispatched(tiny_config, tmp_path, monkeypatch):
    events = []
    real_get, real_make = jax.device_get, state.make_train_step

    def make(*args, **kwargs):
        step = real_make(*args, **kwargs)

        def dispatch(state, batch):
            events.append("dispatch")
            return step(state, batch)

        dispatch.lower = step.lower
        return dispatch

    def get(values):
        if isinstance(values, dict) and "train/loss" in values:
            events.append("read")
        return real_get(values)

    monkeypatch.setattr(state, "make_train_step", make)
    monkeypatch.setattr(jax, "device_get", get)
    tiny_config.train.update(steps=4, eval_every=9, sample_every=9, checkpoint_every=9, num_samples=0)
    train.run(tiny_config, tmp_path / "run")
    assert events == ["dispatch", "dispatch", "read", "dispatch", "read", "dispatch", "read", "read"]


def test_another_run_is_left_alone_without_start_over(tiny_config, finished_run, tmp_path):
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    tiny_config.seed = 1
    with pytest.raises(UserError, match="another configuration"):
        train.run(tiny_config, tmp_path / "run")
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before
    train.run(tiny_config, tmp_path / "run", start_over=True)
    aside = {tmp_path / "run" / path.relative_to(tmp_path / "run.old-1"): path.read_bytes()
             for path in (tmp_path / "run.old-1").rglob("*") if path.is_file()}  # fmt: skip
    assert aside == before
    assert json.loads((tmp_path / "run" / "config.json").read_text())["seed"] == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train.batch_size": 12}, "batch_size 12 does not divide into 8"),
        ({"mesh.fsdp": 3}, "mesh .* devices, but there are 8"),
        ({"palette.colors": 512}, "only 17 different colours; set palette.colors=17"),
        ({"data.image_size": (28, 28)}, r"images of 8 x 8 .* --config\.data\.image_size='\(8,8\)'"),
        ({"data.channels": 3}, "data.channels=1"),
        ({"model.attention": "cudnn"}, "needs an NVIDIA GPU"),
        ({"data.source": "npz:absent.npz"}, "no file absent.npz"),
        ({"data.pad_mode": "wrap"}, "'wrap'; choose constant"),
        ({"init_from": "absent"}, "absent"),
        ({"optim.learning_rate": 0.0}, "learning_rate is 0.0"),
        ({"model.attention_dropout": 0.1}, "'chunked' back end cannot"),
    ],
)
def test_a_mistake_is_refused_before_anything_is_written(tiny_config, tmp_path, changes, message):
    tiny_config.update_from_flattened_dict(changes)
    with pytest.raises(UserError, match=message):
        train.run(tiny_config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_workdir_that_cannot_hold_a_run_is_refused(tiny_config, tmp_path):
    (tmp_path / "file").write_text("hello")
    for workdir, message in (
        (tmp_path / "file" / "run", "no writable folder"),
        ("az://bucket/run", "begin with gs://"),
    ):
        with pytest.raises(UserError, match=message):
            train.run(tiny_config, workdir)


def test_checkpoints_without_a_config_are_neither_resumed_nor_replaced(tiny_config, finished_run, tmp_path):
    (tmp_path / "run" / "config.json").unlink()
    with pytest.raises(UserError, match="checkpoints but no config.json"):
        train.run(tiny_config, tmp_path / "run")
    train.run(tiny_config, tmp_path / "run", start_over=True)
    assert (tmp_path / "run.old-1" / "checkpoints" / "6").is_dir()


def test_a_start_from_a_run_without_checkpoint_is_refused(tiny_config, finished_run, tmp_path):
    shutil.rmtree(finished_run / "checkpoints")
    tiny_config.init_from = str(finished_run)
    with pytest.raises(UserError, match="no finished checkpoint yet"):
        train.run(tiny_config, tmp_path / "second")
    assert not (tmp_path / "second").exists()


def test_a_run_resumes_when_the_run_it_started_from_is_gone(tiny_config, finished_run, tmp_path):
    tiny_config.init_from = str(finished_run)
    train.run(tiny_config, tmp_path / "second")
    shutil.rmtree(finished_run)
    train.run(tiny_config, tmp_path / "second")


def test_a_palette_file_of_the_wrong_size_is_refused(tiny_config, tmp_path):
    np.save(tmp_path / "palette.npy", np.zeros((5, 3), np.float32))
    tiny_config.palette.path = str(tmp_path / "palette.npy")
    with pytest.raises(UserError, match=r"has 5 colours, but palette\.colors is 17"):
        train.run(tiny_config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_run_starts_from_the_weights_and_the_palette_of_another(tiny_config, finished_run, tmp_path):
    tiny_config.init_from = str(finished_run)
    tiny_config.train.steps = 3
    train.run(tiny_config, tmp_path / "second")
    assert losses(tmp_path / "second")[1] < losses(finished_run)[1] - 0.1
    tiny_config.model.width = 24
    with pytest.raises(UserError, match="another network: width is 20 there, 24 here"):
        train.run(tiny_config, tmp_path / "third")
    assert not (tmp_path / "third").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--config=configs/digits.py", "--workdir=RUN", "--config.model.widht=3"],
            "there is no field 'widht'; did you mean 'width'?",
        ),
        (["--config=configs/digits.py"], "arguments are required: --workdir"),
        (["--config=configs/probe_digits.py", "--workdir=RUN"], "no training configuration"),
    ],
)
def test_a_mistake_on_the_command_line_ends_in_one_message_and_exit_code_2(
    tmp_path, monkeypatch, capsys, arguments, message
):
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as stopped:
        train.main([argument.replace("RUN", str(tmp_path / "run")) for argument in arguments])
    assert stopped.value.code == 2
    output = capsys.readouterr()
    assert message in output.err and output.err.startswith("error: ") and not output.out
    assert not (tmp_path / "run").exists()


def test_a_mistake_ends_the_program_without_a_traceback(tmp_path):
    flags = ["--config=configs/digits.py", f"--workdir={tmp_path / 'run'}", "--config.train.accumulate=3"]
    done = subprocess.run([sys.executable, "train.py", *flags], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2, done.stderr
    assert "batch_size 16" in done.stderr and done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr + done.stdout
    assert not (tmp_path / "run").exists()


def test_help_shows_examples_and_flags():
    done = subprocess.run([sys.executable, "train.py", "--help"], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0
    for shown in ("python train.py --config=configs/digits.py", "--workdir", "--start_over", "configs/base.py"):
        assert shown in done.stdout


def test_steps_of_the_users_choice_are_profiled(tiny_config, tmp_path):
    tiny_config.train.update(steps=3, profile_at=2, eval_every=3, num_samples=0)
    train.run(tiny_config, tmp_path / "run")
    assert list((tmp_path / "run" / "profile").rglob("*.xplane.pb"))
    tiny_config.train.profile_at = 9  # never
    train.run(tiny_config, tmp_path / "none")
    assert not (tmp_path / "none" / "profile").exists()
