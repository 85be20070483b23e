"""Features of every layer: streamed from a frozen network, and kept on disk (Chen et al. 2020, section 2.4)."""

import contextlib
import dataclasses
import functools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from igpt.data.batches import Drops, eval_batches
from igpt.data.examples import Split
from igpt.errors import UserError
from igpt.loss import masks_of
from igpt.model import ImageGPT
from igpt.sharding import process_rows, replicate, to_devices


def stream_features(
    model: ImageGPT,
    split: Split,
    tokenizer,
    batch_size: int,
    mesh: Mesh,
    layers: Sequence[int] | None = None,
    drops: Drops | None = None,
) -> Iterator[tuple[Float[np.ndarray, "b l M D"], Int[np.ndarray, "b"]]]:
    """Batches of f^l, one forward pass for all `layers` (default: all), with the labels of their images.

    With `drops`, BERT's, an image is seen under each of M masks; else M is 1. Unreadable images are left out.
    Of several processes each reads its rows of a batch, and each is given the features of all.
    """
    graph, params = nnx.split(model)
    rows = process_rows(batch_size, mesh)
    layers = tuple(range(model.config.depth + 1) if layers is None else layers)
    with jax.set_mesh(mesh):
        for batch in eval_batches(split, tokenizer, batch_size, rows, drops):
            everywhere = _features(graph, params, to_devices(batch, batch_size, mesh), layers)
            features, labels, mask = jax.device_get(everywhere)
            yield features[mask > 0], labels[mask > 0]


@functools.partial(jax.jit, static_argnames=("graph", "layers"))  # compiled once for all splits and checkpoints
def _features(graph, params, batch, layers) -> tuple[Float[Array, "B l M D"], Int[Array, "B"], Float[Array, "B"]]:
    """Features, labels and mask of a whole batch, for every process."""
    model = nnx.merge(graph, params)
    under_masks = [model.features(batch["tokens"], layers, keep) for keep in masks_of(batch)]
    features = jnp.transpose(jnp.stack(under_masks), (2, 1, 0, 3))
    return replicate(features), replicate(batch["label"]), replicate(batch["mask"])


@dataclasses.dataclass(frozen=True)
class Features:
    """Of a split, by layer: float32 [N, M, D] each, in memory or in a file, and labels int32 [N]."""

    layers: dict[int, Float[np.ndarray, "N M D"]]
    labels: Int[np.ndarray, "N"]

    def take(self, indices: Int[np.ndarray, "n"]) -> "Features":
        """Those of some images, in memory."""
        return Features({layer: rows[indices] for layer, rows in self.layers.items()}, self.labels[indices])

    def joined(self, layers: Sequence[int]) -> Float[np.ndarray, "N M lD"]:
        """Features of several layers side by side; of a single one as they are, so that a file remains one."""
        if len(layers) == 1:
            return self.layers[layers[0]]
        return np.concatenate([self.layers[layer] for layer in layers], axis=-1)


def keep_features(stream, layers: Sequence[int], folder: Path) -> Features:
    """Writes a stream of batches ([b, l, M, D], labels [b]) to a new folder, a file a layer.

    Memory does not grow with the number of images. Raises UserError where the disk is full or may not be written.
    """
    labels, shape = [], None
    paths = {layer: folder / f"layer_{layer:02d}.f32" for layer in layers}
    try:
        folder.mkdir()
        with contextlib.ExitStack() as opened:
            files = [opened.enter_context(path.open("wb")) for path in paths.values()]
            for rows, of_rows in stream:
                for index, file in enumerate(files):
                    file.write(np.ascontiguousarray(rows[:, index], np.float32).data)
                labels.append(of_rows)
                shape = rows.shape[2:]
    except OSError as error:
        raise UserError(
            f"the features cannot be written to {folder}: {error.strerror}; name another --workdir"
        ) from None
    labels = np.concatenate(labels)
    kept = {layer: np.memmap(path, np.float32, "r", shape=(len(labels), *shape)) for layer, path in paths.items()}
    return Features(kept, labels)


def raw_pixels(
    split: Split, channels: int, batch_size: int = 1024
) -> Iterator[tuple[Float[np.ndarray, "b 1 1 HWc"], Int[np.ndarray, "b"]]]:
    """The baseline that needs no model: a stream of the pixels themselves, in [-1, 1], as one layer of features."""
    for start in range(0, len(split), batch_size):
        indices = np.arange(start, min(start + batch_size, len(split)))
        images, used = split.read(indices)
        pixels = (images[..., :channels] / 127.5 - 1.0).reshape(len(images), 1, 1, -1).astype(np.float32)
        yield pixels[used == indices], split.labels[indices[used == indices]]


def write_features(parts: dict[str, Features], path: Path) -> None:
    """An .npz of SPLIT_labels and, for each layer, SPLIT_layer_NN: float32 [N, D], or [N, M, D] under M masks."""
    arrays = {}
    for name, part in parts.items():
        arrays[f"{name}_labels"] = part.labels
        for layer, rows in part.layers.items():
            arrays[f"{name}_layer_{layer:02d}"] = rows[:, 0] if rows.shape[1] == 1 else rows
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("wb") as file:
            np.savez(file, **arrays)
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise UserError(f"features_out={path} cannot be written: {error.strerror}; name another file") from None
