"""What may change when a run resumes: fields by themselves or with a word, and images only with a word."""

import json
import shutil

import pytest
from PIL import Image

from igpt.config import Config
from igpt.data.sources import open_source
from igpt.errors import UserError
from igpt.run import changes
from igpt.run.changes import changed_fields, learning_rate_text, parse_changes, read_splits
from igpt.run.directory import RunDirectory
from tests.helpers import GREY_PALETTE, configured, prepare_settings


def changed(path, allowed=(), **fields):
    fields = {name.replace("__", "."): value for name, value in fields.items()}
    return changed_fields(configured(), configured(**fields), path, allowed)


def test_a_run_of_another_configuration_is_named_field_by_field(tmp_path):
    with pytest.raises(UserError, match=r"(?s)model\.width: 512 there, 256 here.*seed: 0 there, 7 here.*--start_over"):
        changed(tmp_path, model__width=256, seed=7)


def test_an_imported_model_has_no_training_to_resume(tmp_path):
    here = configured()
    imported = Config.of_network(here.model, (8, 8), 1)
    with pytest.raises(UserError, match=rf"holds an imported model.*--config\.init_from={tmp_path} with another"):
        changed_fields(imported, here, tmp_path)


def test_how_a_run_is_carried_out_may_change_when_it_resumes(tmp_path):
    assert changed(tmp_path, mesh__fsdp=2, model__attention="reference", train__log_every=99) == []


def test_arithmetic_may_not_change_without_a_word(tmp_path):
    with pytest.raises(UserError, match=r"model\.attention_dropout: 0\.0 there, 0\.5 here"):
        changed(tmp_path, model__attention_dropout=0.5)  # a name longer than a free one


def test_a_learning_rate_changes_with_the_word_that_the_error_says(tmp_path):
    with pytest.raises(UserError, match="Either add --change=optim.learning_rate to go on") as refusal:
        changed(tmp_path, optim__learning_rate=1e-3)
    assert f"--workdir={tmp_path} alone resumes the run" in str(refusal.value)
    found = changed(tmp_path, parse_changes("config.optim.learning_rate, data"), optim__learning_rate=1e-3)
    assert found == ["optim.learning_rate: 0.003 there, 0.001 here"]
    assert changed(tmp_path, ["optim.learning_rate"]) == []  # a restarted command has the word still


def test_a_word_for_one_field_is_none_for_another(tmp_path):
    with pytest.raises(UserError, match=r"Only optim\.b1 could change, with") as refusal:
        changed(tmp_path, ["optim.learning_rate"], optim__learning_rate=1e-3, optim__b1=0.5, model__width=256)
    assert "learning_rate" not in str(refusal.value)


def test_steps_may_grow_by_themselves_and_shrink_with_a_word(tmp_path):
    assert changed(tmp_path, train__steps=2_000_000) == ["train.steps: 1000000 there, 2000000 here"]
    with pytest.raises(UserError, match="train.steps: 1000000 there, 10 here"):
        changed(tmp_path, train__steps=10)
    assert len(changed(tmp_path, ["train.steps"], train__steps=10)) == 1


@pytest.mark.parametrize("name", ["model.width", "seed", "everything"])
def test_a_word_for_what_cannot_change_is_refused(name):
    with pytest.raises(UserError, match=rf"--change={name}: .* it can change data \(its images\), optim.learning_rate"):
        parse_changes(f"data,{name}")


def test_the_learning_rate_of_longer_training_is_said():
    there = configured(**{"train.steps": 100, "optim.learning_rate": 0.01})
    here = configured(**{"train.steps": 200, "optim.learning_rate": 0.01})
    text = "the learning rate after step 100 is 0.005 instead of 0, and then falls along the cosine to 0 at step 200"
    assert learning_rate_text(there, here, 100) == text
    here = configured(**{"train.steps": 100, "optim.learning_rate": 0.01, "optim.schedule": "constant"})
    assert "is 0.01 instead of 0, and then stays there" in learning_rate_text(there, here, 100)
    assert learning_rate_text(here, here, 100) == ""
    here = configured(**{"train.steps": 800, "optim.learning_rate": 0.01, "optim.warmup_steps": 300})
    assert "then rises to 0.01 at step 300, and then falls along" in learning_rate_text(there, here, 100)


# Images


@pytest.fixture
def photos(tmp_path):
    for name, count in (("ant", 9), ("bee", 12)):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", (5, 7), (i, 0, 0)).save(tmp_path / "photos" / name / f"{i:02d}.png")
    return tmp_path / "photos"


def of_folder(folder, **data):
    fields = prepare_settings(f"folder:{folder}") | data
    return configured(**{f"data.{name}": value for name, value in fields.items()})


def start(workdir, config, allowed=()):
    """Starts a run up to the point where it has written its first files; returns it."""
    run = RunDirectory(workdir, config, allowed=allowed)
    run.same_images(open_source(config.data))
    with run.opened(GREY_PALETTE):
        pass
    return run


def test_a_run_resumes_with_its_images_wherever_they_lie(photos, tmp_path):
    start(tmp_path / "run", of_folder(photos))
    photos.rename(tmp_path / "moved")
    again = start(tmp_path / "run", of_folder(tmp_path / "moved"))
    assert again.is_resumed and again.changed == []
    assert json.loads((tmp_path / "run" / "images.json").read_text())["source"] == f"folder:{tmp_path / 'moved'}"
    assert not (tmp_path / "run" / "changes.jsonl").exists()


