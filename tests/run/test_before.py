"""Files of earlier code (tests/golden/before, written before the files moved into folders) still mean the same."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import igpt
import train
from igpt.data.prepare import prepare
from igpt.data.sources import load_source
from igpt.interop.export import export
from igpt.interop.import_run import import_directory
from igpt.run.directory import load_config
from tests.helpers import ROOT, file_contents, read_arrays, records

BEFORE = ROOT / "tests" / "golden" / "before"


@pytest.fixture
def run(tmp_path):
    """A copy of the run, which was killed after it had saved step 2 of 4."""
    return shutil.copytree(BEFORE / "run", tmp_path / "run")


def test_an_earlier_run_resumes_and_ends_where_it_would_have(run):
    """Bitwise on the machine that wrote the fixture; another processor may round a last bit otherwise."""
    config = load_config(run)
    train.run(config, run)
    arrays = read_arrays(run, 4)
    found = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(arrays)}
    with np.load(BEFORE / "resumed_to_4.npz") as expected:
        dropped = {name for name in expected.files if name.endswith("['losses']")}  # the memory of spike_sigma
        assert found.keys() == set(expected.files) - dropped and len(dropped) == 1
        for name, leaf in found.items():
            np.testing.assert_allclose(leaf, expected[name], rtol=1e-5, atol=1e-7, err_msg=name)
    known = [{k: v for k, v in record.items() if not k.startswith("perf/")} for record in records(run)]
    for record, before in zip(known, json.loads((BEFORE / "resumed_to_4.json").read_text()), strict=True):
        assert record == pytest.approx(before, rel=1e-5)


def test_an_earlier_run_has_equal_logits_and_features():
    with np.load(BEFORE / "logits.npz") as before:
        for ref in ("run", "hf_run", "imported"):
            model = igpt.load(BEFORE / ref).model
            tokens = jnp.asarray(before["tokens"])
            np.testing.assert_allclose(model(tokens), before["logits"], rtol=1e-5, atol=1e-6)
            np.testing.assert_allclose(model.features(tokens), before["features"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("ref", ["run", "imported"])
def test_an_earlier_run_is_exported_to_equal_bytes(ref, tmp_path):
    export(BEFORE / ref, tmp_path / "hf")
    made, before = file_contents(tmp_path / "hf"), file_contents(BEFORE / "hf_run")
    assert {name: made[name] for name in before} == before


def test_an_earlier_export_is_imported_to_equal_weights(tmp_path):
    made = import_directory(BEFORE / "hf_run", tmp_path / "imported")
    ours, theirs = (igpt.load(ref).model for ref in (made, BEFORE / "imported"))
    jax.tree.map(np.testing.assert_array_equal, *(jax.tree.leaves(model) for model in (ours, theirs)))
    assert (made / "palette.npy").read_bytes() == (BEFORE / "imported" / "palette.npy").read_bytes()


def test_earlier_prepared_tokens_are_read_and_made_again_to_equal_bytes(tmp_path, monkeypatch):
    monkeypatch.chdir(BEFORE)
    settings = dict(source="npz:images.npz", image_size=(6, 7), channels=3)
    prepare(settings, "palette.npy", str(tmp_path / "prepared"), shard_images=16)
    ours, theirs = file_contents(tmp_path / "prepared"), file_contents(BEFORE / "prepared")
    assert ours.keys() == theirs.keys()
    assert {name: text for name, text in ours.items() if name.endswith(".npy")} == {
        name: text for name, text in theirs.items() if name.endswith(".npy")
    }
    opened = load_source(dict(settings, source="tokens:prepared"))
    assert len(opened.train) == 28 and opened.train.labels.dtype == np.int32
