"""Sources held in memory: scikit-learn's digits and .npz files."""

import contextlib
import os
import zipfile
from collections.abc import Collection

import numpy as np

from igpt.data.classes import distinct_names
from igpt.data.examples import SPLITS, ArrayImages, EncodedImages, Source, Split
from igpt.data.images import Preprocess
from igpt.data.settings import DataConfig
from igpt.errors import UserError, first_line

PREFIXES = {"train": "", "validation": "validation_", "test": "test_"}  # split -> prefix of its arrays in an .npz


def of_arrays(
    images: np.ndarray,
    labels: np.ndarray | None,
    settings: DataConfig,
    own: dict[str, np.ndarray] | None = None,
    class_names: tuple[str, ...] | None = None,
    whole: bool = False,
) -> Source:
    """Makes a source of images in memory, uint8 [N, H, W] (grey) or [N, H, W, 3], resized as `settings` require.

    `own` and `whole`: see `divide`.
    """
    channels = 1 if images.ndim == 3 else 3
    if channels == 1:
        images = np.repeat(images[..., None], 3, axis=-1)
    preprocess = Preprocess.of(settings)
    stored = ArrayImages(images)
    if preprocess.kind == "crop" or (preprocess.kind == "shrink" and images.shape[1:3] != preprocess.size):
        named = [(image, f"image {i} of {settings.source}") for i, image in enumerate(images)]
        stored = EncodedImages(named, preprocess)
    parts = divide(own or {"train": np.arange(len(images))}, settings, whole)
    return Source(settings.source, *map(Split(stored, labels).take, parts), channels, class_names=class_names)


def divide(own: dict[str, np.ndarray], settings: DataConfig, whole: bool = False) -> list[np.ndarray]:
    """The indices of the training, validation and test examples of a data set whose own splits are `own`.

    A split that `own` lacks is drawn from its training examples. With `whole`, all examples are test examples.
    """
    if whole:
        none = np.arange(0)
        return [none, none, np.concatenate([*own.values()])]
    drawn = split_indices(len(own["train"]), settings, own.keys() - {"train"})
    drawn = [own["train"][some] for some in drawn]
    return [drawn[0], *(own.get(name, part) for name, part in zip(SPLITS[1:], drawn[1:], strict=True))]


def split_indices(count: int, settings: DataConfig, own: Collection[str] = ()) -> list[np.ndarray]:
    """Random indices of the training, validation and test examples. A split of `own` has its own, and gets none here.

    Raises UserError if another split is empty.
    """
    shares = {"validation": settings.validation_fraction, "test": settings.test_fraction}
    held_out = {name: round(share * count) for name, share in shares.items() if name not in own}
    sizes = {"train": count - sum(held_out.values())} | held_out
    if min(sizes.values()) < 1:
        found = ", ".join(f"{size} for {name}" for name, size in sizes.items())
        raise UserError(
            f"{count} images split into {found}; each needs at least one, so give more images or change "
            "data.validation_fraction and data.test_fraction; igpt evaluate reads all of them with --split=all"
        )
    ends = np.cumsum([sizes["train"], sizes.get("validation", 0)])
    return np.split(np.random.default_rng(settings.split_seed).permutation(count), ends)


def read_digits() -> tuple[np.ndarray, np.ndarray]:
    """scikit-learn's handwritten digits: 1,797 images, 8 x 8, 17 grey levels (the test set of UCI's optical digits)."""
    from sklearn.datasets import load_digits  # slow to import, and needed only here

    pixels, labels = load_digits(return_X_y=True)
    return np.round(pixels.reshape(-1, 8, 8) * 255 / 16).astype(np.uint8), labels.astype(np.int32)


def open_npz(path: str, settings: DataConfig, whole: bool = False) -> Source:
    """Opens an .npz of `images`, uint8 [N, H, W] or [N, H, W, 3], and perhaps `labels` [N] and class `names` [C].

    Splits of its own are `validation_images` and `test_images`, each with its labels. Raises UserError for arrays that
    are missing or unsuitable.
    """
    arrays = _read_arrays(path)
    parts = {
        split: _images_and_labels(path, prefix, arrays)
        for split, prefix in PREFIXES.items()
        if f"{prefix}images" in arrays
    }
    images, labels = zip(*parts.values(), strict=True)
    if len({part.shape[1:] for part in images}) > 1 or len({part is None for part in labels}) > 1:
        found = "; ".join(f"{split} {list(part.shape)}" for split, part in zip(parts, images, strict=True))
        raise UserError(f"{path}: images of all splits need one size, and labels in all or none; it has {found}")
    ends = np.cumsum([len(part) for part in images])
    own = {split: np.arange(end - len(part), end) for split, part, end in zip(parts, images, ends, strict=True)}
    images = images[0] if len(parts) == 1 else np.concatenate(images)
    labels = None if labels[0] is None else np.concatenate(labels)
    class_names = None if "names" not in arrays or labels is None else _class_names(path, arrays["names"], labels)
    return of_arrays(images, labels, settings, own, class_names, whole)


