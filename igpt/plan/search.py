"""Searches for the fastest plan: predicts all meshes, remat policies and micro-batches, and compiles the best.

A compilation takes half a minute, a prediction almost no time. Predictions only have to rank the candidates well.
"""

import dataclasses
import functools
import itertools
from collections.abc import Iterator
from typing import NamedTuple

from ml_collections import ConfigDict

from igpt.config import Config
from igpt.errors import UnreadableProgramError, UserError
from igpt.flops import attention_flops_per_image, train_flops_per_image
from igpt.model import ModelConfig, count_params
from igpt.plan.compiled import CHIPS, Chip, compile_plan, kernel_flops, topology_devices

MAX_COMPILED = 8  # programs in one search
ENOUGH = 4  # plans that fit end a search
MARGIN = 0.1  # assumed relative error between two predictions
MICRO_BATCHES = (1, 2, 4, 8, 16)
# Per token and layer, in units of D bfloat16 numbers: memory kept for the backward pass, and memory traffic of a step.
# The traffic is fitted to second estimates on v5e and v5p (benchmarks/results/plan_remat.json, docs/results/plan.json).
KEPT_WIDTHS = {"none": 36, "minimal": 12.5, "dots": 11, "attention": 2.5, "full": 1.5}
TRAFFIC_WIDTHS = {"none": 78, "minimal": 46, "dots": 50, "attention": 31, "full": 33}
# Share of a step's products that is computed again: the forward pass is a third of them, and the mlp's second product,
# a third of a block, is not needed.
RECOMPUTED = {"attention": 2 / 9, "full": 2 / 9}
UNSPLIT_TRAFFIC = 0.2  # share of the traffic that the tensor axis does not split
UPDATE_BYTES = 40  # bytes per parameter that an update reads and writes
FSDP_PASSES = 4  # times that all kernels pass the links: two gathers and the gradients' sum (3 on few chips)

_count_params = functools.cache(count_params)  # cached, because each call traces the network


class Candidate(NamedTuple):
    tensor: int
    fsdp: int
    accumulate: int
    remat: str
    seconds: float  # predicted step time
    memory: float  # predicted bytes per chip


class SearchResult(NamedTuple):
    found: list[dict]  # plans that fit, the fastest estimate first
    nearest: dict | None  # if none fits: the plan that needs the least memory
    compiled: int
    too_large: int  # candidates skipped because of their predicted memory
    slower: int  # candidates skipped because of their predicted time

    def __str__(self) -> str:
        skipped = f"{self.too_large} candidates predicted to be too large, {self.slower} predicted to be slower"
        return f"{self.compiled} programs compiled, {len(self.found)} of them fit; left out: {skipped}"


def search_plans(config: ConfigDict | Config, topology: str, enough: int = ENOUGH) -> SearchResult:
    """Compiles candidates for the config's global batch, the fastest prediction first, and prints each plan.

    The search ends when `enough` plans fit, or when all other predictions are more than MARGIN slower than the
    prediction of the best plan. It skips a candidate that is predicted to need at least the memory of a program that
    did not fit, and one that differs only in fsdp from a plan that fits. It passes over programs that the compiler
    cannot make, or that cannot be read.
    Raises UserError if there is no candidate, UnreadableProgramError if no program could be read.
    """
    config = Config.of(config, trains=True)
    ranked, capacity = _rank_candidates(config, topology)
    compiled, unreadable, found, fitting, limit = {}, {}, [], set(), float("inf")
    for candidate in ranked:
        if len(compiled) + len(unreadable) == MAX_COMPILED or len(found) == enough or candidate.seconds > limit:
            break
        all_but_fsdp = (candidate.tensor, candidate.accumulate, candidate.remat)
        if candidate.memory >= capacity or all_but_fsdp in fitting:
            continue
        try:
            plan = compiled[candidate] = compile_plan(_with_candidate(config, candidate), topology)
        except UnreadableProgramError as error:
            unreadable[candidate] = error
            print(f"remat {candidate.remat}: {error}", flush=True)
            continue
        print(format_line(plan), flush=True)
        if not plan["fits"]:
            capacity = min(capacity, candidate.memory)
            continue
        found = sorted([*found, plan], key=step_seconds)
        fitting.add(all_but_fsdp)
        if plan is found[0]:
            limit = (1 + MARGIN) * candidate.seconds
    tried = compiled.keys() | unreadable.keys()
    too_large = sum(candidate.memory >= capacity for candidate in ranked if candidate not in tried)
    slower = len(ranked) - len(tried) - too_large
    if unreadable and not compiled:
        raise next(iter(unreadable.values()))
    nearest = None if found else min(compiled.values(), key=lambda plan: plan["peak_share"])
    result = SearchResult(found, nearest, len(compiled), too_large, slower)
    print(result, flush=True)
    return result


