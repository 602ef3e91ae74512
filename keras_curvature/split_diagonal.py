"""The diagonal from its two parts: how much is drawn of each, and of what kind.

`layerwise.split` knows the samples, `estimators.shrinkage` what they tell together.
"""

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from keras_curvature import estimators
from keras_curvature.backend import Tensor
from keras_curvature.estimators import MINIMUM_SAMPLES, Moments
from keras_curvature.evaluation import Evaluation
from keras_curvature.layerwise import SplitDiagonal
from keras_curvature.progress import Progress

_Array = NDArray[np.float64]

#: Keeps the draws of the two parts, and those that kinds are chosen by, apart.
_GAUSS_NEWTON, _REST, _CHOICE = 5, 6, 7

#: Samples that kinds are chosen by, and their number that is planned for.
_TRIED, _PLANNED = 2, 4

#: The rest is thought to be at least this share of `‖g‖²`, where kinds are chosen:
#: noise beyond its size is shrunk anyway.
_SHARE = 0.05


class SplitMoments:
    """The diagonal of a loss in two parts, and how to sample the second.

    Args:
        evaluation: of a `TrainingLoss`.

    Attributes:
        parts: the `SplitDiagonal`.
        possible: whether the parts can be told from each other.
    """

    def __init__(self, evaluation: Evaluation):
        self.parts = evaluation.once(SplitDiagonal)
        self.possible = self.parts.possible
        self._sizes = tuple(evaluation.loss.layout.sizes)
        self._kinds: tuple[str, ...] = ()

    def moments(
        self,
        budget: int,
        tolerance: float | None,
        seed: int,
        shrink: bool,
        progress: Progress | None = None,
    ) -> Moments:
        """Diagonal and trace for a budget of products.

        A backward pass costs about half of a product: the first part gets as many
        passes as the budget has products, or is exact where that takes no more than
        twice as many; the second part gets half of the budget. Below four products no
        error can be given, and a shrunk diagonal is that of the first part alone.

        Args:
            budget: number of products, or what costs as much.
            tolerance: relative error at which to stop, not before 16 products.
            seed: a seed of the random signs.
            shrink: whether the second part is shrunk; the diagonal is unbiased if not.
            progress: told after each few samples; says whether to go on.
        """
        going = _Going(progress, budget)
        spent = budget if tolerance is None else min(budget, MINIMUM_SAMPLES)
        exact, passes = None, _passes(budget, shrink)
        if self.parts.num_outputs <= 2 * passes:
            passes = int(self.parts.num_outputs)
            exact = self.parts.exact_gauss_newton()
        g, rest = (
            self._samples("", seed),
            {k: self._samples(k, seed) for k in self.kinds},
        )
        while True:
            if exact is not None:
                quiet = estimators.exact_part(exact, self._sizes)
            else:
                quiet = g.drawn(_passes(spent, shrink), going.with_price(0.5))
            products = spent // 2 if spent >= 2 * _TRIED else int(not shrink)
            counts = _shared(products, len(rest)) if products else [0] * len(rest)
            noisy = [
                samples.drawn(count, going.with_price(1.0), quiet.mean)
                for samples, count in zip(rest.values(), counts, strict=True)
                if count
            ]
            cost = (quiet.count or passes) / 2 + sum(part.count for part in noisy)
            found = estimators.summed(
                quiet, noisy, math.ceil(cost), self._sizes, shrink
            )
            if not going.on or spent >= budget or _precise(found, tolerance):
                return found
            spent = min(2 * spent, budget)

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of samples of the second part: the quieter one, or both.

        Found out once, by two samples of each, so that it is the same in every probe.
        """
        if not self._kinds:
            kinds = tuple(self.parts.rest)
            self._kinds = kinds if len(kinds) == 1 else self._quietest(kinds)
        return self._kinds

    def _quietest(self, kinds: tuple[str, ...]) -> tuple[str, ...]:
        going = _Going(None, 0).with_price(0.0)
        g = self._samples("", 0, _CHOICE).drawn(_TRIED, going)
        one, other = (
            self._samples(kind, 0, _CHOICE).drawn(_TRIED, going, g.mean)
            for kind in kinds
        )
        noise = [
            self._by_block(part.error) * (_TRIED / _PLANNED) for part in (one, other)
        ]
        # The product of independent samples is the square of what they are samples of.
        limit = np.maximum(
            _SHARE * self._by_block(g.mean),
            self._by_block(one.mean, other.mean),
        )
        # Half of the samples of each kind, each block from the quieter one mostly.
        first, second = noise
        total = first + second
        both = 2 * first * second / np.where(total > 0, total, 1)
        choices = {(kinds[0],): first, (kinds[1],): second, kinds: both}
        return min(choices, key=lambda one: _risk(choices[one], limit))

    def _by_block(self, x: Tensor, y: Tensor | None = None) -> _Array:
        """Sums of squares by variable, or of products."""
        products = x * (x if y is None else y)
        sums = estimators.block_sums(products[None], self._sizes)
        return estimators.to_host(sums)[:, 0]

    def _samples(
        self, kind: str, seed: int, purpose: int | None = None
    ) -> estimators.PartSamples:
        """Samples of the second part by their kind, or of the first part without."""
        samples = self.parts.rest[kind] if kind else self.parts.gauss_newton
        usual = _REST if kind else _GAUSS_NEWTON
        key = estimators.seed_key(seed, usual if purpose is None else purpose)
        return estimators.PartSamples(
            lambda start, width: samples(key, start, width), self._sizes
        )


class _Going:
    """Whether to go on, as asked for after each few samples of different prices."""

    def __init__(self, progress: Progress | None, total: float):
        self.on = True
        self._progress, self._done, self._total = progress, 0.0, total

    def with_price(self, price: float) -> Callable[[int], bool]:
        """A function that is told of new samples, and returns whether to go on."""

        def told(count: int) -> bool:
            self._done += price * count
            if self._progress is not None:
                self.on = self._progress(int(self._done), int(self._total))
            return self.on

        return told


def _precise(moments: Moments, tolerance: float | None) -> bool:
    """Whether the diagonal is as precise as asked for."""
    diagonal = moments.diagonal
    error = None if diagonal is None else diagonal.relative_standard_error
    return tolerance is not None and error is not None and error <= tolerance


def _passes(budget: int, shrink: bool) -> int:
    """Backward passes of the first part: all of the budget where nothing else is."""
    return 2 * budget if shrink and budget < 2 * _TRIED else budget


def _shared(count: int, kinds: int) -> list[int]:
    """As many samples of each kind, two at least; one in all of the first kind."""
    if count == 1:
        return [1] + [0] * (kinds - 1)
    return [max(2, (count + k) // kinds) for k in range(kinds)]


def _risk(noise: _Array, limit: _Array) -> float:
    """The squared error that is left of parts of a size when they are shrunk."""
    total = noise + limit
    return float(np.sum(noise * limit / np.where(total > 0, total, 1)))
