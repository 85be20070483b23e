"""Class names: what class i of a source or of a model is called, and how the labels of two sources meet."""

import dataclasses
import json
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np

from igpt.data.examples import Source
from igpt.errors import UserError
from igpt.files import AnyPath, read_json, write_text

FILE = "classes.json"  # in the directory of a run with a classifier: {"class_names": [name of class 0, ...]}
SHOWN = 20  # names that a message lists


def distinct_names(names: Iterable[str], whose: str) -> tuple[str, ...]:
    """Class names in Unicode's composed form, NFC. Raises UserError, which begins with `whose`, for two equal names.

    File systems write "é" as one character or as two. The composed form makes both the same name.
    """
    plain = (name.encode("utf-8", "backslashreplace").decode("utf-8") for name in names)
    names = tuple(unicodedata.normalize("NFC", name) for name in plain)
    name, count = max(Counter(names).items(), key=lambda item: item[1], default=("", 0))
    if count > 1:
        raise UserError(f"{whose} has {count} classes of the name {name!r}; rename them, or make them one")
    return names


def full_names(names: Sequence[str] | None, count: int) -> tuple[str, ...]:
    """The names of `count` classes. A class without a name is called by its number."""
    names = tuple(names or ())[:count]
    return names + tuple(str(i) for i in range(len(names), count))


def listed(names: Sequence[str]) -> str:
    """The names in one line, only the first SHOWN of them if there are more."""
    shown = ", ".join(names[:SHOWN])
    return shown if len(names) <= SHOWN else f"{shown}, ... ({len(names)} in all)"


def with_classes(source: Source, names: Sequence[str] | None, whose: str | AnyPath) -> Source:
    """The source with its labels in the numbering of a model, whose class i is `names[i]`. Classes meet by name.

    Where the model or the source has no names, numbers meet numbers. The source may have fewer classes than the model.
    Raises UserError, with both lists, if it has a class that the model `whose` does not know.
    """
    if source.train.labels is None or names is None:
        return source
    if source.class_names not in (None, tuple(names)):
        number = {name: i for i, name in enumerate(names)}
        if unknown := [name for name in source.class_names if name not in number]:
            raise UserError(
                f"{whose} does not know {len(unknown)} classes of {source.name}: {listed(unknown)}. It has the classes "
                f"{listed(names)}; {source.name} has {listed(source.class_names)}. Rename or remove classes, or use "
                "another model"
            )
        table = np.array([*(number[name] for name in source.class_names), -1], np.int32)  # -1: an image without label
        splits = {name: split.renumbered(table) for name, split in source.splits().items()}
        source = dataclasses.replace(source, **splits)
    return dataclasses.replace(source, class_names=tuple(names))


def class_counts(source: Source) -> str:
    """The classes of a source with the number of images of each, in one line, shortened if there are many.

    Images without a label are counted after the classes. Without numbers of images if the labels must be read from the
    images. Empty for a source without labels.
    """
    splits = [split for split in source.splits().values() if split.labels is not None and len(split)]
    labels = [split.labels for split in splits]
    if not labels:
        return ""
    if not all(isinstance(part, np.ndarray) for part in labels):
        return listed(source.class_names) if source.class_names else "known by number"
    found, counts = np.unique(np.concatenate(labels), return_counts=True)
    known = dict(enumerate(source.class_names or ()))
    images = dict.fromkeys(known, 0) | dict(zip(found.tolist(), counts.tolist(), strict=True))
    missing = images.pop(-1, 0) if splits[0].may_lack_labels else 0
    each = [f"{known.get(label, label)}: {images[label]}" for label in sorted(images)]
    if len(each) > SHOWN:
        each = [*each[:3], "...", f"{each[-1]}; {min(images.values())} to {max(images.values())} images each"]
    return f"{len(images)} ({', '.join(each)})" + (f", {missing} images without a label" if missing else "")


def save_names(names: Sequence[str], workdir: AnyPath) -> None:
    """Writes the class names of a run's classifier to workdir/classes.json."""
    write_text(workdir / FILE, json.dumps({"class_names": list(names)}, indent=1, ensure_ascii=False) + "\n")


def load_names(workdir: AnyPath) -> tuple[str, ...] | None:
    """The class names of a run's classifier, or None if it has none. Raises UserError if the file is damaged."""
    path = workdir / FILE
    return read_names(read_json(path), path) if path.is_file() else None


def read_names(content: dict, path: AnyPath) -> tuple[str, ...] | None:
    """The entry "class_names" of a JSON file, or None if there is none. Raises UserError unless it is a list."""
    names = content.get("class_names")
    if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise UserError(f"{path} is damaged: 'class_names' is no list of names; repair it, or delete the file")
    return None if names is None else distinct_names(names, str(path))
