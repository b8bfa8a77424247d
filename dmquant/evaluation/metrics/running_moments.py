"""Mean and covariance of features, accumulated over batches."""

from collections.abc import Iterable
from typing import NamedTuple

from torch import Tensor

from dmquant.errors import InputError


class Moments(NamedTuple):
    """Mean and covariance of feature rows."""

    mu: Tensor  # float64 (D,)
    sigma: Tensor  # float64 (D, D), divisor n - 1


class RunningMoments:
    """Accumulates sums of float64 feature rows and of their products."""

    def __init__(self) -> None:
        self.count = 0
        self._total: Tensor | int = 0  # (D,) once there are rows
        self._products: Tensor | int = 0  # (D, D)

    def add(self, rows: Tensor) -> None:
        """Adds rows (B, D)."""
        self._total, self._products = self._total + rows.sum(0), self._products + rows.T @ rows
        self.count += len(rows)

    def moments(self) -> Moments:
        """Returns mean and covariance. Raises InputError for fewer than two rows."""
        if self.count < 2 or isinstance(self._total, int):
            raise InputError(f"a reference needs at least 2 images, got {self.count}")
        mu = self._total / self.count
        return Moments(mu, (self._products - self.count * mu.outer(mu)) / (self.count - 1))


def measure_moments(features: Iterable[Tensor]) -> tuple[Tensor, Tensor, int]:
    """Returns mean (D,), covariance (D, D) and number of float64 feature rows, given in batches (B, D)."""
    sums = RunningMoments()
    for rows in features:
        sums.add(rows)
    return *sums.moments(), sums.count
