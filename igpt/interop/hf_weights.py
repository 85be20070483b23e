"""Converts weights between Hugging Face's names and our nested dicts of parameters.

Conv1D of transformers has kernels [in, out]. The columns of its fused c_attn are all queries, all keys and all values,
each ordered by head. Our leaves have the same order and are only reshaped, except that output heads are transposed.
Source: transformers 5.24, models/imagegpt/modeling_imagegpt.py, and pytorch_utils.py for Conv1D.
"""

import re
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from flax.traverse_util import flatten_dict

from igpt.interop.hf_config import ARCHITECTURES, ImageGPTConfig
from igpt.interop.hf_network import to_model_config
from igpt.interop.mapping import Target, Tensor, abstract_params, check_tensors, read_params, stacked
from igpt.interop.weight_files import FLOATS, list_tensors
from igpt.model import ModelConfig

BASE = "transformer."  # prefix of all names except the heads; files of a bare ImageGPTModel have no prefix
BUFFERS = re.compile(r"h\.\d+\.attn\.(bias|masked_bias)")  # causal masks, which transformers 4 saved with the weights
HEADS = {"pixels": "lm_head.weight", "classes": "score.weight"}

# The function `sizes` gives the size of each dim letter. S: colours and start of sequence. Q: columns of c_attn.
INPUT = {"wte.weight": Target("SD", ("token_table",)), "wpe.weight": Target("TD", ("position_table",))}
BLOCK = {
    "ln_1.weight": Target("D", ("blocks", "attention_norm", "gain")),
    "attn.c_attn.weight": Target("DQ", ("blocks", "qkv", "kernel")),
    "attn.c_attn.bias": Target("Q", ("blocks", "qkv", "bias")),
    "attn.c_proj.weight": Target("DD", ("blocks", "out", "kernel")),
    "attn.c_proj.bias": Target("D", ("blocks", "out", "bias")),
    "ln_2.weight": Target("D", ("blocks", "mlp_norm", "gain")),
    "mlp.c_fc.weight": Target("DF", ("blocks", "up", "kernel")),
    "mlp.c_fc.bias": Target("F", ("blocks", "up", "bias")),
    "mlp.c_proj.weight": Target("FD", ("blocks", "down", "kernel")),
    "mlp.c_proj.bias": Target("D", ("blocks", "down", "bias")),
}
OUTPUT = {
    "ln_f.weight": Target("D", ("final_norm", "gain")),
    HEADS["pixels"]: Target("VD", ("head", "kernel"), "DV"),
    HEADS["classes"]: Target("CD", ("classifier", "kernel"), "DC"),
}


def targets(model: ModelConfig) -> dict[str, Target]:
    """The `Target` of each tensor of a network, in Hugging Face's order. Names have no prefix `transformer.`."""
    present = {HEADS["pixels"]: model.pixel_head, HEADS["classes"]: model.num_classes}
    table = INPUT | stacked(BLOCK, "h.{}.", model.depth) | OUTPUT
    return {name: target for name, target in table.items() if present.get(name, True)}


def sizes(model: ModelConfig) -> dict[str, int]:
    """The size of each dim letter in the tables."""
    D, V = model.width, model.vocab_size
    return {"C": model.num_classes, "D": D, "F": model.mlp_width, "Q": 3 * D, "S": V + 1, "T": model.seq_len, "V": V}


class Weights(NamedTuple):
    """The configuration of a directory, its network, and its unread tensors by name, without the prefix.

    other_sizes: heads of another size that were left out, with their shapes there and here.
    """

    config: ImageGPTConfig
    model: ModelConfig
    tensors: dict[str, Tensor]
    other_sizes: dict[str, tuple[tuple, tuple]]

    def read(self, abstract: dict | None = None) -> dict:
        """Reads the parameters, with the shardings of `abstract` or, without it, to the default device."""
        return read_params(self.tensors, targets(self.model), abstract or abstract_params(self.model))

    @property
    def dtype(self) -> str:
        """The key of FLOATS whose type can hold all weights exactly."""
        dtypes = {tensor.dtype for tensor in self.tensors.values()}
        return dtypes.pop() if len(dtypes) == 1 else "F32"


def open_directory(
    directory: Path, head: str | None = None, config: ImageGPTConfig | None = None, any_size: bool = False
) -> Weights:
    """Reads names and shapes, and raises UserError unless they are exactly those of the configuration.

    head: a key of ARCHITECTURES, or None for the directory's own head. A given head may be missing in the files, and
    other heads in the files are ignored. So fine-tuning can start from a pretrained directory. With `any_size`, a head
    of another size is left out, and its shapes there and here are noted in `other_sizes`.
    """
    config = config or ImageGPTConfig.from_pretrained(directory)
    errors = []
    tensors = _without_prefix(list_tensors(directory, errors), errors)
    optional, other_sizes = () if head is None else HEADS.values(), {}
    head = head or _head_of(config, tensors)
    model = to_model_config(config, "none" if head == "pixels" and config.tie_word_embeddings else head)
    table = targets(model)
    for name in optional:
        if any_size and name in tensors.keys() & table.keys():
            there, here = tensors[name].shape, table[name].shape(sizes(model))
            if there != here:
                other_sizes[name] = (tuple(there), tuple(here))
        if name not in table or name in other_sizes:
            tensors.pop(name, None)
        if name not in tensors:
            table.pop(name, None)
    if config.tie_word_embeddings:
        tensors.pop(HEADS["pixels"], None)  # .bin files contain the tied table twice
    problem = f"the weights in {directory} do not fit their config.json; fetch both again, or correct the config"
    check_tensors(tensors, table, sizes(model), FLOATS, problem, errors)
    return Weights(config, model, tensors, other_sizes)


def _without_prefix(tensors: dict[str, Tensor], errors: list[str]) -> dict[str, Tensor]:
    """Removes BASE from names, and drops mask buffers. Adds a message to `errors` for each name that occurs twice."""
    found = {}
    for name, tensor in tensors.items():
        short = name.removeprefix(BASE)
        if BUFFERS.fullmatch(short):
            continue
        if short in found:
            errors.append(f"{short} is there twice, with and without the prefix {BASE!r}")
        found[short] = tensor
    return found


def _head_of(config: ImageGPTConfig, tensors: dict[str, Tensor]) -> str:
    """The head that the configuration names. If it names none, as OpenAI's on the hub, the head found in `tensors`."""
    named = config.other.get("architectures")
    heads = [head for head, kind in ARCHITECTURES.items() if isinstance(named, list) and kind in named]
    heads += [head for head, name in HEADS.items() if name in tensors]
    return heads[0] if heads else "none"


def named_tensors(params: dict, model: ModelConfig, prefix: str = BASE) -> dict[str, np.ndarray]:
    """Our parameters under Hugging Face's names, mostly as views. If the network has no biases, they are zeros."""
    leaves = flatten_dict(jax.tree.map(np.asarray, params))
    tensors = {}
    for name, target in targets(model).items():
        if target.path[-1] == "bias" and not model.use_bias:
            value = np.zeros(target.shape(sizes(model)), np.float32)
        else:
            value = target.extract(leaves[target.path], sizes(model))
        tensors[name if name in HEADS.values() else prefix + name] = value
    return tensors
