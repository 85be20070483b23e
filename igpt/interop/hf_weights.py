"""The weights of an ImageGPT under Hugging Face's names, and in our nested dicts of parameters.

Every tensor is ours reshaped, or for the two heads transposed: transformers' Conv1D keeps [in, out] kernels, and the
columns of its fused c_attn are queries, keys and values, each with its heads one after the other (transformers 5.23,
models/imagegpt/modeling_imagegpt.py; pytorch_utils.py, `Conv1D`).
"""

import re
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from flax import nnx

from igpt.errors import UserError
from igpt.interop.hf_config import ARCHITECTURES, ImageGPTConfig, to_model_config
from igpt.interop.weight_files import FLOATS, Tensor, list_tensors
from igpt.model import ImageGPT, ModelConfig

BASE = "transformer."  # the prefix that a bare ImageGPTModel's file lacks
BUFFERS = re.compile(r"h\.\d+\.attn\.(bias|masked_bias)")  # causal masks that transformers 4 saved beside the weights
HEADS = {"pixels": "lm_head.weight", "classes": "score.weight"}
SHOWN = 12  # of the mismatches in one message


class Place(NamedTuple):
    """Where one tensor goes: a path into our parameters, the layer of a stacked leaf, its shape there."""

    path: tuple[str, ...]
    layer: int | None
    shape: tuple[int, ...]
    transposed: bool = False


def places(model: ModelConfig) -> dict[str, Place]:
    """Every tensor of the network by Hugging Face's name without the `transformer.` prefix, in their order."""
    D, F, V = model.width, model.mlp_width, model.vocab_size
    table = {
        "wte.weight": Place(("token_table",), None, (V + 1, D)),
        "wpe.weight": Place(("position_table",), None, (model.seq_len, D)),
    }
    for i in range(model.depth):
        for name, path, shape in (
            ("ln_1.weight", ("attention_norm", "gain"), (D,)),
            ("attn.c_attn.weight", ("qkv", "kernel"), (D, 3 * D)),
            ("attn.c_attn.bias", ("qkv", "bias"), (3 * D,)),
            ("attn.c_proj.weight", ("out", "kernel"), (D, D)),
            ("attn.c_proj.bias", ("out", "bias"), (D,)),
            ("ln_2.weight", ("mlp_norm", "gain"), (D,)),
            ("mlp.c_fc.weight", ("up", "kernel"), (D, F)),
            ("mlp.c_fc.bias", ("up", "bias"), (F,)),
            ("mlp.c_proj.weight", ("down", "kernel"), (F, D)),
            ("mlp.c_proj.bias", ("down", "bias"), (D,)),
        ):
            table[f"h.{i}.{name}"] = Place(("blocks", *path), i, shape)
    table["ln_f.weight"] = Place(("final_norm", "gain"), None, (D,))
    if model.pixel_head:
        table["lm_head.weight"] = Place(("head", "kernel"), None, (V, D), transposed=True)
    if model.num_classes:
        table["score.weight"] = Place(("classifier", "kernel"), None, (model.num_classes, D), transposed=True)
    return table


class Weights(NamedTuple):
    """A directory's configuration, the network it means, and its tensors, unread, under canonical names."""

    config: ImageGPTConfig
    model: ModelConfig
    tensors: dict[str, Tensor]


def open_directory(directory: Path, head: str | None = None, config: ImageGPTConfig | None = None) -> Weights:
    """Reads names and shapes, and raises UserError unless they are exactly those of the configuration.

    `head` None: the one that the directory says it has. With a `head` asked for, another head in the file is left out
    and one that is not there is missing from `tensors`: this is how a fine-tuning starts from a pretrained directory.
    """
    config = config or ImageGPTConfig.from_pretrained(directory)
    errors = []
    tensors = canonical_names(list_tensors(directory, errors), errors)
    optional = () if head is None else HEADS.values()
    head = head or _head_of(config, tensors)
    model = to_model_config(config, "none" if head == "pixels" and config.tie_word_embeddings else head)
    expected = places(model)
    for name in optional:
        if name not in expected:
            tensors.pop(name, None)
        elif name not in tensors:
            expected.pop(name)
    if config.tie_word_embeddings:
        tensors.pop(HEADS["pixels"], None)  # .bin files hold the tied table twice
    check_tensors(tensors, expected, errors, directory)
    return Weights(config, model, tensors)


