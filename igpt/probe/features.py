"""Computes the features of every layer of a frozen network, and stores them on disk (Chen et al. 2020, section 2.4)."""

import contextlib
import dataclasses
import functools
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from igpt.compiler import one_run_options
from igpt.data.batches import Drops, eval_batches
from igpt.data.examples import Split
from igpt.errors import UserError
from igpt.files import AnyPath, is_bucket, whole
from igpt.interop.load import Pretrained
from igpt.loss import masks_of
from igpt.model import ImageGPT, grid_pool
from igpt.probe.config import kind_of
from igpt.sharding import process_rows, replicate, shardings
from igpt.state import run_batches

FeatureBatches = Iterable[tuple[Float[np.ndarray, "b l M D"], Int[np.ndarray, "b"]]]  # features and labels


def stream_features(
    model: ImageGPT,
    split: Split,
    tokenizer,
    batch_size: int,
    mesh: Mesh,
    layers=None,
    drops: Drops | None = None,
    pool: str = "mean",
) -> FeatureBatches:
    """Yields the features f^l of `layers` (default: all) and the labels of each batch, with one forward pass per batch.

    `pool` is a field of ProbeConfig. For "attention" nothing is pooled: D is T times the width. With `drops` (for
    BERT), each image is masked in M ways, otherwise M is 1.
    Unreadable images are skipped. Every process reads only its own rows of a batch, but yields the features of all.
    """
    graph, params = nnx.split(model)
    layers = tuple(range(model.config.depth + 1) if layers is None else layers)
    batches = eval_batches(split, tokenizer, batch_size, process_rows(batch_size, mesh), drops)
    shape = tokenizer.grid(*split.images.shape[1:3])
    step = functools.partial(_features, graph, layers=layers, shape=shape, pool=pool)
    with jax.set_mesh(mesh):
        for features, labels, mask in run_batches(step, params, batches, batch_size, mesh):
            yield features[mask > 0], labels[mask > 0]


# Compiled once for all splits and checkpoints.
@functools.partial(jax.jit, static_argnames=("graph", "layers", "shape", "pool"))
def _features(graph, params, batch, layers, shape, pool):
    """Features [B, l, M, d], labels [B] and mask [B] of a whole batch, replicated on all devices."""
    model = nnx.merge(graph, params)
    kind, cells = kind_of(pool)
    grid = functools.partial(grid_pool, shape=shape, cells=cells)
    pooling = {"mean": None, "grid": grid, "attention": every_position}[kind]
    under_masks = [model.features(batch["tokens"], layers, keep, pooling) for keep in masks_of(batch)]
    features = jnp.transpose(jnp.stack(under_masks), (2, 1, 0, 3))
    return replicate(features), replicate(batch["label"]), replicate(batch["mask"])


def every_position(normed: Float[Array, "B T D"]) -> Float[Array, "B TD"]:
    """All positions of an image, one after the other, instead of their mean."""
    return normed.astype(jnp.float32).reshape(len(normed), -1)


def untrained(pretrained: Pretrained, seed: int, mesh: Mesh) -> Pretrained:
    """Returns `pretrained` with random parameters, sharded over `mesh` by the usual rules."""
    graph, params = nnx.split(pretrained.model)
    config, placement = pretrained.model.config, shardings(nnx.to_pure_dict(params), mesh)
    options = one_run_options(mesh.devices.flat[0].platform)

    @functools.partial(jax.jit, out_shardings=placement, compiler_options=options)
    def create():
        return nnx.to_pure_dict(nnx.state(ImageGPT(config, nnx.Rngs(seed))))

    return pretrained._replace(model=nnx.merge(graph, create()))


