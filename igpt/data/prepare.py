"""Writes any source once as tokens, two bytes each. Training then maps the tokens from disk.

    igpt prepare --source=folder:photos --size=32 --palette=palette.npy --out=photos-32
    igpt prepare --source=folder:photos --size=32 --tokenizer=runs/photos-vqvae --out=photos-codes
    python train.py --config.data.source=tokens:photos-32 ...

A prepared directory contains prepared.json (what was prepared, and how), palette.npy or vqvae.safetensors, and the
shards of each split: SPLIT-00000.tokens.npy uint16 [n, T] and, if the source has labels, SPLIT-00000.labels.npy int32
[n]. The file SPLIT-00000.unreadable.txt lists skipped images. After an interruption, the same command writes only the
missing shards, also with --on_unreadable=skip after an image that could not be read.
Images are preprocessed as for evaluation: --preprocess=crop takes the centre, never a random crop.
"""

import argparse
import contextlib
import functools
import io
import json
import math
import multiprocessing
import os
import shlex
import signal
import threading
from concurrent import futures
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
from tqdm import tqdm

from igpt.command import Parser, at_least
from igpt.data.classes import class_counts
from igpt.data.examples import SPLITS, ArrayImages, Source
from igpt.data.fingerprint import digest_of, fingerprint
from igpt.data.prepared import (
    PLAN,
    count_shards,
    grid_of,
    map_shard,
    open_prepared,
    shard_path,
    shard_rows,
    unreadable_path,
)
from igpt.data.settings import DataConfig
from igpt.data.sources import add_source_arguments, load_source, open_source, source_settings
from igpt.errors import UserError
from igpt.files import check_workdir, is_bucket, read_json, whole, write_array, write_json, write_text
from igpt.lock import Lock, lock_files
from igpt.progress import progress_bar
from igpt.tokenizer import Tokenizer, find_tokenizer, load_tokenizer

FREE = ("data.on_unreadable", "data.data_dir")  # may differ when a command goes on: finished shards stay valid
PIXELS_AT_ONCE = 1 << 18  # pixels of images that a process holds in memory: 256 images of 32 x 32


def prepare(
    settings: dict, tokenizer_path: str, out: str, shard_images: int = 8192, workers: int = 1, stream: bool = False
) -> dict:
    """Writes a source to `out`. `settings` are fields of DataConfig. Returns the images per split and "unreadable".

    With `stream`, a source hf:NAME is read once, in its order, and its images are never kept.
    Raises UserError if `out` contains anything other than this source prepared in the same way: nothing is overwritten.
    Raises InUseError if another program prepares `out`.
    """
    if is_bucket(out):
        raise UserError(f"--out={out} is a bucket; write to a local or mounted path, and copy it")
    tokenizer, folder = find_tokenizer(tokenizer_path), Path(out)
    if stream:
        from igpt.data.hf_stream import Stream

        rows = Stream(DataConfig.of(settings))
        images = dict(zip(SPLITS, map(len, rows.parts), strict=True))
        labelled = rows.data.label is not None
        class_names = rows.data.class_names
        digest = rows.fingerprint()
    else:
        source = open_source(settings, is_command=True)
        images = {name: len(split) for name, split in source.splits().items()}
        labelled = source.train.labels is not None
        class_names = source.class_names
        digest = digest_of(fingerprint(source))
    plan = {
        "format": 1,
        "data": json.loads(json.dumps(settings)),
        "palette_sha256": tokenizer.digest,
        "vocab_size": tokenizer.vocab_size,
        "shard_images": shard_images,
        "images": images,
        "labels": labelled,
        "images_sha256": digest,
    } | ({"class_names": list(class_names)} if class_names else {})
    plan |= {"stream": True} if stream else {}
    if (grid := list(tokenizer.grid(*plan["data"]["image_size"]))) != plan["data"]["image_size"]:
        plan["grid"] = grid
    if folder.is_file():
        raise UserError(f"--out={folder} is a file; name a new directory")
    check_workdir(folder, "--out")
    with Lock(folder, frees_at_sigterm=True):
        try:
            _begin(folder, plan, tokenizer)
        except OSError as error:
            raise UserError(f"--out={out} cannot be written: {error.strerror}; name another place") from None
        if stream:
            _write_streamed(rows, tokenizer, plan, folder, workers)
        else:
            _write_missing(source, tokenizer, plan, folder, workers)
    total = sum(plan["images"].values())
    return plan["images"] | {"unreadable": total - sum(map(len, open_prepared(out).splits().values()))}


