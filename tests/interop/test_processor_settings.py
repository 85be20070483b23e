"""The image processor's settings: in the constructor, in a call and in files; invalid ones are refused."""

import inspect
import json

import numpy as np
import pytest
import torch
from transformers.models.imagegpt.image_processing_pil_imagegpt import ImageGPTImageProcessorPil

from igpt.errors import UserError
from igpt.interop import processor as processor_module
from igpt.interop.processor import ImageGPTImageProcessor
from igpt.interop.processor_settings import REFUSED
from tests.helpers import PROCESSOR_CLUSTERS, PROCESSOR_IMAGES, PROCESSOR_PICTURE, make_processor, tokens_as_rgb

# ---- settings


def test_an_override_holds_for_its_call_only():
    ours, saved = make_processor(), make_processor().to_dict()
    other = np.array(PROCESSOR_CLUSTERS)[:7]
    overrides = dict(
        size=5, resample=0, do_rescale=False, image_mean=0.1, image_std=2, clusters=other, do_normalize=True
    )
    changed = ours(PROCESSOR_IMAGES, **overrides, return_tensors="np").input_ids
    assert changed.shape == (3, 25)
    np.testing.assert_array_equal(
        ours(PROCESSOR_IMAGES, return_tensors="np").input_ids, tokens_as_rgb(PROCESSOR_IMAGES)
    )
    np.testing.assert_array_equal(
        ImageGPTImageProcessor(**overrides)(PROCESSOR_IMAGES, return_tensors="np").input_ids, changed
    )
    assert ours.to_dict() == saved


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("do_resize", False),
        ("size", 7),
        ("resample", 0),
        ("do_rescale", False),
        ("rescale_factor", 1 / 128),
        ("do_normalize", False),
        ("image_mean", 0.25),
        ("image_std", [0.5, 0.5, 0.25]),
        ("clusters", PROCESSOR_CLUSTERS[::-1]),
        ("do_color_quantize", False),
    ],
)
def test_a_setting_works_in_constructor_attribute_and_call(name, value):
    by_default = make_processor()(PROCESSOR_IMAGES, return_tensors="np")
    as_attribute = make_processor()
    setattr(as_attribute, name, value)
    results = [
        make_processor(**{name: value})(PROCESSOR_IMAGES, return_tensors="np"),
        make_processor()(PROCESSOR_IMAGES, return_tensors="np", **{name: value}),
        as_attribute(PROCESSOR_IMAGES, return_tensors="np"),
    ]
    for result in results:
        (key, array), (_, first) = *result.items(), *results[0].items()
        np.testing.assert_array_equal(array, first)
        assert key not in by_default or not np.array_equal(array, by_default[key])


def test_size_may_be_a_number_a_pair_or_a_dict():
    for size in (7, (7, 7), [7, 7], {"height": 7, "width": 7}, np.int64(7)):
        assert make_processor(size=size).size == {"height": 7, "width": 7}
    assert make_processor(size=(5, 7))(PROCESSOR_PICTURE, do_color_quantize=False).pixel_values[0].shape == (3, 5, 7)


