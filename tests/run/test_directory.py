"""A run's directory: fresh, resumed or set aside, and what it writes."""

import json

import jax.numpy as jnp
import pytest

from igpt.data.classes import load_names
from igpt.errors import StorageError, UserError
from igpt.files import as_path
from igpt.lock import InUseError, lock_files
from igpt.run.checkpoint import Checkpoints, Progress
from igpt.run.directory import RunDirectory, check_start_over, load_config, locked, save_config
from igpt.sharding import make_mesh
from igpt.state import TrainState, build_program
from tests.helpers import GREY_PALETTE, configured


def test_looking_at_a_directory_writes_nothing(tmp_path):
    run = RunDirectory(tmp_path / "run", configured())
    assert (
        not run.is_resumed and run.tokenizer() is None and run.restore(build_program(run.config, make_mesh())) is None
    )
    assert list(tmp_path.iterdir()) == []


def test_an_opened_run_is_resumed_the_next_time(tmp_path):
    with RunDirectory(tmp_path / "run", configured()).opened(GREY_PALETTE):
        assert {path.name for path in (tmp_path / "run").iterdir()} == {"config.json", "palette.npy", "checkpoints"}
    run = RunDirectory(tmp_path / "run", configured())
    assert run.is_resumed and (run.tokenizer().centers == GREY_PALETTE.centers).all()


def test_a_whole_bucket_is_not_renamed():
    with pytest.raises(UserError, match="gs://mine is a whole bucket"):
        check_start_over(as_path("gs://mine"))


def test_the_names_of_the_classes_are_there_before_the_config(tmp_path, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("igpt.run.directory.save_config", killed)
    run = RunDirectory(tmp_path / "run", configured())
    with pytest.raises(KeyboardInterrupt), run.opened(GREY_PALETTE, ("ant", "bee")):
        pass
    assert load_names(tmp_path / "run") == ("ant", "bee")


def test_starting_over_renames_the_earlier_run(tmp_path, capsys):
    for _ in range(3):
        with RunDirectory(tmp_path / "run", configured(), start_over=True).opened(GREY_PALETTE):
            pass
    assert {path.name for path in tmp_path.iterdir()} == {"run", "run.old-1", "run.old-2"}
    assert "renamed the earlier run" in capsys.readouterr().out


def test_the_current_directory_is_renamed_and_the_new_run_takes_its_place(tmp_path, monkeypatch):
    (tmp_path / "run").mkdir()
    monkeypatch.chdir(tmp_path / "run")
    for steps in (7, 9):
        config = configured(**{"train.steps": steps})
        with locked(".") as lock:
            run = RunDirectory(".", config, start_over=True, lock=lock)
            with run.opened(GREY_PALETTE):
                run.check_lock()
    assert load_config(tmp_path / "run.old-1").train.steps == 7
    assert load_config(tmp_path / "run").train.steps == 9


def test_of_a_link_the_folder_is_renamed_so_that_the_new_run_lies_where_it_points(tmp_path):
    (tmp_path / "disk" / "run").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "run")
    for steps in (7, 9):
        config = configured(**{"train.steps": steps})
        with locked(tmp_path / "link") as lock:
            run = RunDirectory(tmp_path / "link", config, start_over=True, lock=lock)
            with run.opened(GREY_PALETTE):
                run.check_lock()
    assert (tmp_path / "link").is_symlink()
    assert load_config(tmp_path / "disk" / "run.old-1").train.steps == 7
    assert load_config(tmp_path / "disk" / "run").train.steps == 9


def test_a_run_that_starts_over_keeps_its_lock(tmp_path):
    for number in (0, 1):
        with locked(tmp_path / "run") as lock:
            run = RunDirectory(tmp_path / "run", configured(), start_over=True, lock=lock)
            with run.opened(GREY_PALETTE):
                assert lock_files(tmp_path / "run") == [lock.path]
                run.check_lock()
        assert len(list(tmp_path.iterdir())) == 1 + number  # with only the lock's file there is no earlier run
        assert not list(tmp_path.rglob("running-*"))


