"""Linear probe: multinomial logistic regression on frozen features."""

from __future__ import annotations

import dataclasses

import numpy as np
import scipy.linalg
import scipy.optimize
import scipy.special

from tove_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class LinearProbe:
    """A fitted probe: standardisation and one linear layer.

    Attributes:
      mean, scale: (D,) of the training features; a constant feature has scale 1.
      weights: (D, C).
      bias: (C,).
    """

    mean: np.ndarray
    scale: np.ndarray
    weights: np.ndarray
    bias: np.ndarray

    def predict(self, features: np.ndarray) -> np.ndarray:
        """Returns the likeliest label of each row: (Q, D) to int64 (Q,)."""
        return (((features - self.mean) / self.scale) @ self.weights + self.bias).argmax(axis=1)


def fit(features: np.ndarray, labels: np.ndarray, l2: float, *, iterations: int = 1000) -> LinearProbe:
    """Fits a probe by L-BFGS (SciPy's) in double precision.

    Minimises ``mean_i cross_entropy_i + l2 / 2 * sum(weights**2)`` over standardised features; the
    bias is free. With ``l2 > 0`` this has one minimum, so there is no seed. scikit-learn's
    ``LogisticRegression(C=1 / (n * l2))`` minimises the same.

    Args:
      features: (n, D).
      labels: int (n,), each in 0..C-1.
      l2: penalty, above 0.
      iterations: most steps of the solver.

    Returns:
      The probe.

    Raises:
      InputError: `l2` is not above zero, or the labels hold fewer than two classes.
    """
    if not l2 > 0:
        raise InputError(f"eval.probe_l2: expected a number above 0, found {l2}")
    classes = int(labels.max()) + 1 if len(labels) else 0
    if len(np.unique(labels)) < 2:
        raise InputError(f"linear probe: expected labels of at least two classes, found {len(np.unique(labels))}")
    features = np.asarray(features, np.float64)
    count, width = features.shape
    mean, scale = features.mean(axis=0), features.std(axis=0)
    scale = np.where(scale > 1e-12, scale, 1.0)
    inputs = (features - mean) / scale
    directions, rotated, variances = _principal_axes(inputs)
    # In these axes, scaled so, the loss curves about the same in every direction (0.1 is a usual value
    # of p (1 - p)): tens of solver steps instead of hundreds, to the same minimum.
    curvature = np.sqrt(0.1 * variances + l2)
    rotated, penalty = rotated / curvature, l2 / curvature[:, None] ** 2
    width = rotated.shape[1]
    targets = np.eye(classes)[labels]

    def objective(flat: np.ndarray) -> tuple[float, np.ndarray]:
        weights, bias = flat[: width * classes].reshape(width, classes), flat[width * classes :]
        log_probabilities = scipy.special.log_softmax(rotated @ weights + bias, axis=1)
        loss = -(targets * log_probabilities).sum() / count + (penalty * weights**2).sum() / 2
        error = (np.exp(log_probabilities) - targets) / count
        gradient = rotated.T @ error + penalty * weights
        return loss, np.concatenate([gradient.reshape(-1), error.sum(axis=0)])

    start = np.zeros((width + 1) * classes)
    options = {"maxiter": iterations, "gtol": 1e-5, "ftol": 1e-13}
    solved = scipy.optimize.minimize(objective, start, jac=True, method="L-BFGS-B", options=options)
    weights = directions @ (solved.x[: width * classes].reshape(width, classes) / curvature[:, None])
    return LinearProbe(mean, scale, weights, solved.x[width * classes :])


def _principal_axes(inputs: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns the axes (D, k) that the rows (n, D) span, the rows in them (n, k), and variances (k,).

    The penalty is the same in any rotation and pulls what lies outside the rows' span to zero, so
    nothing is lost; k is at most the smaller of n and D.
    """
    count, width = inputs.shape
    tall = count >= width
    values, vectors = scipy.linalg.eigh(inputs.T @ inputs if tall else inputs @ inputs.T)
    kept = values > 1e-10 * max(float(values[-1]), 1e-30)
    values, vectors = values[kept], vectors[:, kept]
    if tall:
        return vectors, inputs @ vectors, values / count
    return inputs.T @ (vectors / np.sqrt(values)), vectors * np.sqrt(values), values / count
