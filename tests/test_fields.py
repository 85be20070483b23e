"""Sections of a configuration: known fields, right types, allowed ranges."""

import dataclasses
import math

import pytest
from ml_collections import ConfigDict

from igpt.errors import UserError
from igpt.fields import check_at_least, check_choice, make_section


@dataclasses.dataclass(frozen=True)
class Section:
    rate: float
    size: tuple[int, int]
    name: str = "x"
    flag: bool = False
    count: int = 1
    rates: tuple[float, ...] = ()


GIVEN = dict(rate=0.5, size=[3, 4])


def test_a_section_is_made_from_a_config_dict_with_lists_as_tuples():
    made = make_section(Section, "a.", ConfigDict(GIVEN))
    assert made == Section(0.5, (3, 4)) and make_section(Section, "a.", made) is made


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"raet": 1.0}, r"a\.raet is no field of a configuration; did you mean a\.rate\?"),
        ({"zzz": 1.0}, r"a\.zzz is no field of a configuration; there are rate, size"),
        ({"rate": "fast"}, r"a\.rate is 'fast'; it must be of type float"),
        ({"rate": True}, r"a\.rate is True; it must be of type float"),
        ({"count": 1.5}, r"a\.count is 1\.5; it must be of type int"),
        ({"flag": 1}, r"a\.flag is 1; it must be of type bool"),
        ({"size": 3}, r"a\.size is 3; it must be of type tuple"),
        ({"size": (3, "4")}, r"a\.size is \(3, '4'\); it must be of type tuple"),
        ({"rate": math.nan}, r"a\.rate is nan; it must be 0, or a number between 1.2e-38 and 3.4e\+38"),
        ({"rate": -math.inf}, r"a\.rate is -inf; it must be 0, or a number"),
        ({"rate": 1e39}, r"a\.rate is 1e\+39; it must be 0, or a number"),  # infinity in float32
        ({"rate": 1e-39}, r"a\.rate is 1e-39; it must be 0, or a number"),  # 0 on many devices
        ({"rates": (1.0, math.nan)}, r"a\.rates is nan"),
        ({"count": 1 << 32}, r"a\.count is 4294967296; it must be at most 4294967295"),
        ({"size": (3, -(1 << 32))}, r"a\.size is -4294967296"),
    ],
)
def test_a_wrong_field_is_named_with_what_would_be_right(changes, message):
    with pytest.raises(UserError, match=message):
        make_section(Section, "a.", GIVEN | changes)


@pytest.mark.parametrize(
    ("given", "meant"),
    [("~/a.npy", "HOME/a.npy"), ("folder:~/a", "folder:HOME/a"), ("a~b", "a~b"), ("npz:a/~b", "npz:a/~b"), ("", "")],
)
def test_a_tilde_in_a_field_is_the_home_directory(given, meant, monkeypatch):
    monkeypatch.setenv("HOME", "/of/me")
    assert make_section(Section, "a.", GIVEN | {"name": given}).name == meant.replace("HOME", "/of/me")


def test_the_extremes_of_float32_and_of_seeds_are_allowed():
    made = make_section(Section, "a.", GIVEN | {"rate": 3.3e38, "rates": (-1.3e-38, 0.0), "count": (1 << 32) - 1})
    assert made.rate == 3.3e38 and made.count == 4294967295


def test_missing_fields_are_named_together():
    with pytest.raises(UserError, match=r"no a\.rate, a\.size; start from configs/base\.py"):
        make_section(Section, "a.", {"name": "y"})


def test_what_is_no_section_is_refused():
    with pytest.raises(UserError, match=r"a is 3; a section of fields is needed"):
        make_section(Section, "a.", 3)


def test_a_range_check_names_field_value_and_bound_and_refuses_nan():
    section = Section(**GIVEN | {"rate": math.nan, "count": 0})
    with pytest.raises(UserError, match=r"a\.count is 0; it must be at least 1"):
        check_at_least(section, "a.", count=1)
    with pytest.raises(UserError, match=r"a\.rate is nan; it must be at least 0\.0"):
        check_at_least(section, "a.", rate=0.0)
    check_at_least(section, "a.", count=0)


def test_a_choice_check_lists_the_choices():
    with pytest.raises(UserError, match=r"a\.name is 'x'; choose y, z"):
        check_choice(make_section(Section, "a.", GIVEN), "a.", name=("y", "z"))
