"""The Frobenius norm: `‖A‖_F² = E ‖Av‖²` for random signs v.

The *squared* norm is what can be estimated without bias; `frobenius_norm_of_squared`
takes the root and carries the standard error along.
"""

import functools
import math

from keras import ops

from keras_curvature.backend import compiled
from keras_curvature.estimators.estimate import Estimate
from keras_curvature.estimators.products import Products, block_sums, check_blocks
from keras_curvature.estimators.sampling import moments_of, sample
from keras_curvature.estimators.trace import (
    exact_estimate,
    scalar_estimate,
    sum_over_basis,
    with_total,
)


def hutchinson_squared_frobenius_norm(
    A,
    num_matvecs: int | None = None,
    tolerance: float | None = None,
    seed=0,
    block_sizes=None,
    progress=None,
) -> Estimate:
    """Unbiased estimate of the squared Frobenius norm from random sign directions.

    It is Hutchinson's trace estimate of A². Variance per sample:
    `2 (‖A²‖_F² − Σ_i (A²)_ii²)`, large when a few eigenvalues dominate; there
    `DominantSubspace` does better at the same price.

    Args:
        A: symmetric operator of shape `(P, P)` with products `A @ V`.
        num_matvecs: budget of products. Defaults to 32, or to 1024 with a tolerance.
        tolerance: relative standard error of the squared norm at which to stop, not
            before 16 samples. That of the norm is half of it.
        seed: a non-negative integer, or a tuple of them.
        block_sizes: sizes of consecutive groups of coordinates, adding up to P.
        progress: `progress(done, total)` is called after each group of products.

    Returns:
        An `Estimate` whose value is a float, in the units of A squared. Its `blocks`
        are the squared norms of the blocks of *rows*, which add up to it exactly.

    Raises:
        ValueError: for an operator that is not square, a budget below one, a
            tolerance that is not positive, or block sizes that do not add up.
    """
    products = Products(A)
    blocks = check_blocks(block_sizes, products.size)
    samples = sample(
        products,
        _moments(blocks),
        ("squared norm",),
        num_matvecs,
        tolerance,
        seed,
        progress=progress,
    )
    return scalar_estimate(samples, "squared norm", blocks)


def exact_squared_frobenius_norm(A, block_sizes=None, progress=None) -> Estimate:
    """The squared Frobenius norm from P products, rounding apart.

    Args:
        A: symmetric operator of shape `(P, P)` with products `A @ V`.
        block_sizes: sizes of consecutive groups of coordinates, adding up to P.
        progress: `progress(done, total)` is called after each group of products.

    Returns:
        An `Estimate` with a standard error of zero. Its `blocks` are the squared
        norms of the blocks of rows.

    Raises:
        ValueError: for an operator that is not square, or block sizes that do not
            add up.
    """
    products = Products(A)
    blocks = check_blocks(block_sizes, products.size)
    shares = sum_over_basis(products, _summed(blocks), progress)
    return exact_estimate(shares, products.size, blocks)


def frobenius_norm_of_squared(squared: Estimate) -> Estimate:
    """The norm and its standard error from those of the squared norm.

    By the delta method `se(√x) = se(x) / (2 √x)`. The root of an unbiased estimate
    is a little too small, by `se² / (2 value)`: a quarter per mille at a relative
    standard error of 2 %.

    Args:
        squared: `Estimate` of a squared norm; its blocks are converted as well.

    Returns:
        An `Estimate` in the units of the operator. The squares of the blocks add up,
        the blocks do not.
    """
    value = math.sqrt(squared.value) if squared.value > 0 else squared.value * 0.0
    error = squared.standard_error
    if error:
        # Without a value there is no slope; the root of the error is the scale.
        error = error / (2 * value) if value > 0 else math.sqrt(error)
    return Estimate(
        value,
        error,
        squared.num_matvecs,
        tuple(frobenius_norm_of_squared(b) for b in squared.blocks),
    )


def squared_norm_samples(directions, products, block_sizes):
    """Samples of the squared norms of the blocks of rows, `(blocks, k)`."""
    del directions
    return block_sums(ops.square(products), block_sizes)


@functools.lru_cache(maxsize=64)
def _moments(block_sizes):
    return moments_of(
        lambda v, av: with_total(
            "squared norm", squared_norm_samples(v, av, block_sizes)
        )
    )


@functools.lru_cache(maxsize=64)
def _summed(block_sizes):
    return compiled(
        lambda v, av: ops.sum(squared_norm_samples(v, av, block_sizes), axis=1)
    )
