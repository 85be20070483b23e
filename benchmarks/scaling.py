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
import importlib
import json
import math
import sys
from pathlib import Path

from report import write
from runs import Runs
from scaling_fit import LEAST_SIZES, MEANING, agreement, fit
from scaling_picture import draw

sys.path.insert(0, str(Path(__file__).parents[1]))  # for configs/

from igpt.config import Config
from igpt.flops import train_flops_per_image
from igpt.model import ModelConfig, count_params

BUDGETS = (4e10, 8e10, 1.6e11, 3.2e11)
SIZES = ("16x1", "24x1", "24x2", "32x3", "48x4")


def parameters(model: ModelConfig) -> int:
    """N: the parameters that each token is multiplied with. The tables of tokens and positions are only looked up."""
    return count_params(model) - (model.vocab_size + 1 + model.seq_len) * model.width


def plan_run(cost: float, size: str, args: argparse.Namespace) -> dict:
    """What a size would do with a budget: its config fields, parameters, steps and tokens. SystemExit if too little."""
    width, depth = map(int, size.split("x"))
    base = importlib.import_module(args.config.removesuffix(".py").replace("/", ".")).get_config()
    heads = max(1, width // args.head_size)
    base.model.update(width=width, depth=depth, num_heads=heads)
    model = Config.of(base).network()
    steps = int(cost / (train_flops_per_image(model) * args.batch_size))
    if steps < 20:
        raise SystemExit(f"--budgets: {cost:.2g} FLOPs pay {steps} steps of {size}; drop that size, or pay 20 or more")
    rate = min(args.largest_rate, args.rate * math.sqrt(args.rate_width / width))
    fields = {"model.width": width, "model.depth": depth, "model.num_heads": heads}
    fields |= {"train.steps": steps, "train.batch_size": args.batch_size, "optim.warmup_steps": max(1, steps // 10)}
    fields |= {f"train.{name}": steps for name in ("eval_every", "sample_every", "checkpoint_every")}
    fields |= {"optim.name": args.optimizer, "optim.learning_rate": round(rate, 6)}
    fields |= dict(pair.split("=", 1) for pair in args.set)
    tokens = steps * args.batch_size * model.seq_len
    run = {"flops": cost, "size": size, "parameters": parameters(model), "all_parameters": count_params(model)}
    return run | {"steps": steps, "tokens": tokens, "fields": fields}


def fashion_mnist(idx: str | None, path: Path) -> None:
    """Writes the .npz that configs/scattered_fashion.py reads, from the IDX files."""
    from study import read_idx  # the study reads the same files

    if not idx:
        raise SystemExit("--idx is missing; give the folder of train-images-idx3-ubyte.gz and the other three files")
    read_idx(idx, path)


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
    parser.add_argument("--set", nargs="*", default=[], metavar="FIELD=VALUE", help="more fields of all training runs")
    parser.add_argument("--list", action="store_true", help="print the runs, and run nothing")
    parser.add_argument("--summarize", action="store_true", help="run nothing, read the runs that have finished")
    return parser


def main() -> None:
    args = parser().parse_args()
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
    own = {} if args.config != parser().get_default("config") else {"data.source": f"scattered:npz:{npz}"}
    if own and not npz.exists():
        fashion_mnist(args.idx, npz)
    finished = []
    for plan in plans:
        name = f"{plan['flops']:.2e}_{plan['size']}"
        if not args.summarize:
            runs.train(name, args.config, **own, **plan["fields"])
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
        "fits": {metric: fit(by_budget, metric) for metric in MEANING},
    }
    write(f"{args.out}/scaling.json", results)
    draw(results, f"{args.out}/scaling.png")


if __name__ == "__main__":
    main()
