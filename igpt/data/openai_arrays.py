"""OpenAI's encoded data sets, as their download.py writes them: palette tokens and labels in .npy files."""

import math
from pathlib import Path

import numpy as np

from igpt.data.arrays import as_int32, map_array
from igpt.data.examples import DecodedTokens, Source, Split
from igpt.errors import UserError
from igpt.palette import Palette


def open_openai(prefix: str) -> Source:
    """Opens the splits PREFIX_{tr,va,te}. Their palette is the file kmeans_centers.npy in the same folder.

    PREFIX_trX.npy contains palette tokens, integers [N, T], one square image per row. PREFIX_trY.npy contains labels:
    integers [N] or one-hot [N, C]. All splits have labels, or none has. Tokens are memory-mapped. Encoding a decoded
    image returns its tokens, unless two colours round to equal bytes. Raises UserError if files are missing or do not
    fit together.
    """
    paths = [f"{prefix}_{split}X.npy" for split in ("tr", "va", "te")]
    arrays = {path: _map_tokens(path) for path in paths}
    if len({tokens.shape[1] for tokens in arrays.values()}) > 1:
        found = ", ".join(f"{path} {list(tokens.shape)}" for path, tokens in arrays.items())
        raise UserError(f"the splits' images differ in size: {found}; encode all three alike")
    labels = {path: path.removesuffix("X.npy") + "Y.npy" for path in paths}
    found = [path for path in labels.values() if Path(path).exists()]
    if missing := found and [path for path in labels.values() if path not in found]:
        remedy = "labels are needed for all splits, or none: add what is missing, or move the others away"
        raise UserError(f"there is {', '.join(found)}, but no {', '.join(missing)}; {remedy}")
    clusters = Path(paths[0]).with_name("kmeans_centers.npy")
    if not clusters.exists():
        raise UserError(f"there is no {clusters}; the palette that these tokens index belongs beside them")
    palette = Palette.load(clusters)
    splits = []
    for path, tokens in arrays.items():
        side = math.isqrt(tokens.shape[1])
        images = DecodedTokens(tokens, palette, path, (side, side))
        images[:1000]  # raises now if the palette is of another data set; other tokens are checked when read
        splits.append(Split(images, _openai_labels(labels[path], len(tokens)) if found else None))
    return Source(f"openai:{prefix}", *splits, channels=palette.channels, tokenizer=palette)


def _map_tokens(path: str) -> np.ndarray:
    tokens = map_array(path)
    if tokens.dtype.kind not in "iu" or tokens.ndim != 2 or 0 in tokens.shape:
        raise UserError(f"{path} is {tokens.dtype} {list(tokens.shape)}; palette tokens are integers [N, T]")
    if math.isqrt(tokens.shape[1]) ** 2 != tokens.shape[1]:
        raise UserError(f"{path} has {tokens.shape[1]} tokens an image, which is no square; 32 x 32 images have 1024")
    return tokens


def _openai_labels(path: str, count: int) -> np.ndarray:
    """Reads labels as int32 [N], a few rows at a time, because ImageNet's one-hot labels take gigabytes."""
    labels = map_array(path)
    kinds = {1: "iu", 2: "iufb"}.get(labels.ndim, "")
    if labels.dtype.kind not in kinds or len(labels) != count:
        found = f"{labels.dtype} {list(labels.shape)}"
        raise UserError(f"{path} is {found}; integers [{count}] or one-hot rows [{count}, C] are needed")
    if labels.ndim == 1:
        return as_int32(labels, f"{path}: labels")
    classes = np.empty(count, np.int32)
    for start in range(0, count, 4096):
        rows = labels[start : start + 4096]
        if not ((rows != 0).sum(axis=1) == 1).all() or not (rows.sum(axis=1) == 1).all():
            raise UserError(f"{path}: the rows from {start} on are not all one-hot, a single 1 among zeros")
        classes[start : start + 4096] = rows.argmax(axis=1)
    return classes