def _read_arrays(path: str) -> dict[str, np.ndarray]:
    """The arrays that `open_npz` knows. Prints the names of the others."""
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
            known = {f"{prefix}{kind}" for prefix in PREFIXES.values() for kind in ("images", "labels")} | {"names"}
            if others := [name for name in arrays.files if name not in known]:
                print(f"{path}: passed over the arrays {', '.join(others)}")
            _check_memory(path, {name for name in arrays.files if name in known}, arrays.zip)
            found = {name: arrays[name] for name in arrays.files if name in known}
        if broken := [name for name, array in found.items() if not isinstance(array, np.ndarray)]:
            raise UserError(f"{path} cannot be read as an .npz of plain arrays: {broken[0]} is no array")
        return found
    except FileNotFoundError:
        raise UserError(f"there is no file {path}") from None
    except UserError:
        raise
    except Exception as error:  # damaged files raise exceptions of many types
        raise UserError(f"{path} cannot be read as an .npz of plain arrays: {first_line(error)}") from None


def _check_memory(path: str, names: set[str], archive: zipfile.ZipFile) -> None:
    """Raises UserError if arrays unpack to more than this machine's memory: a small file may hold much."""
    needed = sum(item.file_size for item in archive.infolist() if item.filename.removesuffix(".npy") in names)
    if needed > (memory := machine_memory()):
        found = f"its arrays unpack to {needed / 1e9:,.1f} GB, and this machine has {memory / 1e9:,.1f} GB of memory"
        raise UserError(f"{path}: {found}; split it, or make a folder of images")


def machine_memory() -> int:
    """The bytes of this machine's memory; a very large number where the system does not say."""
    with contextlib.suppress(AttributeError, OSError, ValueError):  # Windows has no sysconf
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return 1 << 62


def _images_and_labels(path: str, prefix: str, arrays: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray | None]:
    """The images and the labels of a split. Raises UserError if their types or shapes are wrong."""
    images, labels, name = arrays[f"{prefix}images"], arrays.get(f"{prefix}labels"), f"{prefix}images"
    if images.dtype != np.uint8:
        raise UserError(
            f"{path}: '{name}' is {images.dtype}; uint8 (0..255) is needed, so convert first, for instance with "
            "np.round(images * 255).astype(np.uint8) if they lie in [0, 1]"
        )
    if images.ndim not in (3, 4) or images.shape[3:] not in ((), (3,)) or 0 in images.shape:
        raise UserError(f"{path}: '{name}' has shape {list(images.shape)}; [N, H, W] or [N, H, W, 3] is needed")
    if labels is None:
        return images, None
    if labels.shape != images.shape[:1] or labels.dtype.kind not in "iu":
        found = f"'{prefix}labels' is {labels.dtype} {list(labels.shape)}"
        raise UserError(f"{path}: {found}; integers [{len(images)}] are needed, one for every image")
    return images, as_int32(labels, f"{path}: '{prefix}labels'")


def as_int32(labels: np.ndarray, what: str) -> np.ndarray:
    """Integer labels as int32. Raises UserError, which begins with `what`, if a label would become another number."""
    if labels.size and not (abs(int(labels.min())) < 1 << 31 and int(labels.max()) < 1 << 31):
        raise UserError(f"{what} run from {labels.min()} to {labels.max()}; number the classes from 0 on")
    return labels.astype(np.int32)


def _class_names(path: str, names: np.ndarray, labels: np.ndarray) -> tuple[str, ...]:
    if names.dtype.kind not in "US" or names.ndim != 1:
        found = f"{names.dtype} {list(names.shape)}"
        raise UserError(f"{path}: 'names' is {found}; text [C] is needed, where names[i] is the name of class i")
    if labels.min() < 0 or labels.max() >= len(names):
        found = f"'labels' run from {labels.min()} to {labels.max()}, and there are {len(names)} 'names'"
        raise UserError(f"{path}: {found}; give a name for every class")
    texts = (name.decode("utf-8", "backslashreplace") if isinstance(name, bytes) else name for name in names.tolist())
    return distinct_names(texts, f"{path}: 'names'")


def map_array(path: str) -> np.ndarray:
    """Maps the array of a .npy file into memory. Raises UserError if the file is missing, damaged, or an .npz."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise UserError(f"there is no file {path}") from None
    except Exception as error:  # damaged files raise exceptions of many types
        raise UserError(f"{path} cannot be read as a .npy of numbers: {first_line(error)}; fetch it again") from None
    if not isinstance(array, np.ndarray):
        raise UserError(f"{path} is an .npz of several arrays; a .npy is needed")
    return array
