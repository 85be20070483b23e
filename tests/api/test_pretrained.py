"""Loading, saving and changing a model: each documented argument and method is honoured, or refused by name."""

import copy
import inspect
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file

from igpt.api import (
    ImageGPTConfig,
    ImageGPTForCausalImageModeling,
    ImageGPTForImageClassification,
    ImageGPTImageProcessor,
    ImageGPTModel,
)
from igpt.api.pretrained import LOADING, METHODS, SAVING
from igpt.errors import UserError
from igpt.interop.documented import FETCHING
from tests.helpers import (
    API_SIZES,
    PROCESSOR_CLUSTERS,
    api_labels,
    api_tokens,
    hf_and_ours,
    write_imported_run,
)

NAMES = {"cat": 0, "dog": 1, "cow": 2}


@pytest.fixture(scope="module")
def saved(causal, tmp_path_factory):
    """A directory of transformers with a causal model."""
    directory = tmp_path_factory.mktemp("saved")
    causal[0].save_pretrained(directory)
    return directory


def test_every_documented_argument_of_loading_is_honoured_or_refused(saved):
    honoured = {"config", "dtype", "ignore_mismatched_sizes", "output_loading_info", "generation_config", "torch_dtype"}
    parameters = inspect.signature(transformers.ImageGPTModel.from_pretrained).parameters
    documented = {name for name, p in parameters.items() if p.kind is p.KEYWORD_ONLY}
    popped = inspect.getsource(transformers.PreTrainedModel.from_pretrained).split('kwargs.pop("')[1:]
    documented |= {name for text in popped if (name := text.split('"')[0])[0] != "_"} - {"tqdm_class"}
    assert documented <= honoured | {*FETCHING} | LOADING.keys()
    for name in LOADING:
        with pytest.raises(UserError, match=f"ImageGPTModel.from_pretrained does not support {name}=17: "):
            ImageGPTModel.from_pretrained(saved, **{name: 17})
    unchanged = {name: one for name, (_, one) in LOADING.items() if not isinstance(one, tuple)}
    ImageGPTModel.from_pretrained(saved, **unchanged, revision="main", token=None, force_download=False)
    for name, value in dict(nonsense=3, pixel_values=1, n_layers=2).items():
        with pytest.raises(UserError, match=f"ImageGPTConfig has no .*{name}"):
            ImageGPTModel.from_pretrained(saved, **{name: value})
    with pytest.raises(UserError, match="config and num_labels are given"):
        ImageGPTModel.from_pretrained(saved, config=ImageGPTConfig(**API_SIZES), num_labels=4)


def test_arguments_of_loading_have_their_effect(saved, tmp_path):
    for given in (dict(dtype="bfloat16"), dict(torch_dtype=torch.bfloat16), dict(dtype=jnp.bfloat16)):
        output = ImageGPTModel.from_pretrained(saved, **given)(api_tokens(), output_hidden_states=True)
        assert output.hidden_states[1].dtype == jnp.bfloat16
    for dtype in ("float16", torch.float16, "int8", "nonsense"):
        with pytest.raises(UserError, match=r"dtype is \w+; choose 'float32', 'bfloat16' or 'auto'"):
            ImageGPTModel.from_pretrained(saved, dtype=dtype)
    (tmp_path / "inner").mkdir()
    for file in saved.iterdir():
        (tmp_path / "inner" / file.name).write_bytes(file.read_bytes())
    model, info = ImageGPTModel.from_pretrained(tmp_path, subfolder="inner", output_loading_info=True)
    assert not any(info.values())
    with pytest.raises(UserError, match="has no folder 'outer'"):
        ImageGPTModel.from_pretrained(tmp_path, subfolder="outer")
    for config in (model.config, saved, str(saved), transformers.ImageGPTConfig.from_pretrained(saved)):
        assert ImageGPTModel.from_pretrained(saved, config=config)._network == model._network
    assert ImageGPTModel(transformers.ImageGPTConfig(**API_SIZES)).config.n_embd == 22


def test_a_classifier_of_another_size_is_replaced_on_request(saved, tmp_path):
    ImageGPTForImageClassification(ImageGPTConfig(**API_SIZES, label2id=NAMES)).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"score\.weight has shape \[3, 22\]; it must be \[5, 22\]"):
        ImageGPTForImageClassification.from_pretrained(tmp_path, num_labels=5)
    with pytest.warns(UserWarning, match=r"score\.weight of the shape \[3, 22\], not \[5, 22\]"):
        model, info = ImageGPTForImageClassification.from_pretrained(
            tmp_path, num_labels=5, ignore_mismatched_sizes=True, output_loading_info=True
        )
    assert model(api_tokens()).logits.shape == (3, 5) and not info["missing_keys"]
    theirs = transformers.ImageGPTForImageClassification.from_pretrained(
        tmp_path, num_labels=5, ignore_mismatched_sizes=True, output_loading_info=True
    )[1]
    assert {tuple(map(str, one)) for one in info["mismatched_keys"]} == {
        (name, str(tuple(there)), str(tuple(here))) for name, there, here in theirs["mismatched_keys"]
    }
    assert model.config.id2label[4] == "LABEL_4" and model.num_labels == 5


