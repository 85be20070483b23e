"""`generate` takes the documented arguments: prompts, settings and outputs agree with transformers."""

import inspect
import json
import reprlib

import numpy as np
import pytest
import torch
import transformers

from igpt.api import GenerationConfig, ImageGPTConfig, ImageGPTForCausalImageModeling
from igpt.api.generation import DEFAULTS, REFUSED
from igpt.errors import UserError
from tests.helpers import API_SIZES, api_tokens, hf_and_ours

LEFT = np.array([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [0, 0, 0, 0, 1]])
EVERYTHING = dict(
    **dict(return_dict_in_generate=True, output_scores=True, output_logits=True),
    **dict(output_attentions=True, output_hidden_states=True),
)


def test_prompts_padded_on_the_left_continue_as_in_transformers(causal):
    theirs, ours = causal
    x = api_tokens(length=5)
    how = dict(max_length=12, do_sample=False)
    expected = theirs.generate(torch.tensor(x), attention_mask=torch.tensor(LEFT), pad_token_id=0, **how)
    padded = ours.generate(x, attention_mask=LEFT, **how)
    np.testing.assert_array_equal(padded, expected)
    np.testing.assert_array_equal(padded[0, 2:], ours.generate(x[:1, 2:], max_length=10)[0])
    for row in (0, 2):  # the padding is never read
        changed = np.where(LEFT == 0, 7, x)
        np.testing.assert_array_equal(ours.generate(changed, attention_mask=LEFT, **how)[row, 5:], padded[row, 5:])


def test_padding_elsewhere_is_refused(causal):
    x = api_tokens(length=5)
    for mask in (LEFT[:, ::-1], np.zeros_like(LEFT)):
        with pytest.raises(UserError, match="skips only padding on the left"):
            causal[1].generate(x, attention_mask=mask)


@pytest.mark.parametrize("mask", [None, LEFT], ids=["full prompts", "padded prompts"])
def test_the_outputs_of_each_step_equal_those_of_transformers(causal, mask):
    theirs, ours = causal
    x = api_tokens(length=5)
    how = dict(max_length=9, do_sample=False, **EVERYTHING)
    padding = torch.tensor(np.ones_like(LEFT) if mask is None else mask)  # without it, colour 0 would be padding
    expected = theirs.generate(torch.tensor(x), pad_token_id=0, attention_mask=padding, **how)
    found = ours.generate(x, attention_mask=mask, **how)
    assert list(found.keys()) == list(expected.keys())
    np.testing.assert_array_equal(found.sequences, expected.sequences)
    for name in ("scores", "logits"):
        assert len(found[name]) == len(expected[name]) == 4
        for one, other in zip(found[name], expected[name], strict=True):
            np.testing.assert_allclose(one, other, rtol=0, atol=1e-5)
    keep = np.ones((3, 8), bool) if mask is None else np.pad(mask, [(0, 0), (0, 3)], constant_values=1) == 1
    for name in ("attentions", "hidden_states"):
        assert len(found[name]) == len(expected[name]) == 4
        start = 0
        for step, peer in zip(found[name], expected[name], strict=True):
            length = peer[0].shape[-2]
            rows = keep[:, start : start + length]  # what padding computes means nothing
            for one, other in zip(step, peer, strict=True):
                one, other = (np.moveaxis(np.asarray(a), -2, 1)[rows] for a in (one, other))
                np.testing.assert_allclose(one, other, rtol=0, atol=1e-5)
            start += length
    assert found.cache.get_seq_length() == expected.past_key_values.get_seq_length() == 8


def test_scores_are_what_the_tokens_are_drawn_from(causal):
    how = dict(max_length=9, do_sample=True, temperature=0.5, top_k=3, seed=5, **EVERYTHING)
    found = causal[1].generate(api_tokens(length=5), **how)
    for step in range(4):
        score, logit, token = (np.asarray(x) for x in (found.scores[step], found.logits[step], found.sequences))
        kept = np.isfinite(score)
        assert (kept.sum(axis=1) == 3).all() and kept[np.arange(3), token[:, 5 + step]].all()
        np.testing.assert_allclose(score[kept], logit[kept] / 0.5, rtol=1e-6)
    only = causal[1].generate(api_tokens(length=5), max_length=9, return_dict_in_generate=True, use_cache=False)
    assert list(only) == ["sequences"]


def test_a_prompt_of_embeddings_continues_like_its_ids(causal):
    theirs, ours = causal
    x = api_tokens(length=5)
    embeds = ours.get_input_embeddings()(x)
    whole = ours.generate(x, max_length=12)
    new = ours.generate(inputs_embeds=embeds, max_new_tokens=7)
    np.testing.assert_array_equal(new, whole[:, 5:])
    expected = theirs.generate(inputs_embeds=torch.tensor(np.asarray(embeds)), max_new_tokens=7, do_sample=False)
    np.testing.assert_array_equal(new, expected)
    scores = ours.generate(inputs_embeds=embeds, max_new_tokens=7, return_dict_in_generate=True, output_scores=True)
    np.testing.assert_array_equal(np.argmax(np.stack(scores.scores, 1), -1), new)
    with pytest.raises(UserError, match=r"inputs_embeds has shape \[3, 5, 7\]"):
        ours.generate(inputs_embeds=np.zeros((3, 5, 7)))


