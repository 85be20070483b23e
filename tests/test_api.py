"""The documented classes against transformers' own, on the same random weights, biases and all."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
import transformers
from scipy.stats import chi2_contingency
from test_pretrained import run_directory

from igpt import api, hf_weights, weight_files
from igpt.api import ImageGPTConfig, ImageGPTForCausalImageModeling, ImageGPTForImageClassification, ImageGPTModel
from igpt.api_forward import forward
from igpt.errors import UserError
from igpt.sample import _generate

SOS = 17
SIZES = dict(vocab_size=SOS + 1, n_positions=37, n_embd=22, n_layer=3, n_head=2)
PAIRS = {
    "pixels": (transformers.ImageGPTForCausalImageModeling, ImageGPTForCausalImageModeling),
    "classes": (transformers.ImageGPTForImageClassification, ImageGPTForImageClassification),
    "none": (transformers.ImageGPTModel, ImageGPTModel),
}


def both(directory, head="pixels", **config):
    """A transformers model with random weights, and ours loaded from the directory that it saved."""
    theirs, ours = PAIRS[head]
    torch.manual_seed(0)
    model = theirs(transformers.ImageGPTConfig(**SIZES | config)).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(0, 0.3)
    model.save_pretrained(directory)
    return model, ours.from_pretrained(directory)


@pytest.fixture(scope="module")
def causal(tmp_path_factory):
    return both(tmp_path_factory.mktemp("causal"))


def tokens(batch=3, length=23, seed=0):
    drawn = np.random.default_rng(seed).integers(0, SOS, (batch, length))
    drawn[:, 0] = SOS
    return drawn


def labels_of(tokens):
    return np.where(tokens == SOS, -100, tokens)


def call_both(models, **inputs):
    theirs, ours = models
    as_torch = {name: torch.tensor(x) if isinstance(x, np.ndarray) else x for name, x in inputs.items()}
    with torch.no_grad():
        return theirs(**as_torch), ours(**inputs)


def assert_close(theirs, ours, tolerance=1e-5):
    """Every output that transformers gives, ours gives too, of the same shape and value."""
    for name in ("loss", "logits", "last_hidden_state"):
        if getattr(theirs, name, None) is not None:
            close(theirs[name], ours[name], tolerance)
    for name in ("hidden_states", "attentions"):
        if getattr(theirs, name) is not None:
            assert len(theirs[name]) == len(ours[name])
            for one, other in zip(theirs[name], ours[name], strict=True):
                close(one, other, tolerance)
    if theirs.past_key_values is not None:
        assert ours.past_key_values.get_seq_length() == theirs.past_key_values.get_seq_length()
        for one, other in zip(theirs.past_key_values.layers, ours.past_key_values.layers, strict=True):
            close(one.keys, other.keys, tolerance)
            close(one.values, other.values, tolerance)


def close(theirs, ours, tolerance):
    assert tuple(theirs.shape) == ours.shape
    np.testing.assert_allclose(theirs.numpy(), np.asarray(ours), rtol=0, atol=tolerance)


EVERYTHING = dict(output_hidden_states=True, output_attentions=True)
FLAGS = ("scale_attn_weights", "scale_attn_by_inverse_layer_idx", "reorder_and_upcast_attn", "tie_word_embeddings")
PADDING = np.ones((3, 23), np.int64)
PADDING[0, :4] = PADDING[1, 10:12] = PADDING[2, -1] = 0


@pytest.mark.parametrize("values", list(itertools.product((False, True), repeat=4)))
def test_every_product_of_the_flags_computes_what_transformers_does(values, tmp_path):
    models = both(tmp_path, n_inner=29, **dict(zip(FLAGS, values, strict=True)))
    x = tokens()
    assert_close(*call_both(models, input_ids=x, labels=labels_of(x), attention_mask=PADDING, **EVERYTHING))
    assert_close(*call_both(models, input_ids=x))


@pytest.mark.parametrize("name", ["gelu", "gelu_new", "relu", "silu", "swish", "tanh"])
def test_every_activation_computes_what_transformers_does(name, tmp_path):
    assert_close(*call_both(both(tmp_path, activation_function=name), input_ids=tokens()))


def test_positions_token_types_and_embeddings_can_be_given(causal):
    theirs, _ = causal
    rng = np.random.default_rng(1)
    positions, types = rng.integers(0, 37, (3, 23)), rng.integers(0, SOS + 1, (3, 23))
    assert_close(*call_both(causal, input_ids=tokens(), position_ids=positions, token_type_ids=types, **EVERYTHING))
    assert_close(*call_both(causal, input_ids=tokens(), position_ids=positions[:1]))
    embeds = theirs.transformer.wte(torch.tensor(tokens())).detach().numpy()
    assert_close(*call_both(causal, inputs_embeds=embeds, token_type_ids=types, labels=labels_of(tokens())))


def test_a_sequence_in_pieces_through_the_cache_is_the_whole_sequence(causal):
    theirs, ours = causal
    x = tokens(length=37)
    whole = ours(x)
    past, logits = None, []
    for piece in np.split(x, [5, 6, 7, 20, 36], axis=1):
        output = ours(piece, past_key_values=past)
        past = output.past_key_values
        logits.append(output.logits)
    np.testing.assert_allclose(np.concatenate(logits, axis=1), whole.logits, rtol=0, atol=1e-5)
    assert past.get_seq_length() == 37

    mask = np.ones((3, 23), np.int64)
    mask[0, :3] = mask[1, 21] = 0
    with torch.no_grad():
        first = theirs(torch.tensor(x[:, :20]))
        second = theirs(
            torch.tensor(x[:, 20:23]),
            past_key_values=first.past_key_values,
            attention_mask=torch.tensor(mask),
            **EVERYTHING,
        )
    cached = ours(x[:, :20]).past_key_values
    assert_close(second, ours(x[:, 20:23], past_key_values=cached, attention_mask=mask, **EVERYTHING))
    assert cached.get_seq_length() == 20  # unlike theirs, a cache is never changed: it can be continued twice


def test_a_masked_head_is_a_head_whose_output_is_nothing(causal):
    _, ours = causal
    mask = np.array([[1.0, 1.0], [0.0, 1.0], [1.0, 0.5]])
    out = ours.params["blocks"]["out"]["kernel"] * mask[:, :, None, None]
    blocks = ours.params["blocks"] | {"out": ours.params["blocks"]["out"] | {"kernel": out}}
    expected = ours(tokens(), params=ours.params | {"blocks": blocks})
    masked = ours(tokens(), head_mask=mask, output_attentions=True)
    np.testing.assert_allclose(masked.logits, expected.logits, rtol=0, atol=1e-5)
    assert not np.any(masked.attentions[1][:, 0])
    np.testing.assert_allclose(ours(tokens(), head_mask=[1, 1]).logits, ours(tokens()).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("config", "labels"),
    [
        (dict(num_labels=5), np.array([4, 0, 2])),
        (dict(num_labels=1), np.array([0.3, -2.0, 1.0], np.float32)),
        (dict(num_labels=5), np.random.default_rng(0).integers(0, 2, (3, 5)).astype(np.float32)),
        (
            dict(num_labels=5, problem_type="regression"),
            np.random.default_rng(0).normal(size=(3, 5)).astype(np.float32),
        ),
    ],
    ids=["classes", "one number", "several classes at once", "several numbers"],
)
def test_the_classifier_gives_the_logits_and_the_loss_of_its_problem(config, labels, tmp_path):
    models = both(tmp_path, head="classes", **config)
    assert_close(*call_both(models, input_ids=tokens()[:, 1:], labels=labels, **EVERYTHING))


def test_the_bare_model_gives_hidden_states(tmp_path):
    models = both(tmp_path, head="none")
    assert_close(*call_both(models, input_ids=tokens(), attention_mask=PADDING, **EVERYTHING))
    assert_close(*call_both(models, input_ids=tokens(), use_cache=False))


def test_gradients_and_one_adamw_step_are_those_of_pytorch(tmp_path):
    theirs, ours = both(tmp_path)
    x = tokens()
    step = dict(lr=3e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.01)
    optimizer = torch.optim.AdamW(theirs.parameters(), **step)
    theirs(torch.tensor(x), labels=torch.tensor(labels_of(x))).loss.backward()

    gradients = jax.jit(jax.grad(lambda params: ours(x, labels=labels_of(x), params=params).loss))(ours.params)
    named = hf_weights.named_tensors(gradients, ours._network)
    expected = dict(theirs.named_parameters())
    assert named.keys() == expected.keys()
    for name, gradient in named.items():
        np.testing.assert_allclose(gradient, expected[name].grad.numpy(), rtol=0, atol=1e-5, err_msg=name)

    optimizer.step()
    adamw = optax.adamw(step["lr"], *step["betas"], eps=step["eps"], weight_decay=step["weight_decay"])
    updates, _ = adamw.update(gradients, adamw.init(ours.params), ours.params)
    moved = hf_weights.named_tensors(optax.apply_updates(ours.params, updates), ours._network)
    for name, weight in moved.items():
        tiny = np.abs(expected[name].grad.numpy()) < 1e-6  # there Adam's first step is a sign of rounding errors
        difference = np.abs(weight - expected[name].detach().numpy())
        assert difference[~tiny].max(initial=0) < 1e-5, name


def test_greedy_generation_is_that_of_transformers_token_by_token(causal):
    theirs, ours = causal
    x = tokens(length=5)
    for stop in (6, 38):
        expected = theirs.generate(torch.tensor(x), max_length=stop, do_sample=False)
        np.testing.assert_array_equal(ours.generate(x, max_length=stop), expected)
    np.testing.assert_array_equal(ours.generate(x), expected)  # by default the whole image
    np.testing.assert_array_equal(ours.generate(x, max_new_tokens=3), expected[:, :8])
    returned = ours.generate(torch.tensor(x), max_length=6)
    assert isinstance(returned, torch.Tensor) and returned.dtype == torch.int64


@pytest.mark.parametrize(
    "how", [dict(top_k=0), dict(temperature=0.5, top_k=0), dict(top_k=3), dict(top_k=0, top_p=0.7), {}, dict(
        temperature=1.5, top_k=6, top_p=0.8)], ids=str
)  # fmt: skip
def test_draws_have_the_distribution_of_transformers_draws(how, tmp_path_factory, request):
    theirs, ours = request.getfixturevalue("causal")
    draws = 5_000
    torch.manual_seed(1)
    start = torch.full((draws, 1), SOS)
    expected = theirs.generate(start, max_length=3, do_sample=True, **how).numpy()
    found = np.asarray(
        ours.generate(np.full((1, 1), SOS), max_length=3, do_sample=True, num_return_sequences=draws, **how)
    )
    pairs = [x[:, 1] * SOS + x[:, 2] for x in (expected, found)]
    counts = np.stack([np.bincount(pair, minlength=SOS * SOS) for pair in pairs])
    rare = counts.sum(axis=0) < 20  # too few for the test: counted together
    counts = np.concatenate([counts[:, ~rare], counts[:, rare].sum(axis=1, keepdims=True)], axis=1)
    counts = counts[:, counts.sum(axis=0) > 0]
    assert chi2_contingency(counts).pvalue > 1e-3


def test_the_same_seed_draws_the_same_images_and_another_seed_others(causal):
    _, ours = causal
    one, same, other = (np.asarray(ours.generate(do_sample=True, num_return_sequences=4, seed=s)) for s in (3, 3, 4))
    np.testing.assert_array_equal(one, same)
    assert one.shape == (4, 38) and (one[:, 0] == SOS).all() and len(np.unique(one, axis=0)) == 4
    assert (one != other).any()


def test_lengths_of_a_size_share_their_programs(causal):
    _, ours = causal
    ours(tokens(length=32))
    ours.generate(tokens(length=8), max_length=30)
    compiled = forward._cache_size(), _generate._cache_size()
    for length in (17, 19, 24, 31):
        ours(tokens(length=length))
    for length, stop in ((5, 20), (7, 38), (6, 9)):
        ours.generate(tokens(length=length), max_length=stop)
    assert (forward._cache_size(), _generate._cache_size()) == compiled


def test_dropout_is_off_unless_a_key_is_given(causal):
    _, ours = causal
    x = tokens()
    off, again = ours(x).logits, ours(x).logits
    on = [ours(x, dropout_key=jax.random.key(seed)).logits for seed in (0, 0, 1)]
    np.testing.assert_array_equal(off, again)
    np.testing.assert_array_equal(on[0], on[1])
    assert np.abs(on[0] - off).max() > 0.1 and np.abs(on[0] - on[2]).max() > 0.1
    weights = ours(x, dropout_key=jax.random.key(0), output_attentions=True).attentions[0]
    lower = np.tril(np.ones((23, 23), bool))
    dropped = np.mean(np.asarray(weights)[:, :, lower] == 0)
    assert abs(dropped - 0.1) < 0.03


def test_bfloat16_is_near_float32_and_keeps_float32_logits(causal, tmp_path):
    _, ours = causal
    ours.save_pretrained(tmp_path)
    half = ImageGPTForCausalImageModeling.from_pretrained(tmp_path, dtype=jnp.bfloat16)
    output = half(tokens(), output_hidden_states=True)
    assert output.logits.dtype == jnp.float32 and output.hidden_states[1].dtype == jnp.bfloat16
    assert 1e-4 < np.abs(output.logits - ours(tokens()).logits).max() < 0.5


def test_what_is_saved_transformers_loads_and_ours_loads_back(causal, tmp_path):
    theirs, ours = causal
    ours.save_pretrained(tmp_path)
    again, info = transformers.ImageGPTForCausalImageModeling.from_pretrained(tmp_path, output_loading_info=True)
    assert not (info["missing_keys"] or info["unexpected_keys"] or info["mismatched_keys"])
    for (name, one), other in zip(theirs.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other), name
    back = ImageGPTForCausalImageModeling.from_pretrained(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, back.params, ours.params)


def test_saving_anew_leaves_no_weights_of_the_save_before(causal, tmp_path, monkeypatch):
    _, ours = causal
    ImageGPTForCausalImageModeling(ours.config, seed=5).save_pretrained(tmp_path)
    monkeypatch.setattr(weight_files, "MAX_SHARD_BYTES", 9_000)
    ours.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors.index.json").exists() and not (tmp_path / "model.safetensors").exists()
    back = ImageGPTForCausalImageModeling.from_pretrained(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, back.params, ours.params)


def test_a_classifier_starts_from_a_generative_directory_with_a_new_head(causal, tmp_path):
    _, ours = causal
    ours.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=r"no score\.weight: it is drawn at random"):
        classifier = ImageGPTForImageClassification.from_pretrained(tmp_path, num_labels=7)
    assert classifier(tokens()).logits.shape == (3, 7)
    np.testing.assert_array_equal(classifier.params["token_table"], ours.params["token_table"])
    bare = ImageGPTModel.from_pretrained(tmp_path)
    assert "head" not in bare.params


def test_a_new_model_is_drawn_by_transformers_scheme():
    config = ImageGPTConfig(**SIZES | dict(n_embd=64), initializer_range=0.05)
    params = ImageGPTForCausalImageModeling(config, seed=1).params
    blocks = params["blocks"]
    assert np.isclose(np.std(blocks["qkv"]["kernel"]), 0.05, rtol=0.05)
    assert np.isclose(np.std(blocks["out"]["kernel"]), 0.05 / 6**0.5, rtol=0.05)
    assert np.isclose(np.std(blocks["down"]["kernel"]), 0.05 / 6**0.5, rtol=0.05)
    assert np.isclose(np.std(params["head"]["kernel"]), 0.05, rtol=0.1)
    assert not np.any(blocks["up"]["bias"]) and np.all(blocks["mlp_norm"]["gain"] == 1)
    same = ImageGPTForCausalImageModeling(config, seed=1).params
    jax.tree.map(np.testing.assert_array_equal, params, same)


def test_outputs_are_read_by_name_by_index_and_as_tuples(causal):
    _, ours = causal
    x = tokens()
    output = ours(x, labels=labels_of(x), use_cache=False)
    assert output.keys() == ["loss", "logits"] == list(output)
    assert output[0] is output.loss is output["loss"] and output[-1] is output.logits
    as_tuple = ours(x, return_dict=False)
    np.testing.assert_array_equal(as_tuple[0], output.logits)
    assert isinstance(as_tuple, tuple) and as_tuple[1].get_seq_length() == 23


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({}, "give either input_ids or inputs_embeds"),
        (dict(input_ids=tokens(), inputs_embeds=np.zeros((3, 23, 22))), "and not both"),
        (dict(input_ids=tokens() + 1), r"input_ids has 18; allowed is 0\.\.17"),
        (dict(input_ids=tokens() - 1), r"input_ids has -1"),
        (dict(input_ids=tokens() / 2), "input_ids is an array of float64; whole numbers"),
        (dict(input_ids=["a"]), "input_ids is an array of <U1"),
        (dict(input_ids=tokens(length=38)), "38 inputs; the model has 37 positions"),
        (dict(input_ids=tokens(), labels=tokens()), r"labels has 17; allowed is 0\.\.16 or -100"),
        (dict(input_ids=tokens(), labels=labels_of(tokens())[:, 1:]), r"labels has shape \[3, 22\]; \[3, 23\]"),
        (dict(input_ids=tokens(), attention_mask=PADDING[:, None, None]), "attention_mask has shape"),
        (dict(input_ids=tokens(), position_ids=np.full((3, 23), 37)), "position_ids has 37"),
        (dict(input_ids=tokens(), head_mask=np.ones(3)), r"head_mask has shape \[3\]; \[2\] or \[3, 2\]"),
        (dict(input_ids=tokens(), encoder_hidden_states=np.zeros((3, 2, 22))), "cross-attention is not supported"),
        (dict(input_ids=tokens(), past_key_values=((1, 2),)), "past_key_values is a tuple"),
    ],
)  # fmt: skip
def test_inputs_that_make_no_sense_are_refused_by_name(causal, inputs, message):
    with pytest.raises(UserError, match=message):
        causal[1](**inputs)


def test_a_run_directory_is_told_from_a_hugging_face_directory(tmp_path):
    run_directory(tmp_path)
    with pytest.raises(UserError, match="python -m igpt.huggingface export --model="):
        ImageGPTModel.from_pretrained(tmp_path)


def test_arguments_that_nobody_knows_are_errors(causal):
    _, ours = causal
    with pytest.raises(TypeError, match="pixel_values"):
        ours(pixel_values=tokens())
    with pytest.raises(TypeError, match="num_beams"):
        ours.generate(tokens(), num_beams=4)
    with pytest.raises(UserError, match="did you mean 'n_embd'"):
        ImageGPTConfig(n_embed=64)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (dict(max_length=5), "5 inputs are to become 5"),
        (dict(max_length=39), "at most n_positions"),
        (dict(do_sample=True, temperature=-1.0), "temperature is -1"),
        (dict(do_sample=True, top_p=1.5), r"top_p is 1\.5"),
        (dict(num_return_sequences=0), "num_return_sequences is 0"),
        (dict(attention_mask=np.zeros((3, 5))), "attention_mask has zeros"),
    ],
)  # fmt: skip
def test_generation_that_makes_no_sense_is_refused(causal, how, message):
    with pytest.raises(UserError, match=message):
        causal[1].generate(tokens(length=5), **how)


def test_the_names_of_the_documentation_are_there():
    assert api.AutoImageProcessor is api.ImageGPTImageProcessor is api.ImageGPTFeatureExtractor
    assert {"ImageGPTModel", "ImageGPTForCausalImageModeling", "ImageGPTForImageClassification"} <= set(api.__all__)
