"""Diagonal and trace from whoever knows samples of the diagonal, or all of it."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

from keras import ops

from keras_curvature.backend import Tensor, compiled, on
from keras_curvature.estimators.estimate import Estimate
from keras_curvature.estimators.moments import Moments
from keras_curvature.estimators.products import (
    ProgressFunction,
    block_sums,
    check_blocks,
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


def sampled_moments(
    draw: Callable[[int, int], Tensor],
    num_samples: int | None = None,
    tolerance: float | None = None,
    block_sizes: Sequence[int] | None = None,
    progress: ProgressFunction | None = None,
    place: Any = None,
) -> Moments:
    """Diagonal and trace as means of independent unbiased samples of the diagonal.

    Args:
        draw: `draw(start, width)` returns the samples `start … start + width − 1`, a
            tensor `(width, P)`. A sample is a function of its number alone.
        num_samples: budget of samples. Defaults to 32, or to 1024 with a tolerance.
        tolerance: relative standard error `‖errors‖ / ‖diagonal‖` at which to stop,
            not before 16 samples.
        block_sizes: sizes of consecutive groups of coordinates, adding up to P.
        progress: `progress(done, total)` is called after each group of samples; when
            it returns `False`, what is known by then is returned.
        place: where the samples live, for `backend.on`.

    Returns:
        A `Moments` without a Frobenius norm; a sample counts as one product.

    Raises:
        ValueError: for a budget below one, a tolerance that is not positive, or
            block sizes that do not add up.
    """

    def told(start: int, width: int) -> dict[str, Tensor]:
        diagonals = draw(start, width)
        return _told(check_blocks(block_sizes, int(diagonals.shape[1])))(diagonals)

    with on(place):
        at_once = together(sum(block_sizes or ()))
        samples = sample(told, ("diagonal",), num_samples, tolerance, progress, at_once)
        blocks = None if block_sizes is None else tuple(block_sizes)
        trace = scalar_estimate(samples, "trace", blocks)
        return Moments(trace, None, diagonal_estimate(samples), samples.count)


def moments_of_diagonal(
    diagonal: Tensor,
    num_matvecs: int,
    block_sizes: Sequence[int] | None = None,
    place: Any = None,
) -> Moments:
    """A diagonal that is known exactly, and its trace.

    Args:
        diagonal: tensor `(P,)`.
        num_matvecs: number of products that it took.
        block_sizes: sizes of consecutive groups of coordinates, adding up to P.
        place: where the diagonal lives, for `backend.on`.

    Returns:
        A `Moments` without a Frobenius norm.

    Raises:
        ValueError: for block sizes that do not add up.
    """
    blocks = check_blocks(block_sizes, int(diagonal.shape[0]))
    with on(place):
        shares = to_host(block_sums(diagonal[None], blocks))[:, 0]
        trace = exact_estimate(shares, num_matvecs, blocks)
        exact = Estimate(diagonal, ops.zeros_like(diagonal), num_matvecs)
        return Moments(trace, None, exact, num_matvecs)


@functools.lru_cache(maxsize=64)
def _told(block_sizes: tuple[int, ...] | None) -> Callable[[Tensor], dict[str, Tensor]]:
    """Compiles what samples of the diagonal tell."""
    return compiled(
        lambda diagonals: {
            "diagonal": diagonals,
            **with_total("trace", block_sums(diagonals, block_sizes)),
        }
    )
