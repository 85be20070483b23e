"""A model of transformers and a checkpoint in OpenAI's format, each written once; tests must not change them."""

import numpy as np
import pytest

from tests.helpers import OPENAI_DIMS, hf_model, openai_variables, save_hf_model, write_tf_checkpoint


@pytest.fixture(scope="session")
def hf(tmp_path_factory):
    """The directory of a causal model of transformers with its processor."""
    return save_hf_model(tmp_path_factory.mktemp("hub") / "hf", hf_model())


@pytest.fixture
def hf_copy(hf, tmp_path):
    """A copy of the directory `hf`, which a test may change."""
    folder = tmp_path / "copied"
    folder.mkdir()
    for file in ("model.safetensors", "config.json", "preprocessor_config.json"):
        (folder / file).write_bytes((hf / file).read_bytes())
    return folder


@pytest.fixture(scope="session")
def clusters(tmp_path_factory):
    """A palette file with as many colours as `checkpoint` has."""
    path = tmp_path_factory.mktemp("clusters") / "kmeans_centers.npy"
    np.save(path, np.random.default_rng(0).uniform(-1, 1, (OPENAI_DIMS["V"], 3)).astype(np.float32))
    return path


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """The prefix of a checkpoint in OpenAI's format."""
    return write_tf_checkpoint(tmp_path_factory.mktemp("checkpoint") / "model.ckpt-1000000", openai_variables())
