"""The settings of a probe, checked once. configs/probe.py has the defaults and explains every field."""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

from igpt.errors import UserError
from igpt.fields import check_at_least, check_choice, make_section
from igpt.sharding import MeshConfig
from igpt.track.names import check_names

EXAMPLE = "configs/probe.py"


@dataclasses.dataclass(frozen=True)
class SGD:
    """The settings of SGD, for solver="sgd"."""

    learning_rates: tuple[float, ...]
    steps: int
    batch_size: int
    weight_decay: float
    section: ClassVar[str] = "sgd."

    def __post_init__(self):
        check_at_least(self, self.section, steps=1, batch_size=1, weight_decay=0.0)
        check_positive(f"{self.section}learning_rates", self.learning_rates)


class AdamW(SGD):
    """The settings of AdamW, for pool="attention"."""

    section: ClassVar[str] = "attention."


@dataclasses.dataclass(frozen=True)
class ProbeConfig:
    """All settings of a probe. Raises UserError for values that no probe could use."""

    seed: int
    steps: str
    source: str
    preprocess: str
    validation_fraction: float
    data_dir: str
    train_images: int
    layers: tuple[int, ...]
    batch_size: int
    baselines: bool
    concatenate: int
    labels_per_class: tuple[int, ...]
    subsets: int
    eval_masks: int
    pool: str
    neighbours: int
    features_out: str
    solver: str
    inverse_penalties: tuple[float, ...]
    max_iter: int
    sgd: SGD
    attention: AdamW
    mesh: MeshConfig
    track: tuple[str, ...] = ("tensorboard",)

    def __post_init__(self):
        zero_or_more = dict(seed=0, train_images=0, concatenate=0, eval_masks=0, neighbours=0)
        kind, _ = kind_of(self.pool)
        check_at_least(self, "", **zero_or_more, batch_size=1, subsets=1, max_iter=1)
        check_names(self.track)
        check_choice(self, "", solver=("auto", "newton", "lbfgs", "sgd"))
        if kind == "attention" and self.solver != "auto":
            problem = f"solver is {self.solver!r}, but pool={self.pool} is trained with AdamW (config.attention)"
            raise UserError(f"{problem}; set solver=auto, or pool=mean")
        check_positive("inverse_penalties", self.inverse_penalties)
        if self.labels_per_class and min(self.labels_per_class) < 1:
            raise UserError(f"labels_per_class is {self.labels_per_class}; give numbers of 1 or more, such as '(4,25)'")

    @classmethod
    def of(cls, config: "Mapping | ProbeConfig") -> "ProbeConfig":
        """The settings of a config file. Raises UserError for a field that is missing, unknown or out of range."""
        if isinstance(config, cls):
            return config
        if missing := [name for name in ("sgd", "attention", "mesh", "solver") if name not in config]:
            raise UserError(f"this is no probe configuration: it has no {', '.join(missing)}; see {EXAMPLE}")
        sgd = make_section(SGD, "sgd.", config["sgd"], EXAMPLE)
        attention = make_section(AdamW, "attention.", config["attention"], EXAMPLE)
        mesh = make_section(MeshConfig, "mesh.", config["mesh"], EXAMPLE)
        sections = {"sgd": sgd, "attention": attention, "mesh": mesh}
        return make_section(cls, "", dict(config.items()) | sections, EXAMPLE)

    def flat(self) -> dict:
        """All fields in one dict: {"mesh.data": -1, "seed": 1}."""
        flat = {}
        for name, value in dataclasses.asdict(self).items():
            parts = value if isinstance(value, dict) else {}
            flat |= {f"{name}.{field}": item for field, item in parts.items()} or {name: value}
        return flat


def kind_of(pool: str) -> tuple[str, int]:
    """("mean", 0), ("grid", G) of "grid:G", ("attention", 1), or ("attention", H) of "attention:H". Else UserError."""
    kind, colon, number = pool.partition(":")
    counts = number.isdecimal() and int(number) > 0
    if not (pool in ("mean", "attention") or (kind in ("grid", "attention") and counts)):
        raise UserError(
            f"pool is {pool!r}; choose mean, grid:G for the means of G x G parts, such as grid:2, attention, or "
            "attention:H for H learnt queries"
        )
    return kind, int(number) if colon else {"mean": 0, "attention": 1}[kind]


def check_positive(name: str, values: tuple[float, ...]) -> None:
    """Raises UserError if `values` is empty, or if a value is not above 0."""
    if not values or not min(values) > 0:
        raise UserError(f"{name} is {values}; give one or more positive values, such as '(0.1,1.0)'")
