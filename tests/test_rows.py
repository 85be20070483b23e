"""Drawing row by row gives the bytes of drawing at once."""

import dataclasses

import numpy as np
import pytest

from igpt import sample
from igpt.config import Config
from igpt.draw import Sampling
from igpt.interop.load import Pretrained
from igpt.model import ModelConfig
from igpt.palette import Palette
from igpt.rows import UNDRAWN, completed_rows, sampled_rows
from igpt.sample import complete_images, sample_images
from tests.helpers import random_model

HEIGHT, WIDTH = 5, 7
NETWORK = ModelConfig(width=14, depth=2, num_heads=2, vocab_size=11, seq_len=HEIGHT * WIDTH)
SAMPLING = Sampling(temperature=1.3, top_k=7)


@pytest.fixture(autouse=True)
def segments(monkeypatch):
    """The cache grows to 16, 32 and 35 positions: in the middle of rows."""
    monkeypatch.setattr(sample, "SHORTEST_SEGMENT", 16)


def pretrained(**fields):
    network = dataclasses.replace(NETWORK, **fields)
    greys = Palette(np.linspace(-0.9, 0.9, 11)[:, None].repeat(3, axis=1))  # no colour is white
    return Pretrained(Config.of_network(network, (HEIGHT, WIDTH), 1), random_model(network), greys)


def test_samples_grow_by_a_row_and_end_as_if_drawn_at_once():
    whole = sample_images(pretrained(), 3, 5, SAMPLING)
    states = list(sampled_rows(pretrained(), 3, 5, SAMPLING))
    assert len(states) == HEIGHT
    for row, state in enumerate(states, 1):
        np.testing.assert_array_equal(state[:, :row], whole[:, :row])
        assert (state[:, row:] == UNDRAWN).all()


@pytest.mark.parametrize("fields", [{}, {"sos": False}], ids=str)
def test_completions_begin_below_the_given_rows(fields):
    ours = pretrained(**fields)
    image = ours.tokenizer.decode(np.random.default_rng(0).integers(0, 11, (HEIGHT, WIDTH)))
    states = list(completed_rows(ours, image, 0.4, 4, 1, SAMPLING))
    np.testing.assert_array_equal(states[-1], complete_images(ours, image[None], 0.4, 4, 1, SAMPLING)[0])
    assert len(states) == HEIGHT - 2 and (states[0][:, 3:] == UNDRAWN).all()
    np.testing.assert_array_equal(states[0][0, :2], image[:2])
