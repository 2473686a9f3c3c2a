"""Mean and principal axes of an expert's tokens: PCA, and the rotations that make channels alike.

With tokens x of D channels, mean mu and covariance U diag(l) U^T (l falling):

    PCA to k channels   z = U_k^T (x - mu),   x ~ U_k z + mu
    PHI-S               y = H U^T (x - mu) / sqrt(mean(l))

H is a Hadamard matrix divided by sqrt(D). Its entries have one magnitude, so every channel of y has the same
variance, one (PHI-S: arXiv 2410.01680). Where no Hadamard matrix of order D is constructed here, a product of D - 1 plane
rotations does the same for this covariance (Bendel and Mickey, 1978).
"""

from __future__ import annotations

import functools
import hashlib
from typing import Any, NamedTuple

import numpy as np
import safetensors.numpy

from tove_jax.errors import InputError

TOKENS_A_CHANNEL = 64
"""Tokens per channel on which a spectrum is fitted at most; ours."""


class Basis(NamedTuple):
    """An affine map of channels: D in, k out.

    Attributes:
      mean: (D,) float32.
      components: (k, D) float32, orthonormal rows.
    """

    mean: np.ndarray
    components: np.ndarray

    def project(self, values: Any) -> Any:
        """Maps (..., D) to (..., k)."""
        return _product(values - self.mean, self.components.T)

    def restore(self, values: Any) -> Any:
        """Maps (..., k) back to (..., D)."""
        return _product(values, self.components) + self.mean

    def to_bytes(self) -> bytes:
        """Returns the content of a file, the same for equal bases."""
        return safetensors.numpy.save({"mean": self.mean, "components": self.components})

    @classmethod
    def from_bytes(cls, content: bytes, where: Any) -> Basis:
        """Reads what `to_bytes` gave.

        Raises:
          InputError: another file.
        """
        try:
            arrays = safetensors.numpy.load(content)
            basis = cls(arrays["mean"], arrays["components"])
        except Exception as error:  # the library raises several kinds
            raise InputError(f"{where}: not a basis of tokens: {type(error).__name__} {error}") from error
        if basis.components.ndim != 2 or basis.mean.shape != basis.components.shape[1:]:
            raise InputError(f"{where}: expected mean (D,) and components (k, D), found {basis.mean.shape}")
        return basis


def digest(content: bytes) -> str:
    """Returns the hash under which a manifest knows a basis."""
    return hashlib.sha256(content).hexdigest()