def _rank_candidates(config: Config, topology: str) -> tuple[list[Candidate], float]:
    """Returns the candidates, fastest prediction first, and the predicted memory from which they are skipped."""
    kind, batch_size, slices = topology.partition(":")[0], config.train.batch_size, config.mesh.dcn_data
    if kind == "gpu":
        raise UserError(f"--topology={topology}: no search for GPUs, which have no compiler here; leave --search out")
    devices, chip = topology_devices(topology, slices), CHIPS[kind]
    model = config.network(devices[0])
    ranked = sorted(candidates(model, batch_size, len(devices), chip, slices), key=lambda one: one.seconds)
    if not ranked:
        meshes = f"any mesh of {len(devices)} chips; use a multiple of {len(devices)}"
        raise UserError(f"train.batch_size {batch_size} does not divide over {meshes}")
    # At least the smallest candidate is compiled, even if all are predicted to be too large.
    return ranked, max(chip.memory, 1.01 * min(one.memory for one in ranked))


def _with_candidate(config: Config, one: Candidate) -> Config:
    mesh = dataclasses.replace(config.mesh, data=-1, fsdp=one.fsdp, tensor=one.tensor)
    train = dataclasses.replace(config.train, accumulate=one.accumulate)
    model = dataclasses.replace(config.model, remat=one.remat)
    return dataclasses.replace(config, mesh=mesh, train=train, model=model)


def best_estimate(plan: dict) -> dict:
    """The second estimate, which is nearer to published runs (docs/plans.md), or the first if that is all there is."""
    return plan["second_estimate"] if "second_estimate" in plan else plan["estimate"]


def step_seconds(plan: dict) -> float:
    return best_estimate(plan)["step_seconds"]


def candidates(model: ModelConfig, batch_size: int, chips: int, chip: Chip, slices: int = 1) -> Iterator[Candidate]:
    """Yields all meshes, micro-batches and remat policies that divide the sizes. Only `data` may cross slices."""
    powers = [2**n for n in range(chips.bit_length()) if chips % 2**n == 0]
    for split in itertools.product(powers, powers, MICRO_BATCHES, KEPT_WIDTHS):
        tensor, fsdp, accumulate, _ = split
        whole_mesh = chips % (tensor * fsdp * slices) == model.num_heads % tensor == model.mlp_width % tensor == 0
        if whole_mesh and model.width % fsdp == 0 and batch_size % (chips // tensor * accumulate) == 0:
            seconds = _predict_seconds(model, batch_size, chips, chip, *split)
            yield Candidate(*split, seconds, _predict_memory(model, batch_size, chips, *split))


def _predict_memory(model: ModelConfig, batch_size: int, chips: int, tensor, fsdp, accumulate, remat) -> float:
    params = _count_params(model)
    hidden = _hidden_bytes(model, batch_size * tensor / chips / accumulate)
    per_param = 16 if accumulate == 1 else 20  # bytes: parameter, two moments, gradient; the sum if accumulated
    # The saved activations of all layers, plus activations and gathered kernels of one layer in its backward pass.
    activations = hidden * (KEPT_WIDTHS[remat] + KEPT_WIDTHS["none"] / model.depth) / tensor
    return per_param * params / (tensor * fsdp) + activations + 6 * params / model.depth / tensor


def _predict_seconds(model: ModelConfig, batch_size: int, chips: int, chip, tensor, fsdp, accumulate, remat) -> float:
    products = train_flops_per_image(model) - 3 * attention_flops_per_image(model)
    images = batch_size / chips
    products *= 1 + RECOMPUTED.get(remat, 0.0)
    attention = kernel_flops(model, (4 if remat in ("dots", "full") else 2) + 7)  # forward + 7, see KERNEL_PRODUCTS
    compute = images * (products + attention / chip.kernel_share) / chip.peak
    traffic = _hidden_bytes(model, images) * TRAFFIC_WIDTHS[remat] * (1 + UNSPLIT_TRAFFIC * (tensor - 1))
    traffic += UPDATE_BYTES * _count_params(model) / (tensor * fsdp)

    kernels = 2 * _count_params(model) / tensor  # bytes in bfloat16
    data = chips // (tensor * fsdp)
    # In each micro-batch, fsdp gathers kernels and scatters gradients, and `data` sums gradients. `tensor` sums
    # hidden states once for each half of a block, in the forward pass, the backward pass and the recomputation.
    moved = accumulate * kernels * (FSDP_PASSES * (fsdp > 1) + 2 * (data > 1) / fsdp)
    if tensor > 1:
        moved += 2 * 2 * (2 + (remat in RECOMPUTED)) * _hidden_bytes(model, images * tensor)
    return compute + traffic / chip.bandwidth + moved / chip.links


def _hidden_bytes(model: ModelConfig, images: float) -> float:
    """Bytes of the bfloat16 hidden states [L, images, T, D]."""
    return 2.0 * images * model.seq_len * model.width * model.depth


def format_line(plan: dict) -> str:
    """One plan as one line."""
    mesh = " x ".join(f"{name} {size}" for name, size in plan["mesh"].items() if size > 1) or "1"
    text = f"{plan['topology']}: {mesh}, remat {plan['remat']}, {plan['accumulate']} micro-batch(es)"
    text += f": {plan['peak_share']:.0%} of a chip's memory"
    if not plan["fits"]:
        return text + ", DOES NOT FIT"
    estimate = best_estimate(plan)
    return f"{text}, estimated {estimate['step_seconds']:.3f} s a step, MFU {estimate['mfu_causal']:.0%} (causal)"
