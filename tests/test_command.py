"""Every command parses its flags in one style."""

import pytest

from igpt.command import Parser, at_least
from igpt.errors import UserError


def parser():
    made = Parser("igpt test", "What it does.\n\n    igpt test --number=3")
    made.add_argument("--number", type=at_least(2), default=5, help="how many")
    return made


def test_help_is_the_text_of_the_module_with_its_line_breaks(capsys):
    with pytest.raises(SystemExit) as stopped:
        parser().parse_args(["--help"])
    shown = capsys.readouterr().out
    assert stopped.value.code == 0 and "\n    igpt test --number=3\n" in shown and "how many" in shown


def test_flags_are_not_abbreviated():
    assert parser().parse_args(["--number=3"]).number == 3
    with pytest.raises(UserError, match="unrecognized arguments: --num=3"):
        parser().parse_args(["--num=3"])


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("1", "^--number is 1; it must be at least 2. igpt test --help has examples and every flag$"),
        ("-3", "--number is -3; it must be at least 2"),
        ("2.5", "--number is '2.5'; it must be a whole number"),
        ("two", "--number is 'two'; it must be a whole number"),
        ("", "--number is ''; it must be a whole number"),
        ("4294967296", "--number is 4294967296; it must be at most 4294967295"),
    ],
)
def test_a_wrong_value_is_named_with_its_flag_and_the_rule(value, message):
    with pytest.raises(UserError, match=message):
        parser().parse_args([f"--number={value}"])


def test_a_tilde_in_a_flag_is_the_home_directory(monkeypatch):
    monkeypatch.setenv("HOME", "/of/me")
    made = parser()
    made.add_argument("--source")
    made.add_argument("files", nargs="*")
    found = made.parse_args(["--source=folder:~/photos", "~/a.png", "b~.png"])
    assert found.source == "folder:/of/me/photos" and found.files == ["/of/me/a.png", "b~.png"]
