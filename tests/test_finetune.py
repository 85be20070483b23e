"""Fine-tuning through train.run: where it starts, when it ends, and what it writes."""

import collections
import contextlib
import dataclasses
import io
import json
import math
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from PIL import Image

import igpt
import train
from configs import base
from igpt import finetune
from igpt.__main__ import main as run_igpt
from igpt.config import Config
from igpt.data import sources
from igpt.data.arrays import split_indices
from igpt.data.batches import Drops
from igpt.data.settings import DataConfig
from igpt.errors import UserError
from igpt.files import read_json
from igpt.interop.export import export
from igpt.interop.import_run import import_checkpoint
from igpt.palette import Palette
from igpt.run import checkpoint, restore
from tests.helpers import (
    HF_CLUSTERS,
    HF_IMAGE_SIZE,
    OPENAI_DIMS,
    assert_bitwise_equal,
    load_hf_strictly,
    losses,
    openai_variables,
    read_arrays,
    records,
    write_imported_run,
    write_tf_checkpoint,
)

# Every model that a test starts from has these fields; the others are those of write_imported_run.
NETWORK = dict(depth=2, use_bias=True)
NAMES = ("night", "dusk", "day")  # in no order of the alphabet


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """An .npz of 97 images in three classes with names, which differ in brightness."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 97)
    pixels = rng.normal(50 + 80 * labels[:, None, None, None], 50, (97, *HF_IMAGE_SIZE, 3))
    path = tmp_path_factory.mktemp("images") / "images.npz"
    np.savez(path, images=pixels.clip(0, 255).astype(np.uint8), labels=labels, names=NAMES)
    return path


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A run with random parameters and without a classifier; tests do not change it."""
    return write_imported_run(tmp_path_factory.mktemp("start") / "run", **NETWORK)


def tuning(images, init_from="", **changes):
    """The configuration of a short fine-tuning run."""
    config = base.get_config()
    config.init_from = str(init_from)
    config.data.update(source=f"npz:{images}", image_size=HF_IMAGE_SIZE, channels=3)
    config.data.update(validation_fraction=0.25, test_fraction=0.25)
    config.palette.colors = 17
    config.model.update(dict(width=22, num_heads=2, mlp_width=46, num_classes=3) | NETWORK)
    config.objective.classification = 1.0
    config.optim.update(learning_rate=1e-3, schedule="constant")
    config.train.update(steps=4, batch_size=8, log_every=1, eval_every=2, eval_batch_size=16, num_samples=0)
    config.train.update(checkpoint_every=1, max_to_keep=1)
    config.update_from_flattened_dict({name.replace("__", "."): value for name, value in changes.items()})
    return config


def tuned(config, workdir):
    """(run directory, last metrics, what was printed)."""
    with contextlib.redirect_stdout(io.StringIO()) as output:
        evaluation = train.run(config, workdir).evaluation
    return workdir, evaluation, output.getvalue()


@pytest.fixture(scope="module")
def joint(images, start, tmp_path_factory):
    config = tuning(images, start, model__residual_dropout=0.1)
    return tuned(config, tmp_path_factory.mktemp("joint") / "run")


