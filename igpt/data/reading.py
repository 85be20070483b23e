"""The options by which the commands `igpt.prepare` and `igpt.palette_fit` are told how to read a source."""

import argparse

from igpt.data.images import FILTERS
from igpt.data.sources import KINDS
from igpt.errors import UserError


def add_reading(command: argparse.ArgumentParser, size: str | None) -> None:
    """The options that say how a source is read. `size`: the default of --size, None where it must be given."""
    default = f" (default {size})" if size else ""
    command.add_argument("--source", required=True, help=KINDS)
    command.add_argument(
        "--size", required=not size, default=size, help=f"of the images: a number, or HEIGHTxWIDTH{default}"
    )
    command.add_argument("--channels", type=int, default=3, choices=(1, 3), help="1: grey (default 3)")
    command.add_argument(
        "--preprocess",
        default="shrink",
        choices=("none", "shrink", "crop"),
        help="how images come to that size; none: they have it (default shrink)",
    )
    command.add_argument("--crop", type=int, default=224, help="of --preprocess=crop (default 224)")
    command.add_argument("--filter", default="bicubic", choices=tuple(FILTERS), help="of resizing (default bicubic)")
    command.add_argument("--validation_fraction", type=float, default=0.1, help="held out (default 0.1)")
    command.add_argument("--test_fraction", type=float, default=0.2, help="held out (default 0.2)")
    command.add_argument("--split_file", default="", help="of a folder: lines 'path,train|validation|test'")
    command.add_argument("--split_seed", type=int, default=0, help="of the choice of what is held out (default 0)")
    command.add_argument("--data_dir", default="", help="where tensorflow_datasets keeps its data")
    command.add_argument(
        "--on_unreadable", default="stop", choices=("stop", "skip"), help="at an unreadable image (default stop)"
    )


def reading_settings(args: argparse.Namespace) -> dict:
    """The fields of config.data that these options amount to."""
    sides = args.size.lower().split("x")
    if not all(side.isdecimal() and int(side) > 0 for side in sides) or len(sides) > 2:
        raise UserError(f"--size={args.size}; give a number such as 32, or HEIGHTxWIDTH such as 28x28")
    fields = (
        *("source", "channels", "preprocess", "crop", "filter", "validation_fraction", "test_fraction"),
        *("split_file", "split_seed", "data_dir", "on_unreadable"),
    )
    return {name: getattr(args, name) for name in fields} | {
        "image_size": (int(sides[0]), int(sides[-1])),
        "short_side": (max(256, args.crop), max(384, args.crop)),
    }
