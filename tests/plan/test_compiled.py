"""Plans of one config. With -m tpu_compile the TPU compiler itself makes them (pip install -e ".[tpu]")."""

import os
import re
from types import SimpleNamespace
from unittest import mock

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.interpreters.partial_eval import dce_jaxpr

from configs import imagenet
from igpt.errors import UnreadableProgramError, UserError
from igpt.model import PRESETS, ImageGPT, ModelConfig
from igpt.plan import compiled
from igpt.plan.compiled import CHIPS, compile_plan
from igpt.plan.hlo import HloProgram
from igpt.remat import REMAT
from igpt.sharding import make_mesh


def test_a_gpu_plan_has_parameters_flops_and_bytes():
    plan = compile_plan(imagenet.get_config("s"), "gpu:4")
    assert plan["parameters"] == 76_571_648 and plan["mesh"] == {"data": 4, "fsdp": 1, "tensor": 1}
    assert (plan["attention"], plan["dtype"]) == ("cudnn", "bfloat16")  # the GPU's, not this machine's
    state, gradients = plan["bytes_per_chip"].values()
    assert gradients == 4 * 76_571_648
    assert 0 < state - 12 * 76_571_648 < 1024  # parameters and two moments, then some counters
    products = 6 * 128 * 1024 * (24 * 12 * 512**2 + 512 * 512)
    pairs = 128 * 1024**2 * 24 * 512 * 12
    assert plan["flops_per_step"] == {"causal": products + pairs / 2, "full": products + pairs}
    assert not {"fits", "estimate", "collectives"} & plan.keys()


def test_the_state_of_a_chip_shrinks_as_fsdp_grows():
    sizes = []
    for fsdp in (1, 2, 4, 8):
        config = imagenet.get_config("s")
        config.mesh.fsdp = fsdp
        sizes.append(compile_plan(config, "gpu:8")["bytes_per_chip"]["state"])
    for fsdp, size in zip((2, 4, 8), sizes[1:], strict=True):
        assert sizes[0] / fsdp <= size < 1.01 * sizes[0] / fsdp  # every chip holds the gains


def test_attention_counts_fully_without_a_causal_mask():
    causal, bert = (compile_plan(imagenet.get_config(name), "gpu:4")["flops_per_step"] for name in ("s", "s:bert"))
    assert bert["causal"] == bert["full"] == causal["full"] > causal["causal"]


@pytest.mark.parametrize(
    ("topology", "changes", "message"),
    [
        ("v9:2x2", {}, "give v4, v5e, v5p, v6e"),
        ("v5e", {}, "give v4, v5e, v5p, v6e"),
        ("v5e:8", {}, "give v4, v5e, v5p, v6e"),
        ("gpu:none", {}, "such as gpu:8"),
        ("gpu:0", {}, "such as gpu:8"),
        ("gpu:\u0663", {}, "such as gpu:8"),  # a digit that int() reads, too
        ("gpu:8", {"mesh.dcn_data": 3}, "mesh.dcn_data is 3.*mesh.data is 8"),
        ("gpu:8", {"mesh.fsdp": 3}, "asks for a multiple of 3 devices, but there are 8"),
        ("gpu:8", {"train.batch_size": 12}, "batch_size 12 does not divide into 8"),
        ("gpu:8", {"train.steps": 0}, "train.steps is 0"),
        ("gpu:8", {"model.attention": "splash"}, "'splash' needs a TPU.*this is GPU"),
    ],
)
def test_a_run_that_cannot_start_raises_a_user_error(small_config, topology, changes, message):
    with pytest.raises(UserError, match=message):
        compile_plan(small_config(**changes), topology)


def test_a_gpu_plan_accepts_an_attention_kernel_of_gpus(small_config):
    assert compile_plan(small_config(**{"model.attention": "cudnn"}), "gpu:8")["attention"] == "cudnn"


