"""One plan: the real train step of a config, compiled for chips that are not here, and what can be read from it."""

import math
import os
import re
import time
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.extend.core import jaxprs_in_params
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from ml_collections import ConfigDict

from igpt import config as configuration
from igpt.errors import UserError
from igpt.hlo import Program
from igpt.loss import make_loss
from igpt.metrics import attention_flops_per_image, train_flops_per_image
from igpt.optim import make_optimizer
from igpt.sharding import AXES, BATCH, check_batch_size, make_mesh, mesh_sizes
from igpt.state import abstract_state, make_train_step

GIB = 1 << 30
MOST = 0.9  # of a chip's memory that a plan may use: what the compiler does not see needs the rest
# Of the TPU compiler. Left alone it splits the products with fsdp's kernels into a ring of small ones, each of which
# reads and writes the sum: m on v5e:2x4 with fsdp 8 took three times as long by its own estimate.
FLAGS = "--xla_jf_spmd_threshold_for_windowed_einsum_mib=1000000"
KERNEL_SHARE = 0.4  # of the peak, assumed of the attention kernels


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
# Times a collective's bytes pass the links of a ring.
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
        results["float32_products_in_blocks"] = wide_products(traced.jaxpr.jaxpr, model.depth)
        try:
            compiled = traced.lower().compile()
        except jax.errors.JaxRuntimeError as error:
            return results | _too_large(str(error), traced.jaxpr.jaxpr, mesh)
    results["libtpu_init_args"] = os.environ["LIBTPU_INIT_ARGS"]
    results["compile_seconds"] = time.perf_counter() - start
    memory = compiled.memory_analysis()
    peak = (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes
        + memory.generated_code_size_in_bytes
    )
    gradients = results["bytes_per_chip"]["gradients"]
    results["bytes_per_chip"] |= {
        "activations_and_workspace": max(memory.temp_size_in_bytes - gradients, 0),
        "peak": peak,
        "memory": chip.memory,
    }
    results |= {"peak_share": peak / chip.memory, "fits": peak <= MOST * chip.memory}
    program = Program(compiled.as_text())
    results |= {"collectives": program.collectives(), "kernels": dict(program.kernels())}
    return results | _estimate(results, program, model, chip)


def wide_products(jaxpr, depth: int, inside: bool = False) -> int:
    """How many matrix products inside the loops over the layers, forward and backward, have float32 operands.

    Kernels are not looked into: there softmax is float32. Sums of x * y along one dimension are no matrix products.
    """
    found = 0
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        if inside and name == "dot_general":
            summed, batch = equation.params["dimension_numbers"]
            operands = [operand.aval for operand in equation.invars]
            is_matrix = all(x.ndim > len(s) + len(b) for x, s, b in zip(operands, summed, batch, strict=True))
            found += is_matrix and any(x.dtype == jnp.float32 for x in operands)
        if name != "pallas_call":
            layers = inside or (name == "scan" and equation.params["length"] == depth)
            found += sum(wide_products(inner, depth, layers) for inner in jaxprs_in_params(equation.params))
    return found


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


def _estimate(results: dict, program: Program, model, chip: Chip) -> dict:
    """Step time and what follows from it, as if no collective ran beside the computation."""
    seconds = {"compute": program.cycles() / chip.clock}
    if results["kernels"]:  # forward once, or twice where the backward pass computes it again; backward 2.5 times
        forwards = sum(n for name, n in results["kernels"].items() if "fwd" in name) / model.depth
        once = attention_flops_per_image(model) * results["batch_size"] / results["chips"]
        work = once * (forwards / results["accumulate"] + 2.5)
        seconds["attention_kernels"] = work / (KERNEL_SHARE * chip.peak)
    moved = sum(PASSES[kind] * entry["bytes"] for kind, entry in results["collectives"].items())
    seconds["collectives"] = moved / chip.links
    step = sum(seconds.values())
    flops = results["flops_per_step"]["causal"] / results["chips"]
    days = step * results["steps"] / 86400
    return {
        "estimate": {
            "step_seconds": step,
            "of_which": seconds,
            "mfu_causal": flops / step / chip.peak,
            "images_per_second": results["batch_size"] / step,
            "days": days,
            "chip_hours": 24 * days * results["chips"],
        }
    }


def _too_large(message: str, jaxpr, mesh: Mesh) -> dict:
    """What is known of a program that does not fit, or UserError for another failure of the compiler."""
    found = re.search(r"\(([\d.]+)([KMGT])\) exceeds available HBM \(([\d.]+)([KMGT])\)", message)
    if not found:
        raise UserError(f"the TPU compiler failed: {message.strip().splitlines()[0][:300]}")
    units = {"K": 1 << 10, "M": 1 << 20, "G": GIB, "T": 1 << 40}
    needed, there = (float(found[i]) * units[found[i + 1]] for i in (1, 3))
    largest = max(_stacked(jaxpr), key=lambda aval: aval.size * aval.dtype.itemsize)
    groups = mesh.shape["data"] * mesh.shape["fsdp"]
    size = largest.size * largest.dtype.itemsize / groups / GIB
    return {
        "fits": False,
        "peak_share": needed / there,
        "largest_buffer": f"{largest.str_short()} for the backward pass, some {size:.1f} GiB a chip",
    }


def _stacked(jaxpr) -> Iterator:
    """The values that loops leave behind for each of their rounds: what a backward pass keeps of every layer."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "scan":
            yield from (out.aval for out in equation.outvars[equation.params["num_carry"] :])
        for inner in jaxprs_in_params(equation.params):
            yield from _stacked(inner)


def _without_compiler(config: ConfigDict, topology: str, count: str) -> dict:
    """For GPUs: shapes and shardings only."""
    if not count.isdecimal() or int(count) < 1:
        raise UserError(f"--topology={topology}; give gpu: and their number, such as gpu:8")
    sizes = mesh_sizes(config.mesh.data, config.mesh.fsdp, config.mesh.tensor, int(count))
    mesh = AbstractMesh(tuple(sizes.values()), AXES, axis_types=(AxisType.Auto,) * len(AXES))
    check_batch_size("train.batch_size", config.train.batch_size, config.train.accumulate, mesh)
    model = configuration.model_config(config)
    _, abstract = abstract_state(model, make_optimizer(config.optim, config.train.steps)[0], mesh)
    known = _known(config, topology, model, abstract, int(count), sizes)
    return {name: value for name, value in known.items() if name not in ("attention", "dtype")}
