"""The weights of an ImageGPT under Hugging Face's names, and in our nested dicts of parameters.

transformers' Conv1D keeps [in, out] kernels. The columns of its fused c_attn are queries, keys and values, each with
its heads one after another. So tensors are our leaves reshaped. Only the two output heads are transposed.
Source: transformers 5.23, models/imagegpt/modeling_imagegpt.py, and pytorch_utils.py for Conv1D.
"""

import re
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from flax.traverse_util import flatten_dict

from igpt.interop.hf_config import ARCHITECTURES, ImageGPTConfig, to_model_config
from igpt.interop.mapping import Target, Tensor, abstract_params, check_tensors, read_params, stacked
from igpt.interop.weight_files import FLOATS, list_tensors
from igpt.model import ModelConfig

BASE = "transformer."  # the prefix that a bare ImageGPTModel's file lacks
BUFFERS = re.compile(r"h\.\d+\.attn\.(bias|masked_bias)")  # causal masks that transformers 4 saved beside the weights
HEADS = {"pixels": "lm_head.weight", "classes": "score.weight"}

# Dims as `sizes` has them: S counts the palette and the start of sequence, Q the columns of queries, keys and values.
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
    """The table of a network in Hugging Face's order; names are without the prefix `transformer.`."""
    present = {HEADS["pixels"]: model.pixel_head, HEADS["classes"]: model.num_classes}
    table = INPUT | stacked(BLOCK, "h.{}.", model.depth) | OUTPUT
    return {name: target for name, target in table.items() if present.get(name, True)}


def sizes(model: ModelConfig) -> dict[str, int]:
    """The size of every letter in the table's dims."""
    D, V = model.width, model.vocab_size
    return {"C": model.num_classes, "D": D, "F": model.mlp_width, "Q": 3 * D, "S": V + 1, "T": model.seq_len, "V": V}


class Weights(NamedTuple):
    """A directory's configuration, its network, and its tensors by name, without the prefix and not yet read."""

    config: ImageGPTConfig
    model: ModelConfig
    tensors: dict[str, Tensor]

    def read(self, abstract: dict | None = None) -> dict:
        """The parameters, with the shardings of `abstract`, or on the default device."""
        return read_params(self.tensors, targets(self.model), abstract or abstract_params(self.model))

    @property
    def dtype(self) -> str:
        """The key of FLOATS whose type holds all of the numbers exactly."""
        dtypes = {tensor.dtype for tensor in self.tensors.values()}
        return dtypes.pop() if len(dtypes) == 1 else "F32"


def open_directory(directory: Path, head: str | None = None, config: ImageGPTConfig | None = None) -> Weights:
    """Reads names and shapes, and raises UserError unless they are exactly those of the configuration.

    head: a key of ARCHITECTURES; None for the directory's own. A head that is asked for may be missing from `tensors`,
    and another head in the file is left out: so fine-tuning can start from a pretrained directory.
    """
    config = config or ImageGPTConfig.from_pretrained(directory)
    errors = []
    tensors = _without_prefix(list_tensors(directory, errors), errors)
    optional = () if head is None else HEADS.values()
    head = head or _head_of(config, tensors)
    model = to_model_config(config, "none" if head == "pixels" and config.tie_word_embeddings else head)
    table = targets(model)
    for name in optional:
        if name not in table:
            tensors.pop(name, None)
        elif name not in tensors:
            table.pop(name)
    if config.tie_word_embeddings:
        tensors.pop(HEADS["pixels"], None)  # .bin files hold the tied table twice
    problem = f"the weights in {directory} do not fit their config.json; fetch both again, or correct the config"
    check_tensors(tensors, table, sizes(model), FLOATS, problem, errors)
    return Weights(config, model, tensors)


def _without_prefix(tensors: dict[str, Tensor], errors: list[str]) -> dict[str, Tensor]:
    """The tensors without BASE in their names, and without mask buffers. Names that occur twice go to `errors`."""
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
    """The head that the configuration names; else, as in OpenAI's directories on the hub, the one in `tensors`."""
    named = config.other.get("architectures")
    heads = [head for head, kind in ARCHITECTURES.items() if isinstance(named, list) and kind in named]
    heads += [head for head, name in HEADS.items() if name in tensors]
    return heads[0] if heads else "none"


def named_tensors(params: dict, model: ModelConfig, prefix: str = BASE) -> dict[str, np.ndarray]:
    """Our parameters under Hugging Face's names, mostly views. A network without biases gets zeros for them."""
    leaves = flatten_dict(jax.tree.map(np.asarray, params))
    tensors = {}
    for name, target in targets(model).items():
        if target.path[-1] == "bias" and not model.use_bias:
            value = np.zeros(target.shape(sizes(model)), np.float32)
        else:
            value = target.extract(leaves[target.path], sizes(model))
        tensors[name if name in HEADS.values() else prefix + name] = value
    return tensors
