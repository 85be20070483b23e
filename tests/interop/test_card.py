"""Exported classifiers in transformers' own pipeline, and the recipe of the model card, beside our predictions."""

import json
import math
import re

import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from huggingface_hub import ModelCard
from PIL import Image
from scipy.special import softmax

import igpt
from igpt.__main__ import main as run_igpt
from igpt.data.classes import save_names
from igpt.errors import UserError
from igpt.interop.card import public_source
from igpt.interop.export import export
from igpt.interop.import_run import import_directory
from igpt.interop.results import figures
from tests.helpers import HF_IMAGE_SIZE, write_imported_run

IMAGES = np.random.default_rng(3).integers(0, 256, (6, *HF_IMAGE_SIZE, 3), np.uint8)


def classifier(folder, sos):
    """(our logits of IMAGES [6, 5], the directory of the export, whose classes are the same)."""
    run = write_imported_run(folder / "run", num_classes=5, sos=sos)
    model, palette = igpt.load(run).model, igpt.load(run).tokenizer
    logits = np.asarray(model.classify(jnp.asarray(palette.encode(IMAGES).reshape(6, -1))))
    assert len(set(logits.argmax(axis=-1))) > 1
    return logits, export(run, folder / "hf")


def change_config(run, **sections):
    """Changes fields of sections in a run's config.json."""
    config = json.loads((run / "config.json").read_text())
    for name, fields in sections.items():
        config[name] = config[name] | fields if isinstance(fields, dict) else fields
    (run / "config.json").write_text(json.dumps(config))


def in_pipeline(directory):
    """The probabilities [6, 5] that transformers' pipeline gives to the classes of IMAGES."""
    pipe = transformers.pipeline("image-classification", model=str(directory), device="cpu")
    labels = pipe.model.config.label2id
    scores = np.zeros((6, 5))
    for row, found in zip(scores, pipe([Image.fromarray(image) for image in IMAGES]), strict=True):
        row[[labels[one["label"]] for one in found]] = [one["score"] for one in found]
    return scores


def test_a_pipeline_serves_a_classifier_without_sos_as_it_is(tmp_path):
    logits, directory = classifier(tmp_path, sos=False)
    np.testing.assert_allclose(in_pipeline(directory), softmax(logits, axis=-1), rtol=0, atol=1e-5)
    assert 'pipeline("image-classification", model=".")' in (directory / "README.md").read_text()


def test_the_recipe_of_the_card_serves_a_classifier_with_sos(tmp_path, monkeypatch, capsys):
    logits, directory = classifier(tmp_path, sos=True)
    assert abs(in_pipeline(directory) - softmax(logits, axis=-1)).max() > 0.01  # what the card warns of
    _, recipe = re.findall(r"```python\n(.*?)```", (directory / "README.md").read_text(), re.DOTALL)
    monkeypatch.chdir(directory)
    capsys.readouterr()
    for image, expected in zip(IMAGES, logits.argmax(axis=-1), strict=True):
        Image.fromarray(image).save("image.png")
        exec(recipe, {})
        assert capsys.readouterr().out == f"{expected}\n"


@pytest.mark.parametrize("preprocess", ["shrink", "none"])
def test_the_pipeline_shrinks_a_picture_with_the_filter_of_the_run_and_an_import_keeps_it(tmp_path, preprocess):
    run = write_imported_run(tmp_path / "run", num_classes=5, sos=False)
    change_config(run, data=dict(preprocess=preprocess, filter="lanczos"))
    out = export(run, tmp_path / "hf")
    processor = transformers.AutoImageProcessor.from_pretrained(out)
    picture = Image.fromarray(np.random.default_rng(5).integers(0, 256, (35, 49, 3), np.uint8))
    tokens = processor(picture, return_tensors="np")["input_ids"]
    for ref in (run, out, import_directory(out, tmp_path / "back")):
        pretrained = igpt.load(ref)
        expected = pretrained.tokenizer.encode(pretrained.prepared(picture, "shrink"))
        np.testing.assert_array_equal(tokens, expected.reshape(1, -1))
        assert pretrained.config.data.filter == "lanczos"


