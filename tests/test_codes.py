"""A VQ-VAE as a tokenizer: its file, and everything that reads tokens with codes instead of colours."""

import json
import re
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

import eval_probe
import igpt
import train
from igpt.__main__ import main as run_igpt
from igpt.codes import Codes
from igpt.draw import Sampling
from igpt.errors import UserError
from igpt.page.answers import Answers
from igpt.run.directory import load_config
from igpt.tokenizer import Bytes, Tokenizer, find_tokenizer
from igpt.vqvae import VQVAE, VQConfig
from tests.helpers import GREY_PALETTE, ROOT, probe_config, read_arrays, records

CONFIG = VQConfig(codes=13, stride=2, width=6, code_width=5, residual_blocks=1, residual_width=4, channels=1)
FIELDS = {"vqvae.codes": 13, "vqvae.stride": 2}


def make_codes(seed=0, **changes):
    config = VQConfig(**vars(CONFIG) | changes)
    params = nnx.to_pure_dict(nnx.state(VQVAE(config, nnx.Rngs(seed))))
    return Codes(config, params | {"codebook": params["codebook"] * 13})


@pytest.fixture(scope="module")
def pictures():
    rng = np.random.default_rng(0)
    grey = rng.integers(0, 256, (5, 8, 12, 1)) * rng.uniform(size=(5, 1, 12, 1))  # dark and bright columns
    return grey.astype(np.uint8).repeat(3, axis=3)


@pytest.mark.parametrize("tokenizer", [GREY_PALETTE, make_codes(), Bytes()], ids=lambda one: one.kind)
def test_every_tokenizer_keeps_the_promises_of_the_protocol(tokenizer, pictures):
    assert isinstance(tokenizer, Tokenizer)
    tokens = tokenizer.encode(pictures)
    assert tokens.shape == (5, *tokenizer.grid(8, 12)) and tokens.max() < tokenizer.vocab_size
    images = tokenizer.decode(tokens)
    assert images.shape == pictures.shape and images.dtype == np.uint8
    assert isinstance(tokenizer.digest, str) and tokenizer.content.ndim


def test_a_grey_vqvae_refuses_pictures_in_colour(pictures):
    with pytest.raises(UserError, match="reads grey images.*set channels=1"):
        make_codes().encode(pictures * np.array([1, 0, 1], np.uint8))


def test_a_code_does_not_depend_on_the_other_images(pictures):
    codes = make_codes()
    tokens = codes.encode(pictures)
    np.testing.assert_array_equal(codes.encode(pictures[3]), tokens[3])
    np.testing.assert_array_equal(codes.decode(tokens[None, 2:4]), codes.decode(tokens)[None, 2:4])
    assert len(np.unique(tokens)) > 2


def test_a_file_gives_the_same_tokenizer_back(tmp_path, pictures):
    codes = make_codes()
    codes.save(tmp_path / codes.file)
    again = find_tokenizer(tmp_path)
    assert again.digest == codes.digest != make_codes(seed=1).digest and again.config == codes.config
    np.testing.assert_array_equal(again.encode(pictures), codes.encode(pictures))


def test_a_file_that_is_none_is_named(tmp_path):
    path = tmp_path / "vqvae.safetensors"
    with pytest.raises(UserError, match="no VQ-VAE at"):
        Codes.load(path)
    make_codes().save(path)
    content = path.read_bytes()
    listed = (2).to_bytes(8, "little") + b"[]"
    for damaged in (content[:-9], b"", b"\x00" * 40, content.replace(b"code_width", b"code_wide_"), listed):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="is no VQ-VAE of igpt, or is damaged"):
            Codes.load(path)
    path.write_bytes(content.replace(b'\\"codes\\": 13', b'\\"codes\\": 17'))
    with pytest.raises(UserError, match="not those of the network"):
        Codes.load(path)
    path.write_bytes(re.sub(rb'residual_blocks\\": \d, ', rb'residual_blocks\\": 99,', content))
    with pytest.raises(UserError, match="asks for 99 residual blocks"):
        Codes.load(path)
    with pytest.raises(UserError, match="there is no tokenizer at .*absent; name the run of a VQ-VAE"):
        find_tokenizer(tmp_path / "absent")
    with pytest.raises(UserError, match="writes its file when it ends"):
        find_tokenizer(tmp_path / "..")


