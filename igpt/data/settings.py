"""The fields of `config.data`, checked: which images are read, how they are resized, augmented and batched."""

import dataclasses

from PIL import Image

from igpt.errors import UserError
from igpt.fields import make_section

FILTERS = {filter.name.lower(): filter for filter in Image.Resampling}
CHOICES = {
    "preprocess": ("none", "shrink", "crop"),
    "filter": tuple(FILTERS),
    "pad_mode": ("constant", "edge", "reflect"),
    "on_unreadable": ("stop", "skip"),
}
LEAST = {"split_seed": 0, "pad": 0, "labels_per_class": 0, "subset_seed": 0, "threads": 1}


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """configs/base.py explains every field. Raises UserError that names the field for a value that is not allowed.

    Fields without a default describe the images themselves. The other defaults read the images as a model from
    elsewhere needs them, without augmentation.
    """

    source: str
    image_size: tuple[int, int]  # height, width
    channels: int
    validation_fraction: float = 0.1
    test_fraction: float = 0.2
    split_seed: int = 0
    pad: int = 0
    pad_mode: str = "constant"
    flip: bool = False
    augment_probability: float = 1.0
    preprocess: str = "none"
    short_side: tuple[int, int] = (256, 384)
    crop: int = 224
    filter: str = "bicubic"
    split_file: str = ""
    data_dir: str = ""
    labels_per_class: int = 0
    subset_seed: int = 0
    on_unreadable: str = "stop"
    threads: int = 1

    def __post_init__(self):
        for name in ("image_size", "short_side"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        size, sides = self.image_size, self.short_side
        fractions = self.validation_fraction, self.test_fraction
        checks = [
            (
                len(size) == 2 and all(isinstance(side, int) and side > 0 for side in size),
                f"image_size is {size}; give (height, width), such as '(28,28)'",
            ),
            (self.channels in (1, 3), f"channels is {self.channels}; choose 1 (grey) or 3 (colour)"),
            (
                min(fractions) >= 0.0 and sum(fractions) < 1.0,
                f"validation_fraction is {fractions[0]} and data.test_fraction {fractions[1]}; neither is negative, "
                "and something must remain for training",
            ),
            (
                0.0 <= self.augment_probability <= 1.0,
                f"augment_probability is {self.augment_probability}; it must lie between 0 and 1",
            ),
            (
                len(sides) == 2 and 1 <= self.crop <= sides[0] <= sides[1],
                f"crop is {self.crop} and data.short_side {sides}; a crop must fit into the shorter side, whose least "
                "length comes first",
            ),
            (
                not self.split_file or self.source.startswith("folder:"),
                f"split_file is {self.split_file}, but only folder:PATH is split by a file; empty it",
            ),
        ]
        for name, allowed in CHOICES.items():
            value = getattr(self, name)
            checks.append((value in allowed, f"{name} is {value!r}; choose {', '.join(allowed[:-1])} or {allowed[-1]}"))
        for name, least in LEAST.items():
            value = getattr(self, name)
            checks.append((value >= least, f"{name} is {value}; it must be at least {least}"))
        for holds, message in checks:
            if not holds:
                raise UserError(f"data.{message}")

    @classmethod
    def of(cls, settings) -> "DataConfig":
        """The fields of a mapping, such as a ConfigDict, as a DataConfig. A DataConfig is returned unchanged."""
        return make_section(cls, "data.", settings)
