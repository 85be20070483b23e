"""The image processor's settings: in the constructor, in a call and in files; invalid ones are refused."""

import inspect
import json

import numpy as np
import pytest
from transformers.models.imagegpt.image_processing_pil_imagegpt import ImageGPTImageProcessorPil

from igpt.errors import UserError
from igpt.interop import processor as processor_module
from igpt.interop.processor import ImageGPTImageProcessor
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
    documented = list(inspect.signature(ImageGPTImageProcessor.preprocess).parameters)
    assert documented[1:4] == ["images", "do_resize", "size"] and len(documented) == 16
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
    with pytest.raises(UserError, match="there is no setting cache_dir; choose from clusters, do_resize"):
        ImageGPTImageProcessor.from_pretrained(tmp_path, cache_dir="cache")


def test_a_processor_of_the_hub_is_resolved_like_a_model(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(processor_module, "resolve", lambda *ref: asked.append(ref) or tmp_path)
    make_processor().save_pretrained(tmp_path)
    assert ImageGPTImageProcessor.from_pretrained("someone/imagegpt", revision="v2") == make_processor()
    assert asked == [("someone/imagegpt", "v2")]


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