class Covariance:
    """Mean and covariance of tokens, added in batches; the first batch's mean is taken off for precision."""

    def __init__(self) -> None:
        self.count = 0
        self._shift: np.ndarray | None = None
        self._sum: Any = 0.0
        self._products: Any = 0.0

    def add(self, tokens: np.ndarray) -> None:
        """Adds tokens (..., D), finite."""
        tokens = np.asarray(tokens, np.float32).reshape(-1, tokens.shape[-1])
        if not len(tokens):
            return
        if self._shift is None:
            self._shift = tokens.mean(axis=0, dtype=np.float64).astype(np.float32)
        tokens = tokens - self._shift
        self.count += len(tokens)
        self._sum = self._sum + tokens.sum(axis=0, dtype=np.float64)
        self._products = self._products + (tokens.T @ tokens).astype(np.float64)

    def full(self) -> bool:
        """Whether further tokens would hardly change the axes."""
        return self._shift is not None and self.count >= TOKENS_A_CHANNEL * len(self._shift)

    def spectrum(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns mean (D,), axes (D, D) one a row, and variances (D,), falling; float64.

        The sign of an axis makes its largest entry positive, so that equal tokens give equal axes.
        """
        if self._shift is None:
            raise InputError("principal axes: expected tokens to fit them on, found none")
        offset = self._sum / self.count
        values, vectors = np.linalg.eigh(self._products / self.count - np.outer(offset, offset))
        axes, values = vectors.T[::-1], values[::-1]
        signs = np.sign(axes[np.arange(len(axes)), np.abs(axes).argmax(axis=1)])
        return self._shift + offset, axes * signs[:, None], np.maximum(values, 0.0)


def principal(covariance: Covariance, channels: int) -> Basis:
    """Returns the basis of the `channels` axes of largest variance.

    Raises:
      InputError: fewer channels there.
    """
    mean, axes, _ = covariance.spectrum()
    if not 0 < channels <= len(axes):
        raise InputError(f"codec: pca:{channels}: expected 1 to {len(axes)} channels")
    return Basis(mean.astype(np.float32), np.ascontiguousarray(axes[:channels], np.float32))


def phi_s(covariance: Covariance) -> Basis:
    """Returns the standardisation y = `Basis.project` (x), whose channels all have variance one.

    The components are H U^T over the one scale: orthogonal, not orthonormal.
    """
    mean, axes, variances = covariance.spectrum()
    scale = float(np.sqrt(variances.mean())) or 1.0
    turn = hadamard(len(axes))
    turn = isotropic(variances) if turn is None else turn
    return Basis(mean.astype(np.float32), np.ascontiguousarray(turn @ axes / scale, np.float32))


@functools.cache
def hadamard(order: int) -> np.ndarray | None:
    """Returns a Hadamard matrix over sqrt(order), or None where Sylvester's and Paley's give none."""
    doublings = 0
    while order >> doublings and not order % (1 << doublings):
        rest = order >> doublings
        core = np.ones((1, 1)) if rest == 1 else _paley(rest)
        if core is not None:
            for _ in range(doublings):
                core = np.block([[core, core], [core, -core]])
            return core / np.sqrt(order)
        doublings += 1
    return None


def isotropic(variances: np.ndarray) -> np.ndarray:
    """Returns a rotation R (D, D) after which R diag(variances) R^T has equal diagonal entries."""
    matrix, turn = np.diag(np.asarray(variances, np.float64)), np.eye(len(variances))
    mean = float(np.mean(variances))
    left = set(range(len(variances)))
    while len(left) > 1:
        high = max(left, key=lambda i: matrix[i, i])
        low = min(left, key=lambda i: matrix[i, i])
        if matrix[high, high] - matrix[low, low] <= 1e-12 * max(mean, 1e-300):
            break
        # The tangent t of the angle that gives entry `high` the mean: a0 + 2 t a1 + t^2 a2 = 0.
        a0, a1, a2 = matrix[high, high] - mean, matrix[high, low], matrix[low, low] - mean
        root = np.sqrt(max(a1 * a1 - a0 * a2, 0.0))
        tangent = a0 / (-a1 - root if a1 >= 0 else -a1 + root)
        cosine = 1.0 / np.hypot(1.0, tangent)
        plane = np.array([[cosine, cosine * tangent], [-cosine * tangent, cosine]])
        pair = [high, low]
        matrix[pair] = plane @ matrix[pair]
        matrix[:, pair] = matrix[:, pair] @ plane.T
        turn[pair] = plane @ turn[pair]
        left.remove(high)
    return turn


def _paley(order: int) -> np.ndarray | None:
    """Returns Paley's matrix of entries +-1: order q + 1 (q = 3 mod 4) or 2 (q + 1) (q = 1 mod 4), q prime."""
    if order % 4:
        return None
    if _prime(order - 1):  # order is a multiple of 4, so q is 3 mod 4
        square = _residues(order - 1)
        skew = np.block([[np.zeros((1, 1)), np.ones((1, order - 1))], [-np.ones((order - 1, 1)), square]])
        return np.eye(order) + skew
    q = order // 2 - 1
    if q % 4 == 1 and _prime(q):
        square = _residues(q)
        even = np.block([[np.zeros((1, 1)), np.ones((1, q))], [np.ones((q, 1)), square]])
        return np.kron(even, [[1, 1], [1, -1]]) + np.kron(np.eye(q + 1), [[1, -1], [-1, -1]])
    return None


def _residues(q: int) -> np.ndarray:
    """Returns the (q, q) matrix of the quadratic character of i - j."""
    character = np.full(q, -1.0)
    character[[i * i % q for i in range(1, q)]] = 1.0
    character[0] = 0.0
    indices = np.arange(q)
    return character[(indices[:, None] - indices[None]) % q]


def _prime(number: int) -> bool:
    return number > 1 and all(number % factor for factor in range(2, int(number**0.5) + 1))


def _product(values: Any, matrix: np.ndarray) -> Any:
    if isinstance(values, np.ndarray):
        return values @ matrix
    # A device's default may round to bfloat16, which would cost more than the codec.
    return values.__array_namespace__().matmul(values, matrix, precision="highest")
