"""Trace, squared Frobenius norm and diagonal from the same products.

For random signs v

    tr A = E vᵀAv,    ‖A‖_F² = E ‖Av‖²,    diag A = E v ⊙ Av

(Hutchinson 1990, "A stochastic estimator of the trace of the influence matrix",
section 2; the norm is that estimate for A²). The *squared* norm is what can be
estimated without bias; `frobenius_norm_of_squared` takes the root and carries the
standard error along.
"""

import dataclasses
import functools

import numpy as np
from keras import ops

from keras_curvature.backend import compiled
from keras_curvature.estimators.diagonal import diagonal_estimate
from keras_curvature.estimators.estimate import Estimate
from keras_curvature.estimators.products import (
    Products,
    block_sums,
    check_blocks,
    to_host,
)
from keras_curvature.estimators.sampling import moments_of, sample
from keras_curvature.estimators.shares import (
    exact_estimate,
    scalar_estimate,
    sum_over_basis,
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
        """The root of the squared norm, its error by the delta method."""
        if self.squared_frobenius_norm is None:
            raise ValueError("The source of these moments does not tell the norm.")
        return frobenius_norm_of_squared(self.squared_frobenius_norm)


def hutchinson_moments(
    A,
    num_matvecs: int | None = None,
    tolerance: float | None = None,
    seed=0,
    block_sizes=None,
    diagonal: bool = False,
    progress=None,
    judged=None,
    partial: bool = True,
) -> Moments:
    """Unbiased estimates from the same random sign directions.

    Variances per sample: `2 (‖A‖_F² − Σ_i A_ii²)` of the trace,
    `2 (‖A²‖_F² − Σ_i (A²)_ii²)` of the squared norm. Both are large when a few
    eigenvalues dominate; there `DominantSubspace` does better at the same price.

    Args:
        A: symmetric operator of shape `(P, P)` with products `A @ V`.
        num_matvecs: budget of products. Defaults to 32, or to 1024 with a tolerance.
        tolerance: relative standard error at which to stop, not before 16 samples.
            That of the norm is half of the squared norm's; a trace near zero never
            gets there.
        seed: a non-negative integer, or a tuple of them.
        block_sizes: sizes of consecutive groups of coordinates, adding up to P.
        diagonal: whether to estimate the diagonal too. Defaults to `False`.
        progress: `progress(done, total)` is called after each group of products.
        judged: the figures that must reach the tolerance, of `"trace"`, `"squared
            norm"` and `"diagonal"`. Defaults to all that are estimated.
        partial: whether Ctrl-C returns what is known by then, or is raised.

    Returns:
        A `Moments`. The squared norm has no `pairs`, for no directions are kept.

    Raises:
        ValueError: for an operator that is not square, a budget below one, a
            tolerance that is not positive, or block sizes that do not add up.
    """
    products = Products(A)
    blocks = check_blocks(block_sizes, products.size)
    samples = sample(
        products,
        _moments(blocks, bool(diagonal)),
        judged or ("trace", "squared norm") + ("diagonal",) * diagonal,
        num_matvecs,
        tolerance,
        seed,
        progress=progress,
        partial=partial,
    )
    return Moments(
        scalar_estimate(samples, "trace", blocks),
        scalar_estimate(samples, "squared norm", blocks),
        diagonal_estimate(samples) if diagonal else None,
        samples.count,
    )


def exact_moments(A, block_sizes=None, progress=None) -> Moments:
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
    """
    products = Products(A)
    blocks = check_blocks(block_sizes, products.size)
    sums = sum_over_basis(products, _summed(blocks), progress)
    value, pairs = sums["diagonal"], to_host(sums["pairs"])
    squared = exact_estimate(pairs.sum(1), products.size, blocks)
    if blocks is not None:
        pairs = Estimate(pairs, np.zeros_like(pairs), products.size)
        squared = dataclasses.replace(squared, pairs=pairs)
    return Moments(
        exact_estimate(sums["trace"], products.size, blocks),
        squared,
        Estimate(value, ops.zeros_like(value), products.size),
        products.size,
    )


def frobenius_norm_of_squared(squared: Estimate) -> Estimate:
    """The norm and its standard error from those of the squared norm.

    By the delta method `se(√x) = se(x) / (2 √x)`. The root of an unbiased estimate
    is a little too small, by `se² / (2 value)`: a quarter per mille at a relative
    standard error of 2 %.

    Args:
        squared: `Estimate` of a squared norm; its blocks and pairs are converted as
            well.

    Returns:
        An `Estimate` in the units of the operator. The squares of the blocks add up,
        the blocks do not.
    """
    value, error = _root(squared.value, squared.standard_error)
    pairs = squared.pairs
    if pairs is not None:
        root, its_error = _root(pairs.value, pairs.standard_error)
        pairs = Estimate(root, its_error, squared.num_matvecs)
    return Estimate(
        float(value),
        None if error is None else float(error),
        squared.num_matvecs,
        tuple(frobenius_norm_of_squared(b) for b in squared.blocks),
        pairs,
    )


def _root(squared, error):
    """The root of a number or an array, and its standard error."""
    # An estimate may be below zero; what is undefined stays so.
    value = np.where(np.less_equal(squared, 0), 0, np.sqrt(np.maximum(squared, 0)))
    if error is None:
        return value, None
    # Without a value there is no slope; the root of the error is the scale.
    slope = np.where(value > 0, 2 * value, np.sqrt(error))
    return value, np.divide(error, slope, out=np.zeros_like(value), where=slope != 0)


@functools.lru_cache(maxsize=64)
def _moments(block_sizes, diagonal):
    def statistics(v, av):
        samples = with_total("trace", block_sums(v * av, block_sizes))
        samples |= with_total("squared norm", block_sums(av * av, block_sizes))
        if diagonal:
            samples["diagonal"] = v * av
        return samples

    return moments_of(statistics)


@functools.lru_cache(maxsize=64)
def _summed(block_sizes):
    def sums(e, ae):
        # Each basis vector belongs to one block of columns.
        columns = block_sums(e, block_sizes)
        return {
            "trace": ops.sum(block_sums(e * ae, block_sizes), axis=1),
            "pairs": ops.matmul(
                block_sums(ae * ae, block_sizes), ops.transpose(columns)
            ),
            "diagonal": ops.sum(e * ae, axis=1),
        }

    return compiled(sums)
