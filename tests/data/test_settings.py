"""The fields of config.data are checked when a DataConfig is made."""

import pytest
from ml_collections import ConfigDict

from configs import base, imagenet
from igpt.data.batches import Augmentation
from igpt.data.images import Preprocess
from igpt.data.settings import DataConfig
from igpt.errors import UserError

REQUIRED = dict(source="digits", image_size=(32, 32), channels=3)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"image_size": (32,)}, r"data.image_size is \(32,\); give \(height, width\), such as '\(28,28\)'"),
        ({"image_size": (32, 0)}, r"data.image_size is \(32, 0\)"),
        ({"image_size": (32, 1.5)}, r"data.image_size is \(32, 1.5\)"),
        ({"channels": 2}, "data.channels is 2; choose 1, 3"),
        ({"validation_fraction": -0.1}, "data.validation_fraction is -0.1; it must be at least 0"),
        (
            {"validation_fraction": 0.5, "test_fraction": 0.5},
            "data.test_fraction add up to 1.0; .* leave images for training",
        ),
        ({"test_fraction": float("nan")}, "data.test_fraction is nan; it must be 0, or a number between"),
        ({"split_seed": -1}, "data.split_seed is -1; it must be at least 0"),
        ({"pad": -1}, "data.pad is -1; it must be at least 0"),
        ({"pad_mode": "wrap"}, "data.pad_mode is 'wrap'; choose constant, edge, reflect"),
        ({"augment_probability": -0.1}, "data.augment_probability is -0.1; it must be at least 0"),
        ({"augment_probability": 1.1}, "data.augment_probability is 1.1; it must lie between 0 and 1"),
        ({"preprocess": "stretch"}, "data.preprocess is 'stretch'; choose none, shrink, crop"),
        ({"filter": "cubic"}, "data.filter is 'cubic'; choose nearest, .*, "),
        ({"crop": 300}, r"data.crop is 300 and data.short_side \(256, 384\); give \(smallest, largest\)"),
        ({"crop": 0}, "data.crop is 0"),
        ({"short_side": (384, 256)}, r"data.short_side \(384, 256\)"),
        ({"short_side": (256,)}, r"data.short_side \(256,\)"),
        ({"split_file": "mine.csv"}, "data.split_file is mine.csv, but only folder:PATH is split by a file; empty it"),
        ({"on_unreadable": "ignore"}, "data.on_unreadable is 'ignore'; choose stop, skip"),
        ({"labels_per_class": -4}, "data.labels_per_class is -4; it must be at least 0"),
        ({"subset_seed": -1}, "data.subset_seed is -1"),
        ({"threads": 0}, "data.threads is 0; it must be at least 1"),
        ({"image_sizes": (32, 32)}, r"data.image_sizes is no field of a configuration; did you mean data.image_size\?"),
        ({"zzz": 1}, "data.zzz is no field of a configuration; there are source, image_size, "),
    ],
)
def test_a_field_that_makes_no_sense_is_named(fields, message):
    with pytest.raises(UserError, match=message):
        DataConfig.of(REQUIRED | fields)


def test_a_mapping_becomes_a_data_config_with_tuples():
    from_json = ConfigDict(REQUIRED | {"image_size": [7, 5], "short_side": [9, 13], "crop": 8})
    made = DataConfig.of(from_json)
    assert made == DataConfig("digits", (7, 5), 3, short_side=(9, 13), crop=8) and hash(made)
    assert DataConfig.of(made) is made


def test_the_fields_and_defaults_are_those_of_the_base_config():
    assert set(vars(DataConfig.of(REQUIRED))) == set(base.get_config().data)
    assert DataConfig.of(base.get_config().data) == DataConfig("digits", (8, 8), 1)


def test_preprocessing_and_augmentation_are_made_of_the_fields():
    made = DataConfig.of(imagenet.get_config("s").data)
    assert Preprocess.of(made) == Preprocess((32, 32), "crop", (256, 384), 224, "bicubic")
    made = DataConfig(**REQUIRED, pad=4, pad_mode="reflect", flip=True, augment_probability=0.8)
    assert Augmentation.of(made) == Augmentation(4, "reflect", True, 0.8)
