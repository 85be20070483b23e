"""The settings of a probe, checked once. configs/probe_digits.py has the defaults and explains every field."""

import dataclasses
import difflib
import operator

from ml_collections import ConfigDict

from igpt.errors import UserError


class _Settings:
    @classmethod
    def of(cls, config: ConfigDict, prefix: str = ""):
        """The settings of a config file. Raises UserError for a field that is missing, unknown or out of range."""
        given, types = dict(config), {field.name: field.type for field in dataclasses.fields(cls)}
        missing, unknown = sorted(types.keys() - given.keys()), sorted(given.keys() - types.keys())
        problems = [f"it has no {', '.join(prefix + name for name in missing)}"] if missing else []
        for name in unknown:
            nearest = [f", did you mean {prefix}{close}?" for close in difflib.get_close_matches(name, types, 1)]
            problems.append(f"it has an unknown field {prefix}{name}{''.join(nearest)}")
        if problems:
            raise UserError(f"this is no probe configuration: {'; '.join(problems)}; see configs/probe_digits.py")
        nested = {name: part for name, part in types.items() if dataclasses.is_dataclass(part)}
        return cls(**given | {name: part.of(given[name], f"{prefix}{name}.") for name, part in nested.items()})


@dataclasses.dataclass(frozen=True)
class SGD(_Settings):
    """The settings of SGD, for solver="sgd"."""

    learning_rates: tuple[float, ...]
    steps: int
    batch_size: int
    weight_decay: float


@dataclasses.dataclass(frozen=True)
class ProbeMesh(_Settings):
    """The sizes of the mesh, and the number of CPU devices to make."""

    data: int
    fsdp: int
    tensor: int
    cpu_devices: int


@dataclasses.dataclass(frozen=True)
class ProbeConfig(_Settings):
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
    features_out: str
    solver: str
    inverse_penalties: tuple[float, ...]
    max_iter: int
    sgd: SGD
    mesh: ProbeMesh

    def __post_init__(self):
        least = dict.fromkeys(("seed", "train_images", "concatenate", "eval_masks", "mesh.cpu_devices"), 0)
        least |= dict.fromkeys(("batch_size", "subsets", "max_iter", "sgd.steps", "sgd.batch_size"), 1)
        for name, smallest in (least | {"sgd.weight_decay": 0.0}).items():
            if (value := operator.attrgetter(name)(self)) < smallest:
                raise UserError(f"{name} is {value}; it must be at least {smallest}")
        if self.solver not in ("lbfgs", "sgd"):
            raise UserError(f"solver is {self.solver!r}; choose lbfgs, or sgd for data sets of ImageNet's size")
        for name in ("inverse_penalties", "sgd.learning_rates"):
            if not (values := operator.attrgetter(name)(self)) or min(values) <= 0:
                raise UserError(f"{name} is {values}; give one or more positive values, such as '(0.1,1.0)'")
        if self.labels_per_class and min(self.labels_per_class) < 1:
            raise UserError(f"labels_per_class is {self.labels_per_class}; give numbers of 1 or more, such as '(4,25)'")
