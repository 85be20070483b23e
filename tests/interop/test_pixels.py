"""Images in any form become RGB bytes; most tests compare the tokens of these bytes."""

import io

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.imagegpt.image_processing_pil_imagegpt import ImageGPTImageProcessorPil

from igpt.errors import UserError
from igpt.interop.processor import ImageGPTImageProcessor
from tests.helpers import (
    PROCESSOR_CLUSTERS,
    PROCESSOR_IMAGES,
    PROCESSOR_PICTURE,
    PROCESSOR_SIZE,
    make_processor,
    tokens_as_rgb,
    tokens_of,
)


def forms_of_one_batch():
    last = PROCESSOR_IMAGES
    first = np.ascontiguousarray(np.moveaxis(PROCESSOR_IMAGES, -1, 1))
    pictures = [Image.fromarray(image) for image in PROCESSOR_IMAGES]
    return {
        "array": last,
        "channels first": first,
        "list of arrays": list(last),
        "tuple of both layouts": (last[0], first[1], last[2]),
        "list of batches": [last[:2], last[2:]],
        "PIL": pictures,
        "nested list of PIL": [pictures[:1], pictures[1:]],
        "PIL and arrays": [pictures[0], last[1], first[2]],
        "numbers": last.tolist(),
        "list of lists and arrays": [last[0].tolist(), last[1].tolist(), last[2]],
        "jax": jnp.asarray(first),
        "torch": torch.from_numpy(first),
        "torch with gradient": torch.from_numpy(first / 255).requires_grad_(),
        "list of torch": [torch.from_numpy(image) for image in first],
        "int64": last.astype(np.int64),
        "whole floats": last.astype(np.float32),
        "floats up to 1": (last / 255).astype(np.float32),
        "16 bits": last.astype(np.uint16) * 257,
        "big-endian 16 bits": (last.astype(np.uint16) * 257).astype(">u2"),
    }


@pytest.mark.parametrize("form", forms_of_one_batch())
def test_images_may_be_given_in_any_form(form):
    np.testing.assert_array_equal(tokens_of(forms_of_one_batch()[form]), tokens_as_rgb(PROCESSOR_IMAGES))


def test_single_images_are_a_batch_of_one():
    for single in (
        PROCESSOR_PICTURE,
        PROCESSOR_IMAGES[0],
        PROCESSOR_IMAGES[0].tolist(),
        np.moveaxis(PROCESSOR_IMAGES[0], -1, 0),
    ):
        np.testing.assert_array_equal(tokens_of(single), tokens_as_rgb(PROCESSOR_IMAGES[:1]))


GREY = PROCESSOR_IMAGES[0, ..., 0]


