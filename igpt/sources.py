"""Where examples come from: each kind of `data.source`, opened as a train, a validation and a test split."""

import math
import zipfile
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from igpt.errors import UserError
from igpt.examples import DecodedTokens, EncodedImages, Source, Split
from igpt.images import Preprocess
from igpt.palette import Palette

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
            return of_arrays(settings.source, *_digits(), fractions, settings.split_seed, preprocess)
        case "npz" if argument:
            return of_arrays(settings.source, *_npz(argument), fractions, settings.split_seed, preprocess)
        case "openai" if argument:
            return _openai(argument)
        case "tokens" if argument:
            from igpt.prepare import open_prepared  # which reads sources itself

            return open_prepared(argument)
        case "folder" if argument:
            from igpt.folder import open_folder

            chosen = settings.split_file or fractions
            return open_folder(argument, chosen, settings.split_seed, preprocess, settings.channels, skip)
        case "tfds" if argument:
            from igpt.tfds import open_tfds  # tensorflow_datasets is slow to import

            return open_tfds(
                argument, settings.data_dir, fractions, settings.split_seed, preprocess, settings.channels, skip
            )
    raise UserError(f"data.source is {settings.source!r}; choose {KINDS}")


def of_arrays(name: str, images, labels, fractions, split_seed: int, preprocess: Preprocess) -> Source:
    """A source in memory: images uint8 [N, H, W] (grey) or [N, H, W, 3]. Of another size, they are brought to it."""
    channels = 1 if images.ndim == 3 else 3
    if channels == 1:
        images = np.repeat(images[..., None], 3, axis=-1)
    splits = []
    for part in split_indices(len(images), fractions, split_seed):
        kept = images[part]
        if preprocess.kind == "crop" or (preprocess.kind == "shrink" and images.shape[1:3] != preprocess.size):
            kept = EncodedImages(
                [(image, f"image {i} of {name}") for i, image in zip(part, kept, strict=True)], preprocess
            )
        splits.append(Split(kept, None if labels is None else labels[part]))
    return Source(name, *splits, channels)


def split_indices(count: int, fractions: tuple[float, float], seed: int) -> list[np.ndarray]:
    """The examples of train, validation and test; `fractions` of all go to the last two, chosen by `seed`."""
    validation, test = (round(fraction * count) for fraction in fractions)
    train = count - validation - test
    if min(train, validation, test) < 1:
        raise UserError(
            f"{count} images split into {train} for training, {validation} for validation and {test} for test; "
            "each needs at least one, so give more images or change data.validation_fraction and data.test_fraction"
        )
    return np.split(np.random.default_rng(seed).permutation(count), [train, train + validation])


def _digits():
    """scikit-learn's handwritten digits: 1,797 images, 8 x 8, 17 grey levels (the UCI optical digits, test part)."""
    from sklearn.datasets import load_digits  # slow to import, and needed only here

    pixels, labels = load_digits(return_X_y=True)
    return np.round(pixels.reshape(-1, 8, 8) * 255 / 16).astype(np.uint8), labels.astype(np.int32)


def _npz(path: str):
    """Arrays `images` uint8 [N, H, W] or [N, H, W, 3] and, optionally, integer `labels` [N]."""
    try:
        arrays = np.load(path, allow_pickle=False)
        if isinstance(arrays, np.ndarray):
            raise UserError(f"{path} is a single .npy array; save it with np.savez(path, images=...)")
        with arrays:
            if "images" not in arrays:
                raise UserError(
                    f"{path} has no array 'images' (it has {', '.join(arrays.files) or 'none'}); "
                    "save it with np.savez(path, images=..., labels=...)"
                )
            images = arrays["images"]
            labels = arrays.get("labels")
    except FileNotFoundError:
        raise UserError(f"there is no file {path}") from None
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} cannot be read as an .npz of plain arrays: {error}") from None
    if images.dtype != np.uint8:
        raise UserError(
            f"{path}: 'images' is {images.dtype}; uint8 (0..255) is needed, so convert first, for instance with "
            "np.round(images * 255).astype(np.uint8) if they lie in [0, 1]"
        )
    if images.ndim not in (3, 4) or images.shape[3:] not in ((), (3,)) or 0 in images.shape:
        raise UserError(f"{path}: 'images' has shape {list(images.shape)}; [N, H, W] or [N, H, W, 3] is needed")
    if labels is not None:
        if labels.shape != images.shape[:1] or labels.dtype.kind not in "iu":
            raise UserError(
                f"{path}: 'labels' is {labels.dtype} {list(labels.shape)}; integers [{len(images)}] are needed, "
                "one for every image"
            )
        labels = labels.astype(np.int32)
    return images, labels


