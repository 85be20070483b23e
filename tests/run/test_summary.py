import dataclasses
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from configs import base
from igpt.config import Config, ObjectiveConfig
from igpt.data.examples import ArrayImages, Source, Split
from igpt.files import as_path
from igpt.run.directory import RunDirectory
from igpt.run.summary import _next_of_vqvae, describe, farewell, learning_goal
from igpt.sharding import make_mesh
from tests.helpers import GREY_PALETTE, TINY_MODEL


@pytest.mark.parametrize(
    ("generative", "classification", "causal", "text"),
    [
        (1.0, 0.0, True, "the next pixel"),
        (1.0, 0.0, False, "15% of the pixels, dropped (BERT)"),
        (1.0, 1.0, True, "the next pixel + 7 classes"),
        (0.5, 2.0, True, "0.5 x the next pixel + 2 x 7 classes"),
        (0.0, 1.0, True, "7 classes"),
    ],
)
def test_the_summary_names_each_objective_and_every_weight_but_1(generative, classification, causal, text):
    objective = ObjectiveConfig(generative, classification)
    model = dataclasses.replace(TINY_MODEL, causal=causal, num_classes=7)
    assert learning_goal(objective, model, "pixel") == text
    assert learning_goal(objective, model, "code") == text.replace("pixel", "code")


@pytest.mark.parametrize(("source", "prepares"), [("digits", True), ("scattered:digits", False)])
def test_a_vqvae_of_images_that_no_file_can_hold_is_used_without_preparing_them(source, prepares):
    config = base.get_config()
    config.program, config.data.source = "vqvae", source
    lines = _next_of_vqvae(Config.of(config), Path("run"))
    assert any("igpt prepare" in line for line in lines) == prepares
    assert "--config.tokenizer=run" in lines[-1] and ("tokens:" in lines[-1]) == prepares


def test_codes_of_a_run_in_a_bucket_are_prepared_on_a_disk():
    config = base.get_config()
    config.program = "vqvae"
    prepare, use = _next_of_vqvae(Config.of(config), as_path("gs://mine/run"))
    assert "--tokenizer=gs://mine/run --out=run-codes" in prepare and "tokens:run-codes" in use


def test_a_run_with_which_nothing_can_be_done_next_says_nothing_of_it(capsys, tmp_path):
    config = base.get_config()
    config.model.causal = False  # no samples, and without labels no probe
    source = Source("it", *[Split(ArrayImages(np.zeros((2, 8, 8, 3), np.uint8)), None)] * 3, channels=1)
    run = RunDirectory(tmp_path / "run", Config.of(config, trains=True))
    farewell(run, 9, {"eval/loss": 1.0}, 1.0, source)
    assert "next:" not in capsys.readouterr().out


def test_the_marginal_of_sorted_images_is_that_of_all_classes(capsys):
    tokens = np.zeros((12_000, 8, 8), np.uint8)
    tokens[10_000:] = 5
    source = Source("it", *[Split(ArrayImages(GREY_PALETTE.decode(tokens)), None)] * 3, channels=1)
    config = base.get_config()
    config.palette.colors = 17
    config = Config.of(config, trains=True)
    describe("run", "fresh", config, config.network(), SimpleNamespace(params={}), make_mesh(), source, GREY_PALETTE)
    share = 1 / 6
    expected = -share * np.log(share) - (1 - share) * np.log(1 - share)
    assert float(capsys.readouterr().out.split("marginal: ")[1].split()[0]) == pytest.approx(expected, abs=0.02)


@pytest.mark.parametrize(("sos", "marginal", "said"), [(True, 2 / 64, False), (False, 1 / 63, True)])
def test_the_marginal_is_that_of_the_tokens_that_the_network_predicts(capsys, sos, marginal, said):
    tokens = np.zeros((4, 8, 8), np.int64)
    tokens[:2, 0, :2] = 5  # only the first two pixels vary, by one bit each
    source = Source("it", *[Split(ArrayImages(GREY_PALETTE.decode(tokens)), None)] * 3, channels=1)
    config = base.get_config()
    config.palette.colors, config.model.sos = 17, sos
    config = Config.of(config, trains=True)
    state = SimpleNamespace(params={})
    describe("run", "fresh", config, config.network(), state, make_mesh(), source, GREY_PALETTE)
    printed = capsys.readouterr().out
    assert f"marginal: {marginal * np.log(2):.4f}" in printed and ("reads no SOS" in printed) == said
