"""Parses command lines with a config file: `--config=FILE --config.a.b=value` together with a script's own flags."""

import argparse
import difflib
import importlib.machinery
import importlib.util
import re
import sys
import traceback
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict, config_flags

from igpt.command import Parser
from igpt.errors import UserError
from igpt.files import check_workdir
from igpt.run.directory import load_config

WHERE = "every field and its default: configs/base.py, a probe's: configs/probe.py; the flags: --help"


def parse_with_config(parser: Parser, argv: list[str] | None = None, resumes: bool = False) -> argparse.Namespace:
    """Parses the flags of `parser`. The result's `config` is the ConfigDict of the config file, with all overrides.

    With `resumes`, the configuration of the run in --workdir stands in for a missing --config. Raises UserError for a
    missing or broken file, an unknown flag or field, and a value of the wrong type.
    """
    group = parser.add_argument_group("configuration")
    group.add_argument("--config", help="a Python file with get_config(); --config.a.b=value sets one of its fields")
    argv = sys.argv[1:] if argv is None else argv
    args, rest = parser.parse_known_args(argv)
    if not args.config and resumes and (check_workdir(args.workdir) / "config.json").exists():
        args.config = ConfigDict(load_config(check_workdir(args.workdir)).to_dict())
    if not args.config:
        absent = f", and --workdir={args.workdir} holds no run to resume" if resumes else ""
        parser.error(f"--config is missing{absent}")
    own = [option for action in parser._actions for option in action.option_strings]
    for word in rest:
        if word.startswith("-") and not re.match(r"--config\.|-[.\d]", word):  # the value -1 may follow a field
            close = difflib.get_close_matches(word.partition("=")[0], own, 1)
            parser.error(f"{word!r} is not a flag" + (f"; did you mean {close[0]}?" if close else ""))
    args.config = _read(args.config, rest)
    return args


def _read(given: str | ConfigDict, overrides: list[str]) -> ConfigDict:
    """Reads a config file, or takes a ConfigDict, and applies the overrides.

    Raises UserError for any error of the file, of absl and of ml_collections.
    """
    config, values = given if isinstance(given, ConfigDict) else _from_file(given), flags.FlagValues()
    options = dict(flag_values=values, lock_config=True, sys_argv=["igpt", *overrides], help_string="-")
    try:
        holder = config_flags.DEFINE_config_dict("config", config, **options)
        stray = values(["igpt", *overrides])[1:]
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError) as error:
        message = str(error).strip("\"'").replace("\\'", "'").replace("\\n", " ").replace("\n", " ")
        field = re.match(r"'?(\w+)('? Did you mean \W*(\w+)|$)", message)
        if field and isinstance(error, AttributeError | KeyError):
            message = f"there is no field {field[1]!r}" + (f"; did you mean {field[3]!r}?" if field[3] else "")
        raise UserError(f"{message} ({WHERE})") from None
    if stray:
        raise UserError(f"{' '.join(stray)!r} is not a flag; options are written --name=value")
    return holder.value


def _from_file(given: str) -> ConfigDict:
    """What get_config() of a file returns; FILE:TEXT calls get_config(TEXT). A UserError names the line at fault."""
    file, colon, text = given.partition(":")
    if (root := str(Path(file).absolute().parent.parent)) not in sys.path:
        sys.path.append(root)  # so that configs/digits.py can import configs.base
    name = "igpt_config_file"
    loader = importlib.machinery.SourceFileLoader(name, file)
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader(name, loader))
    sys.modules[name] = module  # dataclasses look up the module that they are defined in
    try:
        loader.exec_module(module)
        config = module.get_config(*([text] if colon else []))
    except UserError:
        raise
    except OSError as error:
        problem = f"{error.strerror or error}: {str(error.filename or file)!r}"
        raise UserError(f"the config file could not be loaded: {problem}") from None
    except Exception as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
        place = f"{file}, line {lines[-1]}" if lines else file
        raise UserError(f"{place}: {type(error).__name__}: {error} ({WHERE})") from None
    if not isinstance(config, ConfigDict):
        raise UserError(f"{file}: get_config() returned {type(config).__name__}; it must return a ConfigDict ({WHERE})")
    return config
