"""Symmetric matrices with prescribed eigenvalues, and operators that keep records."""

import numpy as np
from keras import ops

from keras_curvature import backend

#: Name → eigenvalues, given their number.
SPECTRA = {
    # Few large ones over a power law, as in a trained network's Hessian.
    "network": lambda p: np.r_[[40.0, 25, 16, 10, -4], 2 / np.arange(1, p - 4)],
    "clustered": lambda p: np.r_[np.full(p // 2, 1.0), np.full(p - p // 2, 3.0)],
    "indefinite": lambda p: np.linspace(-5, 4, p),
    "rank_deficient": lambda p: np.r_[[6.0, -3, 1], np.zeros(p - 3)],
    "giant": lambda p: np.r_[[1e4], np.linspace(0.1, 1, p - 1)],
    "zero": np.zeros,
}


def matrix(eigenvalues, seed=0, dtype="float64"):
    """A symmetric matrix with these eigenvalues and random eigenvectors."""
    size = len(eigenvalues)
    rng = np.random.default_rng(seed)
    vectors = np.linalg.qr(rng.standard_normal((size, size)))[0]
    dense = (vectors * eigenvalues) @ vectors.T
    return ((dense + dense.T) / 2).astype(dtype)


def named(name, size=60, seed=0, dtype="float64"):
    """The matrix whose spectrum has this name."""
    return matrix(SPECTRA[name](size), seed, dtype)


def squared_norms_of_pairs(dense, sizes):
    """The sums of squares of all parts of a matrix cut into blocks both ways."""
    starts = np.cumsum(sizes) - sizes
    return np.add.reduceat(np.add.reduceat(dense**2, starts, 0), starts, 1)


class Recorded:
    """A matrix as an operator on tensors that remembers what it was multiplied by."""

    def __init__(self, dense):
        self.dense = dense
        self.shape, self.dtype = dense.shape, dense.dtype
        self.directions = []

    def __matmul__(self, directions):
        assert backend.is_tensor(directions), "Tensors go in where tensors come out."
        self.directions.append(ops.convert_to_numpy(directions))
        return backend.array(self.dense, self.dtype.name) @ directions

    @property
    def columns(self):
        """All directions so far, one in each column."""
        return np.concatenate(self.directions, axis=1)


def stop_after(products):
    """A `progress` that says stop as soon as this many products are made."""
    return lambda done, total: done < products
