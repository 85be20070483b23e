"""SHA-256 digests of a checkpoint's files. They show whether a checkpoint is damaged, before it is restored.

The digests are written when all files of the checkpoint are complete, before its directory gets its final name.
"""

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor

import jax

from igpt.errors import StorageError
from igpt.files import AnyPath, is_bucket
from igpt.run.cluster import all_processes, broadcast, is_first_process

DIGESTS = "sha256.json"


def write_digests(folder: AnyPath) -> None:
    """Computes the digests of all files of a checkpoint and writes them into its folder."""
    files = _files(folder)
    at_once = 4 if is_bucket(folder) else None  # a file of a bucket is held in memory
    with ThreadPoolExecutor(at_once) as threads:  # threads help, because hashlib releases the interpreter's lock
        digests = dict(zip(files, threads.map(_digest, files), strict=True))
    by_name = {str(path.relative_to(folder)): digest for path, digest in digests.items()}
    (folder / DIGESTS).write_text(json.dumps(by_name, indent=0))


def damage(folder: AnyPath, item: str = "") -> str:
    """Describes the damage to the files of a checkpoint, or of one item of it. Returns "" if there is no damage.

    Every process must call this function, and reads a share of the files. A checkpoint of parameters only has no
    digests; any other checkpoint without digests is damaged, because its removal was interrupted. Raises StorageError
    if a file cannot be read now, or not by every process: then the checkpoint itself may be undamaged.
    """
    found = _flaw(folder, item, jax.process_index(), jax.process_count())
    if all_processes(not found):
        return ""
    if jax.process_count() > 1:  # if process 0 finds no damage, the storage of another host is at fault
        whole = _flaw(folder, item) if is_first_process() else ""
        if not broadcast(bool(whole)):
            raise StorageError(
                f"{folder} is complete on process 0, but not on another process ({found or 'complete here'}); check "
                "that all hosts see the same directory, and start again"
            )
        found = whole or found or "as process 0 found"
    return found


def _flaw(folder: AnyPath, item: str, first: int = 0, every: int = 1) -> str:
    """Checks files number first, first + every, ... Returns a description of the first damage, or ""."""
    try:
        digests = json.loads((folder / DIGESTS).read_text())
        for name in sorted(name for name in digests if name.startswith(item))[first::every]:
            if not (folder / name).is_file():
                return f"{name} is missing"
            if _digest(folder / name) != digests[name]:
                return f"{name} differs from what was written"
    except FileNotFoundError:
        if [path.name for path in folder.glob("*") if path.is_dir()] != ["params"] or not any(_files(folder)):
            return f"{DIGESTS} is missing"
    except OSError as error:
        raise StorageError(
            f"the checkpoint {folder} cannot be read ({error}). If it is lost, move it away: the one before is used"
        ) from error
    except (ValueError, TypeError, AttributeError) as error:
        return f"{DIGESTS}: {error}"
    return ""


def _files(folder: AnyPath) -> list[AnyPath]:
    """The files of the checkpoint's items. Orbax's metadata files beside the items may still change."""
    if is_bucket(folder):
        return [path for path in folder.files() if path.parent != folder]
    return sorted(path for path in folder.glob("*/**/*") if path.is_file())


def _digest(path: AnyPath) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
