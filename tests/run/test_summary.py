import dataclasses

import pytest

from igpt.config import ObjectiveConfig
from igpt.run.summary import learning_goal
from tests.helpers import TINY_MODEL


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
    assert learning_goal(objective, model) == text