def test_the_bundles_of_an_unreadable_program_are_not_left_for_the_next_one(cpu_config, monkeypatch, tmp_path):
    def refuse(executable):
        raise UnreadableProgramError("jaxlib cannot read it")

    (tmp_path / "bundles").mkdir()
    (tmp_path / "bundles" / "1-fusion.1-71-final_bundles.txt").write_text("")
    monkeypatch.setattr(compiled, "_dump_folder", lambda: tmp_path / "bundles")
    monkeypatch.setattr(compiled, "text_of", refuse)
    with pytest.raises(UnreadableProgramError):
        compile_plan(cpu_config, "v5e:2x4")
    assert not (tmp_path / "bundles").exists()


def test_several_plans_may_be_made_at_once(monkeypatch):
    """libtpu locks its chips, of which a plan uses none."""
    seen = []

    def describe(**options):
        seen.append(os.environ.get("ALLOW_MULTIPLE_LIBTPU_LOAD"))
        return SimpleNamespace(devices=[])

    with mock.patch.dict(os.environ):
        os.environ.pop("ALLOW_MULTIPLE_LIBTPU_LOAD", None)
        monkeypatch.setattr(compiled.topologies, "get_topology_desc", describe)
        compiled.topology_devices("v5e:2x4")
    assert seen == ["1"]


def gradient_jaxpr(**changes):
    """The gradient of a small network. No loop except those over the layers has 7 steps."""
    config = ModelConfig(**dict(width=64, depth=7, num_heads=2, vocab_size=11, seq_len=512, dtype="bfloat16") | changes)
    graph, params = nnx.split(nnx.eval_shape(lambda: ImageGPT(config, nnx.Rngs(0))))
    tokens = jnp.zeros((2, 512), jnp.int32)
    return jax.make_jaxpr(jax.grad(lambda params: nnx.merge(graph, params)(tokens).sum()))(params).jaxpr


def test_a_program_that_jaxlib_cannot_read_is_said_in_words(monkeypatch):
    """Seen with 2,304 tokens on v5p:2x2x2: jaxlib 0.10.2 refuses operations of libtpu 0.0.52, and reads 0.0.42.1's."""

    def as_text(self):
        raise jax.errors.JaxRuntimeError("INTERNAL: async-update instruction should have 1 operands\ntrace")

    executable = jax.jit(lambda: 0).lower().compile()
    monkeypatch.setattr(jax.stages.Compiled, "as_text", as_text)
    suitable = re.escape(f'pip install "jax[tpu]=={jax.__version__}"')
    with pytest.raises(
        UserError, match=rf"cannot read the program.*should have 1 operands\); {suitable}, or try another"
    ):
        compiled.text_of(executable)


@pytest.mark.parametrize("attention", ["fused", "splash", "chunked"])
@pytest.mark.parametrize("remat", list(REMAT))
def test_no_matrix_product_of_a_bfloat16_block_reads_float32(attention, remat):
    assert compiled.float32_products_in_blocks(gradient_jaxpr(attention=attention, remat=remat, width=128), 7) == 0


def test_matrix_products_that_read_float32_are_counted():
    # Projections: 4 forward, 8 backward. Each of the two blocks of attention: 2 forward, 5 backward.
    count = compiled.float32_products_in_blocks(gradient_jaxpr(attention="chunked", dtype="float32"), 7)
    assert count == 4 + 8 + 2 * (2 + 5)
    jaxpr = gradient_jaxpr(attention="chunked", dtype="float32")
    assert compiled.float32_products_in_blocks(jaxpr, 8) is None  # no loop has 8 steps


def traced_step(config, mesh):
    """The abstract state, the train step's jaxpr and the network, without compiling."""
    program = compiled.build_program(config := compiled.Config.of(config), mesh)
    batch = compiled.abstract_batch(config, program.model, mesh)
    with jax.set_mesh(mesh):
        return program.abstract, program.train_step.trace(program.abstract, batch).jaxpr.jaxpr, program.model


