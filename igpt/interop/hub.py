"""Where a reference lies: a directory here, or a model on the Hugging Face hub, fetched into its cache."""

import difflib
import re
from pathlib import Path

from igpt.errors import UserError

HUB_ID = re.compile(r"[A-Za-z0-9_][\w.-]{0,95}/[A-Za-z0-9_][\w.-]{0,95}", re.ASCII)
CONFIG_FILES = ["config.json", "preprocessor_config.json"]
WEIGHT_FILES = (["model*.safetensors", "model.safetensors.index.json"], ["pytorch_model*.bin", "pytorch_model*.json"])


def resolve(ref: str | Path, revision: str | None = None) -> Path:
    """The local directory of a reference; a hub id is downloaded, or found in the hub's cache.

    A path whose first part is a folder here is a path: a slip in it is told at once, not after a try on the network.
    """
    directory = Path(ref)
    try:
        if directory.is_dir():
            return directory
        beside = [entry.name for entry in directory.parent.iterdir() if entry.is_dir()]
    except (OSError, ValueError):  # nothing here has a name like the first part's
        beside = None
    if beside is not None or not HUB_ID.fullmatch(str(ref)):
        close = difflib.get_close_matches(directory.name, beside or (), n=3)
        meant = " or ".join(str(directory.parent / name) for name in close)
        hint = f"did you mean {meant}?" if close else "give a run directory, a Hugging Face directory or a hub id"
        raise UserError(f"there is no directory {ref}; {hint}")
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise UserError(
            f'there is no directory {ref}; if it is a model on the hub, pip install "igpt[hub]" to fetch it'
        ) from None
    try:
        for patterns in WEIGHT_FILES:
            folder = Path(snapshot_download(str(ref), revision=revision, allow_patterns=[*CONFIG_FILES, *patterns]))
            if any(folder.glob(patterns[0])):
                break
    except Exception as error:  # whatever goes wrong between here and there
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"there is no directory {ref}, and the hub did not deliver a model of that name: {reason}"
        ) from None
    return folder
