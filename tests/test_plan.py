"""Plans: what needs no compiler always, and with -m tpu_compile the TPU compiler itself (pip install libtpu)."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from configs import imagenet
from igpt import plan as planning
from igpt.errors import UserError
from igpt.model import PRESETS

ROOT = Path(__file__).parents[1]


def small(**changes):
    """configs/imagenet.py:s with two layers: a program of seconds."""
    config = imagenet.get_config("s")
    config.model.depth = 2
    config.update_from_flattened_dict(changes)
    return config


def test_of_gpus_parameters_flops_and_bytes_are_known():
    results = planning.plan(imagenet.get_config("s"), "gpu:4")
    assert results["parameters"] == 76_571_648 and results["mesh"] == {"data": 4, "fsdp": 1, "tensor": 1}
    # Parameters and two moments, and three counters.
    assert results["bytes_per_chip"] == {"state": 12 * 76_571_648 + 12, "gradients": 4 * 76_571_648}
    products = 6 * 128 * 1024 * (24 * 12 * 512**2 + 512 * 512)
    pairs = 128 * 1024**2 * 24 * 512 * 12
    assert results["flops_per_step"] == {"causal": products + pairs / 2, "full": products + pairs}
    assert not {"fits", "estimate", "collectives"} & results.keys()


def test_the_state_of_a_chip_shrinks_as_fsdp_grows():
    sizes = []
    for fsdp in (1, 2, 4, 8):
        config = imagenet.get_config("s")
        config.mesh.fsdp = fsdp
        sizes.append(planning.plan(config, "gpu:8")["bytes_per_chip"]["state"])
    for fsdp, size in zip((2, 4, 8), sizes[1:], strict=True):
        assert sizes[0] / fsdp <= size < 1.01 * sizes[0] / fsdp  # gains are on every chip


def test_attention_counts_fully_where_every_position_sees_all():
    causal, bert = (planning.plan(imagenet.get_config(name), "gpu:4")["flops_per_step"] for name in ("s", "s:bert"))
    assert bert["causal"] == bert["full"] == causal["full"] > causal["causal"]


@pytest.mark.parametrize(
    ("topology", "changes", "message"),
    [
        ("v9:2x2", {}, "give v4, v5e, v5p, v6e"),
        ("v5e", {}, "give v4, v5e, v5p, v6e"),
        ("v5e:8", {}, "give v4, v5e, v5p, v6e"),
        ("gpu:none", {}, "such as gpu:8"),
        ("gpu:0", {}, "such as gpu:8"),
        ("gpu:8", {"mesh.fsdp": 3}, "asks for a multiple of 3 devices, but there are 8"),
        ("gpu:8", {"train.batch_size": 12}, "batch_size 12 does not divide into 8"),
        ("gpu:8", {"train.steps": 0}, "train.steps is 0"),
    ],
)
def test_what_cannot_run_is_told(topology, changes, message):
    with pytest.raises(UserError, match=message):
        planning.plan(small(**changes), topology)


def test_splits_divide_the_batch_the_heads_and_the_chips_and_hold_the_state():
    config = imagenet.get_config("xl")  # 64 images a step, 24 heads, 109 GB of state and gradients
    found = planning.splits(config, 256, planning.CHIPS["v5p"].memory, jax.devices()[0])
    assert found
    for split in found:
        data = 256 // split["tensor"] // split["fsdp"]
        assert data * split["fsdp"] * split["tensor"] == 256 and 24 % split["tensor"] == 0
        assert 64 % (data * split["fsdp"] * split["accumulate"]) == 0
        assert 16 * 6_810_875_904 / (split["fsdp"] * split["tensor"]) <= 0.9 * 95 * 2**30
    assert {split["tensor"] for split in found} == {4, 8}  # 64 images cannot feed 256 chips otherwise
    assert not planning.splits(config, 1, planning.CHIPS["v5e"].memory, jax.devices()[0])


def test_what_the_compiler_says_of_a_program_that_is_too_large_is_understood():
    message = (
        "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory required for HLO "
        "temporaries (52.53G) exceeds available HBM (15.75G). HLO module: jit_train_step."
    )

    def two_loops(x):
        _, small = jax.lax.scan(lambda c, _: (c, c), x, None, length=3)
        _, large = jax.lax.scan(lambda c, _: (c, jnp.stack([c, c])), x, None, length=5)
        return small, large

    jaxpr = jax.make_jaxpr(jax.jit(two_loops))(np.zeros((8, 1024, 1024), np.float32)).jaxpr
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2, 1), ("data", "fsdp", "tensor"))
    told = planning._too_large(message, jaxpr, mesh)
    assert not told["fits"] and told["peak_share"] == pytest.approx(52.53 / 15.75)
    assert "[5,2,8,1024,1024]" in told["largest_buffer"] and "0.0 GiB" in told["largest_buffer"]
    with pytest.raises(UserError, match="the TPU compiler failed: INTERNAL"):
        planning._too_large("INTERNAL: something else", jaxpr, mesh)


def test_the_command_prints_a_table_and_writes_json(tmp_path):
    command = [sys.executable, "-m", "igpt.plan", "--config=configs/imagenet.py:s", "--topology=gpu:8"]
    done = subprocess.run([*command, f"--json={tmp_path}/plan.json"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "76,571,648" in done.stdout and json.loads((tmp_path / "plan.json").read_text())["chips"] == 8
    wrong = subprocess.run([*command[:-1], "--topology=tpu"], cwd=ROOT, capture_output=True, text=True)
    assert wrong.returncode == 2 and "give v4, v5e" in wrong.stderr and "Traceback" not in wrong.stderr


@pytest.fixture
def compiler(monkeypatch):
    pytest.importorskip("libtpu", reason="pip install libtpu")
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")


@pytest.mark.tpu_compile
@pytest.mark.parametrize("topology", ["v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
def test_every_kind_of_tpu_compiles_the_step_with_its_flash_kernel(compiler, topology):
    results = planning.plan(small(), topology)
    assert results["fits"] and results["attention"] == "splash"
    assert results["kernels"]["splash_mha_fwd_residuals"] == 4  # two layers, forward and, with remat, once more
    assert 0.05 < results["estimate"]["mfu_causal"] < 0.9
    assert results["bytes_per_chip"]["peak"] > results["bytes_per_chip"]["state"]


@pytest.mark.tpu_compile
@pytest.mark.parametrize("size", ["m", "l48", "xl"])  # heads of 128, 96 and 128; 1024, 2304 and 4096 positions
def test_the_kernel_compiles_for_the_heads_and_lengths_of_every_size(compiler, size):
    config = imagenet.get_config(size)
    config.model.depth, config.train.batch_size, config.mesh.fsdp = 2, 8, 4
    results = planning.plan(config, "v5e:2x2")
    assert results["fits"] and results["kernels"]["splash_mha_dq_no_residuals"] == 2
    assert results["collectives"]["all-gather"]["bytes"] > 0  # of fsdp
    assert PRESETS[size]["seq_len"] == config.data.image_size[0] ** 2


@pytest.mark.tpu_compile
def test_a_batch_that_is_too_large_is_reported_with_what_is_in_the_way(compiler):
    results = planning.plan(small(**{"train.batch_size": 16384}), "v5e:2x2")
    assert not results["fits"] and results["peak_share"] > 1 and "bfloat16[2,16384,1024" in results["largest_buffer"]
