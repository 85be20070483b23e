"""Measures a training step of configs/digits.py on the CPU, beside transformers' ImageGPT in PyTorch.

pip install -e ".[bench]"
python benchmarks/training.py --out=benchmarks/results/training_cpu.json
"""

import argparse
import sys
from pathlib import Path

import jax
import numpy as np
import torch
from peer import transformers_model
from report import median_seconds, write

sys.path.insert(0, str(Path(__file__).parents[1]))  # for configs/

from configs import digits
from igpt.config import Config
from igpt.sharding import make_mesh, to_devices
from igpt.state import build_program


def ours(config, tokens: np.ndarray, repeats: int) -> float:
    mesh = make_mesh()
    program = build_program(Config.of(config, trains=True), mesh)
    state = program.create_state(seed=0)
    batch = to_devices({"tokens": tokens}, len(tokens), mesh)

    def run():
        nonlocal state
        state, metrics = program.train_step(state, batch)
        return metrics

    with jax.set_mesh(mesh):
        return median_seconds(run, repeats)


def theirs(config, tokens: np.ndarray, repeats: int) -> float:
    model = transformers_model(Config.of(config).network()).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0)
    targets = torch.from_numpy(tokens).long()
    inputs = torch.cat([torch.full_like(targets[:, :1], config.palette.colors), targets[:, :-1]], dim=1)

    def run():
        logits = model(inputs, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return loss.item()

    return median_seconds(run, repeats)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, help="the JSON to write")
    parser.add_argument("--repeats", type=int, default=30)
    args = parser.parse_args()

    config = digits.get_config()
    jax.config.update("jax_num_cpu_devices", config.mesh.cpu_devices)
    rows = []
    for batch_size in (config.train.batch_size, 64):
        tokens = np.random.default_rng(0).integers(0, config.palette.colors, (batch_size, 64)).astype(np.int32)
        seconds = {"ours": ours(config, tokens, args.repeats), "transformers": theirs(config, tokens, args.repeats)}
        ratio = seconds["transformers"] / seconds["ours"]
        rows.append({"batch_size": batch_size, "seconds": seconds, "speed_ratio": ratio})
        print(
            f"batch {batch_size}: ours {batch_size / seconds['ours']:.0f} images/s, "
            f"transformers {batch_size / seconds['transformers']:.0f} images/s, {ratio:.2f} times as fast",
            flush=True,
        )
    model = {name: getattr(config.model, name) for name in ("width", "depth", "num_heads")}
    write(args.out, {"what": "one update, float32, medians", "model": model, "repeats": args.repeats, "rows": rows})


if __name__ == "__main__":
    main()
