"""Imports of Hugging Face directories and of OpenAI's checkpoints as run directories."""

import json
import shlex

import jax
import numpy as np
import pytest
from flax import nnx
from PIL import Image

import igpt
from igpt.__main__ import main as run_igpt
from igpt.errors import UserError
from igpt.interop.import_run import import_checkpoint, import_directory
from igpt.interop.processor import ImageGPTImageProcessor
from igpt.palette import Palette
from tests.helpers import HF_CLUSTERS, OPENAI_DIMS, hf_model, openai_variables, save_hf_model, write_tf_checkpoint

V, D, N, T, F, L = OPENAI_DIMS.values()


def change(path, **settings):
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def test_parts_that_do_not_fit_each_other_are_refused(hf_copy):
    processor, config = hf_copy / "preprocessor_config.json", hf_copy / "config.json"
    sound = processor.read_text(), config.read_text()

    def refused(message):
        for read in (igpt.load, lambda ref: import_directory(ref, hf_copy.parent / "run")):
            with pytest.raises(UserError, match=message):
                read(hf_copy)
        processor.write_text(sound[0])
        config.write_text(sound[1])

    change(processor, size={"height": 5, "width": 8})
    refused("the processor makes images of 5 x 8, the model has 35 positions; set 'size'")
    change(processor, clusters=HF_CLUSTERS[:-1].tolist())
    refused("the processor has 16 clusters, the model 17 colours")
    change(processor, clusters=None)
    refused("has no 'clusters', and so no palette")
    change(processor, clusters=(2 * HF_CLUSTERS).tolist())
    refused(r"palette centres are floats in \[-1, 1\]")
    change(processor, image_mean=[0.485, 0.456, 0.406])
    refused("clusters are in unusual units")
    change(processor, do_normalize=False)
    refused("clusters are in unusual units")
    change(config, vocab_size=19)
    refused(r"wte.weight has shape \[18, 22\]; it must be \[19, 22\]")
    change(config, model_type="gpt2")
    refused("model_type is 'gpt2'; only 'imagegpt'")
    change(config, tie_word_embeddings=True)
    refused("its head is its embedding")
    processor.unlink()
    refused(r"has no preprocessor_config.json, .* import --from=.* --clusters=kmeans_centers.npy")
    config.write_text("{}")
    with pytest.raises(UserError, match="is not a Hugging Face directory: its config.json has no model_type"):
        import_directory(hf_copy, hf_copy.parent / "run")


@pytest.mark.parametrize("kind", [dict(problem_type="multi_label_classification"), dict(num_labels=1)], ids=str)
def test_a_classifier_that_gives_no_probabilities_of_classes_is_refused(tmp_path, kind):
    there = save_hf_model(tmp_path / "hf", hf_model("classes", **kind))
    with pytest.raises(UserError, match="its classifier is for regression or for several labels an image"):
        igpt.load(there)


