"""What a CPU can prove of training on NVIDIA GPUs. Each training step is the one that train.py runs.

1. It lowers for CUDA with cuDNN's attention, forward and backward, and without an array of all scores, [.., T, T].
2. JAX splits cuDNN's attention over devices only when XLA compiles. Eight CPU devices show how it is split, with our
   reference in the place of cuDNN's kernels, and that the result is that of one device.
3. With -m gpu_compile, XLA compiles it for H100s that are not there (pip install jax-cuda13-plugin jax-cuda13-pjrt).

What remains for a GPU (-m gpu): that cuDNN has a kernel for each shape, what the kernel computes, and the speed.
"""

import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo as cudnn
from jax.experimental import topologies
from jax.interpreters import mlir
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from configs import base, imagenet
from igpt.attention import attention
from igpt.config import Config
from igpt.model import PRESETS
from igpt.plan.compiled import abstract_batch
from igpt.sharding import make_mesh
from igpt.state import build_program

H100 = SimpleNamespace(platform="gpu", device_kind="NVIDIA H100 80GB HBM3", compute_capability="9.0")
MESHES = {"data": (8, 1, 1), "fsdp": (1, 8, 1), "tensor": (1, 1, 8), "all": (2, 2, 2)}
FORWARD, BACKWARD = "__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"


@pytest.fixture(autouse=True)
def cudnn_is_installed(monkeypatch):
    """JAX asks for the version when it traces attention. Only some features that we do not use depend on it."""
    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91200)


@pytest.fixture
def for_h100(monkeypatch):
    """Every "auto" of a configuration is chosen for an H100, whatever the mesh's devices are."""
    network = Config.network
    monkeypatch.setattr(Config, "network", lambda self, device=None, tensor=1: network(self, H100, tensor))


def traced(config, mesh):
    config = Config.of(config, trains=True)
    program = build_program(config, mesh)
    with jax.set_mesh(mesh):
        return program.model, program.train_step.trace(program.abstract, abstract_batch(config, program.model, mesh))


def lowered(argument: str, sizes: tuple) -> tuple:
    """(the network, the text of its training step for CUDA) of configs/imagenet.py on a mesh of such sizes."""
    mesh = make_mesh(*sizes, devices=jax.devices()[: np.prod(sizes)])
    model, step = traced(imagenet.get_config(argument), mesh)
    assert (model.attention, model.dtype, model.platform) == ("cudnn", "bfloat16", "gpu")
    return model, step.lower(lowering_platforms=("cuda",)).as_text()


def attention_calls(text: str) -> set:
    return set(re.findall(r"custom_call @([\w$]+)", text)) - {"LayoutConstraint"}


def scores_in(text: str, model, separator: str = "x") -> list:
    """The shapes in a program's text that have T x T scores; where the width is T, too, only those with heads count."""
    T, shapes = str(model.seq_len), {tuple(shape.split(separator)) for shape in re.findall(r"[<\[](\d[\dx,]*\d)", text)}
    named = {shape for shape in shapes if f"{T},{T}" in ",".join(shape)}
    if model.width == model.seq_len:  # as in M, where x is [B, T, T]
        named = {shape for shape in named if str(model.num_heads) in shape}
    return sorted(named)


@pytest.mark.parametrize("argument", [*PRESETS, "l:bert"])
def test_the_step_of_every_size_lowers_for_cuda_with_cudnns_attention(for_h100, argument):
    model, text = lowered(argument, (1, 1, 1))
    assert attention_calls(text) == {FORWARD, BACKWARD}
    mask = "CAUSAL" if model.causal else "NO_MASK"
    assert set(re.findall(r"mask_type\\22: \\22([A-Z_]+)", text)) == {mask}
    assert scores_in(text, model) == []
    # Queries, keys and values are three products, and x has its channels last.
    assert not re.search(rf"dot_general.*tensor<{model.width}x3x{model.width}xbf16>", text)
    x = rf"tensor<\d+x{model.seq_len}x{model.width}xbf16>"
    fixed = re.findall(rf"@LayoutConstraint.*result_layouts = \[dense<\[2, 1, 0\]>.*-> {x}", text)
    # Forward, computed again, and the gradient: JAX 0.10 and 0.11 write each once, 0.12 for each layer.
    assert len(fixed) in (3, 3 * model.depth)


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize(
    "argument", ["s", *(pytest.param(size, marks=pytest.mark.slow) for size in PRESETS if size != "s")]
)
def test_the_step_lowers_for_cuda_on_every_mesh(for_h100, argument, mesh):
    model, text = lowered(argument, MESHES[mesh])
    assert attention_calls(text) == {"CustomSPMDPartitioning"}  # cuDNN's calls, which XLA is to split
    assert scores_in(text, model) == []


def test_a_step_with_all_scores_would_be_found():
    config = imagenet.get_config("m")
    config.model.attention = "reference"
    model, step = traced(config, make_mesh(devices=jax.devices()[:1]))
    text = step.lower(lowering_platforms=("cuda",)).as_text()
    assert scores_in(text, model) and not attention_calls(text)


