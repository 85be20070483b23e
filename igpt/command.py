"""The flag parser that all commands use: the sub-commands of `igpt`, train.py and eval_probe.py."""

import argparse
import re
from collections.abc import Callable

from igpt.errors import UserError
from igpt.fields import LARGEST_SEED
from igpt.files import expand_home


class Parser(argparse.ArgumentParser):
    """An argparse parser with `text` as its help. It allows no abbreviated flags and raises UserError for a mistake."""

    def __init__(self, prog: str, text: str):
        as_written = argparse.RawDescriptionHelpFormatter
        super().__init__(prog, description=text.strip(), formatter_class=as_written, allow_abbrev=False)
        kept = "a folder that keeps compiled programs for the next start, or off (default: in the user's cache folder)"
        self.add_argument("--compilation_cache", help=kept)

    def parse_known_args(self, args=None, namespace=None):
        """Parses like argparse. In every path, also in `folder:~/x`, it replaces `~` by the home directory."""
        found, rest = super().parse_known_args(args, namespace)
        for name, value in vars(found).items():
            if isinstance(value, str):
                setattr(found, name, expand_home(value))
            elif isinstance(value, list):
                setattr(found, name, [expand_home(item) if isinstance(item, str) else item for item in value])
        return found, rest

    def error(self, message: str):
        message = re.sub(r"^argument (--\w+): ", r"\1 ", message)
        raise UserError(f"{message}. {self.prog} --help has examples and every flag")


def at_least(least: int, most: int = LARGEST_SEED) -> Callable[[str], int]:
    """Returns an argparse type that accepts whole numbers of at least `least`, and at most `most`."""

    def parse(text: str) -> int:
        if not re.fullmatch(r"-?\d+", text):
            raise argparse.ArgumentTypeError(f"is {text!r}; it must be a whole number")
        if int(text) < least:
            raise argparse.ArgumentTypeError(f"is {text}; it must be at least {least}")
        if int(text) > most:
            raise argparse.ArgumentTypeError(f"is {text}; it must be at most {most}")
        return int(text)

    return parse


SHARED = {  # flags that several commands have, with the same help and the same default in each command
    "model": dict(required=True, help="a run directory, a Hugging Face directory or a hub id"),
    "step": dict(type=int, help="the checkpoint to use (default: the newest; after fine-tuning, the best)"),
    "batch_size": dict(type=at_least(1), default=64, help="images per batch (default 64)"),
    "data_dir": dict(default="", help="where tensorflow_datasets keeps its data"),
    "seed": dict(type=at_least(0), default=0, help="the same seed gives the same result (default 0)"),
    "json": dict(help="a file to write the results to, as JSON"),
    "fsdp": dict(type=at_least(1), default=1, help="devices to split the parameters over (default 1)"),
    "tensor": dict(type=at_least(1), default=1, help="devices to split the attention heads over (default 1)"),
}


def add_shared(parser: argparse.ArgumentParser, *names: str) -> None:
    """Adds to the parser the flags of SHARED that have these names."""
    for name in names:
        parser.add_argument(f"--{name}", **SHARED[name])
