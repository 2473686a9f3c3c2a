"""How much of an expert's features the student accounts for."""

from __future__ import annotations

import numpy as np


class TokenError:
    """Relative squared error of the student's tokens against an expert's target tokens, in batches.

    With student tokens ``s`` and target tokens ``t``, both (B, N, D) (for MoVE-KD: the expert's
    features through its trained encoder adapter; CLIP's as they are), over all pictures ``i``,
    tokens ``j`` and channels ``c``:

        error = sum (s - t)**2 / sum (t - mean_i t)**2 = 1 - R**2

    0 is perfect; 1 is no better than the best answer that does not look at the picture (the mean
    target of each token). Dividing by the target's own variance keeps a collapsed adapter, whose
    raw squared error is small, from looking good.
    """

    def __init__(self) -> None:
        """Starts with no pictures."""
        self.pictures = 0
        self._squared = 0.0
        self._origin: np.ndarray | None = None
        self._sum: np.ndarray | float = 0.0
        self._sum_squares: np.ndarray | float = 0.0

    def add(self, student: np.ndarray, target: np.ndarray) -> None:
        """Takes one batch: student and target tokens, (B, N, D) each."""
        student = np.asarray(student, np.float64)
        target = np.asarray(target, np.float64)
        self._squared += float(((student - target) ** 2).sum())
        if self._origin is None:
            # Sums are taken from the first batch's mean, so the variance does not cancel.
            self._origin = target.mean(axis=0)
        centred = target - self._origin
        self._sum = self._sum + centred.sum(axis=0)
        self._sum_squares = self._sum_squares + (centred**2).sum(axis=0)
        self.pictures += len(target)

    def relative(self) -> float:
        """Returns the relative squared error over everything added; NaN when targets never vary."""
        if not self.pictures:
            return float("nan")
        spread = float(np.sum(self._sum_squares - np.square(self._sum) / self.pictures))
        return self._squared / spread if spread > 0 else float("nan")


def linear_error(
    train: np.ndarray, train_target: np.ndarray, held_out: np.ndarray, target: np.ndarray, *, l2: float = 1e-2
) -> float:
    """Relative squared error of the best linear guess of an expert's picture feature.

    A ridge regression from one network's picture feature to another's, both standardised on the
    training pictures, judged on held-out ones: ``sum (guess - target)**2 / sum (target - mean)**2``
    with the training mean. Needs nothing that was trained beside the network, so it compares a
    student with its own start. Ours.

    Args:
      train: (n, D) features of the training pictures.
      train_target: (n, T) the expert's features of the same pictures.
      held_out: (q, D).
      target: (q, T).
      l2: ridge penalty a training picture.

    Returns:
      The error: 0 is perfect, 1 no better than the training mean.
    """

    def standardise(features: np.ndarray, reference: np.ndarray) -> np.ndarray:
        scale = reference.std(axis=0, dtype=np.float64)
        return (features - reference.mean(axis=0, dtype=np.float64)) / np.where(scale > 1e-6, scale, 1.0)

    inputs, outputs = standardise(train, train), standardise(train_target, train_target)
    queries, wanted = standardise(held_out, train), standardise(target, train_target)
    gram = inputs.T @ inputs + l2 * len(inputs) * np.eye(inputs.shape[1])
    weights = np.linalg.solve(gram, inputs.T @ outputs)
    return float(((queries @ weights - wanted) ** 2).sum() / np.maximum((wanted**2).sum(), 1e-30))