def test_a_loop_over_micro_batches_is_not_taken_for_the_layers(small_config):
    def count(accumulate):
        config = small_config(**{"model.depth": 4, "train.batch_size": 32, "train.accumulate": accumulate})
        return compiled.float32_products_in_blocks(traced_step(config, make_mesh(8))[1], 4)

    # On a CPU all products read float32. The head's are in the loop over micro-batches, but not in a layer.
    assert count(4) == count(2) > 0


def dead_code_removed(jaxpr):
    """Removes what is not needed, as the compiler does. JAX's backward pass repeats the whole block."""
    return dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))[0]


@pytest.mark.parametrize(
    ("remat", "again"), [("none", 0), ("minimal", 0), ("dots", 2 * 2), ("attention", 3), ("full", 2 * 2 + 3)]
)
def test_each_remat_policy_recomputes_its_products(remat, again):
    jaxpr = gradient_jaxpr(attention="chunked", dtype="float32", remat=remat)  # so that all products count
    assert compiled.float32_products_in_blocks(dead_code_removed(jaxpr), 7) == 4 + 8 + 2 * (2 + 5) + again


KERNELS = {  # the forward kernel of each back end, as a program's text names it
    "splash": "name=splash_mha_fwd_residuals",
    "cudnn": "dot_product_attention_fwd_wrapper",
}


@pytest.mark.parametrize("attention", KERNELS)
@pytest.mark.parametrize(("remat", "times"), [("none", 1), ("minimal", 1), ("dots", 2), ("attention", 1), ("full", 2)])
def test_only_dots_and_full_run_the_attention_kernel_twice(monkeypatch, attention, remat, times):
    for check in ("check_cudnn_version", "check_is_flash_attention"):  # they need a GPU
        monkeypatch.setattr(f"jax._src.cudnn.fused_attention_stablehlo.{check}", lambda *_, **__: 90000)
    jaxpr = gradient_jaxpr(attention=attention, remat=remat, width=128)  # two heads of 64
    assert len(re.findall(rf"\b{KERNELS[attention]}\b", str(dead_code_removed(jaxpr)))) == times


def test_the_estimate_sums_cycles_attention_kernels_and_collectives():
    model = ModelConfig(width=64, depth=5, num_heads=2, seq_len=1024)
    kernels = {"fwd_residuals": 2 * 3 * 5, "dq_no_residuals": 3 * 5, "dkv_no_residuals": 3 * 5}
    plan = {
        "kernels": {f"splash_mha_{name}": count for name, count in kernels.items()},  # forward twice, 3 micro-batches
        "collectives": {"all-reduce": {"count": 1, "bytes": 9e10}, "all-gather": {"count": 1, "bytes": 4.5e10}},
        "flops_per_step": {"causal": 4 * 197e12, "full": 0.0},
        **{"batch_size": 12, "chips": 4, "accumulate": 3, "steps": 86400},
    }
    estimate = compiled.estimate_run(plan, 2.0, model, CHIPS["v5e"])
    parts = estimate["of_which"]
    assert parts["compute"] == 2.0 and parts["collectives"] == 2 * 1.0 + 0.5  # an all-reduce passes the links twice
    # 3 images a chip; twice 2 products forward, 3 and 4 backward; in each layer 3 blocks of 512 x 512.
    flops = 3 * (2 * 2 + 3 + 4) * 2 * 64 * 3 * 512**2 * 5
    assert parts["attention_kernels"] == pytest.approx(flops / (0.4 * 197e12))
    assert estimate["step_seconds"] == estimate["days"] == sum(parts.values())
    assert estimate["mfu_causal"] == pytest.approx(1 / 4.5, rel=0.01)
    assert estimate["images_per_second"] == pytest.approx(12 / 4.5, rel=0.01)


@pytest.mark.parametrize(("seq_len", "causal", "share"), [(1024, True, 3 / 4), (4096, True, 9 / 16), (512, False, 1)])
def test_kernels_compute_whole_blocks_also_on_the_diagonal(seq_len, causal, share):
    model = ModelConfig(width=64, depth=5, num_heads=2, seq_len=seq_len, causal=causal)
    assert compiled.kernel_flops(model, 2) == 2 * 2 * 64 * 5 * share * seq_len**2


