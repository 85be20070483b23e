"""Opens every kind of `data.source` as a training, a validation and a test split."""

import argparse
import dataclasses

from igpt.data import arrays
from igpt.data.examples import Source
from igpt.data.folder import open_folder
from igpt.data.openai_arrays import open_openai
from igpt.data.prepared import open_prepared
from igpt.data.scattered import background_settings, scatter
from igpt.data.settings import CHOICES, DataConfig
from igpt.errors import UserError
from igpt.fetch import local_copy
from igpt.files import is_bucket

KINDS = (
    "digits, npz:PATH, folder:PATH, tfds:NAME, hf:NAME, tokens:PATH, openai:PREFIX, scattered:digits or "
    "scattered:npz:PATH"
)
FLAGS = {
    "crop": "side of the square that --preprocess=crop cuts out",
    "filter": "for resizing",
    "validation_fraction": "share of the images held out for validation",
    "test_fraction": "share of the images held out for test",
    "split_file": "for a folder: a file with lines 'path,train|validation|test'",
    "split_seed": "seed of the random split",
    "data_dir": "where tensorflow_datasets keeps its data",
    "on_unreadable": "at an image that cannot be read",
}  # field of DataConfig -> help text of its flag; the flag has the default of the field


def open_source(settings, is_command: bool = False, whole: bool = False) -> Source:
    """Opens the source that a DataConfig, or a mapping with the same fields, describes.

    Raises UserError if the images do not have the size and the channels of `settings`. With `is_command`, the message
    names flags of `igpt prepare`, otherwise those of the other commands. `whole`: see `load_source`.
    """
    settings = DataConfig.of(settings)
    source = load_source(settings, whole)
    if source.image_size != settings.image_size or source.channels != settings.channels:
        height, width = source.image_size
        if is_command:
            as_they_are = f"use the images as they are, set --size={height}x{width} --channels={source.channels}"
            resizes = "--preprocess=shrink"
        else:
            fields = f"--config.data.image_size='({height},{width})' --config.data.channels={source.channels}"
            as_they_are = f"train on the images as they are, set {fields}"
            resizes = "--config.data.preprocess=shrink (train.py), --config.preprocess=shrink (eval_probe.py) or "
            resizes += "--preprocess=shrink (igpt)"
        # Tokens cannot be resized, and resizing changes no channels.
        can_resize = not source.tokenizer and source.channels == settings.channels
        raise UserError(
            f"{settings.source} has images of {height} x {width} with {source.channels} channel(s), but "
            f"the settings ask for {' x '.join(map(str, settings.image_size))} with {settings.channels}. To "
            f"{as_they_are}" + (f". To resize them, set {resizes}" if can_resize else "")
        )
    return source


def load_source(settings, whole: bool = False) -> Source:
    """Opens a source like `open_source`, but does not check the size and the channels of its images.

    With `whole`, what would be split by fractions or by a file is not split: all images are test images.
    """
    settings = DataConfig.of(settings)
    kind, _, argument = settings.source.partition(":")
    if is_bucket(argument):
        return _from_bucket(kind, argument, settings, whole)
    match kind:
        case "digits" if not argument:
            return arrays.of_arrays(*arrays.read_digits(), settings, whole=whole)
        case "npz" if argument:
            return arrays.open_npz(argument, settings, whole)
        case "openai" if argument:
            return open_openai(argument)
        case "tokens" if argument:
            return open_prepared(argument)
        case "folder" if argument:
            return open_folder(argument, settings, whole)
        case "tfds" if argument:
            from igpt.data.tfds import open_tfds  # tensorflow_datasets is slow to import

            return open_tfds(argument, settings)
        case "hf" if argument:
            from igpt.data.hf import open_hf

            return open_hf(argument, settings, whole)
        case "scattered" if argument == "digits" or argument.startswith("npz:"):
            small = load_source(settings.without_places(source=argument), whole)
            return scatter(small, settings, _backgrounds(settings) if settings.scatter_background else None)
    raise UserError(f"data.source is {settings.source!r}; choose {KINDS}")


def _backgrounds(settings: DataConfig) -> Source:
    try:
        return load_source(background_settings(settings))
    except UserError as error:
        raise UserError(f"data.scatter_background={settings.scatter_background}: {error}") from None


def _from_bucket(kind: str, argument: str, settings: DataConfig, whole: bool) -> Source:
    """Opens a local copy of a source in a bucket. Its name is that of the original."""
    if kind not in ("npz", "tokens"):
        raise UserError(
            f"data.source is {settings.source!r}; npz: and tokens: may be in a bucket. Make tokens of the others with "
            "igpt prepare, and copy them there; or mount the bucket"
        )
    source = load_source(dataclasses.replace(settings, source=f"{kind}:{local_copy(argument)}"), whole)
    return dataclasses.replace(source, name=settings.source)


def add_source_arguments(parser: argparse.ArgumentParser, size: str | None) -> None:
    """Adds the flags that describe a source. `size` is the default of --size; None makes --size required."""
    parser.add_argument("--source", required=True, help=KINDS)
    default = f" (default {size})" if size else ""
    parser.add_argument("--size", required=not size, default=size, help=f"side, or HEIGHTxWIDTH, of images{default}")
    parser.add_argument("--channels", type=int, default=3, choices=(1, 3), help="1: grey (default 3)")
    resizing = "how images are resized to --size; none: they have it already (default shrink)"
    parser.add_argument("--preprocess", default="shrink", choices=CHOICES["preprocess"], help=resizing)
    for name, text in FLAGS.items():
        default = getattr(DataConfig, name)
        text += f" (default {default})" if default != "" else ""
        parser.add_argument(f"--{name}", type=type(default), default=default, choices=CHOICES.get(name), help=text)


def source_settings(args: argparse.Namespace) -> dict:
    """Returns the fields of DataConfig that the flags set. Raises UserError if --size is invalid."""
    sides = args.size.lower().split("x")
    if not all(side.isdecimal() and int(side) > 0 for side in sides) or len(sides) > 2:
        raise UserError(f"--size={args.size}; give a number such as 32, or HEIGHTxWIDTH such as 28x28")
    fields = [field.name for field in dataclasses.fields(DataConfig)]
    return {name: value for name, value in vars(args).items() if name in fields} | {
        "image_size": (int(sides[0]), int(sides[-1])),
        "short_side": (max(256, args.crop), max(384, args.crop)),
    }
