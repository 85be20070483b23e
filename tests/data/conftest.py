"""Images in folders, in arrays and as prepared tokens."""

import numpy as np
import pytest
from PIL import Image

from igpt.data import prepare
from igpt.palette import Palette
from tests.helpers import PREPARE_HEIGHT, PREPARE_IMAGES, PREPARE_WIDTH, prepare_settings


@pytest.fixture
def palette(tmp_path):
    made = Palette(np.random.default_rng(0).uniform(-1, 1, (37, 3)).astype(np.float32))
    made.save(tmp_path / "palette.npy")
    return tmp_path / "palette.npy"


@pytest.fixture
def pictures(tmp_path):
    """The same images as a folder of PNGs in three classes and as an .npz: the names of the two sources."""
    images = np.random.default_rng(1).integers(0, 256, (PREPARE_IMAGES, PREPARE_HEIGHT, PREPARE_WIDTH, 3), np.uint8)
    labels = np.sort(np.arange(PREPARE_IMAGES, dtype=np.int32) % 3)
    np.savez(tmp_path / "images.npz", images=images, labels=labels)
    for i, (image, label) in enumerate(zip(images, labels, strict=True)):
        (tmp_path / "folder" / f"class{label}").mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(tmp_path / "folder" / f"class{label}" / f"{i:03d}.png")
    return {"folder": f"folder:{tmp_path}/folder", "npz": f"npz:{tmp_path}/images.npz"}


@pytest.fixture
def prepared_folder(pictures, palette, tmp_path):
    prepare.prepare(prepare_settings(pictures["folder"]), str(palette), str(tmp_path / "done"), shard_images=11)
    return tmp_path / "done"