@dataclasses.dataclass(frozen=True)
class Features:
    """The features of a split by layer, float32 [N, M, D] in memory or in a file, and its labels, int32 [N].

    If nothing was pooled, `positions` is T, and D is T times the width.
    """

    layers: dict[int, Float[np.ndarray, "N M D"]]
    labels: Int[np.ndarray, "N"]
    positions: int = 1

    def take(self, indices: Int[np.ndarray, "n"]) -> "Features":
        """Returns the features of the images `indices`, in memory."""
        layers = {layer: rows[indices] for layer, rows in self.layers.items()}
        return Features(layers, self.labels[indices], self.positions)

    def mean(self, layer: int) -> Float[np.ndarray, "N M d"]:
        """The features of a layer, as the mean over positions if they were not pooled."""
        rows = self.layers[layer]
        return rows if self.positions == 1 else self._by_position(rows).mean(axis=2)

    def joined(self, layers: Sequence[int]) -> Float[np.ndarray, "N M lD"]:
        """Concatenates the features of `layers` in memory. The features of a single layer are not copied."""
        if len(layers) == 1:
            return self.layers[layers[0]]
        parts = [self._by_position(self.layers[layer]) for layer in layers]
        return np.concatenate(parts, axis=-1).reshape(*parts[0].shape[:2], -1)

    def _by_position(self, rows: Float[np.ndarray, "N M D"]) -> Float[np.ndarray, "N M T d"]:
        return rows.reshape(*rows.shape[:2], self.positions, -1)


def scratch_folder(workdir: AnyPath) -> tempfile.TemporaryDirectory:
    """Makes a temporary folder in the workdir, which is made if it is missing. Raises UserError if that fails.

    Features are mapped into memory, so those of a workdir in a bucket lie in the system's temporary folder ($TMPDIR).
    """
    if is_bucket(workdir):
        return tempfile.TemporaryDirectory(prefix="igpt-features.", ignore_cleanup_errors=True)
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        # NFS keeps a removed file while a process maps it. Then the folder cannot be removed, which is not an error.
        return tempfile.TemporaryDirectory(prefix="features.", dir=workdir, ignore_cleanup_errors=True)
    except OSError as error:
        raise UserError(f"--workdir={workdir} cannot be made: {error.strerror}; name a writable place") from None


def keep_features(stream: FeatureBatches, layers: Sequence[int], folder: Path, positions: int = 1) -> Features:
    """Writes batches of the features of `layers` to a new folder, one file for each layer.

    Memory does not grow with the number of images. Raises UserError if the disk is full or not writable.
    """
    labels, paths = [], [folder / f"layer_{layer:02d}.f32" for layer in layers]
    try:
        folder.mkdir()
        with contextlib.ExitStack() as opened:
            files = [opened.enter_context(path.open("wb")) for path in paths]
            for rows, row_labels in stream:
                for index, file in enumerate(files):
                    file.write(np.ascontiguousarray(rows[:, index], np.float32).data)
                labels.append(row_labels)
    except OSError as error:
        raise UserError(f"cannot write features to {folder}: {error.strerror}; name another --workdir") from None
    shape = (sum(map(len, labels)), *rows.shape[2:])
    maps = {layer: np.memmap(path, np.float32, "r", shape=shape) for layer, path in zip(layers, paths, strict=True)}
    return Features(maps, np.concatenate(labels), positions)


def raw_pixels(split: Split, channels: int, batch_size: int = 1024) -> FeatureBatches:
    """The baseline without a model: yields the pixels, in [-1, 1], as one layer of features [b, 1, 1, H W channels]."""
    for start in range(0, len(split), batch_size):
        indices = np.arange(start, min(start + batch_size, len(split)))
        images, used = split.read(indices)
        pixels = (images[..., :channels] / 127.5 - 1.0).reshape(len(images), 1, 1, -1).astype(np.float32)
        yield pixels[used == indices], split.labels[indices[used == indices]]


def write_features(parts: dict[str, Features], path: Path) -> None:
    """Writes an .npz of SPLIT_labels and, for each layer, SPLIT_layer_NN: float32 [N, D], or [N, M, D] if M > 1."""
    arrays = {}
    for name, part in parts.items():
        arrays[f"{name}_labels"] = part.labels
        for layer, rows in part.layers.items():
            arrays[f"{name}_layer_{layer:02d}"] = rows[:, 0] if rows.shape[1] == 1 else rows
    try:
        with whole(path) as file:
            np.savez(file, **arrays)
    except OSError as error:
        raise UserError(f"features_out={path} cannot be written: {error.strerror}; name another file") from None