def _openai(prefix: str) -> Source:
    """OpenAI's encoded data sets, as their download.py leaves them; every split is a pair of files.

    PREFIX_{tr,va,te}X.npy: palette tokens [N, T], integers, a square image a row. PREFIX_{tr,va,te}Y.npy, which may be
    absent: labels, integers [N] or one-hot [N, C]. Beside them kmeans_centers.npy: the palette. Tokens stay in their
    files; encoding an image that this palette decoded returns its tokens, but where two centres round to equal bytes.
    """
    paths = [f"{prefix}_{split}X.npy" for split in ("tr", "va", "te")]
    arrays = {path: _map_tokens(path) for path in paths}
    if len({tokens.shape[1] for tokens in arrays.values()}) > 1:
        found = ", ".join(f"{path} {list(tokens.shape)}" for path, tokens in arrays.items())
        raise UserError(f"the splits' images differ in size: {found}; encode all three alike")
    clusters = Path(paths[0]).with_name("kmeans_centers.npy")
    if not clusters.exists():
        raise UserError(f"there is no {clusters}; the palette that these tokens index belongs beside them")
    palette = Palette.load(clusters)
    splits = []
    for path, tokens in arrays.items():
        side = math.isqrt(tokens.shape[1])
        images = DecodedTokens(tokens, palette, path, (side, side))
        images[:1000]  # another data set's palette shows at once; what the rest holds, when it is read
        splits.append(Split(images, _openai_labels(path.removesuffix("X.npy") + "Y.npy", len(tokens))))
    grey = bool((palette.centers == palette.centers[:, :1]).all())
    return Source(f"openai:{prefix}", *splits, channels=1 if grey else 3, palette=palette)


def _map_tokens(path: str) -> np.ndarray:
    tokens = map_array(path)
    if tokens.dtype.kind not in "iu" or tokens.ndim != 2 or 0 in tokens.shape:
        raise UserError(f"{path} is {tokens.dtype} {list(tokens.shape)}; palette tokens are integers [N, T]")
    if math.isqrt(tokens.shape[1]) ** 2 != tokens.shape[1]:
        raise UserError(f"{path} has {tokens.shape[1]} tokens an image, which is no square; 32 x 32 images have 1024")
    return tokens


def _openai_labels(path: str, count: int) -> np.ndarray | None:
    """int32 [N]; a few rows at a time, as ImageNet's one-hot labels take gigabytes."""
    if not Path(path).exists():
        return None
    labels = map_array(path)
    kinds = {1: "iu", 2: "iufb"}.get(labels.ndim, "")
    if labels.dtype.kind not in kinds or len(labels) != count:
        raise UserError(
            f"{path} is {labels.dtype} {list(labels.shape)}; integers [{count}] or one-hot rows [{count}, C] are "
            "needed, one for every image"
        )
    if labels.ndim == 1:
        return labels.astype(np.int32)
    classes = np.empty(count, np.int32)
    for start in range(0, count, 4096):
        rows = labels[start : start + 4096]
        if not ((rows != 0).sum(axis=1) == 1).all() or not (rows.sum(axis=1) == 1).all():
            raise UserError(f"{path}: the rows from {start} on are not all one-hot, a single 1 among zeros")
        classes[start : start + 4096] = rows.argmax(axis=1)
    return classes


def map_array(path: str) -> np.ndarray:
    """The array of a .npy file, in the file."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise UserError(f"there is no file {path}") from None
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} cannot be read as a .npy of numbers: {error}; fetch it again") from None
    if not isinstance(array, np.ndarray):
        raise UserError(f"{path} is an .npz of several arrays; a .npy is needed")
    return array