def test_the_signature_is_the_documented_one():
    documented = ["do_resize", "size", "resample", "do_normalize", "do_color_quantize", "clusters"]
    of_call = ["return_tensors", "data_format", "input_data_format"]
    for method, order in (
        (ImageGPTImageProcessor.preprocess, ["self", "images", *documented, *of_call]),
        (ImageGPTImageProcessor.__init__, ["self", "clusters", *documented[:-1]]),
    ):
        parameters = inspect.signature(method).parameters.values()
        assert [x.name for x in parameters if x.kind is x.POSITIONAL_OR_KEYWORD] == order
    as_names = make_processor()(PROCESSOR_IMAGES, do_normalize=False, do_color_quantize=False, return_tensors="np")
    in_order = make_processor()(PROCESSOR_IMAGES, None, None, None, False, False, None, "np")
    np.testing.assert_array_equal(in_order.pixel_values, as_names.pixel_values)
    with pytest.raises(TypeError, match="do_crop"):
        make_processor()(PROCESSOR_PICTURE, do_crop=True)
    fresh = ImageGPTImageProcessor()
    theirs = ImageGPTImageProcessorPil().to_dict()
    assert fresh.to_dict().keys() == theirs.keys()
    for name, value in fresh.to_dict().items():
        assert value == (list(theirs[name]) if isinstance(theirs[name], tuple) else theirs[name]), name


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": {"shortest_edge": 32}}, "size.*shortest_edge.*height.*width.*exactly"),
        ({"size": 0}, "size is 0"),
        ({"size": (1 << 13, 1 << 12)}, "16,777,216"),
        ({"size": "32"}, "size is '32'"),
        ({"size": (1, 2, 3)}, "size"),
        ({"size": 32.0}, "size"),
        ({"resample": 99}, "resample is 99.*2 bilinear"),
        ({"resample": "bilinear"}, "resample"),
        ({"do_resize": "yes"}, "do_resize is 'yes'; True or False"),
        ({"rescale_factor": float("nan")}, "rescale_factor"),
        ({"rescale_factor": 10**400}, "rescale_factor"),
        ({"image_std": [0.5, 0, 0.5]}, "image_std.*cannot contain 0"),
        ({"image_mean": [0.5, 0.5]}, "image_mean.*three"),
        ({"image_mean": "grey"}, "image_mean"),
        ({"clusters": [[1, 2], [3, 4]]}, r"clusters are int64 \[2, 2\]; numbers \[V, 3\]"),
        ({"clusters": [[1, 2, 3], [4]]}, "clusters"),
        ({"clusters": [["a", "b", "c"]]}, "clusters"),
        ({"clusters": [[0.0, 1.0, float("inf")]]}, "clusters are not finite.*inf"),
        ({"clusters": []}, "clusters"),
        ({"do_resise": False}, "no 'do_resise'; did you mean 'do_resize'"),
    ],
)
def test_an_invalid_setting_is_refused_and_named(settings, message):
    with pytest.raises(UserError, match=message):
        ImageGPTImageProcessor(**settings)
    if "do_resise" not in settings:
        with pytest.raises(UserError, match=message):
            make_processor()(PROCESSOR_PICTURE, **settings)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"return_tensors": "mlx"}, "return_tensors is 'mlx'; choose None, 'np', 'jax' or 'pt'"),
        ({"data_format": "none"}, "data_format"),
        ({"input_data_format": "last"}, "input_data_format is 'last'"),
        ({"input_data_format": "channels_first"}, r"channels_first, shape \[23, 19, 3\] has 23 channels"),
    ],
)
def test_an_invalid_argument_of_a_call_is_refused(overrides, message):
    with pytest.raises(UserError, match=message):
        make_processor()(PROCESSOR_IMAGES[0], **overrides)


def test_quantising_without_clusters_is_refused_and_so_is_a_palette():
    with pytest.raises(UserError, match="without clusters"):
        ImageGPTImageProcessor()(PROCESSOR_PICTURE)
    with pytest.raises(UserError, match="no clusters"):
        ImageGPTImageProcessor().palette()
    with pytest.raises(UserError, match=r"\[-1, 1\]"):
        make_processor(clusters=[[0.0, 1.0, 2.0]]).palette()


# ---- files


def test_ours_to_transformers_and_back_is_the_same(tmp_path):
    ours = make_processor(resample=3, image_std=[0.5, 0.25, 0.125], do_convert_rgb=True, note={"from": "a test"})
    ours.save_pretrained(tmp_path / "ours")
    theirs = ImageGPTImageProcessorPil.from_pretrained(tmp_path / "ours")
    np.testing.assert_array_equal(
        theirs(PROCESSOR_IMAGES, return_tensors="np")["input_ids"],
        ours(PROCESSOR_IMAGES, return_tensors="np").input_ids,
    )
    np.testing.assert_array_equal(theirs.clusters, ours.clusters)
    theirs.save_pretrained(tmp_path / "theirs")
    back = ImageGPTImageProcessor.from_pretrained(tmp_path / "theirs")
    assert back == ours and back.extra == {"note": {"from": "a test"}} and back.clusters.dtype == np.float64
    assert ImageGPTImageProcessor.from_pretrained(tmp_path / "ours/preprocessor_config.json") == ours
    assert ImageGPTImageProcessor.from_dict(json.loads(ours.to_json_string())) == ours != make_processor()
    assert [path.name for path in (tmp_path / "ours").iterdir()] == ["preprocessor_config.json"]


def write(tmp_path, settings):
    text = settings if isinstance(settings, str) else json.dumps(settings)
    (tmp_path / "preprocessor_config.json").write_text(text)
    return tmp_path


def test_a_file_of_2021_is_read_as_transformers_reads_it(tmp_path):
    old = {"clusters": PROCESSOR_CLUSTERS, "do_normalize": True, "do_resize": True, "resample": 2, "size": 32}
    ours = ImageGPTImageProcessor.from_pretrained(
        write(tmp_path, old | {"feature_extractor_type": "ImageGPTFeatureExtractor"})
    )
    theirs = ImageGPTImageProcessorPil.from_pretrained(tmp_path)
    assert ours == make_processor(size=32) and ours.extra == {}
    np.testing.assert_array_equal(
        ours(PROCESSOR_IMAGES, return_tensors="np").input_ids,
        theirs(PROCESSOR_IMAGES, return_tensors="np")["input_ids"],
    )