def test_the_module_of_the_documents_computes_the_same_in_pytorch(tmp_path, pictures):
    codes = make_codes(stride=4, residual_blocks=2, channels=3)
    codes.save(tmp_path / "vqvae.safetensors")
    (source,) = re.findall(r"```python\n(import json.*?)```", (ROOT / "docs/vqvae.md").read_text(), re.DOTALL)
    names = {}
    exec(source, names)
    theirs = names["VQVAE"](tmp_path / "vqvae.safetensors")
    model = nnx.merge(nnx.graphdef(VQVAE(codes.config, nnx.Rngs(0))), jax.tree.map(jnp.asarray, codes.params))
    x = pictures.astype(np.float32) / 127.5 - 1
    with torch.no_grad():
        images = torch.tensor(x).permute(0, 3, 1, 2)
        tokens = theirs.encode(images)
        drawn = theirs.decode(tokens).permute(0, 2, 3, 1)
        latents = theirs.latents(images).permute(0, 2, 3, 1)
    np.testing.assert_allclose(latents, model.encode(jnp.asarray(x)), atol=1e-5)
    np.testing.assert_array_equal(tokens, codes.encode(pictures))
    np.testing.assert_allclose(
        drawn, model.decode(jnp.asarray(codes.params["codebook"][np.asarray(tokens)])), atol=1e-5
    )


# ---- a run of a VQ-VAE, and a run on its codes


def vqvae_config():
    from configs import digits

    config = digits.get_config()
    config.program, config.optim.name = "vqvae", "adam"
    config.vqvae.update({name: getattr(CONFIG, name) for name in config.vqvae if name in vars(CONFIG)})
    config.train.update(steps=6, batch_size=16, log_every=1, eval_every=3, eval_batch_size=40, sample_every=6)
    config.train.update(checkpoint_every=3, num_samples=3)
    return config


