"""The diagonal from its two parts: how much is drawn of each, and of what kind.

`layerwise.split` knows the samples, `estimators.shrinkage` what they tell together.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from keras_curvature import estimators
from keras_curvature.axes import Axes
from keras_curvature.backend import Tensor
from keras_curvature.estimators import MINIMUM_SAMPLES, Moments
from keras_curvature.evaluation import Evaluation
from keras_curvature.layerwise import SplitDiagonal
from keras_curvature.operators import HessianOperator, TurnedOperator
from keras_curvature.progress import Progress

_Array = NDArray[np.float64]

#: The kind of samples that are those of both parts together: products with H.
WHOLE = "whole"

#: Keeps the draws of the two parts, and those that kinds are chosen by, apart.
_GAUSS_NEWTON, _REST, _CHOICE = 5, 6, 7

#: Samples that an error takes.
_LEAST = 2

#: Samples that kinds are chosen by, at most, and entries that they show in all, about:
#: the noise of few entries is seen by many samples.
_MOST_TRIED, _TELLING = 8, 2**15

#: The budget that kinds are chosen for.
_PLANNED = 8

#: Where samples interact, models of more parameters get samples of the whole untried: a
#: graph of their own for others takes longer to compile than it gains.
_LARGE = 2**20

#: Kinds are chosen anew when the noise of a sample, over the first part, is this many
#: times what it was, or less by as much: a network that was wrong may have learned.
_CHANGED = 4

#: A variable is curved if its second part is more than this share of the first:
#: rounding is orders below, a curved activation orders above.
_CURVED = 1e-4

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
        self._evaluation = evaluation
        self.parts = evaluation.once(SplitDiagonal)
        self.possible = self.parts.possible
        self._sizes = tuple(evaluation.loss.layout.sizes)
        self._kinds: dict[bool, tuple[str, ...]] = {}
        self._noise: dict[bool, float] = {}
        self._curved: set[int] | None = None

    def moments(
        self,
        operator: HessianOperator,
        budget: int,
        tolerance: float | None,
        seed: int,
        shrink: bool,
        progress: Progress | None = None,
        axes: list[Axes] | None = None,
    ) -> Moments:
        """Diagonal and trace for a budget of products.

        A backward pass costs about half of a product: the first part gets as many
        passes as the budget has products, or is exact where that takes no more than
        twice as many; the second part gets half of the budget. Below four products no
        error can be given, and a shrunk diagonal is that of the first part alone.

        Args:
            operator: that of the evaluation, whose products are samples of the whole.
            budget: number of products, or what costs as much.
            tolerance: relative error at which to stop, not before 16 products.
            seed: a seed of the random signs.
            shrink: whether the second part is shrunk; the diagonal is unbiased if not.
            progress: told after each few samples; says whether to go on.
            axes: of each variable, that the diagonal is taken in.
        """
        going = _Going(progress, budget)
        spent = budget if tolerance is None else min(budget, MINIMUM_SAMPLES)
        kinds = self.kinds(operator, shrink)
        plan = functools.partial(_Plan.of, kinds=kinds, shrink=shrink)
        exact, passes = None, plan(budget).passes
        if self._is_exact(passes):
            passes = int(self.parts.num_outputs)
            exact = self.parts.exact_gauss_newton(axes)
            plan = functools.partial(plan, exact=math.ceil(passes / 2))
        g = self._samples("", operator, seed, axes=axes)
        rest = [self._samples(kind, operator, seed, axes=axes) for kind in kinds]
        while True:
            now = plan(spent)
            if exact is not None:
                quiet = estimators.exact_part(exact, self._sizes)
            else:
                quiet = g.drawn(now.passes, going.with_price(0.5))
            noisy = [
                samples.drawn(count, going.with_price(1.0), quiet.mean)
                for samples, count in zip(rest, now.by_kind, strict=True)
                if count
            ]
            cost = (quiet.count or passes) / 2 + sum(part.count for part in noisy)
            found = estimators.summed(
                quiet,
                noisy,
                math.ceil(cost),
                self._sizes,
                shrink,
                self.parts.alike,
            )
            if not going.on or spent >= budget or _precise(found, tolerance):
                self._look_whether_chosen_still(shrink, quiet, noisy)
                return found
            spent = min(2 * spent, budget)

    def _is_exact(self, passes: int) -> bool:
        """Whether the first part is exact where it gets so many passes."""
        return bool(self.parts.num_outputs <= 2 * passes)

    def kinds(self, operator: HessianOperator, shrink: bool) -> tuple[str, ...]:
        """The kinds of samples of the second part, or of the whole, the quietest first.

        Found out by a few samples of each, and kept until the noise is another: so it
        is the same from probe to probe.

        Args:
            operator: that of the evaluation.
            shrink: whether the samples are to be shrunk towards the first part. Those
                of the whole are of use only then.
        """
        if shrink not in self._kinds:
            self._kinds[shrink] = self._quietest(operator, shrink)
        return self._kinds[shrink]

    def _quietest(self, operator: HessianOperator, shrink: bool) -> tuple[str, ...]:
        if shrink and not self.parts.alike and sum(self._sizes) > _LARGE:
            return (WHOLE,)
        rest = tuple(self.parts.rest)
        choices = [(kind,) for kind in rest] + [rest] * (len(rest) > 1)
        if shrink:
            choices.append((WHOLE,))
        if len(choices) == 1:
            return choices[0]
        g = self._try("", operator)
        tried = {
            kind: self._try(kind, operator, g.mean)
            for kind in dict.fromkeys(itertools.chain(*choices))
        }
        # Of one product, and of a backward pass.
        noise, of_g = {kind: one.noise for kind, one in tried.items()}, g.noise
        means = [
            one.mean - (g.mean if kind == WHOLE else 0.0) for kind, one in tried.items()
        ]
        # The product of independent samples is the square of what they are samples of.
        pairs = [self._by_block(x, y) for x, y in itertools.combinations(means, 2)]
        size = np.maximum(_SHARE * self._by_block(g.mean), np.median(pairs, axis=0))
        risks = []
        for kinds in choices:
            plan = _Plan.of(_PLANNED, kinds, shrink)
            of_mean = _harmonic([noise[kind] for kind in kinds]) / plan.products
            of_quiet = (not self._is_exact(plan.passes)) * of_g / plan.passes
            if WHOLE in kinds:
                risks.append(_risk(of_mean, size + of_quiet))
            else:
                risks.append(
                    of_quiet.sum() + (_risk(of_mean, size) if shrink else of_mean.sum())
                )
        # They are as long as the diagonal, and not needed again.
        self._evaluation.meanwhile(SplitMoments).clear()
        best = choices[int(np.argmin(risks))]
        return tuple(sorted(best, key=lambda kind: float(noise[kind].sum())))

    def curved(self, operator: HessianOperator) -> set[int]:
        """Variables, by number, whose curvature is not all in the first part.

        Found out once: what is curved stays so. Of others only certificates can tell.

        Args:
            operator: that of the evaluation.
        """
        if self._curved is None:
            self._curved = set()
            if "layers" in self.parts.rest:
                g = self._try("", operator).mean
                rest = self._try("layers", operator, g).mean
                sizes = self._by_block(rest), _CURVED**2 * self._by_block(g)
                self._curved.update(np.flatnonzero(np.greater(*sizes)).tolist())
        return self._curved

    def _try(
        self, kind: str, operator: HessianOperator, quiet: Tensor | None = None
    ) -> "_Tried":
        """A few samples to choose by, which are drawn once."""
        tried: dict[str, _Tried] = self._evaluation.meanwhile(SplitMoments)
        if kind in tried:
            return tried[kind]
        count = min(max(_LEAST, math.ceil(_TELLING / sum(self._sizes))), _MOST_TRIED)
        if kind in ("", WHOLE):
            # As many as are compiled together.
            count = math.ceil(count / estimators.GROUP) * estimators.GROUP
        samples = self._samples(kind, operator, 0, _CHOICE)
        going = _Going(None, 0).with_price(0.0)
        part = samples.drawn(count, going, quiet)
        # No more of it: each vector counts in a large model.
        tried[kind] = _Tried(part.mean, part.count * part.noise(self._sizes))
        return tried[kind]

    def _look_whether_chosen_still(
        self, shrink: bool, quiet: estimators.Part, noisy: list[estimators.Part]
    ) -> None:
        """Forgets what was chosen if the noise is another by now."""
        known = [part for part in noisy if part.count > 1]
        if not known:
            return
        size = self._by_block(quiet.mean).sum()
        if not size > 0:
            return
        noise = sum(part.count * part.noise(self._sizes).sum() for part in known)
        now = float(noise / len(known) / size)
        then = self._noise.setdefault(shrink, now)
        if not then / _CHANGED <= now <= then * _CHANGED:
            self._kinds.pop(shrink, None)
            del self._noise[shrink]

    def _by_block(self, x: Tensor, y: Tensor | None = None) -> _Array:
        """Sums of squares by variable, or of products."""
        return estimators.block_products(x, x if y is None else y, self._sizes)

    def _samples(
        self,
        kind: str,
        operator: HessianOperator,
        seed: int,
        purpose: int | None = None,
        axes: list[Axes] | None = None,
    ) -> estimators.PartSamples:
        """Samples of the second part by their kind, or of the first part without."""
        usual = _REST if kind else _GAUSS_NEWTON
        key = estimators.seed_key(seed, usual if purpose is None else purpose)
        if kind == WHOLE:
            along: HessianOperator | TurnedOperator = operator
            if axes is not None:
                layout = operator.evaluation.loss.layout
                along = TurnedOperator(operator, layout, axes)
            return estimators.PartSamples(
                functools.partial(_of_whole, along, key), self._sizes, whole=True
            )
        samples = self.parts.rest[kind] if kind else self.parts.gauss_newton
        # One of the kinds that are tried is chosen.
        tried = bool(kind) and purpose == _CHOICE
        draw: Callable[..., Tensor] = samples.once if tried else samples
        return estimators.PartSamples(
            functools.partial(draw, key, axes=axes), self._sizes
        )


def _of_whole(
    operator: HessianOperator | TurnedOperator, key: Tensor, start: int, width: int
) -> Tensor:
    products = estimators.Products(operator)
    with products.working():
        signs = products.signs(key, start, width)
        return signs * products.rows(signs)


class _Tried(NamedTuple):
    """What a few samples showed: their mean, and the noise of one of them by block."""

    mean: Tensor
    noise: _Array


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


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What a budget is spent on.

    Attributes:
        passes: backward passes of the first part, for half the price of a product.
        by_kind: products for samples of each kind.
    """

    passes: int
    by_kind: tuple[int, ...]

    @property
    def products(self) -> int:
        return sum(self.by_kind)

    @classmethod
    def of(
        cls,
        budget: int,
        kinds: tuple[str, ...],
        shrink: bool,
        exact: int | None = None,
    ) -> "_Plan":
        """The plan for kinds of samples of the second part, or of the whole.

        Half of the budget is for each of the parts, and what an exact first part leaves
        of its half for the second; samples of the whole need the first part only to be
        shrunk towards it, and leave it an eighth.

        Args:
            budget: number of products, or what costs as much.
            kinds: the kinds of samples.
            shrink: whether the second part is shrunk.
            exact: products that the exact first part is worth, if it is not sampled.
        """
        if budget < 2 * _LEAST:
            count = int(not shrink)
            passes = 2 * budget if shrink else budget
        elif WHOLE in kinds:
            count = budget - max(1, budget // 8)
            passes = 2 * (budget - count)
        else:
            count, passes = budget // 2, budget
            if exact is not None:
                count = max(count, budget - exact)
        if count < _LEAST * len(kinds):
            return cls(passes, (count,) + (0,) * (len(kinds) - 1))
        by_kind = ((count + k) // len(kinds) for k in range(len(kinds)))
        return cls(passes, tuple(by_kind))


def _harmonic(noise: list[_Array]) -> _Array:
    """Noise of one sample, when kinds share samples and are weighted by their noise."""
    if len(noise) == 1:
        return noise[0]
    first, second = noise
    total = first + second
    both: _Array = 2 * first * second / np.where(total > 0, total, 1)
    return both


def _risk(noise: _Array, limit: _Array) -> float:
    """The squared error that is left of parts of a size when they are shrunk."""
    total = noise + limit
    return float(np.sum(noise * limit / np.where(total > 0, total, 1)))
