"""Trace, squared Frobenius norm and diagonal from the same products.

For random signs v

    tr A = E vᵀAv,    ‖A‖_F² = E ‖Av‖²,    diag A = E v ⊙ Av

(Hutchinson 1990, "A stochastic estimator of the trace of the influence matrix",
section 2; the norm is that estimate for A²). The *squared* norm is what can be
estimated without bias.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence

import numpy as np
from keras import ops
from numpy.typing import NDArray

from keras_curvature.backend import Tensor, array, compiled
from keras_curvature.estimators.estimate import Estimate
from keras_curvature.estimators.products import (
    GROUP,
    Products,
    ProgressFunction,
    Seed,
    SymmetricOperator,
    block_rows,
    block_sums,
    check_blocks,
    seed_key,
    to_host,
    together,
)
from keras_curvature.estimators.sampling import sample
from keras_curvature.estimators.shares import (
    diagonal_estimate,
    exact_estimate,
    scalar_estimate,
    with_total,
)


@dataclasses.dataclass(frozen=True, eq=False)
class Moments:
    """What one set of products told about a symmetric operator.

    Attributes:
        trace: `Estimate`. Its blocks, when block sizes were given, are the traces of
            the diagonal blocks, which add up to it exactly.
        squared_frobenius_norm: `Estimate`, or `None` if the source does not tell. Its
            blocks are the squared norms of the blocks of *rows*, which add up to it
            exactly; its `pairs` the squared norms of the single blocks.
        diagonal: `Estimate` of tensors `(P,)`, or `None` if it was not asked for.
        num_matvecs: number of products spent on all of them together.
    """

    trace: Estimate
    squared_frobenius_norm: Estimate | None
    diagonal: Estimate | None
    num_matvecs: int

    @property
    def frobenius_norm(self) -> Estimate:
        """The root of the squared norm, and its error by the delta method.

        `se(√x) = se(x) / (2 √x)`. The root of an unbiased estimate is a little too
        small, by `se² / (2 value)`: a quarter per mille at a relative standard error
        of 2 %. The squares of the blocks add up, the blocks do not.
        """
        if self.squared_frobenius_norm is None:
            raise ValueError("The source of these moments does not tell the norm.")
        return _norm_of_squared(self.squared_frobenius_norm)


def error_of_diagonal(moments: Moments) -> float:
    """The relative error that a diagonal tells; infinite where it tells none."""
    diagonal = moments.diagonal
    error = None if diagonal is None else diagonal.relative_standard_error
    return math.inf if error is None or math.isnan(error) else error


def quieter(first: Moments, second: Moments) -> Moments:
    """The one of two whose diagonal tells the smaller error; the first if none does."""
    less = error_of_diagonal(second) < error_of_diagonal(first)
    return second if less else first


def hutchinson_moments(
    A: SymmetricOperator,
    num_matvecs: int | None = None,
    tolerance: float | None = None,
    seed: Seed = 0,
    block_sizes: Sequence[int] | None = None,
    diagonal: bool = False,
    progress: ProgressFunction | None = None,
    judged: Sequence[str] | None = None,
) -> Moments:
    """Unbiased estimates from the same random sign directions.

    Variances per sample: `2 (‖A‖_F² − Σ_i A_ii²)` of the trace,
    `2 (‖A²‖_F² − Σ_i (A²)_ii²)` of the squared norm, `Σ_{j≠i} A_ij²` of entry i of the
    diagonal (Bekas, Kokiopoulou, Saad 2007, "An estimator for the diagonal of a
    matrix", eq. 2). The first two are large when a few eigenvalues dominate; there
    `DominantSubspace` does better at the same price.

    Args:
        A: symmetric operator of shape `(P, P)` with products `A @ V`.
        num_matvecs: budget of products. Defaults to 32, or to 1024 with a tolerance.
        tolerance: relative standard error at which to stop, not before 16 samples;
            that of the diagonal is `‖errors‖ / ‖diagonal‖`. That of the norm is half
            of the squared norm's; a trace near zero never gets there.
        seed: a non-negative integer, or a tuple of them.
        block_sizes: sizes of consecutive groups of coordinates, adding up to P.
        diagonal: whether to estimate the diagonal too. Defaults to `False`.
        progress: `progress(done, total)` is called after each group of products; when
            it returns `False`, what is known by then is returned.
        judged: the figures that must reach the tolerance, of `"trace"`, `"squared
            norm"` and `"diagonal"`. Defaults to all that are estimated.

    Returns:
        A `Moments`. The squared norm has no `pairs`, for no directions are kept.

    Raises:
        ValueError: for an operator that is not square, a budget below one, a
            tolerance that is not positive, or block sizes that do not add up.
    """
    products = Products(A)
    blocks = check_blocks(block_sizes, products.size)
    told = _told(blocks, bool(diagonal))
    if judged is None:
        judged = ("trace", "squared norm") + ("diagonal",) * diagonal
    with products.working():
        key = seed_key(seed)

        def draw(start: int, width: int) -> dict[str, Tensor]:
            directions = products.signs(key, start, width)
            return told(directions, products.rows(directions))

        at_once = together(products.size)
        samples = sample(draw, judged, num_matvecs, tolerance, progress, at_once)
        return Moments(
            scalar_estimate(samples, "trace", blocks),
            scalar_estimate(samples, "squared norm", blocks),
            diagonal_estimate(samples) if diagonal else None,
            samples.count,
        )


def exact_moments(
    A: SymmetricOperator,
    block_sizes: Sequence[int] | None = None,
    progress: ProgressFunction | None = None,
) -> Moments:
    """Trace, squared Frobenius norm and diagonal from P products, rounding apart.

    Args:
        A: symmetric operator of shape `(P, P)` with products `A @ V`.
        block_sizes: sizes of consecutive groups of coordinates, adding up to P.
        progress: `progress(done, total)` is called after each group of products.

    Returns:
        A `Moments` whose standard errors are zero.

    Raises:
        ValueError: for an operator that is not square, or block sizes that do not
            add up.
        KeyboardInterrupt: if `progress` says stop before all products are made.
    """
    products = Products(A, progress)
    size = products.total = products.size
    blocks = check_blocks(block_sizes, size)
    entries, squares = np.empty(size), np.empty((len(block_rows(blocks)), size))
    with products.working():
        for start in range(0, size, GROUP):
            if not products.going:
                raise KeyboardInterrupt
            columns = slice(start, min(start + GROUP, size))
            directions = products.basis(start, columns.stop - start)
            parts = _entries(blocks)(directions, products.rows(directions))
            entries[columns], squares[:, columns] = map(to_host, parts)
        diagonal = array(entries, products.dtype)
        zeros = ops.zeros_like(diagonal)
    rows = block_rows(blocks)
    trace = np.stack([entries[b].sum() for b in rows])
    norms = np.stack([squares[:, b].sum(axis=1) for b in rows], axis=1)
    pairs = None
    if blocks is not None:
        pairs = Estimate(norms, np.zeros_like(norms), size)
    return Moments(
        exact_estimate(trace, size, blocks),
        exact_estimate(norms.sum(axis=1), size, blocks, pairs),
        Estimate(diagonal, zeros, size),
        size,
    )


def _norm_of_squared(squared: Estimate) -> Estimate:
    """The norm, its blocks and its pairs, from those of the squared norm."""
    value, error = _root(squared.value, squared.standard_error)
    pairs = squared.pairs
    if pairs is not None:
        root, its_error = _root(pairs.value, pairs.standard_error)
        pairs = Estimate(root, its_error, squared.num_matvecs)
    return Estimate(
        float(value),
        None if error is None else float(error),
        squared.num_matvecs,
        tuple(map(_norm_of_squared, squared.blocks)),
        pairs,
    )


def _root(
    squared: float | NDArray[np.float64], error: float | NDArray[np.float64] | None
) -> tuple[NDArray[np.float64], NDArray[np.float64] | None]:
    """The root of a number or an array, and its standard error."""
    # An estimate may be below zero; what is undefined stays so.
    value = np.where(np.less_equal(squared, 0), 0, np.sqrt(np.maximum(squared, 0)))
    if error is None:
        return value, None
    # Without a value there is no slope; the root of the error is the scale.
    slope = np.where(value > 0, 2 * value, np.sqrt(error))
    return value, np.divide(error, slope, out=np.zeros_like(value), where=slope != 0)


@functools.lru_cache(maxsize=64)
def _told(
    block_sizes: tuple[int, ...] | None, diagonal: bool
) -> Callable[[Tensor, Tensor], dict[str, Tensor]]:
    """Compiles what random signs and their products tell."""

    def told(v: Tensor, av: Tensor) -> dict[str, Tensor]:
        shares = v * av
        samples = with_total("trace", block_sums(shares, block_sizes))
        samples |= with_total("squared norm", block_sums(av * av, block_sizes))
        return samples | ({"diagonal": shares} if diagonal else {})

    return compiled(told)


@functools.lru_cache(maxsize=64)
def _entries(
    block_sizes: tuple[int, ...] | None,
) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Compiles the entries of the diagonal and the squared norms of parts of columns.

    From k basis vectors and their products, `(k,)` and `(blocks, k)`.
    """
    return compiled(
        lambda e, ae: (ops.sum(e * ae, axis=1), block_sums(ae * ae, block_sizes))
    )
