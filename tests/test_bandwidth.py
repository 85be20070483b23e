import contextlib
import dataclasses

import jax
import numpy as np
from flax import nnx

from igpt.bandwidth import Clock, bytes_to_draw, memory_bandwidth
from igpt.draw import image_keys
from igpt.sample import sample_tokens
from tests.helpers import TINY_MODEL, random_model


def test_what_drawing_must_read_is_counted_array_by_array():
    given, stop, rows = 3, 6, 5
    sizes = {path[0]: 0 for path, _ in nnx.to_flat_state(nnx.state(random_model()))}
    for path, leaf in nnx.to_flat_state(nnx.state(random_model())):
        sizes[path[0]] += leaf[...].size
    read = sum(size for name, size in sizes.items() if "table" not in name)
    entry = rows * TINY_MODEL.depth * TINY_MODEL.width * 2  # a key and a value of each row and layer
    cache = (4 + 5) * entry  # the prompt draws one token; two steps read 4 and 5 positions
    assert bytes_to_draw(TINY_MODEL, rows, given, stop) == 4 * (3 * read + cache)
    half = dataclasses.replace(TINY_MODEL, dtype="bfloat16")
    assert bytes_to_draw(half, rows, given, stop) == 2 * (3 * read + cache)
    assert bytes_to_draw(TINY_MODEL, rows, given, stop, devices=8, tensor=2) == 4 * (3 * read / 2 + cache / 8)


def test_the_bandwidth_is_between_that_of_a_disk_and_that_of_a_cache():
    assert 1e8 < memory_bandwidth() < 1e13


def test_the_clock_counts_tokens_but_no_compilation(caplog):
    clock, compiled = Clock(), []

    class Watched(Clock):
        @contextlib.contextmanager
        def times(self, *arguments):
            caplog.clear()
            with clock.times(*arguments):
                yield
            compiled.extend(r.getMessage() for r in caplog.records if "_generate" in r.getMessage())

    prefix = np.zeros((5, 2), np.int32)  # of a shape that no other test uses, so that it is not compiled before
    with jax.log_compiles():
        sample_tokens(random_model(), prefix, image_keys(0, 5), clock=Watched())
    assert not [message for message in compiled if message.startswith(("Compiling", "Finished XLA"))]
    assert clock.tokens == 5 * (TINY_MODEL.seq_len - 2) and clock.seconds > 0
    assert clock.bytes == bytes_to_draw(TINY_MODEL, 5, 3, TINY_MODEL.seq_len + 1)
