import dataclasses
import errno
import json
import re

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from igpt.__main__ import main as run_igpt
from igpt.config import ObjectiveConfig
from igpt.data.batches import Drops
from igpt.data.examples import Split
from igpt.errors import UserError
from igpt.evaluate import evaluate
from tests.helpers import pretrained_and_split, records


def nats(logits, tokens):
    logits = np.asarray(logits, np.float64)
    logits -= logits.max(-1, keepdims=True)
    log_probability = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return -np.take_along_axis(log_probability, tokens[..., None], -1)[..., 0]


def test_the_loss_is_a_mean_over_images_for_any_batch_size():
    pretrained, split, tokens = pretrained_and_split()
    each = nats(pretrained.model(jnp.asarray(tokens)), tokens).mean(1)
    for batch_size in (5, 64):
        results = evaluate(pretrained, split, batch_size)
        assert results["images"] == 23
        np.testing.assert_allclose(results["loss"], each.mean(), rtol=1e-5)
        np.testing.assert_allclose(results["standard_error"], each.std(ddof=1) / np.sqrt(23), rtol=1e-4)
        np.testing.assert_allclose(results["bits_per_dim"], each.mean() / np.log(2), rtol=1e-5)


def test_without_sos_the_loss_leaves_out_the_first_pixel():
    pretrained, split, tokens = pretrained_and_split(sos=False)
    results = evaluate(pretrained, split, 10)
    each = nats(pretrained.model(jnp.asarray(tokens))[:, :-1], tokens[:, 1:]).mean(1)
    np.testing.assert_allclose(results["loss"], each.mean(), rtol=1e-5)
    np.testing.assert_allclose(results["bits_per_dim"], (12 * each.mean() + np.log(11)) / 13 / np.log(2), rtol=1e-5)


def test_a_classifier_is_tested_if_there_are_labels():
    pretrained, split, tokens = pretrained_and_split(num_classes=3)
    results = evaluate(pretrained, split, 10)
    correct = np.argmax(pretrained.model.classify(jnp.asarray(tokens)), -1) == split.labels
    assert results["accuracy"] == correct.mean() and results["interval"][0] < correct.mean() < results["interval"][1]
    right = {str(label): float(np.asarray(correct)[split.labels == label].mean()) for label in range(3)}
    assert results["accuracy_by_class"] == pytest.approx(right)
    named = pretrained._replace(class_names=("ant", "bee", "cat"))
    assert list(evaluate(named, split, 10)["accuracy_by_class"]) == ["ant", "bee", "cat"]
    unlabelled = evaluate(pretrained, Split(split.images, None), 10)
    assert "accuracy" not in unlabelled and unlabelled["loss"] == pytest.approx(results["loss"])


def test_several_splits_are_evaluated_as_one():
    pretrained, split, _ = pretrained_and_split(num_classes=3)
    parts = [split.take(indices) for indices in (np.arange(7), np.arange(0), np.arange(7, 23))]
    found, expected = evaluate(pretrained, parts, 10), evaluate(pretrained, split, 10)
    assert found.keys() == expected.keys() and found["accuracy_by_class"] == expected["accuracy_by_class"]
    assert found["loss"] == pytest.approx(expected["loss"]) and found["images"] == 23


def figures_of(capsys, run, out, *flags):
    run_igpt(["evaluate", f"--model={run}", f"--json={out}", *flags])
    return json.loads(out.read_text()), capsys.readouterr().out


