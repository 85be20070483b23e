"""The scaling study finds the optimum of curves that are known, and its intervals contain it."""

import itertools
import json
import sys

import numpy as np
import pytest

from igpt.errors import UserError
from tests.helpers import ROOT

ALPHA, BETA = 0.34, 0.28  # Hoffmann et al. 2022 fit the first and the second to text
COSTS = (1e15, 4e15, 1.6e16, 6.4e16)


@pytest.fixture
def scaling(monkeypatch):
    """The modules of benchmarks/scaling.py."""
    monkeypatch.setattr(sys, "path", [str(ROOT / "benchmarks"), *sys.path])
    import scaling
    import scaling_fit

    return scaling, scaling_fit


def best_size(cost: float) -> float:
    """The N that minimises 400 / N^alpha + 400 / D^beta, where cost = 6 N D."""
    return (ALPHA / BETA * (cost / 6) ** BETA) ** (1 / (ALPHA + BETA))


def runs(cost: float, noise: float = 0.0, seed: int = 0, offset: float = 1.0, count: int = 7) -> list[dict]:
    """Runs with sizes around the best one; `offset` moves them all."""
    rng, found = np.random.default_rng(seed), []
    for factor in np.geomspace(0.3, 3.3, count):
        n = offset * factor * best_size(cost)
        d = cost / (6 * n)
        loss = 1.5 + 400 / n**ALPHA + 400 / d**BETA + noise * rng.normal()
        found.append({"parameters": n, "tokens": d, "loss": loss, "accuracy": 1 - loss / 100})
    return found


def test_the_best_sizes_and_the_exponents_of_a_known_law_are_found(scaling):
    _, scaling_fit = scaling
    found = scaling_fit.fit({cost: runs(cost) for cost in COSTS}, "loss", samples=50)
    for row in found["budgets"]:
        n = best_size(row["flops"])
        assert row["inside"] and row["parameters"]["value"] == pytest.approx(n, rel=0.06)
        assert row["tokens"]["value"] == pytest.approx(row["flops"] / 6 / n, rel=0.06)
        assert row["tokens_per_parameter"]["value"] == pytest.approx(row["flops"] / 6 / n**2, rel=0.12)
    exponents = found["exponents"]
    assert exponents["parameters"]["value"] == pytest.approx(BETA / (ALPHA + BETA), abs=0.01)
    assert exponents["tokens"]["value"] == pytest.approx(ALPHA / (ALPHA + BETA), abs=0.01)


def test_accuracy_has_its_optimum_where_it_is_highest(scaling):
    _, scaling_fit = scaling
    by_loss, by_accuracy = (
        scaling_fit.fit({cost: runs(cost) for cost in COSTS}, metric, samples=20) for metric in ("loss", "accuracy")
    )
    for one, other in zip(by_loss["budgets"], by_accuracy["budgets"], strict=True):
        assert one["parameters"]["value"] == pytest.approx(other["parameters"]["value"])


def test_95_percent_intervals_contain_the_truth_about_as_often(scaling):
    _, scaling_fit = scaling
    hits = []
    for seed in range(40):
        budgets = {cost: runs(cost, noise=0.01, seed=100 * seed + i) for i, cost in enumerate(COSTS)}
        exact = scaling_fit.fit({cost: runs(cost) for cost in COSTS}, "loss", samples=2)
        noisy = scaling_fit.fit(budgets, "loss", samples=200, seed=seed)
        for row, true in zip(noisy["budgets"], exact["budgets"], strict=True):
            low, high = row["parameters"]["interval"]
            hits.append(low <= true["parameters"]["value"] <= high)
    assert 0.88 <= np.mean(hits) <= 0.995


def test_an_optimum_outside_the_sizes_is_the_nearest_size_and_says_so(scaling):
    _, scaling_fit = scaling
    budgets = {cost: runs(cost, offset=12.0) for cost in COSTS}  # all too large
    found = scaling_fit.fit(budgets, "loss", samples=20)
    for row in found["budgets"]:
        smallest = budgets[row["flops"]][0]["parameters"]
        assert not row["inside"] and row["share_inside"] < 0.5
        assert row["parameters"]["value"] == pytest.approx(smallest)
    hill = np.array([0.0, 1.0, 2.0, 2.5])
    assert scaling_fit.optimum(hill, -(hill**2)) == (2.5, False)  # a parabola that opens downwards has no minimum


def test_loss_and_accuracy_agree_among_runs_that_share_a_size_or_a_budget(scaling):
    _, scaling_fit = scaling
    losses = {("a", 1): 3.0, ("b", 1): 2.5, ("c", 1): 2.0, ("a", 2): 2.9, ("a", 3): 2.8}
    accuracy = {("a", 1): 0.5, ("b", 1): 0.4, ("c", 1): 0.3, ("a", 2): 0.6, ("a", 3): 0.7}
    found = [{"size": s, "flops": c, "loss": losses[s, c], "accuracy": accuracy[s, c]} for s, c in losses]
    assert scaling_fit.agreement(found, "flops") == {"rank_correlations": {"1": pytest.approx(1)}, "mean": 1}
    assert scaling_fit.agreement(found, "size") == {"rank_correlations": {"a": pytest.approx(-1)}, "mean": -1}
    assert scaling_fit.agreement(found[:2], "flops") == {"rank_correlations": {}, "mean": None}


def test_too_few_sizes_are_refused(scaling):
    _, scaling_fit = scaling
    with pytest.raises(SystemExit, match="a budget has 3 sizes"):
        scaling_fit.fit({1e15: runs(1e15, count=3)}, "loss")


