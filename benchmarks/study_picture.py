"""Draws the findings of benchmarks/study.py, one panel each."""

import numpy as np
from matplotlib.figure import Figure

LABELS = {"classes": "classes only", "scratch": "from scratch", "long_scratch": "from scratch, equal compute"}
LABELS["bert_joint"] = "BERT, joint"


def draw(found: dict, path: str) -> None:
    """Draws the findings that were made, one panel each, and writes the picture as PNG. Without any, it writes none."""
    panels = {"1 ": draw_layers, "2 ": draw_checkpoints, "4 fine-tuning": draw_tuning, "5 ": draw_few_labels}
    panels |= {"6 ": draw_codes, "7 ": draw_color}
    made = [panel for start, panel in panels.items() if any(name.startswith(start) for name in found)]
    if not made:
        return
    rows, columns = (len(made) + 1) // 2, min(len(made), 2)
    figure = Figure(figsize=(5.5 * columns, 4.0 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flat
    for panel, draw_panel in zip(axes, made, strict=False):
        draw_panel(panel, found)
        panel.grid(alpha=0.3)
    for panel in axes[len(made) :]:
        panel.set_visible(False)
    figure.savefig(path, dpi=120)


def draw_line(panel, x, entries: list[dict], label: str, **style) -> None:
    """Means in percent, with their intervals if all have one."""
    means = 100 * np.array([entry["mean"] for entry in entries])
    (line,) = panel.plot(x, means, "o-", label=label, **style)
    if all(entry["interval"] for entry in entries):
        low, high = 100 * np.array([entry["interval"] for entry in entries]).T
        panel.fill_between(x, low, high, alpha=0.15, linewidth=0, color=line.get_color())


def legend_below(panel) -> None:
    """Puts the legend where it hides no curve."""
    panel.legend(loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=2)


def draw_layers(panel, found: dict) -> None:
    if by_layer := found.get("1 accuracy by layer"):
        draw_networks(panel, by_layer)
        for name, label, color in (
            ("3 next pixels against BERT", "BERT", "tab:green"),
            ("3 as many predicted positions", "BERT, as many predictions", "tab:olive"),
        ):
            if bert := found.get(name):
                draw_line(panel, by_layer["layers"], bert["bert_layers"], label, color=color)
        legend_below(panel)
    panel.set(title="linear probe by layer", xlabel="layer", ylabel="test accuracy (%)")


def draw_color(panel, found: dict) -> None:
    colors = {"on black": "tab:blue", "on photographs": "tab:purple", "on many photographs": "tab:green"}
    for name, color in colors.items():
        if by_layer := found.get(f"7 in colour, {name}"):
            draw_line(panel, by_layer["layers"], by_layer["pretrained"], f"next pixels, {name}", color=color)
            pixels = 100 * by_layer["raw_pixels"]["mean"]
            panel.axhline(pixels, color=color, linestyle=":", label=f"raw pixels, {name}")
            panel.set_xticks(by_layer["layers"])
    legend_below(panel)
    panel.set(title="in colour: linear probe by layer", xlabel="layer", ylabel="test accuracy (%)")


def draw_networks(panel, by_layer: dict) -> None:
    """The layers of networks that were trained and of untrained ones, and raw pixels."""
    draw_line(panel, by_layer["layers"], by_layer["pretrained"], "next pixels", color="tab:blue")
    draw_line(panel, by_layer["layers"], by_layer["random_init"], "random initialisation", color="tab:gray")
    panel.axhline(100 * by_layer["raw_pixels"]["mean"], color="tab:orange", linestyle="--", label="raw pixels")
    panel.set_xticks(by_layer["layers"])


def draw_checkpoints(panel, found: dict) -> None:
    if over_time := found.get("2 accuracy against validation loss"):
        for number, points in enumerate(over_time["step, validation loss, test accuracy"], start=1):
            _, losses, accuracies = np.array(points).T
            panel.plot(losses, 100 * accuracies, "o-", label=f"run {number}")
        panel.invert_xaxis()
        panel.legend()
    panel.set(title="best layer of a run's checkpoints", xlabel="validation loss (nats a token)", ylabel="accuracy (%)")


def draw_tuning(panel, found: dict) -> None:
    if tuning := found.get("4 fine-tuning"):
        names = list(tuning["test_accuracy"])
        means = [100 * tuning["test_accuracy"][name]["mean"] for name in names]
        panel.barh([LABELS.get(name, name) for name in names], means, color="tab:blue", alpha=0.6)
        for row, name in enumerate(names):
            values = tuning["test_accuracy"][name]["values"]
            panel.plot(100 * np.array(values), [row] * len(values), "k.")
        panel.set_xlim(min(means) - 5, 100)
    panel.set(title="fine-tuning", xlabel="test accuracy (%)")


def draw_few_labels(panel, found: dict) -> None:
    if few := found.get("5 few labels"):
        for name, label in (("features", "probe on features"), ("raw_pixels", "on raw pixels"), ("scratch", "scratch")):
            rows = [row for row in few["rows"] if name in row]
            if rows:
                draw_line(panel, [row["labels_per_class"] for row in rows], [row[name] for row in rows], label)
        panel.set_xscale("log")
        panel.set_xticks(counts := [row["labels_per_class"] for row in few["rows"]], counts, minor=False)
        panel.minorticks_off()
        panel.legend()
    panel.set(title="few labels", xlabel="labels a class", ylabel="test accuracy (%)")


def draw_codes(panel, found: dict) -> None:
    compared = found["6 codes against pixels"]
    for name, color in (("codes", "tab:purple"), ("pixels", "tab:blue")):
        draw_line(panel, compared["layers"], compared["by_layer"][name], f"{name}, linear probe", color=color)
        if tuned := compared.get("fine-tuned"):
            label = f"{name}, fine-tuned"
            panel.axhline(100 * tuned[name]["mean"], color=color, linestyle="--", alpha=0.7, label=label)
    panel.axhline(100 * compared["raw_pixels"]["mean"], color="tab:orange", linestyle=":", label="raw pixels")
    panel.set_xticks(compared["layers"])
    panel.set(title="codes and pixels at equal compute", xlabel="layer", ylabel="test accuracy (%)")
    panel.legend()
