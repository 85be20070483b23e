"""A folder of pictures as a data source: a sub-folder for each class, or all pictures in one folder without labels.

Sub-folders called train, val, test or alike are splits, and hold classes or pictures in turn.
"""

import os
import re
import unicodedata
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np

from igpt.data.arrays import divide
from igpt.data.classes import distinct_names, listed
from igpt.data.examples import SPLITS, EncodedImages, Source, Split
from igpt.data.images import Preprocess
from igpt.data.settings import DataConfig
from igpt.errors import UserError

SUFFIXES = (".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".pjpeg", ".pjp", ".webp", ".gif", ".bmp", ".tif", ".tiff")
SPLIT_NAME = re.compile(  # matches test, test1, testA, test_set and seg_test, but not tester or contest
    r"(?:.*[_.-])?(?:(?P<train>train|training)|(?P<validation>val|valid|validation)|(?P<test>test|testing))(?:[^a-z].*)?",
    re.DOTALL,
)
SYSTEM_FOLDERS = {  # thumbnails, bins and copies that NAS boxes, operating systems and archives put beside pictures
    *("@eadir", "@__thumb", "@recycle", "#recycle", "#snapshot", "@recently-snapshot", "@tmp"),
    *("$recycle.bin", "system volume information", "lost+found", "__macosx"),
}


class ImagePaths:
    """Paths of image files in a folder and their names for messages. EncodedImages takes them as `files`."""

    def __init__(self, paths: list[str], folder: str | Path):
        self.paths = paths  # strings, because a million Path objects take a gigabyte
        self.root = os.path.join(Path(folder), "")  # a path without it is relative to the folder

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int | np.integer) -> tuple[Path, str]:
        return Path(self.paths[index]), printable(self.paths[index])


class Listing(NamedTuple):
    """The pictures of a folder: paths [N], classes int32 [N] and their names, and the indices that each split has.

    Without sub-folders for classes, `labels` and `class_names` are None. Without sub-folders for splits, all indices
    are of "train".
    """

    paths: list[str]
    labels: np.ndarray | None
    class_names: tuple[str, ...] | None
    splits: dict[str, np.ndarray]


def open_folder(folder: str, settings: DataConfig, whole: bool = False) -> Source:
    """Opens a folder of pictures. Images are sorted by path, and classes are numbered in the order of their names.

    Splits images by `settings.split_file`, by sub-folders that name splits, or at random. With `whole`, all images are
    test images. Says what it passes over. UserError if folder or file is invalid.
    """
    paths, labels, class_names, splits = list_images(Path(folder), bool(settings.split_file))
    if settings.split_file and not whole:
        parts = read_split_file(Path(settings.split_file), Path(folder), paths)
    elif "train" in splits or whole:
        parts = divide(splits, settings, whole)
    else:
        raise UserError(
            f"the sub-folders of {folder} are splits, {', '.join(splits)}, and none of them is train; add it, or open "
            "one of them as a folder of its own"
        )
    preprocess, skip = Preprocess.of(settings), settings.on_unreadable == "skip"
    images = EncodedImages(ImagePaths(paths, folder), preprocess, settings.channels, skip)
    taken = map(Split(images, labels).take, parts)
    return Source(settings.source, *taken, settings.channels, class_names=class_names)


def list_images(folder: Path, has_split_file: bool = False) -> Listing:
    """Lists the pictures of a folder, sorted by path. Prints which folders are splits, and what it passes over.

    Raises UserError for no pictures, and for sub-folders that can be read in two ways.
    """
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}")
    passed = PassedOver(folder)
    here, names = _pictures(folder, passed, deep=False)
    kinds = {name: split for name in names if (split := split_named(name))}
    found = {name: _pictures(folder / name, passed) for name in names if name not in kinds}
    if len(set(kinds.values())) > 1 or len(names) == len(kinds) > 0:
        if others := [name for name, (pictures, _) in found.items() if pictures] or here:
            raise UserError(
                f"{folder} has sub-folders that name splits ({listed([*kinds])}), but also other pictures, such as in "
                f"{printable(others[0])}; put every class into the splits, or rename the splits"
            )
        return _of_splits(folder, kinds, passed)
    found |= {name: _pictures(folder / name, passed) for name in kinds}
    passed.report()
    if not has_split_file:
        _refuse_inner_splits(folder, {name: inside for name, (_, inside) in found.items()})
    return _of_classes(folder, here, {name: found[name][0] for name in names})


def _of_splits(folder: Path, kinds: dict[str, str], passed: "PassedOver") -> Listing:
    """Lists the pictures of sub-folders, whose splits are `kinds`. A class has the same number in all splits.

    A sub-folder without classes is passed over if the training images have classes. Raises UserError if another split
    has a class that the training images lack.
    """
    parts = {}
    for name in kinds:
        here, names = _pictures(folder / name, passed, deep=False)
        classes = {inner: _pictures(folder / name / inner, passed)[0] for inner in names}
        parts[name] = _of_classes(folder / name, here, classes)
    passed.report()
    trained = [part for name, part in parts.items() if kinds[name] == "train"] or [*parts.values()]
    known = sorted({name for part in trained for name in part.class_names or ()})
    for name in [name for name, part in parts.items() if known and part.labels is None]:
        del parts[name]
        print(f"{folder}: passed over {name}, which has no classes")
    number = {name: i for i, name in enumerate(known)}
    paths, labels, splits = [], [], {}
    for name, part in parts.items():
        if unknown := [inner for inner in part.class_names or () if known and inner not in number]:
            raise UserError(
                f"{folder / name} has classes that the training images lack: {listed(unknown)}. Its classes are "
                f"{listed(part.class_names)}, those of training {listed(known)}; rename or remove them"
            )
        splits.setdefault(kinds[name], []).append(np.arange(len(paths), len(paths) + len(part.paths)))
        paths += part.paths
        if known:
            labels.append(np.array([number[inner] for inner in part.class_names], np.int32)[part.labels])
    counts = ", ".join(f"{name} has {len(part.paths):,} images for {kinds[name]}" for name, part in parts.items())
    print(f"{folder}: its sub-folders are splits, not classes: {counts}")
    splits = {split: np.concatenate(indices) for split, indices in splits.items()}
    return Listing(paths, np.concatenate(labels) if known else None, tuple(known) or None, splits)