def test_settings_given_when_loading_replace_those_of_the_file(tmp_path):
    make_processor().save_pretrained(tmp_path)
    ours = ImageGPTImageProcessor.from_pretrained(str(tmp_path), size=5, do_color_quantize=False)
    assert ours.size == {"height": 5, "width": 5} and not ours.do_color_quantize
    with pytest.raises(UserError, match="there is no setting colour; choose from clusters, do_resize"):
        ImageGPTImageProcessor.from_pretrained(tmp_path, colour="red")
    again, unused = ImageGPTImageProcessor.from_pretrained(tmp_path, colour="red", return_unused_kwargs=True)
    assert again == make_processor() and unused == {"colour": "red"}
    make_processor(size=7).save_pretrained(tmp_path / "inner")
    assert ImageGPTImageProcessor.from_pretrained(tmp_path, subfolder="inner", cache_dir="cache").size["width"] == 7


def test_a_processor_of_the_hub_is_resolved_like_a_model(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(processor_module, "resolve", lambda ref, **how: asked.append((ref, how)) or tmp_path)
    make_processor().save_pretrained(tmp_path)
    assert ImageGPTImageProcessor.from_pretrained("someone/imagegpt", revision="v2") == make_processor()
    assert asked == [("someone/imagegpt", dict(revision="v2", files=["preprocessor_config.json"]))]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image_processor_type": "ViTImageProcessor"}, "preprocessor_config.json: image_processor_type is 'ViTImage"),
        ({"feature_extractor_type": "CLIPFeatureExtractor"}, "feature_extractor_type is 'CLIP"),
        ({"image_processor_type": ["ImageGPTImageProcessor"]}, "image_processor_type"),
        ('{"size": 32', "preprocessor_config.json cannot be read as JSON"),
        ("[" * 100_000, "cannot be read as JSON"),
        ("[1, 2]", "preprocessor_config.json holds a JSON list"),
        ({"size": "32"}, "preprocessor_config.json: size is '32'"),
        ({"do_normalize": 1}, "do_normalize is 1"),
        ({"clusters": [[0.5, 0.5]]}, r"preprocessor_config.json: clusters.*\[1, 2\]"),
        ({"clusters": [["x", 0, 0]]}, "clusters"),
        ('{"clusters": [[NaN, 0, 0]]}', "clusters are not finite"),
        ('{"clusters": "%s"}' % ("a" * (1 << 24)), r"bytes; a file of its kind"),
    ],
)
def test_a_file_that_is_not_an_image_gpt_processors_is_refused(tmp_path, settings, message):
    with pytest.raises(UserError, match=message):
        ImageGPTImageProcessor.from_pretrained(write(tmp_path, settings))


