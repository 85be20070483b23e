import contextlib
import os
import subprocess
import sys
import warnings

import matplotlib
import numpy as np
import pytest
from PIL import Image

from igpt import plots
from igpt.errors import UserError
from igpt.files import check_writable
from igpt.plots import (
    check_drawing,
    confusion_picture,
    image_grid,
    palette_picture,
    probe_curve,
    save_png,
)
from tests.helpers import ROOT


def test_a_grid_shows_every_image_row_by_row_enlarged_by_whole_pixels():
    images = np.random.default_rng(0).integers(0, 255, (5, 3, 4, 3), np.uint8)
    picture = image_grid(images, columns=2, min_side=8, gap=1)
    assert picture.shape == (3 * 7 + 1, 2 * 9 + 1, 3)
    for i, image in enumerate(images):
        top, left = 1 + i // 2 * 7, 1 + i % 2 * 9
        np.testing.assert_array_equal(picture[top : top + 6 : 2, left : left + 8 : 2], image)
        np.testing.assert_array_equal(picture[top + 1 : top + 6 : 2, left + 1 : left + 8 : 2], image)
    assert (picture[0] == 255).all() and (picture[-7:-1, 10:] == 255).all()  # gaps, and the empty sixth cell


def test_a_written_picture_is_complete_and_the_only_file(tmp_path):
    picture = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
    save_png(picture, tmp_path / "a.png")
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "a.png")), picture)
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


@pytest.mark.parametrize("name", ["a.jpg", "absent/a.png"])
def test_a_picture_that_cannot_be_written_is_refused_beforehand(tmp_path, name):
    with pytest.raises(UserError, match="ends in .png|cannot be written"):
        check_writable(tmp_path / name, suffix=".png")


def test_the_probe_curve_is_a_picture(tmp_path):
    def entry(layer, accuracy):
        return {"layer": layer, "test_accuracy": accuracy, "interval": (accuracy - 0.1, accuracy + 0.05)}

    layers = {"layers": [entry(0, 0.5), entry(1, 0.7)]}
    probe_curve({"pretrained": layers, "random_init": layers, "raw_pixels": entry(None, 0.6)}, tmp_path / "probe.png")
    assert Image.open(tmp_path / "probe.png").size[0] > 300


@pytest.fixture
def drawn(monkeypatch):
    """The axes of every figure that is written."""
    axes, figure = [], plots._figure

    @contextlib.contextmanager
    def kept(*arguments, **named):
        with figure(*arguments, **named) as one:
            axes.append(one)
            yield one

    monkeypatch.setattr(plots, "_figure", kept)
    return axes


def test_the_probe_curve_of_a_deep_model_names_only_as_many_layers_as_can_be_read(drawn, tmp_path):
    for count, ticks in ((2, 2), (25, 25), (26, 13), (49, 25)):
        fits = [{"layer": i, "test_accuracy": 0.5, "interval": (0.4, 0.6)} for i in range(count)]
        probe_curve({"pretrained": {"layers": fits}}, tmp_path / "probe.png")
        assert len(drawn[-1].get_xticks()) == ticks and drawn[-1].get_xticks()[0] == 0


def test_a_class_whose_name_the_font_lacks_has_its_number(drawn, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        confusion_picture(np.eye(4, dtype=int), tmp_path / "a.png", ["Äpfel", "\u732b", "cat \u72ac", "$x^$"])
    assert [text.get_text() for text in drawn[0].get_yticklabels()] == ["Äpfel", "1", "2", r"\$x^\$"]


@pytest.mark.parametrize("colors", [1, 17, 512, 1021])
def test_the_picture_of_a_palette_has_every_colour_and_every_image(colors):
    rng = np.random.default_rng(0)
    palette = rng.integers(0, 255, (colors, 3), np.uint8)
    before, after = rng.integers(0, 255, (2, 8, 5, 7, 3), np.uint8)
    picture = palette_picture(palette, before, after)
    grid = image_grid(np.concatenate([before, after]), columns=8, min_side=128)
    np.testing.assert_array_equal(picture[-len(grid) :, : grid.shape[1]], grid)
    seen = np.unique(picture[: -len(grid)].reshape(-1, 3), axis=0)
    assert {(255, 255, 255), *map(tuple, palette.tolist())} == set(map(tuple, seen.tolist()))


@pytest.mark.parametrize("classes", [2, 10, 100])
def test_a_confusion_matrix_is_drawn_even_for_a_class_without_images(tmp_path, classes):
    counts = np.random.default_rng(0).integers(0, 9, (classes, classes))
    counts[1] = 0
    with np.errstate(all="raise"):
        confusion_picture(counts, tmp_path / "confusion.png")
    assert Image.open(tmp_path / "confusion.png").size[0] > 300
    names = ["$x^$", "x" * 99, *map(str, range(2, classes))]  # a broken formula, and a long name
    confusion_picture(counts, tmp_path / "confusion.png", names)
    assert [path.name for path in tmp_path.iterdir()] == ["confusion.png"]


def test_drawing_does_not_switch_matplotlib_s_back_end(tmp_path):
    with matplotlib.rc_context({"backend": "svg"}):
        confusion_picture(np.eye(3, dtype=int), tmp_path / "confusion.png")
        assert matplotlib.get_backend() == "svg"


def test_a_back_end_that_is_not_installed_does_not_stop_drawing(tmp_path):
    code = "import sys, numpy, igpt.plots; igpt.plots.confusion_picture(numpy.eye(3, dtype=int), sys.argv[1])"
    command = [sys.executable, "-c", code, str(tmp_path / "a.png")]
    done = subprocess.run(command, env=os.environ | {"MPLBACKEND": "absent"}, cwd=ROOT, timeout=60)
    assert done.returncode == 0 and (tmp_path / "a.png").exists()


def test_a_broken_matplotlib_is_found_before_the_work(monkeypatch):
    def fails():
        raise ImportError("no such library\nmore")

    check_drawing()
    monkeypatch.setattr("igpt.plots._figure_class", fails)
    with pytest.raises(UserError, match=r"cannot draw the results \(no such library\); repair its installation"):
        check_drawing()