def _of_classes(folder: Path, here: list[str], classes: dict[str, list[str]]) -> Listing:
    """Lists the pictures of a folder: those that lie in it, or those of its sub-folders, which are classes."""
    counts = [len(pictures) for pictures in classes.values()]
    if here and sum(counts):
        raise UserError(
            f"{folder} has {len(here)} pictures of its own and {sum(counts)} in sub-folders; sub-folders are classes, "
            "so that every picture must lie in one, or none"
        )
    if not here and not sum(counts):
        raise UserError(f"{folder} has no pictures: only files ending in {', '.join(SUFFIXES)} are read")
    if here:
        return Listing(here, None, None, {"train": np.arange(len(here))})
    names = distinct_names(map(printable, classes), printable(str(folder)))
    if empty := [name for name, count in zip(names, counts, strict=True) if not count]:
        raise UserError(f"{folder} has classes without pictures: {', '.join(empty[:10])}; remove or fill them")
    labels = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
    paths = [path for pictures in classes.values() for path in pictures]
    return Listing(paths, labels, names, {"train": np.arange(len(paths))})


def split_named(name: str) -> str | None:
    """The split that the name of a folder stands for, or None."""
    # As it is written, for testA and testB; in lower case, for TEST.
    match = SPLIT_NAME.fullmatch(name) or SPLIT_NAME.fullmatch(name.lower())
    return match and match.lastgroup


def _refuse_inner_splits(folder: Path, classes: dict[str, list[str]]) -> None:
    """Raises UserError if a class has folders inside that name splits, since test images would be trained on."""
    for name, inside in classes.items():
        if len({split_named(inner) for inner in inside} - {None}) > 1:
            where = printable(str(folder / name))
            remedy = f"open folder:{where}" if len(classes) == 1 else "put the classes into the splits"
            raise UserError(
                f"the sub-folders of {where} name splits ({listed(inside)}), but here they would be one class; "
                f"{remedy}, or set data.split_file"
            )


class PassedOver:
    """Counts the entries of a folder that are not read, by their kind, and keeps an example of each."""

    def __init__(self, folder: Path):
        self.folder, self.counts, self.examples = folder, Counter(), {}

    def add(self, kind: str, where: str, name: str) -> None:
        self.counts[kind] += 1
        if kind not in self.examples:
            self.examples[kind] = os.path.relpath(os.path.join(where, name), self.folder)

    def report(self) -> None:
        """Prints one line, if anything was passed over."""
        kinds = [f"{n} {kind} (such as {printable(self.examples[kind])})" for kind, n in self.counts.items()]
        if kinds:
            print(f"{printable(str(self.folder))}: passed over {', '.join(kinds)}")


def _pictures(folder: Path, passed: PassedOver, deep: bool = True) -> tuple[list[str], list[str]]:
    """The sorted paths of pictures, with `deep` also those inside of sub-folders, and the names of its sub-folders."""

    def fail(error: OSError) -> None:
        raise UserError(f"{printable(error.filename)} cannot be listed: {error.strerror}; make it readable")

    found, inside = [], None
    for where, folders, names in os.walk(folder, onerror=fail):
        for name in folders.copy():
            hidden = name.startswith(".")
            if hidden or name.lower() in SYSTEM_FOLDERS:
                passed.add("hidden" if hidden else "of the system or thumbnails", where, name)
                folders.remove(name)
            elif deep and os.path.islink(os.path.join(where, name)):  # not followed: links can form cycles
                passed.add("linked inside of a class", where, name)
        inside = sorted(folders) if inside is None else inside
        if not deep:
            folders.clear()
        for name in names:
            if name.startswith("."):
                passed.add("hidden", where, name)
            elif name.lower().endswith(SUFFIXES):
                found.append(os.path.join(where, name))
            else:
                passed.add("no pictures by name", where, name)
    return sorted(found), inside or []


def read_split_file(path: Path, folder: Path, images: list[str]) -> list[np.ndarray]:
    """Reads the indices of the three splits. Each line of the file is `path,split`; paths are relative to the folder.

    Raises UserError unless every image has exactly one line, every line names an image, and every split has an image.
    """
    try:
        text = path.read_text(encoding="utf-8-sig", errors="surrogateescape")  # file names need not be UTF-8
    except OSError as error:
        raise UserError(f"data.split_file={path} cannot be read: {error.strerror}") from None
    position = {Path(image).relative_to(folder).as_posix(): i for i, image in enumerate(images)}
    composed = {unicodedata.normalize("NFC", name): name for name in position}  # macOS decomposes names, others do not
    parts = {name: [] for name in SPLITS}
    seen = set()
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        name, _, split = line.rpartition(",")
        name, split = name if name in position else name.strip(), split.strip()
        if name not in position:
            name = composed.get(unicodedata.normalize("NFC", name), name)
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
