"""Eigenvalues to a requested accuracy, by Lanczos iteration from SciPy."""

import dataclasses
import warnings

import numpy as np
import scipy.linalg
from keras import ops
from scipy.sparse.linalg import ArpackError, ArpackNoConvergence, LinearOperator, eigsh

from keras_curvature.backend import array
from keras_curvature.estimators.products import GROUP, Products, seed_key, to_host

#: Keeps these draws apart from those of the other estimators.
_PURPOSE = 2

_WHICH = {"magnitude": "LM", "algebraic": "LA", "both": "BE"}


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

    Implicitly restarted Lanczos (Lehoucq, Sorensen, Yang 1998, "ARPACK users'
    guide") in float64 on products in the operator's type. An operator of size at
    most 64, or of less than 4 k, is formed by its products and solved densely.

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
        An `Eigenvalues`. When the budget ends first, the pairs that have converged,
        with a warning.

    Raises:
        ValueError: for an operator that is not square, an unknown `which`, a `k` or
            a tolerance that is not positive.
        RuntimeError: if not a single eigenvalue converged within the budget, or if
            the products are not finite.
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
        if products.size <= max(64, 4 * k - 1):
            values, vectors = _dense(count, k, which)
        else:
            key = seed_key(seed, _PURPOSE)
            start = to_host(products.normals(key, 0, 1))[:, 0]
            values, vectors = _iterated(count, start, k, tolerance, which, max_matvecs)
        order = np.argsort(-abs(values) if which == "magnitude" else -values)
        values, vectors = values[order], vectors[:, order]
        residuals = [
            count(vectors[:, i : i + GROUP])
            - vectors[:, i : i + GROUP] * values[i : i + GROUP]
            for i in range(0, len(values), GROUP)
        ]
    return Eigenvalues(
        values,
        np.linalg.norm(np.concatenate(residuals, axis=1), axis=0),
        count.spent,
        vectors if eigenvectors else None,
    )


class _Counted:
    """Products with NumPy arrays in float64, counted."""

    def __init__(self, products, progress):
        self.products = products
        self.spent = 0
        self._progress = progress

    def __call__(self, directions):
        columns = np.reshape(directions, (self.products.size, -1))
        products = to_host(self.products(array(columns, self.products.dtype)))
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


def _dense(count, k, which):
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
    if which == "magnitude":
        chosen = np.argsort(-abs(values), kind="stable")[:k]
    elif which == "algebraic":
        chosen = np.arange(len(values))[-k:]
    else:  # As ARPACK does: the odd one from the upper end.
        chosen = np.r_[0 : k // 2, len(values) - (k - k // 2) : len(values)]
    return values[chosen], vectors[:, chosen]


def _iterated(count, start, k, tolerance, which, max_matvecs):
    """From SciPy's `eigsh`."""
    size = count.products.size
    if not count(start).any():
        # A vector that no eigenvector is orthogonal to, so A is zero; ARPACK would
        # complain about its start vector.
        return np.zeros(k), np.eye(size, k)
    dimension = min(size, max(2 * k + 1, 20))
    restarts = None
    if max_matvecs is not None:
        restarts = max(1, (max_matvecs - dimension) // max(dimension - k, 1))
    operator = LinearOperator(
        (size, size), matvec=lambda v: count(np.ravel(v)), dtype=np.float64
    )
    try:
        return eigsh(
            operator,
            k,
            which=_WHICH[which],
            v0=start,
            ncv=dimension,
            maxiter=restarts,
            tol=tolerance,
        )
    except ArpackNoConvergence as error:
        found = len(error.eigenvalues)
        if not found:
            raise RuntimeError(
                f"No eigenvalue converged within {count.spent} products. Allow more "
                "of them, a larger tolerance, or ask for more eigenvalues of a "
                f"cluster. Received: k={k}, tolerance={tolerance}, "
                f"max_matvecs={max_matvecs}."
            ) from error
        warnings.warn(
            f"{found} of {k} eigenvalues converged within {count.spent} products; "
            "these are returned. Allow more products or a larger tolerance.",
            stacklevel=3,
        )
        return error.eigenvalues, error.eigenvectors
    except ArpackError as error:
        raise RuntimeError(
            f"The Lanczos iteration failed after {count.spent} products: {error}."
        ) from error
