"""Prepares a data set of the hub that does not fit on the disk: reads it once, as a stream, and keeps tokens only.

`igpt prepare --stream` encodes the rows in their order, into OUT/stream/. Its splits are those of the same source
without --stream, so the shards are then written from these tokens like from any source. An interrupted stream
continues after the last rows that were saved.
"""

import contextlib
import functools
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from igpt.data.arrays import divide
from igpt.data.examples import DecodedTokens, Source, Split
from igpt.data.hf import PLACES, Data, content_of, label_numbers, load, parse
from igpt.data.images import Preprocess, UnreadableImage, decode
from igpt.data.settings import DataConfig
from igpt.errors import UserError, first_line
from igpt.files import read_json, write_json, write_text
from igpt.tokenizer import Tokenizer

AT_ONCE = 256  # most rows that are decoded and encoded at once
SAVE_EVERY = 4096  # rows between two saved states
PROGRESS, REASONS = "progress.json", "reasons.txt"


class Stream:
    """The rows of a data set in their order, read once. `counts` has the number of rows of each split."""

    def __init__(self, settings: DataConfig):
        kind, _, place = settings.source.partition(":")
        if kind != "hf":
            remedy = "leave it out: every source is read in parts"
            raise UserError(f"--stream is for hf:NAME, not for {settings.source}; {remedy}")
        where = parse(place)
        self.settings, self.data = settings, load(where, settings.source, streaming=True)
        if not where.folder and self.data.splits["train"].info.builder_name == "imagefolder":
            # Tried: the library streams such pictures in another order than it fetches them, and splits would differ.
            problem = f"{settings.source} is a repository of single pictures, which cannot be streamed in a fixed order"
            raise UserError(f"{problem}; leave --stream out, or take a data set of parquet files")
        self.folders, self.place = [os.path.join(os.path.abspath(where.folder), "")] if where.folder else [], where
        self.counts = {
            split: _count(part, split, self.data, settings.source) for split, part in self.data.splits.items()
        }
        self.starts = np.cumsum([0, *self.counts.values()])

    @property
    def total(self) -> int:
        return int(self.starts[-1])

    @functools.cached_property
    def parts(self) -> list[np.ndarray]:
        """The numbers of the training, validation and test rows, as without --stream."""
        own = {split: np.arange(*self.starts[i : i + 2]) for i, split in enumerate(self.counts)}
        return divide(own, self.settings)

    def fingerprint(self) -> str:
        """A digest of the numbers of rows, and of the commit of a data set of the hub."""
        known = {"rows": self.counts}
        if not self.place.folder:
            from huggingface_hub import HfApi

            revision = self.place.options.get("revision")
            try:
                known["commit"] = HfApi().dataset_info(self.place.name, revision=revision).sha
            except Exception as error:  # the library and the network raise exceptions of many types
                raise UserError(f"{self.settings.source} cannot be opened: {first_line(error)}; {PLACES}") from None
        return hashlib.sha256(json.dumps(known).encode()).hexdigest()

    def batches(
        self, split: str, first: int, state: dict | None, size: int
    ) -> Iterator[tuple[list, np.ndarray | None]]:
        """Yields at most `size` rows at a time, from row `first` on: their encoded images, or errors, and labels.

        `state` is the library's own state at that row, with which it need not read the rows before.
        """
        import datasets

        columns = [column for column in (self.data.image, self.data.label) if column]
        part, name = self.data.splits[split].select_columns(columns), self.settings.source
        if isinstance(part.features[self.data.image], datasets.Image):
            part = part.cast_column(self.data.image, datasets.Image(decode=False))
        part = part.with_format("arrow")
        self.streamed = part
        if state:
            part.load_state_dict(state)
        elif first:
            part = self.streamed = part.skip(first)
        row = first
        try:
            for table in part.iter(batch_size=size):
                images = table.column(self.data.image)
                contents = [self._content(images[i], f"{name} {split} row {row + i}") for i in range(table.num_rows)]
                label = self.data.label
                yield contents, label_numbers(table.column(label), self.data, name) if label else None
                row += table.num_rows
        except UserError:
            raise
        except Exception as error:  # the library and the network raise exceptions of many types
            problem = f"{name} {split} cannot be read after row {row}: {first_line(error)}"
            raise UserError(f"{problem}. What was read is kept: run the same command again to continue") from None

    def _content(self, value, name: str) -> tuple | UnreadableImage:
        try:
            return content_of(value, name, self.folders)
        except UnreadableImage as error:
            return error


