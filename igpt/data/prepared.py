"""The source `tokens:DIR`: tokens that `igpt prepare` wrote, memory-mapped from disk."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from igpt.data.arrays import map_array
from igpt.data.classes import read_names
from igpt.data.examples import SPLITS, DecodedTokens, Source, Split
from igpt.errors import UserError
from igpt.files import read_json
from igpt.tokenizer import load_tokenizer

PLAN = "prepared.json"
MAY_LACK_LABELS = ("hf:", "tfds:", "tokens:")  # sources whose label -1 marks an image without a label


class Shards:
    """Concatenates the rows of arrays of the same width without a copy. Indexing copies only the requested rows."""

    def __init__(self, parts: Sequence[np.ndarray]):
        self.parts = [part.view(np.ndarray) for part in parts]  # indexing an np.memmap takes longer than reading it
        self.starts = np.cumsum([0, *map(len, parts)])
        self.rows = np.arange(self.starts[-1])
        self.shape = (int(self.starts[-1]), *parts[0].shape[1:])

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index) -> np.ndarray:
        index = self.rows[index]  # converts slices to arrays, and raises IndexError if out of bounds
        part = np.searchsorted(self.starts, index, side="right") - 1
        within = index - self.starts[part]
        if not index.ndim:
            return self.parts[part][within]
        rows = np.empty((*index.shape, *self.shape[1:]), self.parts[0].dtype)
        for row, which, where in zip(rows, part.tolist(), within.tolist(), strict=True):
            row[...] = self.parts[which][where]
        return rows


def open_prepared(folder: str) -> Source:
    """Opens the source `tokens:DIR` without reading its tokens. UserError if the directory is incomplete or damaged."""
    directory = Path(folder)
    if not (directory / PLAN).is_file():
        raise UserError(f"{folder} is no prepared directory: it has no {PLAN}; make one with igpt prepare")
    plan = read_json(directory / PLAN)
    _check_plan(plan, directory / PLAN)
    tokenizer = load_tokenizer(directory)
    if plan["palette_sha256"] != tokenizer.digest:
        problem = f"{tokenizer.file} is not the {tokenizer.kind} that the tokens were made with"
        raise UserError(f"{folder}: {problem}; prepare it again")
    class_names = read_names(plan, directory / PLAN)
    may_lack_labels = plan["data"].get("source", "").startswith(MAY_LACK_LABELS)
    splits = []
    for name in SPLITS:
        numbers = range(count_shards(plan, name))
        for i in numbers:
            if not shard_path(directory, name, i, "tokens").is_file():
                what = f"shard {i + 1} of {len(numbers)} of {name} is missing"
                raise UserError(f"{folder} is unfinished: {what}; run the command that prepares it again to continue")
        shards = [map_shard(directory, name, i, plan) for i in numbers]
        tokens = Shards([tokens for tokens, _ in shards])
        labels = np.concatenate([labels for _, labels in shards]) if plan["labels"] else None
        images = DecodedTokens(tokens, tokenizer, folder, tuple(plan["data"]["image_size"]))
        splits.append(Split(images, labels, may_lack_labels))
    return Source(f"tokens:{folder}", *splits, plan["data"]["channels"], tokenizer, class_names)


def _check_plan(plan: dict, path: Path) -> None:
    """Raises UserError if `igpt prepare` cannot have written this prepared.json."""
    data, images = plan.get("data"), plan.get("images")
    data = data if isinstance(data, dict) else {}
    size = data.get("image_size")
    counts = [plan.get("shard_images")]
    for sides in (size, plan.get("grid", size)):
        counts += sides if isinstance(sides, list) and len(sides) == 2 else [None]
    counts += [images.get(name) for name in SPLITS] if isinstance(images, dict) else [None]
    whole = all(isinstance(count, int) and not isinstance(count, bool) and count > 0 for count in counts)
    whole = whole and isinstance(plan.get("labels"), bool)
    whole = whole and all(isinstance(text, str) for text in (plan.get("palette_sha256"), data.get("source", "")))
    if plan.get("format") != 1 or not whole or data.get("channels") not in (1, 3):
        raise UserError(f"{path} is damaged or not ours; prepare it again")


def map_shard(folder: Path, name: str, number: int, plan: dict) -> tuple[np.ndarray, np.ndarray | None]:
    """Maps a shard's tokens uint16 [n, T] and labels int32 [n]. Raises UserError unless they match the plan."""
    again = "run the command that prepared it again, which rewrites the shard"

    def mapped(kind: str, dtype: type, row: tuple[int, ...], least: int, most: int) -> np.ndarray:
        path = shard_path(folder, name, number, kind)
        try:
            array = map_array(str(path))
        except UserError as error:
            raise UserError(f"{str(error).removesuffix('; fetch it again')}; {again}") from None
        if array.dtype != dtype or array.shape[1:] != row or not array.ndim or not least <= len(array) <= most:
            count = ", ".join(map(str, (most if least else f"up to {most}", *row)))
            found = f"{array.dtype} {list(array.shape)}"
            raise UserError(f"{path} is {found}; {np.dtype(dtype)} [{count}] is needed: {again}")
        return array

    most = len(shard_rows(plan, name, number))
    skips = plan["data"].get("on_unreadable") == "skip"  # that of the last command; an earlier one may have skipped
    least = 0 if skips or unreadable_path(folder, name, number).exists() else most
    tokens = mapped("tokens", np.uint16, (math.prod(grid_of(plan)),), least, most)
    if not plan["labels"]:
        return tokens, None
    labels = mapped("labels", np.int32, (), len(tokens), len(tokens))
    classes = len(plan.get("class_names") or ())
    if classes and len(labels) and not -1 <= labels.min() <= labels.max() < classes:
        path, found = shard_path(folder, name, number, "labels"), f"labels from {labels.min()} to {labels.max()}"
        raise UserError(f"{path} has {found}; it has {classes} classes, 0 to {classes - 1}: {again}")
    return tokens, labels


def grid_of(plan: dict) -> list[int]:
    """The rows and columns of an image's tokens. The plan has them if they are not those of its pixels."""
    return plan.get("grid", plan["data"]["image_size"])


def count_shards(plan: dict, name: str) -> int:
    return -(-plan["images"][name] // plan["shard_images"])


def shard_rows(plan: dict, name: str, number: int) -> range:
    """The indices of a shard's images in the split, including images that cannot be read."""
    start = number * plan["shard_images"]
    return range(start, min(start + plan["shard_images"], plan["images"][name]))


def shard_path(folder: Path, split: str, number: int, kind: str) -> Path:
    return folder / f"{split}-{number:05d}.{kind}.npy"


def unreadable_path(folder: Path, split: str, number: int) -> Path:
    """The list of a shard's images that could not be read. There is no such file if all could."""
    return shard_path(folder, split, number, "unreadable").with_suffix(".txt")
