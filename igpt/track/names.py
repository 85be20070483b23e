"""The trackers that a configuration may name, and the extras that install them."""

import importlib.util
from collections.abc import Sequence

from igpt.errors import UserError

EXTRAS = {"tensorboard": "", "wandb": "wandb", "trackio": "trackio"}  # the core can write TensorBoard's files


def check_names(names: Sequence[str]) -> None:
    """Raises UserError for a tracker that does not exist, or that is named twice."""
    for name in names:
        if name not in EXTRAS:
            allowed = f"choose some of {', '.join(EXTRAS)}, as in ('tensorboard','wandb'), or none: ()"
            raise UserError(f"track names {name!r}, which is no tracker; {allowed}")
    if len(set(names)) < len(names):
        raise UserError(f"track is {tuple(names)!r}; name each tracker once")


def check_installed(names: Sequence[str]) -> None:
    """Raises UserError, which names the extra, for a tracker whose package is not installed."""
    for name in names:
        if EXTRAS[name] and importlib.util.find_spec(EXTRAS[name]) is None:
            raise UserError(
                f"track names {name!r}, whose package is not installed; pip install -e '.[{EXTRAS[name]}]', or leave "
                f"{name} out of config.track"
            )