@pytest.mark.parametrize(
    ("fields", "said", "card"),
    [
        (dict(num_classes=5), "WARNING: this classifier reads a start of sequence (SOS)", "**Do not use `pipeline"),
        (dict(num_classes=5, sos=False), "serves it as it is: it reads no start", "transformers' pipeline serves it"),
        (dict(sos=False), "README.md, config.json", "nothing predicts the first token"),
        (dict(), "README.md, config.json, generation_config.json, model.safetensors", "`generate` begins with it"),
    ],
    ids=str,
)
def test_the_command_and_the_card_say_what_the_network_reads(tmp_path, capsys, fields, said, card):
    run = write_imported_run(tmp_path / "run", **fields)
    run_igpt(["export", f"--model={run}", f"--out={tmp_path}/hf"])
    printed = capsys.readouterr().out
    assert said in printed and ("WARNING" in printed) == (fields == dict(num_classes=5))
    assert card in (tmp_path / "hf" / "README.md").read_text()


def add_results(run, step, classes=0):
    """What a run leaves behind that trained, was tested and probed."""
    losses = [{"step": i, "train/loss": 3.0 - i / 10} for i in range(1, step + 3)]
    losses += [{"step": step, "eval/loss": 2.5, "eval/bits_per_dim": 3.75, "eval/accuracy": 0.5, "eval/x": math.nan}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in losses) + '{"step": 1, "tr')
    (run / "probe").mkdir()
    fits = [{"layer": i, "test_accuracy": i / 10, "interval": [0.1, 0.9]} for i in range(4)]
    probe = {"step": step, "pretrained": {"best_layer": 2, "layers": fits}}
    (run / "probe" / "probe.json").write_text(json.dumps(probe))
    (run / "finetune.json").write_text(json.dumps({"step": step, "test_accuracy": 0.75, "interval": [0.5, 0.9]}))
    (run / "samples").mkdir()
    for drawn in (2, 3, 9):
        Image.new("RGB", (8, 8), (drawn, 0, 0)).save(run / "samples" / f"{drawn:07d}.png")
    for name in ("confusion.png", "probe/probe.png"):
        Image.new("RGB", (8, 8)).save(run / name)


def test_the_card_has_the_figures_and_pictures_of_the_exported_step(tmp_path):
    run = write_imported_run(tmp_path / "run")
    add_results(run, step=3)
    out = export(run, tmp_path / "hf", name="someone/draws", data_license="CC0")
    data = ModelCard.load(out / "README.md").data
    found = {(r.task_type, r.dataset_split, r.metric_name): r.metric_value for r in data.eval_results}
    drawing = ("unconditional-image-generation", "validation")
    assert found == {
        (*drawing, "validation nats per token"): 2.5,
        (*drawing, "validation bits per dimension"): 3.75,
        ("image-classification", "test", "test accuracy of a linear probe on layer 2 of 3"): 0.2,
    }
    text = (out / "README.md").read_text()
    assert "licence of the training images | CC0" in text
    shown = re.findall(r"!\[.*?\]\((.*?)\)", text)
    assert shown == ["samples.png", "curves.png", "confusion.png", "probe.png"]
    assert all(Image.open(out / name).size for name in shown)
    assert Image.open(out / "samples.png").getpixel((0, 0)) == (3, 0, 0)  # not those of a later step
    again = export(out, tmp_path / "again")
    assert {path.name: path.read_bytes() for path in out.iterdir()} == {
        path.name: path.read_bytes() for path in again.iterdir()
    }


