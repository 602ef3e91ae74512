"""Estimates of a diagonal, for the benchmarks that compare them."""

import time

import measure
import numpy as np
from xdiag import xdiag

from keras_curvature.diagonal import diagonal_moments


def estimate(op, method, products, seed, **options):
    """A diagonal and its errors in float64, `None` where they are not told.

    Args:
        op: a `HessianOperator`.
        method: one of those of `hessian_diagonal`, or "XDiag".
        products: the budget.
        seed: seed of the random directions.
        **options: for `hessian_diagonal`.
    """
    if method == "XDiag":
        return xdiag(op, products, seed).astype("float64"), None
    found = diagonal_moments(op, method, products, seed=seed, **options).diagonal
    return tuple(
        None if x is None else measure.on_host(x).astype("float64")
        for x in (found.value, found.standard_error)
    )


def timed(op, method, products, seeds):
    """Estimates with several seeds, and the median seconds of processor of one.

    Args:
        op: a `HessianOperator`.
        method: as for `estimate`, like the next.
        products: the budget.
        seeds: the seeds.
    """
    found, seconds = [], []
    for seed in seeds:
        start = time.process_time()
        found.append(estimate(op, method, products, seed))
        seconds.append(time.process_time() - start)
    return found, float(np.median(seconds))
