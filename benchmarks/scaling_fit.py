"""Where a compute budget is spent best: parabolas through runs of one budget, and power laws through their optima.

Hoffmann et al. 2022 (arXiv 2203.15556, approach 2) fit the loss as a parabola in log N at each budget. Its minimum is
the best number of parameters N, and the budget then gives the number of tokens D. Intervals come from a bootstrap of
the parabolas' residuals.
"""

import numpy as np
from scipy.stats import spearmanr

MEANING = {"loss": 1.0, "accuracy": -1.0}  # the sign that makes smaller better
LEAST_SIZES = 4  # a parabola has three coefficients, and one more size shows the spread


def optimum(log_n: np.ndarray, values: np.ndarray) -> tuple[float, bool]:
    """The log N of a parabola's minimum, and whether it lies inside the sizes that were tried.

    Outside, or if the parabola opens downwards, it is the size at that end of the range whose fitted value is lower.
    """
    a, b, c = parabola(log_n, values)
    low, high = float(log_n.min()), float(log_n.max())
    if a > 0 and low <= -b / (2 * a) <= high:
        return -b / (2 * a), True
    return min((low, high), key=lambda x: a * x * x + b * x + c), False


def parabola(log_n: np.ndarray, values: np.ndarray) -> np.ndarray:
    """The coefficients (a, b, c) of a x^2 + b x + c, by least squares."""
    if len(set(log_n)) < LEAST_SIZES:
        raise SystemExit(f"a budget has {len(set(log_n))} sizes; a parabola needs {LEAST_SIZES} or more")
    centre = log_n.mean()  # keeps the squares small
    a, b, c = np.polyfit(log_n - centre, values, 2)
    return np.array([a, b - 2 * a * centre, a * centre**2 - b * centre + c])


def fit(budgets: dict[float, list[dict]], metric: str, samples: int = 2000, seed: int = 0) -> dict:
    """Fits the runs of each budget, dicts with "parameters", "tokens" and `metric`; see the module.

    Returns for each budget N_opt, D_opt and D / N with 95 % intervals, whether the optimum lies inside the sizes, and
    the share of bootstrap samples where it does. The exponents are those of N_opt and D_opt as powers of the budget.
    """
    sign, costs = MEANING[metric], sorted(budgets)
    log_n, log_d, values, smooth = {}, {}, {}, {}
    for cost in costs:
        runs = sorted(budgets[cost], key=lambda run: run["parameters"])
        log_n[cost] = np.log([run["parameters"] for run in runs])
        log_d[cost] = np.log([run["tokens"] for run in runs])
        values[cost] = sign * np.array([run[metric] for run in runs])
        smooth[cost] = np.polyval(parabola(log_n[cost], values[cost]), log_n[cost])
    # Three coefficients take part of the spread away. The scale gives it back.
    residuals = [(values[cost] - smooth[cost]) * np.sqrt(len(log_n[cost]) / (len(log_n[cost]) - 3)) for cost in costs]
    pool, rng = np.concatenate(residuals), np.random.default_rng(seed)

    def of(drawn: dict) -> tuple[np.ndarray, np.ndarray]:
        """Rows of log N_opt and log D_opt, one column a budget, and whether each optimum is inside."""
        found = [optimum(log_n[cost], drawn[cost]) for cost in costs]
        best = np.array([x for x, _ in found])
        tokens = [np.interp(x, log_n[cost], log_d[cost]) for x, cost in zip(best, costs, strict=True)]
        return np.array([best, tokens]), np.array([inside for _, inside in found])

    centre, inside = of(values)
    draws = [of({c: smooth[c] + rng.choice(pool, len(smooth[c])) for c in costs}) for _ in range(samples)]
    spread, insides = np.array([draw for draw, _ in draws]), np.array([inside for _, inside in draws])
    rows = []
    for i, cost in enumerate(costs):
        (n, d), (ns, ds) = centre[:, i], spread[:, :, i].T
        rows.append(
            {
                "flops": cost,
                "parameters": quantity(n, ns),
                "tokens": quantity(d, ds),
                "tokens_per_parameter": quantity(d - n, ds - ns),
                "inside": bool(inside[i]),
                "share_inside": float(insides[:, i].mean()),
                "parabola": parabola(log_n[cost], sign * values[cost]).tolist(),
            }
        )
    found = {"metric": metric, "budgets": rows}
    if len(costs) > 1:
        slopes = np.array([slope(costs, rows) for rows in spread])
        names = ("parameters", "tokens")
        found["exponents"] = {
            name: {"value": float(value), "interval": interval(slopes[:, i])}
            for i, (name, value) in enumerate(zip(names, slope(costs, centre), strict=True))
        }
    return found


def agreement(runs: list[dict], shared: str) -> dict:
    """Whether a lower loss means better features, among runs that share their "flops" or their "size".

    Returns Spearman's rank correlation of loss and accuracy for each shared value with three runs or more: -1 if the
    order is the same, +1 if it is the opposite; and their mean.
    """
    groups = {}
    for run in runs:
        groups.setdefault(run[shared], []).append((run["loss"], run["accuracy"]))
    found = {str(key): float(spearmanr(pairs)[0]) for key, pairs in groups.items() if len(pairs) >= 3}
    return {"rank_correlations": found, "mean": float(np.mean(list(found.values()))) if found else None}


def slope(costs: list[float], logs: np.ndarray) -> np.ndarray:
    """The exponents of power laws of the budget, one for each row of logarithms."""
    return np.polyfit(np.log(costs), logs.T, 1)[0]


def interval(samples: np.ndarray) -> list[float]:
    """The middle 95 % of bootstrap samples."""
    return [float(x) for x in np.quantile(samples, (0.025, 0.975))]


def quantity(log: float, samples: np.ndarray) -> dict:
    return {"value": float(np.exp(log)), "interval": interval(np.exp(samples))}
