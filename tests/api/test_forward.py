"""The documented classes compute what those of transformers compute, on equal random weights and biases."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from igpt.api import ImageGPTForCausalImageModeling
from igpt.interop import hf_weights
from tests.helpers import API_PADDING, API_SOS, api_labels, api_tokens, hf_and_ours


def call_both(models, **inputs):
    theirs, ours = models
    as_torch = {name: torch.tensor(x) if isinstance(x, np.ndarray) else x for name, x in inputs.items()}
    with torch.no_grad():
        return theirs(**as_torch), ours(**inputs)


def assert_close(theirs, ours, tolerance=1e-5):
    """Every output of transformers has a counterpart of ours, equal in shape and value."""
    for name in ("loss", "logits", "last_hidden_state"):
        if getattr(theirs, name, None) is not None:
            close(theirs[name], ours[name], tolerance)
    for name in ("hidden_states", "attentions"):
        if getattr(theirs, name) is not None:
            assert len(theirs[name]) == len(ours[name])
            for one, other in zip(theirs[name], ours[name], strict=True):
                close(one, other, tolerance)
    if theirs.past_key_values is not None:
        assert ours.cache.get_seq_length() == theirs.past_key_values.get_seq_length()
        for one, other in zip(theirs.past_key_values.layers, ours.past_key_values.layers, strict=True):
            close(one.keys, other.keys, tolerance)
            close(one.values, other.values, tolerance)


def close(theirs, ours, tolerance):
    assert tuple(theirs.shape) == ours.shape
    np.testing.assert_allclose(theirs.numpy(), np.asarray(ours), rtol=0, atol=tolerance)


EVERYTHING = dict(output_hidden_states=True, output_attentions=True)
FLAGS = ("scale_attn_weights", "scale_attn_by_inverse_layer_idx", "reorder_and_upcast_attn", "tie_word_embeddings")


@pytest.mark.parametrize("values", list(itertools.product((False, True), repeat=4)))
def test_every_combination_of_flags_equals_transformers(values, tmp_path):
    models = hf_and_ours(tmp_path, n_inner=29, **dict(zip(FLAGS, values, strict=True)))
    x = api_tokens()
    assert_close(*call_both(models, input_ids=x, labels=api_labels(x), attention_mask=API_PADDING, **EVERYTHING))
    assert_close(*call_both(models, input_ids=x))


@pytest.mark.parametrize("name", ["gelu", "swish", "sqrtsoftplus"])
def test_every_activation_equals_transformers(name, tmp_path):
    assert_close(*call_both(hf_and_ours(tmp_path, activation_function=name), input_ids=api_tokens()))


def test_positions_token_types_and_embeddings_can_be_given(causal):
    theirs, _ = causal
    rng = np.random.default_rng(1)
    positions, types = rng.integers(0, 37, (3, 23)), rng.integers(0, API_SOS + 1, (3, 23))
    assert_close(*call_both(causal, input_ids=api_tokens(), position_ids=positions, token_type_ids=types, **EVERYTHING))
    assert_close(*call_both(causal, input_ids=api_tokens(), position_ids=positions[:1]))
    embeds = theirs.transformer.wte(torch.tensor(api_tokens())).detach().numpy()
    assert_close(*call_both(causal, inputs_embeds=embeds, token_type_ids=types, labels=api_labels(api_tokens())))


def test_pieces_through_the_cache_equal_the_whole_sequence(causal):
    theirs, ours = causal
    x = api_tokens(length=37)
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
    assert cached.get_seq_length() == 20  # our cache is never changed in place: it can be continued twice


def test_a_masked_head_contributes_nothing(causal):
    _, ours = causal
    mask = np.array([[1.0, 1.0], [0.0, 1.0], [1.0, 0.5]])
    out = ours.params["blocks"]["out"]["kernel"] * mask[:, :, None, None]
    blocks = ours.params["blocks"] | {"out": ours.params["blocks"]["out"] | {"kernel": out}}
    expected = ours(api_tokens(), params=ours.params | {"blocks": blocks})
    masked = ours(api_tokens(), head_mask=mask, output_attentions=True)
    np.testing.assert_allclose(masked.logits, expected.logits, rtol=0, atol=1e-5)
    assert not np.any(masked.attentions[1][:, 0])
    np.testing.assert_allclose(
        ours(api_tokens(), head_mask=[1, 1]).logits, ours(api_tokens()).logits, rtol=0, atol=1e-5
    )


@pytest.mark.parametrize(
    ("config", "labels"),
    [
        (dict(num_labels=5), np.array([4, 0, 2])),
        (dict(num_labels=5), np.array([4, -100, 2])),
        (dict(num_labels=5), np.array([[4], [-100], [2]])),
        (dict(num_labels=1), np.array([0.3, -2.0, 1.0], np.float32)),
        (dict(num_labels=5), np.random.default_rng(0).integers(0, 2, (3, 5)).astype(np.float32)),
        (
            dict(num_labels=5, problem_type="regression"),
            np.random.default_rng(0).normal(size=(3, 5)).astype(np.float32),
        ),
    ],
    ids=[
        "classes",
        "one label ignored",
        "a column of classes",
        "one number",
        "several classes at once",
        "several numbers",
    ],
)
def test_the_classifier_returns_the_logits_and_loss_of_its_problem(config, labels, tmp_path):
    models = hf_and_ours(tmp_path, head="classes", **config)
    assert_close(*call_both(models, input_ids=api_tokens()[:, 1:], labels=labels, **EVERYTHING))


def test_one_class_of_several_at_once_is_compared_row_by_row(tmp_path):
    config, labels = dict(num_labels=1, problem_type="multi_label_classification"), np.array([1, 0, 1], np.float32)
    theirs, ours = hf_and_ours(tmp_path, head="classes", **config)
    expected = theirs(torch.tensor(api_tokens()), labels=torch.tensor(labels[:, None])).loss.item()
    for given in (labels, labels[:, None]):
        np.testing.assert_allclose(ours(api_tokens(), labels=given).loss, expected, rtol=0, atol=1e-5)


def test_a_loss_is_nan_if_every_label_is_ignored(causal):
    theirs, ours = call_both(causal, input_ids=api_tokens(), labels=np.full((3, 23), -100))
    assert np.isnan(theirs.loss) and np.isnan(ours.loss)


def test_the_bare_model_returns_hidden_states(tmp_path):
    models = hf_and_ours(tmp_path, head="none")
    assert_close(*call_both(models, input_ids=api_tokens(), attention_mask=API_PADDING, **EVERYTHING))
    assert_close(*call_both(models, input_ids=api_tokens(), use_cache=False))


def test_gradients_and_one_adamw_step_equal_those_of_pytorch(tmp_path):
    theirs, ours = hf_and_ours(tmp_path)
    x = api_tokens()
    step = dict(lr=3e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.01)
    optimizer = torch.optim.AdamW(theirs.parameters(), **step)
    theirs(torch.tensor(x), labels=torch.tensor(api_labels(x))).loss.backward()

    gradients = jax.jit(jax.grad(lambda params: ours(x, labels=api_labels(x), params=params).loss))(ours.params)
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
        tiny = (
            np.abs(expected[name].grad.numpy()) < 1e-6
        )  # Adam's first step is the gradient's sign, which rounding decides here
        difference = np.abs(weight - expected[name].detach().numpy())
        assert difference[~tiny].max(initial=0) < 1e-5, name


def test_dropout_is_off_unless_a_key_is_given(causal):
    _, ours = causal
    x = api_tokens()
    off, again = ours(x).logits, ours(x).logits
    on = [ours(x, dropout_key=jax.random.key(seed)).logits for seed in (0, 0, 1)]
    np.testing.assert_array_equal(off, again)
    np.testing.assert_array_equal(on[0], on[1])
    assert np.abs(on[0] - off).max() > 0.1 and np.abs(on[0] - on[2]).max() > 0.1
    weights = ours(x, dropout_key=jax.random.key(0), output_attentions=True).attentions[0]
    lower = np.tril(np.ones((23, 23), bool))
    dropped = np.mean(np.asarray(weights)[:, :, lower] == 0)
    assert abs(dropped - 0.1) < 0.03


def test_bfloat16_is_near_float32_and_has_float32_logits(causal, tmp_path):
    _, ours = causal
    ours.save_pretrained(tmp_path)
    half = ImageGPTForCausalImageModeling.from_pretrained(tmp_path, dtype=jnp.bfloat16)
    output = half(api_tokens(), output_hidden_states=True)
    assert output.logits.dtype == jnp.float32 and output.hidden_states[1].dtype == jnp.bfloat16
    assert 1e-4 < np.abs(output.logits - ours(api_tokens()).logits).max() < 0.5


def test_rows_of_a_batch_do_not_influence_each_other(causal):
    _, ours = causal
    x = api_tokens()
    together = ours(x, **EVERYTHING)
    for row in range(3):
        alone = ours(x[row : row + 1], **EVERYTHING)
        np.testing.assert_allclose(alone.logits[0], together.logits[row], rtol=0, atol=1e-5)
        np.testing.assert_allclose(alone.hidden_states[1][0], together.hidden_states[1][row], rtol=0, atol=1e-5)


def test_padding_on_the_left_changes_no_real_position(causal):
    _, ours = causal
    x = api_tokens(length=9)
    padded = np.pad(x, [(0, 0), (4, 0)])
    mask = np.pad(np.ones_like(x), [(0, 0), (4, 0)])
    positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0)
    both = call_both(causal, input_ids=padded, attention_mask=mask, position_ids=positions)
    assert_close(*both)
    np.testing.assert_allclose(both[1].logits[:, 4:], ours(x).logits, rtol=0, atol=1e-5)


def test_outputs_can_be_requested_by_the_configuration(tmp_path):
    wanted = dict(output_attentions=True, output_hidden_states=True, use_cache=False, return_dict=False)
    theirs, ours = hf_and_ours(tmp_path, **wanted)
    ours.config.output_attentions = ours.config.output_hidden_states = True
    logits, hidden_states, attentions = ours(api_tokens())
    assert len(hidden_states) == 4 and len(attentions) == 3
    np.testing.assert_allclose(logits, theirs(torch.tensor(api_tokens()))[0].detach(), rtol=0, atol=1e-5)
    assert ours(api_tokens(), output_attentions=False, return_dict=True).attentions is None


@pytest.mark.parametrize("head", ["pixels", "classes", "none"])
def test_every_parameter_has_a_gradient(head, tmp_path):
    _, ours = hf_and_ours(tmp_path, head=head)
    x = np.arange(18).reshape(1, 18)  # every colour, and the start of sequence

    def total(params):
        return jnp.sum(jnp.sin(ours(x, params=params)[0]))

    gradients = jax.grad(total)(ours.params)
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradients):
        assert np.abs(leaf).max() > 0, path
