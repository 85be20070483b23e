"""Measures attention back ends: time and memory of a forward and backward pass, ours beside the reference.

python benchmarks/attention.py --out=benchmarks/results/attention_cpu.json
"""

import argparse

import jax
import jax.numpy as jnp
from report import median_seconds, write

from igpt import chunked
from igpt.attention import attention
from igpt.compiler import step_options

SHAPES = {"s": (1, 1024, 8, 64), "m": (1, 1024, 8, 128), "l": (1, 1024, 16, 96), "l48": (1, 2304, 16, 96)}


def measure(backend: str, shape: tuple, repeats: int) -> tuple[float, int]:
    """Median seconds and bytes of temporary memory to compute the loss and its gradients."""
    inputs = tuple(jax.random.normal(key, shape) for key in jax.random.split(jax.random.key(0), 3))

    def loss(q, k, v):
        return jnp.sum(attention(q, k, v, backend=backend) ** 2)

    options = step_options(jax.devices()[0].platform)
    step = jax.jit(jax.value_and_grad(loss, (0, 1, 2)), compiler_options=options).lower(*inputs).compile()
    return median_seconds(lambda: step(*inputs), repeats), step.memory_analysis().temp_size_in_bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, help="the JSON to write")
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()

    rows = []
    print(f"{'shape [B, T, N, K]':<26}{'back end':<16}{'median ms':>10}{'ratio':>8}{'MiB':>8}{'ratio':>8}")
    for preset, shape in SHAPES.items():
        reference = None
        for backend, chunk in (("reference", 0), ("chunked", 128), ("chunked", 256), ("chunked", 512)):
            chunked.BLOCK = chunk or chunked.BLOCK
            seconds, size = measure(backend, shape, args.repeats)
            reference = reference or (seconds, size)
            ratios = {"time_ratio": seconds / reference[0], "memory_ratio": size / reference[1]}
            row = {"preset": preset, "shape": shape, "backend": backend, "chunk": chunk}
            rows.append(row | {"median_s": seconds, "temp_bytes": size} | ratios)
            print(
                f"{preset + ' ' + str(list(shape)):<26}{f'{backend} {chunk or str()}':<16}{1e3 * seconds:>10.1f}"
                f"{ratios['time_ratio']:>8.2f}{size / 2**20:>8.0f}{ratios['memory_ratio']:>8.2f}",
                flush=True,
            )
    write(args.out, {"what": "causal attention, forward + backward, float32", "repeats": args.repeats, "rows": rows})


if __name__ == "__main__":
    main()