WAYS = {mode: [mode] for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV", "LAB", "I")}


WAYS |= {"La": ["LA", "La"], "PA": ["P", "PA"], "RGBa": ["RGBA", "RGBa"], "F": ["L", "F"]}


@pytest.mark.parametrize("mode", WAYS)
def test_every_mode_of_pil_becomes_rgb(mode):
    picture = expected = PROCESSOR_PICTURE
    for step in WAYS[mode]:
        expected, picture = picture, picture.convert(step)
    expected = (
        picture if mode not in ("La", "RGBa", "F", "I") else PROCESSOR_PICTURE.convert("L") if mode == "I" else expected
    )
    np.testing.assert_array_equal(tokens_of(picture), tokens_as_rgb([np.asarray(expected.convert("RGB"))]))


def test_a_picture_that_pil_cannot_read_or_convert_is_refused(monkeypatch):
    file = io.BytesIO()
    PROCESSOR_PICTURE.save(file, "PNG")
    with pytest.raises(UserError, match="mode RGB cannot be read as RGB"):
        make_processor()(Image.open(io.BytesIO(file.getvalue()[:500])))

    def refuse(self, mode):
        raise ValueError("conversion not supported")

    monkeypatch.setattr(Image.Image, "convert", refuse)
    with pytest.raises(UserError, match="mode YCbCr cannot be read as RGB: conversion not supported"):
        make_processor()(Image.new("YCbCr", (5, 5)))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGB"])
def test_transparency_is_laid_on_white_as_do_convert_rgb_does(mode):
    if mode in ("RGBA", "LA"):
        picture = PROCESSOR_PICTURE.convert(mode)
        picture.putalpha(Image.fromarray(PROCESSOR_IMAGES[1, ..., 1]))
    else:
        picture = PROCESSOR_PICTURE.convert(mode)
        picture.info["transparency"] = picture.getpixel((2, 2))
    settings = dict(clusters=PROCESSOR_CLUSTERS, size=PROCESSOR_SIZE, do_convert_rgb=True)
    theirs = ImageGPTImageProcessorPil(**settings)(picture, return_tensors="np")["input_ids"]
    np.testing.assert_array_equal(ImageGPTImageProcessor(**settings)(picture, return_tensors="np").input_ids, theirs)
    assert (tokens_of(picture.convert("RGB")) != theirs).any()
    if mode == "RGBA":
        np.testing.assert_array_equal(tokens_of(np.asarray(picture)), theirs)


def test_only_do_convert_rgb_makes_an_rgb_colour_transparent():
    picture = PROCESSOR_PICTURE.copy()
    picture.info["transparency"] = picture.getpixel((2, 2))
    np.testing.assert_array_equal(tokens_of(picture), tokens_of(PROCESSOR_PICTURE))
    assert (tokens_of(picture, do_convert_rgb=True) != tokens_of(PROCESSOR_PICTURE)).any()


@pytest.mark.parametrize("mode", ["I;16", "I;16L", "I;16B", "I;16N", "I"])
def test_16_bits_are_scaled_and_never_clipped(mode):
    below_rounding = np.random.default_rng(3).integers(-128, 129, GREY.shape)
    deep = (GREY.astype(int) * 257 + below_rounding).clip(0, 65535).astype(np.uint16)
    if mode == "I":
        picture = Image.fromarray(deep.astype(np.int32))
    else:
        order = ">u2" if mode == "I;16B" else "<u2"
        picture = Image.frombytes(mode, (19, 23), deep.astype(order).tobytes())
    assert picture.mode == mode
    np.testing.assert_array_equal(tokens_of(picture), tokens_as_rgb([np.repeat(GREY[..., None], 3, -1)]))


def test_grey_arrays_and_bools_become_rgb():
    expected = tokens_as_rgb([np.repeat(GREY[..., None], 3, -1)])
    for grey in (GREY, GREY[None], GREY[..., None], [GREY], GREY.tolist(), GREY / np.float64(255)):
        np.testing.assert_array_equal(tokens_of(grey), expected)
    np.testing.assert_array_equal(tokens_of(PROCESSOR_IMAGES[..., 0], input_data_format="none")[:1], expected)
    np.testing.assert_array_equal(tokens_of(GREY > 99), tokens_of(np.uint8(255) * (GREY > 99)))


def test_if_both_axes_could_be_channels_the_first_one_is():
    rng = np.random.default_rng(4)
    ambiguous = rng.integers(0, 256, (3, 17, 4), np.uint8)
    theirs = ImageGPTImageProcessorPil(clusters=PROCESSOR_CLUSTERS, do_resize=False)
    for layout in (None, "channels_first"):
        ours = tokens_of(ambiguous, do_resize=False, input_data_format=layout)
        np.testing.assert_array_equal(ours, theirs(ambiguous, return_tensors="np")["input_ids"])
    assert tokens_of(ambiguous, do_resize=False, input_data_format="channels_last").shape == (1, 51)
    rgb = rng.integers(0, 256, (2, 3, 5, 3), np.uint8)
    assert tokens_of(rgb, do_resize=False).shape == (2, 15)
    np.testing.assert_array_equal(
        tokens_of(rgb, do_resize=False, input_data_format="channels_last"),
        theirs(list(rgb), input_data_format="channels_last", return_tensors="np")["input_ids"],
    )
    assert (tokens_of(rgb, do_resize=False) != tokens_of(rgb, do_resize=False, input_data_format="channels_last")).any()


def test_a_pil_image_3_pixels_high_is_not_mistaken_for_channels():
    np.testing.assert_array_equal(
        tokens_of(Image.fromarray(PROCESSOR_IMAGES[0, :3])),
        tokens_of([PROCESSOR_IMAGES[0, :3].tolist()], input_data_format="channels_last"),
    )


def test_floats_in_0_1_are_rounded_to_the_nearest_byte():
    between = PROCESSOR_IMAGES + np.random.default_rng(5).uniform(-0.4, 0.4, PROCESSOR_IMAGES.shape)
    np.testing.assert_array_equal(tokens_of(np.clip(between / 255, 0, 1)), tokens_as_rgb(PROCESSOR_IMAGES))


def test_all_floats_of_a_call_have_the_same_unit():
    dark, bright = np.ones((5, 5, 3)), np.full((5, 5, 3), 200.0)
    values = make_processor()(
        [dark, bright], do_color_quantize=False, do_normalize=False, return_tensors="np"
    ).pixel_values
    np.testing.assert_allclose(values[:, 0, 0, 0], [1 / 255, 200 / 255], rtol=1e-6)
    assert make_processor()(dark, do_color_quantize=False).pixel_values[0].max() == 1.0


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ("cat.png", "'cat.png' is a name.*PIL.Image.open"),
        (["https://example.org/cat.png"], "is a name"),
        ([], "no images were given"),
        (None, "NoneType"),
        (np.zeros((0, 5, 5, 3), np.uint8), "no pixels"),
        (np.zeros((7, 5, 5), np.uint8), "no axis.*input_data_format='none'"),
        (np.zeros(5, np.uint8), r"shape \[5\]"),
        (np.zeros((1, 1, 5, 5, 3), np.uint8), r"shape \[1, 1, 5, 5, 3\]"),
        (np.full((5, 5, 3), 256), "int64 from 256 to 256; scale them to 0..255"),
        (np.full((5, 5, 3), -1), "from -1"),
        (np.full((5, 5, 3), np.nan), "from nan to nan"),
        (np.full((5, 5, 3), -0.5), "from -0.5"),
        (np.full((5, 5, 3), 1.5), "fractions"),
        (np.full((5, 5, 3), 300.0), "to 300.0"),
        ([[["a"]]], "name"),
        (np.full((5, 5, 3), "a"), "integers, floats or bools"),
        ([[[1, 2, 3], [4, 5]]], r"shape"),
        (Image.fromarray(np.full((5, 5), 65536, np.int32)), "65536"),
    ],
)
def test_anything_but_an_image_is_refused_with_the_allowed_kinds(images, message):
    with pytest.raises(UserError, match=message):
        make_processor()(images)
