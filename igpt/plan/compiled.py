"""Compiles the training step of a config for chips that are not attached, and reads the plan from the program."""

import atexit
import functools
import math
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.extend.core import jaxprs_in_params
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from ml_collections import ConfigDict

from igpt.attention import block_size
from igpt.config import Config
from igpt.errors import UnreadableProgramError, UserError, first_line
from igpt.flops import train_flops_per_image
from igpt.fused import group_size
from igpt.model import ModelConfig
from igpt.optim import make_optimizer
from igpt.plan.bundles import dump_flags, take_bundles
from igpt.plan.hlo import HloProgram
from igpt.plan.roofline import Roofline
from igpt.sharding import AXES, BATCH, check_batch_size, mesh_sizes, path_of
from igpt.state import abstract_state, build_program

GIB = 1 << 30
USABLE_SHARE = 0.9  # share of a chip's memory that a plan may use; the compiler does not count everything
# Without this flag, the TPU compiler splits a product with an FSDP kernel into small products that all read and write
# the whole sum. By the compiler's own estimate, these took three times as long for size m on v5e:2x4 with fsdp 8.
COMPILER_FLAGS = "--xla_jf_spmd_threshold_for_windowed_einsum_mib=1000000"
KERNEL_SHARE = 0.4  # share of the peak: the assumed speed of kernels without bundles, in the blocks that they compute
# Matrix products per block; splash's dq and dkv both recompute the scores, our backward kernel does so once.
KERNEL_PRODUCTS = {"fwd": 2, "dq": 3, "dkv": 4, "forward": 2, "backward": 5}


class Chip(NamedTuple):
    """One chip: memory, peak and bandwidth from its datasheet, the speed of collectives from jax-ml's scaling book."""

    memory: int  # bytes
    peak: float  # dense bfloat16 FLOP/s
    bandwidth: float  # bytes/s of the memory
    links: float  # bytes/s that collectives reach over the links of one torus dimension, in both directions
    clock: float  # Hz: the peak divided by the FLOPs that the compiler assumes per cycle
    cores: int = 1  # tensor cores, which share the loops of each operation
    kernel_share: float = 1.0  # predicted share of the peak that our attention kernels reach


CHIPS = {
    "v4": Chip(32 * GIB, 275e12, 1.23e12, 0.9e11, 1.05e9, 2),
    "v5e": Chip(16 * GIB, 197e12, 0.82e12, 0.9e11, 1.5e9),
    "v5p": Chip(95 * GIB, 459e12, 2.77e12, 1.8e11, 1.75e9, 2),
    "v6e": Chip(32 * GIB, 918e12, 1.64e12, 1.8e11, 1.75e9, kernel_share=0.4),  # a head fills half of its wider unit
}
# How often the bytes of a collective pass the links of a closed ring. Open rings take up to twice as long.
LINK_PASSES = {"all-gather": 1, "reduce-scatter": 1, "all-reduce": 2, "all-to-all": 0.25, "collective-permute": 2}


def topology_devices(name: str, slices: int = 1) -> list:
    """Describes the devices of a topology such as "v5e:8x8", or of several such slices. UserError if it is unknown."""
    kind, _, shape = name.partition(":")
    if kind not in CHIPS or not re.fullmatch(r"\d+(x\d+){1,2}", shape):
        raise UserError(f"--topology={name}; give {', '.join(CHIPS)} and a shape, such as v5p:4x4x8, or gpu:NUMBER")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # no TPU host can answer the query
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # a plan uses no chip, so several may be made at once
    flags = os.environ.setdefault("LIBTPU_INIT_ARGS", COMPILER_FLAGS)
    megacore = {"chip_config_name": "megacore"} if kind == "v4" else {}  # one device per chip, as on the other kinds
    try:
        # The compiler reads its flags once, when it is loaded. A run does not need those of the dump.
        os.environ["LIBTPU_INIT_ARGS"] = f"{flags} {dump_flags(_dump_folder())}"
        return topologies.get_topology_desc(platform="tpu", topology_name=name, num_slices=slices, **megacore).devices
    except Exception as error:  # the library raises exceptions of any type
        remedy = f"{install_compiler()} if libtpu is missing, and choose a shape that is sold, such as v5e:8x8"
        raise UserError(f"--topology={name}: the TPU compiler cannot use it ({first_line(error)}); {remedy}") from None
    finally:
        os.environ["LIBTPU_INIT_ARGS"] = flags


