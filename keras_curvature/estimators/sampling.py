"""The loop that all averages over random samples share.

Whoever draws samples says what a few of them tell: arrays whose expectation is wanted.
The loop keeps the running mean and spread on the device, and decides when to stop.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

from keras import ops

from keras_curvature.backend import Tensor, array, by_entries, compiled, wide_float
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
#: one in each entry of the first axis. A sample is a function of its number alone.
Draw: TypeAlias = Callable[[int, int], Mapping[str, Tensor]]

_Named: TypeAlias = dict[str, Tensor]


class Samples:
    """Running mean and spread of independent samples.

    Attributes:
        count: number of samples so far.
        means: dictionary of means, tensors on the device.
        spreads: of sums of squared deviations from them.
    """

    def __init__(self) -> None:
        self.count = 0
        self.means: dict[str, Tensor] = {}
        self.spreads: dict[str, Tensor] = {}

    def add(self, samples: Mapping[str, Tensor], width: int) -> None:
        """Takes in `width` samples of each figure, along the first axis."""
        if not self.count:
            self.means = {name: ops.zeros_like(x[0]) for name, x in samples.items()}
            self.spreads = dict(self.means)
        self.means, self.spreads = _extended(width)(
            self.means, self.spreads, array(self.count, wide_float()), dict(samples)
        )
        self.count += width

    def standard_error(self, name: str) -> Tensor | None:
        """Standard error of the mean, `None` from a single sample."""
        if self.count < 2:
            return None
        return ops.sqrt(self.spreads[name] / (self.count * (self.count - 1)))

    def relative_standard_error(self, name: str) -> float:
        """`‖standard error‖ / ‖mean‖`, infinite from a single sample."""
        if self.count < 2:
            return math.inf
        norms = _norms(self.means[name], self.spreads[name])
        error, mean = (float(n) for n in norms)
        return ratio(error / math.sqrt(self.count * (self.count - 1)), mean)


def sample(
    draw: Draw,
    judged: Sequence[str],
    num_samples: int | None = None,
    tolerance: float | None = None,
    progress: ProgressFunction | None = None,
    at_once: int = GROUP,
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
        at_once: how many samples are drawn together.

    Returns:
        A `Samples`, of one sample at least.

    Raises:
        ValueError: for a budget below one or a tolerance that is not positive.
    """
    num_samples = check_budget(num_samples, tolerance)
    samples, going = Samples(), True
    while going and samples.count < num_samples:
        width = min(at_once, num_samples - samples.count)
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


@functools.lru_cache(maxsize=64)
def _extended(width: int) -> Callable[..., tuple[_Named, _Named]]:
    """Compiles means, and sums of squared deviations from them, with more samples.

    One at a time (Welford 1962, "Note on a method for calculating corrected sums of
    squares and products"): a sum of squares would lose the spread to rounding where it
    is small against the mean, and deviations of all of them take as much memory as
    they do.
    """

    def extended(
        means: _Named, spreads: _Named, count: Tensor, samples: _Named
    ) -> tuple[_Named, _Named]:
        def more(mean: Tensor, spread: Tensor, *drawn: Tensor) -> list[Tensor]:
            for number, x in enumerate(drawn):
                before, total = mean, ops.cast(count + number + 1, mean.dtype)
                mean = before + (x - before) / total
                spread = spread + (x - before) * (x - mean)
            return [mean, spread]

        found = {
            name: by_entries(
                more, mean, spreads[name], *(samples[name][i] for i in range(width))
            )
            for name, mean in means.items()
        }
        return (
            {name: mean for name, (mean, _) in found.items()},
            {name: spread for name, (_, spread) in found.items()},
        )

    return compiled(extended)


@compiled
def _norms(mean: Tensor, spread: Tensor) -> tuple[Tensor, Tensor]:
    """The norms of the spread's root and of the mean."""
    return ops.sqrt(ops.sum(spread)), ops.sqrt(ops.sum(mean * mean))
