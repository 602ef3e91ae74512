"""Diagonal and trace from whoever knows samples of the diagonal, or all of it."""

import functools

from keras import ops

from keras_curvature.backend import on_device
from keras_curvature.estimators.diagonal import diagonal_estimate
from keras_curvature.estimators.estimate import Estimate
from keras_curvature.estimators.moments import Moments
from keras_curvature.estimators.products import block_sums, check_blocks
from keras_curvature.estimators.sampling import moments_of, sample
from keras_curvature.estimators.shares import (
    exact_estimate,
    scalar_estimate,
    with_total,
)


def sampled_moments(
    sampler,
    num_samples: int | None = None,
    tolerance: float | None = None,
    seed=0,
    block_sizes=None,
    progress=None,
    partial=True,
) -> Moments:
    """Diagonal and trace as means of independent unbiased samples of the diagonal.

    Args:
        sampler: has `device`, `size` (P) and `diagonal_samples(seed, first, count)`,
            which returns `count` samples as a tensor `(P, count)`.
        num_samples: budget of samples. Defaults to 32, or to 1024 with a tolerance.
        tolerance: relative standard error `‖errors‖ / ‖diagonal‖` at which to stop,
            not before 16 samples.
        seed: a non-negative integer.
        block_sizes: sizes of consecutive groups of coordinates, adding up to P.
        progress: `progress(done, total)` is called after each group of samples.
        partial: whether Ctrl-C returns what is known by then, or is raised.

    Returns:
        A `Moments` without a Frobenius norm; a sample counts as one product.

    Raises:
        ValueError: for a budget below one, a tolerance that is not positive, or
            block sizes that do not add up.
    """
    blocks = check_blocks(block_sizes, sampler.size)
    moments = _sampled_moments(blocks)
    samples = sample(
        _Sampler(sampler, seed),
        lambda _, samples: moments(samples[:0], samples),
        ("diagonal",),
        num_samples,
        tolerance,
        seed,
        progress=progress,
        partial=partial,
    )
    trace = scalar_estimate(samples, "trace", blocks)
    return Moments(trace, None, diagonal_estimate(samples), samples.count)


class _Sampler:
    """Gives samples where `sample` expects directions and their products."""

    def __init__(self, sampler, seed):
        self._sampler = sampler
        self._seed = seed

    def placed(self):
        return on_device(self._sampler.device)

    def signs(self, key, start, width):
        del key
        return start, width

    def __call__(self, draws):
        return self._sampler.diagonal_samples(self._seed, *draws)


def moments_of_diagonal(diagonal, num_matvecs, block_sizes=None) -> Moments:
    """A diagonal that is known exactly, and its trace.

    Args:
        diagonal: tensor `(P,)`.
        num_matvecs: number of products that it took.
        block_sizes: sizes of consecutive groups of coordinates, adding up to P.

    Returns:
        A `Moments` without a Frobenius norm.
    """
    blocks = check_blocks(block_sizes, int(diagonal.shape[0]))
    sums = block_sums(diagonal[:, None], blocks)[:, 0]
    exact = Estimate(diagonal, ops.zeros_like(diagonal), num_matvecs)
    return Moments(exact_estimate(sums, num_matvecs, blocks), None, exact, num_matvecs)


@functools.lru_cache(maxsize=64)
def _sampled_moments(block_sizes):
    return moments_of(
        lambda _, samples: {
            "diagonal": samples,
            **with_total("trace", block_sums(samples, block_sizes)),
        }
    )
