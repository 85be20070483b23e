"""A model to probe and the images to probe it with."""

import numpy as np
import pytest

from tests.helpers import grey_pictures, write_run


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("source") / "images.npz"
    images, labels = grey_pictures()
    np.savez(path, images=images, labels=labels, names=["dark", "medium", "light"])
    return f"npz:{path}"


@pytest.fixture(scope="module")
def trained(tmp_path_factory, source):
    return write_run(tmp_path_factory.mktemp("runs") / "run", source)
