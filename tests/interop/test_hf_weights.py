import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from safetensors.numpy import load_file, save_file

from igpt.errors import UserError
from igpt.interop import hf_weights
from igpt.interop.hf_weights import BASE, named_tensors, open_directory, targets
from igpt.model import ImageGPT, ModelConfig
from tests.helpers import HF_CLASSES, assert_trees_equal, hf_model


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A causal model's directory; tests must not change it."""
    directory = tmp_path_factory.mktemp("hf")
    hf_model().save_pretrained(directory)
    return directory


@pytest.fixture
def directory(saved, tmp_path):
    """A copy of `saved`, which a test may change."""
    for file in ("config.json", "model.safetensors"):
        (tmp_path / file).write_bytes((saved / file).read_bytes())
    return tmp_path


def params_of(directory):
    return open_directory(directory).read()


def change(directory, **settings):
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | settings))


@pytest.mark.parametrize("head", HF_CLASSES)
def test_every_tensor_survives_reading_and_writing(tmp_path, head):
    hf_model(head).save_pretrained(tmp_path)
    weights = open_directory(tmp_path)
    assert (weights.model.pixel_head, weights.model.num_classes) == (head == "pixels", 5 if head == "classes" else 0)
    back = named_tensors(weights.read(), weights.model, "" if head == "none" else BASE)
    theirs = load_file(tmp_path / "model.safetensors")
    assert back.keys() == theirs.keys()
    assert_trees_equal(back, theirs)


@pytest.mark.parametrize("architectures", [None, [], ["Other"], 5, True, "ImageGPTModel", {}])
def test_the_tensors_decide_the_head_if_the_config_names_none(directory, architectures):
    change(directory, architectures=architectures)
    assert open_directory(directory).model.pixel_head


@pytest.mark.parametrize("form", ["shards", "bin", "legacy bin", "bin in shards", "bin with masks"])
def test_every_form_of_the_same_weights_reads_the_same(saved, tmp_path, form):
    model = hf_model()
    state = model.state_dict()
    if form == "shards":
        model.save_pretrained(tmp_path, max_shard_size="20KB")
        assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    elif form == "bin in shards":
        files = {name: f"pytorch_model-{i % 3}.bin" for i, name in enumerate(state)}
        for file in set(files.values()):
            torch.save({name: state[name] for name in state if files[name] == file}, tmp_path / file)
        (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": files}))
    else:
        if form == "bin with masks":
            state = state | old_buffers(
                torch.tril(torch.ones(35, 35, dtype=torch.uint8))[None, None], torch.tensor(-1e4)
            )
        torch.save(state, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=form != "legacy bin")
    (tmp_path / "config.json").write_bytes((saved / "config.json").read_bytes())
    assert_trees_equal(params_of(tmp_path), params_of(saved))


def old_buffers(mask, value) -> dict:
    return {f"{BASE}h.{i}.attn.{name}": v for i in range(3) for name, v in (("bias", mask), ("masked_bias", value))}


def test_the_masks_of_old_files_are_skipped_in_safetensors_too(saved, directory):
    tensors = load_file(directory / "model.safetensors")
    buffers = old_buffers(np.tril(np.ones((1, 1, 35, 35), np.uint8)), np.float32(-1e4)[None])
    save_file(tensors | buffers, directory / "model.safetensors")
    assert_trees_equal(params_of(directory), params_of(saved))


def test_all_tensors_that_do_not_fit_are_listed_at_once(directory):
    tensors = load_file(directory / "model.safetensors")
    del tensors["transformer.h.1.mlp.c_fc.bias"]
    tensors["transformer.wte.weight"] = tensors["transformer.wte.weight"][:-1].copy()
    tensors["transformer.wpe.weight"] = tensors["transformer.wpe.weight"].astype(np.float64)
    tensors["transformer.extra\n\x1b[31m"] = np.zeros(3, np.float32)
    tensors["ln_f.weight"] = tensors["transformer.ln_f.weight"].copy()
    save_file(tensors, directory / "model.safetensors")
    with pytest.raises(UserError) as error:
        open_directory(directory)
    assert str(error.value) == (
        f"the weights in {directory} do not fit their config.json; fetch both again, or correct the config:\n"
        "  ln_f.weight is there twice, with and without the prefix 'transformer.'\n"
        "  wte.weight has shape [17, 22]; it must be [18, 22]\n"
        "  wpe.weight is F64; weights are F32, F16, BF16\n"
        "  h.1.mlp.c_fc.bias [88] is missing\n"
        "  extra??[31m [3] is unknown"
    )


def test_a_long_list_of_mismatches_is_cut(directory):
    change(directory, n_embd=24)
    with pytest.raises(UserError, match=r"\.\.\. and \d+ more") as error:
        open_directory(directory)
    assert str(error.value).count("\n") == 13


def test_a_tensor_in_two_shards_is_named(directory):
    tensors = load_file(directory / "model.safetensors")
    save_file(tensors, directory / "1.safetensors")
    save_file({"transformer.ln_f.weight": tensors["transformer.ln_f.weight"]}, directory / "2.safetensors")
    weight_map = {name: "1.safetensors" for name in tensors} | {"lm_head.weight": "2.safetensors"}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (directory / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"ln_f\.weight is in 1\.safetensors and again in 2\.safetensors"):
        open_directory(directory)


@pytest.mark.parametrize(
    "claim", [dict(n_embd=2**30), dict(n_positions=2**30), dict(n_layer=1000), dict(n_inner=2**30)]
)
def test_a_config_with_false_sizes_allocates_no_memory(directory, monkeypatch, claim):
    change(directory, **claim)

    def fail(*args, **kwargs):
        raise AssertionError("memory was asked for")

    for module, name in ((np, "empty"), (np, "zeros"), (np, "fromfile"), (jnp, "zeros"), (jax, "device_put")):
        monkeypatch.setattr(module, name, fail)
    with pytest.raises(UserError, match="do not fit their config.json"):
        open_directory(directory)


def test_a_requested_head_may_be_missing_and_another_is_left_out(directory):
    weights = open_directory(directory, head="classes")
    assert targets(weights.model).keys() - weights.tensors.keys() == {"score.weight"}
    assert "lm_head.weight" not in weights.tensors
    assert set(weights.read()) == {
        *("blocks", "final_norm", "position_table", "token_table"),
    }


def test_a_network_without_biases_gets_zeros_for_them():
    model = ModelConfig(width=22, depth=2, num_heads=2, vocab_size=17, seq_len=35)
    params = nnx.to_pure_dict(nnx.state(ImageGPT(model, nnx.Rngs(0))))
    tensors = named_tensors(params, model)
    biases = {name for name in tensors if re.search(r"\.bias$", name)}
    assert len(biases) == 2 * 4 and not any(tensors[name].any() for name in biases)
    assert tensors.keys() == {n if n in hf_weights.HEADS.values() else BASE + n for n in targets(model)}