def test_a_tied_head_draws_what_transformers_draws(tmp_path):
    theirs, ours = hf_and_ours(tmp_path, tie_word_embeddings=True)
    x = api_tokens(length=5)
    expected = theirs.generate(torch.tensor(x), max_length=12, do_sample=False)
    np.testing.assert_array_equal(ours.generate(x, max_length=12), expected)
    embeds = ours.get_input_embeddings()(x)
    np.testing.assert_array_equal(ours.generate(inputs_embeds=embeds, max_new_tokens=7), np.asarray(expected)[:, 5:])


def test_the_prompt_has_three_forms_and_is_given_once(causal):
    _, ours = causal
    x = api_tokens(length=5)
    expected = ours.generate(x, max_length=8)
    for prompt in (dict(inputs=x), dict(input_ids=x), dict(input_ids=x.tolist())):
        np.testing.assert_array_equal(ours.generate(**prompt, max_length=8), expected)
    np.testing.assert_array_equal(ours.generate(x[0], max_length=8), expected[:1])
    begun = ours.generate(max_length=3, bos_token_id=4)
    assert begun.shape == (1, 3) and begun[0, 0] == 4
    with pytest.raises(UserError, match="inputs and input_ids are both given"):
        ours.generate(x, input_ids=x)
    with pytest.raises(UserError, match="either input_ids or inputs_embeds"):
        ours.generate(x, inputs_embeds=np.zeros((3, 5, 22)))
    with pytest.raises(UserError, match="rows of different lengths"):
        ours.generate([[1, 2], [3]])


def test_a_model_without_a_start_of_sequence_needs_the_first_tokens():
    model = ImageGPTForCausalImageModeling(ImageGPTConfig(**API_SIZES, prepend_sos=False))
    with pytest.raises(UserError, match="reads no start of sequence; give the first tokens of an image"):
        model.generate(max_length=3)
    assert model.generate([[5]], max_length=3).shape == model.generate(bos_token_id=5, max_length=3).shape == (1, 3)


def test_settings_come_from_the_call_then_its_config_then_the_model_s(causal, tmp_path):
    _, ours = causal
    x = api_tokens(length=5)
    longest = ours.generate(x)
    for config in (dict(max_length=8), GenerationConfig(max_length=8), transformers.GenerationConfig(max_length=8)):
        np.testing.assert_array_equal(ours.generate(x, config), longest[:, :8])
        np.testing.assert_array_equal(ours.generate(x, generation_config=config, max_length=9), longest[:, :9])
    ours.save_pretrained(tmp_path)
    noted = ours.generation_config.to_dict()  # transformers notes what is off
    assert "max_length" not in noted
    own = type(ours).from_pretrained(tmp_path, generation_config=dict(max_length=7))
    np.testing.assert_array_equal(own.generate(x), longest[:, :7])
    own.save_pretrained(tmp_path)
    np.testing.assert_array_equal(type(ours).from_pretrained(tmp_path).generate(x), longest[:, :7])
    assert transformers.GenerationConfig.from_pretrained(tmp_path).max_length == 7
    ours.save_pretrained(tmp_path)
    assert type(ours).from_pretrained(tmp_path).generation_config.to_dict() == noted
    own.generation_config.num_beams = 4
    with pytest.raises(UserError, match="the model's generation_config does not support num_beams=4"):
        own.generate(x)


ID, WHOLE = "give a whole number from 0 to 17", "give a whole number from"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"to_dict": None, "max_length": "1024"}, f"max_length is '1024'; {WHOLE} 1"),
        ({"max_length": 0}, f"max_length is 0; {WHOLE} 1"),
        ({"max_new_tokens": 2.5}, f"max_new_tokens is 2.5; {WHOLE} 1"),
        ({"min_length": -1}, f"min_length is -1; {WHOLE} 0"),
        ({"num_return_sequences": True}, f"num_return_sequences is True; {WHOLE} 1"),
        ({"top_k": 2.5}, f"top_k is 2.5; {WHOLE} 0"),
        ({"temperature": "hot"}, "temperature is 'hot'; give a finite number"),
        ({"temperature": 10**400}, r"temperature is 10+\.\.\.0+; give a finite number"),
        ({"temperature": -(10**30), "do_sample": True}, r"temperature is -1e\+30; it must be 0"),
        ({"top_p": [0.5]}, r"top_p is \[0\.5\]; give a finite number"),
        ({"do_sample": "no"}, "do_sample is 'no'; give True or False"),
        ({"return_dict_in_generate": 1}, "return_dict_in_generate is 1; give True or False"),
        *(({"bos_token_id": x}, f"bos_token_id is .*; {ID}") for x in ("x", 18, -1, 10**12, 1.5, True, [1, 2], {})),
        *(({"pad_token_id": x}, f"pad_token_id is .*; {ID}") for x in ("x", 18, [1])),
        *(({"eos_token_id": x}, f"eos_token_id is .*; {ID}, or a list") for x in ("x", 18, {}, [], [1, "x"], [[1]])),
    ],
    ids=reprlib.repr,
)
def test_a_strange_generation_config_is_refused_in_words(causal, tmp_path, content, message):
    _, ours = causal
    ours.save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=message):
        type(ours).from_pretrained(tmp_path).generate()


