"""Outputs of the documented classes are mappings, and a cache may have any of the forms that transformers had."""

import numpy as np
import pytest
import torch

from igpt.errors import UserError
from tests.helpers import api_labels, api_tokens


def test_outputs_are_mappings_of_what_was_requested(causal):
    x = api_tokens()
    output = causal[1](x, labels=api_labels(x), use_cache=False)
    assert len(output) == 2 and list(output.keys()) == ["loss", "logits"] == list(output)
    assert dict(output.items())["logits"] is output.logits is output.get("logits") is list(output.values())[1]
    assert "loss" in output and "cache" not in output and output.get("attentions", 3) == 3
    for name in ("hidden_states", "cross_attentions", "past_key_values", "nonsense"):
        with pytest.raises(KeyError, match=name):
            output[name]
    assert output.cross_attentions is output.hidden_states is output.past_key_values is None
    output.loss = output.loss * 2
    assert output["loss"] == output[0] == output.loss


def test_indices_skip_what_was_not_requested(causal):
    x = api_tokens()
    output = causal[1](x, labels=api_labels(x), use_cache=False)
    assert output[0] is output.loss is output["loss"] and output[-1] is output.logits
    as_tuple = causal[1](x, return_dict=False)
    np.testing.assert_array_equal(as_tuple[0], output.logits)
    assert isinstance(as_tuple, tuple) and as_tuple[1].get_seq_length() == 23


def test_tuple_and_mapping_have_the_same_values_in_the_order_of_transformers(causal):
    theirs, ours = causal
    x = api_tokens()
    wanted = dict(labels=api_labels(x), output_hidden_states=True, output_attentions=True)
    mapping, as_tuple = ours(x, **wanted), ours(x, **wanted, return_dict=False)
    assert len(as_tuple) == len(mapping) == 5
    for one, other in zip(mapping.to_tuple(), as_tuple, strict=True):
        assert type(one) is type(other)
    peer = theirs(torch.tensor(x), **wanted | dict(labels=torch.tensor(wanted["labels"])))
    assert list(peer.keys()) == list(mapping.keys())


def test_the_cache_has_two_names_but_is_given_once(causal):
    _, ours = causal
    x = api_tokens()
    first = ours(x[:, :20])
    assert first.cache is first.past_key_values is first["cache"] is first["past_key_values"]
    one, other = (ours(x[:, 20:], **{name: first.cache}).logits for name in ("cache", "past_key_values"))
    np.testing.assert_array_equal(one, other)
    np.testing.assert_array_equal(ours(x[:, 20:], first.cache).logits, one)  # the second positional argument
    with pytest.raises(UserError, match="cache and past_key_values are both given"):
        ours(x[:, 20:], first.cache, past_key_values=first.cache)


def test_caches_of_transformers_4_and_5_are_accepted(causal):
    theirs, ours = causal
    x = api_tokens()
    first = ours(x[:, :20]).cache
    expected = ours(x[:, 20:], first)
    of_torch = theirs(torch.tensor(x[:, :20])).past_key_values
    legacy = first.to_legacy_cache()
    assert len(legacy) == len(first) == 3 and legacy[1][0].shape == (3, 2, 20, 11)
    for cache in (legacy, [list(layer) for layer in legacy], of_torch):
        found = ours(x[:, 20:], cache)
        np.testing.assert_allclose(found.logits, expected.logits, rtol=0, atol=1e-5)
        assert found.cache.get_seq_length(0) == 23
    for empty in ((), type(of_torch)()):
        np.testing.assert_array_equal(ours(x, empty).logits, ours(x).logits)


@pytest.mark.parametrize(
    ("cache", "message"),
    [
        (3, "the cache is a int"),
        (((1, 2),), "give 3, 3, 2|layers, rows, heads"),
        ((("a", "b"),) * 3, "of other things than arrays"),
        (((np.zeros((2, 2, 5, 11)),) * 2,) * 3, r"head size \[3, 2, 2, 5, 11\]; give \[3, 3, 2, 5, 11\]"),
    ],
)
def test_a_cache_that_does_not_fit_is_refused(causal, cache, message):
    with pytest.raises(UserError, match=message):
        causal[1](api_tokens(), cache)