def _head_of(config: ImageGPTConfig, tensors: dict[str, Tensor]) -> str:
    """What the configuration says, else (OpenAI's directories on the hub do not) what the tensors show."""
    named = config.other.get("architectures")
    for head, architecture in ARCHITECTURES.items():
        if isinstance(named, list) and architecture in named:
            return head
    return next((head for head, name in HEADS.items() if name in tensors), "none")


def canonical_names(tensors: dict[str, Tensor], errors: list[str]) -> dict[str, Tensor]:
    """The tensors without the base model's prefix and without mask buffers; a name met twice goes to `errors`."""
    found = {}
    for name, tensor in tensors.items():
        short = name.removeprefix(BASE)
        if BUFFERS.fullmatch(short):
            continue
        if short in found:
            errors.append(f"{short} is there twice, with and without the prefix {BASE!r}")
        found[short] = tensor
    return found


def check_tensors(found: dict[str, Tensor], expected: dict[str, Place], errors: list[str], where: Path) -> None:
    """Raises one UserError with everything that is missing, unknown, mis-shaped or of a wrong type."""
    errors = list(errors)
    for name, place in expected.items():
        if name not in found:
            errors.append(f"{name} {list(place.shape)} is missing")
        elif found[name].shape != place.shape:
            errors.append(f"{name} has shape {list(found[name].shape)}, the config makes it {list(place.shape)}")
        elif found[name].dtype not in FLOATS:
            errors.append(f"{name} is {found[name].dtype}; weights are {', '.join(FLOATS)}")
    errors += [f"{name} {list(found[name].shape)} is unknown" for name in found if name not in expected]
    if errors:
        more = [f"... and {len(errors) - SHOWN} more"] if len(errors) > SHOWN else []
        listed = "\n  ".join([_legible(error) for error in errors[:SHOWN]] + more)
        raise UserError(f"the weights in {where} do not fit their config.json:\n  {listed}")


def _legible(error: str) -> str:
    """A stranger's names may be of any length, and of characters that command a terminal."""
    return "".join(c if c.isprintable() else "?" for c in (error if len(error) < 200 else f"{error[:200]} ..."))


def read_params(found: dict[str, Tensor], model: ModelConfig, abstract: dict | None = None) -> dict:
    """Our nested dict of parameters from tensors that `check_tensors` has passed.

    A leaf is read layer by layer into one array and handed to its devices (the shardings of `abstract`, else the
    default device) before the next is begun, the largest first: so the most that is ever held is little above the
    parameters themselves.
    """
    if abstract is None:
        abstract = abstract_params(model)
    by_path = {}
    for name, place in places(model).items():
        if name in found:
            by_path.setdefault(place.path, []).append((name, place))
    params = {}
    for path, parts in sorted(by_path.items(), key=lambda item: -_leaf(abstract, item[0]).size):
        leaf = _leaf(abstract, path)
        values = np.empty(leaf.shape, np.float32)
        for name, place in parts:
            value = found[name].read()
            value = value.T if place.transposed else value
            into = values if place.layer is None else values[place.layer]
            into[...] = value.reshape(into.shape)
        _set_leaf(params, path, _to_devices(values, getattr(leaf, "sharding", None)))
        del values
    return params


def abstract_params(model: ModelConfig) -> dict:
    """Shapes and types of a network's parameters, as nested dicts."""
    return nnx.to_pure_dict(nnx.state(nnx.eval_shape(lambda: ImageGPT(model, nnx.Rngs(0)))))


def named_tensors(params: dict, model: ModelConfig, prefix: str = BASE) -> dict[str, np.ndarray]:
    """Our parameters under Hugging Face's names, mostly views. A network without biases gets zeros for them."""
    host = jax.tree.map(np.asarray, params)
    tensors = {}
    for name, place in places(model).items():
        if place.path[-1] == "bias" and not model.use_bias:
            value = np.zeros(place.shape, np.float32)
        else:
            value = _leaf(host, place.path)
            value = value if place.layer is None else value[place.layer]
            value = value.T if place.transposed else value.reshape(place.shape)
        tensors[name if name in HEADS.values() else prefix + name] = value
    return tensors


def _leaf(tree: dict, path: tuple[str, ...]):
    for key in path:
        tree = tree[key]
    return tree


def _set_leaf(tree: dict, path: tuple[str, ...], value) -> None:
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
    tree[path[-1]] = value


def _to_devices(values: np.ndarray, sharding) -> jax.Array:
    if sharding is None:
        array = jax.device_put(values)
    else:
        array = jax.make_array_from_callback(values.shape, sharding, lambda index: values[index])
    return jax.block_until_ready(array)  # until then `values` stays in memory, whoever else has let go of it
