"""How large a network and how many images are best for a compute budget: IsoFLOP curves on scattered Fashion-MNIST.

python benchmarks/scaling.py --workdir=runs/scaling --out=docs/results --idx=FOLDER
python benchmarks/scaling.py --workdir=runs/scaling --out=docs/results --idx=FOLDER --list

Each budget trains every size for as many steps as the budget pays, by the formula of igpt/flops.py, and then probes its
layers. Parabolas in log N through the runs of a budget give the best size, by loss and by probe accuracy. The result is
scaling.json and scaling.png. Every run is a command of its own, which is printed; one that has finished is not run
again. --list prints what each run would be, and runs nothing. docs/scaling.md has the numbers for a pod.

FOLDER holds the four IDX files of Fashion-MNIST's release. A config with another source needs none.
"""

import argparse
import json
import math
import re
from pathlib import Path

from ml_collections import ConfigDict
from report import write
from runs import Runs
from scaling_fit import LEAST_SIZES, MEANING, agreement, fit
from scaling_picture import draw
from study import read_idx

from igpt.command import Parser
from igpt.config import Config
from igpt.errors import UserError, reported
from igpt.flops import train_flops_per_image
from igpt.model import ModelConfig, count_params
from igpt.run.flags import parse_with_config

BUDGETS = (4e10, 8e10, 1.6e11, 3.2e11)
SIZES = ("16x1", "24x1", "24x2", "32x3", "48x4")


def parameters(model: ModelConfig) -> int:
    """N: the parameters that each token is multiplied with. The tables of tokens and positions are only looked up."""
    return count_params(model) - (model.vocab_size + 1 + model.seq_len) * model.width