def test_the_command_maps_the_classes_of_another_source_by_name(named_run, write_npz, tmp_path, capsys):
    run, images, labels = named_run
    names, out = ("dark", "medium", "light"), tmp_path / "figures.json"
    by_name, _ = figures_of(capsys, run, out, "--split=all")
    assert by_name["images"] == len(images) and list(by_name["accuracy_by_class"]) == list(names)
    path = write_npz(images=images, labels=2 - labels, names=names[::-1])
    figures, said = figures_of(capsys, run, out, "--split=all", f"--source=npz:{path}")
    assert figures["accuracy"] == by_name["accuracy"] and "classes             3 (dark: " in said
    some = labels > 0  # only medium and light, which the source numbers 0 and 1
    path = write_npz(images=images[some], labels=labels[some] - 1, names=names[1:])
    figures, _ = figures_of(capsys, run, out, "--split=all", f"--source=npz:{path}")
    del by_name["accuracy_by_class"]["dark"]
    assert figures["images"] == some.sum() and figures["accuracy_by_class"] == by_name["accuracy_by_class"]
    path = write_npz(images=images, labels=labels, names=("dark", "grey", "light"))
    with pytest.raises(SystemExit):
        run_igpt(["evaluate", f"--model={run}", f"--source=npz:{path}"])
    lists = "has the classes dark, medium, light; .* has dark, grey, light"
    assert re.search(f"{run} does not know 1 classes of npz:.*: grey. It {lists}", capsys.readouterr().err)
    path = write_npz(images=images, labels=labels)  # without names, numbers count
    figures, _ = figures_of(capsys, run, out, "--split=all", f"--source=npz:{path}")
    assert figures["accuracy"] == by_name["accuracy"]


def test_a_folder_of_one_image_is_evaluated_whole(named_run, tmp_path, capsys):
    run, images, labels = named_run
    path = tmp_path / "photos" / "light" / "a.png"
    path.parent.mkdir(parents=True)
    Image.fromarray(images[np.argmax(labels == 2)]).save(path)
    figures, _ = figures_of(capsys, run, tmp_path / "out.json", "--split=all", f"--source=folder:{tmp_path}/photos")
    assert figures["images"] == 1 and list(figures["accuracy_by_class"]) == ["light"] and figures["split"] == "all"
    assert "loss" in figures and "standard_error" not in figures  # one number has no spread


def test_evaluations_into_one_folder_add_to_what_is_there(named_run, tmp_path, capsys):
    run, *_ = named_run
    earlier = {"step": 9, "probe/accuracy": 0.5}  # as a probe of a later checkpoint leaves it
    (tmp_path / "metrics.jsonl").write_text(json.dumps(earlier) + "\n")
    figures = {}
    for split in ("all", "test"):
        flags = (f"--split={split}", f"--workdir={tmp_path}", "--track=")
        figures[split], _ = figures_of(capsys, run, tmp_path / "out.json", *flags)
    found = records(tmp_path)
    assert found[0] == earlier and [record["step"] for record in found] == [9, 2, 2]
    for split, record in zip(figures, found[1:], strict=True):
        assert record[f"{split}/loss"] == figures[split]["loss"]


def test_unreadable_images_are_passed_over_if_asked_for_and_counted(named_run, tmp_path, capsys):
    run, images, labels = named_run
    for i in range(5):
        path = tmp_path / "photos" / ("dark", "medium", "light")[labels[i]] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(images[i]).save(path)
    path.write_bytes(b"no image")
    flags = ("--split=all", f"--source=folder:{tmp_path}/photos")
    with pytest.raises(SystemExit):
        figures_of(capsys, run, tmp_path / "out.json", *flags)
    assert "(igpt palette, prepare and evaluate: --on_unreadable=skip); or remove it" in capsys.readouterr().err
    figures, said = figures_of(capsys, run, tmp_path / "out.json", *flags, "--on_unreadable=skip")
    assert figures["images"] == 4 and "passed over 1 unreadable images, such as: " in said and "4.png" in said


def test_printed_numbers_are_short(named_run, tmp_path, capsys):
    figures, said = figures_of(capsys, named_run[0], tmp_path / "out.json")
    low, high = figures["interval"]
    assert f"{'interval':<20}{low:.4f} to {high:.4f}\n" in said and f"{'loss':<20}{figures['loss']:.6g}\n" in said
    assert not re.search(r"\.\d{10}", said)


