import numpy as np
import pytest

from igpt.flops import attention_flops_per_image, train_flops_per_image
from igpt.model import PRESETS, ModelConfig

SMALL = dict(width=14, depth=3, num_heads=2, vocab_size=11, seq_len=13, mlp_width=17)


@pytest.mark.parametrize(("preset", "giga"), [("s", 0.530), ("m", 2.95), ("l", 8.61), ("l48", 9.18), ("xl", 45.3)])
def test_flops_are_six_a_parameter_and_half_the_attention(preset, giga):
    config = ModelConfig(**PRESETS[preset])
    assert np.isclose(train_flops_per_image(config) / config.seq_len / 1e9, giga, rtol=0.005)


def test_attention_counts_half_of_the_pairs_only_if_it_is_causal():
    causal, bert = ModelConfig(**SMALL), ModelConfig(**SMALL, causal=False)
    everything = 3 * 2 * (2 * 14 * 13 * 13)  # layers; scores and mixing; a multiply-add for each channel of a pair
    assert attention_flops_per_image(causal) == everything / 2
    assert attention_flops_per_image(causal, "full") == everything
    assert attention_flops_per_image(bert) == attention_flops_per_image(bert, "full") == everything


def test_a_training_step_costs_three_forward_passes():
    config = ModelConfig(**SMALL)
    block = 14 * 3 * 14 + 14 * 14 + 2 * 14 * 17  # qkv, out, up and down
    forward = 2 * 13 * (3 * block + 14 * 11) + attention_flops_per_image(config)
    assert train_flops_per_image(config) == 3 * forward
