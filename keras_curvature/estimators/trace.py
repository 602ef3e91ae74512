"""The trace: `tr A = E vᵀAv` for random signs v (Hutchinson 1990)."""

import functools

from keras import ops

from keras_curvature.backend import array, compiled
from keras_curvature.estimators.estimate import Estimate
from keras_curvature.estimators.products import (
    GROUP,
    Products,
    block_sums,
    check_blocks,
    to_host,
)
from keras_curvature.estimators.sampling import moments_of, sample


def hutchinson_trace(
    A,
    num_matvecs: int | None = None,
    tolerance: float | None = None,
    seed=0,
    block_sizes=None,
    progress=None,
) -> Estimate:
    """Unbiased estimate of the trace from random sign directions.

    Variance per sample: `2 (‖A‖_F² − Σ_i A_ii²)`. Source: Hutchinson (1990), "A
    stochastic estimator of the trace of the influence matrix", section 2.

    Args:
        A: symmetric operator of shape `(P, P)` with products `A @ V`.
        num_matvecs: budget of products. Defaults to 32, or to 1024 with a tolerance.
        tolerance: relative standard error at which to stop, not before 16 samples.
        seed: a non-negative integer, or a tuple of them.
        block_sizes: sizes of consecutive groups of coordinates, adding up to P.
        progress: `progress(done, total)` is called after each group of products.

    Returns:
        An `Estimate` whose value is a float, in the units of A. Its `blocks` are the
        traces of the diagonal blocks, which add up to it exactly.

    Raises:
        ValueError: for an operator that is not square, a budget below one, a
            tolerance that is not positive, or block sizes that do not add up.
    """
    products = Products(A)
    blocks = check_blocks(block_sizes, products.size)
    samples = sample(
        products,
        _moments(blocks),
        ("trace",),
        num_matvecs,
        tolerance,
        seed,
        progress=progress,
    )
    return scalar_estimate(samples, "trace", blocks)


def exact_trace(A, block_sizes=None, progress=None) -> Estimate:
    """The trace from P products with the basis vectors, rounding apart.

    Args:
        A: symmetric operator of shape `(P, P)` with products `A @ V`.
        block_sizes: sizes of consecutive groups of coordinates, adding up to P.
        progress: `progress(done, total)` is called after each group of products.

    Returns:
        An `Estimate` with a standard error of zero.

    Raises:
        ValueError: for an operator that is not square, or block sizes that do not
            add up.
    """
    products = Products(A)
    blocks = check_blocks(block_sizes, products.size)
    shares = sum_over_basis(products, _summed(blocks), progress)
    return exact_estimate(shares, products.size, blocks)


def trace_samples(directions, products, block_sizes):
    """Samples of the blocks' traces, `(blocks, k)`."""
    return block_sums(directions * products, block_sizes)


def with_total(name, shares):
    """Samples of a figure and of its shares, for `moments_of`."""
    return {name: ops.sum(shares, axis=0), f"{name} by block": shares}


def scalar_estimate(samples, name, block_sizes):
    """The `Estimate` of a figure whose samples came from `with_total`."""
    error = samples.standard_error(name)
    blocks = ()
    if block_sizes is not None:
        by_block = f"{name} by block"
        values = to_host(samples.means[by_block])
        errors = samples.standard_error(by_block)
        errors = [None] * len(values) if errors is None else to_host(errors)
        blocks = tuple(
            Estimate(float(v), e if e is None else float(e), samples.count)
            for v, e in zip(values, errors, strict=True)
        )
    return Estimate(
        float(samples.means[name]),
        None if error is None else float(error),
        samples.count,
        blocks,
    )


def exact_estimate(shares, num_matvecs, block_sizes):
    """The `Estimate` of an exact figure from its shares, a `(blocks,)` tensor."""
    shares = to_host(shares)
    blocks = ()
    if block_sizes is not None:
        blocks = tuple(Estimate(float(s), 0.0, num_matvecs) for s in shares)
    return Estimate(float(shares.sum()), 0.0, num_matvecs, blocks)


def sum_over_basis(products, summed, progress=None):
    """Sums a function of basis vectors and their products over the basis.

    Args:
        products: a `Products`.
        summed: compiled function of directions and products, `(P, k)` each, to a
            structure of arrays, summed over the k columns.
        progress: `progress(done, total)` is called after each group of products.
    """
    total = None
    with products.placed():
        for start in range(0, products.size, GROUP):
            width = min(GROUP, products.size - start)
            directions = products.basis(start, width)
            part = summed(directions, products(directions))
            total = part if total is None else _add(total, part)
            if progress is not None:
                progress(start + width, products.size)
    return total


@functools.lru_cache(maxsize=64)
def _moments(block_sizes):
    return moments_of(
        lambda v, av: with_total("trace", trace_samples(v, av, block_sizes))
    )


@functools.lru_cache(maxsize=64)
def _summed(block_sizes):
    return compiled(lambda v, av: ops.sum(trace_samples(v, av, block_sizes), axis=1))


@compiled
def _add(a, b):
    if isinstance(a, dict):
        return {name: a[name] + b[name] for name in a}
    return array(a) + b
