"""OpenAI's released checkpoints (TensorFlow) as run directories.

    igpt import --checkpoint=model.ckpt-1000000 --clusters=kmeans_centers.npy --out=runs/igpt-s

The files are those that OpenAI's download.py fetches: model.ckpt-STEP.index with all its .data-* shards, and the colour
clusters. The network is read off the variables' shapes; `-bert` checkpoints have no start-of-sequence vector. Names,
shapes and what they are for: OpenAI's src/model.py. Their encoded images are the data source `openai:PREFIX`.
"""

import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from igpt import config as configuration
from igpt.errors import UserError
from igpt.files import check_new, write_new
from igpt.interop.hf_weights import abstract_params
from igpt.model import PRESETS, ModelConfig
from igpt.palette import Palette
from igpt.run import checkpoint as checkpoints

SCOPE = "model/"
FILES = re.compile(r"\.(index|meta|data-\d{5}-of-(\d{5}))$")  # what follows a checkpoint's prefix
# Of a training run, not of the network: Adam's moments and powers, counters.
TRAINING_STATE = re.compile(r"(.*/)?(Adam(_1)?|adam_[mv]|beta[12]_power|[^/]*_step)")
SHOWN = 12  # of the problems in one message


class Place(NamedTuple):
    """Where a variable goes: its dims in the file, our leaf, the dims there (none: the same), the part of the leaf."""

    dims: str
    path: tuple[str, ...]
    ours: str = ""
    part: tuple = (...,)

    def arrange(self, value: np.ndarray) -> np.ndarray:
        return value.transpose([self.dims.index(dim) for dim in self.ours or self.dims])


OUTER = {
    "wte": Place("VD", ("token_table",), part=(slice(None, -1),)),
    "sos": Place("D", ("token_table",), part=(-1,)),
    "wpe": Place("TD", ("position_table",)),
    "ln_f/g": Place("D", ("final_norm", "gain")),
    "wtet": Place("VD", ("head", "kernel"), "DV"),
    "clf/wclf": Place("CD", ("classifier", "kernel"), "DC"),
}
OPTIONAL = ("sos", "clf/wclf")
BLOCK = {  # a block's leaves are those of all blocks, stacked
    "attn/q_proj": Place("NKD", ("blocks", "qkv", "kernel"), "DNK", (slice(None), 0)),
    "attn/k_proj": Place("NKD", ("blocks", "qkv", "kernel"), "DNK", (slice(None), 1)),
    "attn/v_proj": Place("NKD", ("blocks", "qkv", "kernel"), "DNK", (slice(None), 2)),
    "attn/c_proj": Place("NKD", ("blocks", "out", "kernel")),
    "mlp/c_fc/w": Place("DF", ("blocks", "up", "kernel")),
    "mlp/c_proj/w": Place("FD", ("blocks", "down", "kernel")),
    "ln_1/g": Place("D", ("blocks", "attention_norm", "gain")),
    "ln_2/g": Place("D", ("blocks", "mlp_norm", "gain")),
}


class Variable(NamedTuple):
    """A variable that has not been read yet; `dtype` is TensorFlow's."""

    shape: tuple[int, ...]
    dtype: Any
    read: Callable[[], np.ndarray]


