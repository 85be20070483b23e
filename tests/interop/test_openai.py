import math
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

import igpt
from igpt.errors import UserError
from igpt.interop import import_run, mapping, openai
from igpt.interop.export import export
from igpt.interop.import_run import import_checkpoint
from tests.helpers import OPENAI_DIMS, openai_variables, write_tf_checkpoint

V, D, N, T, F, L = OPENAI_DIMS.values()
C, SHARDS = 7, 5


def forward(variables, tokens, bert=False):
    """The arithmetic of src/model.py in float64 NumPy: logits [B, T, V] and the pooled final norm [B, D]."""
    w = {name.removeprefix("model/"): np.asarray(value, np.float64) for name, value in variables.items()}

    def norm(x, gain):
        return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + 1e-5) * gain

    h = w["wte"][tokens]
    if not bert:
        sos = np.ones((len(tokens), 1, 1)) * w["sos"]
        h = np.concatenate([sos, h[:, :-1]], axis=1)
    h = h + w["wpe"]
    mask = np.tril(np.ones((tokens.shape[1],) * 2))
    for i in range(L):
        x = norm(h, w[f"h{i}/ln_1/g"])
        q, k, v = (np.einsum("bsf,hef->bhse", x, w[f"h{i}/attn/{name}_proj"]) for name in "qkv")
        scores = np.einsum("bhse,bhte->bhst", q, k) / math.sqrt(q.shape[-1])
        if not bert:
            scores = scores * mask - 1e10 * (1 - mask)
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        weights /= weights.sum(axis=-1, keepdims=True)
        mixed = np.einsum("bhst,bhte->bhse", weights, v)
        h = h + np.einsum("bhse,hef->bsf", mixed, w[f"h{i}/attn/c_proj"])
        hidden = norm(h, w[f"h{i}/ln_2/g"]) @ w[f"h{i}/mlp/c_fc/w"]
        h = h + hidden / (1 + np.exp(-1.702 * hidden)) @ w[f"h{i}/mlp/c_proj/w"]
    h = norm(h, w["ln_f/g"])
    return h @ w["wtet"].T, h.mean(axis=1)


@pytest.fixture(scope="module")
def imported(tmp_path_factory, clusters):
    """imported(bert=..., classes=...) -> the released variables, and the run directory of their import."""
    made = {}

    def of(**kind):
        key = tuple(sorted(kind.items()))
        if key not in made:
            folder = tmp_path_factory.mktemp("imported")
            variables = openai_variables(**kind)
            prefix = write_tf_checkpoint(folder / "model.ckpt-1000000", variables)
            made[key] = variables, import_checkpoint(prefix, clusters, folder / "run")
        return made[key]

    return of


@pytest.fixture
def copied(checkpoint, tmp_path):
    """The prefix of a copy that may be damaged."""
    for file in checkpoint.parent.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path / checkpoint.name


def some_tokens(seed=1):
    return np.random.default_rng(seed).integers(0, V, (3, T))


def test_an_imported_model_computes_the_logits_of_the_released_code(imported):
    variables, run = imported()
    model, tokens = igpt.load(run).model, some_tokens()
    logits, pooled = forward(variables, tokens)
    np.testing.assert_allclose(model(jnp.asarray(tokens)), logits, atol=1e-5)
    np.testing.assert_allclose(model.features(jnp.asarray(tokens))[-1], pooled, atol=1e-5)


def test_a_bert_checkpoint_reads_its_tokens_in_place_and_sees_all_of_them(imported):
    variables, run = imported(bert=True)
    model, tokens = igpt.load(run).model, some_tokens()
    assert not model.config.causal
    np.testing.assert_array_equal(model.token_table[...][-1], np.zeros(D))
    np.testing.assert_allclose(model(jnp.asarray(tokens)), forward(variables, tokens, bert=True)[0], atol=1e-5)


def test_a_fine_tuned_checkpoint_keeps_its_classifier(imported):
    variables, run = imported(classes=C)
    model, tokens = igpt.load(run).model, some_tokens()
    expected = forward(variables, tokens)[1] @ variables["model/clf/wclf"].T
    np.testing.assert_allclose(model.classify(jnp.asarray(tokens)), expected, atol=1e-5)
    assert model(jnp.asarray(tokens)).shape == (3, T, V)


