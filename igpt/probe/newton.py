"""Multinomial logistic regression by Newton's method on the host, for sets that are too small to compile for.

Fits what `logistic.fit_lbfgs` fits. A small set costs L-BFGS minutes: a thousand short steps for each weak penalty, and
a compilation for each shape. Here each penalty starts from the solution of the stronger one and takes about four
steps. Dims: N examples, D features, C classes, K = min(N, D) principal axes and one for the bias.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int
from threadpoolctl import threadpool_limits

from igpt.probe.logistic import TOLERANCE, Classifiers, Scale
from igpt.run.cluster import broadcast

MAX_CG = 1000  # iterations of conjugate gradients for one step
CG_REDUCTION = 0.1  # conjugate gradients stop when the preconditioned residual is so much shorter


def fit_newton(
    features: Float[np.ndarray, "N D"], labels: Int[np.ndarray, "N"], num_classes: int, Cs, max_iter: int
) -> Classifiers:
    """Fits what scikit-learn's LogisticRegression(C) fits, for each C of `Cs`, as `logistic.fit_lbfgs` does.

    Each process fits all rows, and then takes the result of process 0: processors may round differently. If a feature
    is not finite, all parameters are NaN.
    """
    scale, count = Scale.of(features), len(features)
    scaled = scale(features).astype(np.float64)
    if not np.isfinite(scaled).all():  # NumPy's SVD would raise LinAlgError
        kernel = np.full((len(Cs), features.shape[1], num_classes), np.nan, np.float32)
        return Classifiers(kernel, kernel[:, 0], scale, np.zeros(len(Cs), bool))
    # One thread: products this small are slower with several, which burn processor time while they wait.
    with threadpool_limits(1, "blas"):
        # On its principal axes the Hessian is nearly diagonal. A rotation changes neither losses nor penalties.
        left, sizes, axes = np.linalg.svd(scaled, full_matrices=False)
        problem = Problem.of(left * sizes, labels, num_classes)
        weights, kernel, bias, largest = np.zeros((num_classes, len(sizes) + 1)), {}, {}, {}
        for C in sorted(Cs):
            weights, largest[C] = problem.minimum(weights, 1 / (C * count), max_iter)
            kernel[C], bias[C] = (weights[:, :-1] @ axes).T, weights[:, -1]
    kernel, bias, largest = (np.array([of[C] for C in Cs], np.float32) for of in (kernel, bias, largest))
    kernel, bias, largest = (broadcast(values) for values in (kernel, bias, largest))
    return Classifiers(kernel, bias, scale, largest <= 10 * TOLERANCE)


class Problem(NamedTuple):
    """Rows on their principal axes, and a column of ones for the bias. Classes come first: sums over them are fast."""

    rows: Float[np.ndarray, "N K"]  # float64
    rows32: Float[np.ndarray, "N K"]
    squares: Float[np.ndarray, "K"]  # the mean square of each axis
    targets: Float[np.ndarray, "C N"]  # one-hot

    @classmethod
    def of(cls, rows: Float[np.ndarray, "N k"], labels: Int[np.ndarray, "N"], num_classes: int) -> "Problem":
        rows = np.concatenate([rows, np.ones((len(rows), 1))], axis=1)
        targets = (np.arange(num_classes)[:, None] == labels).astype(np.float64)
        squares = np.einsum("nk,nk->k", rows, rows) / len(rows)
        return cls(rows, rows.astype(np.float32), squares, targets)

    def minimum(
        self, weights: Float[np.ndarray, "C K"], penalty: float, max_iter: int
    ) -> tuple[Float[np.ndarray, "C K"], float]:
        """Minimises from `weights` on. Returns the minimum and the largest entry of its gradient."""
        penalties = np.append(np.full(len(self.squares) - 1, penalty), 0.0)  # none for the bias
        value, predicted = self.value(weights, penalties)
        for iteration in range(max_iter + 1):
            gradient = (predicted - self.targets) @ self.rows / len(self.rows) + penalties * weights
            largest = float(np.abs(gradient).max())
            if largest <= TOLERANCE or iteration == max_iter:
                break
            step = self.newton_step(gradient, predicted, penalties)
            slope, length = np.vdot(step, gradient), 1.0
            while length > 1e-6:
                there = weights + length * step
                value_there, predicted_there = self.value(there, penalties)
                if value_there <= value + 1e-4 * length * slope:
                    break
                length /= 2
            else:  # no step lowers the value any more, by rounding
                break
            weights, value, predicted = there, value_there, predicted_there
        return weights, largest

    def value(self, weights: Float[np.ndarray, "C K"], penalties: Float[np.ndarray, "K"]):
        """The mean cross-entropy plus penalties, and the predicted probabilities [C, N]."""
        logits = weights @ self.rows.T
        logits -= logits.max(axis=0)
        powers = np.exp(logits)
        sums = powers.sum(axis=0)
        loss = np.mean(np.log(sums) - np.einsum("cn,cn->n", logits, self.targets))
        return loss + 0.5 * np.sum(penalties * weights * weights), powers / sums

    def newton_step(
        self,
        gradient: Float[np.ndarray, "C K"],
        predicted: Float[np.ndarray, "C N"],
        penalties: Float[np.ndarray, "K"],
    ) -> Float[np.ndarray, "C K"]:
        """Solves Hessian x step = -gradient by conjugate gradients, preconditioned by an estimate of the diagonal.

        In float32, at twice the speed of float64: value and gradient, in float64, correct its rounding at every step.
        """
        spread = (predicted * (1 - predicted)).mean(axis=1)
        diagonal = (spread[:, None] * self.squares + penalties).astype(np.float32)
        predicted, penalties = predicted.astype(np.float32), penalties.astype(np.float32)
        shares = predicted / np.float32(len(self.rows))
        residual, step = -gradient.astype(np.float32), np.zeros(gradient.shape, np.float32)
        direction = residual / diagonal
        size = np.vdot(residual, direction)
        enough = CG_REDUCTION**2 * size
        for _ in range(MAX_CG):
            if size <= enough:
                break
            logits = direction @ self.rows32.T
            logits = shares * (logits - np.einsum("cn,cn->n", predicted, logits))
            turned = logits @ self.rows32 + penalties * direction  # Hessian x direction
            curvature = np.vdot(direction, turned)
            if curvature <= 0:  # only rounding is left
                break
            step += size / curvature * direction
            residual -= size / curvature * turned
            scaled = residual / diagonal
            size, before = np.vdot(residual, scaled), size
            direction = scaled + size / before * direction
        return step.astype(np.float64)