def test_a_run_spends_its_budget(scaling):
    module, _ = scaling
    args = module.parser().parse_args(["--workdir=a", "--out=b"])
    for cost in args.budgets:
        for size in args.sizes:
            run = module.plan_run(cost, size, args)
            width, depth = map(int, size.split("x"))
            # 6 N D for products, and 12 T D / 2 a layer and token for attention.
            flops = run["tokens"] * (6 * run["parameters"] + 6 * 256 * width * depth)
            assert flops == pytest.approx(cost, rel=0.06)
            assert run["fields"]["optim.warmup_steps"] <= run["steps"] // 2
            assert run["fields"]["optim.name"] == "adam"  # the rates are Adam's
    with pytest.raises(UserError, match="pay 0 steps of 512x8"):
        module.plan_run(1e9, "512x8", args)


def test_fields_that_are_set_change_the_plan_too(scaling):
    module, _ = scaling

    def plan(*flags):
        return module.plan_run(1e11, "32x3", module.parser().parse_args(["--workdir=a", "--out=b", *flags]))

    usual, wide = plan(), plan("--set", "model.mlp_width=64", "data.flip=False")
    assert wide["parameters"] < usual["parameters"] and wide["tokens"] > usual["tokens"]
    assert wide["fields"]["model.mlp_width"] == "64" and wide["fields"]["data.flip"] == "False"  # as train.py is told
    for field in ("train.steps=7", "train.batch_size=16", "model.width=48", "optim.learning_rate=1"):
        with pytest.raises(UserError, match=f"--set {field}: .*plan"):
            plan("--set", field)
    for field, message in (
        ("model.mlpwidth=64", "no field 'mlpwidth'"),
        ("train.seed", "--set train.seed: give FIELD"),
    ):
        with pytest.raises(UserError, match=message):
            plan("--set", field)


@pytest.mark.parametrize(
    "config", ["./configs/digits.py", str(ROOT / "configs" / "digits.py"), "configs/imagenet.py:s"]
)
def test_a_config_is_named_as_train_py_names_it(scaling, config):
    module, _ = scaling
    args = module.parser().parse_args(["--workdir=a", "--out=b", f"--config={config}"])
    assert module.plan_run(1e16, "32x3", args)["steps"] > 20


@pytest.mark.parametrize(
    ("last", "message"), [("56x2", "--sizes: 56x2"), ("big", "--sizes: big"), ("16x1", "--sizes: 16x1 24x1 24x2; ")]
)
def test_sizes_that_cannot_be_fitted_are_refused_before_a_run(scaling, tmp_path, monkeypatch, last, message):
    module, _ = scaling
    argv = [
        "scaling.py",
        f"--workdir={tmp_path}",
        f"--out={tmp_path}",
        "--idx=nowhere",
        "--sizes",
        "16x1",
        "24x1",
        "24x2",
    ]
    monkeypatch.setattr(sys, "argv", [*argv, last])
    with pytest.raises(UserError, match=message):
        module.main()


def test_a_summary_without_a_finished_budget_has_no_fits(scaling, tmp_path, monkeypatch):
    module, _ = scaling
    argv = ["scaling.py", f"--workdir={tmp_path}", f"--out={tmp_path}", "--summarize"]
    monkeypatch.setattr(sys, "argv", argv)
    module.main()
    found = json.loads((tmp_path / "scaling.json").read_text())
    assert found["runs"] == [] and "fits" not in found and not (tmp_path / "scaling.png").exists()


def test_the_figures_of_the_scaling_page_are_the_recorded_ones(scaling):
    recorded = json.loads((ROOT / "docs" / "results" / "scaling.json").read_text())
    page = " ".join((ROOT / "docs" / "scaling.md").read_text().split())
    fits = recorded["fits"]

    def shown(row, name):
        low, high = row[name]["interval"]
        text = f"{row[name]['value']:,.0f} [{low:,.0f}, {high:,.0f}]"
        return text if row["inside"] else text + ", at the end of the sizes"

    for loss, accuracy in zip(fits["loss"]["budgets"], fits["accuracy"]["budgets"], strict=True):
        cells = [shown(fit, name) for fit in (loss, accuracy) for name in ("parameters", "tokens_per_parameter")]
        assert f"| {loss['flops']:.1e} | " + " | ".join(cells) + " |" in page
        assert loss["parameters"]["interval"][1] < accuracy["parameters"]["interval"][0]  # disjoint, as the page says
    for metric, name in itertools.product(("loss", "accuracy"), ("parameters", "tokens")):
        exponent = fits[metric]["exponents"][name]
        assert "{:.2f} [{:.2f}, {:.2f}]".format(exponent["value"], *exponent["interval"]) in page
    assert f"{len(recorded['runs'])} runs on scattered Fashion-MNIST" in page
    assert f"took {sum(recorded['seconds'].values()) / 60:.0f} minutes on one core" in page
    apart = [
        accuracy["parameters"]["value"] / loss["parameters"]["value"]
        for loss, accuracy in zip(fits["loss"]["budgets"], fits["accuracy"]["budgets"], strict=True)
    ]
    assert f"is {apart[0]:.0f} times that by loss at the smallest budget, {apart[-1]:.1f} times" in page
    at_a_budget, at_a_size = (scaling[1].agreement(recorded["runs"], shared) for shared in ("flops", "size"))
    values = [f"{value:.2f}" for value in at_a_budget["rank_correlations"].values()]
    assert f"accuracy are {', '.join(values[:-1])} and {values[-1]};" in page
    least, most = (f(at_a_size["rank_correlations"].values()) for f in (min, max))
    assert f"from {least:.2f} to {most:.2f}, mean {at_a_size['mean']:.2f}" in page
