"""The documented classes: generation compared with transformers, saving, loading, and unknown arguments."""

import inspect

import jax
import numpy as np
import pytest
import torch
import transformers
from scipy.stats import chi2_contingency

from igpt import api
from igpt.api import ImageGPTConfig, ImageGPTForCausalImageModeling, ImageGPTForImageClassification, ImageGPTModel
from igpt.api.forward import forward
from igpt.errors import UserError
from igpt.interop import hf_weights, weight_files
from igpt.sample import generator
from tests.helpers import API_SIZES, API_SOS, HF_CLASSES, api_tokens, write_run_config


def test_greedy_generation_equals_that_of_transformers(causal):
    theirs, ours = causal
    x = api_tokens(length=5)
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
def test_draws_have_the_distribution_of_transformers(how, tmp_path_factory, request):
    theirs, ours = request.getfixturevalue("causal")
    draws = 5_000
    torch.manual_seed(1)
    start = torch.full((draws, 1), API_SOS)
    expected = theirs.generate(start, max_length=3, do_sample=True, **how).numpy()
    found = np.asarray(
        ours.generate(np.full((1, 1), API_SOS), max_length=3, do_sample=True, num_return_sequences=draws, **how)
    )
    pairs = [x[:, 1] * API_SOS + x[:, 2] for x in (expected, found)]
    counts = np.stack([np.bincount(pair, minlength=API_SOS * API_SOS) for pair in pairs])
    rare = counts.sum(axis=0) < 20  # pairs too rare for the test are counted together
    counts = np.concatenate([counts[:, ~rare], counts[:, rare].sum(axis=1, keepdims=True)], axis=1)
    counts = counts[:, counts.sum(axis=0) > 0]
    assert chi2_contingency(counts).pvalue > 1e-3


def test_equal_seeds_draw_equal_images_and_others_draw_others(causal):
    _, ours = causal
    one, same, other = (np.asarray(ours.generate(do_sample=True, num_return_sequences=4, seed=s)) for s in (3, 3, 4))
    np.testing.assert_array_equal(one, same)
    assert one.shape == (4, 38) and (one[:, 0] == API_SOS).all() and len(np.unique(one, axis=0)) == 4
    assert (one != other).any()


def test_similar_lengths_share_one_compiled_program(causal):
    _, ours = causal
    ours(api_tokens(length=32))
    ours.generate(api_tokens(length=8), max_length=30)
    compiled = forward._cache_size(), generator()._cache_size()
    for length in (17, 19, 24, 31):
        ours(api_tokens(length=length))
    for length, stop in ((5, 20), (7, 38), (6, 9)):
        ours.generate(api_tokens(length=length), max_length=stop)
    assert (forward._cache_size(), generator()._cache_size()) == compiled


def test_transformers_and_igpt_load_a_saved_model(causal, tmp_path):
    theirs, ours = causal
    ours.save_pretrained(tmp_path)
    again, info = transformers.ImageGPTForCausalImageModeling.from_pretrained(tmp_path, output_loading_info=True)
    assert not (info["missing_keys"] or info["unexpected_keys"] or info["mismatched_keys"])
    for (name, one), other in zip(theirs.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other), name
    back = ImageGPTForCausalImageModeling.from_pretrained(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, back.params, ours.params)


def test_saving_again_leaves_no_older_weight_files(causal, tmp_path, monkeypatch):
    _, ours = causal
    ImageGPTForCausalImageModeling(ours.config, seed=5).save_pretrained(tmp_path)
    monkeypatch.setattr(weight_files, "MAX_SHARD_BYTES", 9_000)
    ours.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors.index.json").exists() and not (tmp_path / "model.safetensors").exists()
    back = ImageGPTForCausalImageModeling.from_pretrained(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, back.params, ours.params)


def test_a_classifier_loads_generative_weights_with_a_new_head(causal, tmp_path):
    _, ours = causal
    ours.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=r"no score\.weight: it is initialised at random"):
        classifier = ImageGPTForImageClassification.from_pretrained(tmp_path, num_labels=7)
    assert classifier(api_tokens()).logits.shape == (3, 7)
    np.testing.assert_array_equal(classifier.params["token_table"], ours.params["token_table"])
    bare = ImageGPTModel.from_pretrained(tmp_path)
    assert "head" not in bare.params


