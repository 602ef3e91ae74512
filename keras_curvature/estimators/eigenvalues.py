"""Eigenvalues to a requested accuracy, by Lanczos iteration."""

import dataclasses
import itertools
import warnings

import numpy as np
import scipy.linalg
from keras import ops

from keras_curvature.backend import array
from keras_curvature.estimators.lanczos import Lanczos
from keras_curvature.estimators.products import GROUP, Products, seed_key, to_host

#: Keeps these draws apart from those of the other estimators.
_PURPOSE = 2

_WHICH = ("magnitude", "algebraic", "both")


@dataclasses.dataclass(frozen=True, eq=False)
class Eigenvalues:
    """Some eigenvalues of a symmetric operator, with error bounds.

    Attributes:
        values: NumPy array `(k,)` in float64, in the units of the operator; by
            decreasing magnitude for `which="magnitude"`, else by decreasing value.
        residual_norms: `‖Ax − λx‖` for the unit vectors x that were found: within
            this distance of each value there is an eigenvalue of the operator.
        num_matvecs: number of products that were spent.
        eigenvectors: NumPy array `(P, k)` with orthonormal columns, or `None` if
            they were not asked for.
    """

    values: np.ndarray
    residual_norms: np.ndarray
    num_matvecs: int
    eigenvectors: np.ndarray | None = None

    @property
    def value(self):
        """The eigenvalues: `values`, named as in an `Estimate`."""
        return self.values

    @property
    def standard_error(self):
        """Their error bounds: `residual_norms`. Nothing here is random."""
        return self.residual_norms

    def __repr__(self):
        shown = ", ".join(
            f"{value:.6g} ± {bound:.1g}"
            for value, bound in zip(self.values, self.residual_norms, strict=True)
        )
        return f"<Eigenvalues {shown} ({self.num_matvecs} matvecs)>"


def eigenvalues(
    A,
    k: int = 6,
    tolerance: float = 1e-5,
    which: str = "magnitude",
    eigenvectors: bool = False,
    seed=0,
    max_matvecs: int | None = None,
    progress=None,
) -> Eigenvalues:
    """The k largest eigenvalues, each to a relative accuracy.

    Thick-restart Lanczos (Wu, Simon 2000) in float64 on products in the operator's
    type. An operator of size at most 64, or of less than 4 k, is formed by its products
    and solved densely.

    Ctrl-C ends the iteration; the best pairs that are known by then are returned, with
    the residuals that they have, unless there are none.

    Args:
        A: symmetric operator of shape `(P, P)` with products `A @ V`.
        k: number of eigenvalues; at most P are returned.
        tolerance: residual relative to the eigenvalue at which it has converged; the
            eigenvalue itself is usually much more accurate. Products in float32
            allow about 1e-6.
        which: `"magnitude"`, `"algebraic"` (the largest, signed) or `"both"` (half of
            them from each end of the spectrum).
        eigenvectors: whether to return the eigenvectors as well.
        seed: a non-negative integer, or a tuple of them; the start vector follows
            from it.
        max_matvecs: budget of products, about; without one it is ten times P.
        progress: `progress(done, total)` is called after each product; the total is
            `None`, for nobody knows it.

    Returns:
        An `Eigenvalues`. When the budget ends before all have converged, the best pairs
        that are known, with a warning; perhaps fewer than k. The residuals tell.

    Raises:
        ValueError: for an operator that is not square, an unknown `which`, a `k` or
            a tolerance that is not positive.
        RuntimeError: if the products are not finite.
    """
    products = Products(A)
    if which not in _WHICH:
        raise ValueError(
            '`which` must be "magnitude", "algebraic" or "both". Received: '
            f"which={which!r}."
        )
    if int(k) != k or k < 1 or not tolerance > 0:
        raise ValueError(
            "`k` must be a positive integer and `tolerance` positive. Received: "
            f"k={k!r}, tolerance={tolerance!r}."
        )
    k = min(int(k), products.size)
    count = _Counted(products, progress)
    with products.placed():
        find = _dense if products.size <= max(64, 4 * k - 1) else _iterated
        values, vectors, residuals = find(
            count,
            lambda values, k=k: _chosen(values, k, which),
            k,
            tolerance,
            seed,
            10 * products.size if max_matvecs is None else max_matvecs,
        )
    order = np.argsort(-abs(values) if which == "magnitude" else -values)
    return Eigenvalues(
        values[order],
        residuals[order],
        count.spent,
        vectors[:, order] if eigenvectors else None,
    )


