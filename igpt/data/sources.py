"""Where examples come from: each kind of `data.source`, opened as a train, a validation and a test split."""

from ml_collections import ConfigDict

from igpt.data import arrays
from igpt.data.examples import Source
from igpt.data.folder import open_folder
from igpt.data.images import Preprocess
from igpt.data.openai_arrays import open_openai
from igpt.data.prepared import open_prepared
from igpt.errors import UserError

KINDS = "digits, npz:PATH, folder:PATH, tfds:NAME, tokens:PATH or openai:PREFIX"


def open_source(settings: ConfigDict) -> Source:
    """The source of a run's `data` settings; UserError when its images are not of the configured kind."""
    source = load_source(settings)
    if source.image_size != tuple(settings.image_size) or source.channels != settings.channels:
        height, width = source.image_size
        raise UserError(
            f"{settings.source} has images of {height} x {width} with {source.channels} channel(s), the config says "
            f"{' x '.join(map(str, settings.image_size))} with {settings.channels}; set "
            f"--config.data.image_size='({height},{width})' --config.data.channels={source.channels}"
            + ("" if source.palette else ", or --config.data.preprocess=shrink for another size")
        )
    return source


def load_source(settings: ConfigDict) -> Source:
    """The source of a run's `data` settings, whatever its images are like."""
    size = tuple(settings.image_size)
    preprocess = Preprocess(size, settings.preprocess, tuple(settings.short_side), settings.crop, settings.filter)
    if settings.on_unreadable not in ("stop", "skip"):
        raise UserError(f"data.on_unreadable is {settings.on_unreadable!r}; choose stop or skip")
    if settings.channels not in (1, 3):
        raise UserError(f"data.channels is {settings.channels}; choose 1 for grey images or 3 for colour")
    fractions = settings.validation_fraction, settings.test_fraction
    if not (min(fractions) >= 0.0 and sum(fractions) < 1.0):
        raise UserError(
            f"data.validation_fraction is {fractions[0]} and data.test_fraction {fractions[1]}; neither is "
            "negative, and something must remain for training"
        )
    skip = settings.on_unreadable == "skip"
    kind, _, argument = settings.source.partition(":")
    if settings.split_file and kind != "folder":
        raise UserError(f"data.split_file is {settings.split_file}, but only folder:PATH is split by a file; empty it")
    match kind:
        case "digits" if not argument:
            return arrays.of_arrays(settings.source, *arrays.digits(), fractions, settings.split_seed, preprocess)
        case "npz" if argument:
            return arrays.of_arrays(settings.source, *arrays.npz(argument), fractions, settings.split_seed, preprocess)
        case "openai" if argument:
            return open_openai(argument)
        case "tokens" if argument:
            return open_prepared(argument)
        case "folder" if argument:
            chosen = settings.split_file or fractions
            return open_folder(argument, chosen, settings.split_seed, preprocess, settings.channels, skip)
        case "tfds" if argument:
            from igpt.data.tfds import open_tfds  # tensorflow_datasets is slow to import

            return open_tfds(
                argument, settings.data_dir, fractions, settings.split_seed, preprocess, settings.channels, skip
            )
    raise UserError(f"data.source is {settings.source!r}; choose {KINDS}")
