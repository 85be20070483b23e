"""Sources held in memory: scikit-learn's digits and .npz files."""

import zipfile

import numpy as np

from igpt.data.examples import SPLITS, ArrayImages, EncodedImages, Source, Split
from igpt.data.images import Preprocess
from igpt.data.settings import DataConfig
from igpt.errors import UserError


def of_arrays(images: np.ndarray, labels: np.ndarray | None, settings: DataConfig) -> Source:
    """Makes a source of images in memory, uint8 [N, H, W] (grey) or [N, H, W, 3], resized as `settings` require."""
    channels = 1 if images.ndim == 3 else 3
    if channels == 1:
        images = np.repeat(images[..., None], 3, axis=-1)
    preprocess = Preprocess.of(settings)
    stored = ArrayImages(images)
    if preprocess.kind == "crop" or (preprocess.kind == "shrink" and images.shape[1:3] != preprocess.size):
        named = [(image, f"image {i} of {settings.source}") for i, image in enumerate(images)]
        stored = EncodedImages(named, preprocess)
    parts = split_indices(len(images), settings)
    return Source(settings.source, *map(Split(stored, labels).take, parts), channels)


def split_indices(count: int, settings: DataConfig, has_test=False, what="images") -> list[np.ndarray]:
    """Random indices of the training, validation and test examples. With `has_test`, the test part is empty.

    `has_test`: the data set has its own test set. Raises UserError if another part is empty; `what` names the examples.
    """
    held_out = [settings.validation_fraction, settings.test_fraction][: 1 if has_test else 2]
    sizes = [round(fraction * count) for fraction in held_out]
    sizes = [count - sum(sizes), *sizes]
    if min(sizes) < 1:
        found = ", ".join(f"{size} for {name}" for size, name in zip(sizes, SPLITS, strict=False))
        raise UserError(
            f"{count} {what} split into {found}; each needs at least one, so give more images or change "
            "data.validation_fraction and data.test_fraction"
        )
    return np.split(np.random.default_rng(settings.split_seed).permutation(count), np.cumsum(sizes)[:2])


def read_digits() -> tuple[np.ndarray, np.ndarray]:
    """scikit-learn's handwritten digits: 1,797 images, 8 x 8, 17 grey levels (the test set of UCI's optical digits)."""
    from sklearn.datasets import load_digits  # slow to import, and needed only here

    pixels, labels = load_digits(return_X_y=True)
    return np.round(pixels.reshape(-1, 8, 8) * 255 / 16).astype(np.uint8), labels.astype(np.int32)


def read_npz(path: str) -> tuple[np.ndarray, np.ndarray | None]:
    """Reads `images`, uint8 [N, H, W] or [N, H, W, 3], and `labels`, int32 [N] or None. UserError if invalid."""
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
            found = f"{labels.dtype} {list(labels.shape)}"
            raise UserError(f"{path}: 'labels' is {found}; integers [{len(images)}] are needed, one for every image")
        labels = labels.astype(np.int32)
    return images, labels


def map_array(path: str) -> np.ndarray:
    """Maps the array of a .npy file into memory. Raises UserError if the file is missing, damaged, or an .npz."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise UserError(f"there is no file {path}") from None
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} cannot be read as a .npy of numbers: {error}; fetch it again") from None
    if not isinstance(array, np.ndarray):
        raise UserError(f"{path} is an .npz of several arrays; a .npy is needed")
    return array