def _write_missing(source: Source, tokenizer: Tokenizer, plan: dict, folder: Path, workers: int) -> None:
    """Writes the shards that are missing, with a progress bar over the images."""
    shards = [(name, number) for name in SPLITS for number in range(count_shards(plan, name))]
    missing = [shard for shard in shards if not _is_finished(folder, *shard, plan)]
    total, left = sum(plan["images"].values()), sum(len(shard_rows(plan, *shard)) for shard in missing)
    # One process encodes images in memory quickly, and each further process would need its own copy of them.
    is_fast = isinstance(source.train.images, ArrayImages) or tokenizer.uses_all_cores
    workers = 1 if is_fast else min(workers, len(missing))
    with progress_bar(total=total, initial=total - left, unit="image", smoothing=0.1) as bar:
        if workers > 1:
            _write_in_processes(missing, workers, bar, folder)
        else:
            for shard in missing:
                _write_shard(source, tokenizer, plan, folder, *shard, bar.update)


def _write_streamed(rows, tokenizer: Tokenizer, plan: dict, folder: Path, threads: int) -> None:
    """Reads a stream into folder/stream, writes the shards from there, and removes it; nothing if all are there."""
    from igpt.data.hf_stream import Staged

    staged = Staged(folder / "stream", rows, math.prod(grid_of(plan)))
    if all(_is_finished(folder, name, i, plan) for name in SPLITS for i in range(count_shards(plan, name))):
        staged.remove()  # an earlier command may have been killed before it did
        return
    try:
        with progress_bar(total=rows.total, unit="image", smoothing=0.1, desc="read") as bar:
            staged.fill(tokenizer, threads, bar.update)
    except OSError as error:
        problem = f"{staged.folder} cannot be written: {error.strerror or error}"
        raise UserError(f"{problem}. What was read stays: make room, and run the same command again") from None
    _write_missing(staged.source(tokenizer), tokenizer, plan, folder, workers=1)
    staged.remove()


def _begin(folder: Path, plan: dict, tokenizer: Tokenizer) -> None:
    """Writes the plan into a directory that is empty or has the same plan, but for FREE fields.

    Raises UserError if it has another plan, or other files and no plan.
    """
    there = plan
    if not {path for path in folder.iterdir() if path not in lock_files(folder)} <= {folder / f"{PLAN}.partial"}:
        if not (folder / PLAN).is_file():
            raise UserError(f"--out={folder} exists and is no prepared directory; name a new one")
        there = read_json(folder / PLAN)
    ours, theirs, images = _flat(plan), _flat(there), "images_sha256"
    # The digest tells whether the images are the same, but that of a stream knows only how many they are.
    free = (*FREE, *(["data.source"] if images in theirs and "stream" not in plan else []))
    theirs = {images: ours[images]} | theirs  # plans of earlier versions have no digest
    if "class_names" not in theirs:  # written by an earlier version, without names; its labels are the same
        ours.pop("class_names", None)
    differing = [name for name in sorted(ours | theirs) if name not in free and ours.get(name) != theirs.get(name)]
    if differing:
        fields = [name for name in differing if name != images]
        what = "; ".join(f"{name} is {theirs.get(name)!r} there, {ours.get(name)!r} here" for name in fields)
        what = what or "its images have changed since"
        raise UserError(f"--out={folder} was prepared otherwise: {what}. Name a new directory, or delete this one")
    if there is plan or there["data"] != plan["data"]:  # workers read the settings from there
        write_json(folder / PLAN, there | {"data": plan["data"]})
    tokenizer.save(folder / tokenizer.file)


def _flat(plan: dict) -> dict:
    return {
        f"{name}.{field}" if isinstance(value, dict) else name: inner
        for name, value in plan.items()
        for field, inner in (value if isinstance(value, dict) else {"": value}).items()
    }


def _is_finished(folder: Path, name: str, number: int, plan: dict) -> bool:
    with contextlib.suppress(UserError):  # raised for a shard that is missing or damaged
        map_shard(folder, name, number, plan)
        return True
    return False


