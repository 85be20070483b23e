"""Plans: what needs no compiler always, and with -m tpu_compile the TPU compiler itself (pip install libtpu)."""

import argparse
import importlib
import json
import math
import re
import shlex
import subprocess
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.interpreters.partial_eval import dce_jaxpr

from configs import imagenet
from igpt.errors import UserError
from igpt.model import PRESETS, REMAT, ImageGPT, ModelConfig
from igpt.plan import compiled as planning
from igpt.plan import report as command
from igpt.plan import search as plan_search
from igpt.sharding import make_mesh
from igpt.state import abstract_state, make_train_step
from tests.helpers import ROOT

RECORD = json.loads((ROOT / "docs" / "results" / "plan.json").read_text())


def small(**changes):
    """configs/imagenet.py:s with two layers: a program of seconds."""
    config = imagenet.get_config("s")
    config.model.depth = 2
    config.update_from_flattened_dict(changes)
    return config


def test_of_gpus_parameters_flops_and_bytes_are_known():
    results = planning.plan(imagenet.get_config("s"), "gpu:4")
    assert results["parameters"] == 76_571_648 and results["mesh"] == {"data": 4, "fsdp": 1, "tensor": 1}
    assert (results["attention"], results["dtype"]) == ("cudnn", "bfloat16")  # theirs, not this machine's
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
        ("gpu:8", {"model.attention": "splash"}, "'splash' needs a TPU.*this is GPU"),
    ],
)
def test_what_cannot_run_is_told(topology, changes, message):
    with pytest.raises(UserError, match=message):
        planning.plan(small(**changes), topology)


def test_a_named_kernel_of_gpus_is_planned_for_them():
    assert planning.plan(small(**{"model.attention": "cudnn"}), "gpu:8")["attention"] == "cudnn"


def commands():
    """Every `igpt plan` that is written down, without the $ of a variable."""
    files = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    text = "\n".join([command.__doc__, *(path.read_text() for path in files)])
    return sorted(set(re.findall(r"\bigpt plan (--[^`#]*?--topology=[^`#\n]*)", text)))


@pytest.mark.parametrize("flags", commands())
def test_every_command_that_is_written_down_divides_over_its_chips(flags):
    flags = dict(flag.removeprefix("--").split("=", 1) for flag in shlex.split(flags) if "=" in flag)
    config = imagenet.get_config(flags["config"].partition(":")[2])
    config.update_from_flattened_dict(
        {name.removeprefix("config."): json.loads(value) for name, value in flags.items() if "config." in name}
    )
    kind, _, shape = flags["topology"].partition(":")
    chips = math.prod(map(int, shape.split("x"))) * config.mesh.dcn_data
    assert kind in (*planning.CHIPS, "gpu") and planning.plan(config, f"gpu:{chips}")["chips"] == chips


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
    assert planning.wide_products(gradient_jaxpr(attention="chunked", dtype="float32"), 8) is None  # no such loop


def test_as_many_micro_batches_as_layers_are_not_taken_for_them():
    def traced(accumulate):
        config = small(**{"model.depth": 4, "train.batch_size": 32, "train.accumulate": accumulate})
        model = planning.configuration.model_config(config)  # of a CPU: all products read float32
        mesh = make_mesh(8)
        optimizer, schedule = planning.make_optimizer(config.optim, 10)
        graph, abstract = abstract_state(model, optimizer, mesh)
        step = make_train_step(planning.make_loss(graph), optimizer, schedule, abstract, accumulate)
        with jax.set_mesh(mesh):
            return step.trace(abstract, planning._abstract_batch(config, model, mesh)).jaxpr.jaxpr

    # The head and its gradients lie in the loop over micro-batches, outside of the layers.
    assert planning.wide_products(traced(4), 4) == planning.wide_products(traced(2), 4) > 0


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
        monkeypatch.setattr(f"jax._src.cudnn.fused_attention_stablehlo.{check}", lambda *_, **__: 90000)
    jaxpr = gradient_jaxpr(attention="splash" if "splash" in kernel else "cudnn", remat=remat)
    assert len(re.findall(rf"\b{kernel}\b", str(dead_code_removed(jaxpr)))) == times


