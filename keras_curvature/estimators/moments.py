"""Trace, squared Frobenius norm and diagonal from the same products."""

import dataclasses
import functools

from keras import ops

from keras_curvature.backend import compiled
from keras_curvature.estimators.diagonal import diagonal_estimate
from keras_curvature.estimators.estimate import Estimate
from keras_curvature.estimators.frobenius import (
    frobenius_norm_of_squared,
    squared_norm_samples,
)
from keras_curvature.estimators.products import Products, check_blocks
from keras_curvature.estimators.sampling import moments_of, sample
from keras_curvature.estimators.trace import (
    exact_estimate,
    scalar_estimate,
    sum_over_basis,
    trace_samples,
    with_total,
)


@dataclasses.dataclass(frozen=True, eq=False)
class Moments:
    """What one set of products told about a symmetric operator.

    Attributes:
        trace: `Estimate`, blocks included when block sizes were given.
        squared_frobenius_norm: `Estimate`, with the shares of the blocks of rows, or
            `None` if the source does not tell.
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
) -> Moments:
    """Trace, squared Frobenius norm and diagonal from the same random directions.

    The figures equal those of `hutchinson_trace`,
    `hutchinson_squared_frobenius_norm` and `hutchinson_diagonal` with the same seed
    and number of products, at a third of the price.

    Args:
        A: symmetric operator of shape `(P, P)` with products `A @ V`.
        num_matvecs: budget of products. Defaults to 32, or to 1024 with a tolerance.
        tolerance: relative standard error that *every* figure must reach for the
            loop to stop early, not before 16 samples. A trace near zero never does.
        seed: a non-negative integer, or a tuple of them.
        block_sizes: sizes of consecutive groups of coordinates, adding up to P.
        diagonal: whether to estimate the diagonal too. Defaults to `False`.
        progress: `progress(done, total)` is called after each group of products.

    Returns:
        A `Moments`.

    Raises:
        ValueError: for an operator that is not square, a budget below one, a
            tolerance that is not positive, or block sizes that do not add up.
    """
    products = Products(A)
    blocks = check_blocks(block_sizes, products.size)
    judged = ("trace", "squared norm") + ("diagonal",) * diagonal
    samples = sample(
        products,
        _moments(blocks, bool(diagonal)),
        judged,
        num_matvecs,
        tolerance,
        seed,
        progress=progress,
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
    value = sums["diagonal"]
    return Moments(
        exact_estimate(sums["trace"], products.size, blocks),
        exact_estimate(sums["squared norm"], products.size, blocks),
        Estimate(value, ops.zeros_like(value), products.size),
        products.size,
    )


@functools.lru_cache(maxsize=64)
def _moments(block_sizes, diagonal):
    def statistics(v, av):
        samples = with_total("trace", trace_samples(v, av, block_sizes))
        samples |= with_total("squared norm", squared_norm_samples(v, av, block_sizes))
        if diagonal:
            samples["diagonal"] = v * av
        return samples

    return moments_of(statistics)


@functools.lru_cache(maxsize=64)
def _summed(block_sizes):
    return compiled(
        lambda v, av: {
            "trace": ops.sum(trace_samples(v, av, block_sizes), axis=1),
            "squared norm": ops.sum(squared_norm_samples(v, av, block_sizes), axis=1),
            "diagonal": ops.sum(v * av, axis=1),
        }
    )
