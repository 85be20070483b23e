"""Copies of files in buckets, fetched once into the user's cache folder, where they can be mapped into memory.

    CACHE/igpt/fetched/DIGEST OF THE FOLDER'S PATH/NAME, NAME.fetched.json

Each host fetches for itself. At every start, a copy is used if the object in the bucket is still the same and the
copy's SHA-256 is that of the bytes that were fetched; otherwise the file is fetched again.
"""

import hashlib
from pathlib import Path

from filelock import FileLock

from igpt.errors import UserError
from igpt.files import as_path, cache_directory, is_bucket, read_json, whole, write_json

FETCHED_SUFFIX = ".fetched.json"


def local_copy(place: str) -> str:
    """The path of a local copy of a file or folder in a bucket; any other path as it is.

    Raises UserError if there is nothing at `place`, or if it cannot be fetched.
    """
    if not is_bucket(place):
        return place
    path = as_path(place)
    try:
        is_file = path.is_file()
        files, folder = ([path], path.parent) if is_file else (path.files(), path)
        if not files:
            raise UserError(f"there is nothing at {place}; check the name")
        copies = cache_directory() / "igpt" / "fetched" / hashlib.sha256(str(folder).encode()).hexdigest()[:16]
        copies.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{copies}.lock"):
            fetched = sum(_fetch(file, copies / file.relative_to(folder)) for file in files)
            if not is_file:
                _remove_others(copies, {str(file.relative_to(folder)) for file in files})
    except OSError as error:
        raise UserError(f"{place} cannot be fetched: {error.strerror or error} ({error.filename})") from None
    if fetched:
        print(f"fetched {fetched} file{'s' * (fetched > 1)} of {place} into {copies}", flush=True)
    return str(copies / path.name if is_file else copies)


def _fetch(path, copy: Path) -> bool:
    """Fetches a file unless its copy is good. Returns whether it did."""
    record = copy.with_name(copy.name + FETCHED_SUFFIX)
    if record.exists() and copy.exists():
        with copy.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if read_json(record) == {"version": path.version(), "sha256": digest}:
            return False
    content, version = path.read_with_version()
    copy.parent.mkdir(parents=True, exist_ok=True)
    with whole(copy) as file:
        file.write(content)
    write_json(record, {"version": version, "sha256": hashlib.sha256(content).hexdigest()})
    return True


def _remove_others(copies: Path, names: set[str]) -> None:
    """Removes copies of files that are no longer in the bucket."""
    for path in copies.rglob("*"):
        if path.is_file() and str(path.relative_to(copies)).removesuffix(FETCHED_SUFFIX) not in names:
            path.unlink()
