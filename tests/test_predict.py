"""`igpt predict`: the classes of image files."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import igpt
from igpt.__main__ import main as run_igpt
from igpt.data.classes import FILE
from igpt.errors import UserError
from igpt.evaluate import evaluate
from igpt.interop.export import export
from igpt.predict import best_classes, predict
from tests.helpers import pretrained_and_split, write_run_config


@pytest.fixture
def pictures(named_run, tmp_path):
    """The first nine images of the run as PNG files, and the run's own probabilities for them [9, 3]."""
    run, images, _ = named_run
    paths = [str(tmp_path / f"{i}.png") for i in range(9)]
    for path, image in zip(paths, images, strict=False):
        Image.fromarray(image).save(path)
    pretrained = igpt.load(run)
    tokens = pretrained.tokenizer.encode(images[:9, ..., None].repeat(3, -1)).reshape(9, -1)
    logits = np.asarray(pretrained.model.classify(jnp.asarray(tokens)), np.float64)
    shares = np.exp(logits - logits.max(1, keepdims=True))
    return paths, shares / shares.sum(1, keepdims=True)


def predicted(model, out, *arguments):
    run_igpt(["predict", f"--model={model}", f"--json={out}", *arguments])
    return json.loads(out.read_text())


def test_files_get_the_names_and_probabilities_of_the_model(named_run, pictures, tmp_path, capsys):
    paths, expected = pictures
    results = predicted(named_run[0], tmp_path / "out.json", *paths, "--batch_size=4")
    assert results["step"] == 2 and [entry["file"] for entry in results["files"]] == paths
    for entry, shares in zip(results["files"], expected, strict=True):
        found = {one["class"]: one["probability"] for one in entry["classes"]}
        assert found == pytest.approx(dict(zip(("dark", "medium", "light"), shares, strict=True)), abs=1e-5)
        assert list(found.values()) == sorted(found.values(), reverse=True)
    lines = capsys.readouterr().out.splitlines()
    best = results["files"][0]["classes"][0]
    assert len(lines) == 9
    assert lines[0].startswith(f"{paths[0]}: {best['class']} {100 * best['probability']:.1f} %, ")


def test_top_limits_the_classes_and_a_run_without_names_has_numbers(named_run, pictures, tmp_path):
    run, paths = named_run[0], pictures[0]
    names = (run / FILE).read_bytes()
    (run / FILE).unlink()
    try:
        results = predicted(run, tmp_path / "out.json", paths[0], "--top=2")
    finally:
        (run / FILE).write_bytes(names)
    found = [one["class"] for one in results["files"][0]["classes"]]
    assert found == [str(i) for i in np.argsort(-pictures[1][0])[:2]]


def test_an_export_predicts_the_same_names(named_run, pictures, tmp_path):
    made, paths = export(named_run[0], tmp_path / "hf"), pictures[0]
    one, other = (predicted(ref, tmp_path / "out.json", *paths)["files"] for ref in (named_run[0], made))
    for ours, theirs in zip(one, other, strict=True):
        assert [x["class"] for x in ours["classes"]] == [x["class"] for x in theirs["classes"]]


def test_predictions_agree_with_the_accuracy_of_evaluate():
    pretrained, split, _ = pretrained_and_split(num_classes=3)
    shares = predict(pretrained, split, batch_size=10)
    assert shares.shape == (23, 3) and np.allclose(shares.sum(axis=1), 1)
    assert evaluate(pretrained, split, 10)["accuracy"] == (shares.argmax(axis=1) == split.labels).mean()


def test_bert_s_probabilities_are_means_over_its_masks():
    pretrained, split, _ = pretrained_and_split(num_classes=3, causal=False)
    many, one = predict(pretrained, split, 10, masks=3), predict(pretrained, split, 10, masks=1)
    assert many.shape == (23, 3) and np.allclose(many.sum(axis=1), 1) and not np.allclose(many, one)


def test_the_likeliest_classes_come_first():
    best = best_classes(np.array([0.2, 0.5, 0.3]), ("ant", "bee", "cat"), top=2)
    assert best == [{"class": "bee", "probability": 0.5}, {"class": "cat", "probability": 0.3}]


def test_files_that_cannot_be_read_are_named_after_the_others(named_run, pictures, tmp_path, capsys):
    (tmp_path / "text.png").write_text("no image")
    Image.new("L", (7, 7)).save(tmp_path / "large.png")
    files = [pictures[0][0], f"{tmp_path}/text.png", f"{tmp_path}/absent.png", f"{tmp_path}/large.png", pictures[0][1]]
    with pytest.raises(SystemExit) as stopped:
        predicted(named_run[0], tmp_path / "out.json", *files)
    printed = capsys.readouterr()
    assert stopped.value.code == 2 and len(printed.out.splitlines()) == 2 and "Traceback" not in printed.err
    assert "error: 3 of 5 files cannot be read:" in printed.err and "text.png cannot be read as" in printed.err
    assert "there is no image" in printed.err and "data.preprocess (or --preprocess) to shrink or crop" in printed.err
    entries = json.loads((tmp_path / "out.json").read_text())["files"]
    assert ["classes" in entry for entry in entries] == [True, False, False, False, True]
    alone = predicted(named_run[0], tmp_path / "out.json", pictures[0][1])["files"][0]
    assert entries[4]["classes"][0]["class"] == alone["classes"][0]["class"]
    shrunk = predicted(named_run[0], tmp_path / "out.json", f"{tmp_path}/large.png", "--preprocess=shrink")
    assert len(shrunk["files"][0]["classes"]) == 3


def test_if_no_file_can_be_read_all_are_named_and_written(named_run, tmp_path, capsys):
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(SystemExit) as stopped:
        predicted(named_run[0], tmp_path / "out.json", f"{tmp_path}/text.png", f"{tmp_path}/absent.png")
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and "error: 2 of 2 files cannot be read:" in said
    assert "text.png cannot be read as" in said and "absent.png" in said
    entries = json.loads((tmp_path / "out.json").read_text())["files"]
    assert [entry.keys() for entry in entries] == [{"file", "error"}] * 2


def test_a_json_that_cannot_be_written_is_refused_before_the_model_is_loaded(named_run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("igpt.predict.load", lambda *_: pytest.fail("the model was loaded"))
    with pytest.raises(SystemExit) as stopped:
        predicted(named_run[0], tmp_path / "nodir" / "x.json", "photo.png")
    assert stopped.value.code == 2 and f"--json={tmp_path}/nodir/x.json cannot be written" in capsys.readouterr().err


def test_a_model_without_a_classifier_is_refused_before_it_is_loaded(tmp_path, capsys):
    write_run_config(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        run_igpt(["predict", f"--model={tmp_path}", "photo.png"])
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and f"{tmp_path} has no classifier; fine-tune it first" in said
    pretrained, split, _ = pretrained_and_split()
    with pytest.raises(UserError, match="this model has no classifier"):
        predict(pretrained, split)


def test_a_file_is_needed(capsys):
    with pytest.raises(SystemExit) as stopped:
        run_igpt(["predict", "--model=x"])
    assert stopped.value.code == 2 and "required: FILE. igpt predict --help" in capsys.readouterr().err
