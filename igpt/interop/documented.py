"""Arguments that Hugging Face documents: those that say how to fetch files, and those that are refused by name.

Every documented argument of a class is either honoured or refused. A refused argument may still be given with a value
that changes nothing, such as num_beams=1.
"""

import difflib
import reprlib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from igpt.errors import UserError
from igpt.files import expand_home, is_bucket, read_json

FETCHING = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")  # see hub.resolve
NO_UPLOAD = "these classes upload nothing: save the files, then `igpt export --model=DIRECTORY --push=user/name`"

Refused = Mapping[str, tuple[str, Any]]  # argument -> (the reason, the value or tuple of values that change nothing)


def refusals(*parts: tuple[str, dict]) -> Refused:
    """A table of refused arguments, from (reason, {argument: the value or values that change nothing, beside None})."""
    return {name: (reason, neutral) for reason, names in parts for name, neutral in names.items()}


OF_FETCHING = refusals(  # arguments of every from_pretrained
    ("set the environment variable HTTPS_PROXY instead", dict(proxies=None, mirror=None)),
    ("downloads are always resumed", dict(resume_download=(True, False))),
    ("give it as token", dict(use_auth_token=None)),
    ("code of a repository is never run", dict(trust_remote_code=False, code_revision=None)),
)
OF_UPLOADING = refusals((NO_UPLOAD, dict(push_to_hub=False, token=None)))


class Unsupported(UserError, AttributeError):
    """An attribute or method that Hugging Face documents and this package refuses. `hasattr` is False for it."""


def fetching(arguments: dict) -> dict:
    """Removes the arguments of `hub.resolve` from `arguments`, and returns those that are given.

    None is not, and neither is False, except for token: token=False sends none, not even the user's own.
    """
    given = {name: arguments.pop(name) for name in FETCHING if name in arguments}
    return {
        name: value
        for name, value in given.items()
        if value not in (None, "") and (value is not False or name == "token")
    }


def folder_to_save(directory: str | Path) -> Path:
    """The folder of a save_pretrained, which is made if it is missing. UserError for a bucket, a file, or a run."""
    if is_bucket(directory):
        raise UserError(f"{directory} is a bucket; save to a local or mounted path, and copy it")
    folder = Path(expand_home(directory))
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        what = "is" if folder.exists() else "is in"
        raise UserError(f"{directory} {what} a file; name a directory to save into") from None
    config = folder / "config.json"
    if (folder / "checkpoints").exists() or (config.is_file() and "model_type" not in read_json(config)):
        raise UserError(f"{directory} holds a run of igpt, whose files this would replace; name another directory")
    return folder


def check_refused(where: str, arguments: dict, refused: Refused, known: Collection[str] | None = None) -> dict:
    """Returns the `arguments` that `refused` does not list.

    Raises UserError, with the reason, if one that it lists has a value that would change something. Raises TypeError
    if `known` is given and does not contain an argument.
    """
    rest = {}
    for name, value in arguments.items():
        if name not in refused:
            rest[name] = value
            continue
        reason, neutral = refused[name]
        plain = isinstance(value, bool | int | float | str | list | dict)
        if not (value is None or (plain and value in (neutral if isinstance(neutral, tuple) else (neutral,)))):
            raise UserError(f"{where} does not support {name}={reprlib.repr(value)}: {reason}")
    if known is not None and (unknown := sorted(rest.keys() - set(known))):
        close = difflib.get_close_matches(unknown[0], [*known, *refused], 1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise TypeError(f"{where} has no argument {unknown[0]!r}{hint}")
    return rest
