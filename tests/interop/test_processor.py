"""Parity with transformers' PIL processor. Its torchvision processor resizes and rounds differently."""

import io
import itertools
import pickle
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.imagegpt.image_processing_pil_imagegpt import ImageGPTImageProcessorPil

from igpt.errors import UserError
from igpt.interop.processor import ImageGPTImageProcessor
from igpt.palette import Palette
from tests.helpers import (
    PROCESSOR_CLUSTERS,
    PROCESSOR_IMAGES,
    PROCESSOR_PICTURE,
    PROCESSOR_SIZE,
    make_processor,
    tokens_as_rgb,
    tokens_of,
)

# ---- the same as transformers


@pytest.mark.parametrize(("do_rescale", "do_normalize"), [*itertools.product([True, False], repeat=2)])
@pytest.mark.parametrize("resample", [None, *Image.Resampling])
def test_pixel_values_equal_transformers_to_the_last_bit(resample, do_rescale, do_normalize):
    settings = dict(size=PROCESSOR_SIZE, do_rescale=do_rescale, do_normalize=do_normalize, do_color_quantize=False)
    settings |= {"do_resize": False} if resample is None else {"resample": resample}
    settings |= {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
    theirs = ImageGPTImageProcessorPil(**settings)(PROCESSOR_IMAGES, return_tensors="np")["pixel_values"]
    ours = ImageGPTImageProcessor(**settings)(PROCESSOR_IMAGES, return_tensors="np")["pixel_values"]
    assert ours.dtype == np.float32 and ours.shape == (3, 3, *((13, 11) if resample is not None else (23, 19)))
    np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize(("do_rescale", "do_normalize"), [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("resample", [None, *Image.Resampling])
def test_tokens_equal_transformers(resample, do_rescale, do_normalize):
    highest = (1 if do_rescale else 255) * (2 if do_normalize else 1)  # the clusters need the range of the pixels
    clusters = (
        np.array(PROCESSOR_CLUSTERS) * highest / 2 + (0 if do_normalize and do_rescale else highest / 2)
    ).tolist()
    settings = dict(size=PROCESSOR_SIZE, do_rescale=do_rescale, do_normalize=do_normalize, clusters=clusters)
    settings |= {"do_resize": False} if resample is None else {"resample": resample}
    theirs = ImageGPTImageProcessorPil(**settings)(PROCESSOR_IMAGES, return_tensors="np")["input_ids"]
    ours = ImageGPTImageProcessor(**settings)(PROCESSOR_IMAGES, return_tensors="np")["input_ids"]
    assert ours.dtype == theirs.dtype == np.int64 and len(np.unique(ours)) > 50
    np.testing.assert_array_equal(ours, theirs)


def test_raw_bytes_get_the_nearest_cluster_unlike_in_transformers():
    settings = dict(
        clusters=(127.5 + 127.5 * np.array(PROCESSOR_CLUSTERS)).tolist(), do_rescale=False, do_normalize=False
    )
    ours = ImageGPTImageProcessor(**settings, do_resize=False)(PROCESSOR_IMAGES, return_tensors="np")["input_ids"]
    pixels = PROCESSOR_IMAGES.reshape(-1, 1, 3).astype(np.float64)
    np.testing.assert_array_equal(ours.ravel(), np.square(pixels - settings["clusters"]).sum(-1).argmin(1))


def disagreements(clusters, image):
    """The number of tokens that differ from transformers', and the largest difference of their centres' distances."""
    ours, theirs = (
        kind(clusters=clusters.tolist(), do_resize=False)(image, return_tensors="np")["input_ids"].ravel()
        for kind in (ImageGPTImageProcessor, ImageGPTImageProcessorPil)
    )
    differ = ours != theirs
    pixels = image.reshape(-1, 3)[differ] / 127.5 - 1
    distances = [np.square(pixels - clusters[tokens[differ]]).sum(-1) for tokens in (ours, theirs)]
    return differ.sum(), np.max(distances[1] - distances[0], initial=0)


def test_fewer_than_1_token_in_100000_differs_and_only_at_a_near_tie():
    """transformers rounds pixels to float32, about 1e-7. So it may choose the other of two equally near clusters."""
    rng = np.random.default_rng(1)
    counted = []
    for clusters in rng.uniform(-1, 1, (2, 512, 3)):
        for image in rng.integers(0, 256, (8, 61, 127, 3), np.uint8):
            counted.append(disagreements(clusters, image))
    assert sum(number for number, _ in counted) <= 1  # of 123,952
    assert max(gap for _, gap in counted) < 1e-6


def test_tokens_of_pixels_at_near_ties_differ_by_near_ties_only():
    colors = np.random.default_rng(2).permutation(256)[:48].reshape(16, 3)
    clusters = np.concatenate([colors / 127.5 - 1 + shift for shift in (0.01, -0.01)])
    number, gap = disagreements(clusters, colors.reshape(2, 8, 3).astype(np.uint8))
    assert number > 0 and gap < 1e-6


def test_tokens_are_the_palettes_tokens():
    ours = make_processor(clusters=np.float32(PROCESSOR_CLUSTERS))
    tokens = ours(PROCESSOR_IMAGES, do_resize=False, return_tensors="np").input_ids
    np.testing.assert_array_equal(tokens.reshape(3, 23, 19), ours.palette().encode(PROCESSOR_IMAGES))
    assert isinstance(ours.palette(), Palette)


def test_clusters_decode_tokens_as_in_the_documentation():
    ours = make_processor()
    tokens = ours(PROCESSOR_IMAGES, return_tensors="np").input_ids
    images = [np.reshape(np.rint(127.5 * (ours.clusters[s] + 1.0)), [13, 11, 3]).astype(np.uint8) for s in tokens]
    np.testing.assert_array_equal(ours(images, return_tensors="np").input_ids, tokens)


# ---- inputs


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


def test_images_of_different_sizes_become_one_batch_or_a_list():
    given = [
        PROCESSOR_IMAGES[0],
        PROCESSOR_IMAGES[1, :7],
        Image.fromarray(PROCESSOR_IMAGES[2, :, :5]),
        PROCESSOR_IMAGES[0, :2, :5].tolist(),
    ]
    assert tokens_of(given).shape == (4, 143)
    assert [len(tokens) for tokens in tokens_of(given, do_resize=False, return_tensors=None)] == [437, 133, 115, 10]
    values = make_processor()(given, do_resize=False, do_color_quantize=False).pixel_values
    assert [image.shape for image in values] == [(3, 23, 19), (3, 7, 19), (3, 23, 5), (3, 2, 5)]
    with pytest.raises(UserError, match="differ in size"):
        tokens_of(given, do_resize=False)


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


def test_floats_in_0_1_are_not_divided_by_255_twice():
    floats = PROCESSOR_IMAGES / 255
    settings = dict(size=PROCESSOR_SIZE, do_color_quantize=False, return_tensors="np")
    by_default = make_processor()(floats, **settings).pixel_values
    np.testing.assert_array_equal(by_default, make_processor()(PROCESSOR_IMAGES, **settings).pixel_values)
    theirs = ImageGPTImageProcessorPil(size=PROCESSOR_SIZE, do_color_quantize=False, do_rescale=False)(
        floats, return_tensors="np"
    )
    np.testing.assert_array_equal(
        make_processor()(floats, do_rescale=False, **settings).pixel_values, theirs["pixel_values"]
    )
    np.testing.assert_array_equal(tokens_of(floats, do_rescale=False), tokens_as_rgb(PROCESSOR_IMAGES))


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


def test_without_rescaling_bytes_and_floats_in_0_1_cannot_share_a_call():
    given = [PROCESSOR_IMAGES[0], PROCESSOR_IMAGES[0] / 255]
    np.testing.assert_array_equal(tokens_of(given), tokens_as_rgb(PROCESSOR_IMAGES[[0, 0]]))
    with pytest.raises(UserError, match="do_rescale=True, or two calls"):
        tokens_of(given, do_rescale=False)


def test_an_image_with_one_of_its_sides_right_is_resized_along_the_other():
    for image in (PROCESSOR_IMAGES[0, :13], PROCESSOR_IMAGES[0, :, :11], PROCESSOR_IMAGES[0, :13, :11]):
        resized = np.asarray(Image.fromarray(image).resize((11, 13), Image.Resampling.BILINEAR))
        np.testing.assert_array_equal(tokens_of(image), tokens_of(resized, do_resize=False))


# ---- results


def test_results_are_lists_or_the_requested_tensors():
    as_list = make_processor()(PROCESSOR_IMAGES)
    assert isinstance(as_list.input_ids, list) and as_list["input_ids"][0].dtype == np.int64
    for kind, of, dtype in (
        ("np", np.ndarray, np.int64),
        ("jax", jax.Array, jnp.int32),
        ("pt", torch.Tensor, torch.int64),
    ):
        result = tokens_of(PROCESSOR_IMAGES, return_tensors=kind)
        assert isinstance(result, of) and result.dtype == dtype
        np.testing.assert_array_equal(np.asarray(result), np.stack(as_list.input_ids))
    values = make_processor()(PROCESSOR_IMAGES, do_color_quantize=False, return_tensors="pt").pixel_values
    assert values.dtype == torch.float32 and values.shape == (3, 3, 13, 11)


def test_torch_tensors_without_torch_are_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(UserError, match="needs torch: pip install torch"):
        make_processor()(PROCESSOR_IMAGES, return_tensors="pt")


def test_data_format_is_the_position_of_the_channels():
    first, last = (
        make_processor()(PROCESSOR_IMAGES, do_color_quantize=False, data_format=place, return_tensors="np").pixel_values
        for place in ("channels_first", "channels_last")
    )
    assert last.shape == (3, 13, 11, 3)
    np.testing.assert_array_equal(np.moveaxis(first, 1, -1), last)


def test_a_result_is_a_dict_whose_keys_are_attributes():
    result = pickle.loads(pickle.dumps(make_processor()(PROCESSOR_PICTURE)))
    assert dict(result).keys() == {"input_ids"} and result.input_ids is result["input_ids"]
    with pytest.raises(AttributeError, match="pixel_values.*input_ids"):
        _ = result.pixel_values