def test_the_estimate_sums_cycles_attention_kernels_and_collectives():
    model = ModelConfig(width=64, depth=5, num_heads=2, seq_len=1024)
    kernels = {"fwd_residuals": 2 * 3 * 5, "dq_no_residuals": 3 * 5, "dkv_no_residuals": 3 * 5}
    results = {
        "kernels": {f"splash_mha_{name}": count for name, count in kernels.items()},  # forward twice, 3 micro-batches
        "collectives": {"all-reduce": {"count": 1, "bytes": 9e10}, "all-gather": {"count": 1, "bytes": 4.5e10}},
        "flops_per_step": {"causal": 4 * 197e12, "full": 0.0},
        **{"batch_size": 12, "chips": 4, "accumulate": 3, "steps": 86400},
    }
    chip = planning.CHIPS["v5e"]
    estimate = planning.estimate(results, 2.0, model, chip)
    parts = estimate["of_which"]
    assert parts["compute"] == 2.0 and parts["collectives"] == 2 * 1.0 + 0.5  # a sum passes the links twice
    # Of three images a chip: twice 2 products forward, 3 and 4 backward, of 3 blocks of 512 x 512 in every layer.
    flops = 3 * (2 * 2 + 3 + 4) * 2 * 64 * 3 * 512**2 * 5
    assert parts["attention_kernels"] == pytest.approx(flops / (0.4 * 197e12))
    assert estimate["step_seconds"] == estimate["days"] == sum(parts.values())
    assert estimate["mfu_causal"] == pytest.approx(1 / 4.5, rel=0.01)
    assert estimate["images_per_second"] == pytest.approx(12 / 4.5, rel=0.01)


@pytest.mark.parametrize(("seq_len", "causal", "share"), [(1024, True, 3 / 4), (4096, True, 9 / 16), (512, False, 1)])
def test_kernels_compute_whole_blocks_also_on_the_diagonal(seq_len, causal, share):
    model = ModelConfig(width=64, depth=5, num_heads=2, seq_len=seq_len, causal=causal)
    assert planning.kernel_flops(model, 2) == 2 * 2 * 64 * 5 * share * seq_len**2


V5P = planning.CHIPS["v5p"]


def candidates(size, batch_size, chips, chip=V5P):
    fields = dict(PRESETS[size], dtype="bfloat16", attention="splash")
    return sorted(plan_search.candidates(ModelConfig(**fields), batch_size, chips, chip), key=lambda one: one.seconds)


def test_candidates_divide_the_batch_the_heads_and_the_chips():
    found = candidates("xl", 64, 256)  # 24 heads
    assert found and {one.remat for one in found} == set(REMAT)
    for one in found:
        data = 256 // one.tensor // one.fsdp
        assert data * one.fsdp * one.tensor == 256 and 24 % one.tensor == 0
        assert 64 % (data * one.fsdp * one.accumulate) == 0
    assert {one.tensor for one in found} == {4, 8}  # 64 images cannot feed 256 chips otherwise
    assert not candidates("xl", 63, 256)


def test_predictions_know_what_costs_time_and_what_saves_memory():
    by_split = {one[:4]: one for one in candidates("l", 128, 8)}
    memory = [by_split[1, 8, 1, remat].memory for remat in ("none", "minimal", "dots", "full")]
    assert memory == sorted(memory, reverse=True) and len(set(memory)) == 4
    plain = by_split[1, 8, 1, "full"]
    assert by_split[1, 8, 4, "full"].memory < plain.memory and by_split[1, 8, 4, "full"].seconds > plain.seconds
    assert by_split[8, 1, 1, "full"].seconds > plain.seconds  # two sums a block and pass
    assert by_split[1, 4, 1, "full"].memory > plain.memory


PLANNED = {name: one for name, one in RECORD["plans"].items() if one["fits"]}