def test_nothing_is_saved_into_a_run(causal, tmp_path):
    run = write_imported_run(tmp_path / "run")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    for saved in (causal[1], causal[1].config, ImageGPTImageProcessor(clusters=PROCESSOR_CLUSTERS)):
        with pytest.raises(UserError, match="run holds a run of igpt, whose files this would replace"):
            saved.save_pretrained(run)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    "given", [dict(label2id=NAMES), dict(id2label={i: n for n, i in NAMES.items()}), dict(num_labels=3, label2id=NAMES)]
)
def test_class_names_survive_saving_and_loading_in_both_packages(given, tmp_path):
    with pytest.warns(UserWarning):
        ImageGPTModel(ImageGPTConfig(**API_SIZES)).save_pretrained(tmp_path)
        made = ImageGPTForImageClassification.from_pretrained(tmp_path, **given)
    made.save_pretrained(tmp_path)
    for loaded in (ImageGPTForImageClassification, transformers.ImageGPTForImageClassification):
        config = loaded.from_pretrained(tmp_path).config
        assert config.id2label == {0: "cat", 1: "dog", 2: "cow"} and config.label2id == NAMES
    assert made(api_tokens()).logits.shape == (3, 3)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_saved_dtype_is_what_is_in_the_file(dtype, causal, tmp_path):
    copy.deepcopy(causal[0]).to(getattr(torch, dtype)).save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(settings | {"torch_dtype": dtype}))  # the older name
    model = ImageGPTForCausalImageModeling.from_pretrained(tmp_path, dtype="auto")
    assert model._network.dtype == ("bfloat16" if dtype == "bfloat16" else "float32")
    model.params = jax.tree.map(lambda leaf: leaf * 1.0001, model.params)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    settings = json.loads((tmp_path / "config.json").read_text())
    assert {str(tensor.dtype) for tensor in tensors.values()} == {"float32"}
    assert settings["dtype"] == settings["torch_dtype"] == "float32"
    again = transformers.ImageGPTForCausalImageModeling.from_pretrained(tmp_path)
    np.testing.assert_array_equal(again.transformer.wte.weight.detach(), model.params["token_table"])


def test_a_save_removes_the_shards_of_an_earlier_one_and_no_other_file(tmp_path):
    own = {"model_best.safetensors", "model.safetensors.bak", "model-ema.safetensors", "mine.safetensors"}
    earlier = {"model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"}
    for name in own | earlier:
        (tmp_path / name).write_bytes(b"x")
    ImageGPTModel(ImageGPTConfig(**API_SIZES), dtype=None).save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == own | {"config.json", "model.safetensors"}


def test_nothing_is_saved_that_could_not_be_loaded_again(tmp_path):
    model = ImageGPTForImageClassification(ImageGPTConfig(**API_SIZES))
    model.config.num_labels = 5
    with pytest.raises(UserError, match=r"num_classes is 2, the config says 5; make a new model"):
        model.save_pretrained(tmp_path)
    model.config.num_labels = 2
    model.config.id2label[2] = "one too many"
    with pytest.raises(UserError, match="num_classes is 2, the config says 3"):
        model.save_pretrained(tmp_path)
    assert not [*tmp_path.iterdir()]
    for name, (_, same) in SAVING.items():
        with pytest.raises(UserError, match=f"save_pretrained does not support {name}=17"):
            model.save_pretrained(tmp_path, **{name: 17})
        model.config.id2label = {0: "a", 1: "b"}
        model.save_pretrained(tmp_path, **{name: same[0] if isinstance(same, tuple) else same})
    with pytest.raises(TypeError, match="no argument 'safe'"):
        model.save_pretrained(tmp_path, safe=True)


@pytest.mark.parametrize("name", METHODS)
def test_methods_that_stay_out_are_refused_with_the_reason(name):
    model = ImageGPTModel(ImageGPTConfig(**API_SIZES))
    with pytest.raises(UserError, match=f"ImageGPTModel does not support {name}: .{{10}}"):
        getattr(model, name)
    assert not hasattr(model, name) and not hasattr(model, "nonsense")


def test_scripts_of_pytorch_move_a_model_and_switch_its_mode(causal):
    _, ours = causal
    moved = ours.to("cuda"), ours.to(torch.device("cpu")), ours.cpu(), ours.cuda()
    for same in (*moved, ours.eval(), ours.train(False)):
        assert same is ours
    assert ours.device in jax.devices() and ours.dtype == jnp.float32
    for how in ((torch.bfloat16,), ("cpu", torch.float16)):
        with pytest.raises(UserError, match="cannot be converted"):
            ours.to(*how)
    with pytest.raises(UserError, match="cannot be converted"):
        ours.to(dtype=torch.float16)


