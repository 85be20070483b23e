import resource

import numpy as np
import pytest

from igpt.errors import UserError
from igpt.palette import Palette


def random_palette(colors=37, seed=0):
    return Palette(np.random.default_rng(seed).uniform(-1, 1, (colors, 3)).astype(np.float32))


def brute_force(images, centers):
    values = images.reshape(-1, 1, 3) / 127.5 - 1.0
    distances = np.square(values - centers.astype(np.float64)).sum(-1)
    return distances.argmin(1).reshape(images.shape[:-1])


def test_encode_equals_the_float64_argmin():
    images = np.random.default_rng(1).integers(0, 256, (5, 13, 11, 3), np.uint8)
    ours = random_palette()
    np.testing.assert_array_equal(ours.encode(images), brute_force(images, ours.centers))


def test_a_second_encoding_from_the_filled_table_is_the_same():
    images = np.random.default_rng(2).integers(0, 256, (3, 7, 7, 3), np.uint8)
    ours = random_palette()
    np.testing.assert_array_equal(ours.encode(images), ours.encode(images))


def test_ties_go_to_the_first_centre():
    centers = np.array([[0.5, 0, 0], [-0.5, 0, 0], [0.5, 0, 0]], np.float32)
    image = np.array([[[255, 127, 127], [0, 127, 127]]], np.uint8)
    np.testing.assert_array_equal(Palette(centers).encode(image), [[0, 1]])
    between = Palette(np.array([[1, 1, 1], [-1, -1, -1], [1, 1, 1]], np.float32))
    np.testing.assert_array_equal(between.encode(np.full((1, 1, 3), 255, np.uint8)), [[0]])


def test_decoding_and_encoding_again_changes_nothing():
    ours = random_palette(colors=64)
    tokens = np.arange(64).reshape(8, 8)
    assert len(np.unique(ours.decode(tokens).reshape(-1, 3), axis=0)) == 64
    np.testing.assert_array_equal(ours.encode(ours.decode(tokens)), tokens)


def test_decode_rounds_by_the_released_rule():
    centers = np.array([[-1, 0, 1], [0.5 / 127.5 - 1, 1.5 / 127.5 - 1, 2.4 / 127.5 - 1]], np.float64)
    np.testing.assert_array_equal(Palette(centers).decode(np.array([0])), [[0, 128, 255]])  # 127.5 is halfway: to even
    assert Palette(centers).decode(np.array([1]))[0, 2] == 2


def test_a_loaded_palette_equals_the_saved_one(tmp_path):
    ours = random_palette()
    ours.save(tmp_path / "palette.npy")
    np.testing.assert_array_equal(Palette.load(tmp_path / "palette.npy").centers, ours.centers)
    assert [path.name for path in tmp_path.iterdir()] == ["palette.npy"]


def test_a_transposed_palette_is_saved_as_it_is(tmp_path):
    ours = random_palette()
    np.save(tmp_path / "given.npy", np.stack(list(ours.centers.T)).T)  # in Fortran's order
    given = Palette.load(tmp_path / "given.npy")
    given.save(tmp_path / "palette.npy")
    assert given.digest == Palette.load(tmp_path / "palette.npy").digest == ours.digest


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((5, 4), np.float32), r"shape \[V, 3\].*\[5, 4\]"),
        (np.zeros((4, 3), np.uint8), r"floats in \[-1, 1\].*uint8.*convert bytes with centers / 127\.5 - 1"),
        (np.full((4, 3), 255.0), r"from 255.0 to 255.0; convert bytes"),
        (np.full((4, 3), 7.0), r"floats in \[-1, 1\].*7.0"),
        (np.full((4, 3), np.nan), r"floats in \[-1, 1\]"),
    ],
)
def test_an_array_that_cannot_be_a_palette_is_refused(tmp_path, array, message):
    np.save(tmp_path / "p.npy", array)
    with pytest.raises(UserError, match=message):
        Palette.load(tmp_path / "p.npy")


