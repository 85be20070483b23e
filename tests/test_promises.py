"""What compiled programs move between eight devices, read from the HLO text of XLA's partitioner."""

import functools
import math
import re
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding

from igpt.loss import make_loss
from igpt.model import ModelConfig
from igpt.optim import make_optimizer
from igpt.plan.hlo import COLLECTIVES, HloProgram
from igpt.sample import generator
from igpt.sharding import BATCH, make_mesh
from igpt.state import abstract_state, make_eval_step, make_train_step
from tests.helpers import optim_config

B, L, D, N, K, F, V, T = 16, 5, 48, 8, 6, 56, 11, 13
GIVEN = 2  # inputs that the prefill reads
# Of one layer, with heads side by side, as the products take them.
KERNELS = {"qkv": (D, 3, N * K), "out": (N * K, D), "up": (D, F), "down": (F, D)}
TABLES = {"token_table": (V + 1, D), "position_table": (T, D)}


def parts(data, fsdp, tensor, **changes):
    """(mesh, optimizer, schedule, graph, abstract state) on the first data x fsdp x tensor devices."""
    mesh = make_mesh(data, fsdp, tensor, jax.devices()[: data * fsdp * tensor])
    config = ModelConfig(width=D, depth=L, num_heads=N, vocab_size=V, seq_len=T, mlp_width=F, **changes)
    optimizer, schedule = make_optimizer(optim_config(), steps=10)
    return mesh, optimizer, schedule, *abstract_state(config, optimizer, mesh)


def rows(mesh, dtype, *shape):
    return jax.ShapeDtypeStruct((B, *shape), dtype, sharding=NamedSharding(mesh, BATCH))


@functools.cache
def train_step(*sizes, **changes):
    mesh, optimizer, schedule, graph, abstract = parts(*sizes, **changes)
    step = make_train_step(make_loss(graph), optimizer, schedule, abstract)
    with jax.set_mesh(mesh):
        return abstract, step.lower(abstract, {"tokens": rows(mesh, jnp.int32, T)}).compile()


def eval_step(*sizes):
    mesh, _, _, graph, abstract = parts(*sizes)
    batch = {"tokens": rows(mesh, jnp.int32, T), "mask": rows(mesh, jnp.float32)}
    with jax.set_mesh(mesh):
        return make_eval_step(make_loss(graph)).lower(abstract.params, batch).compile()


def shapes_of(instruction):
    """The shapes of an instruction's results."""
    return [tuple(map(int, filter(None, sides.split(",")))) for sides in re.findall(r"\[([\d,]*)\]", instruction.shape)]


def moved(compiled) -> dict[str, Counter]:
    """{kind of collective: {shape of a result: how often}}."""
    found = {}
    for instruction, times in HloProgram(compiled.as_text()):
        if instruction.opcode in COLLECTIVES:
            for shape in shapes_of(instruction):
                found.setdefault(instruction.opcode, Counter())[shape] += times
    return found


@pytest.mark.parametrize("training", [True, False])
def test_fsdp_gathers_the_kernels_of_one_layer_at_a_time(training):
    compiled = train_step(1, 8, 1)[1] if training else eval_step(1, 8, 1)
    passes, found = 1 + training, moved(compiled)
    once = [*TABLES.values(), (D, V)]  # the head
    assert found["all-gather"] == dict.fromkeys(KERNELS.values(), passes * L) | dict.fromkeys(once, 1)
    assert set(found) == {"all-gather", "all-reduce"}
    # No device ever holds the gathered kernels, or their gradients, of all layers at once.
    stacks = {(L, *shape) for shape in (*KERNELS.values(), (D, 3, N, K), (N, K, D))}
    assert not stacks & {shape for instruction, _ in HloProgram(compiled.as_text()) for shape in shapes_of(instruction)}


@pytest.mark.parametrize("sizes", [(8, 1, 1), (1, 1, 8), (2, 1, 4), (1, 8, 1), (2, 4, 1), (2, 2, 2)])
def test_embedding_moves_only_the_tables_and_only_under_fsdp(sizes):
    mesh, _, _, graph, abstract = parts(*sizes)

    def embed(params, tokens):
        return nnx.merge(graph, params).embed(tokens)

    with jax.set_mesh(mesh):
        compiled = jax.jit(embed).lower(abstract.params, rows(mesh, jnp.int32, T)).compile()
    assert moved(compiled) == ({"all-gather": Counter(TABLES.values())} if sizes[1] > 1 else {})


@pytest.mark.parametrize("sizes", [(1, 8, 1), (1, 1, 8)])
def test_the_new_state_reuses_the_memory_of_the_old_one(sizes):
    abstract, compiled = train_step(*sizes)
    leaves = jax.tree.leaves(abstract)
    header = compiled.as_text().split("\n", 1)[0].partition("input_output_alias=")[2]
    aliases = re.findall(r"\{(\d+)\}: \((\d+), \{\}", header)
    assert aliases == [(str(i), str(i)) for i in range(len(leaves))]
    held = sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)
    assert compiled.memory_analysis().alias_size_in_bytes == held


@pytest.mark.parametrize("tensor", [2, 4, 8])
def test_a_tensor_parallel_layer_needs_two_all_reduces_forward(tensor):
    assert moved(eval_step(1, 1, tensor)) == {"all-reduce": {(B, T, D): 2 * L}}


@pytest.mark.parametrize(
    ("tensor", "remat", "backward"),
    [(8, "none", 2), (4, "minimal", 2), (2, "dots", 2), (2, "full", 3)],  # full recomputes attention's output
)
def test_a_tensor_parallel_layer_needs_two_all_reduces_backward(tensor, remat, backward):
    found = moved(train_step(1, 1, tensor, remat=remat)[1])
    assert set(found) == {"all-reduce"}
    assert found["all-reduce"].pop(()) > 0  # for the gradient's norm
    assert found["all-reduce"] == {(B, T, D): (2 + backward) * L}


def sampler(*sizes):
    mesh, _, _, graph, abstract = parts(*sizes)
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), B))
    with jax.set_mesh(mesh):
        arguments = abstract.params, np.zeros((B, GIVEN), np.int32), GIVEN, T + 1, keys, 1.0
        return generator().lower(graph, *arguments, greedy=False, top_k=0, top_p=1.0, lengths=(T,)).compile()


def test_the_cache_is_split_by_example_and_by_head():
    program = HloProgram(sampler(2, 2, 2).as_text())
    shapes = [shape[-4:] for instruction, _ in program for shape in shapes_of(instruction)]
    assert {shape for shape in shapes if shape[-2:] == (T, K)} == {(B // 4, N // 2, T, K)}


def test_a_sampled_token_costs_two_all_reduces_a_layer():
    prefill, decoding = (B, GIVEN, D), (D, B, 1)  # the text has no length of the loop over tokens: it counts once
    assert moved(sampler(1, 1, 8)) == {"all-reduce": {prefill: 2 * L, decoding: 2 * L}}
