"""Makes the sections of a configuration, which are frozen dataclasses. Checks each field's name, type and range."""

import dataclasses
import difflib
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from igpt.errors import UserError
from igpt.files import expand_home

Section = TypeVar("Section")
LARGEST_SEED = (1 << 32) - 1  # JAX's seeds have 32 bits; no other whole number of a field or flag is larger
SMALLEST_FLOAT, LARGEST_FLOAT = 1.2e-38, 3.4e38  # the range in which float32 has its full precision


def make_section(
    kind: type[Section], name: str, values: Mapping | Section, example: str = "configs/base.py"
) -> Section:
    """Makes the dataclass `kind` from the fields of a ConfigDict or dict. Returns an instance of `kind` unchanged.

    `name` is the section's prefix in error messages, such as "data." or "". `example` is a file with all fields. Lists
    become tuples, and `~` in a path becomes the home directory. Raises UserError for a missing field, for a value of a
    wrong type or outside the range of all numbers, and for an unknown field; then it suggests the most similar name.
    """
    if isinstance(values, kind):
        return values
    if not isinstance(values, Mapping) and not hasattr(values, "items"):
        raise UserError(f"{name.rstrip('.')} is {values!r}; a section of fields is needed, as in {example}")
    fields = {field.name: field for field in dataclasses.fields(kind)}
    for given in values:
        if given not in fields:
            close = difflib.get_close_matches(given, fields, 1)
            hint = f"did you mean {name}{close[0]}?" if close else f"there are {', '.join(fields)}"
            raise UserError(f"{name}{given} is no field of a configuration; {hint}")
    required = [name for name, field in fields.items() if field.default is dataclasses.MISSING]
    if missing := [f"{name}{field}" for field in required if field not in values]:
        raise UserError(f"the configuration has no {', '.join(missing)}; start from {example}")
    plain = {given: _plain(value) for given, value in values.items()}
    for given, value in plain.items():
        if not _fits(value, fields[given].type):
            wanted = getattr(fields[given].type, "__name__", fields[given].type)
            raise UserError(f"{name}{given} is {value!r}; it must be of type {wanted}")
        for number in value if isinstance(value, tuple) else (value,):
            check_number(f"{name}{given}", number)
    return kind(**plain)


def _plain(value: Any) -> Any:
    if isinstance(value, str):
        return expand_home(value)
    return tuple(value) if isinstance(value, list) else value


def check_number(name: str, value: Any) -> None:
    """Raises UserError for NaN, infinity, a float that float32 rounds to 0 or infinity, and a too large integer."""
    if isinstance(value, float) and value and not SMALLEST_FLOAT <= abs(value) <= LARGEST_FLOAT:
        allowed = f"0, or a number between {SMALLEST_FLOAT} and {LARGEST_FLOAT}"
        raise UserError(f"{name} is {value}; it must be {allowed} in size, so that float32 can hold it")
    if isinstance(value, int) and abs(value) > LARGEST_SEED:
        raise UserError(f"{name} is {value}; it must be at most {LARGEST_SEED}")


def _fits(value: Any, kind: Any) -> bool:
    if typing.get_origin(kind) is tuple:
        inner = typing.get_args(kind)
        return isinstance(value, tuple) and all(_fits(item, inner[0]) for item in value)
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return not isinstance(kind, type) or isinstance(value, kind)


def check_at_least(settings: Any, name: str, /, **least: float) -> None:
    """Raises UserError for the first field that is NaN or smaller than the smallest value allowed for it."""
    for field, smallest in least.items():
        value = getattr(settings, field)
        if not value >= smallest:
            raise UserError(f"{name}{field} is {value}; it must be at least {smallest}")


def check_choice(settings: Any, name: str, /, **allowed: tuple) -> None:
    """Raises UserError for the first field whose value is not one of the values allowed for it."""
    for field, choices in allowed.items():
        value = getattr(settings, field)
        if value not in choices:
            raise UserError(f"{name}{field} is {value!r}; choose {', '.join(map(str, choices))}")
