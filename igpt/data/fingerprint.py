"""What tells the images of a source from others, without reading pictures: a run compares it when it resumes.

A folder is known by the paths and splits of its files and by the sizes of up to SIZED of them, arrays by their bytes,
tokens by their labels and SAMPLED rows of each split, a data set of tensorflow_datasets by its name, version and split,
one of Hugging Face by its numbers of rows and the bytes of some, scattered images by the small images, the options and
the backgrounds. Where the source lies does not matter.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator

import numpy as np

from igpt.data.examples import SPLITS, ArrayImages, DecodedTokens, EncodedImages, Images, Source
from igpt.data.scattered import ScatteredImages
from igpt.data.settings import SCATTER

SIZED = 10_000  # files of a folder whose sizes are looked up, which takes a second on a slow network file system
SAMPLED = 64  # rows of tokens that are read from each split
NAMED = 3  # files that a message names


def fingerprint(source: Source) -> dict:
    """The fingerprint of a source, as JSON: of each split the number of images and the digests of images and labels.

    "sizes" has the sizes of some files of a folder, in bytes, by relative path.
    """
    splits, sizes = {}, {}
    every = sum(map(len, source.splits().values())) // SIZED + 1
    for name, split in source.splits().items():
        images, labels = split.images, split.labels
        files = _relative_paths(images)
        sizes |= {file: _size(_root(images) + file) for file in files[::every]}
        splits[name] = {
            "images": len(split),
            "content": _digest(["\0".join(files)] if files else _content(images)),
            # Other labels are read from records, or there are none.
            "labels": _digest([labels]) if isinstance(labels, np.ndarray) else None,
        }
    return {"format": 1, "kind": source.name.partition(":")[0], "splits": splits, "sizes": sizes}


def digest_of(found: dict) -> str:
    """A fingerprint in 64 hexadecimal digits."""
    return hashlib.sha256(json.dumps(found).encode()).hexdigest()


def is_fingerprint(content: dict) -> bool:
    """Whether the content of a file can be a fingerprint of this format."""
    splits = content.get("splits")
    counts = [splits.get(name) for name in SPLITS] if isinstance(splits, dict) else [None]
    counted = all(isinstance(split, dict) and isinstance(split.get("images"), int) for split in counts)
    return counted and isinstance(content.get("sizes"), dict)


def file_splits(source: Source) -> dict[str, str]:
    """The split of every file of a folder, by its path relative to the folder. Empty for other sources."""
    return {file: name for name, split in source.splits().items() for file in _relative_paths(split.images)}


def split_lines(source: Source) -> str:
    """The lines "path,split" of all files of a folder, as data.split_file takes them. Empty for other sources."""
    return "".join(
        f"{file},{name}\n" for name, split in source.splits().items() for file in sorted(_relative_paths(split.images))
    )


def differences(there: dict, here: dict, files_there: dict[str, str], files_here: dict[str, str]) -> list[str]:
    """Describes how the images of two fingerprints differ, each with its `file_splits`. Empty if they do not."""
    if there == here:
        return []
    if there.get("kind") != here["kind"]:
        return [f"the source was of the kind {there.get('kind')}, and is {here['kind']}"]
    if files_there and files_here:
        found = list(_of_files(there["sizes"], here["sizes"], files_there, files_here))
    else:
        found = list(_of_splits(there["splits"], here["splits"]))
    return found or ["the images are the same, but in another order"]


def _content(images: Images) -> Iterable:
    match images:
        case ScatteredImages():
            options = {name: getattr(images.settings, name) for name in SCATTER}
            options["scatter_background"] = ""  # the pictures tell; where they lie does not matter
            own = [repr((sorted(options.items()), images.shape, images.key)), images.rows]
            pictures = [] if images.backgrounds is None else [images.backgrounds]
            return [*_content(images.small), *own, *pictures]
        case ArrayImages():
            return [np.array(images.shape), images.array]
        case DecodedTokens():
            rows = np.linspace(0, len(images) - 1, SAMPLED).astype(int)
            return [images.tokenizer.content, images.tokens[rows].astype(np.int64)]
        case EncodedImages() if hasattr(images.files, "identity"):
            return [images.files.identity, np.asarray(images.indices, np.int64)]
        case EncodedImages():  # arrays with names for messages
            return (images.files[i][0] for i in images.indices)
    return []


def _digest(parts: Iterable) -> str:
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, str):
            digest.update(part.encode("utf-8", "surrogateescape"))
        else:
            digest.update(np.ascontiguousarray(part).reshape(-1).view(np.uint8))
    return digest.hexdigest()


def _root(images: Images) -> str | None:
    """The folder of the image files, ending in a separator. None if the images are no files in a folder."""
    return getattr(getattr(images, "files", None), "root", None)


def _relative_paths(images: Images) -> list[str]:
    """The paths of image files relative to their folder, in the order of the images. Empty for other sources."""
    root = _root(images)
    return [] if root is None else [images.files.paths[i].removeprefix(root) for i in images.indices]


def _size(path: str) -> int:
    """The size of a file in bytes; -1 if it is gone, which its reader reports."""
    try:
        return os.stat(path).st_size
    except OSError:
        return -1


def _of_files(sizes_there: dict, sizes_here: dict, there: dict[str, str], here: dict[str, str]) -> Iterator[str]:
    added, removed = sorted(here.keys() - there.keys()), sorted(there.keys() - here.keys())
    for what, files in (("added", added), ("removed", removed)):
        if files:
            yield f"{_count(files, 'file')} {what}: {_some(files)}"
    classes_there, classes_here = (sorted({file.rpartition("/")[0] for file in files}) for files in (there, here))
    for what, these, those in (("new", classes_here, classes_there), ("missing", classes_there, classes_here)):
        if names := [name for name in these if name not in those]:
            yield f"{_count(names, 'folder')} {what}: {_some(names)}, so labels may have other numbers"
    both = there.keys() & here.keys()
    if moved := sorted(file for file in both if there[file] != here[file]):
        learned = sum(here[file] == "train" for file in moved)
        text = f"{_count(moved, 'old file')} in another split; {learned:,} of them were held out, and would be learned"
        yield text + (". A random split is drawn anew when the number of files changes" if added or removed else "")
    if resized := sorted(file for file, size in sizes_here.items() if sizes_there.get(file, size) != size):
        yield f"{_count(resized, 'file')} of another size: {_some(resized)}"


def _of_splits(there: dict, here: dict) -> Iterator[str]:
    for name in SPLITS:
        before, now = there.get(name, {}), here[name]
        if before.get("images") != now["images"]:
            yield f"{name}: {before.get('images'):,} images there, {now['images']:,} here"
        elif before != now:
            yield f"{name}: other " + " and ".join(
                {"content": "images, or another split", "labels": "labels"}[part]
                for part in ("content", "labels")
                if before.get(part) != now[part]
            )


def _count(things: list, name: str) -> str:
    return f"{len(things):,} {name}{'s' * (len(things) != 1)}"


def _some(names: list[str]) -> str:
    return ", ".join(names[:NAMED]) + (", ..." if len(names) > NAMED else "")
