"""The command line's one style: how sub-commands of `igpt`, train.py and eval_probe.py parse their flags."""

import argparse
import re
from collections.abc import Callable

from igpt.errors import UserError


class Parser(argparse.ArgumentParser):
    """argparse with the module's docstring as help, no abbreviated flags, and UserError for a mistake."""

    def __init__(self, prog: str, text: str):
        super().__init__(
            prog, description=text.strip(), formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
        )

    def error(self, message: str):
        message = re.sub(r"^argument (--\w+): ", r"\1 ", message)
        raise UserError(f"{message}. {self.prog} --help has examples and every flag")


def at_least(least: int) -> Callable[[str], int]:
    """The type of a flag that takes whole numbers from `least` up."""

    def parse(text: str) -> int:
        if not re.fullmatch(r"-?\d+", text):
            raise argparse.ArgumentTypeError(f"is {text!r}; it must be a whole number")
        if int(text) < least:
            raise argparse.ArgumentTypeError(f"is {text}; it must be at least {least}")
        return int(text)

    return parse


def add_model_arguments(parser: Parser) -> None:
    """--model and --step, of every command that uses a model."""
    parser.add_argument("--model", required=True, help="a run or Hugging Face directory, or a hub id")
    parser.add_argument("--step", type=int, help="checkpoint to use (default: the newest; after fine-tuning, the best)")


def add_mesh_arguments(parser: Parser) -> None:
    """--fsdp and --tensor, of a command that spreads a model over devices."""
    parser.add_argument("--fsdp", type=at_least(1), default=1, help="devices to split the parameters over (default 1)")
    parser.add_argument("--tensor", type=at_least(1), default=1, help="devices to split the heads over (default 1)")
