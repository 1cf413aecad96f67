"""Mean and covariance of features in float64, and the Frechet distance between two Gaussians."""

import numpy as np
import scipy.linalg

from common.errors import UserError


class FeatureStatistics:
    """Running mean and covariance of feature rows, in float64.

    Rows are merged in blocks of a fixed size, each by its own mean and scatter matrix (Chan et al. 1979): the result
    is the same to the last bit however the rows were split, and keeps its digits when the mean is large compared with
    the spread.
    """

    def __init__(self, dimension: int, block: int = 1024) -> None:
        self.count = 0
        self._block = np.empty((block, dimension))  # rows of the block that is not yet full
        self._merged = (0, np.zeros(dimension), np.zeros((dimension, dimension)))

    def update(self, features: np.ndarray) -> None:
        """Add rows: features (n, dimension), any float type."""
        block = len(self._block)
        while len(features):
            filled = self.count % block
            part, features = features[: block - filled], features[block - filled :]
            self._block[filled : filled + len(part)] = part
            self.count += len(part)
            if self.count % block == 0:
                self._merged = _merge(*self._merged, self._block)

    def gaussian(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean (dimension,) and covariance (dimension, dimension), divided by count - 1 as in `np.cov`."""
        count, mean, scatter = _merge(*self._merged, self._block[: self.count % len(self._block)])
        return mean, scatter / (count - 1)


def _merge(count: int, mean: np.ndarray, scatter: np.ndarray, rows: np.ndarray) -> tuple[int, np.ndarray, np.ndarray]:
    """Count, mean and scatter matrix with `rows` added."""
    if len(rows) == 0:
        return count, mean, scatter
    row_mean = rows.mean(axis=0)
    centred, shift = rows - row_mean, row_mean - mean
    total = count + len(rows)
    scatter = scatter + centred.T @ centred + np.outer(shift, shift) * (count * len(rows) / total)
    return total, mean + shift * (len(rows) / total), scatter


def frechet_distance(mu1: np.ndarray, sigma1: np.ndarray, mu2: np.ndarray, sigma2: np.ndarray) -> float:
    """Squared Frechet (2-Wasserstein) distance between N(mu1, sigma1) and N(mu2, sigma2), as in FID.

    |mu1 - mu2|^2 + tr(sigma1) + tr(sigma2) - 2 tr((sigma1 sigma2)^(1/2)); means (D,), covariances (D, D).
    With R the symmetric root of sigma1, sigma1 sigma2 has the eigenvalues of R sigma2 R, which is symmetric
    and positive semi-definite: no general matrix root is needed, and singular covariances are harmless.

    Raises:
        UserError: for unequal shapes and for values that are not finite.
    """
    mu1, sigma1, mu2, sigma2 = (np.asarray(array, dtype=np.float64) for array in (mu1, sigma1, mu2, sigma2))
    square = (*mu1.shape, *mu1.shape)
    if mu1.ndim != 1 or mu2.shape != mu1.shape or sigma1.shape != square or sigma2.shape != square:
        raise UserError(
            f"statistics of shapes {mu1.shape}, {sigma1.shape} against {mu2.shape}, {sigma2.shape}: expected "
            "(D,), (D, D) twice with the same D; use one feature extractor for both"
        )
    if not all(np.isfinite(array).all() for array in (mu1, sigma1, mu2, sigma2)):
        raise UserError("statistics hold values that are not finite; expected finite means and covariances")
    values, vectors = scipy.linalg.eigh(sigma1)
    root = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
    product = root @ sigma2 @ root
    spectrum = scipy.linalg.eigvalsh((product + product.T) / 2)
    trace_of_root = np.sqrt(spectrum.clip(min=0)).sum()
    difference = mu1 - mu2
    distance = difference @ difference + np.trace(sigma1) + np.trace(sigma2) - 2 * trace_of_root
    return max(float(distance), 0.0)  # a square: below zero only by rounding
