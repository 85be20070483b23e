"""Draws the results of benchmarks/scaling.py: IsoFLOP curves, the best sizes, and tokens per parameter."""

import numpy as np
from matplotlib.figure import Figure

CHINCHILLA = 20  # tokens per parameter, about (Hoffmann et al. 2022)
PIXELS = (200, 400)  # 10 to 20 times as many, at 32 x 32 (arXiv 2511.08704, figure 1)
LABELS = {"loss": "validation loss (nats a token)", "accuracy": "linear probe, test accuracy (%)"}


def draw(results: dict, path: str) -> None:
    """Draws `results` in four panels and writes them as PNG."""
    figure = Figure(figsize=(11.0, 8.0), layout="constrained")
    axes = figure.subplots(2, 2)
    for panel, metric in zip(axes[0], LABELS, strict=True):
        draw_curves(panel, results, metric)
    draw_best(axes[1, 0], results)
    draw_ratio(axes[1, 1], results)
    for panel in axes.flat:
        panel.grid(alpha=0.3)
        panel.set_xscale("log")
    figure.savefig(path, dpi=110)


def draw_curves(panel, results: dict, metric: str) -> None:
    """The runs of each budget, their parabola, and its optimum."""
    factor = 100 if metric == "accuracy" else 1
    for i, budget in enumerate(results["fits"][metric]["budgets"]):
        runs = [run for run in results["runs"] if run["flops"] == budget["flops"]]
        sizes, color = np.array([run["parameters"] for run in runs]), f"C{i}"
        panel.plot(
            sizes, [factor * run[metric] for run in runs], "o", color=color, label=f"{budget['flops']:.2g} FLOPs"
        )
        along = np.geomspace(sizes.min(), sizes.max(), 100)
        panel.plot(along, factor * np.polyval(budget["parabola"], np.log(along)), color=color, alpha=0.6)
        best = budget["parameters"]["value"]
        value = factor * np.polyval(budget["parabola"], np.log(best))
        panel.plot(best, value, "*" if budget["inside"] else "x", color=color, markersize=14)
    panel.legend(fontsize=8)
    what = "lower" if metric == "loss" else "higher"
    panel.set(title=f"{metric}: {what} is better; star: the best size", xlabel="parameters N", ylabel=LABELS[metric])


def draw_best(panel, results: dict) -> None:
    for metric, color in (("loss", "tab:blue"), ("accuracy", "tab:red")):
        draw_points(panel, results["fits"][metric], "parameters", color, f"best N for {metric}")
    panel.set_yscale("log")
    panel.set(title="best size by budget, 95 % intervals", xlabel="compute (FLOPs)", ylabel="parameters N")
    panel.set_ylim(top=6 * panel.get_ylim()[1])  # room for the legend above the points
    panel.legend(fontsize=8, loc="upper left")


def draw_ratio(panel, results: dict) -> None:
    for metric, color in (("loss", "tab:blue"), ("accuracy", "tab:red")):
        draw_points(panel, results["fits"][metric], "tokens_per_parameter", color, f"best for {metric}")
    panel.axhline(CHINCHILLA, color="black", linestyle="--", label="text: about 20 (Chinchilla)")
    panel.axhspan(*PIXELS, color="gray", alpha=0.25, label="pixels, 32 x 32: 10 to 20 times that")
    panel.set_yscale("log")
    panel.set(
        title="tokens for each parameter, at the best size", xlabel="compute (FLOPs)", ylabel="tokens / parameters"
    )
    panel.set_ylim(top=30 * panel.get_ylim()[1])  # room for the legend above the points
    panel.legend(fontsize=8, loc="upper left")


def draw_points(panel, fitted: dict, name: str, color: str, label: str) -> None:
    """A quantity of each budget with its interval. Optima at the end of the sizes are hollow."""
    for i, budget in enumerate(fitted["budgets"]):
        found = budget[name]
        low, high = found["interval"]
        panel.plot([budget["flops"]] * 2, [low, high], color=color, alpha=0.6)
        face = color if budget["inside"] else "white"
        panel.plot(budget["flops"], found["value"], "o", color=color, markerfacecolor=face, label="" if i else label)
