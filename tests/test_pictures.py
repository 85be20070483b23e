"""Arrays of images show themselves in a notebook."""

import io

import numpy as np
import pytest
from PIL import Image

from igpt.errors import UserError
from igpt.pictures import Pictures
from igpt.plots import image_grid


def pictures(*shape):
    return np.random.default_rng(0).integers(0, 256, (*shape, 5, 7, 3), np.uint8).view(Pictures)


def shown(images):
    return np.asarray(Image.open(io.BytesIO(images._repr_png_())))


def test_a_notebook_shows_the_grid_that_commands_write(tmp_path):
    images = pictures(6)
    np.testing.assert_array_equal(shown(images), image_grid(np.asarray(images)))
    images.save(tmp_path / "grid.png")
    assert (tmp_path / "grid.png").read_bytes() == images._repr_png_()


def test_completions_of_an_image_are_a_row():
    images = pictures(2, 5)
    np.testing.assert_array_equal(shown(images), image_grid(np.asarray(images).reshape(-1, 5, 7, 3), columns=5))
    np.testing.assert_array_equal(shown(images[0, 0]), image_grid(np.asarray(images[:1, 0])))


def test_what_is_computed_from_pictures_is_shown_as_numbers():
    images = pictures(2)
    for other in (images / 255, images[..., 0], images[:0], images.mean(axis=(1, 2))):
        assert not isinstance(other, Pictures) or other._repr_png_() is None
        assert "Pictures" not in repr(other)
    assert repr(images) == "Pictures 2 x 5 x 7 x 3"


def test_pictures_are_saved_as_png_only(tmp_path):
    with pytest.raises(UserError, match=r"ends in \.png"):
        pictures(2).save(tmp_path / "grid.jpg")


def test_a_tilde_is_the_home_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    pictures(2).save("~/grid.png")
    assert (tmp_path / "grid.png").exists()
