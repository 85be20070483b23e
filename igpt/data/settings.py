"""The fields of `config.data`, checked: which images are read, how they are resized, augmented and batched."""

import dataclasses

from PIL import Image

from igpt.errors import UserError
from igpt.fields import check_at_least, check_choice, make_section

FILTERS = {filter.name.lower(): filter for filter in Image.Resampling}
CHOICES = {
    "preprocess": ("none", "shrink", "crop"),
    "filter": tuple(FILTERS),
    "pad_mode": ("constant", "edge", "reflect"),
    "on_unreadable": ("stop", "skip"),
}

SCATTER = ("scatter_scale", "scatter_color", "scatter_background", "scatter_copies")  # fields of scattered:SOURCE


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where the images come from and how they are read. configs/base.py explains every field.

    The fields that describe the images themselves have no default. The other defaults suit an imported model, whose
    images are read without augmentation. If a value is not allowed, raises a UserError that names the field.
    """

    source: str
    image_size: tuple[int, ...]  # height, width
    channels: int
    validation_fraction: float = 0.1
    test_fraction: float = 0.2
    split_seed: int = 0
    pad: int = 0
    pad_mode: str = "constant"
    flip: bool = False
    augment_probability: float = 1.0
    preprocess: str = "none"
    short_side: tuple[int, ...] = (256, 384)  # smallest, largest
    crop: int = 224
    filter: str = "bicubic"
    split_file: str = ""
    data_dir: str = ""
    scatter_scale: tuple[float, ...] = (1.0, 1.0)  # smallest, largest
    scatter_color: bool = False
    scatter_background: str = ""
    scatter_copies: int = 1
    labels_per_class: int = 0
    subset_seed: int = 0
    on_unreadable: str = "stop"
    threads: int = 1

    def __post_init__(self):
        check_choice(self, "data.", channels=(1, 3), **CHOICES)
        check_at_least(
            self, "data.", split_seed=0, pad=0, labels_per_class=0, subset_seed=0, threads=1, scatter_copies=1
        )
        check_at_least(self, "data.", validation_fraction=0, test_fraction=0, augment_probability=0)
        size, sides, held_out = self.image_size, self.short_side, self.validation_fraction + self.test_fraction
        if len(size) != 2 or min(size) < 1:
            raise UserError(f"data.image_size is {size}; give (height, width), such as '(28,28)'")
        if held_out >= 1:
            raise UserError(
                f"data.validation_fraction and data.test_fraction add up to {held_out}; they must leave images for "
                "training, so the sum must be below 1"
            )
        if self.augment_probability > 1:
            raise UserError(f"data.augment_probability is {self.augment_probability}; it must lie between 0 and 1")
        if len(sides) != 2 or not 1 <= self.crop <= sides[0] <= sides[1]:
            raise UserError(
                f"data.crop is {self.crop} and data.short_side {sides}; give (smallest, largest) for the shorter side, "
                "and a crop that fits into the smallest"
            )
        if self.split_file and not self.source.startswith("folder:"):
            raise UserError(f"data.split_file is {self.split_file}, but only folder:PATH is split by a file; empty it")

        if len(self.scatter_scale) != 2 or not 0 < self.scatter_scale[0] <= self.scatter_scale[1]:
            raise UserError(
                f"data.scatter_scale is {self.scatter_scale}; give (smallest, largest), such as '(0.8,1.2)'"
            )
        plain = all(getattr(self, name) == getattr(DataConfig, name) for name in SCATTER)
        if not plain and not self.source.startswith("scattered:"):
            remedy = f"use scattered:{self.source}"
            if self.source != "digits" and not self.source.startswith("npz:"):
                remedy = "only digits and npz:FILE can be scattered; leave these fields out"
            raise UserError(f"data.scatter_* is set, but data.source is {self.source}; {remedy}")
        if self.source.startswith("scattered:") and self.preprocess != "none":
            problem = f"data.preprocess is {self.preprocess}, but scattered images are placed, not resized"
            raise UserError(f"{problem}; set preprocess=none, and data.scatter_scale if sizes are to differ")

    def without_places(self, **changes) -> "DataConfig":
        """These settings for images that are not scattered, with `changes`."""
        plain = {name: getattr(DataConfig, name) for name in SCATTER}
        return dataclasses.replace(self, **plain | changes)

    @classmethod
    def of(cls, settings) -> "DataConfig":
        """Makes a DataConfig from a mapping, such as a ConfigDict. A DataConfig is returned unchanged."""
        return make_section(cls, "data.", settings)
