"""The Hugging Face hub: finds the directory of a model, and pushes directories.

A model is given as a path, as a path in a bucket, or as an id of the hub.
"""

import difflib
import re
from pathlib import Path

from igpt.errors import UserError, first_line
from igpt.fetch import local_copy
from igpt.files import AnyPath, as_path, expand_home, is_bucket, read_json
from igpt.interop.results import PICTURES
from igpt.interop.weight_files import SAFETENSORS

HUB_ID = re.compile(r"[A-Za-z0-9_][\w.-]{0,95}/[A-Za-z0-9_][\w.-]{0,95}", re.ASCII)
GENERATION, PROCESSOR, CARD = "generation_config.json", "preprocessor_config.json", "README.md"
CONFIG_FILES = ["config.json", GENERATION, PROCESSOR, CARD, *PICTURES]
WEIGHT_FILES = (
    ["model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json"],
    ["pytorch_model.bin", "pytorch_model-*-of-*.bin", "pytorch_model.bin.index.json"],
)


def resolve(
    ref: str | AnyPath, revision: str | None = None, files: list[str] | None = None, subfolder: str = "", **download
) -> AnyPath:
    """Returns the directory of `ref`. A hub id is downloaded, unless it is in the hub's cache.

    The directory is local unless `ref` is a run in a bucket.

    files: the only files to fetch; by default configurations, card and weights. subfolder: a folder in `ref` to use
    instead. download: further arguments of huggingface_hub's snapshot_download, such as cache_dir or token.

    If the first part of `ref` is an existing folder, `ref` is never used as a hub id. So a misspelt path fails at once,
    without network access. Raises UserError if there is no such directory or model.
    """
    if is_bucket(ref):
        return _in_bucket(as_path(ref) / subfolder if subfolder else as_path(ref), files)
    directory = Path(expand_home(ref))
    try:
        if directory.is_dir():
            return _subfolder(directory, subfolder)
        beside = [entry.name for entry in directory.parent.iterdir() if entry.is_dir()]
    except (OSError, ValueError):  # the parent is no folder
        beside = None
    if beside is not None or not HUB_ID.fullmatch(str(ref)):
        close = difflib.get_close_matches(directory.name, beside or (), n=3)
        meant = " or ".join(str(directory.parent / name) for name in close)
        hint = f"did you mean {meant}?" if close else "give a run directory, a Hugging Face directory or a hub id"
        raise UserError(f"there is no directory {ref}; {hint}")
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        remedy = 'to fetch a model of the hub, pip install -e ".[hub]"'
        raise UserError(f"there is no directory {ref}; {remedy}") from None
    prefix = f"{subfolder.strip('/')}/" if subfolder else ""
    try:
        for wanted in [files] if files else [[*CONFIG_FILES, *weights] for weights in WEIGHT_FILES]:
            patterns = [prefix + name for name in wanted]
            folder = Path(snapshot_download(str(ref), revision=revision, allow_patterns=patterns, **download))
            found = [any(folder.glob(name)) for name in patterns if name.endswith((".safetensors", ".bin"))]
            if any(found):
                break
    except Exception as error:  # the library and the network raise exceptions of many types
        raise UserError(f"there is no directory {ref}, and the hub sent no such model: {first_line(error)}") from None
    directory = _subfolder(folder, subfolder)
    if not (files or any(found)):  # of a hub that cannot be reached, snapshot_download returns what the cache has
        causes = "the hub cannot be reached, or the model has none; check the connection and the name"
        raise UserError(f"the hub sent no weights of {ref}, and the cache has only a part of it: {causes}")
    return directory


def _in_bucket(directory: AnyPath, files: list[str] | None) -> AnyPath:
    """The run directory itself, or a local copy of a Hugging Face directory, whose files are mapped into memory.

    files: the only files to copy; by default all.
    """
    try:
        is_model = (directory / "config.json").is_file()
    except OSError as error:
        raise UserError(f"{directory} cannot be reached: {error.strerror}; check the name and your rights") from None
    if not is_model:
        raise UserError(f"there is no model in {directory}: it has no config.json; give the folder of a run")
    if "model_type" not in read_json(directory / "config.json"):
        return directory
    if not files:
        return Path(local_copy(str(directory)))
    copies = [Path(local_copy(str(directory / name))) for name in files]
    return copies[0].parent


def _subfolder(directory: Path, name: str) -> Path:
    if not (directory / name).is_dir():
        raise UserError(f"{directory} has no folder {name!r}; give another subfolder")
    return directory / name


def check_push(repo: str) -> None:
    """Raises UserError unless `repo` can be an id on the hub, and the library and a token to push to it are there."""
    try:
        from huggingface_hub import get_token
        from huggingface_hub.errors import HFValidationError
        from huggingface_hub.utils import validate_repo_id
    except ImportError:
        raise UserError('to push to the hub, pip install -e ".[hub]"') from None
    try:
        validate_repo_id(repo)
        if not HUB_ID.fullmatch(repo):
            raise HFValidationError("it needs a user or an organisation, and a name")
    except HFValidationError as error:
        raise UserError(f"--push={repo} is no id on the hub: {first_line(error)}. Give one such as user/name") from None
    if not get_token():
        raise UserError(f"there is no token to push to {repo}; run hf auth login, or set $HF_TOKEN")


def push(directory: Path, repo: str, private: bool = False) -> str:
    """Pushes the files of a directory to the repository `repo` on the hub in one commit, and returns its address.

    A missing repository is made. Files of an earlier export that `directory` lacks are deleted there; others stay.
    Raises UserError if the hub cannot be reached or refuses, or if `private` is asked of a public repository.
    """
    check_push(repo)
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    api, files = HfApi(), sorted(path.name for path in directory.iterdir() if path.is_file())
    try:
        address = api.create_repo(repo, private=private or None, exist_ok=True)
        known = api.repo_info(repo)
        if private and not known.private:
            raise UserError(f"{repo} is there already, and public; leave --private out, or push to another name")
        there = {file.rfilename for file in known.siblings or ()}
        old = [file for file in there - {*files} if file in CONFIG_FILES or SAFETENSORS.fullmatch(file)]
        operations = [CommitOperationDelete(file) for file in old]
        operations += [CommitOperationAdd(file, directory / file) for file in files]
        api.create_commit(repo, operations, commit_message="Export of igpt")
    except UserError:
        raise
    except Exception as error:  # the library and the network raise exceptions of many types
        raise UserError(f"{repo} was not pushed: {_refusal(error)}") from None
    return str(address)


def _refusal(error: Exception) -> str:
    """Why the hub did not take a push, and what to do."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    reason = getattr(error, "server_message", None) or first_line(error)
    match status:
        case 401:
            return "the hub does not know the token; run hf auth login again, or set another $HF_TOKEN"
        case 403:
            return f"the token may not write there ({reason}); use a token with write access, or another name"
        case None:
            return f"the hub cannot be reached ({reason}); try again later"
    return f"the hub refused with status {status}: {reason}"
