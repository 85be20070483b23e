"""`igpt SUBCOMMAND`, and how it answers a mistake."""

import importlib
import subprocess
import sys

import pytest

import igpt
from igpt.__main__ import COMMANDS, main
from igpt.command import SHARED, Parser
from tests.helpers import ROOT


@pytest.mark.parametrize("arguments", [["--help"], ["-h"], []], ids=["--help", "-h", "nothing"])
def test_help_lists_every_subcommand_with_what_it_does(arguments, capsys):
    main(arguments)
    lines = capsys.readouterr().out.splitlines()
    for name, (_, text) in COMMANDS.items():
        assert any(line.split(maxsplit=1) == [name, text] for line in lines), name


def test_the_version_is_the_packages(capsys):
    main(["--version"])
    assert capsys.readouterr().out == f"igpt {igpt.__version__}\n"


@pytest.mark.parametrize("name", COMMANDS)
def test_a_subcommand_has_help_with_an_example(name, capsys):
    assert callable(importlib.import_module(COMMANDS[name][0]).run)
    with pytest.raises(SystemExit) as stopped:
        main([name, "--help"])
    shown = capsys.readouterr().out
    assert stopped.value.code == 0 and f"    igpt {name} --" in shown


@pytest.mark.parametrize(
    ("name", "hint"), [("sampel", "did you mean sample?"), ("x", "choose one of sample, evaluate,")]
)
def test_an_unknown_subcommand_names_the_nearest_or_all(name, hint, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([name])
    assert stopped.value.code == 2
    assert capsys.readouterr().err.startswith(f"error: igpt has no sub-command '{name}'; {hint}")


REQUIRED = {
    "sample": ["--model=x", "--out=x"],
    "evaluate": ["--model=x"],
    "predict": ["--model=x", "photo.png"],
    "palette": ["--source=digits", "--out=x"],
    "prepare": ["--source=digits", "--size=8", "--palette=x", "--out=x"],
    "export": ["--model=x", "--out=x"],
    "import": ["--from=x", "--out=x"],
    "demo": ["--model=x"],
    "plan": ["--config=configs/digits.py", "--topology=v5e:2x2"],
}


@pytest.mark.parametrize("name", COMMANDS)
def test_an_unknown_flag_is_one_message_and_exit_code_2(name, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([name, *REQUIRED[name], "--widht=3"])
    shown = capsys.readouterr().err
    assert stopped.value.code == 2 and "Traceback" not in shown
    assert shown.startswith("error: ") and "--widht=3" in shown and f"igpt {name} --help" in shown


def test_the_command_runs_as_a_module():
    command = [sys.executable, "-m", "igpt", "sampel"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "did you mean sample?" in done.stderr and "Traceback" not in done.stderr


def parser_of(name):
    module = importlib.import_module(COMMANDS[name][0])
    parser = Parser(f"igpt {name}", module.__doc__)
    module.add_arguments(parser)
    return parser


@pytest.mark.parametrize("name", COMMANDS)
def test_shared_flags_have_one_help_and_one_default(name):
    found = {action.dest: action for action in parser_of(name)._actions if action.dest in SHARED}
    for flag, action in found.items():
        assert (action.help, action.default or None) == (SHARED[flag]["help"], SHARED[flag].get("default") or None)


def test_a_page_of_help_does_not_wait_for_jax():
    code = "import sys; from igpt.__main__ import main; main(['--help']); sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True).returncode == 0
