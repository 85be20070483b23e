"""What only a GPU can show (-m gpu): it trains as a CPU does, with cuDNN's attention or ours, and repeats itself."""

import jax
import numpy as np
import pytest

from igpt.config import Config
from igpt.sharding import make_mesh, to_devices
from igpt.state import build_program

pytestmark = pytest.mark.gpu
STEPS = 5


def trained(config, device) -> tuple:
    """(the program's network, the loss before each of a few updates, the parameters after them) on one device."""
    mesh, size = make_mesh(devices=[device]), config.train.batch_size
    program = build_program(Config.of(config, trains=True), mesh)
    tokens = np.random.default_rng(0).integers(0, 3, (size, program.model.seq_len))
    state, losses = program.create_state(seed=0), []
    with jax.set_mesh(mesh):
        batch = to_devices({"tokens": tokens.astype(np.int32)}, size, mesh)
        for _ in range(STEPS):
            state, metrics = program.train_step(state, batch)
            losses.append(float(metrics["train/loss"]))
    return program.model, losses, jax.device_get(state.params)


@pytest.fixture
def config(tiny_config):
    tiny_config.model.update(width=32, scan_layers="auto")  # heads of 16, which cuDNN can compute
    tiny_config.data.image_size = (18, 18)  # more positions than a block of our attention has
    tiny_config.optim.learning_rate = 1e-2
    return tiny_config


@pytest.mark.parametrize(("dtype", "attention"), [("float32", "chunked"), ("bfloat16", "cudnn")])
def test_a_gpu_learns_what_a_cpu_learns(config, dtype, attention):
    _, expected, _ = trained(config, jax.devices("cpu")[0])
    config.model.dtype = dtype
    network, losses, _ = trained(config, jax.devices("gpu")[0])
    assert (network.attention, network.platform, network.scan_layers) == (attention, "gpu", "no")
    np.testing.assert_allclose(losses, expected, rtol=5e-3)
    assert losses[-1] < 0.9 * losses[0]


def test_training_repeats_itself_in_every_bit_with_our_own_attention(config):
    """cuDNN's backward pass adds in any order. Only batches that keep a GPU busy show it."""
    config.model.update(width=256, attention="chunked")
    config.train.batch_size = 128
    runs = [trained(config, jax.devices("gpu")[0]) for _ in range(2)]
    assert runs[0][1] == runs[1][1]
    for one, other in zip(*(jax.tree.leaves(params) for *_, params in runs), strict=True):
        np.testing.assert_array_equal(one, other)