# cuDNN's two calls on CPUs: JAX's rules split them, our reference computes them


@pytest.fixture
def calls():
    """Gives CPUs an implementation of cuDNN's calls. Lists the shape of the queries in each call of a program."""
    shapes = []

    def forward(q, k, v, *_, mask_type, is_training, **__):
        shapes.append(q.shape)
        assert mask_type == cudnn.MaskType.CAUSAL
        statistics = jnp.zeros((q.shape[0], *q.shape[2:0:-1]))  # for cuDNN's backward pass; ours does without
        return [attention(q, k, v, backend="reference"), statistics][: 1 + is_training]

    def backward(q, k, v, *rest, **_):
        shapes.append(q.shape)
        output_gradient = rest[-1]
        return list(jax.vjp(lambda *qkv: attention(*qkv, backend="reference"), q, k, v)[1](output_gradient))

    for primitive, function in (("fwd", forward), ("bwd", backward)):
        rule = mlir.lower_fun(function, multiple_results=True)
        mlir.register_lowering(getattr(cudnn, f"_dot_product_attention_{primitive}_p"), rule, platform="cpu")
    return shapes


def test_a_step_splits_cudnns_attention_over_examples_and_heads(for_h100, calls):
    config = base.get_config()
    config.data.image_size, config.palette.colors, config.train.batch_size = (8, 8), 11, 8
    config.model.update(width=32, depth=2, num_heads=4, remat="attention")
    traced(config, make_mesh(2, 2, 2))[1].lower().compile()
    assert len(calls) >= 2 and set(calls) == {(2, 64, 2, 8)}  # forward and backward


def test_split_attention_has_the_values_and_gradients_of_one_device(calls):
    q, k, v = (jax.random.normal(jax.random.key(i), (8, 64, 4, 8), jnp.bfloat16) for i in range(3))

    def value_and_grads(backend, *qkv):
        def total(*qkv):
            return jnp.sum(jnp.sin(attention(*qkv, backend=backend).astype(jnp.float32)))

        return jax.jit(jax.value_and_grad(total, (0, 1, 2)))(*qkv)

    placement = NamedSharding(make_mesh(2, 2, 2), P(("data", "fsdp"), None, "tensor"))
    split = value_and_grads("cudnn", *jax.device_put((q, k, v), placement))
    assert set(calls) == {(2, 64, 2, 8)}
    for one, other in zip(jax.tree.leaves(split), jax.tree.leaves(value_and_grads("reference", q, k, v)), strict=True):
        np.testing.assert_allclose(np.asarray(one, np.float32), np.asarray(other, np.float32), rtol=2e-2, atol=1e-3)


# The compiler itself

SPECIFICATION = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  shared_memory_per_block: 49152 shared_memory_per_core: 233472 shared_memory_per_block_optin: 232448
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98 device_memory_size: 84978434048
  cuda_compute_capability { major: 9 }
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 12 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


@pytest.mark.gpu_compile
@pytest.mark.parametrize(
    ("argument", "sizes"),
    [
        *(("s", (1, 1, 1)), ("s", (8, 1, 1)), ("m", (1, 1, 1)), ("m", (2, 2, 2)), ("l", (1, 8, 1))),
        *(("l:bert", (1, 4, 2)), ("l48", (1, 8, 1)), ("xl", (1, 8, 1))),
    ],
)
def test_the_step_compiles_for_h100s_with_each_devices_own_examples_and_heads(argument, sizes):
    chips = f"1x1x{np.prod(sizes)}"
    described = topologies.get_topology_desc("h100", "cuda", target_config=SPECIFICATION, topology=chips)
    config = imagenet.get_config(argument)
    model, step = traced(config, make_mesh(*sizes, devices=described.devices))
    assert (model.attention, model.dtype) == ("cudnn", "bfloat16")  # chosen for the described devices
    program = step.lower().compile()
    text, memory = program.as_text(), program.memory_analysis()
    q = rf"bf16\[{config.train.batch_size // (sizes[0] * sizes[1])},{model.num_heads // sizes[2]},{model.seq_len},"
    for call in (FORWARD, BACKWARD):
        assert len(re.findall(rf"\({q}.*custom-call.*{re.escape(call)}\"", text)) == model.depth
    assert scores_in(text, model, ",") == []
    batch = config.train.batch_size // (sizes[0] * sizes[1])
    assert f"[{model.seq_len},{model.width},{batch}]" not in text  # no transposed copy of x, which has B last
    if batch < config.train.batch_size:
        assert f"[{config.train.batch_size},{model.seq_len},{model.width}]" not in text  # no device gathers all images
    peak = memory.temp_size_in_bytes + memory.argument_size_in_bytes
    print(f"{argument} on {sizes}: {peak / 2**30:.1f} GiB")
    assert peak < 0.9 * 80e9