def test_missing_files_wrong_types_and_bad_targets_are_refused(tmp_path):
    with pytest.raises(UserError, match="there is no .*preprocessor_config.json"):
        ImageGPTImageProcessor.from_pretrained(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="JSON object, not a list"):
        ImageGPTImageProcessor.from_dict([])
    with pytest.raises(UserError, match="is a file"):
        make_processor().save_pretrained(tmp_path / "file")
    with pytest.raises(UserError, match="cannot be written as JSON"):
        make_processor(note={1, 2}).save_pretrained(tmp_path)


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    make_processor(size=5).save_pretrained(tmp_path)
    monkeypatch.setattr("os.replace", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        make_processor(size=7).save_pretrained(tmp_path)
    assert ImageGPTImageProcessor.from_pretrained(tmp_path).size == {"height": 5, "width": 5}


def test_it_prints_in_one_short_line():
    assert repr(make_processor()) == "ImageGPTImageProcessor(512 clusters, size={'height': 13, 'width': 11})"
    assert repr(ImageGPTImageProcessor()) == "ImageGPTImageProcessor(no clusters)"


@pytest.mark.parametrize("name", REFUSED)
def test_settings_of_other_processors_are_refused_with_the_reason(name, tmp_path):
    message = f"does not support {name}=17: .{{20}}"
    for call in (ImageGPTImageProcessor, lambda **x: make_processor()(PROCESSOR_PICTURE, **x)):
        with pytest.raises(UserError, match=message):
            call(**{name: 17})
    make_processor().save_pretrained(tmp_path)
    with pytest.raises(UserError, match=message):
        ImageGPTImageProcessor.from_pretrained(tmp_path, **{name: 17})
    neutral = REFUSED[name][1]
    for value in (None, neutral[0] if isinstance(neutral, tuple) else neutral):
        make_processor(**{name: value})(PROCESSOR_PICTURE, **{name: value})


def test_every_documented_setting_is_honoured_or_refused():
    documented = ImageGPTImageProcessorPil.valid_kwargs.__annotations__
    assert documented.keys() <= {*processor_module.SETTINGS, *processor_module.CALL, *REFUSED}


def test_settings_of_a_call_may_be_settings_of_the_processor():
    processor = make_processor(do_color_quantize=False, data_format="channels_last", return_tensors="np")
    assert processor(PROCESSOR_PICTURE).pixel_values.shape == (1, 13, 11, 3)
    assert processor(PROCESSOR_PICTURE, data_format="channels_first").pixel_values.shape == (1, 3, 13, 11)
    processor = make_processor(do_color_quantize=False, data_format=None, return_tensors="np")
    assert processor(PROCESSOR_PICTURE).pixel_values.shape == (1, 3, 13, 11)  # as without the setting


@pytest.mark.parametrize("field", ["image_processor_type", "feature_extractor_type"])
def test_files_of_all_versions_name_this_processor(field):
    for name in ("ImageProcessor", "ImageProcessorFast", "ImageProcessorPil", "FeatureExtractor"):
        settings = make_processor().to_dict() | {"image_processor_type": None, field: f"ImageGPT{name}"}
        assert ImageGPTImageProcessor.from_dict(settings) == make_processor()


def test_json_files_are_written_and_read(tmp_path):
    make_processor().to_json_file(tmp_path / "any.json")
    assert ImageGPTImageProcessor.from_json_file(tmp_path / "any.json") == make_processor()
    assert ImageGPTImageProcessorPil.from_json_file(tmp_path / "any.json").size == {"height": 13, "width": 11}
    with pytest.raises(UserError, match="these classes upload nothing"):
        make_processor().save_pretrained(tmp_path, push_to_hub=True)


def test_results_move_to_a_device_and_floats_to_a_type():
    for kind in (None, "np", "jax", "pt"):
        tokens = make_processor()(PROCESSOR_IMAGES, return_tensors=kind)
        assert tokens.to("cpu") is tokens and tokens.data == dict(tokens)
    assert tokens.to("cpu", torch.float16).input_ids.dtype == torch.int64
    values = make_processor(do_color_quantize=False)(PROCESSOR_IMAGES, return_tensors="pt")
    assert values.to(dtype=torch.float16).pixel_values.dtype == torch.float16


# ---- units

SPREAD = np.linspace(-1, 1, 51).reshape(17, 3)


@pytest.mark.parametrize(
    ("clusters", "settings"),
    [
        (SPREAD / 2 + 0.5, {}),  # shares of 255
        (SPREAD / 2, {}),
        (SPREAD * 127.5 + 127.5, {}),  # bytes
        (SPREAD, dict(do_normalize=False)),  # the documentation's advice for floats in [0, 1]
        (SPREAD, dict(do_rescale=False)),
        (SPREAD, dict(image_mean=0.0, image_std=1.0)),
    ],
    ids=["[0, 1]", "[-0.5, 0.5]", "bytes", "do_normalize=False", "do_rescale=False", "mean 0"],
)
def test_clusters_and_pixels_in_different_units_are_told(clusters, settings):
    processor_module._color_table.cache_clear()  # a table in the cache was told before
    with pytest.warns(UserWarning, match=r"the clusters lie in \[.*pixel values in \[.*seem to be in other units"):
        make_processor(clusters=clusters)(PROCESSOR_IMAGES, **settings)


@pytest.mark.parametrize(
    ("clusters", "settings"),
    [
        (SPREAD + 0.01, {}),
        (SPREAD / 2 + 0.5001, dict(do_normalize=False)),
        (SPREAD * 127 + 127.5, dict(do_normalize=False, do_rescale=False)),
        (SPREAD[:1], {}),
    ],
    ids=["[-1, 1]", "[0, 1]", "bytes", "one colour"],
)
def test_clusters_and_pixels_in_the_same_units_are_not_doubted(clusters, settings, recwarn):
    processor_module._color_table.cache_clear()
    make_processor(clusters=clusters)(PROCESSOR_IMAGES, **settings)
    assert not recwarn.list


def test_integers_of_0_and_1_are_told_and_bools_are_not(recwarn):
    mask = PROCESSOR_IMAGES[0, ..., 0] > 127
    black_and_white = make_processor()(mask, return_tensors="np").input_ids
    make_processor()(np.zeros((5, 5, 3), np.uint8))
    assert not recwarn.list
    np.testing.assert_array_equal(make_processor()(mask * 1.0, return_tensors="np").input_ids, black_and_white)
    with pytest.warns(UserWarning, match="integer pixels are 0 and 1 only"):
        make_processor()(mask.astype(np.uint8))
