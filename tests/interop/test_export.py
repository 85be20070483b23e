import json
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers.models.imagegpt.image_processing_pil_imagegpt import ImageGPTImageProcessorPil

import igpt
from igpt.__main__ import main as run_igpt
from igpt.data.classes import save_names
from igpt.errors import UserError
from igpt.interop import weight_files
from igpt.interop.export import ORIGIN, export
from igpt.interop.hf_config import ImageGPTConfig
from igpt.interop.hf_network import names_of_labels
from igpt.interop.import_run import import_directory
from tests.helpers import (
    HF_CLASSES,
    HF_CLUSTERS,
    HF_IMAGE_SIZE,
    HF_SIZES,
    hf_model,
    load_hf_strictly,
    save_hf_model,
    write_imported_run,
)

FILES = ("model.safetensors", "config.json", "preprocessor_config.json")
TOKENS = np.random.default_rng(2).integers(0, 17, (2, 35))
IMAGES = np.random.default_rng(3).integers(0, 256, (3, *HF_IMAGE_SIZE, 3), np.uint8)


@pytest.fixture(scope="module")
def imported(hf, tmp_path_factory):
    return import_directory(hf, tmp_path_factory.mktemp("runs") / "imported")


def assert_same_files(one, other, files=FILES):
    for file in files:
        assert (one / file).read_bytes() == (other / file).read_bytes(), file