@pytest.mark.parametrize(
    ("pool", "name"),
    [
        ("attention:2", "accuracy of an attentive probe on layer 2 of 3, pool attention:2"),
        ("grid:2", "accuracy of a linear probe on layer 2 of 3, pool grid:2"),
    ],
)
def test_a_probe_that_does_not_take_the_mean_is_told_by_its_pool(tmp_path, pool, name):
    run = write_imported_run(tmp_path / "run")
    add_results(run, step=3)
    probe = json.loads((run / "probe" / "probe.json").read_text())
    (run / "probe" / "probe.json").write_text(json.dumps(probe | {"solver": {"pool": pool}}))
    assert name in [figure.name for figure in figures(run, 3, False, 3)]


def test_a_probe_of_other_images_is_told_with_their_source(tmp_path):
    run = write_imported_run(tmp_path / "run")
    add_results(run, step=3)
    probe = json.loads((run / "probe" / "probe.json").read_text())
    (run / "probe" / "probe.json").write_text(json.dumps(probe | {"source": "folder:/home/anna/birds"}))
    out = export(run, tmp_path / "hf")
    sources = {r.metric_name: r.dataset_type for r in ModelCard.load(out / "README.md").data.eval_results}
    assert sources.pop("test accuracy of a linear probe on layer 2 of 3") == "folder:birds"
    assert set(sources.values()) == {igpt.load(run).config.data.source}
    assert "| test of folder:birds | accuracy of a linear probe" in (out / "README.md").read_text()


def test_the_card_of_a_classifier_has_its_test_accuracy_and_its_classes(tmp_path):
    run = write_imported_run(tmp_path / "run", num_classes=3)
    save_names(["ant", "bee | wasp", "cat"], run)
    add_results(run, step=3)
    out = export(run, tmp_path / "hf")
    found = {r.metric_name: r.metric_value for r in ModelCard.load(out / "README.md").data.eval_results}
    assert found["test accuracy"] == 0.75 and found["validation accuracy"] == 0.5
    text = (out / "README.md").read_text()
    assert "0.7500 [0.5000, 0.9000]" in text and "| 3: ant, bee \\| wasp, cat |" in text
    assert not (out / "samples.png").exists()


def test_figures_of_another_step_are_not_published(tmp_path):
    run = write_imported_run(tmp_path / "run")
    add_results(run, step=2)
    out = export(run, tmp_path / "hf")
    assert ModelCard.load(out / "README.md").data.eval_results is None
    assert sorted(path.name for path in out.glob("*.png")) == ["curves.png", "samples.png"]


@pytest.mark.parametrize("place", ["/home/anna", "gs://anna", "s3://anna/of/anna"])
@pytest.mark.parametrize(
    ("data", "shown"),
    [
        (dict(source="folder:{}/photos", split_file="{}/s.csv"), "folder:photos"),
        (dict(source="tokens:{}/imagenet"), "tokens:imagenet"),
        (dict(source="scattered:npz:{}/a.npz", scatter_background="folder:{}/b"), "scattered:npz:a.npz"),
    ],
)
def test_the_card_names_no_folder_of_the_machine_and_no_bucket(tmp_path, place, data, shown):
    run = write_imported_run(tmp_path / "run")
    data = {name: value.format(place) for name, value in data.items()}
    palette = dict(path=f"{place}/palette.npy")
    change_config(run, data=dict(data_dir=f"{place}/data", **data), palette=palette, init_from=f"{place}/runs/first")
    text = (export(run, tmp_path / "hf") / "README.md").read_text()
    assert "anna" not in text and shown in text and str(tmp_path) not in text


def test_a_card_can_name_a_folder_that_is_not_utf_8(tmp_path):
    run = write_imported_run(tmp_path / "run")
    change_config(run, data=dict(source="folder:caf\udce9"))
    assert r"folder:caf\xe9" in (export(run, tmp_path / "hf") / "README.md").read_text()


