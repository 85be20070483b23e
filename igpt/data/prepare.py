"""Any source once and for all as palette tokens, which training then maps from disk: two bytes a pixel.

    igpt prepare --source=folder:photos --size=32 --palette=palette.npy --out=photos-32
    python train.py --config.data.source=tokens:photos-32 ...

A prepared directory holds prepared.json (what was prepared, and how), palette.npy, and for each split shards
SPLIT-00000.tokens.npy uint16 [n, T] with, where the source has them, SPLIT-00000.labels.npy int32 [n]. Images that were
passed over are named in SPLIT-00000.unreadable.txt. A command that was interrupted goes on with the shards that are
missing. Images are seen as evaluation sees them: a random crop of data.preprocess=crop is the centre's here.
"""

import contextlib
import io
import json
import multiprocessing.connection
import multiprocessing.resource_tracker
import os
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from igpt.command import Parser, at_least
from igpt.data.examples import Source
from igpt.data.prepared import PLAN, SPLITS, count_shards, fingerprint, map_shard, open_prepared, shard_path
from igpt.data.reading import add_reading, reading_settings
from igpt.data.sources import load_source
from igpt.errors import UserError
from igpt.files import read_json, write_text
from igpt.palette import Palette, write_array

PIXELS_AT_ONCE = 1 << 18  # of images held in memory by a process: 256 of 32 x 32


def prepare(settings: dict, palette_path: str, out: str, shard_images: int = 8192, workers: int = 1) -> dict:
    """Writes the source that `settings` (the fields of config.data) describe to `out`; returns counts of images.

    Raises UserError for a directory that holds something else, so that nothing is mixed or written over.
    """
    palette, folder = Palette.load(palette_path), Path(out)
    source = _open_as(settings)
    sizes = {name: len(getattr(source, name)) for name in SPLITS}
    plan = {
        "format": 1,
        "data": json.loads(json.dumps(settings)),
        "palette_sha256": fingerprint(palette),
        "vocab_size": palette.vocab_size,
        "shard_images": shard_images,
        "images": sizes,
        "labels": source.train.labels is not None,
    }
    try:
        _begin(folder, plan, palette)
    except OSError as error:
        raise UserError(f"--out={out} cannot be written: {error.strerror}; name another place") from None

    images_of = {
        (name, i): min(shard_images, sizes[name] - i * shard_images)
        for name in SPLITS
        for i in range(count_shards(sizes[name], shard_images))
    }
    missing = [shard for shard in images_of if not _is_finished(folder, *shard, plan)]
    total, left = sum(images_of.values()), sum(images_of[shard] for shard in missing)
    # An array in memory is quickly done with; each process more would hold it once more.
    in_memory = isinstance(source.train.images, np.ndarray)
    with tqdm(total=total, initial=total - left, unit="image", smoothing=0.1, dynamic_ncols=True) as bar:
        if workers == 1 or in_memory or len(missing) < 2:
            writer = ShardWriter(source, palette, folder, shard_images)
            for shard in missing:
                writer.write(*shard, bar.update)
        else:
            arguments = settings, palette.centers, folder, shard_images
            _write_in_processes(missing, min(workers, len(missing)), arguments, bar.update)
    prepared = open_prepared(out)
    return sizes | {"unreadable": total - sum(len(getattr(prepared, name)) for name in SPLITS)}


def _open_as(settings: dict) -> Source:
    source = load_source(ConfigDict(settings))
    if source.image_size != tuple(settings["image_size"]) or source.channels != settings["channels"]:
        height, width = source.image_size
        raise UserError(
            f"{settings['source']} has images of {height} x {width} with {source.channels} channel(s), not "
            f"{' x '.join(map(str, settings['image_size']))} with {settings['channels']}; give --size={height}x{width} "
            f"--channels={source.channels}, or --preprocess=shrink for another size"
        )
    return source


