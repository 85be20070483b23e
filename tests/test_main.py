"""The command `igpt`: its help, and the flags that several sub-commands have."""

import importlib
import re

import pytest

from igpt import __version__
from igpt.__main__ import COMMANDS, main
from igpt.command import SHARED, Parser


def parser_of(name):
    module = importlib.import_module(COMMANDS[name][0])
    parser = Parser(f"igpt {name}", module.__doc__)
    module.add_arguments(parser)
    return parser


@pytest.mark.parametrize("argv", [[], ["--help"], ["-h"]])
def test_the_help_has_one_line_for_each_sub_command(capsys, argv):
    main(argv)
    lines = capsys.readouterr().out.splitlines()
    assert all(f"  {name:<10}{text}" in lines for name, (_, text) in COMMANDS.items())


@pytest.mark.parametrize("name", COMMANDS)
def test_the_help_of_each_sub_command_has_an_example(name):
    assert re.search(rf"^    igpt {name} --", parser_of(name).format_help(), re.MULTILINE)


@pytest.mark.parametrize("name", COMMANDS)
def test_shared_flags_have_one_help_and_one_default(name):
    found = {action.dest: action for action in parser_of(name)._actions if action.dest in SHARED}
    for flag, action in found.items():
        assert (action.help, action.default or None) == (SHARED[flag]["help"], SHARED[flag].get("default") or None)


def test_an_unknown_sub_command_gets_a_suggestion(capsys):
    for given, hint in (("sampel", "did you mean sample?"), ("xyz", "choose one of sample, evaluate")):
        with pytest.raises(SystemExit) as refused:
            main([given])
        assert refused.value.code == 2 and hint in capsys.readouterr().err


def test_the_version_is_printed(capsys):
    main(["--version"])
    assert capsys.readouterr().out == f"igpt {__version__}\n"
