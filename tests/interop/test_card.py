"""Exported classifiers in transformers' own pipeline, and the recipe of the model card, beside our predictions."""

import json
import re

import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from PIL import Image
from scipy.special import softmax

import igpt
from igpt.__main__ import main as run_igpt
from igpt.data.images import Preprocess
from igpt.interop.export import export
from tests.helpers import HF_IMAGE_SIZE, write_imported_run

IMAGES = np.random.default_rng(3).integers(0, 256, (6, *HF_IMAGE_SIZE, 3), np.uint8)


def classifier(folder, sos):
    """(our logits of IMAGES [6, 5], the directory of the export, whose classes are the same)."""
    run = write_imported_run(folder / "run", num_classes=5, sos=sos)
    model, palette = igpt.load(run).model, igpt.load(run).palette
    logits = np.asarray(model.classify(jnp.asarray(palette.encode(IMAGES).reshape(6, -1))))
    assert len(set(logits.argmax(axis=-1))) > 1
    return logits, export(run, folder / "hf")


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
    (recipe,) = re.findall(r"```python\n(.*?)```", (directory / "README.md").read_text(), re.DOTALL)
    monkeypatch.chdir(directory)
    capsys.readouterr()
    for image, expected in zip(IMAGES, logits.argmax(axis=-1), strict=True):
        Image.fromarray(image).save("image.png")
        exec(recipe, {})
        assert capsys.readouterr().out == f"{expected}\n"


def test_the_pipeline_shrinks_a_picture_with_the_filter_of_the_run(tmp_path):
    run = write_imported_run(tmp_path / "run", num_classes=5, sos=False)
    config = json.loads((run / "config.json").read_text())
    config["data"].update(preprocess="shrink", filter="lanczos")
    (run / "config.json").write_text(json.dumps(config))
    processor = transformers.AutoImageProcessor.from_pretrained(export(run, tmp_path / "hf"))
    picture = Image.fromarray(np.random.default_rng(5).integers(0, 256, (35, 49, 3), np.uint8))
    pretrained = igpt.load(run)
    expected = pretrained.palette.encode(Preprocess.of(pretrained.config.data)(picture, None, "it")[None])
    np.testing.assert_array_equal(processor(picture, return_tensors="np")["input_ids"], expected.reshape(1, -1))


@pytest.mark.parametrize(
    ("fields", "said", "card"),
    [
        (dict(num_classes=5), "WARNING: this classifier reads a start of sequence (SOS)", "**Do not use `pipeline"),
        (dict(num_classes=5, sos=False), "serves it as it is: it reads no start of sequence", "serves it as it is"),
        (dict(sos=False), "README.md and the weights", "nothing predicts the first token"),
        (dict(), "config.json, preprocessor_config.json and the weights", None),
    ],
    ids=str,
)
def test_the_command_and_the_card_say_what_the_network_reads(tmp_path, capsys, fields, said, card):
    run = write_imported_run(tmp_path / "run", **fields)
    run_igpt(["export", f"--model={run}", f"--out={tmp_path}/hf"])
    printed = capsys.readouterr().out
    assert said in printed and ("WARNING" in printed) == (fields == dict(num_classes=5))
    readme = tmp_path / "hf" / "README.md"
    assert card in readme.read_text() if card else not readme.exists()
