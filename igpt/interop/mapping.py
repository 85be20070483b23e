"""Checks the tensors of a weight file with a table, and reads them into our parameters.

A table maps the name of each tensor that a file must have to its `Target` in our parameters. `sizes` maps each dim
letter of the targets to its size. hf_weights.py has the table for Hugging Face's names, openai.py for TensorFlow's.
"""

from collections.abc import Callable, Collection
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict

from igpt.errors import UserError
from igpt.model import ImageGPT, ModelConfig

SHOWN = 12  # the largest number of list items that one message shows


class Tensor(NamedTuple):
    """A tensor of a file that has not been read yet. `dtype` is the name of its type in the file format."""

    shape: tuple[int, ...]
    dtype: str
    file: Path
    read: Callable[[], np.ndarray]


class Target(NamedTuple):
    """The place of a file's tensor in our parameters. The tensor is transposed from `dims` to `ours`, then reshaped.

    dims: one letter for each axis in the file. path: the keys of our leaf. ours: the same letters in our order, or ""
    if the order is the same. part: the tensor's index in the leaf, such as the layer number; () is the whole leaf.
    """

    dims: str
    path: tuple[str, ...]
    ours: str = ""
    part: tuple = ()

    def shape(self, sizes: dict[str, int]) -> tuple[int | str, ...]:
        """The shape in the file. A letter without a size stays a letter."""
        return tuple(sizes.get(dim, dim) for dim in self.dims)

    def fill(self, leaf: np.ndarray, value: np.ndarray) -> None:
        """Writes a tensor of the file into our leaf."""
        if self.ours:
            value = value.transpose([self.dims.index(dim) for dim in self.ours])
        part = leaf[self.part]
        part[...] = value.reshape(part.shape)

    def extract(self, leaf: np.ndarray, sizes: dict[str, int]) -> np.ndarray:
        """The inverse of `fill`: returns the file's tensor, as a view of our leaf if NumPy can make one."""
        if not self.ours:
            return leaf[self.part].reshape(self.shape(sizes))
        value = leaf[self.part].reshape([sizes[dim] for dim in self.ours])
        return value.transpose([self.ours.index(dim) for dim in self.dims])


def stacked(table: dict[str, Target], prefix: str, depth: int) -> dict[str, Target]:
    """Makes the table of all blocks from that of one. Our leaves stack the blocks; {} in `prefix` is a block number."""
    return {
        prefix.format(i) + name: target._replace(part=(i, *target.part))
        for i in range(depth)
        for name, target in table.items()
    }


def check_tensors(
    found: dict[str, Tensor], table: dict[str, Target], sizes: dict, floats: Collection, problem: str, errors=()
) -> None:
    """Raises one UserError that lists every tensor that is missing, mis-shaped, unknown, or not of a type in `floats`.

    sizes: the size of each dim letter. problem: the first line of the message. errors: the caller's own messages, which
    are listed first.
    """
    errors = list(errors)
    for name, target in table.items():
        shape = target.shape(sizes)
        if name not in found:
            errors.append(f"{name} {_text(shape)} is missing")
        elif found[name].shape != shape:
            errors.append(f"{name} has shape {_text(found[name].shape)}; it must be {_text(shape)}")
        elif found[name].dtype not in floats:
            errors.append(f"{name} is {found[name].dtype}; weights are {', '.join(floats)}")
    errors += [f"{name} {_text(found[name].shape)} is unknown" for name in found if name not in table]
    if errors:
        raise UserError("\n  ".join([f"{problem}:", *map(_printable, shortened(errors))]))


def shortened(items: list[str]) -> list[str]:
    """The first SHOWN items of a list, and the number of further items."""
    return items[:SHOWN] + ([f"... and {len(items) - SHOWN} more"] if len(items) > SHOWN else [])


def _text(shape: tuple[int | str, ...]) -> str:
    return f"[{', '.join(map(str, shape))}]"


def _printable(error: str) -> str:
    """Shortens a message and replaces control characters, which names in untrusted files may contain."""
    return "".join(c if c.isprintable() else "?" for c in (error if len(error) < 200 else f"{error[:200]} ..."))


def read_params(found: dict[str, Tensor], table: dict[str, Target], abstract: dict) -> dict:
    """Reads our nested dict of float32 parameters. It does not contain leaves without a tensor in `found`.

    found: tensors that `check_tensors` accepted. abstract: the shapes of all leaves, with or without shardings. Leaves
    are read one at a time, the largest first, and each is copied to its devices before the next is read. So this needs
    little more memory than the parameters themselves.
    """
    leaves, params = flatten_dict(abstract), {}
    paths = dict.fromkeys(target.path for name, target in table.items() if name in found)
    for path in sorted(paths, key=lambda path: -leaves[path].size):
        values = np.zeros(leaves[path].shape, np.float32)  # the start of sequence stays 0 if a BERT model has none
        for name, target in table.items():
            if target.path == path and name in found:
                target.fill(values, found[name].read())
        if (sharding := getattr(leaves[path], "sharding", None)) is None:
            array = jax.device_put(values)
        else:
            array = jax.make_array_from_callback(values.shape, sharding, values.__getitem__)
        params[path] = jax.block_until_ready(array)  # an unfinished copy would keep `values` in memory
        del values  # otherwise it would stay in memory while the next leaf is made
    return unflatten_dict(params)


def abstract_params(model: ModelConfig) -> dict:
    """Shapes and types of a network's parameters, as nested dicts."""
    return nnx.to_pure_dict(nnx.state(nnx.eval_shape(lambda: ImageGPT(model, nnx.Rngs(0)))))
