"""The best of many plans: meshes, remat policies and micro-batches, ordered by a rough prediction, then compiled.

A compilation takes half a minute, a prediction none: only candidates that could still win are compiled. The prediction
knows FLOPs, memory traffic and collectives; it need not be right, only put what is good in front.
"""

import copy
import functools
import itertools
from collections.abc import Iterator
from typing import NamedTuple

from ml_collections import ConfigDict

from igpt import config as configuration
from igpt.errors import UserError
from igpt.flops import attention_flops_per_image, train_flops_per_image
from igpt.model import ModelConfig, count_params
from igpt.plan.compiled import CHIPS, KERNEL_SHARE, Chip, kernel_flops, plan, topology_devices

COMPILED = 8  # programs at most
ENOUGH = 4  # plans that fit
MARGIN = 0.1  # by which predictions may be wrong, one beside the other, before the search is misled
MICRO_BATCHES = (1, 2, 4, 8, 16)
# Of a token in a layer, in units of D bfloat16 numbers: what the backward pass keeps, and what is read and written.
# Fitted to compiled programs of s on v5e and l on v5p; they pad their arrays, and computing again spares traffic.
KEPT = {"none": 36, "minimal": 12.5, "dots": 11, "full": 1.5}
TRAFFIC = {"none": 500, "minimal": 260, "dots": 245, "full": 165}
WHOLE = 0.2  # of the traffic, what tensor does not split
UPDATED = 40  # bytes of a parameter that its update reads and writes
GATHERED = 4  # times that fsdp's kernels pass the links: twice gathered, gradients summed (3 on few chips)


_params = functools.cache(count_params)  # traces the network


class Candidate(NamedTuple):
    tensor: int
    fsdp: int
    accumulate: int
    remat: str
    seconds: float  # predicted, of a step
    memory: float  # predicted, bytes of a chip


class Search(NamedTuple):
    found: list[dict]  # plans that fit, the fastest estimate first
    nearest: dict | None  # where none does, the one that needs least memory
    compiled: int
    too_large: int  # candidates left out because the prediction says so
    slower: int

    def __str__(self) -> str:
        return (
            f"{self.compiled} programs compiled, {len(self.found)} of them fit; left out: {self.too_large} candidates "
            f"predicted to be too large, {self.slower} to be slower"
        )


def search_plans(config: ConfigDict, topology: str, enough: int = ENOUGH) -> Search:
    """Compiles plans of the config's global batch, the fastest prediction first, and prints each.

    Ends with `enough` plans that fit, or where predictions lie more than MARGIN above that of the best plan so far.
    Left out are what is predicted to need no less memory than a program that did not fit, and meshes that differ from
    one that fits in nothing but fsdp. Raises UserError where there is nothing to try.
    """
    kind, batch_size, slices = topology.partition(":")[0], config.train.batch_size, config.mesh.dcn_data
    if kind == "gpu":
        raise UserError(
            f"--search with --topology={topology}: there is no search for GPUs, whose programs cannot be compiled "
            "here; leave --search out, or name a TPU topology"
        )
    devices = topology_devices(topology, slices)
    model, chip = configuration.model_config(config, devices[0]), CHIPS[kind]
    everything = sorted(candidates(model, batch_size, len(devices), chip, slices), key=lambda one: one.seconds)
    if not everything:
        raise UserError(
            f"train.batch_size {batch_size} divides over no mesh of {len(devices)} chips, whatever tensor is; use a "
            f"multiple of {len(devices)}"
        )
    # Where even the smallest is predicted to be too large, it is the compiler that is to say no.
    room = max(chip.memory, 1.01 * min(one.memory for one in everything))
    found, failed, fitting, compiled, limit = [], [], set(), set(), float("inf")
    for candidate in everything:
        if len(compiled) == COMPILED or len(found) == enough or candidate.seconds > limit:
            break
        but_for_fsdp = (candidate.tensor, candidate.accumulate, candidate.remat)
        if candidate.memory >= room or but_for_fsdp in fitting:
            continue
        changed = copy.deepcopy(config)
        changed.mesh.update(data=-1, fsdp=candidate.fsdp, tensor=candidate.tensor)
        changed.train.accumulate, changed.model.remat = candidate.accumulate, candidate.remat
        one = plan(changed, topology)
        compiled.add(candidate)
        print(line(one), flush=True)
        if one["fits"]:
            found.append(one)
            fitting.add(but_for_fsdp)
            if one is min(found, key=seconds):
                limit = (1 + MARGIN) * candidate.seconds
        else:
            failed.append(one)
            room = min(room, candidate.memory)
    too_large = sum(one.memory >= room for one in everything if one not in compiled)
    slower = len(everything) - len(compiled) - too_large
    nearest = None if found else min(failed, key=lambda one: one["peak_share"])
    result = Search(sorted(found, key=seconds), nearest, len(compiled), too_large, slower)
    print(result, flush=True)
    return result


