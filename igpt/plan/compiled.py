"""One plan: the real train step of a config, compiled for chips that are not here, and what can be read from it."""

import math
import os
import re
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.extend.core import jaxprs_in_params
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from ml_collections import ConfigDict

from igpt import config as configuration
from igpt.attention import block_size
from igpt.errors import UserError
from igpt.flops import train_flops_per_image
from igpt.loss import make_loss
from igpt.model import ModelConfig
from igpt.optim import make_optimizer
from igpt.plan.hlo import Program
from igpt.sharding import AXES, BATCH, check_batch_size, make_mesh, mesh_sizes, path_of
from igpt.state import abstract_state, make_train_step

GIB = 1 << 30
MOST = 0.9  # of a chip's memory that a plan may use: what the compiler does not see needs the rest
# Of the TPU compiler. Left alone it splits the products with fsdp's kernels into a ring of small ones, each of which
# reads and writes the sum: m on v5e:2x4 with fsdp 8 took three times as long by its own estimate.
FLAGS = "--xla_jf_spmd_threshold_for_windowed_einsum_mib=1000000"
KERNEL_SHARE = 0.4  # of the peak, assumed of the attention kernels in the blocks that they compute
KERNEL_PRODUCTS = {"fwd": 2, "dq": 3, "dkv": 4}  # of queries and keys: both backward kernels compute the scores again


class Chip(NamedTuple):
    """Of the vendor's datasheets: memory in bytes, dense bfloat16 peak in FLOP/s, memory bandwidth in bytes/s; and
    bytes/s over the links along one dimension of the torus, both ways, what collectives attain (jax-ml's scaling book).
    The clock in Hz follows from the peak and the FLOPs a cycle that the compiler reckons with."""

    memory: int
    peak: float
    bandwidth: float
    links: float
    clock: float


CHIPS = {
    "v4": Chip(32 * GIB, 275e12, 1.23e12, 0.9e11, 1.05e9),
    "v5e": Chip(16 * GIB, 197e12, 0.82e12, 0.9e11, 1.5e9),
    "v5p": Chip(95 * GIB, 459e12, 2.77e12, 1.8e11, 1.75e9),
    "v6e": Chip(32 * GIB, 918e12, 1.64e12, 1.8e11, 1.75e9),
}
# Times a collective's bytes pass the links of a ring that is closed: one on a line takes up to twice as long.
PASSES = {"all-gather": 1, "reduce-scatter": 1, "all-reduce": 2, "all-to-all": 0.25, "collective-permute": 2}


def topology_devices(name: str, slices: int = 1) -> list:
    """The devices of "v5e:8x8" and the like, or of several such slices: descriptions to compile for.

    Raises UserError where there is no such thing.
    """
    kind, _, shape = name.partition(":")
    if kind not in CHIPS or not re.fullmatch(r"\d+(x\d+){1,2}", shape):
        raise UserError(
            f"--topology={name}; give {', '.join(CHIPS)} with the chips in each dimension, such as v5e:8x8 or "
            "v5p:4x4x8, or gpu:NUMBER"
        )
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # there is no TPU host to ask
    os.environ.setdefault("LIBTPU_INIT_ARGS", FLAGS)
    megacore = {"chip_config_name": "megacore"} if kind == "v4" else {}  # one device a chip; the others are so anyway
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=name, num_slices=slices, **megacore).devices
    except Exception as error:  # the library raises anything
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"--topology={name}: the TPU compiler cannot describe it ({reason}); pip install libtpu if that is "
            "missing, and choose a shape that is sold, such as v5e:8x8 or v5p:4x4x8"
        ) from None