def test_a_revision_of_a_directory_is_refused(hf, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        run_igpt(["import", f"--from={hf}", "--revision=main", f"--out={tmp_path}/run"])
    assert "--revision is for ids of the hub" in capsys.readouterr().err


def test_clusters_can_be_given_where_there_is_no_processor(tmp_path):
    hf_model(n_positions=36).save_pretrained(tmp_path / "hf")
    Palette(HF_CLUSTERS).save(tmp_path / "clusters.npy")
    run = import_directory(tmp_path / "hf", tmp_path / "run", clusters=tmp_path / "clusters.npy")
    pretrained = igpt.load(run)
    assert pretrained.config.data.image_size == (6, 6)
    np.testing.assert_array_equal(pretrained.tokenizer.centers, HF_CLUSTERS.astype(np.float32))
    hf_model().save_pretrained(tmp_path / "oblong")
    with pytest.raises(UserError, match="35 positions are no square number, .*: write a preprocessor_config.json"):
        import_directory(tmp_path / "oblong", tmp_path / "other", clusters=tmp_path / "clusters.npy")


def test_the_run_directory_has_the_network_and_the_clusters(checkpoint, clusters, tmp_path):
    config, model, palette, step, _ = igpt.load(import_checkpoint(checkpoint, clusters, tmp_path / "run"))
    assert step == 0 and tuple(config.data.image_size) == (5, 5) and config.data.channels == 3
    expected = dict(width=D, depth=L, num_heads=N, vocab_size=V, seq_len=T, mlp_width=F, use_bias=False, causal=True)
    assert {name: getattr(model.config, name) for name in expected} == expected
    np.testing.assert_array_equal(palette.centers, np.load(clusters))
    assert {leaf.dtype.name for leaf in jax.tree.leaves(nnx.state(model))} == {"float32"}


def test_grey_clusters_make_a_grey_model(checkpoint, tmp_path):
    np.save(tmp_path / "grey.npy", np.linspace(-1, 1, V)[:, None].repeat(3, axis=1))
    run = import_checkpoint(checkpoint, tmp_path / "grey.npy", tmp_path / "run")
    assert igpt.load(run).config.data.channels == 1


def test_clusters_of_another_network_are_refused(checkpoint, tmp_path):
    other = tmp_path / "other.npy"
    np.save(other, np.random.default_rng(0).uniform(-1, 1, (13, 3)).astype(np.float32))
    with pytest.raises(UserError, match=r"other\.npy has 13 colours, but the network of .* has 17"):
        import_checkpoint(checkpoint, other, tmp_path / "run")
    with pytest.raises(UserError, match="there is no palette at"):
        import_checkpoint(checkpoint, tmp_path / "absent.npy", tmp_path / "run")


def test_existing_files_are_not_overwritten(checkpoint, clusters, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="exists already"):
        import_checkpoint(checkpoint, clusters, tmp_path / "run")
    assert [file.name for file in (tmp_path / "run").iterdir()] == ["mine.txt"]


def test_the_command_prints_its_result_and_the_next_commands(checkpoint, clusters, tmp_path, capsys):
    command = ["import", f"--checkpoint={checkpoint}.index", f"--clusters={clusters}", f"--out={tmp_path}/run"]
    run_igpt(command)
    printed = capsys.readouterr().out
    assert "width 20, depth 3, 2 heads, 25 positions, 17 colours, palette head" in printed
    assert f"igpt sample --model={tmp_path}/run" in printed and "BERT" not in printed
    with pytest.raises(SystemExit) as caught:
        run_igpt(command)
    assert caught.value.code == 2 and "error: --out=" in capsys.readouterr().err


def test_the_command_prints_that_a_bert_model_cannot_be_sampled(clusters, tmp_path, capsys):
    prefix = write_tf_checkpoint(tmp_path / "model.ckpt-7", openai_variables(bert=True))
    run_igpt(["import", f"--checkpoint={prefix}", f"--clusters={clusters}", f"--out={tmp_path}/run"])
    printed = capsys.readouterr().out
    assert "BERT objective" in printed and "igpt sample" not in printed


def test_given_clusters_replace_only_the_clusters_of_a_processor(tmp_path):
    hf_model(n_positions=64).save_pretrained(tmp_path / "hf")
    processor = ImageGPTImageProcessor(-HF_CLUSTERS, size=(4, 16), resample=Image.Resampling.BICUBIC)
    processor.save_pretrained(tmp_path / "hf")
    Palette(HF_CLUSTERS).save(tmp_path / "clusters.npy")
    pretrained = igpt.load(import_directory(tmp_path / "hf", tmp_path / "run", clusters=tmp_path / "clusters.npy"))
    assert (pretrained.config.data.image_size, pretrained.config.data.filter) == ((4, 16), "bicubic")
    np.testing.assert_array_equal(pretrained.tokenizer.centers, HF_CLUSTERS.astype(np.float32))


def test_the_printed_commands_run_in_a_folder_with_a_space_and_classify(tmp_path, capsys):
    made = save_hf_model(tmp_path / "hf", hf_model("classes"))
    run_igpt(["import", f"--from={made}", f"--out={tmp_path}/my run"])
    commands = [shlex.split(line) for line in capsys.readouterr().out.splitlines() if line.startswith("  ")]
    assert all(f"--model={tmp_path}/my run" in words for words in commands)
    assert f"--workdir={tmp_path}/my run/probe" in commands[-1]
    Image.new("RGB", (9, 9)).save(tmp_path / "image.png")
    (predict,) = (words[1:-1] for words in commands if words[:2] == ["igpt", "predict"])
    run_igpt([*predict, f"{tmp_path}/image.png"])
    assert "image.png: " in capsys.readouterr().out
