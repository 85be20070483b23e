"""Arguments of the documented classes that do not fit are refused by name."""

import numpy as np
import pytest

from igpt.errors import UserError
from tests.helpers import API_PADDING, api_tokens


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({}, "give either input_ids or inputs_embeds"),
        (dict(input_ids=api_tokens(), inputs_embeds=np.zeros((3, 23, 22))), "and not both"),
        (dict(input_ids=api_tokens() + 1), r"input_ids has the value 18; give 0\.\.17"),
        (dict(input_ids=api_tokens() - 1), r"input_ids has the value -1"),
        (dict(input_ids=api_tokens() / 2), "input_ids is an array of float64; give whole numbers"),
        (dict(input_ids=["a"]), "input_ids is an array of <U1; give numbers"),
        (dict(input_ids=api_tokens(length=38)), "38 inputs; the model has 37 positions.*give 1 to 37"),
        (dict(input_ids=api_tokens(), labels=api_tokens()), r"labels has the value 17; give 0\.\.16 or -100"),
        (dict(input_ids=api_tokens(), labels=api_tokens()[:, 1:]), r"labels has shape \[3, 22\]; give \[3, 23\]"),
        (dict(input_ids=api_tokens(), attention_mask=API_PADDING[:, None, None]), "attention_mask has shape"),
        (dict(input_ids=api_tokens(), position_ids=np.full((3, 23), 37)), "position_ids has the value 37"),
        (dict(input_ids=api_tokens(), head_mask=np.ones(3)), r"head_mask has shape \[3\]; give \[2\] or \[3, 2\]"),
        (dict(input_ids=api_tokens(), encoder_hidden_states=np.zeros((3, 2, 22))), "cross-attention is not supported"),
        (dict(input_ids=api_tokens(), past_key_values=((1, 2),)), "past_key_values is a tuple"),
    ],
)  # fmt: skip
def test_bad_inputs_are_refused_by_name(causal, inputs, message):
    with pytest.raises(UserError, match=message):
        causal[1](**inputs)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (dict(max_length=5), "the prompt has 5 inputs and would be continued to 5"),
        (dict(max_length=39), "at most n_positions"),
        (dict(attention_mask=np.zeros((3, 5))), "attention_mask has zeros"),
    ],
)  # fmt: skip
def test_bad_prompts_and_lengths_of_generate_are_refused(causal, how, message):
    with pytest.raises(UserError, match=message):
        causal[1].generate(api_tokens(length=5), **how)
