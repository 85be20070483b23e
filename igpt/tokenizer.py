"""What turns images into tokens and back. A palette (igpt/palette.py) and a trained VQ-VAE (igpt/codes.py) do.

Whatever reads tokens uses this protocol, and does not ask which of the two it has. `load_tokenizer` does.
"""

from typing import Protocol, runtime_checkable

import numpy as np

from igpt.errors import UserError
from igpt.files import AnyPath, as_path
from igpt.palette import Palette


@runtime_checkable
class Tokenizer(Protocol):
    """Images uint8 [..., H, W, 3] <-> tokens [..., h, w] from 0 to vocab_size - 1, in raster order."""

    file: str  # the name of its file in a directory
    kind: str  # "palette" or "VQ-VAE", for messages
    place: str  # what one token stands for: "pixel", "code"
    noun: str  # what a token is, in the plural: "colours"
    bits_name: str  # the metric's name: "bits_per_dim", and another for codes, whose bits leave out what they lose
    is_per_pixel: bool  # every pixel has its own token, so that tokens can be cropped and mirrored like images
    uses_all_cores: bool  # encoding is parallel already: other processes would only take turns with it
    colors: np.ndarray | None  # uint8 [V, 3]: the colours of the tokens, or None if a token is no colour

    @property
    def vocab_size(self) -> int: ...

    @property
    def content(self) -> np.ndarray:
        """All that determines the tokens, as one array."""

    @property
    def digest(self) -> str:
        """SHA-256 of the content. Tokens of tokenizers with the same digest mean the same."""

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """The numbers of rows and columns of tokens for an image of this size."""

    def encode(self, images: np.ndarray) -> np.ndarray: ...

    def decode(self, tokens: np.ndarray) -> np.ndarray: ...

    def fields(self, path) -> dict:
        """The fields of a configuration whose network reads these tokens, from the tokenizer at `path`."""

    def save(self, path: AnyPath | str) -> None:
        """Writes its file completely or not at all. Raises OSError if it cannot."""


class Bytes:
    """No tokenizer: the bytes of images, from which a VQ-VAE learns. A run that uses it has no file of it."""

    file, kind, place, noun, bits_name = "", "bytes", "byte", "bytes", "bits_per_dim"
    is_per_pixel, uses_all_cores, colors = False, False, None
    vocab_size, digest, content = 256, "", np.zeros(0, np.uint8)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        return height, width * 3

    def encode(self, images: np.ndarray) -> np.ndarray:
        return np.asarray(images).reshape(*images.shape[:-2], -1)

    def decode(self, tokens: np.ndarray) -> np.ndarray:
        return np.asarray(tokens).reshape(*tokens.shape[:-1], -1, 3)

    def fields(self, path) -> dict:
        return {}

    def save(self, path: AnyPath | str) -> None:
        pass


FILES = ("vqvae.safetensors", Palette.file)  # a directory has one of them


def load_tokenizer(directory: AnyPath) -> Tokenizer:
    """The tokenizer whose file is in a directory: of a run, or of prepared tokens. UserError without one."""
    return _load(next((path for name in FILES if (path := directory / name).is_file()), directory / Palette.file))


def find_tokenizer(path: AnyPath | str) -> Tokenizer:
    """The tokenizer that a user names: a palette's .npy, a VQ-VAE's .safetensors, or a directory with one of them."""
    folder = None if str(path).endswith((".npy", ".safetensors")) else as_path(path)
    if folder and not folder.exists():
        raise UserError(f"there is no tokenizer at {path}; name the run of a VQ-VAE, or the .npy file of a palette")
    if not folder or not folder.is_dir():
        return _load(path)
    if not any((folder / name).is_file() for name in FILES):
        files = " and no ".join(FILES)
        raise UserError(f"{path} has no {files}; the run of a VQ-VAE writes its file when it ends")
    return load_tokenizer(folder)


def _load(path: AnyPath | str) -> Tokenizer:
    if not str(path).endswith(".safetensors"):
        return Palette.load(path)
    from igpt.codes import Codes  # imports JAX, which palettes do not need

    return Codes.load(path)


def check_same(tokenizer: Tokenizer, origin, other: Tokenizer | None, whose) -> None:
    """Raises UserError if `other`, the tokenizer of a source or None, differs from the `tokenizer` of a model."""
    if other is None or other.digest == tokenizer.digest:
        return
    if other.noun == tokenizer.noun == Palette.noun:
        remedy = f"use {origin}'s palette: igpt prepare --palette prepares tokens with it"
        raise UserError(f"{whose} has another palette than {origin}, whose network knows no other; {remedy}")
    theirs, ours = f"tokens of {other.vocab_size} {other.noun}", f"{tokenizer.vocab_size} {tokenizer.noun}"
    raise UserError(
        f"{whose} has {theirs} of another tokenizer than {origin}, whose network knows only its own {ours}; prepare "
        f"the images again with the tokenizer of {origin}"
    )