def test_backgrounds_that_lie_elsewhere_are_no_other_configuration(tmp_path):
    (tmp_path / "images.json").write_text("{}")
    scattered = {"data.source": "scattered:digits", "data.image_size": (12, 12)}
    there, here = (configured(**scattered, **{"data.scatter_background": place}) for place in ("npz:a", "npz:b"))
    assert changed_fields(there, here, tmp_path) == []


def test_an_added_picture_needs_a_word_and_then_is_recorded(photos, tmp_path, capsys):
    start(tmp_path / "run", of_folder(photos))
    before = {path: path.read_bytes() for path in (tmp_path / "run").iterdir() if path.is_file()}
    shutil.copy(photos / "ant" / "00.png", photos / "ant" / "new.png")
    with pytest.raises(UserError, match=r"(?s)1 file added: ant/new\.png.*--change=data.*splits\.csv"):
        start(tmp_path / "run", of_folder(photos))
    assert {path: path.read_bytes() for path in (tmp_path / "run").iterdir() if path.is_file()} == before
    start(tmp_path / "run", of_folder(photos), ["data"])
    assert "changed  1 file added: ant/new.png" in capsys.readouterr().out
    assert "ant/new.png" in (tmp_path / "run" / "changes.jsonl").read_text()
    assert start(tmp_path / "run", of_folder(photos)).changed == []


def test_the_recorded_splits_keep_old_files_where_they_were(photos, tmp_path):
    start(tmp_path / "run", of_folder(photos))
    there = read_splits(tmp_path / "run" / "splits.csv")
    shutil.copy(photos / "ant" / "00.png", photos / "ant" / "new.png")
    file = tmp_path / "mine.csv"
    file.write_text((tmp_path / "run" / "splits.csv").read_text() + "ant/new.png,train\n")
    run = start(tmp_path / "run", of_folder(photos, split_file=str(file)), ["data"])
    assert run.changed == ["1 file added: ant/new.png"]
    assert read_splits(tmp_path / "run" / "splits.csv") == there | {"ant/new.png": "train"}


def test_another_split_of_the_same_images_needs_a_word(photos, tmp_path):
    start(tmp_path / "run", of_folder(photos))
    with pytest.raises(UserError, match=r"old files in another split; \d+ of them were held out"):
        start(tmp_path / "run", of_folder(photos, split_seed=1))


def test_a_run_of_an_earlier_version_goes_on_and_is_recorded(photos, tmp_path):
    start(tmp_path / "run", of_folder(photos))
    for name in ("images.json", "splits.csv"):
        (tmp_path / "run" / name).unlink()
    with pytest.raises(UserError, match=r"data\.split_seed: 0 there, 1 here"):
        start(tmp_path / "run", of_folder(photos, split_seed=1))
    assert start(tmp_path / "run", of_folder(photos)).changed == [] and (tmp_path / "run" / "images.json").exists()


def test_a_record_of_a_newer_version_is_refused(photos, tmp_path):
    start(tmp_path / "run", of_folder(photos))
    path = tmp_path / "run" / "images.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 2}))
    with pytest.raises(UserError, match="images.json was written by another version"):
        start(tmp_path / "run", of_folder(photos))


def test_a_damaged_record_is_one_message(photos, tmp_path):
    start(tmp_path / "run", of_folder(photos))
    (tmp_path / "run" / "images.json").write_text(json.dumps({"format": 1, "splits": [], "sizes": {}}))
    with pytest.raises(UserError, match="images.json is damaged; restore it from a copy, or delete it"):
        start(tmp_path / "run", of_folder(photos))


def test_hosts_that_see_other_images_are_refused(photos, tmp_path, monkeypatch):
    run = RunDirectory(tmp_path / "run", of_folder(photos))
    source = open_source(run.config.data)
    monkeypatch.setattr("igpt.run.directory.broadcast", lambda digest: digest + 1)  # what process 0 sees
    with pytest.raises(UserError, match="does not hold the same images on every host"):
        run.same_images(source)


def test_only_process_0_knows_what_changed(photos, tmp_path, monkeypatch):
    start(tmp_path / "run", of_folder(photos))
    answers = iter([True, False])  # the hosts see the same images; process 0 says that they changed
    run = RunDirectory(tmp_path / "run", of_folder(photos))
    monkeypatch.setattr("igpt.run.directory.all_processes", lambda mine: next(answers))
    with pytest.raises(UserError, match="process 0 compared them"):
        run.same_images(open_source(run.config.data))


def test_names_that_are_no_text_are_recorded(photos, tmp_path):
    source = open_source(of_folder(photos).data)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(changes, "split_lines", lambda source: "caf\udce9.png,train\na,b.png,test\n")
        changes.record_images(tmp_path, source, {"format": 1})
    assert read_splits(tmp_path / "splits.csv") == {"caf\udce9.png": "train", "a,b.png": "test"}
    assert (tmp_path / "splits.csv").read_bytes() == b"caf\xe9.png,train\na,b.png,test\n"
