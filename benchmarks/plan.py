"""Plans every size on every machine: writes docs/results/plan.json, and the table of docs/plans.md.

    pip install -e ".[tpu]"
    python benchmarks/plan.py                  makes the plans that are missing
    python benchmarks/plan.py --enough=4       also searches again for plans whose search ended after fewer that fit
    python benchmarks/plan.py --again --enough=1    searches again for all plans; a row keeps the faster of two
    python benchmarks/plan.py --remat=attention    compiles the splits of kept plans again, with this remat policy
    python benchmarks/plan.py --estimates      compiles nothing; computes the estimates again from the kept programs

No TPU is needed. One plan takes one to six minutes, all of them take hours. An interrupted run continues
where it stopped. Each run computes the estimates of kept plans again, from their kernels, collectives and cycles.
"""

import argparse
import json
import math
import os
import sys
from importlib.metadata import version
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"

sys.path.insert(0, str(Path(__file__).parents[1]))  # for configs/

from report import machine

from configs import imagenet
from igpt.config import Config
from igpt.files import write_text
from igpt.plan.compiled import CHIPS, GIB, compile_plan, estimates
from igpt.plan.search import ENOUGH, best_estimate, format_line, search_plans, step_seconds

ROOT = Path(__file__).parents[1]
SIZES = ("s", "m", "l", "l48", "xl")
TOPOLOGIES = ("v5e:2x4", "v5e:8x8", "v5e:16x16", "v5p:2x2x2", "v5p:4x4x8", "v6e:2x4", "v6e:16x16")
# The paper's 128 images a step (xl: 64) are too few for 256 chips, so the batch grows with the chips.
MIN_IMAGES_PER_CHIP = {"s": 8, "m": 4, "l": 4, "l48": 2, "xl": 1}
OVERSIZED = {"train.batch_size": 16384, "model.remat": "none"}


def count_chips(topology: str) -> int:
    return math.prod(map(int, topology.partition(":")[2].split("x")))


def make_config(size: str, chips: int):
    """configs/imagenet.py for `chips` chips. A run sees as many images as the paper's, in fewer, larger steps."""
    config = imagenet.get_config(size)
    batch_size = max(config.train.batch_size, MIN_IMAGES_PER_CHIP[size] * chips)
    config.train.steps = config.train.steps * config.train.batch_size // batch_size
    config.optim.warmup_steps = imagenet.TRAIN_IMAGES // batch_size
    config.train.batch_size = batch_size
    return config


def search_best(size: str, topology: str, enough: int, known: dict | None) -> dict:
    """The best plan that a search finds, or the known plan if that is faster."""
    result = search_plans(make_config(size, count_chips(topology)), topology, enough)
    counts = {"found": len(result.found), "compiled": result.compiled, "too_large": result.too_large}
    counts |= {"slower": result.slower, "enough": enough}
    best = result.found[0] if result.found else result.nearest
    if known and known["fits"] and (not best["fits"] or step_seconds(known) < step_seconds(best)):
        return known | {"search": counts}
    return best | provenance() | {"search": counts}


def compile_again(size: str, known: dict, remat: str) -> dict:
    """The known plan's split with this remat policy, by the present code; or the known plan if that is faster."""
    config = make_config(size, known["chips"])
    config.mesh.update(known["mesh"])
    config.train.accumulate, config.model.remat = known["accumulate"], remat
    plan = compile_plan(config, known["topology"]) | provenance() | {"search": known["search"] | {"remat": remat}}
    print(format_line(plan), flush=True)
    return known if not plan["fits"] or step_seconds(known) <= step_seconds(plan) else plan


def provenance() -> dict:
    versions = {name: version(name) for name in ("jax", "flax", "optax", "libtpu")}
    return {"made": {"command": machine()["command"], "python": machine()["python"]} | versions}


def estimate_again(size: str, plan: dict) -> dict:
    """A kept plan with the estimate of the present code, and with its checks."""
    if not plan["fits"]:
        return plan
    model = Config.of(make_config(size, plan["chips"])).network()
    chip, kernels = CHIPS[plan["topology"].partition(":")[0]], " ".join(plan["kernels"])
    checks = {
        "kernels_forward_and_backward": all(f"fused_attention_{way}" in kernels for way in ("forward", "backward")),
        "no_float32_products_in_blocks": plan["float32_products_in_blocks"] == 0,
        "compiled_in_6_minutes": plan["compile_seconds"] < 360,  # processor time
    }
    return plan | estimates(plan, model, chip) | {"checks": checks}


def plan_oversized() -> dict:
    config = imagenet.get_config("s")
    config.update_from_flattened_dict(OVERSIZED)
    return compile_plan(config, "v5e:2x4") | provenance()