def _begin(folder: Path, plan: dict, palette: Palette) -> None:
    """Writes the plan into a new directory, or sees that the one that is there has the same."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--out={folder} is a file; name a new directory")
    if not folder.exists() or {path.name for path in folder.iterdir()} <= {f"{PLAN}.partial"}:
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / PLAN, json.dumps(plan, indent=1) + "\n")
    elif not (folder / PLAN).is_file():
        raise UserError(f"--out={folder} exists and is no prepared directory; name a new one")
    ours, theirs = _flat(plan), _flat(read_json(folder / PLAN))
    if differing := [name for name in sorted(ours | theirs) if ours.get(name) != theirs.get(name)]:
        what = "; ".join(f"{name} is {theirs.get(name)!r} there, {ours.get(name)!r} here" for name in differing)
        raise UserError(f"--out={folder} was prepared otherwise: {what}. Name a new directory, or delete this one")
    palette.save(folder / "palette.npy")


def _flat(plan: dict) -> dict:
    return {
        f"{name}.{field}" if isinstance(value, dict) else name: inner
        for name, value in plan.items()
        for field, inner in (value if isinstance(value, dict) else {"": value}).items()
    }


class ShardWriter:
    """Writes shards of a source, each whole or not at all. A shard's tokens are the most that it holds in memory."""

    def __init__(self, source: Source, palette: Palette, folder: Path, shard_images: int):
        self.source, self.palette, self.folder, self.shard_images = source, palette, folder, shard_images

    def write(self, name: str, number: int, tell: Callable[[int], None]) -> None:
        """`tell` hears how many images are done since it last heard."""
        split, size = getattr(self.source, name), self.shard_images
        asked = np.arange(number * size, min((number + 1) * size, len(split)))
        height, width = self.source.image_size
        at_once = max(1, PIXELS_AT_ONCE // (height * width))
        tokens, kept, count = np.empty((len(asked), height * width), np.uint16), [], 0
        for start in range(0, len(asked), at_once):
            wanted = asked[start : start + at_once]
            if split.holds_tokens_of(self.palette):
                grids, readable = split.images.grids(wanted), np.full(len(wanted), True)
            else:
                images, used = split.read(wanted)
                readable = used == wanted
                grids = self.palette.encode(images[readable], np.uint16)
            kept.append(wanted[readable])
            tokens[count : count + len(grids)] = grids.reshape(len(grids), height * width)
            count += len(grids)
            tell(len(wanted))
        kept = np.concatenate(kept)
        if len(kept) < len(asked):
            said = [split.images.unreadable[i] for i in asked if i in split.images.unreadable]
            path = shard_path(self.folder, name, number, "unreadable").with_suffix(".txt")
            _save(path, lambda file: file.write("".join(f"{text}\n" for text in said).encode()))
        if split.labels is not None:
            labels = np.asarray(split.labels[kept], np.int32)
            _save(shard_path(self.folder, name, number, "labels"), lambda file: write_array(file, labels))
        # Last: where tokens are, a shard is finished.
        _save(shard_path(self.folder, name, number, "tokens"), lambda file: write_array(file, tokens[:count]))


def _save(path: Path, write: Callable) -> None:
    partial = path.with_name(f"{path.name}.partial")
    try:
        with partial.open("wb") as file:
            write(file)
        os.replace(partial, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise UserError(
            f"{path} cannot be written: {error.strerror or error}. What is finished stays: make room, and run the same "
            "command again"
        ) from None


def _write_in_processes(shards: Sequence[tuple], workers: int, arguments: tuple, tell: Callable[[int], None]) -> None:
    """Has `workers` processes write the shards in turns. They end with this one, however that ends."""
    spawn = multiprocessing.get_context("spawn")  # a forked process may inherit locks of threads it has not got
    alive, ours = spawn.Pipe(duplex=False)  # closes at our end when this process is gone
    written, told = spawn.RawArray("q", workers), 0  # no lock, with which a process could die
    running = []
    multiprocessing.resource_tracker.ensure_running()  # its own start would let interrupts through again
    try:
        with _interrupts_held():
            for which in range(workers):
                heard, said = spawn.Pipe(duplex=False)
                given = shards[which::workers], which, alive, written, said, arguments
                process = spawn.Process(target=_write_in_turn, args=given, daemon=True)
                process.start()
                said.close()  # so that nothing to hear is an end, and not a wait
                running.append((process, heard))
        while running:
            multiprocessing.connection.wait([process.sentinel for process, _ in running], 0.2)
            codes = [process.exitcode for process, _ in running]  # once: what dies meanwhile is seen the next time
            done = sum(written)
            tell(done - told)
            told = done
            for code, (_, heard) in zip(codes, running, strict=True):
                if code:
                    raise UserError(_last_words(heard))
            running = [pair for code, pair in zip(codes, running, strict=True) if code is None]
    finally:
        for process, _ in running:
            process.kill()
            process.join()
        ours.close()


def _last_words(heard) -> str:
    try:
        return heard.recv()
    except EOFError:
        return (
            "a process that was preparing images was ended from outside, most likely for want of memory. What is "
            "finished stays: run the same command again, perhaps with fewer --workers"
        )


@contextlib.contextmanager
def _interrupts_held():
    """Ctrl-C waits meanwhile, and never reaches processes started here: whoever started them ends them."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _write_in_turn(shards: Sequence[tuple], which: int, alive, written, said, arguments: tuple) -> None:
    """What one of the processes does."""

    def leave_with_the_command() -> None:
        with contextlib.suppress(OSError, EOFError):
            alive.recv()
        os._exit(1)

    def tell(count: int) -> None:
        written[which] += count

    threading.Thread(target=leave_with_the_command, daemon=True).start()
    settings, centers, folder, shard_images = arguments
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # what sources remark on has been said once
            source = load_source(ConfigDict(settings))
        writer = ShardWriter(source, Palette(centers), folder, shard_images)
        for shard in shards:
            writer.write(*shard, tell)
    except UserError as error:
        said.send(str(error))
        sys.exit(1)


def _is_finished(folder: Path, name: str, number: int, plan: dict) -> bool:
    if not shard_path(folder, name, number, "tokens").is_file():
        return False
    try:
        map_shard(folder, name, number, plan)
    except UserError:
        return False  # cut short: it is written anew
    return True


def add_arguments(parser: Parser) -> None:
    add_reading(parser, size=None)
    parser.add_argument("--palette", required=True, help="a .npy of colours, such as igpt palette makes")
    parser.add_argument("--out", required=True, help="the directory to make, or to go on with")
    parser.add_argument("--shard_images", type=at_least(1), default=8192, help="images a file (default 8192)")
    parser.add_argument("--workers", type=at_least(1), default=os.cpu_count(), help="processes (default: one a core)")


def run(args) -> None:
    """Prepares a source as the command line says."""
    settings = reading_settings(args)
    counts = prepare(settings, args.palette, args.out, args.shard_images, args.workers)
    print(describe(counts, settings, args.out))


def describe(counts: dict, settings: dict, out: str) -> str:
    """What was written, and what one would want to run next."""
    lines = [f"wrote {out}: " + ", ".join(f"{counts[name]} images for {name}" for name in SPLITS)]
    if counts["unreadable"]:
        said = sorted(Path(out).glob("*.unreadable.txt"))
        lines.append(
            f"passed over {counts['unreadable']} that cannot be read, named in {', '.join(map(str, said[:3]))}"
        )
    height, width = settings["image_size"]
    flags = {
        "config": "configs/digits.py",
        "workdir": f"runs/{Path(out).absolute().name}",
        "config.data.source": f"tokens:{out}",
        "config.data.image_size": f"({height},{width})",
        "config.data.channels": settings["channels"],
        "config.palette.colors": Palette.load(Path(out) / "palette.npy").vocab_size,
    }
    command = " ".join(shlex.quote(f"--{name}={value}") for name, value in flags.items())
    return "\n".join([*lines, "next:", f"  python train.py {command}"])
