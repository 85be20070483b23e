"""What a run would cost on machines that are not here: the real train step, compiled by the TPU compiler on this CPU.

    pip install -e ".[tpu]"
    python -m igpt.plan --config=configs/imagenet.py:xl --topology=v5p:4x4x8 --json=plan.json
    python -m igpt.plan --config=configs/imagenet.py:l --topology=v5e:8x8 --search
    python -m igpt.plan --config=configs/imagenet.py:s --topology=gpu:8

Memory, collectives and kernels are those of the compiled program. Step time and MFU are estimates: the compiler's own
cycles, and for the attention kernels, of which it has none, their FLOPs at an assumed share of the peak. For GPUs there
is no compiler here: parameters, FLOPs and bytes of the state only.
"""

import copy
import itertools
import json
import math
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.extend.core import jaxprs_in_params
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from ml_collections import ConfigDict

from igpt import config as configuration
from igpt.errors import UserError
from igpt.files import write_text
from igpt.hlo import Program
from igpt.loss import make_loss
from igpt.metrics import attention_flops_per_image, train_flops_per_image
from igpt.model import count_params
from igpt.optim import make_optimizer
from igpt.sharding import AXES, BATCH, check_batch_size, make_mesh, mesh_sizes
from igpt.state import abstract_state, make_train_step

GIB = 1 << 30
MOST = 0.9  # of a chip's memory that a plan may use: what the compiler does not see needs the rest
KERNEL_SHARE = 0.4  # of the peak, assumed of the attention kernels
SEARCHED = 12  # programs that --search compiles at most


class Chip(NamedTuple):
    """Memory in bytes and dense bfloat16 peak in FLOP/s of the vendor's datasheet; the clock in Hz follows from the
    peak and the FLOPs a cycle that the compiler reckons with."""

    memory: int
    peak: float
    clock: float


CHIPS = {
    "v4": Chip(32 * GIB, 275e12, 1.05e9),
    "v5e": Chip(16 * GIB, 197e12, 1.5e9),
    "v5p": Chip(95 * GIB, 459e12, 1.75e9),
    "v6e": Chip(32 * GIB, 918e12, 1.75e9),
}


