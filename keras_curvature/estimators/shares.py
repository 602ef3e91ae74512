"""Figures that are sums over coordinates, with the shares of blocks of them."""

from keras import ops

from keras_curvature.backend import array, compiled
from keras_curvature.estimators.estimate import Estimate
from keras_curvature.estimators.products import GROUP, to_host


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


@compiled
def _add(a, b):
    if isinstance(a, dict):
        return {name: a[name] + b[name] for name in a}
    return array(a) + b
