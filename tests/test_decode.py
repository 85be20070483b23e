import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from igpt.decode import EQUATIONS, KVCache, by_rows, decode, decoder_of, grow, prefill
from igpt.draw import Sampling, image_keys
from igpt.errors import UserError
from igpt.layers import Linear
from igpt.plan.hlo import HloProgram
from igpt.sample import generator, sample_tokens, segments
from tests.helpers import TINY_MODEL, random_model, random_tokens

VARIANTS = [
    {},
    {"use_bias": True},
    {"scale_scores": False},
    {"scale_scores_by_layer": True},
    {"sos": False},
    {"activation": "gelu_new"},
]


@pytest.mark.parametrize("given", [0, 1, 6, 12])
@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_cached_decoding_equals_the_full_forward(given, changes):
    model = random_model(dataclasses.replace(TINY_MODEL, **changes))
    length = model.config.seq_len
    tokens = random_tokens()
    full = jax.jit(lambda tokens: model(tokens))(tokens)
    inputs = model.inputs(tokens)
    logits, cache = jax.jit(lambda inputs: prefill(model, inputs, given + 1))(inputs[:, : given + 1])
    np.testing.assert_allclose(logits, full[:, given], atol=4e-5)
    step = jax.jit(lambda token, position, cache: decode(decoder_of(model), token, position, cache))
    for position in range(given + 1, length):
        if position == cache.keys[0].shape[2]:  # the cache is full
            cache = grow(cache, min(position + 3, length))
        logits, cache = step(inputs[:, position], position, cache)
        np.testing.assert_allclose(logits, full[:, position], atol=4e-5)


def test_products_by_rows_are_the_layers_products():
    model = random_model(dataclasses.replace(TINY_MODEL, use_bias=True))
    graph, stacked = nnx.split(model.blocks)
    block = nnx.merge(graph, jax.tree.map(lambda leaf: leaf[1], stacked))
    N, K, D, F = block.config.num_heads, block.config.head_size, block.config.width, block.config.mlp_width
    shapes = {"qkv": (D,), "out": (N * K,), "up": (D,), "down": (F,)}
    for name, equation in EQUATIONS.items():
        linear, x = getattr(block, name), jax.random.normal(jax.random.key(3), (5, 1, *shapes[name]))
        given = jnp.moveaxis(x, -1, 0) if name == "down" else x
        product = by_rows(linear, "float32", equation)(given)
        expected = jnp.moveaxis(linear(x), -1, 0) if name == "up" else linear(x)
        np.testing.assert_allclose(product, expected, atol=1e-5)


def test_a_large_kernel_is_read_in_two_halves_with_the_same_product():
    linear = Linear("...d,df->...f", (512, 517), 0.02, (517,), nnx.Rngs(0))
    linear.bias[...] = jnp.arange(517.0)
    x = jax.random.normal(jax.random.key(3), (5, 1, 512))
    product = by_rows(linear, "float32", "btd,df->btf")
    np.testing.assert_allclose(product(x), linear(x), atol=1e-4)
    assert jax.jit(product).lower(x).as_text().count("dot_general") == 2


def test_a_growing_cache_keeps_its_entries():
    cache = KVCache((jnp.ones((2, 3, 5, 7)),), (2 * jnp.ones((2, 3, 5, 7)),))
    for before, after in zip(jax.tree.leaves(cache), jax.tree.leaves(grow(cache, 8)), strict=True):
        np.testing.assert_array_equal(after[:, :, :5], before)
        assert after.shape == (2, 3, 8, 7) and not after[:, :, 5:].any()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_cache_has_the_dtype_of_the_computation(dtype):
    model = random_model(dataclasses.replace(TINY_MODEL, dtype=dtype))

    def read_two(inputs):
        _, cache = prefill(model, inputs, 1)
        return decode(decoder_of(model), inputs[:, 0], jnp.int32(1), grow(cache, 3))[1]

    cache = jax.eval_shape(read_two, jnp.zeros((2, 1), jnp.int32))
    assert {leaf.dtype for leaf in jax.tree.leaves(cache)} == {jnp.dtype(dtype)}


def test_a_network_without_a_pixel_head_does_not_decode():
    model = random_model(dataclasses.replace(TINY_MODEL, pixel_head=False, num_classes=3))
    with pytest.raises(UserError, match="no pixel head"):
        sample_tokens(model, np.zeros((1, 0), np.int32), image_keys(0, 1))