def test_a_plan_has_memory_collectives_kernels_and_an_estimate(cpu_plan):
    assert cpu_plan["fits"] and "largest_buffer" not in cpu_plan
    assert cpu_plan["collectives"]["all-reduce"]["bytes"] > 0.9 * cpu_plan["bytes_per_chip"]["gradients"]
    assert cpu_plan["estimate"]["of_which"].keys() == {"compute", "collectives"} and cpu_plan["kernels"] == {}


@pytest.mark.parametrize("compiles", [True, False])
def test_a_plan_that_does_not_fit_names_its_largest_buffer(cpu_config, monkeypatch, compiles):
    """Programs that need more than the usable share, and programs that the compiler refuses."""
    monkeypatch.setattr(compiled, "USABLE_SHARE", 0.0)
    if not compiles:

        def refuse(self):
            raise jax.errors.JaxRuntimeError(OUT_OF_MEMORY[0])

        monkeypatch.setattr(jax.stages.Lowered, "compile", refuse)
    plan = compile_plan(cpu_config, "v5e:2x4")
    assert not plan["fits"] and "GiB a chip" in plan["largest_buffer"]
    assert plan["peak_share"] == plan["bytes_per_chip"]["peak"] / (16 * 2**30)
    assert compiles or plan["peak_share"] == pytest.approx(52.53 / 16)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"mesh.fsdp": 1}, "8.4 GiB a chip, float32[60,12288,3072] of blocks.down.kernel"),  # every chip has all of it
        ({"mesh.fsdp": 8}, "2.8 GiB a chip, float32[60,8,4096,3072], kept"),
        ({"mesh.fsdp": 1, "mesh.tensor": 8}, "22.5 GiB a chip, float32[60,8,4096,3072], kept"),  # again all of it
        ({"mesh.fsdp": 1, "mesh.tensor": 8, "model.remat": "none"}, "22.5 GiB a chip, float32[60,8,4096,"),
    ],
)
def test_the_largest_buffer_is_that_of_one_chip(changes, named):
    config = imagenet.get_config("xl")
    config.update_from_flattened_dict(changes | {"train.batch_size": 8})
    mesh = make_mesh(-1, config.mesh.fsdp, config.mesh.tensor)
    abstract, jaxpr, model = traced_step(config, mesh)
    assert compiled.largest_buffer(abstract.params, jaxpr, model, mesh).startswith(named)


OUT_OF_MEMORY = (
    "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory required for HLO "
    "temporaries (52.53G) exceeds available HBM (15.75G). HLO module: jit_train_step.",
    "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 52.53G of 15.75G "
    "hbm. Exceeded hbm capacity by 36.78G.",
)


@pytest.mark.parametrize("message", OUT_OF_MEMORY)
def test_the_compilers_out_of_memory_messages_are_parsed(message):
    assert compiled._required_bytes(message) == round(52.53 * 2**30)


def test_another_failure_of_the_compiler_is_an_error_that_a_search_passes_over():
    for message in ("INTERNAL: something else", "Ran out of memory in memory space vmem. Used 20.00M of 16.00M vmem."):
        with pytest.raises(UnreadableProgramError, match=f"the TPU compiler failed: {message[:9]}"):
            compiled._required_bytes(message)


@pytest.fixture
def compiler():
    pytest.importorskip("libtpu", reason='pip install -e ".[tpu]"')


