"""The peer of GPU benchmarks (benchmarks/twin.py) computes what our network computes, or the comparison is unfair."""

import runpy

import numpy as np
import torch
from flax import nnx

from igpt.model import count_params
from tests.helpers import ROOT, TINY_MODEL, random_model, random_tokens


def test_the_twin_computes_our_logits_with_our_parameters():
    model = random_model(TINY_MODEL)
    params = {".".join(map(str, path)): np.asarray(leaf[...]) for path, leaf in nnx.to_flat_state(nnx.state(model))}
    twin = runpy.run_path(str(ROOT / "benchmarks" / "twin.py"))["Twin"](TINY_MODEL)
    assert sum(each.numel() for each in twin.parameters()) == count_params(TINY_MODEL)

    def ours(name):
        if name in ("tokens.weight", "positions.weight"):
            return params[f"{name[:-8]}_table"]
        first, *rest = name.split(".")
        if first != "blocks":
            return params[name.replace("head.weight", "head.kernel")].T
        layer, name = int(rest[0]), ".".join(rest[1:])
        array = params[f"blocks.{name.replace('weight', 'kernel')}"][layer]
        return array.reshape((-1, 14) if name == "out.weight" else (array.shape[0], -1)).T if array.ndim > 1 else array

    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            parameter.copy_(torch.tensor(ours(name).copy()))
        tokens = random_tokens(TINY_MODEL)
        theirs = twin(torch.tensor(np.asarray(model.inputs(tokens))))
    np.testing.assert_allclose(model(tokens), theirs.numpy(), atol=2e-5)