def test_each_call_draws_afresh_unless_a_seed_is_given(causal):
    _, ours = causal
    how = dict(do_sample=True, num_return_sequences=4, max_length=12)
    one, other = (np.asarray(ours.generate(**how)) for _ in range(2))
    assert (one != other).any()
    drawn = []
    for _ in range(2):
        np.random.seed(3)  # transformers.set_seed does this
        drawn.append(np.asarray(ours.generate(**how)))
    np.testing.assert_array_equal(*drawn)
    for seed in (-1, 2**32):
        with pytest.raises(UserError, match=f"seed is {seed}"):
            ours.generate(**how, seed=seed)


def test_rows_end_at_an_end_token_as_in_transformers(causal):
    theirs, ours = causal
    x = api_tokens(length=5)
    longest = np.asarray(ours.generate(x, max_length=20))
    ends = [int(longest[0, 9]), int(longest[1, 7])]
    for eos in (ends[0], ends):
        how = dict(max_length=20, do_sample=False, eos_token_id=eos, pad_token_id=2)
        expected = theirs.generate(torch.tensor(x), attention_mask=torch.ones(3, 5), **how)
        np.testing.assert_array_equal(ours.generate(x, **how), expected)


def test_a_least_length_is_refused_where_an_end_token_could_come_earlier(causal):
    theirs, ours = causal
    x = api_tokens(length=5)
    eos = int(ours.generate(x, max_length=6)[0, 5])
    how = dict(max_length=20, do_sample=False, pad_token_id=2)
    for name, value in dict(min_length=6, min_new_tokens=1).items():
        with pytest.raises(UserError, match=f"{name} is {value}, and eos_token_id is {eos}: .*{name}=0"):
            ours.generate(x, eos_token_id=eos, **how, **{name: value})
        np.testing.assert_array_equal(ours.generate(x, **how, **{name: value}), ours.generate(x, **how))
    for least in (dict(min_length=5), dict(min_new_tokens=0)):  # these change nothing
        expected = theirs.generate(torch.tensor(x), attention_mask=torch.ones(3, 5), eos_token_id=eos, **how, **least)
        np.testing.assert_array_equal(ours.generate(x, eos_token_id=eos, **how, **least), expected)


@pytest.mark.parametrize("eos", [None, 4, [4, 6]])
def test_token_ids_of_the_configuration_are_settings_where_the_directory_has_no_others(causal, tmp_path, eos):
    theirs, ours = causal
    ids = dict(bos_token_id=3, pad_token_id=2, eos_token_id=eos)
    theirs.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | ids))
    for without in (False, True):
        if without:
            (tmp_path / "generation_config.json").unlink()
        peer, model = (type(one).from_pretrained(tmp_path) for one in causal)
        for name, value in ids.items():
            assert getattr(model.config, name) == getattr(peer.config, name) == value
            assert model.generation_config.to_dict().get(name) == getattr(peer.generation_config, name)
            assert model.generation_config.to_dict().get(name) == (value if without else None)
    expected = peer.generate(max_length=20, do_sample=False)
    np.testing.assert_array_equal(model.generate(max_length=20), expected)
    x, how = api_tokens(length=5), dict(max_length=20, eos_token_id=None)
    np.testing.assert_array_equal(model.generate(x, **how), ours.generate(x, max_length=20))
    changed = type(ours)(model.config)
    assert changed.generation_config.to_dict() == {name: value for name, value in ids.items() if value is not None}


def test_every_documented_setting_is_honoured_or_refused_by_name(causal):
    x = api_tokens(length=5)
    assert not DEFAULTS.keys() & REFUSED.keys()
    documented = transformers.GenerationConfig().to_dict().keys() - {"transformers_version", "_from_model_config"}
    assert {name for name in documented if name[0] != "_"} <= DEFAULTS.keys() | REFUSED.keys()
    expected = causal[1].generate(x, max_length=7)
    unchanged = {name: one for name, (_, one) in REFUSED.items() if not isinstance(one, tuple)}
    np.testing.assert_array_equal(causal[1].generate(x, max_length=7, **unchanged), expected)
    for name, (reason, _) in REFUSED.items():
        with pytest.raises(UserError, match=f"generate does not support {name}=17: "):
            causal[1].generate(x, max_length=7, **{name: 17})
        assert len(reason) > 20
    with pytest.raises(TypeError, match="no argument 'max_lenght'; did you mean 'max_length'"):
        causal[1].generate(x, max_lenght=7)


def test_arguments_have_the_order_of_the_documentation():
    theirs, ours = (
        [p.name for p in inspect.signature(c.generate).parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
        for c in (transformers.ImageGPTForCausalImageModeling, ImageGPTForCausalImageModeling)
    )
    assert ours == theirs
