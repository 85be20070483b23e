"""OpenAI's released TensorFlow checkpoints: finds their files, lists their variables, and derives the network.

The shapes of the variables determine the network. `-bert` checkpoints have no start-of-sequence vector. Source of
names, shapes and meanings: OpenAI's src/model.py. OpenAI's encoded images are the data source `openai:PREFIX`.
"""

import functools
import math
import os
import re
from collections.abc import Callable, Collection
from pathlib import Path

from igpt.errors import UserError, first_line
from igpt.interop.mapping import Target, Tensor, check_tensors, shortened, stacked
from igpt.model import PRESETS, ModelConfig

FILES = re.compile(r"\.(index|meta|data-\d{5}-of-(\d{5}))$")  # endings of a checkpoint's files, after the prefix
TENSORFLOW_FLOATS = ("float16", "bfloat16", "float32", "float64")
# Variables that a training run saves with the network: Adam's moments and powers, and step counters.
TRAINING_STATE = re.compile(r"(.*/)?(Adam(_1)?|adam_[mv]|beta[12]_power|[^/]*_step)")

OUTER = {
    "model/wte": Target("VD", ("token_table",), part=(slice(None, -1),)),
    "model/sos": Target("D", ("token_table",), part=(-1,)),
    "model/wpe": Target("TD", ("position_table",)),
    "model/ln_f/g": Target("D", ("final_norm", "gain")),
    "model/wtet": Target("VD", ("head", "kernel"), "DV"),
    "model/clf/wclf": Target("CD", ("classifier", "kernel"), "DC"),
}
OPTIONAL = ("model/sos", "model/clf/wclf")
BLOCK = {
    "attn/q_proj": Target("NKD", ("blocks", "qkv", "kernel"), "DNK", (slice(None), 0)),
    "attn/k_proj": Target("NKD", ("blocks", "qkv", "kernel"), "DNK", (slice(None), 1)),
    "attn/v_proj": Target("NKD", ("blocks", "qkv", "kernel"), "DNK", (slice(None), 2)),
    "attn/c_proj": Target("NKD", ("blocks", "out", "kernel")),
    "mlp/c_fc/w": Target("DF", ("blocks", "up", "kernel")),
    "mlp/c_proj/w": Target("FD", ("blocks", "down", "kernel")),
    "ln_1/g": Target("D", ("blocks", "attention_norm", "gain")),
    "ln_2/g": Target("D", ("blocks", "mlp_norm", "gain")),
}


def find_prefix(given: str | Path) -> Path:
    """The common prefix of a checkpoint's files. `given` is the prefix or one file. UserError if files are missing."""
    path = Path(given)
    prefix = path.parent / FILES.sub("", path.name)
    beside = {file.name for file in prefix.parent.glob("*")}
    if f"{prefix.name}.index" not in beside:
        folder = path if path.is_dir() else prefix.parent
        there = ", ".join(str(file.with_suffix("")) for file in sorted(folder.glob("*.index")))
        problem = f"there is no TensorFlow checkpoint {given}, because there is no {prefix}.index"
        remedy = "give the path that its files have in common, such as model.ckpt-1000000"
        raise UserError(f"{problem}; {remedy} (in {folder}: {there or 'none'})")
    # The name of every shard ends in the number of shards, so one name is enough to list the missing shards.
    totals = {found[2] for name in beside if name.startswith(f"{prefix.name}.data-") and (found := FILES.search(name))}
    expected = [[f"{prefix.name}.data-{i:05d}-of-{total}" for i in range(int(total))] for total in totals]
    missing = [[name for name in names if name not in beside] for names in expected] or [[f"{prefix.name}.data-*"]]
    if all(missing):
        names = ", ".join(shortened(min(missing, key=len)))
        raise UserError(f"{prefix} is not complete: {names} should lie beside its index; fetch what is missing")
    return prefix