@pytest.fixture(scope="module")
def bert(images, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bert")
    begin = write_imported_run(folder / "start", causal=False, num_classes=3, depth=2)
    config = tuning(images, begin, model__causal=False, model__use_bias=False, seed=5)
    config.objective.update(drop_rate=0.8, eval_masks=3)  # the masks disagree at this rate
    return tuned(config, folder / "run")


@pytest.fixture
def script(monkeypatch):
    """script(0.3, 0.9) sets the validation accuracies of the next two evaluations; a third one is an error."""

    def of(*accuracies):
        remaining = iter(accuracies)
        monkeypatch.setattr(train, "evaluate", lambda *_: {"eval/loss": 1.0, "eval/accuracy": next(remaining)})
        monkeypatch.setattr(train, "test_classifier", lambda *_: {})

    return of


def first_params(config, workdir, monkeypatch):
    """(origin, parameters) of a run before its first step."""

    class Described(Exception):
        pass

    def describe(workdir, origin, config, model, state, *_):
        raise Described(origin, state.params)

    with monkeypatch.context() as patched, pytest.raises(Described) as caught:
        patched.setattr(train, "describe", describe)
        patched.setattr(train, "compile_ahead", lambda *_: None)  # no step is run
        train.run(config, workdir)
    return caught.value.args


def test_parameters_to_start_from_are_merged_by_heads():
    fresh = {"blocks": 1, "classifier": 2}
    assert finetune.merge_params(fresh, {"blocks": 3, "head": 4}) == {"blocks": 3, "classifier": 2}
    assert finetune.merge_params(fresh, {"blocks": 3, "classifier": 5}) == {"blocks": 3, "classifier": 5}


@pytest.mark.parametrize("kind", ["run", "hugging face"])
def test_a_run_starts_from_all_weights_of_the_model_with_a_new_classifier(images, start, tmp_path, monkeypatch, kind):
    ref = start if kind == "run" else export(start, tmp_path / "hf")
    origin, params = first_params(tuning(images, ref), tmp_path / "run", monkeypatch)
    assert origin == f"weights of {ref}, a new classifier"
    assert not params.pop("classifier")["kernel"].any()
    expected = nnx.to_pure_dict(nnx.state(igpt.load(start).model))
    jax.tree.map(np.testing.assert_array_equal, params, expected)
    np.testing.assert_array_equal(
        Palette.load(tmp_path / "run" / "palette.npy").centers, HF_CLUSTERS.astype(np.float32)
    )


def test_a_run_without_sos_starts_from_one_with_it_and_says_so(images, start, tmp_path, monkeypatch):
    origin, params = first_params(tuning(images, start, model__sos=False), tmp_path / "run", monkeypatch)
    assert origin == f"weights of {start}, learnt with SOS, a new classifier"
    np.testing.assert_array_equal(params["token_table"], igpt.load(start).model.token_table[...])


def test_a_run_starts_from_weights_and_tokens_of_openai(tmp_path, monkeypatch, write_openai):
    prefix = write_openai()  # 5 x 5 tokens of 17 colours, with labels, and the clusters beside them
    clusters = tmp_path / "kmeans_centers.npy"
    begin = import_checkpoint(
        write_tf_checkpoint(tmp_path / "model.ckpt-7", openai_variables()), clusters, tmp_path / "start"
    )
    config = tuning(None, begin, data__source=f"openai:{prefix}", data__image_size=(5, 5), model__depth=3)
    config.model.update(width=20, mlp_width=83, use_bias=False)
    _, params = first_params(config, tmp_path / "run", monkeypatch)
    assert not params.pop("classifier")["kernel"].any()
    jax.tree.map(np.testing.assert_array_equal, params, nnx.to_pure_dict(nnx.state(igpt.load(begin).model)))
    np.save(clusters, np.random.default_rng(9).uniform(-1, 1, (OPENAI_DIMS["V"], 3)).astype(np.float32))
    with pytest.raises(UserError, match=r"data\.source=openai:.* has another palette than init_from=.*--palette"):
        train.run(config, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_a_model_keeps_its_classifier_and_may_lose_its_pixel_head(images, tmp_path, monkeypatch):
    begin = write_imported_run(tmp_path / "start", num_classes=3, **NETWORK)
    config = tuning(images, begin, model__pixel_head=False, objective__generative=0.0)
    origin, params = first_params(config, tmp_path / "run", monkeypatch)
    expected = nnx.to_pure_dict(nnx.state(igpt.load(begin).model))
    assert origin == f"weights of {begin}" and expected.pop("head")
    jax.tree.map(np.testing.assert_array_equal, params, expected)


def test_a_fine_tuned_run_leaves_everything_that_it_promises(joint):
    workdir, evaluation, output = joint
    names = {path.name.split(".")[0] for path in workdir.iterdir()}
    recorded = {"config", "palette", "checkpoints", "metrics", "events", "images"}
    assert names == recorded | {"finetune", "confusion", "classes"}
    assert not list(workdir.rglob("*.partial"))
    parts = {f"eval/{name}" for name in ("loss", "generative_loss", "classification_loss", "accuracy")}
    assert evaluation.keys() == {"eval/bits_per_dim", "test/accuracy"} | parts
    assert evaluation["eval/bits_per_dim"] == pytest.approx(evaluation["eval/generative_loss"] / np.log(2) / 3)
    first = records(workdir)[0]
    assert first["train/classification_loss"] == pytest.approx(np.log(3), abs=1e-6)
    assert first["train/loss"] == pytest.approx(first["train/generative_loss"] + np.log(3), abs=1e-6)
    assert losses(workdir)[4] < losses(workdir)[1]
    assert igpt.load(workdir).class_names == NAMES
    assert json.loads((workdir / "finetune.json").read_text())["class_names"] == list(NAMES)
    shown = (
        "classes  3 (night: ",
        "a new classifier)",
        "best on validation after step",
        "confusion.png",
        "igpt export",
    )
    assert all(text in output for text in shown)
    assert "samples" not in output and Image.open(workdir / "confusion.png").size[0] > 300


def test_the_test_accuracy_is_that_of_the_best_checkpoint(joint, images):
    workdir, evaluation, _ = joint
    results = json.loads((workdir / "finetune.json").read_text())
    accuracies = {r["step"]: r["eval/accuracy"] for r in records(workdir) if "eval/accuracy" in r}
    best = max(accuracies, key=accuracies.get)
    pretrained = igpt.load(workdir)
    assert pretrained.step == results["step"] == best and results["validation_accuracy"] == accuracies[best]
    source = sources.open_source(pretrained.config.data)
    tokens = pretrained.tokenizer.encode(source.test.images[:]).reshape(24, -1)
    counts = np.zeros((3, 3), int)
    np.add.at(counts, (source.test.labels, np.argmax(pretrained.model.classify(jnp.asarray(tokens)), axis=-1)), 1)
    assert results["confusion"] == counts.tolist() and counts.sum() == results["images"]["test"] == 24
    assert results["test_accuracy"] == evaluation["test/accuracy"] == np.trace(counts) / 24
    assert 0 < results["interval"][0] < results["test_accuracy"] < results["interval"][1] <= 1


def test_a_fine_tuned_run_is_the_same_classifier_in_transformers(joint, tmp_path):
    theirs = load_hf_strictly(export(joint[0], tmp_path / "hf"), "classes")
    assert theirs.config.id2label == dict(enumerate(NAMES)) and theirs.config.label2id["day"] == 2
    tokens = np.random.default_rng(4).integers(0, 17, (5, 35))
    with torch.no_grad():
        logits = theirs(torch.from_numpy(np.concatenate([np.full((5, 1), 17), tokens[:, :-1]], axis=1))).logits
    ours = igpt.load(joint[0]).model.classify(jnp.asarray(tokens))
    assert np.std(ours) > 1e-3
    np.testing.assert_allclose(ours, logits.numpy(), rtol=0, atol=1e-5)


def test_bert_s_masks_vote_on_the_class_of_a_test_image(bert):
    workdir, evaluation, output = bert
    assert "eval/bits_per_dim" not in evaluation and "export" not in output and "igpt sample" not in output
    pretrained = igpt.load(workdir)
    source = sources.open_source(pretrained.config.data)
    tokens = pretrained.tokenizer.encode(source.test.images[:]).reshape(24, -1)
    keep = Drops(0.8, masks=3, seed=5).of_images(np.arange(24), 35)
    votes = np.stack(
        [np.argmax(pretrained.model.classify(jnp.asarray(tokens), jnp.asarray(keep[:, m])), axis=-1) for m in range(3)],
        axis=1,
    )
    assert len({*map(len, map(set, votes))}) > 1  # they differ on some images and agree on others
    counts = np.zeros((3, 3), int)
    for label, of_image in zip(source.test.labels, votes, strict=True):
        counts[label, collections.Counter(of_image.tolist()).most_common(1)[0][0]] += 1
    results = json.loads((workdir / "finetune.json").read_text())
    assert results["confusion"] == counts.tolist() and results["step"] == pretrained.step


def test_a_bert_network_is_neither_exported_nor_sampled(bert, tmp_path, capsys):
    with pytest.raises(UserError, match="trained with the BERT objective, but transformers' ImageGPT is always causal"):
        export(bert[0], tmp_path / "hf")
    with pytest.raises(SystemExit) as stopped:
        run_igpt(["sample", f"--model={bert[0]}", f"--out={tmp_path}/samples.png"])
    assert stopped.value.code == 2 and "predicts masked pixels and cannot sample" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_classes_alone_are_learnt_from_scratch_without_a_pixel_head(images, tmp_path):
    config = tuning(images, model__pixel_head=False, objective__generative=0.0, train__steps=2)
    config.train.update(num_samples=3, sample_every=1)
    config.data.labels_per_class = 6
    workdir, evaluation, output = tuned(config, tmp_path / "run")
    assert losses(workdir)[1] == pytest.approx(np.log(3), abs=1e-6)
    assert evaluation["eval/loss"] == evaluation["eval/classification_loss"]
    assert not {"eval/generative_loss", "eval/bits_per_dim"} & evaluation.keys()
    assert not (workdir / "samples").exists() and "samples:" not in output and "(fresh)" in output
    assert json.loads((workdir / "finetune.json").read_text())["images"]["train"] == 18


def test_labels_are_numbered_like_those_of_init_from_and_of_the_resumed_run(joint, images, write_npz):
    arrays, workdir = dict(np.load(images)), joint[0]
    config = Config.of(tuning(images, workdir))
    expected = sources.open_source(config.data).train.labels
    for names, labels in ((NAMES[::-1], 2 - arrays["labels"]), (("night", "dawn", "day"), arrays["labels"])):
        path = write_npz(images=arrays["images"], labels=labels, names=names)
        source = sources.open_source(dataclasses.replace(config.data, source=f"npz:{path}"))
        for start, resumed in ((config, False), (dataclasses.replace(config, init_from=""), True)):
            known = train.known_classes(start, mock.Mock(path=workdir, is_resumed=resumed))
            if "dawn" in names:
                with pytest.raises(UserError, match=r"know 1 classes of .*: dawn\. .* night, dusk, day; .* dawn, day"):
                    finetune.labelled(source, config, *known)
                continue
            mapped = finetune.labelled(source, config, *known)
            np.testing.assert_array_equal(mapped.train.labels, expected)
            assert mapped.class_names == NAMES and not np.array_equal(source.train.labels, expected)


def test_a_run_without_names_meets_any_source_by_number(images, tmp_path):
    begin = write_imported_run(tmp_path / "start", num_classes=3, **NETWORK)
    config = Config.of(tuning(images, begin))
    known = train.known_classes(config, mock.Mock(path=tmp_path / "new", is_resumed=False))
    source = sources.open_source(config.data)
    np.testing.assert_array_equal(finetune.labelled(source, config, *known).train.labels, source.train.labels)


def progress_of(workdir):
    steps = checkpoint.finished_steps(workdir)
    return steps, dataclasses.replace(restore.progress_at(workdir, steps[-1]), tokenizer="", images="")


def test_training_ends_with_patience_and_more_patience_resumes_it(images, start, tmp_path, script, capsys):
    config = tuning(images, start, train__steps=40, train__eval_every=1, model__residual_dropout=0.1)
    config.train.update(patience=3, checkpoint_every=100)
    first, second = (0.5, 0.9, 0.8, 0.9, 0.1), (0.2, 0.95, 0.3, 0.3, 0.3, 0.3, 0.3)
    script(*first)
    train.run(config, tmp_path / "run")
    assert progress_of(tmp_path / "run") == ([2, 5], checkpoint.Progress(5, 2, 0.9, 3))
    assert igpt.load(tmp_path / "run").step == 2
    before = records(tmp_path / "run")
    assert before[-1]["step"] == 5 and "no better accuracy in 3 evaluations" in capsys.readouterr().out

    finetune.report(tmp_path / "run", np.eye(3, dtype=int), {"step": 2, "images": {"test": 3}})
    script()
    train.run(config, tmp_path / "run")  # it is not trained further
    assert records(tmp_path / "run") == before and (tmp_path / "run" / "finetune.json").exists()
    assert "had already finished its 5 steps" in capsys.readouterr().out

    config.train.patience = 5
    script(*second)
    train.run(config, tmp_path / "run")
    script(*first, *second)
    train.run(config, tmp_path / "whole")
    for workdir in (tmp_path / "run", tmp_path / "whole"):
        assert progress_of(workdir) == ([7, 12], checkpoint.Progress(12, 7, 0.95, 5))
        assert not (workdir / "finetune.json").exists()  # the result of the earlier end is removed
    assert_bitwise_equal(read_arrays(tmp_path / "run", 12), read_arrays(tmp_path / "whole", 12))


@pytest.mark.parametrize("killed", [False, True], ids=["at once", "after a kill"])
def test_accuracies_on_other_images_do_not_count(images, start, tmp_path, script, killed):
    config = tuning(images, start, train__steps=40, train__eval_every=1)
    config.train.update(patience=3, checkpoint_every=100)
    script(0.5, 0.9, 0.8, 0.9, 0.1)
    train.run(config, tmp_path / "run")
    arrays = dict(np.load(images))
    np.savez(tmp_path / "others.npz", **arrays | {"labels": 2 - arrays["labels"]})
    config.data.source = f"npz:{tmp_path}/others.npz"
    if killed:
        script()  # the first evaluation ends the command, when the other images are recorded already
        with pytest.raises(StopIteration):
            train.run(config, tmp_path / "run", allowed=("data",))
    script(0.3, 0.2, 0.4, 0.1, 0.1, 0.1)  # the first one is of the same step as before
    train.run(config, tmp_path / "run", allowed=() if killed else ("data",))
    assert progress_of(tmp_path / "run") == ([7, 10], checkpoint.Progress(10, 7, 0.4, 3))


def test_a_missing_report_is_written_when_the_run_is_started_again(joint):
    workdir = joint[0]
    expected = (workdir / "finetune.json").read_bytes()
    (workdir / "finetune.json").unlink()
    config = igpt.load(workdir).config
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, attention="auto"))
    _, evaluation, output = tuned(config, workdir)
    assert (workdir / "finetune.json").read_bytes() == expected and "already finished its 4 steps" in output
    assert evaluation == {"test/accuracy": json.loads(expected)["test_accuracy"]}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model__num_classes": 2}, "labels run from 0 to 2, but model.num_classes is 2.* set model.num_classes=3"),
        ({"data__labels_per_class": 40}, r"40 labels of each class were asked for, but class \d has only \d+ training"),
        ({"data__labels_per_class": 2}, "batch_size is 8, but there are only 6 training images; lower it"),
        ({"objective__classification": 0.0}, "classification is 0.0, but model.num_classes is 3; set both"),
        ({"model__num_classes": 0}, "classification is 1.0, but model.num_classes is 0; set both"),
        ({"model__num_classes": 1}, "num_classes is 1; set both to learn classes"),
        ({"model__pixel_head": False}, "generative is 1.0, but model.pixel_head is False.*objective.generative=0"),
        ({"objective__generative": 0.0, "objective__classification": 0.0}, "are both 0: there is nothing to learn"),
        ({"objective__generative": -1.0}, "objective.generative is -1.0; it must be at least 0"),
        ({"model__causal": False, "objective__drop_rate": 0.0}, "drop_rate is 0.0; BERT drops a share between 0 and 1"),
        ({"model__causal": False, "objective__drop_rate": 1.0}, "drop_rate is 1.0; BERT drops a share between 0 and 1"),
        ({"model__causal": False, "objective__eval_masks": 0}, "eval_masks is 0; it must be at least 1"),
        ({"model__causal": False}, "another network: causal is True there, False here"),
        (
            {"train__patience": 2, "objective__classification": 0.0, "model__num_classes": 0},
            "train.patience waits for a better validation accuracy.*train.patience=0, or objective.classification=1",
        ),
        ({"palette__path": "OTHER"}, r"palette\.path=.*other\.npy has another palette than init_from=.*; use .*'s"),
    ],
    ids=str,
)
def test_a_mistake_is_refused_before_anything_is_written(images, start, tmp_path, changes, message):
    Palette(-HF_CLUSTERS).save(tmp_path / "other.npy")
    changes = {name: str(tmp_path / "other.npy") if value == "OTHER" else value for name, value in changes.items()}
    with pytest.raises(UserError, match=message):
        train.run(tuning(images, start, **changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_classes": 5}, r"classifier of 5 classes, model\.num_classes is 3; set model\.num_classes=5, or start"),
        ({"pixel_head": False}, r"no head for pixels; set model\.pixel_head=False and objective\.generative=0 to"),
    ],
)
def test_a_start_with_other_heads_is_refused(images, tmp_path, fields, message):
    begin = write_imported_run(tmp_path / "start", **NETWORK, **fields)
    with pytest.raises(UserError, match=message):
        train.run(tuning(images, begin), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_unusable_labels_are_refused_in_every_split(images, start, tmp_path, write_npz):
    arrays = dict(np.load(images))
    _, validation, test = split_indices(97, DataConfig("", (1, 1), 1, 0.25, 0.25))
    cases = [(None, "labels are needed, and this source has none"), (np.full(97, 2), "all training images have the")]
    for index in (validation[3], test[5]):
        cases.append((np.where(np.arange(97) == index, 3, arrays["labels"]), "run from 0 to 3, .*num_classes=4"))
        cases.append((np.where(np.arange(97) == index, -1, arrays["labels"]), "run from -1 to 2, .*from 0 on"))
    for labels, message in cases:
        path = write_npz(images=arrays["images"], **({} if labels is None else {"labels": labels}))
        with pytest.raises(UserError, match=message):
            train.run(tuning(path, start), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_matrix_of_many_classes_has_a_file_of_its_own(tmp_path):
    counts = np.eye(finetune.MOST_IN_JSON + 1, dtype=int)
    finetune.report(tmp_path, counts, {"step": 3})
    np.testing.assert_array_equal(np.load(tmp_path / "confusion.npy"), counts)
    assert read_json(tmp_path / "finetune.json")["test_accuracy"] == 1
    counts = np.full((finetune.MOST_IN_JSON,) * 2, 12_345)
    finetune.report(tmp_path, counts, {"step": 3})
    assert read_json(tmp_path / "finetune.json")["confusion"] == counts.tolist()


def test_the_interval_and_the_matrix_follow_from_the_counts(tmp_path):
    results = finetune.report(tmp_path, np.array([[8, 1, 0], [2, 6, 1], [0, 0, 7]]), {"step": 3}, NAMES)
    assert results == json.loads((tmp_path / "finetune.json").read_text()) | {"interval": results["interval"]}
    p, n, z = 21 / 25, 25, 1.96
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    expected = [(middle + sign * half) / (1 + z * z / n) for sign in (-1, 1)]
    np.testing.assert_allclose(results["interval"], expected, rtol=1e-6)
    assert results["test_accuracy"] == 21 / 25 and results["step"] == 3 and results["class_names"] == list(NAMES)
