"""Mean and covariance of features that come in batches."""

from collections.abc import Iterable
from typing import NamedTuple

from torch import Tensor

from dmquant.errors import InputError


class Moments(NamedTuple):
    """Mean and covariance of feature rows."""

    mu: Tensor  # float64 (D,)
    sigma: Tensor  # float64 (D, D), divisor n - 1


class Sums:
    """Adds up float64 feature rows and their products."""

    def __init__(self) -> None:
        self.count = 0
        self._total: Tensor | int = 0  # (D,) once there are rows
        self._products: Tensor | int = 0  # (D, D)

    def add(self, rows: Tensor) -> None:
        self._total, self._products = self._total + rows.sum(0), self._products + rows.T @ rows
        self.count += len(rows)

    def moments(self) -> Moments:
        if self.count < 2 or isinstance(self._total, int):
            raise InputError(f"a reference needs at least 2 images, got {self.count}")
        mu = self._total / self.count
        return Moments(mu, (self._products - self.count * mu.outer(mu)) / (self.count - 1))


def measure_moments(features: Iterable[Tensor]) -> tuple[Tensor, Tensor, int]:
    """Mean (D,), covariance (D, D) and count of float64 feature rows that come in batches (B, D)."""
    sums = Sums()
    for rows in features:
        sums.add(rows)
    return *sums.moments(), sums.count
