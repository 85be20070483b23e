"""Plans: what needs no compiler always, and with -m tpu_compile the TPU compiler itself (pip install libtpu)."""

import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.interpreters.partial_eval import dce_jaxpr
from jax.sharding import Mesh

from configs import imagenet
from igpt import plan_search
from igpt import planned as planning
from igpt.errors import UserError
from igpt.model import PRESETS, REMAT, ImageGPT, ModelConfig

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
    state, gradients = results["bytes_per_chip"].values()
    assert gradients == 4 * 76_571_648
    assert 0 < state - 12 * 76_571_648 < 1024  # parameters and two moments, then counters and the like
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


def gradient_jaxpr(**changes):
    """Of a small network whose depth is the length of no other loop."""
    config = ModelConfig(**dict(width=64, depth=7, num_heads=2, vocab_size=11, seq_len=512, dtype="bfloat16") | changes)
    graph, params = nnx.split(nnx.eval_shape(lambda: ImageGPT(config, nnx.Rngs(0))))
    tokens = jnp.zeros((2, 512), jnp.int32)
    return jax.make_jaxpr(jax.grad(lambda params: nnx.merge(graph, params)(tokens).sum()))(params).jaxpr


@pytest.mark.parametrize("attention", ["splash", "chunked"])
@pytest.mark.parametrize("remat", list(REMAT))
def test_no_matrix_product_of_a_bfloat16_block_reads_float32(attention, remat):
    assert planning.wide_products(gradient_jaxpr(attention=attention, remat=remat), 7) == 0


def test_matrix_products_that_read_float32_are_counted():
    # Forward 4, backward 8, and at every block size two of attention's products forward, five backward.
    wide = planning.wide_products(gradient_jaxpr(attention="chunked", dtype="float32"), 7)
    assert wide == 4 + 8 + 2 + 5
    assert planning.wide_products(gradient_jaxpr(attention="chunked", dtype="float32"), 8) == 0  # no such loop


def dead_code_removed(jaxpr):
    """As the compiler does: JAX writes down the whole block again, whatever of it is needed."""
    return dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))[0]


@pytest.mark.parametrize(("remat", "again"), [("none", 0), ("minimal", 0), ("dots", 2), ("full", 2 + 3)])
def test_the_products_that_each_policy_computes_again(remat, again):
    jaxpr = gradient_jaxpr(attention="chunked", dtype="float32", remat=remat)  # where all of them are counted
    assert planning.wide_products(dead_code_removed(jaxpr), 7) == 4 + 8 + 2 + 5 + again


@pytest.mark.parametrize("kernel", ["name=splash_mha_fwd_residuals", "dot_product_attention_fwd_wrapper"])
@pytest.mark.parametrize(("remat", "times"), [("none", 1), ("minimal", 1), ("dots", 2), ("full", 2)])
def test_only_dots_and_full_run_the_flash_kernel_again_in_the_backward_pass(monkeypatch, kernel, remat, times):
    for check in ("check_cudnn_version", "check_is_flash_attention"):  # there is no GPU to ask
        monkeypatch.setattr(f"jax._src.cudnn.fused_attention_stablehlo.{check}", lambda *_: 90000)
    jaxpr = gradient_jaxpr(attention="splash" if "splash" in kernel else "cudnn", remat=remat)
    assert len(re.findall(rf"\b{kernel}\b", str(dead_code_removed(jaxpr)))) == times


def test_the_estimate_sums_cycles_attention_kernels_and_collectives():
    model = ModelConfig(width=64, depth=5, num_heads=2, seq_len=128)
    results = {
        "kernels": {"splash_mha_fwd_residuals": 2 * 5, "splash_mha_dq_no_residuals": 5},
        "collectives": {"all-reduce": {"count": 1, "bytes": 9e10}, "all-gather": {"count": 1, "bytes": 4.5e10}},
        "flops_per_step": {"causal": 4 * 197e12, "full": 0.0},
        **{"batch_size": 8, "chips": 4, "accumulate": 1, "steps": 86400},
    }
    chip = planning.CHIPS["v5e"]
    estimate = planning._estimate(results, SimpleNamespace(cycles=lambda: 3e9), model, chip)["estimate"]
    parts = estimate["of_which"]
    assert parts["compute"] == 2.0 and parts["collectives"] == 2 * 1.0 + 0.5  # a sum passes the links twice
    assert parts["attention_kernels"] == pytest.approx(4.5 * 2 * (2 * 64 * 128**2 * 5) / (0.4 * 197e12))
    assert estimate["step_seconds"] == estimate["days"] == sum(parts.values())
    assert estimate["mfu_causal"] == pytest.approx(1 / 4.5) and estimate["images_per_second"] == pytest.approx(8 / 4.5)


V5P = planning.CHIPS["v5p"]


def candidates(size, batch_size, chips, chip=V5P):
    fields = dict(PRESETS[size], dtype="bfloat16", attention="splash")
    return sorted(plan_search.candidates(ModelConfig(**fields), batch_size, chips, chip), key=lambda one: one.seconds)


def test_candidates_divide_the_batch_the_heads_and_the_chips_and_hold_the_state():
    found = candidates("xl", 64, 256)  # 24 heads, 109 GB of state and gradients
    assert found and {one.remat for one in found} == set(REMAT)
    for one in found:
        data = 256 // one.tensor // one.fsdp
        assert data * one.fsdp * one.tensor == 256 and 24 % one.tensor == 0
        assert 64 % (data * one.fsdp * one.accumulate) == 0
        assert 16 * 6_810_875_904 / (one.fsdp * one.tensor) <= 0.9 * 95 * 2**30
    assert {one.tensor for one in found} == {4, 8}  # 64 images cannot feed 256 chips otherwise
    assert not candidates("xl", 64, 1)