@pytest.fixture(scope="module")
def vqvae_run(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("vqvae") / "run"
    train.run(vqvae_config(), workdir)
    return workdir


@pytest.fixture(scope="module")
def prepared(vqvae_run):
    out = vqvae_run.parent / "codes"
    flags = ["--source=digits", "--size=8", "--channels=1", "--preprocess=none"]
    run_igpt(["prepare", *flags, f"--tokenizer={vqvae_run}", f"--out={out}"])
    return out


def codes_config(source, tokenizer):
    config = vqvae_config()
    config.program, config.tokenizer, config.data.source = "igpt", str(tokenizer), source
    config.data.update(pad=0, flip=False)
    config.model.update(width=20, depth=2, num_heads=2, mlp_width=28)
    return config


@pytest.fixture(scope="module")
def model_run(vqvae_run, prepared):
    workdir = vqvae_run.parent / "model"
    train.run(codes_config(f"tokens:{prepared}", vqvae_run), workdir)
    return workdir


def test_a_run_of_a_vqvae_leaves_its_tokenizer_and_its_reconstructions(vqvae_run):
    names = {path.name.split(".")[0] for path in vqvae_run.iterdir()}
    assert names == {"config", "images", "vqvae", "checkpoints", "metrics", "events", "samples"}
    last = records(vqvae_run)[-1]
    assert {"eval/psnr", "eval/perplexity", "eval/dead_codes", "eval/loss"} <= last.keys()
    codes = find_tokenizer(vqvae_run)
    np.testing.assert_array_equal(codes.params["codebook"], read_arrays(vqvae_run, 6)["params"]["codebook"])


def test_a_stopped_run_of_a_vqvae_resumes_bit_by_bit(vqvae_run, tmp_path):
    stopped = shutil.copytree(vqvae_run, tmp_path / "run")
    shutil.rmtree(stopped / "checkpoints" / "6")
    (stopped / "vqvae.safetensors").unlink()
    train.run(vqvae_config(), stopped)
    jax.tree.map(np.testing.assert_array_equal, read_arrays(stopped, 6), read_arrays(vqvae_run, 6))
    assert find_tokenizer(stopped).digest == find_tokenizer(vqvae_run).digest


def test_a_model_of_codes_keeps_its_tokenizer_and_says_what_its_bits_are(model_run, vqvae_run, prepared):
    run, codes = igpt.load(model_run), find_tokenizer(vqvae_run)
    assert run.tokenizer.digest == codes.digest and run.model.config.seq_len == 16
    assert "eval/bits_per_dim_of_codes" in records(model_run)[-1]
    assert json.loads((prepared / "prepared.json").read_text())["grid"] == [4, 4]
    assert run.sample(2).shape == (2, 8, 8, 3)
    image = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    completed = run.complete([image], keep=0.5, num=2)
    assert completed.shape == (1, 2, 8, 8, 3)
    tokens = codes.encode(image.mean(axis=-1, keepdims=True).repeat(3, -1).astype(np.uint8)[None])
    assert run.features([image], 1).shape == (1, 20) and tokens.shape == (1, 4, 4)


def test_completion_says_which_pixels_were_given(model_run, tmp_path, capsys):
    run_igpt(["sample", f"--model={model_run}", "--complete=test", "--images=2", "--num=1", f"--out={tmp_path}/a.png"])
    assert "given: the upper 4 of 8 rows of pixels, as 2 of 4 rows of codes" in capsys.readouterr().out


def test_the_page_expects_a_step_for_each_row_of_codes(model_run):
    answers = Answers(igpt.load(model_run), train_images=10)
    drawn, about = list(answers.sample(2, seed=5, sampling=Sampling())), answers.about()
    assert len(drawn) == about["rows"] == 4 and about["noun"] == "codes"
    np.testing.assert_array_equal(drawn[-1], answers.run.sample(2, seed=5))
    assert (drawn[0][:, 2:] == 255).all() and answers.nearest(drawn[-1][0], layer=1)


def test_stored_codes_are_those_that_training_would_make_of_the_images(model_run, vqvae_run, tmp_path):
    train.run(codes_config("digits", vqvae_run), tmp_path / "direct")
    jax.tree.map(np.testing.assert_array_equal, read_arrays(tmp_path / "direct", 6), read_arrays(model_run, 6))


def test_a_foreign_tokenizer_is_refused_everywhere(model_run, vqvae_run, prepared, tmp_path):
    other = make_codes(seed=1)
    (tmp_path / "other").mkdir()
    other.save(tmp_path / "other" / other.file)
    fresh = codes_config("digits", tmp_path / "other")
    fresh.init_from = str(model_run)
    with pytest.raises(UserError, match="another tokenizer than init_from"):
        train.run(fresh, tmp_path / "new")
    resumed = codes_config(f"tokens:{prepared}", vqvae_run)
    moved = shutil.copytree(model_run, tmp_path / "model")
    other.save(moved / other.file)
    with pytest.raises(UserError, match="another tokenizer than"):
        train.run(resumed, moved)
    with pytest.raises(UserError, match="vqvae.safetensors is another file than the one whose"):
        igpt.load(moved)
    with pytest.raises(UserError, match=r"set --config.tokenizer=.* --config.vqvae.codes=13 --config.vqvae.stride=2"):
        wrong = codes_config(f"tokens:{prepared}", "palette")
        train.run(wrong, tmp_path / "palette")


def test_what_codes_cannot_do_is_refused_in_words(model_run, vqvae_run, prepared, tmp_path):
    mirrored = codes_config(f"tokens:{prepared}", vqvae_run)
    mirrored.data.flip = True
    with pytest.raises(UserError, match="shifted or mirrored image are others"):
        train.run(mirrored, tmp_path / "mirrored")
    with pytest.raises(SystemExit, match="2"):
        run_igpt(["export", f"--model={model_run}", f"--out={tmp_path}/hf"])
    with pytest.raises(UserError, match="is a VQ-VAE, which makes tokens of images"):
        igpt.load(vqvae_run)


def test_a_palette_is_no_tokenizer_of_codes(tmp_path):
    GREY_PALETTE.save(tmp_path / "palette.npy")
    config = codes_config("digits", tmp_path / "palette.npy")
    with pytest.raises(UserError, match="is a palette; name it in palette.path"):
        train.run(config, tmp_path / "run")


def test_export_writes_the_file_of_a_vqvae(vqvae_run, tmp_path):
    run_igpt(["export", f"--model={vqvae_run}", f"--out={tmp_path}/exported"])
    assert find_tokenizer(tmp_path / "exported").digest == find_tokenizer(vqvae_run).digest


@pytest.mark.parametrize("flag", ["--step=3", "--license=mit", "--data_license=CC0"])
def test_flags_that_the_export_of_a_vqvae_cannot_use_are_refused(vqvae_run, tmp_path, capsys, flag):
    with pytest.raises(SystemExit, match="2"):
        run_igpt(["export", f"--model={vqvae_run}", f"--out={tmp_path}/exported", flag])
    assert "--step, --license and --data_license are for a transformer" in capsys.readouterr().err
    assert not (tmp_path / "exported").exists()


def test_the_configuration_of_a_palette_is_written_as_before(finished_run):
    written = json.loads((finished_run / "config.json").read_text())
    assert not {"program", "tokenizer", "vqvae"} & written.keys()
    assert load_config(finished_run).tokenizer == "palette"


def test_preparing_with_a_palette_starts_without_jax():
    code = "import sys, igpt.data.prepare, igpt.data.palette_fit; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60).returncode == 0


def test_a_model_of_codes_is_fine_tuned_probed_and_evaluated(model_run, vqvae_run, prepared, tmp_path):
    config = codes_config(f"tokens:{prepared}", vqvae_run)
    config.init_from, config.objective.classification, config.model.num_classes = str(model_run), 1.0, 10
    config.train.update(steps=2, eval_every=2)
    train.run(config, tmp_path / "tuned")
    assert json.loads((tmp_path / "tuned/finetune.json").read_text())["images"]["test"] == 359
    assert find_tokenizer(tmp_path / "tuned").digest == find_tokenizer(vqvae_run).digest
    probed = eval_probe.run(probe_config(layers=(1,), train_images=100), model_run, tmp_path / "probe")
    assert [fit["layer"] for fit in probed["pretrained"]["layers"]] == [1]
    run_igpt(["evaluate", f"--model={model_run}", f"--json={tmp_path}/results.json"])
    assert json.loads((tmp_path / "results.json").read_text())["bits_per_dim_of_codes"] > 0