def _write_shard(
    source: Source, tokenizer: Tokenizer, plan: dict, folder: Path, name: str, number: int, advance
) -> None:
    """Writes one complete shard, or nothing. All tokens of the shard are in memory, but only a few of its images.

    Calls `advance` with the number of images done since the last call. Raises UserError if a file cannot be written.
    """
    split, (height, width) = source.splits()[name], source.image_size
    rows = np.array(shard_rows(plan, name, number))
    at_once = max(1, PIXELS_AT_ONCE // (height * width))
    tokens, readable = np.empty((len(rows), math.prod(grid_of(plan))), np.uint16), np.empty(len(rows), bool)
    for start in range(0, len(rows), at_once):
        some = slice(start, start + at_once)
        grids, used = split.encode(tokenizer, rows[some])
        tokens[some], readable[some] = grids.reshape(len(grids), -1), used == rows[some]
        advance(len(grids))
    labels = None if split.labels is None else np.asarray(split.labels[rows[readable]], np.int32)
    try:
        path = unreadable_path(folder, name, number)
        if readable.all():
            path.unlink(missing_ok=True)  # an earlier command may have skipped images that can be read now
        else:
            reasons = split.images.unreadable
            write_text(path, "".join(f"{reasons[i]}\n" for i in rows if i in reasons))
        # The tokens are written last, because a shard whose tokens exist counts as finished.
        for kind, array in (("labels", labels), ("tokens", tokens[readable])):
            if array is not None:
                path = shard_path(folder, name, number, kind)
                with whole(path) as file:
                    write_array(file, array)
    except OSError as error:
        raise UserError(
            f"{path} cannot be written: {error.strerror or error}. What is finished stays: make room, and run the same "
            "command again"
        ) from None


def _write_in_processes(shards: list[tuple[str, int]], workers: int, bar: tqdm, folder: Path) -> None:
    """Writes the shards in several processes. They exit when this function ends, or when this process is killed."""
    spawn = multiprocessing.get_context("spawn")  # a forked process would inherit locks that other threads hold
    written, before = spawn.RawArray("q", len(shards)), bar.n  # images done in each shard
    theirs, ours = spawn.Pipe(duplex=False)
    # The workers exit when `ours` is closed, or this process is killed. The pool then waits for them.
    with futures.ProcessPoolExecutor(workers, spawn, _start_worker, (theirs, written)) as pool, ours:
        try:
            with _interrupts_blocked():
                pending = {pool.submit(_write_in_worker, folder, *shard) for shard in enumerate(shards)}
            while pending:
                done, pending = futures.wait(pending, 0.2, futures.FIRST_EXCEPTION)
                bar.update(before + sum(written) - bar.n)
                for future in done:
                    future.result()
        except (BrokenProcessPool, MemoryError):
            raise UserError(
                "a process that was preparing images was ended from outside, most likely for want of memory. What is "
                "finished stays: run the same command again, perhaps with fewer --workers"
            ) from None


@contextlib.contextmanager
def _interrupts_blocked():
    """Blocks SIGINT. Processes that start meanwhile inherit the block, so that Ctrl-C interrupts only the command."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows has no such function
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start_worker(theirs, written) -> None:
    """Starts a thread in a worker process. The thread waits until the command ends, then exits the process."""
    global _written
    _written = written
    threading.Thread(target=lambda: theirs.poll(None) and os._exit(1), daemon=True).start()


def _write_in_worker(folder: Path, place: int, shard: tuple[str, int]) -> None:
    """Writes one shard in a worker process, and counts the finished images in the shared array, at index `place`."""

    def advance(count: int) -> None:
        _written[place] += count

    _write_shard(*_opened_in_worker(folder), folder, *shard, advance)


@functools.cache
def _opened_in_worker(folder: Path) -> tuple[Source, Tokenizer, dict]:
    plan = read_json(folder / PLAN)
    with contextlib.redirect_stdout(io.StringIO()):  # the main process has already printed it
        return load_source(plan["data"]), load_tokenizer(folder), plan


def add_arguments(parser: Parser) -> None:
    add_source_arguments(parser, size=None)
    what = "a .npy of colours, such as igpt palette makes, or the run of a VQ-VAE"
    parser.add_argument("--palette", "--tokenizer", required=True, metavar="PATH", help=what)
    parser.add_argument("--out", required=True, help="the directory to write, or to complete")
    parser.add_argument("--shard_images", type=at_least(1), default=8192, help="images in a file (default 8192)")
    once = "read hf:NAME once, as a stream, where its images do not fit on the disk; needs twice the room of the tokens"
    parser.add_argument("--stream", action="store_true", help=once)
    parser.add_argument("--workers", type=at_least(1), default=os.cpu_count(), help="processes (default: one a core)")


def run(args: argparse.Namespace) -> None:
    """Prepares a source with the flags of the command line. Prints what was written, and the command to run next."""
    settings = source_settings(args)
    counts = prepare(settings, args.palette, args.out, args.shard_images, args.workers, args.stream)
    made = open_prepared(args.out)
    if classes := class_counts(made):
        print(f"classes: {classes}")
    sizes = ", ".join(f"{len(split)} images for {name}" for name, split in made.splits().items())
    print(f"wrote {args.out}: {sizes}")
    if counts["unreadable"]:
        named = ", ".join(map(str, sorted(Path(args.out).glob("*.unreadable.txt"))[:3]))
        print(f"passed over {counts['unreadable']} that cannot be read, named in {named}")
    height, width = settings["image_size"]
    flags = {
        "config": f"configs/{'photos' if settings['channels'] == 3 else 'digits'}.py",
        "workdir": f"runs/{Path(args.out).absolute().name}",
        "config.data.source": f"tokens:{args.out}",
        "config.data.image_size": f"({height},{width})",
        "config.data.channels": settings["channels"],
    }
    fields = made.tokenizer.fields(args.out)
    if not made.tokenizer.is_per_pixel:  # codes are neither shifted nor mirrored
        fields |= {"data.pad": 0, "data.flip": False}
    flags |= {f"config.{name}": value for name, value in fields.items()}
    print("next:\n  python train.py", *(shlex.quote(f"--{name}={value}") for name, value in flags.items()))
