"""How fast a device reads its memory, and how fast it could draw tokens if it did nothing else.

A step of sampling must read every kernel, and the keys and values of all earlier positions. Their bytes, divided by the
bandwidth that was measured, bound the time of the step from below. If a processor's caches hold all of them, the step
can be faster than this.
"""

import contextlib
import time

import jax
import jax.numpy as jnp

from igpt.model import ModelConfig, count_params

MEASURED = 256 * 2**20  # bytes, more than the caches of most processors hold
ROUNDS = 4
CALLS = 16  # in one round on an accelerator: starting one call alone would take as long as reading


def memory_bandwidth() -> float:
    """The bytes per second that a sum reads from the memory of the first device: the best of a few rounds, 0.3 s."""
    device = jax.local_devices()[0]
    calls = 1 if device.platform == "cpu" else CALLS
    with jax.default_device(device):
        array, total = jnp.ones(MEASURED // 4), jax.jit(jnp.sum)
        total(array).block_until_ready()
        seconds = []
        for _ in range(ROUNDS):
            start = time.perf_counter()
            jax.block_until_ready([total(array) for _ in range(calls)])
            seconds.append(time.perf_counter() - start)
    return calls * array.nbytes / min(seconds)


def bytes_to_draw(config: ModelConfig, batch_size: int, given: int, stop: int, devices=1, tensor=1) -> float:
    """What each device must read to continue `batch_size` rows of `given` inputs to `stop`, one token after the other.

    That is all parameters but the two tables, split over `tensor` devices, and the cache, split over all `devices`.
    """
    tables = (config.vocab_size + 1 + config.seq_len) * config.width
    kernels = (count_params(config) - tables) * (stop - given) / tensor
    filled = (stop - 1 - given) * (stop + given) / 2  # given + 1, ..., stop - 1 positions; the prompt draws one token
    cache = filled * batch_size * config.depth * config.width * 2 / devices
    return jnp.dtype(config.dtype).itemsize * (kernels + cache)


class Clock:
    """Adds up the tokens that are drawn, the seconds that this takes, and the bytes that each device must read."""

    def __init__(self):
        self.tokens, self.seconds, self.bytes = 0, 0.0, 0.0

    @contextlib.contextmanager
    def times(self, config: ModelConfig, batch_size: int, given: int, stop: int):
        """Times the block inside `with`, which continues `batch_size` rows of `given` inputs to `stop`."""
        mesh = jax.sharding.get_abstract_mesh()
        split = (1, 1) if mesh.empty else (mesh.size, mesh.shape["tensor"])
        start = time.perf_counter()
        yield
        self.seconds += time.perf_counter() - start
        self.tokens += batch_size * (stop - given)
        self.bytes += bytes_to_draw(config, batch_size, given, stop, *split)

    def speed(self) -> str:
        """Tokens per second beside what the memory's bandwidth allows, which is measured now."""
        allowed = self.tokens * memory_bandwidth() / self.bytes
        return f"{self.tokens / self.seconds:,.0f} tokens/s; memory bandwidth allows {allowed:,.0f}"
