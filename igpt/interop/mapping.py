"""Tensors of a weight file to our parameters: one kind of table, one check, one reader.

A table gives every tensor that a file must have its `Target` among our parameters. `sizes` gives each letter of the
targets' dims its number. hf_weights.py has the table of Hugging Face's names, openai.py the table of TensorFlow's.
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

SHOWN = 12  # items of a list in one message


class Tensor(NamedTuple):
    """A tensor of a file that has not been read yet. `dtype` is the file format's name of its type."""

    shape: tuple[int, ...]
    dtype: str
    file: Path
    read: Callable[[], np.ndarray]


class Target(NamedTuple):
    """The place of one tensor among our parameters: it is transposed from `dims` to `ours`, then reshaped to `part`.

    dims: one letter for each axis in the file. path: the keys of our leaf. ours: the same letters in our order; "" if
    the order is the same. part: the index of its part of the leaf, such as a layer; () stands for the whole leaf.
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
        """The inverse of `fill`: the file's tensor, as a view of our leaf where NumPy can make one."""
        if not self.ours:
            return leaf[self.part].reshape(self.shape(sizes))
        value = leaf[self.part].reshape([sizes[dim] for dim in self.ours])
        return value.transpose([self.ours.index(dim) for dim in self.dims])


def stacked(table: dict[str, Target], prefix: str, depth: int) -> dict[str, Target]:
    """The table of all blocks, from the table of one. Our leaves stack them; {} in `prefix` is the block's number."""
    return {
        prefix.format(i) + name: target._replace(part=(i, *target.part))
        for i in range(depth)
        for name, target in table.items()
    }


def check_tensors(
    found: dict[str, Tensor], table: dict[str, Target], sizes: dict, floats: Collection, problem: str, errors=()
) -> None:
    """Raises one UserError that lists every tensor that is missing, mis-shaped, unknown, or not of a type in `floats`.

    sizes: the number for each letter of the targets' dims. problem: the message's first line. errors: messages that the
    caller has found; they come first in the list.
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
    """The first dozen of a list, and how many more there are."""
    return items[:SHOWN] + ([f"... and {len(items) - SHOWN} more"] if len(items) > SHOWN else [])


def _text(shape: tuple[int | str, ...]) -> str:
    return f"[{', '.join(map(str, shape))}]"


def _printable(error: str) -> str:
    """A stranger's names may be very long, or hold characters that control a terminal."""
    return "".join(c if c.isprintable() else "?" for c in (error if len(error) < 200 else f"{error[:200]} ..."))


def read_params(found: dict[str, Tensor], table: dict[str, Target], abstract: dict) -> dict:
    """Our nested dict of float32 parameters. Leaves without a tensor in `found` are left out.

    found: tensors that `check_tensors` has passed. abstract: the shapes of all leaves, and their shardings if they have
    any. Leaves are filled one after another, the largest first, and each is on its devices before the next begins. So
    the memory needed is little more than that of the parameters themselves.
    """
    leaves, params = flatten_dict(abstract), {}
    paths = dict.fromkeys(target.path for name, target in table.items() if name in found)
    for path in sorted(paths, key=lambda path: -leaves[path].size):
        values = np.zeros(leaves[path].shape, np.float32)  # zeros: BERT's checkpoints have no start of sequence
        for name, target in table.items():
            if target.path == path and name in found:
                target.fill(values, found[name].read())
        if (sharding := getattr(leaves[path], "sharding", None)) is None:
            array = jax.device_put(values)
        else:
            array = jax.make_array_from_callback(values.shape, sharding, values.__getitem__)
        params[path] = jax.block_until_ready(array)  # a copy that is still going on would keep `values` in memory
        del values  # otherwise it would stay in memory while the next leaf is made
    return unflatten_dict(params)


def abstract_params(model: ModelConfig) -> dict:
    """Shapes and types of a network's parameters, as nested dicts."""
    return nnx.to_pure_dict(nnx.state(nnx.eval_shape(lambda: ImageGPT(model, nnx.Rngs(0)))))