def open_checkpoint(prefix: Path) -> dict[str, Tensor]:
    """Lists every variable by its full name without reading it. TensorFlow's reader does not use any GPU."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")  # TensorFlow prints a notice about oneDNN at every log level
    try:
        import tensorflow as tf
    except ImportError:
        raise UserError(f'{prefix} is a TensorFlow checkpoint; reading it needs: pip install -e ".[tfds]"') from None
    read = functools.partial(_or_user_error, prefix)
    reader = read(tf.train.load_checkpoint, str(prefix))
    shapes, dtypes = read(reader.get_variable_to_shape_map), read(reader.get_variable_to_dtype_map)
    return {
        name: Tensor(tuple(shapes[name]), dtypes[name].name, prefix, functools.partial(read, reader.get_tensor, name))
        for name in sorted(shapes)
    }


def _or_user_error(prefix: Path, read: Callable, *args):
    """Returns `read(*args)`. Any exception becomes a UserError: a truncated shard raises an IndexError, for example."""
    try:
        return read(*args)
    except Exception as error:
        reason = first_line(error)
        raise UserError(f"{prefix} is damaged: {reason}; fetch its .index and .data files again") from None


def read_model_config(variables: dict[str, Tensor], prefix: Path) -> ModelConfig:
    """Derives the network from the shapes of its variables. Raises one UserError that lists all errors."""
    table = targets(variables)
    sizes = measure(table, variables)
    errors = []
    if {"N", "K", "D"} <= sizes.keys() and sizes["N"] * sizes["K"] != sizes["D"]:
        errors.append(f"{sizes['N']} heads of {sizes['K']} do not add up to the width {sizes['D']}")
    if "T" in sizes and math.isqrt(sizes["T"]) ** 2 != sizes["T"]:
        errors.append(f"model/wpe has {sizes['T']} positions, which is not a square; OpenAI's images are square")
    weights = {name: value for name, value in variables.items() if not TRAINING_STATE.fullmatch(name)}
    problem = f"{prefix} is not a checkpoint of OpenAI's Image GPT; give one that its download.py fetches"
    check_tensors(weights, table, sizes, TENSORFLOW_FLOATS, problem, errors)
    return ModelConfig(
        width=sizes["D"],
        depth=count_layers(variables),
        num_heads=sizes["N"],
        vocab_size=sizes["V"],
        seq_len=sizes["T"],
        mlp_width=sizes["F"],
        causal="model/sos" in variables,
        num_classes=sizes.get("C", 0),
    )


def targets(names: Collection[str]) -> dict[str, Target]:
    """The table of all variables that a checkpoint must have, if these are the names of its variables."""
    outer = {name: target for name, target in OUTER.items() if name not in OPTIONAL or name in names}
    return outer | stacked(BLOCK, "model/h{}/", count_layers(names))


def count_layers(names: Collection[str]) -> int:
    """The number of different layers in the names, at least 1. A stray name such as h1000000 counts as one layer."""
    return max(1, len({found[1] for name in names if (found := re.match(r"model/h(\d+)/", name))}))


def measure(table: dict[str, Target], variables: dict[str, Tensor]) -> dict[str, int]:
    """The size of each dim letter, from the first variable that has this dim."""
    sizes = {}
    for name, target in table.items():
        shape = variables[name].shape if name in variables else ()
        if len(shape) == len(target.dims):
            sizes = dict(zip(target.dims, shape, strict=True)) | sizes
    return sizes


def check_size(size: str, model: ModelConfig, prefix: Path) -> None:
    """Raises UserError unless the network has the sizes of PRESETS[size]."""
    expected = PRESETS[size]
    found = {name: getattr(model, name) for name in expected}
    if found == expected:
        return
    named = [f"give --size={name}" for name, preset in PRESETS.items() if preset == found]
    text = [", ".join(f"{name} {value}" for name, value in fields.items()) for fields in (expected, found)]
    remedy = named[0] if named else "leave --size out, or fetch the other checkpoint"
    raise UserError(f"--size={size} has {text[0]}, but {prefix} has {text[1]}; {remedy}")
