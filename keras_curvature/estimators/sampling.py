"""The loop that all averages over random directions share.

An estimator says what one direction v and its product Av tell: an array whose
expectation is wanted. The loop draws directions, keeps the running mean and spread
on the device, and decides when to stop.
"""

import math

from keras import ops

from keras_curvature.backend import array, compiled
from keras_curvature.estimators.estimate import ratio
from keras_curvature.estimators.products import GROUP, seed_key

#: A requested precision is not believed before this many samples. The standard error
#: from n samples is itself uncertain by about 1 / sqrt(2 (n - 1)): 18 % with 16, where
#: it is below 0.6 of the truth in 1 % of all cases; with 8 samples in 8 %, and with
#: 2 it can be nothing at all (vᵀAv of a 2×2 matrix takes two values, so that n
#: samples agree by luck with probability 2^(1-n)).
MINIMUM_SAMPLES = 16

#: Products spent when the caller gives no budget: without and with a tolerance.
DEFAULT_MATVECS = 32
MAXIMUM_MATVECS = 1024


class Samples:
    """Running mean and spread of what independent random directions tell.

    Attributes:
        count: number of samples so far.
        means: dictionary of means, tensors on the device.
    """

    def __init__(self):
        self.count = 0
        self.means = {}
        self._spreads = {}

    def add(self, means, spreads, width):
        """Merges the moments of a group of `width` samples."""
        if self.count:
            # All or nothing: an interruption must not leave half an update.
            merged = _merge(
                array(self.count, "float64"),
                (self.means, self._spreads),
                array(width, "float64"),
                (means, spreads),
            )
        else:
            merged = means, spreads
        self.count, (self.means, self._spreads) = self.count + width, merged

    def standard_error(self, name):
        """Standard error of the mean, `None` from a single sample."""
        if self.count < 2:
            return None
        return ops.sqrt(self._spreads[name] / (self.count * (self.count - 1)))

    def relative_standard_error(self, name):
        """`‖standard error‖ / ‖mean‖`, infinite from a single sample."""
        if self.count < 2:
            return math.inf
        norms = _norms(self.means[name], self._spreads[name])
        error, mean = (float(n) for n in norms)
        return ratio(error / math.sqrt(self.count * (self.count - 1)), mean)


def sample(
    products,
    moments,
    judged,
    num_matvecs=None,
    tolerance=None,
    seed=0,
    purpose=0,
    progress=None,
    partial=True,
):
    """Averages over random sign directions.

    Draw number i is a function of the seed and of i only, so that the samples do not
    depend on how they are grouped, and a larger budget continues a smaller one.

    Args:
        products: a `Products`.
        moments: compiled function from `moments_of`.
        judged: names of the figures that `tolerance` applies to.
        num_matvecs: budget of products. Defaults to 32, or to 1024 with a tolerance.
        tolerance: stops as soon as the relative standard error of every judged
            figure is at most this, though not before 16 samples.
        seed: a non-negative integer, or a tuple of them.
        purpose: keeps the draws of different estimators apart.
        progress: `progress(done, total)` is called after each group.
        partial: whether Ctrl-C ends the loop, and what is known by then is returned
            unless that is nothing; else it is raised.

    Returns:
        A `Samples`.

    Raises:
        ValueError: for a budget below one or a tolerance that is not positive.
    """
    num_matvecs = check_budget(num_matvecs, tolerance)
    samples = Samples()
    try:
        with products.placed():
            key = seed_key(seed, purpose)
            while samples.count < num_matvecs:
                width = min(GROUP, num_matvecs - samples.count)
                directions = products.signs(key, samples.count, width)
                samples.add(*moments(directions, products(directions)), width)
                if progress is not None:
                    progress(samples.count, num_matvecs)
                if (
                    tolerance is not None
                    and samples.count >= MINIMUM_SAMPLES
                    and all(
                        samples.relative_standard_error(name) <= tolerance
                        for name in judged
                    )
                ):
                    break
    except KeyboardInterrupt:
        if not (partial and samples.count):
            raise
    return samples


def check_budget(num_matvecs, tolerance):
    """The budget of products to use.

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


def moments_of(statistics):
    """Compiles the moments of a group of samples.

    Args:
        statistics: function of directions V and products AV, both `(P, k)`, to a
            dictionary of arrays with one sample in each entry of the *last* axis.

    Returns:
        A compiled function of V and AV to a dictionary of means over the group and
        one of sums of squared deviations from them.
    """

    def moments(directions, products):
        samples = statistics(directions, products)
        means = {name: ops.mean(x, axis=-1) for name, x in samples.items()}
        spreads = {
            name: ops.sum(ops.square(x - means[name][..., None]), axis=-1)
            for name, x in samples.items()
        }
        return means, spreads

    return compiled(moments)


def _merged(count_a, a, count_b, b):
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


_merge = compiled(_merged)
# The norm of the standard errors needs only the sum of the spreads.
_norms = compiled(
    lambda mean, spread: (ops.sqrt(ops.sum(spread)), ops.sqrt(ops.sum(mean * mean)))
)