def test_training_mode_turns_dropout_on(causal):
    _, ours = causal
    x = api_tokens()
    still, by_default = ours(x).logits, not ours.training
    try:
        one, other = (ours.train()(x).logits for _ in range(2))
        assert by_default and (one != other).any() and (one != still).any()
        with pytest.raises(UserError, match="a traced call cannot draw dropout afresh; give a dropout_key"):
            jax.grad(lambda params: ours(x, labels=api_labels(x), params=params).loss)(ours.params)
        how = dict(max_length=7, return_dict_in_generate=True, output_logits=True)
        assert ours.generate(x[:, :5], **how).logits[0].shape == (3, 17)
    finally:
        ours.eval()
    np.testing.assert_array_equal(ours(x).logits, still)


def test_checkpointing_changes_no_gradient(saved):
    x = api_tokens()
    model = ImageGPTForCausalImageModeling.from_pretrained(saved)
    grads = []
    plain = model._network
    for switch in (model.gradient_checkpointing_disable, model.gradient_checkpointing_enable):
        switch()
        grads.append(jax.grad(lambda p: model(x, labels=api_labels(x), params=p, use_cache=False).loss)(model.params))
    jax.tree.map(lambda *g: np.testing.assert_allclose(g[0], g[1], rtol=0, atol=1e-6), *grads)
    assert model._network.remat == "full" and plain.remat == "none"


@pytest.mark.parametrize("head", ["pixels", "classes", "none"])
def test_parameters_are_counted_as_in_transformers(head, tmp_path):
    theirs, ours = hf_and_ours(tmp_path, head=head)
    for how in ({}, dict(exclude_embeddings=True), dict(only_trainable=True)):
        assert ours.num_parameters(**how) == theirs.num_parameters(**how)


def test_embeddings_can_be_read_and_replaced(causal, saved):
    theirs, _ = causal
    ours = ImageGPTForCausalImageModeling.from_pretrained(saved)
    x = api_tokens()
    np.testing.assert_array_equal(ours.get_input_embeddings().weight, theirs.get_input_embeddings().weight.detach())
    np.testing.assert_array_equal(ours.get_output_embeddings().weight, theirs.get_output_embeddings().weight.detach())
    before = ours(x).logits
    embeds = ours.get_input_embeddings()(x)
    np.testing.assert_allclose(ours(inputs_embeds=embeds).logits, before, rtol=0, atol=1e-6)
    ours.set_input_embeddings(torch.zeros(18, 22))
    assert not np.any(ours.params["token_table"]) and (ours(x).logits != before).any()
    with pytest.raises(UserError, match=r"the embedding has shape \[17, 22\]; give \[18, 22\]"):
        ours.set_input_embeddings(np.zeros((17, 22)))
    assert ImageGPTModel.from_pretrained(saved).get_output_embeddings() is None


@pytest.mark.parametrize("size", [25, 12])
def test_resizing_keeps_the_colours_and_the_start_of_sequence(size, saved, tmp_path):
    model = ImageGPTForCausalImageModeling.from_pretrained(saved)
    x = np.where(api_tokens() == 17, 17, api_tokens() % 11)
    before = np.asarray(model(x).logits)
    assert model.resize_token_embeddings() == model.get_input_embeddings()
    assert model.resize_token_embeddings(size).num_embeddings == size == model.config.vocab_size
    after = np.asarray(model(np.where(x == 17, model.config.sos_token_id, x)).logits)
    kept = min(size, 18) - 1
    assert after.shape[2] == size - 1
    np.testing.assert_allclose(after[..., :kept], before[..., :kept], rtol=0, atol=1e-6)
    model.save_pretrained(tmp_path)
    transformers.ImageGPTForCausalImageModeling.from_pretrained(tmp_path)
    with pytest.raises(UserError, match="does not support pad_to_multiple_of=8"):
        model.resize_token_embeddings(20, pad_to_multiple_of=8)


def test_resizing_moves_the_token_ids_that_were_the_start_of_sequence():
    model = ImageGPTForCausalImageModeling(ImageGPTConfig(**API_SIZES, bos_token_id=17, pad_token_id=3))
    model.resize_token_embeddings(25)
    for settings in (model.config, model.generation_config):
        assert (settings.bos_token_id, settings.pad_token_id) == (24, 3)
    assert model.generate(max_length=2)[0, 0] == 24


@pytest.mark.parametrize(
    "part", [ImageGPTModel(ImageGPTConfig(**API_SIZES)), ImageGPTConfig(), ImageGPTImageProcessor()], ids=type
)
def test_a_home_directory_is_a_target_and_a_bucket_or_a_file_is_none(part, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    part.save_pretrained("~/model")
    assert [*(tmp_path / "home" / "model").glob("*.json")]
    (tmp_path / "file").write_text("mine")
    for target, message in (
        ("gs://bucket/model", "gs://bucket/model is a bucket; save to a local"),
        (tmp_path / "file", "/file is a file; name a directory"),
        (tmp_path / "file" / "below", "/file/below is in a file; name a directory"),
    ):
        with pytest.raises(UserError, match=message):
            part.save_pretrained(target)
    assert {path.name for path in tmp_path.iterdir()} == {"home", "file"}