@functools.cache
def _dump_folder() -> Path:
    """A folder for the compiler's bundles, which the end of the process removes."""
    folder = tempfile.mkdtemp(prefix="igpt-plan-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder) / "bundles"


def compile_plan(config: ConfigDict | Config, topology: str) -> dict:
    """Returns everything that can be known of a run of `config` on `topology` without the machine.

    A program that does not fit into memory is no error: `fits` is False, and `largest_buffer` names its largest
    array. For GPUs, both are missing, because there is no compiler. Raises UserError if the run cannot start.
    """
    config = Config.of(config, trains=True)
    if config.program != "igpt":
        raise UserError(f"program is {config.program}; plans are of transformers: give the config that reads its codes")
    kind, _, shape = topology.partition(":")
    if kind == "gpu":
        return _plan_without_compiler(config, topology, shape)
    devices, chip = topology_devices(topology, config.mesh.dcn_data), CHIPS[kind]
    mesh = config.mesh.make(devices)
    program = build_program(config, mesh)
    model, abstract = program.model, program.abstract
    plan = _facts_without_compiler(config, topology, model, abstract, len(devices), dict(mesh.shape))

    start = time.process_time()  # processor time, so that other programs do not count
    with jax.set_mesh(mesh):
        traced = program.train_step.trace(abstract, abstract_batch(config, model, mesh))
        plan["float32_products_in_blocks"] = float32_products_in_blocks(traced.jaxpr.jaxpr, model.depth)
        plan["libtpu_init_args"] = os.environ["LIBTPU_INIT_ARGS"]
        try:
            executable, memory = _compile(traced, plan["bytes_per_chip"]["gradients"])
        finally:
            bundles = take_bundles(_dump_folder())  # in any case, or the next program would count them
    plan["compile_seconds"] = time.process_time() - start

    plan["bytes_per_chip"] |= memory | {"memory": chip.memory}
    plan["peak_share"] = memory["peak"] / chip.memory
    plan["fits"] = memory["peak"] <= USABLE_SHARE * chip.memory
    if not plan["fits"]:
        plan["largest_buffer"] = largest_buffer(abstract.params, traced.jaxpr.jaxpr, model, mesh)
    if executable is not None:
        plan |= _read_program(text_of(executable), bundles, plan, model, chip)
    return plan


def text_of(executable: jax.stages.Compiled) -> str:
    """The program as text. Raises UnreadableProgramError if jaxlib does not know its operations."""
    try:
        return executable.as_text()
    except jax.errors.JaxRuntimeError as error:
        found = f"jaxlib {version('jaxlib')} cannot read the program of libtpu {_libtpu_version()}"
        remedy = f"{install_compiler()}, or try another topology, mesh or remat policy"
        raise UnreadableProgramError(f"{found} ({first_line(error)}); {remedy}") from None


def install_compiler() -> str:
    """The command that installs the libtpu that the installed jax was made for: a newer one may not suit it."""
    return f'pip install "jax[tpu]=={version("jax")}"'


def _libtpu_version() -> str:
    try:
        return version("libtpu")
    except PackageNotFoundError:  # it may be part of the machine
        return "of an unknown version"


def _plan_without_compiler(config: Config, topology: str, count: str) -> dict:
    """The plan for GPUs (Ampere or newer): shapes and shardings only."""
    if not re.fullmatch("[1-9][0-9]{0,6}", count):
        raise UserError(f"--topology={topology}; give gpu: and their number, such as gpu:8")
    sizes = mesh_sizes(config.mesh.data, config.mesh.fsdp, config.mesh.tensor, int(count))
    if sizes["data"] % config.mesh.dcn_data:
        found = f"mesh.dcn_data is {config.mesh.dcn_data}, and mesh.data is {sizes['data']}"
        raise UserError(f"{found}; the number of slices must divide mesh.data")
    mesh = AbstractMesh(tuple(sizes.values()), AXES, axis_types=(AxisType.Auto,) * len(AXES))
    check_batch_size("train.batch_size", config.train.batch_size, config.train.accumulate, mesh)
    device = SimpleNamespace(platform="gpu", device_kind="GPU", compute_capability="8.0")
    model = config.network(device)
    _, abstract = abstract_state(model, make_optimizer(config.optim, config.train.steps)[0], mesh)
    return _facts_without_compiler(config, topology, model, abstract, int(count), sizes)


def _facts_without_compiler(config: Config, topology: str, model, abstract, chips: int, mesh: dict) -> dict:
    """The part of a plan that follows from shapes and shardings."""
    train, state, params = config.train, jax.tree.leaves(abstract), jax.tree.leaves(abstract.params)
    plan = {"topology": topology, "chips": chips, "slices": config.mesh.dcn_data, "mesh": mesh}
    plan |= {"batch_size": train.batch_size, "accumulate": train.accumulate, "remat": model.remat}
    plan |= {"dtype": model.dtype, "attention": model.attention, "parameters": sum(leaf.size for leaf in params)}
    flops = {name: train_flops_per_image(model, name) * train.batch_size for name in ("causal", "full")}
    held = {"state": sum(map(_shard_bytes, state)), "gradients": sum(map(_shard_bytes, params))}
    return plan | {"steps": train.steps, "flops_per_step": flops, "bytes_per_chip": held}


def _shard_bytes(leaf: jax.ShapeDtypeStruct) -> int:
    return leaf.dtype.itemsize * math.prod(leaf.sharding.shard_shape(leaf.shape))


def abstract_batch(config: Config, model: ModelConfig, mesh: Mesh) -> dict:
    """The shapes and shardings of a training batch."""

    def rows(dtype, *shape):
        return jax.ShapeDtypeStruct((config.train.batch_size, *shape), dtype, sharding=NamedSharding(mesh, BATCH))

    keep = {} if model.causal else {"keep": rows(jnp.bool_, 1, model.seq_len)}
    label = {"label": rows(jnp.int32)} if model.num_classes else {}
    return {"tokens": rows(jnp.int32, model.seq_len)} | keep | label


def _compile(traced, gradients: int) -> tuple[jax.stages.Compiled | None, dict]:
    """Returns the executable and its bytes per chip. If the program is too large, the executable is None."""
    try:
        executable = traced.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        return None, {"peak": _required_bytes(str(error))}
    memory = executable.memory_analysis()
    inputs_and_outputs = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return executable, {
        "activations_and_workspace": max(memory.temp_size_in_bytes - gradients, 0),
        "peak": inputs_and_outputs + memory.temp_size_in_bytes + memory.generated_code_size_in_bytes,
    }


def _required_bytes(message: str) -> int:
    """Bytes per chip that a program needs, from the compiler's out-of-memory message.

    Raises UnreadableProgramError for any other failure.
    """
    found = re.search(r"(?:HLO temporaries \(|Ran out of memory in memory space hbm. Used )([\d.]+)([KMGT])", message)
    if not found:
        raise UnreadableProgramError(f"the TPU compiler failed: {message.strip().splitlines()[0][:300]}")
    return round(float(found[1]) * {"K": 1 << 10, "M": 1 << 20, "G": GIB, "T": 1 << 40}[found[2]])


def _read_program(text: str, bundles: dict, plan: dict, model: ModelConfig, chip: Chip) -> dict:
    """Reads collectives and kernels from a program's HLO text, and estimates the run twice."""
    program = HloProgram(text)
    facts = {"collectives": program.collectives(), "kernels": dict(program.kernels())}
    facts["uncounted_loops"] = len(program.uncounted)
    facts["cycles_seconds"] = program.cycles() / chip.clock
    if bundles:
        heads = plan["batch_size"] // plan["accumulate"] * model.num_heads // plan["chips"]
        # Our kernels' grid runs over groups of heads; a loop over the heads of a group, if there is one, is inside.
        steps = (heads // group_size(model.head_size), heads)
        facts["roofline_seconds"] = Roofline(program, bundles, chip, steps).seconds()
    facts |= estimates(plan | facts, model, chip)
    if plan["slices"] > 1:
        facts["between_slices"] = program.between_slices()
    return facts


def estimates(plan: dict, model: ModelConfig, chip: Chip) -> dict:
    """The first estimate, by the compiler's own cycles, and the second, by rooflines, if the bundles are known."""
    found = {"estimate": estimate_run(plan, plan["cycles_seconds"], model, chip)}
    if "roofline_seconds" in plan:
        found["second_estimate"] = estimate_run(plan, plan["roofline_seconds"]["operations"], model, chip)
    return found


def estimate_run(plan: dict, compute_seconds: float, model: ModelConfig, chip: Chip) -> dict:
    """Estimates step time, MFU, images/s and run time. Collectives are assumed not to overlap with computation."""
    seconds = {"compute": compute_seconds}
    if plan["kernels"]:
        seconds["attention_kernels"] = _kernel_seconds(plan, model, chip)
    moved = sum(LINK_PASSES[kind] * entry["bytes"] for kind, entry in plan["collectives"].items())
    seconds["collectives"] = moved / chip.links
    step = sum(seconds.values())
    days = step * plan["steps"] / 86400
    return {
        "step_seconds": step,
        "of_which": seconds,
        "mfu_causal": plan["flops_per_step"]["causal"] / plan["chips"] / step / chip.peak,
        "images_per_second": plan["batch_size"] / step,
        "days": days,
        "chip_hours": 24 * days * plan["chips"],
    }


def _kernel_seconds(plan: dict, model: ModelConfig, chip: Chip) -> float:
    """Seconds of a step in attention kernels: of ours by their bundles, of splash by an assumed share of the peak.

    Splash decides while it runs which blocks it computes, so its bundles do not tell its time.
    """
    counted = plan.get("roofline_seconds", {}).get("kernels")
    if counted is not None and not any(name.startswith("splash") for name in plan["kernels"]):
        return counted
    # Examples of kernels' names are splash_mha_dkv_no_residuals and fused_attention_forward.
    products = sum(KERNEL_PRODUCTS[name.split("_")[2]] * count for name, count in plan["kernels"].items())
    images = plan["batch_size"] / plan["accumulate"] / plan["chips"]
    return images * kernel_flops(model, products / model.depth) / (KERNEL_SHARE * chip.peak)


def kernel_flops(model: ModelConfig, products: float) -> float:
    """FLOPs per image of `products` attention products in each layer. Blocks on the diagonal are computed whole."""
    block = block_size(model.seq_len)
    across = math.ceil(model.seq_len / block)
    blocks = across * (across + 1) / 2 if model.causal else across**2
    return 2.0 * model.width * model.depth * products * blocks * block**2


def float32_products_in_blocks(jaxpr, depth: int) -> int | None:
    """Counts matrix products with a float32 operand inside the loops over the layers, forward and backward.

    Products inside attention kernels do not count: softmax is float32 there. Returns None if there is no such loop.
    """
    found = []
    for equation, in_layers in _equations(jaxpr, depth):
        if in_layers and equation.primitive.name == "dot_general":
            summed, batch = equation.params["dimension_numbers"]
            operands = [operand.aval for operand in equation.invars]
            # Otherwise the equation is a sum of elementwise products.
            if all(x.ndim > len(s) + len(b) for x, s, b in zip(operands, summed, batch, strict=True)):
                found.append(any(x.dtype == jnp.float32 for x in operands))
    return sum(found) if found else None


def _equations(jaxpr, depth: int = 0, in_layers: bool = False) -> Iterator[tuple]:
    """Yields (equation, whether it is inside a loop over `depth` layers), except equations inside kernels."""
    for equation in jaxpr.eqns:
        yield equation, in_layers
        if equation.primitive.name != "pallas_call":
            inside = in_layers or _is_layer_loop(equation, depth)
            for inner in jaxprs_in_params(equation.params):
                yield from _equations(inner, depth, inside)


def _is_layer_loop(equation, depth: int) -> bool:
    """Whether it is a scan of `depth` steps over parameters. Scans over micro-batches or blocks read only integers."""
    if equation.primitive.name != "scan" or equation.params["length"] != depth:
        return False
    return any(jnp.issubdtype(aval.dtype, jnp.floating) for aval in _stacked(equation, "invars"))


def _stacked(scan, variables: str) -> list:
    """The abstract values of a scan's "invars" or "outvars", if they have one slice for each step."""
    (body,) = jaxprs_in_params(scan.params)
    pairs = zip(getattr(scan, variables), getattr(body, variables), strict=True)
    return [whole.aval for whole, piece in pairs if whole.aval.shape != piece.aval.shape]


def saved_by_scans(jaxpr) -> list:
    """The abstract values that scans collect over their steps. The backward pass needs them for every layer."""
    scans = [equation for equation, _ in _equations(jaxpr) if equation.primitive.name == "scan"]
    return [aval for scan in scans for aval in _stacked(scan, "outvars")]


def largest_buffer(params, jaxpr, model: ModelConfig, mesh: Mesh) -> str:
    """Names the largest array that a chip holds: a parameter, or an array that scans save for the backward pass."""
    found, shapes = [], {leaf.shape for leaf in jax.tree.leaves(params)}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        text = f" of {path_of(path)}; its gradient and both of Adam's moments are as large"
        found.append((_shard_bytes(leaf), leaf, text))
    for aval in saved_by_scans(jaxpr):
        if aval.shape not in shapes:  # an array with the shape of a parameter is a gradient
            by_tensor = aval.shape[-1:] == (model.mlp_width,) or model.num_heads in aval.shape[2:-1]
            parts = mesh.shape["data"] * mesh.shape["fsdp"] * (mesh.shape["tensor"] if by_tensor else 1)
            found.append((aval.dtype.itemsize * aval.size / parts, aval, ", kept for the backward pass"))
    size, array, text = max(found, key=lambda entry: entry[0])
    return f"{size / GIB:.1f} GiB a chip, {array.dtype.name}[{','.join(map(str, array.shape))}]{text}"
