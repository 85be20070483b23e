"""The peer of GPU benchmarks (benchmarks/twin.py) computes what our network computes, or the comparison is unfair."""

import runpy
import sys
from unittest import mock

import jax
import numpy as np
import pytest
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


@pytest.fixture
def benchmark(monkeypatch):
    """benchmark(name) -> the names of benchmarks/NAME.py"""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return lambda name: runpy.run_path(str(ROOT / "benchmarks" / f"{name}.py"))


@pytest.mark.skipif(bool(torch.version.cuda), reason="a build of PyTorch for CUDA looks for the GPU that is pretended")
def test_the_eager_peer_stays_on_the_cpu_beside_a_gpu(benchmark, monkeypatch):
    names = benchmark("training")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    update, _ = names["theirs"](names["TINY"], "eager")
    update()


def test_a_case_of_gpus_is_refused_on_the_cpu(benchmark, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["training.py", "--out=x.json", "--cases", "iGPT-S"])
    with pytest.raises(SystemExit):
        benchmark("training")["main"]()
    assert "--cases iGPT-S needs --device=gpu" in capsys.readouterr().err


def test_sampling_is_measured_on_the_cpu_beside_a_gpu(benchmark, monkeypatch):
    names = benchmark("sampling")
    monkeypatch.setattr(sys, "argv", ["sampling.py", "--out=x.json", "--models", "digits"])
    stop = mock.Mock(side_effect=InterruptedError)
    stopped = mock.patch.dict(names["main"].__globals__, measure=stop)
    with stopped, mock.patch.object(jax.config, "update") as update, pytest.raises(InterruptedError):
        names["main"]()
    update.assert_called_once_with("jax_platforms", "cpu")