def test_the_second_of_two_runs_in_a_directory_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("igpt.lock.CONTEND", 0.0)
    with locked(tmp_path / "run"):
        with pytest.raises(InUseError, match="in use by process"), locked(tmp_path / "run"):
            pass
        monkeypatch.setattr("igpt.run.directory.is_first_process", lambda: False)
        monkeypatch.setattr("igpt.run.directory.all_processes", lambda mine: False)
        with pytest.raises(InUseError, match="message of process 0"), locked(tmp_path / "run"):
            pass


def test_checkpoints_without_a_config_need_a_word_from_the_user(tmp_path):
    with Checkpoints(tmp_path, 1) as checkpoints:
        checkpoints.save(TrainState(jnp.int32(1), {"w": jnp.ones(3)}, {"m": jnp.zeros(3)}), 1)
    with pytest.raises(UserError, match="checkpoints but no config.json; --start_over"):
        RunDirectory(tmp_path, configured())


def test_a_folder_of_other_things_is_not_renamed(tmp_path):
    (tmp_path / "train.py").touch()
    with pytest.raises(UserError, match="holds train.py, but no run to start over; name another directory"):
        RunDirectory(tmp_path, configured(), start_over=True)


def test_an_evaluation_is_missing_only_where_one_was_due(tmp_path):
    run = RunDirectory(tmp_path, configured(**{"train.eval_every": 3, "train.steps": 10}))
    for first, evaluated, missing in ((3, 0, True), (3, 3, False), (4, 3, False), (10, 9, True), (0, 0, False)):
        run.first_step, run.progress = first, Progress(evaluated_step=evaluated)
        assert run.evaluation_is_missing == missing


def test_a_run_whose_patience_is_over_has_no_steps_left(tmp_path):
    fine_tuning = {"train.patience": 2, "objective.classification": 1.0, "model.num_classes": 3}
    run = RunDirectory(tmp_path, configured(**fine_tuning))
    run.first_step = 7
    assert run.last_step == run.config.train.steps
    run.progress.evaluations_since = 2
    assert run.has_ended_early and run.last_step == 7


def test_a_disk_error_while_opening_is_a_storage_error(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("igpt.run.directory.save_config", full)
    run = RunDirectory(tmp_path / "run", configured())
    with pytest.raises(StorageError, match="No space left on device"), run.opened(GREY_PALETTE):
        pass


def test_a_config_is_equal_after_its_file(tmp_path):
    save_config(configured(), tmp_path)
    assert load_config(tmp_path) == configured()


def test_an_earlier_configs_unused_spike_sigma_is_dropped(tmp_path):
    content = configured().to_dict()
    for value, loads in ((0.0, True), (6.0, False)):
        content["optim"]["spike_sigma"] = value
        (tmp_path / "config.json").write_text(json.dumps(content))
        if loads:
            assert load_config(tmp_path) == configured()
        else:
            with pytest.raises(UserError, match=r"optim\.spike_sigma is no field"):
                load_config(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot be read as JSON"),
        ("[]", "an object is needed"),
        ("{}", "it has no data, palette, model"),
        ('{"data": 3, "palette": 3, "model": 3}', "data is 3; a section of fields is needed"),
    ],
)
def test_a_damaged_config_is_one_message(tmp_path, text, message):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=message):
        load_config(tmp_path)


@pytest.mark.parametrize("field", ["model.rotary", "train.newest", "data.newest", "newest"])
def test_a_field_of_a_newer_version_is_named_with_its_place(tmp_path, field):
    content = configured().to_dict()
    section, _, name = field.rpartition(".")
    (content[section] if section else content)[name] = 3
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=rf"config.json is damaged, or was written by another version.*{field} is no"):
        load_config(tmp_path)


def test_a_directory_without_a_config_is_no_run(tmp_path):
    with pytest.raises(UserError, match="is not a run directory: it has no config.json"):
        load_config(tmp_path)
