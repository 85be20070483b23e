"""Measures sampling on the CPU: ours, ours without the KV cache (like OpenAI's sampler), and transformers' generate().

pip install -e ".[bench]"
python benchmarks/sampling.py --out=benchmarks/results/sampling_cpu.json
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx
from peer import transformers_model
from report import median_seconds, write

from igpt.model import ImageGPT, ModelConfig
from igpt.sample import image_keys, sample_tokens

MODELS = {
    "digits, 8 x 8": ModelConfig(width=128, depth=4, num_heads=4, vocab_size=17, seq_len=64),
    "width 128, 16 x 16": ModelConfig(width=128, depth=4, num_heads=4, vocab_size=512, seq_len=256),
}


@jax.jit
def without_cache(model: ImageGPT, keys: jax.Array) -> jax.Array:
    """Samples the same tokens, but runs a forward pass over all T positions for each of them."""

    def step(tokens, position):
        logits = model(tokens)[:, position]
        position_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, position)
        return tokens.at[:, position].set(jax.vmap(jax.random.categorical)(position_keys, logits)), None

    tokens = jnp.zeros((len(keys), model.config.seq_len), jnp.int32)
    return jax.lax.scan(step, tokens, jnp.arange(model.config.seq_len))[0]


def with_random_head(config: ModelConfig) -> ImageGPT:
    """A new model with a random head: with the initial zeros, draws are uniform and would hide errors of the cache."""
    model = ImageGPT(config, nnx.Rngs(0))
    model.head.kernel[...] = jax.random.normal(jax.random.key(1), model.head.kernel.shape) * 0.1
    return model


def measure(config: ModelConfig, batch_size: int, repeats: int) -> dict:
    model, peer = with_random_head(config), transformers_model(config).eval()
    keys, nothing = image_keys(0, batch_size), np.zeros((batch_size, 0), np.int32)
    start = torch.full((batch_size, 1), config.vocab_size)

    def generate():
        with torch.no_grad():  # one token fewer than ours, because it has no position for the last prediction
            return peer.generate(start, max_length=config.seq_len, do_sample=True, top_k=0).numpy()

    seconds = {
        "ours": median_seconds(lambda: sample_tokens(model, nothing, keys), repeats),
        "without_cache": median_seconds(lambda: without_cache(model, keys), repeats),
        "transformers": median_seconds(generate, repeats),
    }
    equal = np.mean(np.asarray(sample_tokens(model, nothing, keys)) == np.asarray(without_cache(model, keys)))
    return {
        "images_per_s": {name: batch_size / time for name, time in seconds.items()},
        "speed_ratio": {name: time / seconds["ours"] for name, time in seconds.items()},
        "tokens_equal_without_cache": float(equal),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, help="the JSON to write")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()

    rows = []
    for name, config in MODELS.items():
        rows.append({"model": name, "tokens": config.seq_len} | measure(config, args.batch_size, args.repeats))
        rates = ", ".join(f"{who} {rate:.1f}" for who, rate in rows[-1]["images_per_s"].items())
        print(f"{name}: images/s {rates}; {rows[-1]['tokens_equal_without_cache']:.1%} of tokens equal", flush=True)
    settings = {"batch_size": args.batch_size, "repeats": args.repeats}
    write(args.out, {"what": "unconditional sampling, float32, medians"} | settings | {"rows": rows})


if __name__ == "__main__":
    main()