def import_checkpoint(checkpoint: str | Path, clusters: str | Path, out: str | Path, size: str | None = None) -> Path:
    """Writes a TensorFlow checkpoint and its colour clusters as the run directory `out`, which must be new or empty.

    `size`, a name of PRESETS, changes nothing: the checkpoint has to be of that size. Raises UserError for files that
    are missing, damaged or of another network, before anything is written.
    """
    check_new(out)
    if size is not None and size not in PRESETS:
        raise UserError(f"--size={size} is not known; choose one of {', '.join(PRESETS)}, or leave it out")
    palette = Palette.load(clusters)
    prefix = find_prefix(checkpoint)
    variables = open_checkpoint(prefix)
    model = network(variables, prefix)
    if size is not None:
        check_size(size, model, prefix)
    if palette.vocab_size != model.vocab_size:
        raise UserError(
            f"{clusters} has {palette.vocab_size} colours, {prefix} is of a network with {model.vocab_size}; "
            "give the clusters that it was trained with"
        )
    grey = bool((palette.centers == palette.centers[:, :1]).all())
    side = math.isqrt(model.seq_len)
    config = configuration.of_network(model, (side, side), channels=1 if grey else 3)
    params = read_params(variables, model)

    def write(folder: Path) -> None:
        configuration.save(config, folder)
        palette.save(folder / "palette.npy")
        checkpoints.save_params(folder, params, step=0)

    return write_new(out, write)


def find_prefix(given: str | Path) -> Path:
    """The prefix of a checkpoint's files, from itself or from one of them. UserError unless the files are all there."""
    path = Path(given)
    prefix = path.parent / FILES.sub("", path.name)
    beside = {file.name for file in prefix.parent.glob("*")}
    if f"{prefix.name}.index" not in beside:
        folder = path if path.is_dir() else prefix.parent
        there = ", ".join(str(file.with_suffix("")) for file in sorted(folder.glob("*.index")))
        raise UserError(
            f"there is no TensorFlow checkpoint {given}: {prefix}.index would be its index; give the path that its "
            f"files have in common, such as model.ckpt-1000000 (in {folder}: {there or 'none'})"
        )
    # Names end in the number of shards, so that a set tells what is missing from it.
    totals = {found[2] for name in beside if name.startswith(f"{prefix.name}.data-") and (found := FILES.search(name))}
    expected = [[f"{prefix.name}.data-{i:05d}-of-{total}" for i in range(int(total))] for total in totals]
    missing = [[name for name in names if name not in beside] for names in expected] or [[f"{prefix.name}.data-*"]]
    if all(missing):
        fewest = min(missing, key=len)
        more = [f"and {len(fewest) - SHOWN} more"] if len(fewest) > SHOWN else []
        raise UserError(f"{prefix} is not whole: {', '.join(fewest[:SHOWN] + more)} should lie beside its index")
    return prefix


