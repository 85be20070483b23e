"""A folder of pictures as a data source: a sub-folder for each class, or all in one place without labels."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from igpt.data.arrays import split_indices
from igpt.data.examples import EncodedImages, Source, Split
from igpt.data.images import Preprocess
from igpt.errors import UserError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp")
SPLITS = ("train", "validation", "test")
NO_CLASSES = {*SPLITS, "val", "valid", "testing", "training"}  # names of splits, rather


class Files(Sequence):
    """Paths, in the form in which EncodedImages reads them."""

    def __init__(self, paths: list[str]):
        self.paths = paths  # strings: a million Path objects take a gigabyte

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Path, str]:
        return Path(self.paths[index]), printable(self.paths[index])


def open_folder(
    folder: str, splits: str | tuple[float, float], split_seed: int, preprocess: Preprocess, channels: int, skip: bool
) -> Source:
    """Opens a folder. Classes are numbered by the sorted names of their sub-folders, images ordered by their paths.

    `splits`: the fractions for validation and test, or a text file with a line `path,train|validation|test` for every
    image, paths relative to the folder. Files with other endings than SUFFIXES are passed over, and their number told;
    hidden ones are none of the data.
    """
    paths, labels = list_images(Path(folder))
    if isinstance(splits, str):
        parts = read_split_file(Path(splits), Path(folder), paths)
    else:
        parts = split_indices(len(paths), splits, split_seed)
    made = []
    for part in parts:
        images = EncodedImages(Files([paths[i] for i in part]), preprocess, channels, skip)
        made.append(Split(images, None if labels is None else labels[part]))
    return Source(f"folder:{folder}", *made, channels)


def list_images(folder: Path) -> tuple[list[str], np.ndarray | None]:
    """Every picture of a folder, sorted by path, and where there are sub-folders its class, int32 [N]."""
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}")
    here, others = _pictures(folder, deep=False)
    classes = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    by_class = []
    for path in classes:
        pictures, more = _pictures(path, deep=True)
        by_class.append(pictures)
        others += more
    names = [printable(path.name) for path in classes]
    empty = [name for name, pictures in zip(names, by_class, strict=True) if not pictures]
    found = sum(map(len, by_class))
    if others:
        print(f"{folder}: passed over {others} files that are no pictures by their names, or links to folders")
    if here and found:
        raise UserError(
            f"{folder} has {len(here)} pictures of its own and {found} in sub-folders; sub-folders are classes, "
            "so that every picture must lie in one, or none"
        )
    if not here and not found:
        raise UserError(f"{folder} has no pictures: files ending in {', '.join(SUFFIXES)} are read")
    if here:
        return here, None
    if empty:
        raise UserError(f"{folder} has classes without pictures: {', '.join(empty[:10])}; remove or fill them")
    if {name.lower() for name in names} <= NO_CLASSES:
        raise UserError(
            f"the sub-folders of {folder} are {', '.join(names)}, which name splits; sub-folders are classes here: "
            f"open folder:{folder / classes[0].name}, or move the classes of all together and set data.split_file"
        )
    labels = np.repeat(np.arange(len(classes), dtype=np.int32), [len(pictures) for pictures in by_class])
    return [path for pictures in by_class for path in pictures], labels


def _pictures(folder: Path, deep: bool) -> tuple[list[str], int]:
    """The sorted paths of pictures, and how many other entries there are that are not hidden."""

    def refuse(error: OSError) -> None:
        raise UserError(f"{printable(error.filename)} cannot be listed: {error.strerror}; make it readable")

    found, others = [], 0
    for where, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if deep and not name.startswith(".")]
        others += sum(os.path.islink(os.path.join(where, name)) for name in folders)  # they might lead in a circle
        for name in names:
            if name.startswith("."):
                continue
            if name.lower().endswith(SUFFIXES):
                found.append(os.path.join(where, name))
            else:
                others += 1
    return sorted(found), others


def read_split_file(path: Path, folder: Path, images: list[str]) -> list[np.ndarray]:
    """The indices of train, validation and test. Every image has its line, and every line its image."""
    try:
        text = path.read_text(encoding="utf-8-sig", errors="surrogateescape")  # names of files are bytes
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
            why = (
                f"{split!r} is no split; {', '.join(SPLITS)} are"
                if split not in parts
                else f"{name!r} was named before"
                if name in seen
                else f"there is no picture {name!r} in {folder}"
            )
            raise UserError(f"{path}, line {number}: {why}; lines read 'path,split'")
        seen.add(name)
        parts[split].append(position[name])
    if missing := [name for name in position if name not in seen]:
        raise UserError(f"{path} has no line for {len(missing)} pictures, such as {printable(missing[0])}")
    if empty := [name for name, part in parts.items() if not part]:
        raise UserError(f"{path} puts no picture into {', '.join(empty)}")
    return [np.array(part) for part in parts.values()]


def printable(name: str) -> str:
    """A file's name as text that any terminal takes: bytes that are no UTF-8 as escapes."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")