def _chosen(values, k, which):
    """The indices of the k eigenvalues asked for, of increasing values."""
    k = min(k, len(values))
    if which == "magnitude":
        return np.argsort(-abs(values), kind="stable")[:k]
    if which == "algebraic":
        return np.arange(len(values))[len(values) - k :]
    # As ARPACK does: the odd one from the upper end.
    return np.r_[0 : k // 2, len(values) - (k - k // 2) : len(values)]


class _Counted:
    """Products with NumPy arrays in float64, counted."""

    def __init__(self, products, progress):
        self.products = products
        self.spent = 0
        self._progress = progress

    def __call__(self, directions):
        columns = np.reshape(directions, (self.products.size, -1))
        dtype = self.products.dtype
        products = np.concatenate(
            [
                to_host(self.products(array(columns[:, i : i + GROUP], dtype)))
                for i in range(0, columns.shape[1], GROUP)
            ],
            axis=1,
        )
        if not np.isfinite(products).all():
            raise RuntimeError(
                "Products with the operator are not finite, so it has no "
                "eigenvalues. Look for infinite or undefined weights, data or losses. "
                f"Received: {np.isnan(products).sum()} undefined and "
                f"{np.isinf(products).sum()} infinite of {products.size} entries."
            )
        self.spent += columns.shape[1]
        if self._progress is not None:
            self._progress(self.spent, None)
        return np.reshape(products, np.shape(directions))


def _dense(count, choose, *_):
    """From the whole matrix, formed by P products."""
    products = count.products
    matrix = np.concatenate(
        [
            count(
                ops.convert_to_numpy(products.basis(i, min(GROUP, products.size - i)))
            )
            for i in range(0, products.size, GROUP)
        ],
        axis=1,
    )
    values, vectors = scipy.linalg.eigh((matrix + matrix.T) / 2)
    chosen = choose(values)
    values, vectors = values[chosen], vectors[:, chosen]
    return values, vectors, np.linalg.norm(matrix @ vectors - vectors * values, axis=0)


def _iterated(count, choose, k, tolerance, seed, max_matvecs):
    """From Lanczos iteration, until all have converged or something ends it."""
    products = count.products
    key = seed_key(seed, _PURPOSE)
    draws = itertools.count()
    dimension = min(products.size - 1, max(2 * k + 1, 20))
    lanczos = Lanczos(
        count,
        lambda: to_host(products.normals(key, next(draws), 1))[:, 0],
        dimension,
        np.finfo(products.dtype).eps,
    )
    # Products are left for the residuals, which come at the end.
    budget, converged = max(max_matvecs - k, 1), 0
    try:
        while converged < k and count.spent < budget:
            if lanczos.size == dimension:
                lanczos.restart(lambda v: choose(v, k + (dimension - k) // 2))
            while lanczos.size < dimension and count.spent < budget:
                lanczos.extend()
            values, inner, residuals, floor = lanczos.pairs(choose)
            converged = np.sum(residuals <= np.maximum(tolerance * abs(values), floor))
        vectors = lanczos.vectors(inner)
        residuals = np.linalg.norm(count(vectors) - vectors * values, axis=0)
    except KeyboardInterrupt:
        if not lanczos.size:
            raise
        values, inner, residuals, _ = lanczos.pairs(choose)
        return values, lanczos.vectors(inner), residuals
    if converged < len(values):
        warnings.warn(
            f"{converged} of {k} eigenvalues converged within {count.spent} products; "
            "the bounds of the others are larger than asked for. Allow more products "
            "or a larger tolerance.",
            stacklevel=4,
        )
    return values, vectors, residuals