def test_a_bert_checkpoint_may_have_a_classifier_too(imported):
    variables, run = imported(bert=True, classes=C)
    expected = forward(variables, some_tokens(), bert=True)[1] @ variables["model/clf/wclf"].T
    np.testing.assert_allclose(igpt.load(run).model.classify(jnp.asarray(some_tokens())), expected, atol=1e-5)


def test_an_imported_model_exported_to_transformers_has_the_same_logits(imported, tmp_path):
    import torch
    from transformers import ImageGPTForCausalImageModeling

    variables, run = imported()
    peer = ImageGPTForCausalImageModeling.from_pretrained(export(run, tmp_path / "hf")).eval()
    tokens = some_tokens()
    inputs = np.concatenate([np.full((3, 1), V), tokens[:, :-1]], axis=1)
    with torch.no_grad():
        logits = peer(torch.from_numpy(inputs)).logits.numpy()
    np.testing.assert_allclose(logits, forward(variables, tokens)[0], atol=1e-5)
    np.testing.assert_allclose(logits, igpt.load(run).model(jnp.asarray(tokens)), atol=1e-5)


@pytest.mark.parametrize("ending", ["", ".index", ".meta", f".data-00003-of-{SHARDS:05d}"])
def test_any_file_of_a_checkpoint_names_it(checkpoint, ending):
    assert openai.find_prefix(f"{checkpoint}{ending}") == checkpoint


@pytest.mark.parametrize("dtype", ["float16", "float64", "bfloat16"])
def test_other_float_types_become_float32(clusters, tmp_path, dtype):
    variables = {name: value.astype(dtype) for name, value in openai_variables().items() if name.startswith("model/")}
    run = import_checkpoint(write_tf_checkpoint(tmp_path / "model.ckpt-7", variables), clusters, tmp_path / "run")
    model = igpt.load(run).model
    assert model.token_table[...].dtype == np.float32
    np.testing.assert_array_equal(model.position_table[...], variables["model/wpe"].astype(np.float32))


def without(*names):
    return lambda variables: [variables.pop(f"model/{name}") for name in names]


def put(name, value):
    return lambda variables: variables.update({name: value})


