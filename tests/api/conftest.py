"""The documented classes beside those of transformers, with the same weights."""

import pytest

from tests.helpers import hf_and_ours


@pytest.fixture(scope="session")
def causal(tmp_path_factory):
    return hf_and_ours(tmp_path_factory.mktemp("causal"))