def state_under_fsdp(size: str) -> dict:
    """Bytes of the state on each chip for some numbers of chips, and bytes x chips relative to one chip: ideal is 1."""
    found = {}
    for chips in (1, 8, 64, 128, 256):
        config = make_config(size, chips)
        config.mesh.fsdp = chips
        held = compile_plan(config, f"gpu:{chips}")["bytes_per_chip"]["state"]  # for "gpu" nothing is compiled
        found[str(chips)] = {"bytes": held, "times_chips": held * chips / found.get("1", {"bytes": held})["bytes"]}
    return found


def format_table(results: dict) -> str:
    """The table of docs/plans.md."""
    head = (
        "size", "chips", "data x fsdp x tensor", "images a step", "micro-batches", "remat", "state", "gradients",
        "activations", "peak", "of memory", "step", "MFU", "images/s", "days", "MFU by cycles", "compiled in",
    )  # fmt: skip
    lines = [f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}"]
    for size in SIZES:
        for topology in TOPOLOGIES:
            plan = results["plans"].get(f"{size} {topology}")
            if plan is None:
                cells = ["not planned yet"]
            elif not plan["fits"]:
                cells = ["does not fit"]
            else:
                held, estimate = plan["bytes_per_chip"], best_estimate(plan)
                cells = [
                    " x ".join(str(side) for side in plan["mesh"].values()),
                    f"{plan['batch_size']:,}",
                    str(plan["accumulate"]),
                    plan["remat"],
                    *(
                        f"{held[name] / GIB:.2f}"
                        for name in ("state", "gradients", "activations_and_workspace", "peak")
                    ),
                    f"{plan['peak_share']:.0%}",
                    f"{estimate['step_seconds']:.3f} s",
                    f"{estimate['mfu_causal']:.0%}",
                    f"{estimate['images_per_second']:,.0f}",
                    f"{estimate['days']:.1f}",
                    f"{plan['estimate']['mfu_causal']:.0%}",
                    f"{plan['compile_seconds']:.0f} s",
                ]
            cells += [""] * (len(head) - 2 - len(cells))
            lines.append(f"| {size} | {topology} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default=str(ROOT / "docs" / "results" / "plan.json"), help="the JSON to complete")
    enough = f"end a search after this many plans that fit (default {ENOUGH}); earlier searches with fewer are repeated"
    parser.add_argument("--enough", type=int, help=enough)
    parser.add_argument("--sizes", default=",".join(SIZES), help="default: %(default)s")
    parser.add_argument("--topologies", default=",".join(TOPOLOGIES), help="default: %(default)s")
    parser.add_argument("--again", action="store_true", help="search again, also where a plan is kept")
    parser.add_argument("--remat", help="compile the splits of the kept plans again, with this policy")
    parser.add_argument("--estimates", action="store_true", help="compile nothing, compute the estimates again")
    args = parser.parse_args()

    path = Path(args.out)
    results = json.loads(path.read_text()) if path.exists() else {}
    results["what"] = (
        "estimates of the TPU compiler, no measurements; programs are those of each plan's `made`, step times and what "
        "follows from them were computed from these programs by the code of this commit"
    )
    results.setdefault("plans", {})

    def save() -> None:
        results["plans"] = {name: estimate_again(name.split()[0], plan) for name, plan in results["plans"].items()}
        write_text(path, json.dumps(results, indent=1) + "\n")
        guide = path.parents[1] / "plans.md"
        if guide.exists():
            before, _, rest = guide.read_text().partition("<!-- table -->\n")
            after = rest.partition("<!-- /table -->\n")[2]
            write_text(guide, f"{before}<!-- table -->\n{format_table(results)}\n<!-- /table -->\n{after}")

    if args.estimates:
        return save()
    if "state_under_fsdp" not in results:
        results["state_under_fsdp"] = {size: state_under_fsdp(size) for size in SIZES}
        save()
    if "oversized" not in results:
        results["oversized"] = plan_oversized()
        save()
    for topology in args.topologies.split(","):
        for size in args.sizes.split(","):
            name = f"{size} {topology}"
            known = results["plans"].get(name)
            if args.remat:
                if known and known["fits"]:
                    print(f"\n{name}", flush=True)
                    results["plans"][name] = compile_again(size, known, args.remat)
                    save()
            elif known is None or args.again or (args.enough and known["search"]["enough"] < args.enough):
                print(f"\n{name}", flush=True)
                results["plans"][name] = search_best(size, topology, args.enough or ENOUGH, known)
                save()
    save()
    print(format_table(results))


if __name__ == "__main__":
    main()