zeros = np.zeros


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("h1/attn/v_proj"), r"model/h1/attn/v_proj \[2, 10, 20\] is missing"),
        (without("wte", "wtet"), r"model/wte \[V, 20\] is missing\n  model/wtet \[V, 20\] is missing"),
        (without("h0/mlp/c_fc/w"), r"model/h0/mlp/c_fc/w \[20, 83\] is missing"),
        (put("model/h1/mlp/c_fc/b", zeros(F, "f4")), r"model/h1/mlp/c_fc/b \[83\] is unknown"),
        (put("other/wte", zeros((V, D), "f4")), r"other/wte \[17, 20\] is unknown"),
        (
            put("model/h1000000/ln_1/g", zeros(D, "f4")),
            r"model/h3/ln_1/g \[20\] is missing(.|\n)*model/h1000000/ln_1/g",
        ),
        (put("model/h2/ln_2/g", zeros(D + 1, "f4")), r"model/h2/ln_2/g has shape \[21\]; it must be \[20\]"),
        (put("model/sos", zeros((1, D), "f4")), r"model/sos has shape \[1, 20\]; it must be \[20\]"),
        (put("model/clf/wclf", zeros((C, D + 1), "f4")), r"model/clf/wclf has shape \[7, 21\].*\[7, 20\]"),
        (
            put("model/ln_f/g", zeros(D, "i4")),
            r"model/ln_f/g is int32; weights are float16, bfloat16",
        ),
        (put("model/wpe", zeros((23, D), "f4")), r"model/wpe has 23 positions, which is not a square"),
        (
            lambda variables: [
                variables.update({name: zeros((3, 5, D), "f4")}) for name in variables if "attn" in name
            ],
            "3 heads of 5 do not add up to the width 20",
        ),
    ],
)
def test_variables_of_another_network_are_refused_before_reading(clusters, tmp_path, monkeypatch, change, message):
    monkeypatch.setattr(import_run, "read_params", lambda *_: pytest.fail("began to read"))
    variables = openai_variables()
    change(variables)
    prefix = write_tf_checkpoint(tmp_path / "model.ckpt-7", variables)
    with pytest.raises(UserError, match=message):
        import_checkpoint(prefix, clusters, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_all_errors_are_listed_at_once_and_a_long_list_is_cut(clusters, tmp_path):
    variables = openai_variables()
    without("wpe", "h0/ln_1/g")(variables)
    variables["model/h1/ln_1/g"] = zeros(D + 1, "f4")
    variables |= {f"model/extra{i:02d}": zeros(1, "f4") for i in range(20)}
    with pytest.raises(UserError) as caught:
        import_checkpoint(write_tf_checkpoint(tmp_path / "model.ckpt-7", variables), clusters, tmp_path / "run")
    lines = str(caught.value).splitlines()
    assert len(lines) == 1 + mapping.SHOWN + 1 and lines[-1].strip() == "... and 11 more"
    for part in ("model/wpe [T, 20] is missing", "h0/ln_1/g [20] is missing", "h1/ln_1/g has shape", "extra00 [1] is"):
        assert part in str(caught.value)


def flip(path, at):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def cut(path, keep):
    path.write_bytes(path.read_bytes()[:keep])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda prefix, shard: cut(prefix.with_name(f"{prefix.name}.index"), 100), "is damaged: .*; fetch its .index"),
        (lambda prefix, shard: cut(prefix.with_name(f"{prefix.name}.index"), 0), "is damaged"),
        (lambda prefix, shard: flip(prefix.with_name(f"{prefix.name}.index"), 50), "is damaged"),
        (lambda prefix, shard: flip(shard, 100), "is damaged: .*[Cc]hecksum"),
        (lambda prefix, shard: cut(shard, 100), "is damaged"),
        (
            lambda prefix, shard: shard.unlink(),
            r"is not complete: model.ckpt-1000000.data-00002-of-00005 should lie beside",
        ),
        (lambda prefix, shard: [file.unlink() for file in prefix.parent.glob("*.data-*")], r"\.data-\* should lie"),
        (
            lambda prefix, shard: prefix.with_name(f"{prefix.name}.index").unlink(),
            r"there is no TensorFlow checkpoint .*because there is no .*ckpt-1000000\.index.*: none\)",
        ),
    ],
)
def test_damaged_and_missing_files_are_refused(copied, clusters, tmp_path, damage, message):
    damage(copied, copied.with_name(f"{copied.name}.data-00002-of-{SHARDS:05d}"))
    with pytest.raises(UserError, match=message):
        import_checkpoint(copied, clusters, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_folder_in_place_of_a_prefix_lists_its_prefixes(checkpoint):
    with pytest.raises(UserError, match=rf"such as model\.ckpt-1000000 \(in .*: {checkpoint}\)"):
        openai.find_prefix(checkpoint.parent)


def test_a_size_is_checked_against_the_checkpoint(checkpoint, clusters, tmp_path, monkeypatch):
    mistaken = r"--size=s has width 512, depth 24, num_heads 8, seq_len 1024, but .* has width 20, depth 3, num_heads 2"
    with pytest.raises(UserError, match=mistaken + ".*leave --size out"):
        import_checkpoint(checkpoint, clusters, tmp_path / "run", size="s")
    monkeypatch.setitem(openai.PRESETS, "tiny", dict(width=D, depth=L, num_heads=N, seq_len=T))
    with pytest.raises(UserError, match=mistaken + ".*give --size=tiny"):
        import_checkpoint(checkpoint, clusters, tmp_path / "run", size="s")
    with pytest.raises(UserError, match="--size=xs is not known; choose one of s, m, l"):
        import_checkpoint(checkpoint, clusters, tmp_path / "run", size="xs")
    assert import_checkpoint(checkpoint, clusters, tmp_path / "run", size="tiny") == tmp_path / "run"


def test_without_tensorflow_the_message_names_the_extra(checkpoint, clusters, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    with pytest.raises(UserError, match=r'pip install -e "\.\[tfds\]"'):
        import_checkpoint(checkpoint, clusters, tmp_path / "run")


def test_imports_load_no_tensorflow_and_reading_starts_no_device(checkpoint):
    program = f"""
import sys
from pathlib import Path
import igpt.data.batches, igpt.interop.export, igpt.interop.openai
assert "tensorflow" not in sys.modules
variables = igpt.interop.openai.open_checkpoint(Path({str(checkpoint)!r}))
assert variables["model/wte"].read().shape == ({V}, {D})
from tensorflow.python.eager import context
assert context._context is None
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "oneDNN" not in done.stderr  # TensorFlow prints this notice on import unless it is switched off
