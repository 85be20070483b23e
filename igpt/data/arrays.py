"""Sources that lie in arrays: scikit-learn's digits and .npz files."""

import zipfile

import numpy as np

from igpt.data.examples import EncodedImages, Source, Split
from igpt.data.images import Preprocess
from igpt.errors import UserError


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


def digits():
    """scikit-learn's handwritten digits: 1,797 images, 8 x 8, 17 grey levels (the UCI optical digits, test part)."""
    from sklearn.datasets import load_digits  # slow to import, and needed only here

    pixels, labels = load_digits(return_X_y=True)
    return np.round(pixels.reshape(-1, 8, 8) * 255 / 16).astype(np.uint8), labels.astype(np.int32)


def npz(path: str):
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