def plan(config: ConfigDict, topology: str) -> dict:
    """Everything that can be known of a run of `config` on `topology` without it. Raises UserError for what cannot run.

    A program that does not fit the memory is no error: `fits` is False, and `largest_buffer` says what is in the way.
    Without a compiler, on GPUs, neither is known.
    """
    configuration.check(config)
    kind, _, count = topology.partition(":")
    if kind == "gpu":
        return _without_compiler(config, topology, count)
    devices = topology_devices(topology, config.mesh.dcn_data)
    chip, train = CHIPS[kind], config.train
    model = configuration.model_config(config, devices[0])
    mesh = make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor, devices, config.mesh.dcn_data)
    check_batch_size("train.batch_size", train.batch_size, train.accumulate, mesh)
    optimizer, schedule = make_optimizer(config.optim, train.steps)
    graph, abstract = abstract_state(model, optimizer, mesh)
    loss = make_loss(graph, config.objective.generative, config.objective.classification)
    dropout_seed = config.seed if model.has_dropout else None
    step = make_train_step(loss, optimizer, schedule, abstract, train.accumulate, dropout_seed)
    results = _known(config, topology, model, abstract, len(devices), dict(mesh.shape))

    start = time.perf_counter()
    with jax.set_mesh(mesh):
        traced = step.trace(abstract, _abstract_batch(config, model, mesh))
        jaxpr = traced.jaxpr.jaxpr
        results["float32_products_in_blocks"] = wide_products(jaxpr, model.depth)
        results["libtpu_init_args"] = os.environ["LIBTPU_INIT_ARGS"]
        held = results["bytes_per_chip"]
        try:
            compiled = traced.lower().compile()
        except jax.errors.JaxRuntimeError as error:
            compiled, peak = None, _needed(str(error))
        else:
            memory = compiled.memory_analysis()
            held["activations_and_workspace"] = max(memory.temp_size_in_bytes - held["gradients"], 0)
            peak = (
                memory.argument_size_in_bytes
                + memory.output_size_in_bytes
                - memory.alias_size_in_bytes
                + memory.temp_size_in_bytes
                + memory.generated_code_size_in_bytes
            )
    results["compile_seconds"] = time.perf_counter() - start
    held |= {"peak": peak, "memory": chip.memory}
    results |= {"peak_share": peak / chip.memory, "fits": peak <= MOST * chip.memory}
    if not results["fits"]:
        results["largest_buffer"] = largest_buffer(abstract.params, jaxpr, model, mesh)
    if compiled is None:
        return results
    program = Program(compiled.as_text())
    results |= {"collectives": program.collectives(), "kernels": dict(program.kernels())}
    results["uncounted_loops"] = len(program.uncounted)
    results["estimate"] = estimate(results, program.cycles() / chip.clock, model, chip)
    if config.mesh.dcn_data > 1:
        results["between_slices"] = program.between_slices()
        results["estimate"]["leaves_out"] = "between_slices"
    return results


def wide_products(jaxpr, depth: int) -> int | None:
    """How many matrix products inside the loops over the layers, forward and backward, have float32 operands.

    Kernels are not looked into: there softmax is float32. Sums of x * y along one dimension are no matrix products.
    None where there is no such loop, and nothing was looked at.
    """
    found = list(_products_of_layers(jaxpr, depth))
    return sum(found) if found else None


def _products_of_layers(jaxpr, depth: int, inside: bool = False) -> Iterator[bool]:
    """Of each matrix product inside the loops over the layers, whether it has float32 operands."""
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        if inside and name == "dot_general":
            summed, batch = equation.params["dimension_numbers"]
            operands = [operand.aval for operand in equation.invars]
            if all(x.ndim > len(s) + len(b) for x, s, b in zip(operands, summed, batch, strict=True)):
                yield any(x.dtype == jnp.float32 for x in operands)
        if name != "pallas_call":
            for inner in jaxprs_in_params(equation.params):
                yield from _products_of_layers(inner, depth, inside or _is_over_layers(equation, depth))


def _is_over_layers(equation, depth: int) -> bool:
    """Whether a loop has as many rounds and reads parameters: one over micro-batches or blocks reads whole numbers."""
    if equation.primitive.name != "scan" or equation.params["length"] != depth:
        return False
    (inner,) = jaxprs_in_params(equation.params)
    return any(jnp.issubdtype(aval.dtype, jnp.floating) for aval in _by_round(equation.invars, inner.invars))


def _by_round(outside, inside) -> Iterator:
    """Of what goes into a scan, or comes out, the shapes of what has a piece for each round."""
    for whole, piece in zip(outside, inside, strict=True):
        if whole.aval.shape != piece.aval.shape:
            yield whole.aval


def _known(config: ConfigDict, topology: str, model, abstract, chips: int, mesh: dict) -> dict:
    """What needs no compiler."""
    train = config.train
    causal, full = (train_flops_per_image(model, convention) * train.batch_size for convention in ("causal", "full"))

    def shard_bytes(tree) -> int:
        return sum(
            leaf.dtype.itemsize * math.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in jax.tree.leaves(tree)
        )

    return {
        "topology": topology,
        "chips": chips,
        "slices": config.mesh.dcn_data,
        "mesh": mesh,
        "batch_size": train.batch_size,
        "accumulate": train.accumulate,
        "remat": model.remat,
        "dtype": model.dtype,
        "attention": model.attention,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(abstract.params)),
        "steps": train.steps,
        "flops_per_step": {"causal": causal, "full": full},
        "bytes_per_chip": {"state": shard_bytes(abstract), "gradients": shard_bytes(abstract.params)},
    }


def _abstract_batch(config: ConfigDict, model, mesh: Mesh) -> dict:
    def rows(dtype, *shape):
        shape = (config.train.batch_size, *shape)
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, BATCH))

    batch = {"tokens": rows(jnp.int32, model.seq_len)}
    if not model.causal:
        batch["keep"] = rows(jnp.bool_, 1, model.seq_len)
    return batch | ({"label": rows(jnp.int32)} if model.num_classes else {})


