"""Arguments of the documented classes that do not fit are refused by name."""

import numpy as np
import pytest
import torch

from igpt.errors import UserError
from tests.helpers import API_PADDING, API_SOS, api_labels, api_tokens


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({}, "give either input_ids or inputs_embeds"),
        (dict(input_ids=api_tokens(), inputs_embeds=np.zeros((3, 23, 22))), "and not both"),
        (dict(input_ids=api_tokens() + 1), r"input_ids has the value 18; give 0\.\.17"),
        (dict(input_ids=api_tokens() - 1), r"input_ids has the value -1"),
        (dict(input_ids=api_tokens() / 2), "input_ids is an array of float64; give whole numbers"),
        (dict(input_ids=5), r"input_ids has shape \[\]; give \[B, T\]"),
        (dict(input_ids=["a"]), "input_ids is an array of <U1; give numbers"),
        (dict(input_ids=api_tokens(length=38)), "38 inputs; the model has 37 positions.*give 1 to 37"),
        (
            dict(input_ids=api_tokens(), labels=np.full((3, 23), 17)),
            r"labels after the first position has the value 17; give 0\.\.16 or -100",
        ),
        (dict(input_ids=api_tokens(), labels=api_tokens()[:, 1:]), r"labels has shape \[3, 22\]; give \[3, 23\]"),
        (dict(input_ids=api_tokens(), attention_mask=API_PADDING[:, None, None]), "attention_mask has shape"),
        (dict(input_ids=api_tokens(), position_ids=np.full((3, 23), 37)), "position_ids has the value 37"),
        (dict(input_ids=api_tokens(), head_mask=np.ones(3)), r"head_mask has shape \[3\]; give \[2\] or \[3, 2\]"),
        (dict(input_ids=api_tokens(), encoder_hidden_states=np.zeros((3, 2, 22))), "cross-attention is not supported"),
        (dict(input_ids=api_tokens(), attention_mask=API_PADDING * -9), "attention_mask has other values"),
        (dict(input_ids=api_tokens(), cache_position=np.arange(23)), "positions follow from the cache"),
    ],
)  # fmt: skip
def test_bad_inputs_are_refused_by_name(causal, inputs, message):
    with pytest.raises(UserError, match=message):
        causal[1](**inputs)


def test_tensors_in_bfloat16_are_taken(causal):
    mask = torch.ones(2, dtype=torch.bfloat16)
    ours = causal[1]
    expected = ours(api_tokens(), head_mask=np.ones(2, np.float32), use_cache=True)
    np.testing.assert_array_equal(ours(api_tokens(), head_mask=mask).logits, expected.logits)
    cache = [(torch.zeros(3, 2, 4, 11, dtype=torch.bfloat16),) * 2 for _ in range(3)]
    assert ours(api_tokens(length=5), past_key_values=cache).logits.shape[:2] == (3, 5)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (dict(max_length=5), "the prompt has 5 inputs and would be continued to 5"),
        (dict(max_length=39), "at most n_positions"),
    ],
)  # fmt: skip
def test_bad_prompts_and_lengths_of_generate_are_refused(causal, how, message):
    with pytest.raises(UserError, match=message):
        causal[1].generate(api_tokens(length=5), **how)


def test_one_row_needs_no_first_axis(causal):
    _, ours = causal
    x = api_tokens(batch=1)
    rows = dict(labels=x, attention_mask=np.ones_like(x), position_ids=np.arange(23)[None], token_type_ids=x)
    expected = ours(x, **rows)
    found = ours(x[0], **{name: row[0] for name, row in rows.items()})
    assert found.logits.shape == (1, 23, 17)
    np.testing.assert_array_equal(found.logits, expected.logits)
    np.testing.assert_array_equal(found.loss, expected.loss)
    np.testing.assert_array_equal(ours(x[0].tolist()).logits, ours(x).logits)
    embeds = ours.get_input_embeddings()(x)
    np.testing.assert_array_equal(ours(inputs_embeds=embeds[0]).logits, ours(inputs_embeds=embeds).logits)


def test_the_label_of_the_start_of_sequence_never_counts(causal):
    theirs, ours = causal
    x = api_tokens()
    assert (x[:, 0] == API_SOS).all()
    loss = ours(x, labels=x).loss
    np.testing.assert_array_equal(loss, ours(x, labels=api_labels(x)).loss)
    np.testing.assert_allclose(loss, theirs(torch.tensor(x), labels=torch.tensor(x)).loss.detach(), rtol=1e-6)


def test_small_unsigned_ids_are_not_wrapped(causal):
    _, ours = causal
    x = api_tokens()
    np.testing.assert_array_equal(ours(x.astype(np.uint8), labels=x.astype(np.uint8)).loss, ours(x, labels=x).loss)
    one, other = (ours.generate(prompt, max_length=9) for prompt in (x[:, :5].astype(np.uint8), x[:, :5]))
    np.testing.assert_array_equal(one, other)