def seconds(one: dict) -> float:
    return one["estimate"]["step_seconds"]


def candidates(model: ModelConfig, batch_size: int, chips: int, chip: Chip, slices: int = 1) -> Iterator[Candidate]:
    """Every mesh, micro-batch and remat policy over which heads, width and batch divide, only data between slices."""
    powers = [2**n for n in range(chips.bit_length()) if chips % 2**n == 0]
    for tensor, fsdp, accumulate, remat in itertools.product(powers, powers, MICRO_BATCHES, KEPT):
        if (
            chips % (tensor * fsdp * slices) == model.num_heads % tensor == model.width % fsdp == 0
            and batch_size % (chips // tensor * accumulate) == 0
        ):
            split = (tensor, fsdp, accumulate, remat)
            yield Candidate(
                *split, _seconds(model, batch_size, chips, chip, *split), _memory(model, batch_size, chips, *split)
            )


def _memory(model: ModelConfig, batch_size: int, chips: int, tensor: int, fsdp: int, accumulate: int, remat: str):
    params = _params(model)
    kept = _tokens_by_width(model, batch_size * tensor / chips / accumulate)
    held = 16 if accumulate == 1 else 20  # bytes of a parameter: itself, moments, gradient, and the gradients' sum
    # All layers' activations, those of one while it is differentiated, and its gathered kernels.
    activations = kept * (KEPT[remat] + KEPT["none"] / model.depth) / tensor
    return held * params / (tensor * fsdp) + activations + 6 * params / model.depth / tensor


def _seconds(
    model: ModelConfig, batch_size: int, chips: int, chip: Chip, tensor: int, fsdp: int, accumulate: int, remat: str
) -> float:
    products = train_flops_per_image(model) - 3 * attention_flops_per_image(model)
    images = batch_size / chips
    again = {"none": 0.0, "minimal": 0.0, "dots": 0.0, "full": products / 3}[remat]
    attention = kernel_flops(model, (4 if remat in ("dots", "full") else 2) + 7)  # scores and mixing; KERNEL_PRODUCTS
    compute = images * (products + again + attention / KERNEL_SHARE) / chip.peak
    traffic = _tokens_by_width(model, images) * TRAFFIC[remat] * (1 + WHOLE * (tensor - 1))
    traffic += UPDATED * _params(model) / (tensor * fsdp)

    kernels = 2 * _params(model) / tensor  # bytes in bfloat16
    data = chips // (tensor * fsdp)
    # Kernels are gathered forward and backward and their gradients scattered, then summed over `data`: with every
    # micro-batch anew. Each half of a block sums over `tensor`, forward, backward and where it is computed again.
    moved = accumulate * kernels * (GATHERED * (fsdp > 1) + 2 * (data > 1) / fsdp)
    if tensor > 1:
        moved += 2 * 2 * (2 + (remat == "full")) * _tokens_by_width(model, images * tensor)
    return compute + traffic / chip.bandwidth + moved / chip.links


def _tokens_by_width(model: ModelConfig, images: float) -> float:
    """Bytes of D bfloat16 numbers for every token of every layer."""
    return 2.0 * images * model.seq_len * model.width * model.depth


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