def test_predictions_know_what_costs_time_and_what_saves_memory():
    by_split = {one[:4]: one for one in candidates("l", 128, 8)}
    memory = [by_split[1, 8, 1, remat].memory for remat in ("none", "minimal", "dots", "full")]
    assert memory == sorted(memory, reverse=True) and len(set(memory)) == 4
    plain = by_split[1, 8, 1, "full"]
    assert by_split[1, 8, 4, "full"].memory < plain.memory and by_split[1, 8, 4, "full"].seconds > plain.seconds
    assert by_split[8, 1, 1, "full"].seconds > plain.seconds  # two sums a block and pass
    assert by_split[1, 4, 1, "full"].memory > plain.memory


@pytest.mark.parametrize(  # what the TPU compiler made of them, in seconds and GiB
    ("size", "kind", "split", "seconds", "memory"),
    [
        ("s", "v5e", (1, 1, 1, "full"), 0.160, 1.9),
        ("s", "v5e", (1, 1, 1, "minimal"), 0.189, 7.0),
        ("m", "v5e", (1, 1, 1, "full"), 0.546, 9.1),
        ("l", "v5e", (1, 8, 1, "full"), 1.666, 6.4),
        ("l", "v5p", (1, 1, 1, "minimal"), 0.643, 49.3),
        ("xl", "v5p", (1, 8, 2, "minimal"), 6.020, 75.7),
    ],
)
def test_predictions_are_near_what_was_compiled(size, kind, split, seconds, memory):
    batch_size = 64 if size == "xl" else 128
    (one,) = [one for one in candidates(size, batch_size, 8, planning.CHIPS[kind]) if one[:4] == split]
    assert one.seconds == pytest.approx(seconds, rel=0.25) and one.memory / 2**30 == pytest.approx(memory, rel=0.4)


@pytest.fixture
def compiled(monkeypatch):
    """The splits that a search asked the compiler for; `fits` and `slowdown` of the list say what it answers."""
    asked = []
    predicted = {one[:4]: one for one in candidates("l", 128, 8)}
    answers = SimpleNamespace(asked=asked, fits=lambda one: True, slowdown=lambda one: 1.0)

    def fake(config, topology):
        one = predicted[config.mesh.tensor, config.mesh.fsdp, config.train.accumulate, config.model.remat]
        asked.append(one)
        known = {"topology": topology, "mesh": {}, "remat": one.remat, "accumulate": one.accumulate, "peak_share": 0.5}
        estimate = {"step_seconds": one.seconds * answers.slowdown(one), "mfu_causal": 0.5}
        return known | {"split": one[:4], "fits": answers.fits(one), "estimate": estimate}

    device = SimpleNamespace(platform="tpu", device_kind="TPU")
    monkeypatch.setattr(plan_search, "topology_devices", lambda topology, slices=1: [device] * 8)
    monkeypatch.setattr(plan_search, "plan", fake)
    return answers


def search(**options):
    return plan_search.search_plans(imagenet.get_config("l"), "v5p:2x2x2", **options)


def test_the_search_compiles_the_likeliest_first_and_ends_when_nothing_else_can_win(compiled, monkeypatch):
    likely = [one for one in candidates("l", 128, 8) if one.memory <= V5P.memory]
    result = search()
    assert compiled.asked[0] == likely[0] and result.found[0]["split"] == likely[0][:4]
    assert all(one.seconds <= 1.1 * likely[0].seconds for one in compiled.asked)
    assert result.compiled == len(compiled.asked) == len(result.found) == plan_search.ENOUGH
    assert result.too_large == len(candidates("l", 128, 8)) - len(likely)
    assert result.compiled + result.too_large + result.slower == len(candidates("l", 128, 8))
    kinds = [(one.tensor, one.accumulate, one.remat) for one in compiled.asked]
    assert len(set(kinds)) == len(kinds)  # meshes that differ in fsdp only are as fast

    compiled.asked.clear()
    monkeypatch.setattr(plan_search, "MARGIN", 0.0)
    assert search().compiled == 1


def test_the_search_goes_on_past_what_does_not_fit(compiled):
    compiled.fits = lambda one: one.remat == "full"
    found = search(enough=1).found
    assert len(found) == 1 and found[0]["split"][3] == "full" and len(compiled.asked) > 1


def test_the_search_prefers_what_proves_faster_to_what_was_predicted(compiled):
    compiled.slowdown = lambda one: 0.5 if len(compiled.asked) == 3 else 1.0
    assert search().found[0]["split"] == compiled.asked[2][:4]


def test_the_search_gives_up_where_nothing_fits(compiled):
    compiled.fits = lambda one: False
    result = search()
    assert not result.found and result.compiled == plan_search.COMPILED
    assert str(result).startswith(f"{plan_search.COMPILED} programs compiled, 0 of them fit; left out: ")


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
    assert results["fits"] and results["attention"] == "splash" and results["float32_products_in_blocks"] == 0
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


@pytest.mark.tpu_compile
def test_of_two_slices_only_gradients_cross_the_network_between():
    alone = planning.plan(small(**{"train.batch_size": 32, "mesh.fsdp": 4}), "v5e:2x2")
    two = planning.plan(small(**{"train.batch_size": 64, "mesh.fsdp": 4, "mesh.dcn_data": 2}), "v5e:2x2")
    assert two["chips"] == 8 and two["mesh"] == {"data": 2, "fsdp": 4, "tensor": 1}
    assert two["bytes_per_chip"]["state"] == alone["bytes_per_chip"]["state"]
    assert two["collectives"].keys() >= {"all-gather", "all-reduce"}
