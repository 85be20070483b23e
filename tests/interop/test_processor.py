"""Parity with transformers' PIL processor. Its torchvision processor resizes and rounds differently."""

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