def topology_devices(name: str) -> list:
    """The devices of "v5e:8x8" and the like: descriptions to compile for. UserError where there is no such thing."""
    kind, _, shape = name.partition(":")
    if kind not in CHIPS or not re.fullmatch(r"\d+(x\d+){1,2}", shape):
        raise UserError(
            f"--topology={name}; give {', '.join(CHIPS)} with the chips in each dimension, such as v5e:8x8 or "
            "v5p:4x4x8, or gpu:NUMBER"
        )
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # there is no TPU host to ask
    megacore = {"chip_config_name": "megacore"} if kind == "v4" else {}  # one device a chip; the others are so anyway
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=name, **megacore).devices
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
    devices = topology_devices(topology)
    chip, train = CHIPS[kind], config.train
    model = configuration.model_config(config, devices[0])
    mesh = make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor, devices)
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
        try:
            compiled = traced.lower().compile()
        except jax.errors.JaxRuntimeError as error:
            return results | _too_large(str(error), traced.jaxpr.jaxpr, mesh)
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
    """Step time and what follows from it."""
    seconds = program.cycles() / chip.clock
    if results["kernels"]:  # forward once, or twice where the backward pass computes it again; backward 2.5 times
        forwards = sum(n for name, n in results["kernels"].items() if "fwd" in name) / model.depth
        once = attention_flops_per_image(model) * results["batch_size"] / results["chips"]
        seconds += once * (forwards / results["accumulate"] + 2.5) / (KERNEL_SHARE * chip.peak)
    flops = results["flops_per_step"]["causal"] / results["chips"]
    days = seconds * results["steps"] / 86400
    return {
        "estimate": {
            "step_seconds": seconds,
            "mfu_causal": flops / seconds / chip.peak,
            "images_per_second": results["batch_size"] / seconds,
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


def search_plans(config: ConfigDict, topology: str) -> list[dict]:
    """Plans of the config's global batch on other meshes, remat policies and micro-batches, the fastest estimate first.

    For each split, the policy that computes least anew and still fits.
    """
    found, compiled = [], 0
    devices = topology_devices(topology)
    for split in splits(config, len(devices), CHIPS[topology.partition(":")[0]].memory, devices[0]):
        for remat in ("none", "dots", "full"):
            if compiled == SEARCHED:
                break
            candidate = copy.deepcopy(config)
            candidate.mesh.update(data=-1, fsdp=split["fsdp"], tensor=split["tensor"])
            candidate.train.accumulate, candidate.model.remat = split["accumulate"], remat
            one = plan(candidate, topology)
            compiled += 1
            print(line(one), flush=True)
            if one["fits"]:
                found.append(one)
                break
    return sorted(found, key=lambda one: one["estimate"]["step_seconds"])


def splits(config: ConfigDict, chips: int, memory: int, device) -> list[dict]:
    """Meshes and micro-batches over which a global batch divides, likely ones first.

    Left out: those whose state alone would fill the memory. First come those that split fewest heads, then those with
    fewest micro-batches, then those that spread the state least.
    """
    model = configuration.model_config(config, device)
    state = 16 * count_params(model)  # parameters, two moments and a gradient
    powers = [2**n for n in range(chips.bit_length()) if chips % 2**n == 0]
    found = [
        dict(tensor=tensor, accumulate=accumulate, fsdp=fsdp)
        for tensor, accumulate, fsdp in itertools.product(powers, (1, 2, 4), powers)
        if chips % (tensor * fsdp) == 0
        and model.num_heads % tensor
        == model.width % fsdp
        == config.train.batch_size % (chips // tensor * accumulate)
        == 0
        and state / (tensor * fsdp) <= MOST * memory
    ]
    fewest = min((split["tensor"] for split in found), default=1)
    return [split for split in found if split["tensor"] <= 2 * fewest]


def line(results: dict) -> str:
    """One plan in a line."""
    mesh = " x ".join(f"{name} {size}" for name, size in results["mesh"].items() if size > 1) or "1"
    what = f"{results['topology']}: {mesh}, remat {results['remat']}, {results['accumulate']} micro-batch(es)"
    if "peak_share" not in results:
        return what
    text = f"{what}: {results['peak_share']:.0%} of a chip's memory"
    if not results["fits"]:
        return text + ", DOES NOT FIT"
    estimate = results["estimate"]
    return f"{text}, estimated {estimate['step_seconds']:.3f} s a step, MFU {estimate['mfu_causal']:.0%} (causal)"


def table(results: dict) -> str:
    """A plan for the terminal."""
    flops, size = results["flops_per_step"], results["bytes_per_chip"]
    rows = [
        ("topology", f"{results['topology']}, {results['chips']} chips"),
        ("mesh", " x ".join(f"{name} {size}" for name, size in results["mesh"].items())),
        (
            "batch",
            f"{results['batch_size']} images in {results['accumulate']} micro-batch(es), remat {results['remat']}",
        ),
        ("parameters", f"{results['parameters']:,}"),
        ("FLOPs a step", f"{flops['causal']:.4g} (attention by the causal convention), {flops['full']:.4g} (full)"),
        *((f"bytes a chip: {name.replace('_', ' ')}", f"{value / GIB:.2f} GiB") for name, value in size.items()),
    ]
    if "fits" in results:
        verdict = "fits" if results["fits"] else f"DOES NOT FIT (at most {MOST:.0%} is wanted)"
        rows.append(("memory", f"{results['peak_share']:.0%} of a chip: {verdict}"))
        if "largest_buffer" in results:
            rows.append(("largest buffer", results["largest_buffer"]))
    for kind, entry in results.get("collectives", {}).items():
        rows.append((kind, f"{entry['count']} a step, {entry['bytes'] / 1e6:,.1f} MB a chip"))
    for name, count in results.get("kernels", {}).items():
        rows.append(("kernel", f"{name}, {count} a step"))
    if estimate := results.get("estimate"):
        rows += [
            ("step, estimated", f"{estimate['step_seconds']:.3f} s, {estimate['images_per_second']:,.0f} images/s"),
            ("MFU, estimated", f"{estimate['mfu_causal']:.1%} of the bfloat16 peak (causal convention)"),
            ("run, estimated", f"{estimate['days']:.1f} days, {estimate['chip_hours']:,.0f} chip-hours"),
        ]
    return "\n".join(f"{name:<40}{value}" for name, value in rows)


def write(results: dict, path: str) -> None:
    """Writes the figures, whole or not at all."""
    try:
        write_text(Path(path), json.dumps(results, indent=1) + "\n")
    except OSError as error:
        raise UserError(f"--json={path} cannot be written: {error.strerror}; name another file") from None


def main(config: ConfigDict, topology: str, json: str | None, search: bool) -> None:
    jax.config.update("jax_platforms", "cpu")  # a TPU that happens to be here is not what is asked about
    if search:
        found = search_plans(config, topology)
        if not found:
            raise UserError(f"nothing that was tried fits {topology}: take more chips, or a smaller train.batch_size")
        results = found[0]
        print("\nthe best of them:")
    else:
        results = plan(config, topology)
    print(table(results))
    if json:
        write(results, json)


if __name__ == "__main__":
    configuration.run_app(
        main,
        required={"topology": "v4, v5e, v5p or v6e with the chips of each dimension, such as v5e:8x8; or gpu:8."},
        optional={"json": "A file for the figures."},
        switches={"search": "Try meshes, remat policies and micro-batches; print the best that fits."},
    )