def open_checkpoint(prefix: Path) -> dict[str, Variable]:
    """Every variable by its full name, unread. TensorFlow's reader starts no device, nor does it touch a GPU."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")  # a notice about them is printed whatever the log level
    try:
        import tensorflow as tf
    except ImportError:
        raise UserError(f'{prefix} is a TensorFlow checkpoint; reading it needs: pip install "igpt[tfds]"') from None
    reader = guarded(prefix, tf.train.load_checkpoint, str(prefix))
    shapes = guarded(prefix, reader.get_variable_to_shape_map)
    dtypes = guarded(prefix, reader.get_variable_to_dtype_map)

    def variable(name: str) -> Variable:
        return Variable(tuple(shapes[name]), dtypes[name], lambda: guarded(prefix, reader.get_tensor, name))

    return {name: variable(name) for name in sorted(shapes)}


def guarded(prefix: Path, read: Callable, *args):
    """`read(*args)`; whatever TensorFlow raises (tf.errors, but IndexError for a short shard) becomes a UserError."""
    try:
        return read(*args)
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"{prefix} is damaged: {reason}; fetch its .index and .data files again") from None


def network(variables: dict[str, Variable], prefix: Path) -> ModelConfig:
    """The network that the variables are of. Raises one UserError with everything that is wrong with them."""
    places = places_of(variables)
    sizes = measure(places, variables)
    errors = []
    for name, place in places.items():
        expected = [sizes.get(dim, dim) for dim in place.dims]
        if name not in variables:
            errors.append(f"{name} [{', '.join(map(str, expected))}] is missing")
        elif list(variables[name].shape) != expected:
            found = list(variables[name].shape)
            errors.append(f"{name} has shape {found}, the others make it [{', '.join(map(str, expected))}]")
        elif not variables[name].dtype.is_floating:
            errors.append(f"{name} is {variables[name].dtype.name}; weights are floats")
    errors += [
        f"{name} {list(variables[name].shape)} is unknown"
        for name in variables
        if name not in places and not TRAINING_STATE.fullmatch(name)
    ]
    if {"N", "K", "D"} <= sizes.keys() and sizes["N"] * sizes["K"] != sizes["D"]:
        errors.append(f"{sizes['N']} heads of {sizes['K']} do not make up the width {sizes['D']}")
    if "T" in sizes and math.isqrt(sizes["T"]) ** 2 != sizes["T"]:
        errors.append(f"{SCOPE}wpe has {sizes['T']} positions, which is no square; only square images are released")
    if errors:
        more = [f"... and {len(errors) - SHOWN} more"] if len(errors) > SHOWN else []
        listed = "\n  ".join(errors[:SHOWN] + more)
        raise UserError(f"{prefix} is no checkpoint of OpenAI's Image GPT:\n  {listed}")
    return ModelConfig(
        width=sizes["D"],
        depth=count_layers(variables),
        num_heads=sizes["N"],
        vocab_size=sizes["V"],
        seq_len=sizes["T"],
        mlp_width=sizes["F"],
        causal=SCOPE + "sos" in variables,
        num_classes=sizes.get("C", 0),
    )


def places_of(names) -> dict[str, Place]:
    """The place of every variable that a checkpoint with such `names` has to have, by its full name."""
    places = {SCOPE + name: place for name, place in OUTER.items() if name not in OPTIONAL or SCOPE + name in names}
    for i in range(count_layers(names)):
        places |= {f"{SCOPE}h{i}/{name}": place._replace(part=(i, *place.part)) for name, place in BLOCK.items()}
    return places


def count_layers(names) -> int:
    """How many different layers the names speak of, at least 1. A stray h1000000 does not make a million of them."""
    return max(1, len({found[1] for name in names if (found := re.match(rf"{SCOPE}h(\d+)/", name))}))


def measure(places: dict[str, Place], variables: dict[str, Variable]) -> dict[str, int]:
    """The size of every dim that some variable has; the first one settles it."""
    sizes = {}
    for name, place in places.items():
        shape = variables[name].shape if name in variables else ()
        if len(shape) == len(place.dims):
            sizes = dict(zip(place.dims, shape, strict=True)) | sizes
    return sizes


def check_size(size: str, model: ModelConfig, prefix: Path) -> None:
    expected = PRESETS[size]
    found = {name: getattr(model, name) for name in expected}
    if found != expected:
        named = [name for name, preset in PRESETS.items() if preset == found]
        text = [", ".join(f"{name} {value}" for name, value in fields.items()) for fields in (expected, found)]
        raise UserError(
            f"--size={size} has {text[0]}, but {prefix} has {text[1]}; "
            + (f"give --size={named[0]}" if named else "leave --size out, or fetch the other checkpoint")
        )


def read_params(variables: dict[str, Variable], model: ModelConfig) -> dict:
    """Our nested dict of parameters, float32, from variables that `network` has passed.

    One variable is read at a time, and a leaf is handed to the device before the next is begun, the largest first: so
    the most that is ever held is little above the parameters themselves.
    """
    by_path = {}
    for name, place in places_of(variables).items():
        by_path.setdefault(place.path, []).append((name, place))
    abstract = flatten_dict(abstract_params(model))
    params = {}
    for path, parts in sorted(by_path.items(), key=lambda item: -abstract[item[0]].size):
        values = np.zeros(abstract[path].shape, np.float32)  # without "sos" the start's row stays: nobody reads it
        for name, place in parts:
            values[place.part] = place.arrange(variables[name].read())
        params[path] = jax.block_until_ready(jax.device_put(values))  # else the copy would keep `values` alive
        del values
    return unflatten_dict(params)
