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
    labels_per_class: int = 0
    subset_seed: int = 0
    on_unreadable: str = "stop"
    threads: int = 1

    def __post_init__(self):
        check_choice(self, "data.", channels=(1, 3), **CHOICES)
        check_at_least(self, "data.", split_seed=0, pad=0, labels_per_class=0, subset_seed=0, threads=1)
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

    @classmethod
    def of(cls, settings) -> "DataConfig":
        """Makes a DataConfig from a mapping, such as a ConfigDict. A DataConfig is returned unchanged."""
        return make_section(cls, "data.", settings)
