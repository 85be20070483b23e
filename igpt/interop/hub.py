"""Finds the local directory of a model, given as a path or as an id of the Hugging Face hub, which is downloaded."""

import difflib
import re
from pathlib import Path

from igpt.errors import UserError, first_line
from igpt.files import expand_home

HUB_ID = re.compile(r"[A-Za-z0-9_][\w.-]{0,95}/[A-Za-z0-9_][\w.-]{0,95}", re.ASCII)
CONFIG_FILES = ["config.json", "generation_config.json", "preprocessor_config.json"]
WEIGHT_FILES = (["model*.safetensors", "model.safetensors.index.json"], ["pytorch_model*.bin", "pytorch_model*.json"])


def resolve(
    ref: str | Path, revision: str | None = None, files: list[str] | None = None, subfolder: str = "", **download
) -> Path:
    """Returns the local directory of `ref`. A hub id is downloaded, unless it is in the hub's cache.

    files: the only files to fetch; by default the configurations and the weights. subfolder: a folder in `ref` to use
    instead. download: further arguments of huggingface_hub's snapshot_download, such as cache_dir or token.

    If the first part of `ref` is an existing folder, `ref` is never used as a hub id. So a misspelt path fails at once,
    without network access. Raises UserError if there is no such directory or model.
    """
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
            if any(any(folder.glob(pattern)) for pattern in patterns if pattern.endswith((".safetensors", ".bin"))):
                break
    except Exception as error:  # the library and the network raise exceptions of many types
        raise UserError(f"there is no directory {ref}, and the hub sent no such model: {first_line(error)}") from None
    return _subfolder(folder, subfolder)


def _subfolder(directory: Path, name: str) -> Path:
    if not (directory / name).is_dir():
        raise UserError(f"{directory} has no folder {name!r}; give another subfolder")
    return directory / name