def plan_run(cost: float, size: str, args: argparse.Namespace) -> dict:
    """What a size would do with a budget: its config fields, parameters, steps and tokens.

    Raises UserError for a size or a field of --set that cannot be, and for a budget that pays too few steps.
    """
    if not re.fullmatch(r"[1-9]\d*x[1-9]\d*", size):
        raise UserError(f"--sizes: {size} is no size; give WIDTHxDEPTH, such as 32x3")
    width, depth = map(int, size.split("x"))
    heads = max(1, width // args.head_size)
    if width % heads:
        problem = f"--sizes: {size} has {heads} heads by --head_size={args.head_size}, which do not divide {width}"
        raise UserError(f"{problem}; give another width or head size")
    base = with_fields(args.config, args.set)
    base.model.update(width=width, depth=depth, num_heads=heads)
    model = Config.of(base).network()
    steps = int(cost / (train_flops_per_image(model) * args.batch_size))
    if steps < 20:
        raise UserError(f"--budgets: {cost:.2g} FLOPs pay {steps} steps of {size}; drop that size, or pay 20 or more")
    rate = min(args.largest_rate, args.rate * math.sqrt(args.rate_width / width))
    fields = {"model.width": width, "model.depth": depth, "model.num_heads": heads}
    fields |= {"train.steps": steps, "train.batch_size": args.batch_size, "optim.warmup_steps": max(1, steps // 10)}
    fields |= {f"train.{name}": steps for name in ("eval_every", "sample_every", "checkpoint_every")}
    fields |= {"optim.name": args.optimizer, "optim.learning_rate": round(rate, 6)}
    given = dict(pair.split("=", 1) for pair in args.set)
    for name in given.keys() & fields.keys():
        flags = "--sizes, --head_size, --budgets, --batch_size, --optimizer and --rate"
        raise UserError(f"--set {name}={given[name]}: the plan sets {name} itself; leave it out, and use {flags}")
    fields |= given
    tokens = steps * args.batch_size * model.seq_len
    run = {"flops": cost, "size": size, "parameters": parameters(model), "all_parameters": count_params(model)}
    return run | {"steps": steps, "tokens": tokens, "fields": fields}


def with_fields(config: str, pairs: list[str]) -> ConfigDict:
    """The configuration that train.py would read. Raises UserError for a field that is unknown or of a wrong type."""
    for pair in pairs:
        if "=" not in pair:
            raise UserError(f"--set {pair}: give FIELD=VALUE, such as model.remat=attention")
    words = [f"--config={config}", *(f"--config.{pair}" for pair in pairs)]
    return parse_with_config(Parser("scaling.py", ""), words).config


def results_of(run: dict, folder: Path) -> dict:
    """`run` with the loss and the accuracies that its folder has."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    loss = [record["eval/loss"] for record in records if "eval/loss" in record][-1]
    probe = json.loads((folder / "probe" / "probe.json").read_text())["pretrained"]
    found = {"loss": loss, "accuracy": probe["test_accuracy"], "best_layer": probe["best_layer"]}
    return {name: value for name, value in run.items() if name != "fields"} | found


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", required=True, help="the folder for all runs")
    parser.add_argument("--out", required=True, help="the folder for scaling.json and scaling.png")
    parser.add_argument("--config", default="configs/scattered_fashion.py", help="what all runs share")
    parser.add_argument("--idx", help="the folder of Fashion-MNIST's IDX files")
    parser.add_argument("--budgets", type=float, nargs="+", default=BUDGETS, help="FLOPs of training, forward and back")
    parser.add_argument("--sizes", nargs="+", default=SIZES, help="WIDTHxDEPTH; at least four for each budget")
    parser.add_argument("--batch_size", type=int, default=8, help="images in a step, the same for all runs")
    parser.add_argument("--head_size", type=int, default=16, help="channels of an attention head")
    parser.add_argument("--optimizer", default="adam", help="the other defaults are meant for Adam")
    parser.add_argument(
        "--rate", type=float, default=3e-3, help="learning rate at --rate_width; others: 1 / sqrt(width)"
    )
    parser.add_argument("--rate_width", type=int, default=128, help="see --rate")
    parser.add_argument("--largest_rate", type=float, default=1e-2, help="no learning rate is higher")
    parser.add_argument("--probe_images", type=int, default=2000, help="labelled images for the probe")
    parser.add_argument("--set", nargs="*", default=[], metavar="FIELD=VALUE", help="other fields of all training runs")
    parser.add_argument("--list", action="store_true", help="print the runs, and run nothing")
    parser.add_argument("--summarize", action="store_true", help="run nothing, read the runs that have finished")
    return parser


def main() -> None:
    args = parser().parse_args()
    args.sizes = list(dict.fromkeys(args.sizes))
    if len(args.sizes) < LEAST_SIZES:
        raise UserError(f"--sizes: {' '.join(args.sizes)}; a parabola needs {LEAST_SIZES} or more different sizes")
    plans = [plan_run(cost, size, args) for cost in args.budgets for size in args.sizes]
    total = sum(args.budgets) * len(args.sizes)
    if args.list:
        for run in plans:
            line = (
                "{flops:9.2g} FLOPs  {size:>8}  {parameters:>13,} parameters  {steps:>9,} steps  {tokens:>15,} tokens"
            )
            print(line.format(**run))
        print(f"{total:.3g} FLOPs in {len(plans)} runs")
        return
    workdir = Path(args.workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    runs, npz = Runs("scaling", workdir), workdir / "fashion_mnist.npz"
    clothes = Path(args.config) == Path(parser().get_default("config"))
    own = {"data.source": f"scattered:npz:{npz}"} if clothes else {}
    if own and not args.summarize:
        read_idx(args.idx, npz)
    finished = []
    for plan in plans:
        name = f"{plan['flops']:.2e}_{plan['size']}"
        if not args.summarize:
            runs.train(name, args.config, **(own | plan["fields"]))
            runs.probe(name, baselines=False, neighbours=0, train_images=args.probe_images)
        if (runs.path(name) / "probe" / "finished").exists():
            finished.append(results_of(plan, runs.path(name)))
    by_budget = {}
    for run in finished:
        by_budget.setdefault(run["flops"], []).append(run)
    by_budget = {cost: runs for cost, runs in by_budget.items() if len(runs) >= LEAST_SIZES}  # others are not finished
    results = {
        "what": "N counts the parameters without tables; FLOPs are those of igpt/flops.py, forward and backward",
        "config": args.config,
        "batch_size": args.batch_size,
        "set": args.set,
        "seconds": runs.seconds(),
        "runs": finished,
        "loss_against_accuracy": {
            "across_sizes_at_one_budget": agreement(finished, "flops"),
            "across_budgets_at_one_size": agreement(finished, "size"),
        },
    }
    if by_budget:
        results["fits"] = {metric: fit(by_budget, metric) for metric in MEANING}
    write(f"{args.out}/scaling.json", results)
    if by_budget:
        draw(results, f"{args.out}/scaling.png")


if __name__ == "__main__":
    with reported():
        main()
