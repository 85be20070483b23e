"""A folder of pictures as a data source: a sub-folder for each class, or all pictures in one folder without labels."""

import os
from pathlib import Path

import numpy as np

from igpt.data.arrays import split_indices
from igpt.data.examples import SPLITS, EncodedImages, Source, Split
from igpt.data.images import Preprocess
from igpt.data.settings import DataConfig
from igpt.errors import UserError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp")
NO_CLASSES = {*SPLITS, "val", "valid", "testing", "training"}  # names of folders that contain splits, not classes


class ImagePaths:
    """Paths of image files in a folder and their names for messages. EncodedImages takes them as `files`."""

    def __init__(self, paths: list[str], folder: str | Path):
        self.paths = paths  # strings, because a million Path objects take a gigabyte
        self.root = os.path.join(Path(folder), "")  # a path without it is relative to the folder

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int | np.integer) -> tuple[Path, str]:
        return Path(self.paths[index]), printable(self.paths[index])


def open_folder(folder: str, settings: DataConfig) -> Source:
    """Opens a folder of pictures. Images are sorted by path, and classes are numbered in the order of their names.

    Splits images at random or by `settings.split_file`. Ignores hidden files. UserError if folder or file is invalid.
    """
    paths, labels = list_images(Path(folder))
    if settings.split_file:
        parts = read_split_file(Path(settings.split_file), Path(folder), paths)
    else:
        parts = split_indices(len(paths), settings)
    preprocess, skip = Preprocess.of(settings), settings.on_unreadable == "skip"
    images = EncodedImages(ImagePaths(paths, folder), preprocess, settings.channels, skip)
    return Source(settings.source, *map(Split(images, labels).take, parts), settings.channels)


def list_images(folder: Path) -> tuple[list[str], np.ndarray | None]:
    """The paths of a folder's pictures, sorted, and their classes, int32 [N]. Without sub-folders, classes are None.

    Prints the number of files that do not end in one of SUFFIXES. UserError for no pictures or unclear classes.
    """
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}")
    here, others = _pictures(folder, deep=False)
    classes = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    listed = [_pictures(path, deep=True) for path in classes]
    names, counts = [printable(path.name) for path in classes], [len(pictures) for pictures, _ in listed]
    found, others = sum(counts), others + sum(more for _, more in listed)
    if others:
        print(f"{folder}: passed over {others} files that are no pictures by their names, or links to folders")
    if here and found:
        raise UserError(
            f"{folder} has {len(here)} pictures of its own and {found} in sub-folders; sub-folders are classes, "
            "so that every picture must lie in one, or none"
        )
    if not here and not found:
        raise UserError(f"{folder} has no pictures: only files ending in {', '.join(SUFFIXES)} are read")
    if here:
        return here, None
    if empty := [name for name, count in zip(names, counts, strict=True) if not count]:
        raise UserError(f"{folder} has classes without pictures: {', '.join(empty[:10])}; remove or fill them")
    if {name.lower() for name in names} <= NO_CLASSES:
        raise UserError(
            f"the sub-folders of {folder} are {', '.join(names)}, which name splits; sub-folders are classes here: "
            f"open folder:{folder / classes[0].name}, or move the classes of all together and set data.split_file"
        )
    labels = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
    return [path for pictures, _ in listed for path in pictures], labels


def _pictures(folder: Path, deep: bool) -> tuple[list[str], int]:
    """The sorted paths of pictures, with `deep` also of sub-folders, and the number of other visible entries."""

    def fail(error: OSError) -> None:
        raise UserError(f"{printable(error.filename)} cannot be listed: {error.strerror}; make it readable")

    found, others = [], 0
    for where, folders, names in os.walk(folder, onerror=fail):
        folders[:] = [name for name in folders if deep and not name.startswith(".")]
        others += sum(os.path.islink(os.path.join(where, name)) for name in folders)  # not read: links can form cycles
        for name in names:
            if name.lower().endswith(SUFFIXES) and not name.startswith("."):
                found.append(os.path.join(where, name))
            else:
                others += not name.startswith(".")
    return sorted(found), others


def read_split_file(path: Path, folder: Path, images: list[str]) -> list[np.ndarray]:
    """Reads the indices of the three splits. Each line of the file is `path,split`; paths are relative to the folder.

    Raises UserError unless every image has exactly one line, every line names an image, and every split has an image.
    """
    try:
        text = path.read_text(encoding="utf-8-sig", errors="surrogateescape")  # file names need not be UTF-8
    except OSError as error:
        raise UserError(f"data.split_file={path} cannot be read: {error.strerror}") from None
    position = {Path(image).relative_to(folder).as_posix(): i for i, image in enumerate(images)}
    parts = {name: [] for name in SPLITS}
    seen = set()
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        name, _, split = (text.strip() for text in line.rpartition(","))
        if split not in parts or name not in position or name in seen:
            why = f"{name!r} was named before" if name in seen else f"there is no picture {name!r} in {folder}"
            if split not in parts:
                why = f"{split!r} is no split; {', '.join(SPLITS)} are"
            raise UserError(f"{path}, line {number}: {why}; lines read 'path,split'")
        seen.add(name)
        parts[split].append(position[name])
    if missing := [name for name in position if name not in seen]:
        raise UserError(f"{path} has no line for {len(missing)} pictures, such as {printable(missing[0])}")
    if empty := [name for name, part in parts.items() if not part]:
        raise UserError(f"{path} puts no picture into {', '.join(empty)}")
    return [np.array(part) for part in parts.values()]


def printable(name: str) -> str:
    """The name of a file as text that any terminal can print. Bytes that are not UTF-8 become escape sequences."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")