@pytest.mark.tpu_compile
@pytest.mark.parametrize("topology", ["v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
@pytest.mark.parametrize("size", list(PRESETS))  # heads of 64, 128 and 96; 1024, 2304 and 4096 positions
def test_every_kind_of_tpu_compiles_the_step_of_every_size_with_our_kernels(compiler, topology, size):
    config = imagenet.get_config(size)
    config.model.depth, config.train.batch_size, config.mesh.fsdp, config.model.remat = 2, 4, 4, "full"
    plan = compile_plan(config, topology)
    assert PRESETS[size]["seq_len"] == config.data.image_size[0] ** 2
    assert plan["fits"] and plan["float32_products_in_blocks"] == 0
    assert plan["chips"] == 4 and plan["uncounted_loops"] == 0  # v4's two cores are one device
    if topology.startswith("v4") and size in ("l", "l48", "xl"):
        assert plan["attention"] == "splash"  # a v4 has little VMEM
    else:  # two layers, forward and recomputed
        assert plan["kernels"] == {"fused_attention_forward": 4, "fused_attention_backward": 2}
    assert plan["collectives"]["all-gather"]["bytes"] > 0  # fsdp's
    first, second = plan["estimate"], plan["second_estimate"]
    assert 0.02 < first["mfu_causal"] < second["mfu_causal"] < 0.9
    assert first["of_which"]["attention_kernels"] == second["of_which"]["attention_kernels"] > 0
    assert plan["bytes_per_chip"]["peak"] > plan["bytes_per_chip"]["state"]


@pytest.mark.tpu_compile
def test_nothing_copies_queries_keys_or_values_for_our_kernels(compiler, small_config, monkeypatch):
    programs = []
    monkeypatch.setattr(compiled, "HloProgram", lambda text: programs.append(HloProgram(text)) or programs[-1])
    config = small_config(**{"model.width": 128, "model.num_heads": 2, "data.image_size": (16, 16)})
    assert compile_plan(config, "v5e:2x2")["kernels"]["fused_attention_backward"] == 2
    moving = [one for one, _ in programs[0] if one.opcode in ("slice", "pad", "concatenate")]
    assert moving and not [one.line for one in moving if one.shape.startswith("bf16")]  # the others move tokens


@pytest.mark.tpu_compile
def test_no_layer_has_positions_last_in_its_input(compiler, small_config, monkeypatch):
    texts = []
    monkeypatch.setattr(compiled, "HloProgram", lambda text: texts.append(text) or HloProgram(text))
    compile_plan(small_config(**{"train.batch_size": 64}), "v5e:2x2")
    assert "bf16[16,1024,512]{2,1,0" in texts[0] and "bf16[16,1024,512]{1,2,0" not in texts[0]


@pytest.mark.tpu_compile
def test_splash_compiles_where_our_kernels_do_not_fit(compiler, small_config):
    plan = compile_plan(small_config(**{"model.width": 448, "model.num_heads": 7}), "v5e:2x2")
    assert plan["fits"] and plan["attention"] == "splash" and plan["kernels"]["splash_mha_fwd_residuals"] > 0
    assert plan["estimate"]["of_which"]["attention_kernels"] > 0


@pytest.mark.tpu_compile
def test_a_batch_that_is_too_large_names_its_largest_buffer(compiler, small_config):
    plan = compile_plan(small_config(**{"train.batch_size": 16384, "model.remat": "none"}), "v5e:2x2")
    assert not plan["fits"] and plan["peak_share"] > 1
    assert plan["largest_buffer"].startswith("32.0 GiB a chip, bfloat16[2,16384,1024,2048]")  # a quarter of it


@pytest.mark.tpu_compile
def test_only_gradients_cross_from_slice_to_slice(compiler, small_config):
    alone = compile_plan(small_config(**{"train.batch_size": 32, "mesh.fsdp": 4}), "v5e:2x2")
    two = compile_plan(small_config(**{"train.batch_size": 64, "mesh.fsdp": 4, "mesh.dcn_data": 2}), "v5e:2x2")
    assert two["chips"] == 8 and two["mesh"] == {"data": 2, "fsdp": 4, "tensor": 1}
    assert two["bytes_per_chip"]["state"] == alone["bytes_per_chip"]["state"]
    assert two["between_slices"].keys() == {"all-reduce"}
    gradients = two["bytes_per_chip"]["gradients"]
    assert gradients / 2 <= two["between_slices"]["all-reduce"]["bytes"] < 1.5 * gradients  # bfloat16, float32 or both
    assert "between_slices" not in alone