@pytest.mark.parametrize("head", HF_CLASSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_a_directory_of_transformers_comes_back_byte_for_byte(tmp_path, head, dtype):
    there = save_hf_model(tmp_path / "hf", hf_model(head).to(dtype))
    run = import_directory(there, tmp_path / "run")
    assert_same_files(there, export(run, tmp_path / "back"), [path.name for path in there.iterdir()])
    assert not [path for path in tmp_path.rglob("*partial*")]


def test_the_dtype_in_the_config_does_not_round_the_tensors(hf_copy, tmp_path):
    config = json.loads((hf_copy / "config.json").read_text())
    (hf_copy / "config.json").write_text(json.dumps(config | {"dtype": "float16"}))
    run = import_directory(hf_copy, tmp_path / "run")
    assert_same_files(hf_copy, export(run, tmp_path / "back"), ["model.safetensors"])
    assert_same_files(hf_copy, export(hf_copy, tmp_path / "other"), ["model.safetensors"])


def test_the_commands_import_a_directory_and_export_it(hf, tmp_path, capsys):
    command = [sys.executable, "-m", "igpt", "import", f"--from={hf}", f"--out={tmp_path}/run"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "width 22, depth 3, 2 heads, 35 positions, 17 colours, palette head; 19,712 parameters" in done.stdout
    assert f"igpt sample --model={tmp_path}/run" in done.stdout
    run_igpt(["export", f"--model={tmp_path}/run", f"--out={tmp_path}/back"])
    assert_same_files(hf, tmp_path / "back")
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        run_igpt(["export", f"--model={tmp_path}/run", f"--out={tmp_path}/back"])
    assert stopped.value.code == 2
    assert capsys.readouterr().err == f"error: --out={tmp_path}/back exists already; name a new directory\n"


@pytest.mark.parametrize(
    "fields",
    [
        dict(),
        dict(use_bias=True, embedding_dropout=0.1, norm_epsilon=1e-3, activation="gelu_new"),
        dict(mlp_width=88, scale_scores=False, scale_scores_by_layer=True),
    ],
)
def test_a_run_of_ours_computes_the_same_in_transformers(tmp_path, fields):
    run = write_imported_run(tmp_path / "run", **fields)
    theirs = load_hf_strictly(export(run, tmp_path / "hf"), "pixels")
    ours = igpt.load(run).model
    inputs = np.concatenate([np.full((2, 1), 17), TOKENS[:, :-1]], axis=1)
    with torch.no_grad():
        expected = theirs(torch.from_numpy(inputs)).logits.numpy()
    assert np.std(expected) > 0.1
    np.testing.assert_allclose(ours(jnp.asarray(TOKENS)), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("pixel_head", "sos"), [(True, True), (False, True), (True, False)])
def test_a_classifier_of_ours_computes_the_same_in_transformers(tmp_path, pixel_head, sos):
    run = write_imported_run(tmp_path / "run", num_classes=5, pixel_head=pixel_head, sos=sos)
    theirs = load_hf_strictly(export(run, tmp_path / "hf"), "classes")
    inputs = np.concatenate([np.full((2, 1), 17), TOKENS[:, :-1]], axis=1) if sos else TOKENS
    with torch.no_grad():
        expected = theirs(torch.from_numpy(inputs)).logits.numpy()
    assert expected.shape == (2, 5)
    np.testing.assert_allclose(igpt.load(run).model.classify(jnp.asarray(TOKENS)), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("classes", [0, 5])
def test_a_network_without_sos_comes_back_as_one(tmp_path, classes):
    run = write_imported_run(tmp_path / "run", num_classes=classes, sos=False, use_bias=True)
    out = export(run, tmp_path / "hf")
    back = import_directory(out, tmp_path / "back")
    assert_same_files(out, export(back, tmp_path / "again"), (*FILES, "README.md"))
    one, *others = (igpt.load(ref).model for ref in (run, out, back))
    for other in others:
        assert not other.config.sos
        np.testing.assert_array_equal(one.features(jnp.asarray(TOKENS)), other.features(jnp.asarray(TOKENS)))


def test_a_classifier_of_transformers_is_read_as_its_pipeline_feeds_it(tmp_path):
    there = save_hf_model(tmp_path / "hf", hf_model("classes"))
    with torch.no_grad():
        expected = load_hf_strictly(there, "classes")(torch.from_numpy(TOKENS)).logits.numpy()
    for ref in (there, import_directory(there, tmp_path / "run")):
        ours = igpt.load(ref).model.classify(jnp.asarray(TOKENS))
        np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-5)


def test_an_earlier_import_of_a_classifier_is_exported_as_it_came(tmp_path):
    there = save_hf_model(tmp_path / "hf", hf_model("classes"))
    run = import_directory(there, tmp_path / "run")
    config = json.loads((run / "config.json").read_text())
    del config["model"]["sos"]  # as before the field, when every network was read with the SOS
    (run / "config.json").write_text(json.dumps(config))
    assert_same_files(there, export(run, tmp_path / "back"))


@pytest.mark.parametrize("names", [("ant", "größe", "0", "bee", "cat"), None])
def test_class_names_go_to_transformers_and_come_back(tmp_path, names):
    run = write_imported_run(tmp_path / "run", num_classes=5)
    if names:
        save_names(names, run)
    out = export(run, tmp_path / "hf")
    theirs = load_hf_strictly(out, "classes").config
    expected = names or ("0", "1", "2", "3", "4")
    assert theirs.id2label == dict(enumerate(expected)) and theirs.label2id == dict(
        zip(expected, range(5), strict=True)
    )
    for ref in (run, out, import_directory(out, tmp_path / "imported")):
        assert igpt.load(ref).class_names == names
    assert_same_files(out, export(tmp_path / "imported", tmp_path / "again"))


@pytest.mark.parametrize(
    ("id2label", "names"),
    [
        ({0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"}, None),
        ({2: "cat", 0: "ant", 1: "bee"}, ("ant", "bee", "cat")),
        ({0: "crane", 1: "crane", 2: "cat"}, ("crane (0)", "crane (1)", "cat")),
    ],
    ids=["invented", "in any order", "one name twice"],
)
def test_the_labels_of_transformers_become_names(id2label, names):
    assert names_of_labels(ImageGPTConfig.from_dict({"id2label": {str(k): v for k, v in id2label.items()}})) == names


def test_the_exported_processor_gives_the_tokens_of_the_palette(tmp_path):
    run = write_imported_run(tmp_path / "run")
    export(run, tmp_path / "hf")
    processor = ImageGPTImageProcessorPil.from_pretrained(tmp_path / "hf")
    tokens = processor(list(IMAGES), return_tensors="np")["input_ids"]
    np.testing.assert_array_equal(tokens, igpt.load(run).tokenizer.encode(IMAGES).reshape(3, 35))


def test_a_model_of_transformers_computes_the_same_here(hf):
    inputs = np.concatenate([np.full((2, 1), 17), TOKENS[:, :-1]], axis=1)
    with torch.no_grad():
        expected = load_hf_strictly(hf, "pixels")(torch.from_numpy(inputs)).logits.numpy()
    pretrained = igpt.load(hf)
    np.testing.assert_allclose(pretrained.model(jnp.asarray(TOKENS)), expected, rtol=0, atol=1e-5)
    assert pretrained.step == 0 and pretrained.config.data.image_size == HF_IMAGE_SIZE
    np.testing.assert_array_equal(pretrained.tokenizer.centers, HF_CLUSTERS.astype(np.float32))


def test_a_foreign_or_damaged_origin_is_refused(imported, tmp_path):
    run = write_imported_run(tmp_path / "run")
    origin = run / ORIGIN
    sound = (imported / ORIGIN).read_text()
    origin.write_text(sound)
    with pytest.raises(UserError, match="another model"):  # one with biases
        export(run, tmp_path / "hf")
    for content in ("{}", '{"config": 1}', '{"config": {}, "preprocessor": {}}', "[", sound.replace('"F32"', '"F33"')):
        origin.write_text(content)
        with pytest.raises(UserError, match=r"damaged|cannot be read as JSON"):
            export(run, tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


def test_a_model_that_is_not_causal_is_not_exported(tmp_path):
    run = write_imported_run(tmp_path / "run", causal=False)
    with pytest.raises(UserError, match="trained with the BERT objective"):
        export(run, tmp_path / "hf")


@pytest.mark.parametrize("taken", ["full", "file", "x" * 300, "file/below"])
def test_existing_files_and_impossible_paths_are_not_written(hf, imported, tmp_path, taken):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for write, ref in ((export, imported), (import_directory, hf)):
        with pytest.raises(UserError, match=r"exists already; name a new directory|cannot be written: .* name another"):
            write(ref, tmp_path / taken)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "full", "notes"]
    with pytest.raises(UserError, match="is a bucket"):
        export(imported, "gs://bucket/hf")


def test_an_empty_directory_is_filled(imported, tmp_path):
    (tmp_path / "empty").mkdir()
    export(imported, tmp_path / "empty")
    assert {path.name for path in (tmp_path / "empty").iterdir()} == {*FILES, "README.md", "generation_config.json"}


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt(), ValueError("a defect")])
def test_a_failed_write_leaves_nothing_and_keeps_foreign_files(imported, hf, tmp_path, monkeypatch, error):
    (tmp_path / "out.partial").mkdir()  # another program's folder

    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr("igpt.interop.hf_config.write_text", fail)
    monkeypatch.setattr("igpt.run.checkpoint.save_params", fail)
    expected = UserError if isinstance(error, OSError) else type(error)
    for write, ref in ((export, imported), (import_directory, hf)):
        with pytest.raises(expected, match="No space left on device" if expected is UserError else None):
            write(ref, tmp_path / "out")
        assert [path.name for path in tmp_path.iterdir()] == ["out.partial"]


def test_large_exports_are_sharded(imported, hf, tmp_path, monkeypatch):
    monkeypatch.setattr(weight_files, "MAX_SHARD_BYTES", 20_000)
    out = export(imported, tmp_path / "out")
    assert len(list(out.glob("model-*-of-*.safetensors"))) > 2
    expected = load_hf_strictly(hf, "pixels").state_dict()
    for name, tensor in load_hf_strictly(out, "pixels").state_dict().items():
        assert torch.equal(tensor, expected[name])


def test_half_precision_in_parts_is_widened(hf_copy, tmp_path):
    tensors = load_file(hf_copy / "model.safetensors")
    tensors["lm_head.weight"] = tensors["lm_head.weight"].astype(np.float16)
    save_file(tensors, hf_copy / "model.safetensors", {"format": "pt"})
    out = export(import_directory(hf_copy, tmp_path / "run"), tmp_path / "out")
    back = load_file(out / "model.safetensors")
    assert {tensor.dtype for tensor in back.values()} == {np.dtype(np.float32)}
    assert all((back[name] == tensors[name]).all() for name in tensors)


def test_the_image_size_fits_the_number_of_positions():
    assert HF_IMAGE_SIZE[0] * HF_IMAGE_SIZE[1] == HF_SIZES["n_positions"]


def test_the_exported_config_names_the_type_of_the_exported_weights(hf_copy, tmp_path):
    settings = json.loads((hf_copy / "config.json").read_text())
    (hf_copy / "config.json").write_text(json.dumps(settings | {"dtype": "bfloat16", "torch_dtype": "bfloat16"}))
    export(hf_copy, tmp_path / "out")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    types = {str(tensor.dtype) for tensor in load_file(tmp_path / "out" / "model.safetensors").values()}
    assert types == {written["dtype"]} == {written["torch_dtype"]} == {"float32"}
