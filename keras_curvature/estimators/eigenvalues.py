"""Eigenvalues to a requested accuracy, by Lanczos iteration."""

import dataclasses
import itertools
import math
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import scipy.linalg
from numpy.typing import NDArray

from keras_curvature.estimators import tall
from keras_curvature.estimators.lanczos import Lanczos
from keras_curvature.estimators.products import (
    GROUP,
    Products,
    ProgressFunction,
    Seed,
    SymmetricOperator,
    on_host,
    seed_key,
    together,
)
from keras_curvature.estimators.tall import Vector

_Array = NDArray[np.float64]

#: Keeps these draws apart from those of the other estimators.
_PURPOSE = 2

_WHICH = ("magnitude", "algebraic", "both")

#: Values, vectors and residual norms.
_Found = tuple[_Array, list[Vector], _Array]

#: Function from increasing eigenvalues to the indices of those that are wanted.
_Choose = Callable[[_Array], NDArray[np.intp]]


@dataclasses.dataclass(frozen=True, eq=False)
class Eigenvalues:
    """Some eigenvalues of a symmetric operator, with error bounds.

    Attributes:
        values: NumPy array `(k,)` in float64, in the units of the operator; by
            decreasing magnitude for `which="magnitude"`, else by decreasing value.
        residual_norms: `‖Ax − λx‖` for the unit vectors x that were found: within
            this distance of each value there is an eigenvalue of the operator.
        num_matvecs: number of products that were spent.
        eigenvectors: NumPy array `(P, k)` with orthonormal columns, of the operator's
            type, or `None` if they were not asked for.
    """

    values: _Array
    residual_norms: _Array
    num_matvecs: int
    eigenvectors: NDArray[Any] | None = None

    @property
    def value(self) -> _Array:
        """The eigenvalues: `values`, named as in an `Estimate`."""
        return self.values

    @property
    def standard_error(self) -> _Array:
        """Their error bounds: `residual_norms`. Nothing here is random."""
        return self.residual_norms

    def __repr__(self) -> str:
        shown = ", ".join(
            f"{value:.6g} ± {bound:.1g}"
            for value, bound in zip(self.values, self.residual_norms, strict=True)
        )
        return f"<Eigenvalues {shown} ({self.num_matvecs} matvecs)>"


def eigenvalues(
    A: SymmetricOperator,
    k: int = 6,
    tolerance: float = 1e-5,
    which: str = "magnitude",
    eigenvectors: bool = False,
    seed: Seed = 0,
    max_matvecs: int | None = None,
    progress: ProgressFunction | None = None,
) -> Eigenvalues:
    """The k largest eigenvalues, each to a relative accuracy.

    Thick-restart Lanczos (Wu, Simon 2000) on products in the operator's type, which are
    compared with each other in float64. An operator of size at most 64, or of less than
    4 k, is formed by its products and solved densely.

        SciPy's `eigsh` is as good at this: for k = 1, 3 and 6, P up to 30 000 and
    tolerances from 1e-3 to 1e-6 it took 21.9 products on average and this 20.8, with
    the same errors; its own work takes half the time, which products of networks
    dwarf, and of close eigenvalues it misses one a little less often
    (benchmarks/results/lanczos.json). This is kept for what `eigsh` cannot do: to end
    after any product with the pairs that are known and their bounds, when a budget is
    spent or somebody says stop. ARPACK's basis cannot be looked at meanwhile, and to
    record all products would take memory without limit. Nor does `eigsh` take a zero
    operator. Convergence is judged when the basis is full: to look after every product
    would save up to two thirds of them, but missed one of close or double eigenvalues
    in most of the cases tried, and so does `eigsh` with a small basis.

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
            `None`, for nobody knows it. When it returns `False`, the best pairs that
            are known by then are returned, with the residuals that they have.

    Returns:
        An `Eigenvalues`. When the budget ends before all have converged, the best pairs
        that are known, with a warning; perhaps fewer than k. The residuals tell.

    Raises:
        ValueError: for an operator that is not square, an unknown `which`, a `k` or
            a tolerance that is not positive.
        RuntimeError: if the products are not finite.
        KeyboardInterrupt: if `progress` says stop while an operator is formed.
    """
    products = Products(A, progress)
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
    with products.working():
        if products.size <= max(64, 4 * k - 1):
            values, vectors, residuals = _dense(products, _chooser(k, which))
        else:
            values, vectors, residuals = _iterated(
                products,
                k,
                which,
                tolerance,
                seed,
                10 * products.size if max_matvecs is None else max_matvecs,
            )
    order = np.argsort(-abs(values) if which == "magnitude" else -values)
    return Eigenvalues(
        values[order],
        residuals[order],
        products.spent,
        np.stack([vectors[i] for i in order], axis=1) if eigenvectors else None,
    )