def test_a_bucket_without_a_folder_has_no_public_name():
    assert [public_source(f"tokens:gs://anna{end}") for end in ("", "/", "/codes/")] == ["tokens:"] * 2 + [
        "tokens:codes"
    ]


@pytest.mark.parametrize(
    ("source", "shown", "datasets"),
    [
        ("hf:uoft-cs/cifar100,label=fine_label", "hf:uoft-cs/cifar100,label=fine_label", ["uoft-cs/cifar100"]),
        ("hf:/home/anna/photos,label=kind", "hf:photos,label=kind", None),
    ],
)
def test_the_card_names_a_data_set_of_the_hub_in_its_metadata(tmp_path, source, shown, datasets):
    run = write_imported_run(tmp_path / "run")
    change_config(run, data=dict(source=source))
    out = export(run, tmp_path / "hf")
    assert f"trained on | `{shown}`" in (out / "README.md").read_text()
    assert ModelCard.load(out / "README.md").data.datasets == datasets


def test_a_card_that_was_imported_is_kept_and_its_licence_with_it(tmp_path):
    out = export(write_imported_run(tmp_path / "run"), tmp_path / "hf")
    (out / "README.md").write_text("---\nlicense: cc-by-nc-4.0\n---\nNot ours.\n")
    back = export(import_directory(out, tmp_path / "imported"), tmp_path / "back")
    assert (back / "README.md").read_text() == (out / "README.md").read_text()
    with pytest.raises(UserError, match=r"its own README\.md, which is kept"):
        export(out, tmp_path / "other", license="mit")


def test_the_pictures_of_a_card_are_kept_through_the_hub_an_import_and_a_new_export(hub, tmp_path):
    run = write_imported_run(tmp_path / "run")
    (run / "samples").mkdir()
    Image.new("RGB", (9, 9)).save(run / "samples" / "0000003.png")
    run_igpt(["export", f"--model={run}", "--push=someone/draws"])
    back = export(import_directory("someone/draws", tmp_path / "imported"), tmp_path / "back")
    names = re.findall(r"\]\((\w+\.png)\)", (back / "README.md").read_text())
    assert names == ["samples.png"] and all((back / name).is_file() for name in names)
    run_igpt(["export", f"--model={tmp_path}/imported", "--push=someone/draws"])
    assert "samples.png" in hub[0].repos["models", "someone/draws"]["files"]


@pytest.mark.parametrize(
    "settings", [{"bos_token_id": 3}, {"top_k": 40, "_from_model_config": True, "bos_token_id": None}, {}], ids=str
)
def test_generation_settings_that_were_imported_are_kept_as_they_are(tmp_path, settings):
    out = export(write_imported_run(tmp_path / "run"), tmp_path / "hf")
    (out / "generation_config.json").write_text(json.dumps(settings))
    for ref in (out, import_directory(out, tmp_path / "imported")):
        back = export(ref, tmp_path / f"from {ref.name}")
        assert json.loads((back / "generation_config.json").read_text()) == settings


def test_the_recipe_of_a_new_card_draws_images_whatever_generation_settings_are_kept(hf_copy, tmp_path, monkeypatch):
    (hf_copy / "generation_config.json").write_text('{"max_length": 7}')  # and no start of sequence
    out = export(hf_copy, tmp_path / "out")
    (recipe,) = re.findall(r"```python\n(import numpy.*?)```", (out / "README.md").read_text(), re.DOTALL)
    monkeypatch.chdir(out)
    drawn = {}
    exec(recipe, drawn)
    assert drawn["tokens"].shape == (4, 35) and len(set(map(tuple, drawn["tokens"].tolist()))) == 4


def test_all_exported_files_are_readable_as_other_new_files_are(tmp_path):
    out = export(write_imported_run(tmp_path / "run"), tmp_path / "hf")
    (tmp_path / "new").touch()
    assert {path.stat().st_mode for path in out.iterdir()} == {(tmp_path / "new").stat().st_mode}
