import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest

from igpt.__main__ import main as run_igpt
from igpt.config import Config, ObjectiveConfig
from igpt.data.batches import Drops
from igpt.data.examples import ArrayImages, Split
from igpt.errors import UserError
from igpt.evaluate import evaluate
from igpt.interop.load import Pretrained
from igpt.palette import Palette
from tests.helpers import TINY_MODEL, random_model


def pretrained_and_split(count=23, labels=True, **changes):
    palette = Palette(np.linspace(-1, 1, 11)[:, None].repeat(3, axis=1))
    network = dataclasses.replace(TINY_MODEL, **changes)
    config = Config.of_network(network, (1, 13), 1)
    tokens = np.random.default_rng(0).integers(0, 11, (count, 1, 13))
    split = Split(ArrayImages(palette.decode(tokens)), np.arange(count, dtype=np.int32) % 3 if labels else None)
    return Pretrained(config, random_model(network), palette), split, tokens[:, 0]


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
        np.testing.assert_allclose(results["standard_error"], each.std() / np.sqrt(23), rtol=1e-4)
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
    unlabelled = evaluate(pretrained, Split(split.images, None), 10)
    assert "accuracy" not in unlabelled and unlabelled["loss"] == pytest.approx(results["loss"])


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

    trained = train.run(tiny_config, tmp_path / "run")
    run_igpt(["evaluate", f"--model={tmp_path}/run", "--split=validation", f"--json={tmp_path}/figures.json"])
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["loss"] == pytest.approx(trained["eval/loss"], rel=1e-5)
    assert figures["step"] == 6 and "bits_per_dim" in capsys.readouterr().out
    np.savez(tmp_path / "other.npz", images=np.zeros((9, 8, 8), np.uint8))
    run_igpt(
        ["evaluate", f"--model={tmp_path}/run", f"--source=npz:{tmp_path}/other.npz", f"--json={tmp_path}/other.json"]
    )
    assert json.loads((tmp_path / "other.json").read_text())["images"] == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model=absent"], "no directory absent"),
        (["--model=absent", "--batch_size=0"], "--batch_size is 0"),
    ],
)
def test_a_mistake_ends_in_one_message_and_exit_code_2(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        run_igpt(["evaluate", *arguments])
    assert stopped.value.code == 2 and message in capsys.readouterr().err