def _count(part, split: str, data: Data, source: str) -> int:
    """The number of rows of a split: as the data set states it, or counted in a pass over its smallest column."""
    stated = (part.info.splits or {}).get(part.split if part.split is None else str(part.split))
    if stated is not None and stated.num_examples:
        return stated.num_examples
    print(f"{source} does not state how many rows {split} has: counting them")
    column = part.select_columns([data.label or data.image]).with_format("arrow")
    return sum(table.num_rows for table in column.iter(batch_size=1000))


class Staged:
    """What has been read of a stream: tokens uint16 [N, length], labels int32 [N], which images were readable.

    A line of reasons.txt has the number of a row and why it could not be read.
    """

    def __init__(self, folder: Path, stream: Stream, length: int):
        self.folder, self.stream = folder, stream
        self.kinds = {"tokens": (np.uint16, length), "readable": (np.uint8, 1), "labels": (np.int32, 1)}
        if stream.data.label is None:
            del self.kinds["labels"]

    def fill(self, tokenizer: Tokenizer, threads: int, advance) -> None:
        """Reads what is missing, and calls `advance` with numbers of rows. UserError if the stream has other rows."""
        self.folder.mkdir(exist_ok=True)
        path = self.folder / PROGRESS
        progress = read_json(path) if path.is_file() else {"done": 0, "state": None}
        advance(progress["done"])
        with contextlib.ExitStack() as stack:
            files = {kind: stack.enter_context(self._opened(kind, progress["done"])) for kind in self.kinds}
            reasons = stack.enter_context(self._opened_reasons(progress["done"]))
            pool = stack.enter_context(ThreadPoolExecutor(threads))
            for i, split in enumerate(self.stream.counts):
                self._fill_split(split, i, files, reasons, progress, tokenizer, pool, advance)

    def _opened(self, kind: str, done: int):
        """A file of the stage, cut to the rows that the saved state knows."""
        dtype, width = self.kinds[kind]
        file = (self.folder / f"{kind}.bin").open("ab")
        file.truncate(done * width * np.dtype(dtype).itemsize)
        return file

    def _reasons(self) -> dict[int, str]:
        """Why rows could not be read. A line that a kill cut off is passed over."""
        path = self.folder / REASONS
        lines = path.read_text("utf-8").splitlines(keepends=True) if path.is_file() else []
        parts = (line.rstrip("\n").partition("\t") for line in lines if line.endswith("\n"))
        return {int(row): reason for row, _, reason in parts}

    def _opened_reasons(self, done: int):
        """The file of reasons, cut to the rows that the saved state knows."""
        kept = {row: reason for row, reason in self._reasons().items() if row < done}
        write_text(self.folder / REASONS, "".join(f"{row}\t{reason}\n" for row, reason in kept.items()))
        return (self.folder / REASONS).open("a", encoding="utf-8", errors="backslashreplace")

    def _fill_split(
        self, split: str, i: int, files: dict, reasons, progress: dict, tokenizer: Tokenizer, pool, advance
    ) -> None:
        start, end = (int(row) for row in self.stream.starts[i : i + 2])
        if progress["done"] >= end:
            return
        settings, saved = self.stream.settings, progress["done"]
        height, width = settings.image_size
        size = max(1, min(AT_ONCE, (1 << 18) // (height * width)))
        for contents, labels in self.stream.batches(split, progress["done"] - start, progress["state"], size):
            images, readable = self._decoded(contents, progress["done"], reasons, pool)
            written = {
                "tokens": tokenizer.encode(images).reshape(len(images), -1),
                "readable": readable,
                "labels": labels,
            }
            for kind, file in files.items():
                file.write(np.ascontiguousarray(written[kind], self.kinds[kind][0]).data)
            progress["done"] += len(contents)
            advance(len(contents))
            if progress["done"] - saved >= SAVE_EVERY:
                self._save([*files.values(), reasons], progress | {"state": self.stream.streamed.state_dict()})
                saved = progress["done"]
        if progress["done"] != end:
            states = f"{settings.source} states {end - start:,} rows for {split}, but has {progress['done'] - start:,}"
            raise UserError(f"{states}; fetch it without --stream")
        progress["state"] = None
        self._save([*files.values(), reasons], progress)

    def _decoded(self, contents: list, first: int, reasons, pool) -> tuple[np.ndarray, np.ndarray]:
        """Images uint8 [n, H, W, 3], and whether each was readable. UserError at an unreadable one, unless skipped.

        `first` is the number of the first row. What could not be read is written to `reasons`.
        """
        settings = self.stream.settings
        preprocess = Preprocess.of(settings)

        def read(content):
            try:
                if isinstance(content, UnreadableImage):
                    return content
                return preprocess(decode(*content, settings.channels), None, content[1])
            except UnreadableImage as error:
                return error

        found = list(pool.map(read, contents))
        for i, image in enumerate(found):
            if isinstance(image, UnreadableImage):
                if settings.on_unreadable != "skip":
                    raise UserError(f"{image}. --on_unreadable=skip passes over such images")
                reasons.write(f"{first + i}\t{' '.join(str(image).split())}\n")
        blank = np.zeros((*settings.image_size, 3), np.uint8)
        readable = np.array([not isinstance(image, UnreadableImage) for image in found], np.uint8)
        return np.stack([image if ok else blank for image, ok in zip(found, readable, strict=True)]), readable

    def _save(self, files: list, progress: dict) -> None:
        for file in files:
            file.flush()
            os.fsync(file.fileno())
        write_json(self.folder / PROGRESS, progress)

    def source(self, tokenizer: Tokenizer) -> Source:
        """The rows that were read, as a source that gives their tokens."""
        shapes = {kind: (self.stream.total, width) for kind, (_, width) in self.kinds.items()}
        arrays = {
            kind: np.memmap(self.folder / f"{kind}.bin", dtype, "r", shape=shapes[kind])
            for kind, (dtype, _) in self.kinds.items()
        }
        reasons = self._reasons()
        splits = []
        for rows in self.stream.parts:
            images = StagedImages(arrays["tokens"], tokenizer, str(self.folder), self.stream.settings.image_size, rows)
            images.readable = arrays["readable"][:, 0]
            images.unreadable = {i: reasons[row] for i, row in enumerate(rows.tolist()) if row in reasons}
            labels = None if "labels" not in arrays else arrays["labels"][:, 0][rows]
            splits.append(StagedSplit(images, labels, may_lack_labels=True))
        settings, names = self.stream.settings, self.stream.data.class_names
        return Source(settings.source, *splits, settings.channels, tokenizer, names)

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


class StagedImages(DecodedTokens):
    """The rows `rows` of tokens in the order of the stream."""

    def __init__(self, tokens, tokenizer: Tokenizer, path: str, image_size: tuple[int, int], rows: np.ndarray):
        super().__init__(tokens, tokenizer, path, image_size)
        self.rows, self.shape = rows, (len(rows), *self.shape[1:])

    def grids(self, index) -> np.ndarray:
        return super().grids(self.rows[index])


class StagedSplit(Split):
    """A split of such rows. Its `encode` marks unreadable images with the index -1."""

    def encode(self, tokenizer, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        readable = self.images.readable[self.images.rows[indices]]
        return self.images.grids(indices), np.where(readable, indices, -1)