def _chooser(k: int, which: str) -> _Choose:
    def choose(values: _Array) -> NDArray[np.intp]:
        count = min(k, len(values))
        if which == "magnitude":
            return np.argsort(-abs(values), kind="stable")[:count]
        # As ARPACK does: of both ends the odd one from the upper end.
        low = count // 2 if which == "both" else 0
        order = np.arange(len(values))
        return np.concatenate([order[:low], order[len(values) - count + low :]])

    return choose


def _multiply(products: Products, vectors: Iterable[Vector]) -> list[Vector]:
    """Products with some vectors, finite ones."""
    made = products(vectors)
    if not all(np.isfinite(product).all() for product in made):
        undefined = sum(int(np.isnan(product).sum()) for product in made)
        infinite = sum(int(np.isinf(product).sum()) for product in made)
        raise RuntimeError(
            "Products with the operator are not finite, so it has no eigenvalues. "
            "Look for infinite or undefined weights, data or losses. Received: "
            f"{undefined} undefined and {infinite} infinite of "
            f"{sum(product.size for product in made)} entries."
        )
    return made


def _dense(products: Products, choose: _Choose) -> _Found:
    """From the whole matrix, formed by P products."""
    rows: list[Vector] = []
    for start in range(0, products.size, GROUP):
        if not products.going:
            raise KeyboardInterrupt
        width = min(GROUP, products.size - start)
        rows += _multiply(products, np.eye(width, products.size, start))
    matrix = np.stack(rows).astype(np.float64)
    values, vectors = scipy.linalg.eigh((matrix + matrix.T) / 2)
    chosen = choose(values)
    values, vectors = values[chosen], vectors[:, chosen]
    residuals = np.linalg.norm(matrix @ vectors - vectors * values, axis=0)
    return values, list(vectors.T.astype(products.dtype)), residuals


def _iterated(
    products: Products,
    k: int,
    which: str,
    tolerance: float,
    seed: Seed,
    max_matvecs: int,
) -> _Found:
    """From Lanczos iteration, until all have converged or something ends it."""
    key, draws = seed_key(seed, _PURPOSE), itertools.count()
    dimension = min(products.size - 1, max(2 * k + 1, 20))
    wanted, kept = _chooser(k, which), _chooser(k + (dimension - k) // 2, which)
    lanczos = Lanczos(
        lambda v: _multiply(products, [v])[0],
        lambda: np.array(on_host(products.normals(key, next(draws), 1))[0]),
        dimension,
    )
    # Products are left for the residuals, which come at the end.
    budget, converged = max(max_matvecs - k, 1), 0
    while converged < k and products.spent < budget and products.going:
        if lanczos.size == dimension:
            lanczos.restart(kept)
        while lanczos.size < dimension and products.spent < budget and products.going:
            lanczos.extend()
        values, inner, residuals, floor = lanczos.pairs(wanted)
        converged = int(np.sum(residuals <= np.maximum(tolerance * abs(values), floor)))
    vectors = lanczos.vectors(inner)
    # The iteration knows nothing of rounding, and takes the operator for symmetric.
    residuals = np.maximum(residuals, floor)
    step = together(products.size)
    for start in range(0, len(values), step):
        if products.going:
            some = slice(start, start + step)
            residuals[some] = [
                math.sqrt(tall.turn([product, vector], np.array([[1, -value]]))[0, 0])
                for product, vector, value in zip(
                    _multiply(products, vectors[some]),
                    vectors[some],
                    values[some],
                    strict=True,
                )
            ]
    if converged < len(values) and products.going:
        warnings.warn(
            f"{converged} of {k} eigenvalues converged within {products.spent} "
            "products; the bounds of the others are larger than asked for. Allow more "
            "products or a larger tolerance.",
            stacklevel=4,
        )
    return values, vectors, residuals