@pytest.mark.parametrize("name", PLANNED)
def test_predictions_are_near_what_was_compiled(name):
    one, split = PLANNED[name], PLANNED[name]["mesh"]
    chip = planning.CHIPS[one["topology"].partition(":")[0]]
    split = (split["tensor"], split["fsdp"], one["accumulate"], one["remat"])
    (found,) = [c for c in candidates(name.split()[0], one["batch_size"], one["chips"], chip) if c[:4] == split]
    assert found.seconds == pytest.approx(one["estimate"]["step_seconds"], rel=0.2)
    assert found.memory == pytest.approx(one["bytes_per_chip"]["peak"], rel=0.4)


@pytest.fixture
def benchmark(monkeypatch):
    """benchmarks/plan.py"""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.setitem(planning.os.environ, "ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # which it sets
    return importlib.import_module("plan")


def test_the_record_is_what_the_present_code_makes_of_its_programs_and_the_guide_shows_it(benchmark):
    assert list(RECORD["plans"]) and set(RECORD["plans"]) == {
        f"{size} {topology}" for size in benchmark.SIZES for topology in benchmark.TOPOLOGIES
    }
    for name, one in RECORD["plans"].items():
        size, topology = name.split()
        assert one["topology"] == topology and one["chips"] == benchmark.chips_of(topology), name
        assert one["fits"] == (one["peak_share"] <= planning.MOST) and {"jax", "libtpu"} <= one["made"].keys(), name
        assert one["peak_share"] == pytest.approx(one["bytes_per_chip"]["peak"] / one["bytes_per_chip"]["memory"])
        assert one["fits"] or "GiB a chip" in one["largest_buffer"], name
        again = benchmark.estimated(size, one)
        assert all(again.get("checks", {}).values()) and again.get("checks") == one.get("checks"), name
        if one["fits"]:
            for figure in ("step_seconds", "mfu_causal", "days", "chip_hours"):
                assert again["estimate"][figure] == pytest.approx(one["estimate"][figure]), (name, figure)
    guide = (ROOT / "docs" / "plans.md").read_text()
    assert f"<!-- table -->\n{benchmark.table(RECORD)}\n<!-- /table -->" in guide


@pytest.fixture
def compiled(monkeypatch):
    """The splits that a search asked the compiler for; `fits` and `slowdown` of the list say what it answers."""
    asked = []
    predicted = {one[:4]: one for size in ("xl", "l") for one in candidates(size, 128, 8)}
    answers = SimpleNamespace(asked=asked, fits=lambda one: True, slowdown=lambda one: 1.0)

    def fake(config, topology):
        one = predicted[config.mesh.tensor, config.mesh.fsdp, config.train.accumulate, config.model.remat]
        asked.append(one)
        known = {"topology": topology, "mesh": {}, "remat": one.remat, "accumulate": one.accumulate}
        known |= {"peak_share": 1.5 - one.seconds / 100, "slices": config.mesh.dcn_data, "mesh": dict(config.mesh)}
        estimate = {"step_seconds": one.seconds * answers.slowdown(one), "mfu_causal": 0.5}
        return known | {"split": one[:4], "fits": answers.fits(one), "estimate": estimate}

    device = SimpleNamespace(platform="tpu", device_kind="TPU")
    monkeypatch.setattr(plan_search, "topology_devices", lambda topology, slices: [device] * 8)
    monkeypatch.setattr(plan_search, "plan", fake)
    return answers


def search(size="l", topology="v5p:2x2x2", changes=(), **options):
    config = imagenet.get_config(size)
    config.update_from_flattened_dict(dict(changes))
    return plan_search.search_plans(config, topology, **options)


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


def test_the_search_tries_only_meshes_whose_slices_share_data_alone(compiled):
    search(topology="v5e:2x4")  # of a single slice, whose memory fsdp 8 suits best
    assert compiled.asked[0].fsdp == 8
    compiled.asked.clear()
    search(topology="v5e:2x4", changes={"mesh.dcn_data": 2})
    assert compiled.asked and all(8 // one.tensor // one.fsdp % 2 == 0 for one in compiled.asked)


def test_the_search_gives_up_where_nothing_fits_and_keeps_what_came_nearest(compiled):
    compiled.fits = lambda one: False
    result = search()
    assert not result.found and result.compiled == plan_search.COMPILED
    assert result.nearest["split"] == max(compiled.asked, key=lambda one: one.seconds)[:4]  # here, the slower the less
    assert str(result).startswith(f"{plan_search.COMPILED} programs compiled, 0 of them fit; left out: ")


def test_where_even_the_smallest_state_is_too_large_the_compiler_says_so(compiled):
    compiled.fits = lambda one: False
    result = search("xl", "v5e:2x2", {"train.batch_size": 128})  # 16 GiB a chip, 12.7 of parameters and moments alone
    assert result.compiled and result.nearest and result.too_large > 0


@pytest.mark.parametrize(
    ("topology", "batch_size", "message"),
    [
        ("gpu:8", 128, "no search for GPUs"),
        ("v5p:2x2x2", 125, "batch_size 125 divides over no mesh of 8 chips.*multiple of 8"),
    ],
)
def test_a_search_without_candidates_says_why(compiled, topology, batch_size, message):
    with pytest.raises(UserError, match=message):  # tensor cannot split three heads
        search("l", topology, {"train.batch_size": batch_size, "model.num_heads": 3})


def test_a_search_in_which_nothing_fits_still_prints_and_writes_its_figures(compiled, monkeypatch, tmp_path, capsys):
    compiled.fits = lambda one: False
    monkeypatch.setattr(command, "table", lambda results: f"table of {results['split']}")
    command.run(
        argparse.Namespace(
            config=imagenet.get_config("l"), topology="v5p:2x2x2", json=str(tmp_path / "plan.json"), search=True
        )
    )
    written = json.loads((tmp_path / "plan.json").read_text())
    said = capsys.readouterr().out
    assert not written["fits"] and "none fits: take more chips" in said
    assert f"table of {tuple(written['split'])}" in said


@pytest.fixture
def processors(monkeypatch):
    """This machine's eight, as if they were TPUs, and a network for them: a plan without the TPU compiler."""
    monkeypatch.setattr(planning, "topology_devices", lambda topology, slices: jax.devices())
    monkeypatch.setenv("LIBTPU_INIT_ARGS", "")
    network = {"model.width": 64, "model.num_heads": 2, "data.image_size": (8, 8), "train.batch_size": 16}
    return small(**network)


def test_a_plan_tells_what_fits_what_it_costs_and_that_no_kernel_is_there(processors):
    results = planning.plan(processors, "v5e:2x4")
    assert results["fits"] and "largest_buffer" not in results
    assert results["collectives"]["all-reduce"]["bytes"] > 0.9 * results["bytes_per_chip"]["gradients"]
    assert results["estimate"]["of_which"].keys() == {"compute", "collectives"} and results["kernels"] == {}
    table = command.table(results)
    assert re.search(r"flash kernel +NO", table) and re.search(r"compute +float32, attention chunked, remat", table)
    yes = command.table(results | {"kernels": {"splash_mha_fwd_residuals": 2}})
    assert re.search(r"flash kernel +yes", yes)
    two = command.table(results | {"slices": 2, "between_slices": {"all-reduce": {"count": 1, "bytes": 1e6}}})
    assert "in 2 slices" in two and "1 a step, 1.0 MB a chip, NOT IN THE ESTIMATE" in two


@pytest.mark.parametrize("compiles", [True, False])
def test_what_does_not_fit_names_its_largest_buffer_whether_or_not_it_compiles(processors, monkeypatch, compiles):
    """Above the share that may be used, and above all that the compiler has."""
    monkeypatch.setattr(planning, "MOST", 0.0)
    if not compiles:

        def refuse(self):
            raise jax.errors.JaxRuntimeError(OUT_OF_MEMORY[0])

        monkeypatch.setattr(jax.stages.Lowered, "compile", refuse)
    results = planning.plan(processors, "v5e:2x4")
    assert not results["fits"] and "GiB a chip" in results["largest_buffer"]
    assert results["peak_share"] == results["bytes_per_chip"]["peak"] / (16 * 2**30)
    assert compiles or results["peak_share"] == pytest.approx(52.53 / 16)
    assert "DOES NOT FIT" in command.table(results) and results["largest_buffer"] in command.table(results)


def in_the_way(**changes):
    """The largest buffer of xl on 8 chips, with 8 images a step."""
    config = imagenet.get_config("xl")
    config.update_from_flattened_dict(changes | {"train.batch_size": 8})
    model, mesh = planning.configuration.model_config(config), make_mesh(-1, config.mesh.fsdp, config.mesh.tensor)
    optimizer, schedule = planning.make_optimizer(config.optim, 10)
    graph, abstract = abstract_state(model, optimizer, mesh)
    step = make_train_step(planning.make_loss(graph), optimizer, schedule, abstract)
    with jax.set_mesh(mesh):
        jaxpr = step.trace(abstract, planning._abstract_batch(config, model, mesh)).jaxpr.jaxpr
    return planning.largest_buffer(abstract.params, jaxpr, model, mesh)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"mesh.fsdp": 1}, "8.4 GiB a chip, float32[60,12288,3072] of blocks.down.kernel"),  # every chip has all of it
        ({"mesh.fsdp": 8}, "2.8 GiB a chip, float32[60,8,4096,3072], kept"),
        ({"mesh.fsdp": 1, "mesh.tensor": 8}, "22.5 GiB a chip, float32[60,8,4096,3072], kept"),  # every chip, again
        ({"mesh.fsdp": 1, "mesh.tensor": 8, "model.remat": "none"}, "22.5 GiB a chip, float32[60,8,4096,"),
    ],
)
def test_the_largest_buffer_is_that_of_one_chip(changes, named):
    assert in_the_way(**changes).startswith(named)


