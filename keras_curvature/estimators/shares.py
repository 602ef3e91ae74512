"""Figures that are sums over coordinates, with the shares of blocks of them."""

import numpy as np
from keras import ops
from numpy.typing import NDArray

from keras_curvature.backend import Tensor
from keras_curvature.estimators.estimate import Estimate
from keras_curvature.estimators.products import to_host
from keras_curvature.estimators.sampling import Samples


def with_total(name: str, shares: Tensor) -> dict[str, Tensor]:
    """Samples of a figure and of its shares, from those of the shares `(blocks, k)`."""
    return {
        name: ops.sum(shares, axis=0),
        f"{name} by block": ops.transpose(shares),
    }


def scalar_estimate(
    samples: Samples, name: str, block_sizes: tuple[int, ...] | None
) -> Estimate:
    """The `Estimate` of a figure whose samples came from `with_total`."""
    error = samples.standard_error(name)
    blocks: tuple[Estimate, ...] = ()
    if block_sizes is not None:
        by_block = f"{name} by block"
        values = to_host(samples.means[by_block]).tolist()
        errors = samples.standard_error(by_block)
        errors = [None] * len(values) if errors is None else to_host(errors).tolist()
        blocks = tuple(
            Estimate(v, e, samples.count) for v, e in zip(values, errors, strict=True)
        )
    return Estimate(
        float(samples.means[name]),
        None if error is None else float(error),
        samples.count,
        blocks,
    )


def diagonal_estimate(samples: Samples) -> Estimate:
    """The `Estimate` of the diagonal, from samples of that name."""
    return Estimate(
        samples.means["diagonal"], samples.standard_error("diagonal"), samples.count
    )


def exact_estimate(
    shares: NDArray[np.float64],
    num_matvecs: int,
    block_sizes: tuple[int, ...] | None,
    pairs: Estimate | None = None,
) -> Estimate:
    """The `Estimate` of an exact figure from its shares, one for each block."""
    blocks: tuple[Estimate, ...] = ()
    if block_sizes is not None:
        blocks = tuple(Estimate(s, 0.0, num_matvecs) for s in shares.tolist())
    return Estimate(float(shares.sum()), 0.0, num_matvecs, blocks, pairs)