def test_a_saved_classifier_reads_no_sos_and_one_that_reads_it_warns(tmp_path):
    classifier = ImageGPTForImageClassification(ImageGPTConfig(**API_SIZES))
    classifier.save_pretrained(tmp_path / "ours")  # trained on what the processor gives
    assert not hf_weights.open_directory(tmp_path / "ours").model.sos
    classifier.config = ImageGPTConfig(**API_SIZES, prepend_sos=True)
    classifier.save_pretrained(tmp_path / "exported")
    with pytest.warns(UserWarning, match="reads a start of sequence: prepend it to input_ids and drop the last token"):
        ImageGPTForImageClassification.from_pretrained(tmp_path / "exported")


def test_a_new_model_is_initialised_by_the_scheme_of_transformers():
    config = ImageGPTConfig(**API_SIZES | dict(n_embd=64), initializer_range=0.05)
    params = ImageGPTForCausalImageModeling(config, seed=1).params
    blocks = params["blocks"]
    assert np.isclose(np.std(blocks["qkv"]["kernel"]), 0.05, rtol=0.05)
    assert np.isclose(np.std(blocks["out"]["kernel"]), 0.05 / 6**0.5, rtol=0.05)
    assert np.isclose(np.std(blocks["down"]["kernel"]), 0.05 / 6**0.5, rtol=0.05)
    assert np.isclose(np.std(params["head"]["kernel"]), 0.05, rtol=0.1)
    assert not np.any(blocks["up"]["bias"]) and np.all(blocks["mlp_norm"]["gain"] == 1)
    same = ImageGPTForCausalImageModeling(config, seed=1).params
    jax.tree.map(np.testing.assert_array_equal, params, same)


def test_the_initializer_range_reaches_every_kernel():
    params = ImageGPTModel(ImageGPTConfig(**API_SIZES, initializer_range=0.0)).params
    kernels = [leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params) if path[-1].key == "kernel"]
    assert len(kernels) == 4 and not any(np.any(kernel) for kernel in kernels)


def test_equal_calls_give_equal_outputs(causal):
    one, other = (causal[1](api_tokens(), output_hidden_states=True, output_attentions=True) for _ in range(2))
    for first, second in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(first, second)


def test_a_run_directory_is_refused_with_the_command_to_export_it(tmp_path):
    write_run_config(tmp_path)
    with pytest.raises(UserError, match="igpt export --model="):
        ImageGPTModel.from_pretrained(tmp_path)


def test_unknown_arguments_are_errors(causal):
    _, ours = causal
    with pytest.raises(TypeError, match="pixel_values"):
        ours(pixel_values=api_tokens())
    with pytest.raises(UserError, match="did you mean 'n_embd'"):
        ImageGPTConfig(n_embed=64)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (dict(do_sample=True, temperature=-1.0), "temperature is -1"),
        (dict(do_sample=True, top_p=1.5), r"top_p is 1\.5"),
        (dict(num_return_sequences=0), "num_return_sequences is 0"),
    ],
)
def test_bad_arguments_of_generate_are_refused(causal, how, message):
    with pytest.raises(UserError, match=message):
        causal[1].generate(api_tokens(length=5), **how)


def test_the_names_of_the_documentation_exist():
    assert api.AutoImageProcessor is api.ImageGPTImageProcessor is api.ImageGPTFeatureExtractor
    documented = {name for name in dir(transformers) if name.startswith("ImageGPT")}
    assert len(documented) > 6 and documented <= set(api.__all__)
    assert all(getattr(api, name) for name in api.__all__)


@pytest.mark.parametrize("head", HF_CLASSES)
def test_arguments_have_the_order_of_the_documentation(head):
    theirs, ours = (getattr(package, HF_CLASSES[head]) for package in (transformers, api))
    orders = [
        [p.name for p in inspect.signature(f).parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
        for f in (theirs.forward, ours.forward, ours.__call__)
    ]
    assert orders[0] == orders[1] == orders[2]
    model = ours(ImageGPTConfig(**API_SIZES))
    np.testing.assert_array_equal(model.forward(api_tokens())[0], model(api_tokens())[0])