def estimate(results: dict, compute_seconds: float, model: ModelConfig, chip: Chip) -> dict:
    """Step time and what follows from it, as if no collective ran beside the computation."""
    seconds = {"compute": compute_seconds}
    if results["kernels"]:
        # By name, such as splash_mha_dkv_no_residuals.
        products = sum(KERNEL_PRODUCTS[name.split("_")[2]] * count for name, count in results["kernels"].items())
        images = results["batch_size"] / results["accumulate"] / results["chips"]
        seconds["attention_kernels"] = images * kernel_flops(model, products / model.depth) / (KERNEL_SHARE * chip.peak)
    moved = sum(PASSES[kind] * entry["bytes"] for kind, entry in results["collectives"].items())
    seconds["collectives"] = moved / chip.links
    step = sum(seconds.values())
    flops = results["flops_per_step"]["causal"] / results["chips"]
    days = step * results["steps"] / 86400
    return {
        "step_seconds": step,
        "of_which": seconds,
        "mfu_causal": flops / step / chip.peak,
        "images_per_second": results["batch_size"] / step,
        "days": days,
        "chip_hours": 24 * days * results["chips"],
    }


def kernel_flops(model: ModelConfig, products: float) -> float:
    """Of an image: so many products of queries and keys in each layer, on whole blocks, those of the diagonal too."""
    block = block_size(model.seq_len)
    across = math.ceil(model.seq_len / block)
    blocks = across * (across + 1) / 2 if model.causal else across**2
    return 2.0 * model.width * model.depth * products * blocks * block**2


def _needed(message: str) -> int:
    """Bytes of a chip that a program would take which the compiler refuses, or UserError for another failure of it."""
    found = re.search(r"(?:HLO temporaries \(|Ran out of memory in memory space hbm. Used )([\d.]+)([KMGT])", message)
    if not found:
        raise UserError(f"the TPU compiler failed: {message.strip().splitlines()[0][:300]}")
    return round(float(found[1]) * {"K": 1 << 10, "M": 1 << 20, "G": GIB, "T": 1 << 40}[found[2]])


def largest_buffer(params, jaxpr, model: ModelConfig, mesh: Mesh) -> str:
    """The largest piece that a chip holds, of the state or of what loops leave behind for the backward pass."""
    sizes, shapes = {}, set()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        shapes.add(leaf.shape)
        shape = leaf.sharding.shard_shape(leaf.shape)
        what = f"{_type(leaf)} of {path_of(path)}; its gradient and both of Adam's moments are as large"
        sizes[what] = leaf.dtype.itemsize * math.prod(shape)
    for aval in _stacked(jaxpr):
        if aval.shape not in shapes:  # a gradient's
            by_tensor = aval.shape[-1:] == (model.mlp_width,) or model.num_heads in aval.shape[2:-1]
            parts = mesh.shape["data"] * mesh.shape["fsdp"] * (mesh.shape["tensor"] if by_tensor else 1)
            sizes[f"{_type(aval)}, kept for the backward pass"] = aval.dtype.itemsize * aval.size / parts
    what = max(sizes, key=sizes.get)
    return f"{sizes[what] / GIB:.1f} GiB a chip, {what}"


def _type(x) -> str:
    return f"{x.dtype.name}{list(x.shape)}".replace(" ", "")


def _stacked(jaxpr) -> Iterator:
    """The values that loops leave behind for each of their rounds: what a backward pass keeps of every layer."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "scan":
            (inner,) = jaxprs_in_params(equation.params)
            yield from _by_round(equation.outvars, inner.outvars)
        for inner in jaxprs_in_params(equation.params):
            yield from _stacked(inner)


def _without_compiler(config: ConfigDict, topology: str, count: str) -> dict:
    """For GPUs, from Ampere on: shapes and shardings only."""
    if not count.isdecimal() or int(count) < 1:
        raise UserError(f"--topology={topology}; give gpu: and their number, such as gpu:8")
    sizes = mesh_sizes(config.mesh.data, config.mesh.fsdp, config.mesh.tensor, int(count))
    mesh = AbstractMesh(tuple(sizes.values()), AXES, axis_types=(AxisType.Auto,) * len(AXES))
    check_batch_size("train.batch_size", config.train.batch_size, config.train.accumulate, mesh)
    device = SimpleNamespace(platform="gpu", device_kind="GPU", compute_capability="8.0")
    model = configuration.model_config(config, device)
    _, abstract = abstract_state(model, make_optimizer(config.optim, config.train.steps)[0], mesh)
    return _known(config, topology, model, abstract, int(count), sizes)
