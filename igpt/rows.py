"""Draws images row by row, so that a page can show them as they grow. The bytes are those of `igpt.sample`.

A token depends on its image's key and its position, and the cache is kept between rows. So nothing depends on where the
drawing pauses.
"""

import functools
from collections.abc import Iterator

import numpy as np
from flax import nnx
from jaxtyping import Integer, UInt8

from igpt.decode import decoder_of
from igpt.draw import STATIC_RULES, Sampling, draw_tokens, image_keys
from igpt.interop.load import Pretrained
from igpt.pictures import Pictures
from igpt.sample import advance, begin, for_tokens, inputs_of, kept_rows, padded_length, segments
from igpt.sharding import shard_batch

UNDRAWN = 255  # rows that are not drawn yet are white


def sampled_rows(pretrained: Pretrained, num: int, seed: int = 0, sampling=Sampling()) -> Iterator[Pictures]:
    """Yields the images of `sample_images` [num, H, W, 3] after each row; the last one is its result."""
    return _rows(pretrained, np.zeros((num, 0), np.int32), seed, sampling)


def completed_rows(
    pretrained: Pretrained, image: UInt8[np.ndarray, "H W 3"], keep: float, num: int, seed: int = 0, sampling=Sampling()
) -> Iterator[Pictures]:
    """Yields the continuations of `complete_images` for one image [num, H, W, 3] after each row."""
    tokens = pretrained.tokenizer.encode(image[None])
    given = tokens[:, : kept_rows(keep, tokens.shape[1])].reshape(1, -1)
    return _rows(pretrained, np.repeat(given, num, axis=0), seed, sampling)


def _rows(pretrained, prefix: Integer[np.ndarray, "B P"], seed, sampling) -> Iterator[Pictures]:
    """Yields the images after each row that is drawn, as one batch."""
    height, width = pretrained.tokenizer.grid(*pretrained.config.data.image_size)
    model, keys = pretrained.model, image_keys(seed, len(prefix))
    inputs, before = inputs_of(model, prefix), int(model.config.sos)
    given, most = inputs.shape[1], model.config.seq_len
    padded = np.pad(inputs, [(0, 0), (0, padded_length(given, most) - given)])
    graph, params = nnx.split(model)
    begin_rows = for_tokens(_begin, ("graph", *STATIC_RULES))
    advance_rows = for_tokens(_advance, ("graph", *STATIC_RULES, "length"))
    rules = sampling.rules(model.config.vocab_size)
    tokens, cache = begin_rows(graph, params, padded, given, keys, *rules)
    first = given
    for row in range(prefix.shape[1] // width, height):
        last = (row + 1) * width + before - 1  # the input before the row's last token
        for length in segments(padded.shape[1], most):
            if first < min(length, last):
                end = min(length, last)
                tokens, cache = advance_rows(graph, params, tokens, cache, first, end, keys, *rules, length)
                first = end
        drawn = np.asarray(tokens)[:, before : before + height * width].reshape(-1, height, width)
        images = pretrained.tokenizer.decode(np.where(np.arange(height)[:, None] <= row, drawn, 0))
        images[:, images.shape[1] * (row + 1) // height :] = UNDRAWN
        yield images.view(Pictures)


def _begin(graph, params, inputs, given, keys, temperature, greedy, top_k, top_p):
    draw = functools.partial(draw_tokens, shard_batch(keys), temperature, greedy, top_k, top_p)
    return begin(nnx.merge(graph, params), shard_batch(inputs), given, draw)


def _advance(graph, params, tokens, cache, first, last, keys, temperature, greedy, top_k, top_p, length):
    draw = functools.partial(draw_tokens, keys, temperature, greedy, top_k, top_p)
    return advance(decoder_of(nnx.merge(graph, params)), tokens, cache, first, last, length, draw)