def test_unreadable_and_pickled_palettes_are_refused(tmp_path):
    with pytest.raises(UserError, match="no palette at"):
        Palette.load(tmp_path / "absent.npy")
    (tmp_path / "text.npy").write_text("hello")
    with pytest.raises(UserError, match="is not a palette"):
        Palette.load(tmp_path / "text.npy")
    np.save(tmp_path / "whole.npy", random_palette().centers)
    whole = (tmp_path / "whole.npy").read_bytes()
    damage = ((b"(37, 3)", b"(37, 3 "), (b"(37, 3), ", b"(10**9,3)"), (b"(37, 3), }   ", b"(9999999,10**9)"))
    for i, (before, after) in enumerate((*damage, (b"(37, 3), }      ", b"(10000000, 3), }"))):
        assert before in whole
        (tmp_path / f"{i}.npy").write_bytes(whole.replace(before, after))
        with pytest.raises(UserError, match="is not a palette"):
            Palette.load(tmp_path / f"{i}.npy")
    np.save(tmp_path / "pickle.npy", np.array([{"a": 1}], object), allow_pickle=True)
    with pytest.raises(UserError, match="is not a palette"):
        Palette.load(tmp_path / "pickle.npy")


def test_images_and_tokens_of_the_wrong_kind_are_refused():
    with pytest.raises(UserError, match="uint8"):
        random_palette().encode(np.zeros((2, 2, 3)))
    with pytest.raises(UserError, match=r"0\.\.36"):
        random_palette().decode(np.array([37]))


def test_loading_a_palette_with_repeated_colours_prints_their_number(tmp_path, capsys):
    ours = random_palette().centers
    np.save(tmp_path / "once.npy", ours)
    np.save(tmp_path / "twice.npy", np.concatenate([ours, ours[:2], ours[:1]]))
    Palette.load(tmp_path / "once.npy")
    assert not capsys.readouterr().out
    Palette.load(tmp_path / "twice.npy")
    assert capsys.readouterr().out == f"{tmp_path}/twice.npy: 3 of 40 colours repeat earlier ones, and are never used\n"


def test_saving_on_a_full_disk_is_an_error_and_leaves_no_file(tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))
    try:
        with pytest.raises(OSError):
            random_palette(200).save(tmp_path / "palette.npy")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("low", "high", "remedy"),
    [(0.0, 1.0, r"give 2 \* centers - 1"), (0.2, 0.9, r"give 2 \* centers - 1"), (-0.5, 0.5, r"give 2 \* centers$")],
)
def test_a_palette_that_seems_to_be_in_other_units_is_told(low, high, remedy, tmp_path):
    centers = np.linspace(low, high, 51).reshape(17, 3)
    with pytest.warns(UserWarning, match=f"-1 is black and 1 is white in a palette, but .*{remedy}"):
        palette = Palette(centers)
    palette.save(tmp_path / "p.npy")
    with pytest.warns(UserWarning, match=remedy):  # bright images may really have such a palette, so it loads
        assert Palette.load(tmp_path / "p.npy").vocab_size == 17


@pytest.mark.parametrize(("low", "high"), [(-1.0, 1.0), (-0.9, 0.1), (-0.1, 1.0), (-0.6, 0.4)])
def test_a_palette_in_its_own_units_is_not_doubted(low, high, recwarn):
    Palette(np.linspace(low, high, 51).reshape(17, 3))
    assert not recwarn.list


def test_images_and_tokens_in_other_units_are_refused():
    ours = random_palette()
    with pytest.raises(UserError, match=r"uint8 images.*float64.*np\.round\(images \* 255\)"):
        ours.encode(np.linspace(0, 1, 12).reshape(2, 2, 3))
    with pytest.raises(UserError, match=r"uint8 images \[\.\.\., 3\], not float64 \[2, 3\]$"):
        ours.encode(np.full((2, 3), 255.0))
    with pytest.raises(UserError, match="tokens are float64; whole numbers"):
        ours.decode(np.zeros(3))