def test_a_source_of_another_size_or_too_few_images_is_explained_by_flags_of_the_command(
    named_run, write_npz, tmp_path, capsys
):
    run, images, labels = named_run
    path = write_npz(images=images[:, :3], labels=labels)
    with pytest.raises(SystemExit):
        run_igpt(["evaluate", f"--model={run}", f"--source=npz:{path}"])
    assert "--preprocess=shrink (igpt)" in capsys.readouterr().err
    path = write_npz(images=images[:3], labels=labels[:3])
    with pytest.raises(SystemExit):
        run_igpt(["evaluate", f"--model={run}", f"--source=npz:{path}", "--split=validation"])
    assert "igpt evaluate reads all of them with --split=all" in capsys.readouterr().err


def test_a_second_evaluation_compiles_nothing(monkeypatch):
    pretrained, split, _ = pretrained_and_split(num_classes=3)
    evaluate(pretrained, split, 10)
    monkeypatch.setattr("igpt.evaluate.make_loss", lambda *_: pytest.fail("traced again"))
    evaluate(pretrained, split, 10)


def test_bert_predicts_what_its_masks_drop_without_bits_per_dim():
    pretrained, split, tokens = pretrained_and_split(causal=False)
    config = dataclasses.replace(pretrained.config, objective=ObjectiveConfig(drop_rate=0.4))
    pretrained = pretrained._replace(config=config)
    results = evaluate(pretrained, split, 10, masks=2)
    keep = Drops(0.4, 2).of_images(np.arange(23), 13)
    each = []
    for m in range(2):
        logits = pretrained.model.logits(pretrained.model.normed(jnp.asarray(tokens), keep=jnp.asarray(keep[:, m])))
        dropped = ~keep[:, m]
        each.append((nats(logits, tokens) * dropped).sum(1) / dropped.sum(1))
    np.testing.assert_allclose(results["loss"], np.mean(each), rtol=1e-5)
    assert "bits_per_dim" not in results


def test_a_network_without_heads_cannot_be_evaluated():
    pretrained, split, _ = pretrained_and_split(pixel_head=False)
    with pytest.raises(UserError, match="probe them"):
        evaluate(pretrained, split, 10)


def test_the_command_evaluates_a_run_on_its_own_data_and_on_others(tiny_config, tmp_path, capsys):
    import train

    trained = train.run(tiny_config, tmp_path / "run").evaluation
    run_igpt(["evaluate", f"--model={tmp_path}/run", "--split=validation", f"--json={tmp_path}/figures.json"])
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["loss"] == pytest.approx(trained["eval/loss"], rel=1e-5)
    assert figures["step"] == 6 and "bits_per_dim" in capsys.readouterr().out
    np.savez(tmp_path / "other.npz", images=np.zeros((9, 8, 8), np.uint8))
    run_igpt(
        ["evaluate", f"--model={tmp_path}/run", f"--source=npz:{tmp_path}/other.npz", f"--json={tmp_path}/other.json"]
    )
    assert json.loads((tmp_path / "other.json").read_text())["images"] == 2


def test_results_that_cannot_be_written_are_printed_all_the_same(named_run, tmp_path, capsys, monkeypatch):
    def fails(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("igpt.evaluate.write_json", fails)
    with pytest.raises(SystemExit):
        run_igpt(["evaluate", f"--model={named_run[0]}", f"--json={tmp_path}/results.json"])
    printed = capsys.readouterr()
    assert "accuracy" in printed.out and "--json=" in printed.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model=absent"], "no directory absent"),
        (["--model=absent", "--batch_size=0"], "--batch_size is 0"),
        (
            ["--model=absent", "--json=absent/a.json"],
            "--json=absent/a.json cannot be written: No such file or directory",
        ),
        (["--model=absent", "--track=wandb"], "--track=wandb needs --workdir"),
        (["--model=absent", "--workdir="], "--workdir is empty"),
        (["--model=absent", "--workdir=run"], "--workdir=run holds a run or a model; name another folder"),
    ],
)
def test_a_mistake_ends_in_one_message_and_exit_code_2(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    with pytest.raises(SystemExit) as stopped:
        run_igpt(["evaluate", *arguments])
    assert stopped.value.code == 2 and message in capsys.readouterr().err