B, T, LENGTHS = 3, TINY_MODEL.seq_len, (5, 9, 13)


def compiled_sampler():
    """The program of a sampler whose cache grows to each of LENGTHS, as HLO."""
    graph, params = nnx.split(random_model())
    arguments = params, np.zeros((B, 1), np.int32), 1, T + 1, image_keys(0, B), 1.0
    return generator().lower(graph, *arguments, greedy=False, top_k=3, top_p=1.0, lengths=LENGTHS).compile()


def cache_shape(length):
    return f"f32[{B},{TINY_MODEL.num_heads},{length},{TINY_MODEL.head_size}]"


def decode_loops(program):
    """{length of the cache: the instructions of the loop that decodes with it}."""
    found = {}
    for instructions in program.computations.values():
        for loop in instructions:
            body = re.search(r"body=%?([\w.\-]+)", loop.line)
            lengths = [length for length in LENGTHS if loop.opcode == "while" and cache_shape(length) in loop.shape]
            if body and lengths:
                (length,) = lengths  # a loop carries caches of one length only
                found[length] = program.computations[body[1]]
    return found


def test_the_cache_is_updated_in_place():
    program = HloProgram(compiled_sampler().as_text())
    loops = decode_loops(program)
    assert set(loops) == set(LENGTHS)
    for length, body in loops.items():
        makers = [i for i in body if i.shape.startswith(cache_shape(length)) and i.opcode != "get-tuple-element"]
        # One update for the keys and one for the values of each layer, and nothing else makes an array of this size.
        assert len(makers) == 2 * TINY_MODEL.depth
        assert all("dynamic-update-slice" in maker.name for maker in makers), makers


def test_a_step_reads_no_more_than_the_cache_of_its_segment():
    text = compiled_sampler().as_text()
    program = HloProgram(text)
    for length, body in decode_loops(program).items():
        others = [cache_shape(other) for other in LENGTHS if other != length]
        assert not [i for i in body if any(shape in i.line.split("metadata")[0] for shape in others)]


@pytest.mark.parametrize("given", [0, 1, 4, 5, 12])
@pytest.mark.parametrize("stop", [T, T + 1])
def test_segments_give_the_same_tokens_as_a_cache_of_full_length(given, stop):
    graph, params = nnx.split(random_model())
    inputs = np.asarray(random_model().inputs(random_tokens(batch=B)))[:, : given + 1]
    options = dict(greedy=False, top_k=3, top_p=1.0)

    def tokens(*lengths):
        fitting = tuple(length for length in lengths if length > given)
        return generator()(graph, params, inputs, given + 1, stop, image_keys(1, B), 1.3, lengths=fitting, **options)

    np.testing.assert_array_equal(tokens(*LENGTHS)[:, :stop], tokens(T)[:, :stop])


def test_segments_end_at_the_full_length_and_hold_what_is_given():
    assert segments(1, 64) == (64,)
    assert segments(1, 300) == (128, 256, 300)
    assert segments(129, 300) == (256, 300)
    for given in (1, 8, 512, 1024):
        lengths = segments(given, 1024)
        assert lengths[-1] == 1024 and lengths[0] >= given and list(lengths) == sorted(set(lengths))


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(top_k=4), Sampling(0.7, top_k=5, top_p=0.8)], ids=str)
def test_tokens_are_those_of_a_sampler_without_a_cache(sampling):
    model, keys = random_model(), image_keys(5, B)

    @jax.jit
    def by_full_forwards():
        def step(tokens, position):
            logits = model(tokens)[:, position] / sampling.temperature
            if sampling.top_k:
                logits = jnp.where(logits < jnp.sort(logits)[:, -sampling.top_k, None], -jnp.inf, logits)
            if sampling.top_p < 1.0:
                probability = jax.nn.softmax(logits)
                likelier = jnp.sum(jnp.where(logits[:, None] > logits[..., None], probability[:, None], 0.0), axis=-1)
                logits = jnp.where(likelier < sampling.top_p, logits, -jnp.inf)
            position_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, position)
            return tokens.at[:, position].set(jax.vmap(jax.random.categorical)(position_keys, logits)), None

        return jax.lax.scan(step, jnp.zeros((B, T), jnp.int32), jnp.arange(T))[0]

    np.testing.assert_array_equal(sample_tokens(model, np.zeros((B, 0), np.int32), keys, sampling), by_full_forwards())