OUT_OF_MEMORY = (
    "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory required for HLO "
    "temporaries (52.53G) exceeds available HBM (15.75G). HLO module: jit_train_step.",
    "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 52.53G of 15.75G "
    "hbm. Exceeded hbm capacity by 36.78G.",
)


@pytest.mark.parametrize("message", OUT_OF_MEMORY)
def test_what_the_compiler_says_of_a_program_that_is_too_large_is_understood(message):
    assert planning._needed(message) == round(52.53 * 2**30)


def test_another_failure_of_the_compiler_is_told():
    for message in ("INTERNAL: something else", "Ran out of memory in memory space vmem. Used 20.00M of 16.00M vmem."):
        with pytest.raises(UserError, match=f"the TPU compiler failed: {message[:9]}"):
            planning._needed(message)


def test_the_command_prints_a_table_and_writes_json(tmp_path):
    command = [sys.executable, "-m", "igpt", "plan", "--config=configs/imagenet.py:s", "--topology=gpu:8"]
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
    assert results["chips"] == 4 and results["uncounted_loops"] == 0  # v4's two cores are one device
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
    assert not results["fits"] and results["peak_share"] > 1
    assert results["largest_buffer"].startswith("32.0 GiB a chip, bfloat16[2,16384,1024,2048]")  # a quarter of it


@pytest.mark.tpu_compile
def test_of_two_slices_only_gradients_cross_the_network_between(compiler):
    alone = planning.plan(small(**{"train.batch_size": 32, "mesh.fsdp": 4}), "v5e:2x2")
    two = planning.plan(small(**{"train.batch_size": 64, "mesh.fsdp": 4, "mesh.dcn_data": 2}), "v5e:2x2")
    assert two["chips"] == 8 and two["mesh"] == {"data": 2, "fsdp": 4, "tensor": 1}
    assert two["bytes_per_chip"]["state"] == alone["bytes_per_chip"]["state"]
    assert two["between_slices"].keys() == {"all-reduce"} and two["estimate"]["leaves_out"] == "between_slices"
    gradients = two["bytes_per_chip"]["gradients"]
    assert gradients / 2 <= two["between_slices"]["all-reduce"]["bytes"] < 1.5 * gradients  # bfloat16, float32 or both
    assert "between_slices" not in alone and "leaves_out" not in alone["estimate"]
