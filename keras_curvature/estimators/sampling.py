"""The loop that all averages over random samples share.

Whoever draws samples says what a few of them tell: arrays whose expectation is wanted.
The loop keeps the running mean and spread on the device, and decides when to stop.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

from keras import ops

from keras_curvature.backend import Tensor, array, compiled, wide_float
from keras_curvature.estimators.estimate import ratio
from keras_curvature.estimators.products import GROUP, ProgressFunction

#: A requested precision is not believed before this many samples. The standard error
#: from n samples is itself uncertain by about 1 / sqrt(2 (n - 1)): 18 % with 16, where
#: it is below 0.6 of the truth in 1 % of all cases; with 8 samples in 8 %, and with
#: 2 it can be nothing at all (vᵀAv of a 2×2 matrix takes two values, so that n
#: samples agree by luck with probability 2^(1-n)).
MINIMUM_SAMPLES = 16

#: Samples drawn when the caller gives no budget: without and with a tolerance.
DEFAULT_MATVECS = 32
MAXIMUM_MATVECS = 1024

#: `draw(start, width)` returns the samples `start … start + width − 1` of each figure,
#: one in each entry of the last axis. A sample is a function of its number alone.
Draw: TypeAlias = Callable[[int, int], Mapping[str, Tensor]]

_Moments: TypeAlias = tuple[dict[str, Tensor], dict[str, Tensor]]


class Samples:
    """Running mean and spread of independent samples.

    Attributes:
        count: number of samples so far.
        means: dictionary of means, tensors on the device.
    """

    def __init__(self) -> None:
        self.count = 0
        self.means: dict[str, Tensor] = {}
        self._spreads: dict[str, Tensor] = {}

    def add(self, samples: Mapping[str, Tensor], width: int) -> None:
        """Takes in `width` samples of each figure, along the last axis."""
        moments: _Moments = _moments(dict(samples))
        if self.count:
            moments = _merged(
                array(self.count, wide_float()),
                (self.means, self._spreads),
                array(width, wide_float()),
                moments,
            )
        self.count += width
        self.means, self._spreads = moments

    def standard_error(self, name: str) -> Tensor | None:
        """Standard error of the mean, `None` from a single sample."""
        if self.count < 2:
            return None
        return ops.sqrt(self._spreads[name] / (self.count * (self.count - 1)))

    def relative_standard_error(self, name: str) -> float:
        """`‖standard error‖ / ‖mean‖`, infinite from a single sample."""
        if self.count < 2:
            return math.inf
        norms = _norms(self.means[name], self._spreads[name])
        error, mean = (float(n) for n in norms)
        return ratio(error / math.sqrt(self.count * (self.count - 1)), mean)


def sample(
    draw: Draw,
    judged: Sequence[str],
    num_samples: int | None = None,
    tolerance: float | None = None,
    progress: ProgressFunction | None = None,
) -> Samples:
    """Averages over random samples.

    Since a sample is a function of its number, the result does not depend on how
    samples are grouped, and a larger budget continues a smaller one.

    Args:
        draw: gives the samples, a few at a time.
        judged: names of the figures that `tolerance` applies to.
        num_samples: budget. Defaults to 32, or to 1024 with a tolerance.
        tolerance: stops as soon as the relative standard error of every judged
            figure is at most this, though not before 16 samples.
        progress: told after each group of samples; when it says stop, what is known
            by then is returned.

    Returns:
        A `Samples`, of one sample at least.

    Raises:
        ValueError: for a budget below one or a tolerance that is not positive.
    """
    num_samples = check_budget(num_samples, tolerance)
    samples, going = Samples(), True
    while going and samples.count < num_samples:
        width = min(GROUP, num_samples - samples.count)
        samples.add(draw(samples.count, width), width)
        if progress is not None:
            going = progress(samples.count, num_samples)
        if (
            tolerance is not None
            and samples.count >= MINIMUM_SAMPLES
            and all(
                samples.relative_standard_error(name) <= tolerance for name in judged
            )
        ):
            break
    return samples


def check_budget(num_matvecs: int | None, tolerance: float | None) -> int:
    """The budget of products or samples to use.

    Raises:
        ValueError: for a budget below one or a tolerance that is not positive.
    """
    if tolerance is not None and not tolerance > 0:
        raise ValueError(
            "`tolerance` is a relative standard error and must be positive. For an "
            f"exact figure use an exact method. Received: tolerance={tolerance!r}."
        )
    if num_matvecs is None:
        return DEFAULT_MATVECS if tolerance is None else MAXIMUM_MATVECS
    if int(num_matvecs) != num_matvecs or num_matvecs < 1:
        raise ValueError(
            "`num_matvecs` must be a positive integer. Received: "
            f"num_matvecs={num_matvecs!r}."
        )
    return int(num_matvecs)


@compiled
def _moments(samples: dict[str, Tensor]) -> _Moments:
    """Means of a group of samples, and sums of squared deviations from them."""
    means, spreads = {}, {}
    for name, x in samples.items():
        # Not `ops.mean`, which computes in float32 outside of TensorFlow.
        mean = ops.sum(x, axis=-1) / ops.cast(ops.shape(x)[-1], x.dtype)
        means[name] = mean
        spreads[name] = ops.sum(ops.square(x - mean[..., None]), axis=-1)
    return means, spreads


@compiled
def _merged(count_a: Tensor, a: _Moments, count_b: Tensor, b: _Moments) -> _Moments:
    """Moments of two groups together.

    Chan, Golub, LeVeque (1979), "Updating formulae and a pairwise algorithm for
    computing sample variances", eq. 2.1. A sum of squares would lose the spread to
    rounding where it is small against the mean.
    """
    (means_a, spreads_a), (means_b, spreads_b) = a, b
    total = count_a + count_b
    means, spreads = {}, {}
    for name, mean in means_a.items():
        shift = means_b[name] - mean
        means[name] = mean + shift * ops.cast(count_b / total, mean.dtype)
        spreads[name] = (
            spreads_a[name]
            + spreads_b[name]
            + ops.square(shift) * ops.cast(count_a * count_b / total, mean.dtype)
        )
    return means, spreads


@compiled
def _norms(mean: Tensor, spread: Tensor) -> tuple[Tensor, Tensor]:
    """The norms of the spread's root and of the mean."""
    return ops.sqrt(ops.sum(spread)), ops.sqrt(ops.sum(mean * mean))
