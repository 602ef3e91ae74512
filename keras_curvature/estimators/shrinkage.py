"""A diagonal from a quiet part and a noisy one, with the least expected error.

Of `diag H = g + r` the part g is known with little noise, and r, which is small, from
samples with much. Their plain sum is unbiased, and often worse than g alone. Here r is
believed as far as its samples agree, block by block (a block is a variable):

    r̃ = ρ g + w (r̂ − ρ g)

1. `r̂` is the mean of the samples; where there are two kinds of them, both means with
   weights inverse to their variances in the block. Samples of all of H will do as well,
   with `ĝ` taken from their mean: right where g and r cancel, so that H has less noise
   than r has.
2. `ρ`, the slope of r over g, is one number for thousands of entries and is seen where
   no entry is. The slopes of the blocks are drawn to their common mean as far as noise
   explains their differences (see `random_effects`), and that to zero as far as it is
   not seen.
3. `w = d² / (d² + noise²)`, with the size d of `r − ρ g` that the samples show, is the
   weight of James and Stein (1961, "Estimation with quadratic loss") for what is left;
   with samples of all of H the noise of g counts to both squares.

   A block whose noise is small beside the whole diagonal is believed in any case.

The error that is given counts both what is random and what shrinking leaves out: the
mean square of `(1 − w) (r − ρ g)` is what the samples show of it, in the block itself
as far as it can be seen there, and relative to g in all blocks together; in a block of
so few entries that its noise cannot be told from what it is, all that they show. Where
blocks are not alike, no other one tells what a block may hide: there it is as much as
its own noise allows.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np
from keras import ops
from numpy.typing import NDArray

from keras_curvature.backend import Tensor, array, block_numbers, by_entries, compiled
from keras_curvature.estimators.estimate import Estimate
from keras_curvature.estimators.moments import Moments
from keras_curvature.estimators.products import (
    block_products,
    block_sums,
    to_host,
    together,
)
from keras_curvature.estimators.quadratic_forms import students_factor
from keras_curvature.estimators.sampling import Samples

_Array = NDArray[np.float64]

#: Spreads of few samples are themselves uncertain. What many entries (or blocks) show
#: of the noise together counts as this many degrees of freedom in each of them: a
#: moderated variance (Smyth 2004, "Linear models and empirical Bayes methods", eq. 4).
_COMMON = 4

#: Size of `r − ρ g` squared over `‖g‖²` where samples tell nothing of it: what is
#: thought likely, and what the error counts; more where all blocks together show more.
_LIKELY, _POSSIBLE = 0.05, 0.3

#: The same over the mean of `g²` in all blocks: to believe that much of a block adds at
#: most a quarter of it to the squared error of the whole diagonal.
_OF_THE_WHOLE = 0.01

_TINY = np.finfo(np.float64).tiny

#: Likely size of what is relative to g: slopes, and the squares above.
_SCALE = 0.3

#: Slopes beyond count as this: where g is next to nothing, r over g tells nothing.
_STEEPEST = 3.0

#: Blocks whose entries of g are smaller, relative to the largest block's, have no g to
#: compare r with: it may be rounding.
_NO_G = 1e-6

#: Blocks of fewer entries, times degrees of freedom in each, tell nothing of
#: themselves: their noise may be far from what it seems.
_TELLING = 12


@dataclasses.dataclass(frozen=True, eq=False)
class Part:
    """What is known of one part of the diagonal.

    Attributes:
        mean: tensor `(P,)`.
        spread: sum of squared deviations of the samples from it, tensor `(P,)`; zero
            if it is exact.
        count: number of samples; 0 for an exact part.
        traces: their sums over each block, `(count, blocks)`; `(1, blocks)` if exact.
        slopes: their inner products with g in each block over `‖g‖²`, `(count,
            blocks)`; empty for g itself.
        whole: whether it is g + r and not r.
    """

    mean: Tensor
    spread: Tensor
    count: int
    traces: _Array
    slopes: _Array
    whole: bool = False

    @property
    def squared_error(self) -> float:
        """That of the mean, over the spread."""
        return 1 / (self.count * (self.count - 1)) if self.count > 1 else 0.0

    def noise(self, block_sizes: tuple[int, ...]) -> _Array:
        """Squared errors of the mean by block, `(blocks,)`."""
        spread = to_host(block_sums(self.spread[None], block_sizes))[:, 0]
        noise: _Array = self.squared_error * spread
        return noise


def exact_part(diagonal: Tensor, block_sizes: tuple[int, ...]) -> Part:
    """A part that is known.

    Args:
        diagonal: tensor `(P,)`.
        block_sizes: sizes of consecutive groups of coordinates, adding up to P.
    """
    traces = to_host(block_sums(diagonal[None], block_sizes)).T
    return Part(diagonal, ops.zeros_like(diagonal), 0, traces, np.zeros((0, 0)))


class PartSamples:
    """A part that is sampled.

    Args:
        draw: `draw(start, width)` returns the samples `start … start + width − 1`, a
            tensor `(width, P)`.
        block_sizes: sizes of consecutive groups of coordinates, adding up to P.
        whole: whether they are samples of g + r.
    """

    def __init__(
        self,
        draw: Callable[[int, int], Tensor],
        block_sizes: tuple[int, ...],
        whole: bool = False,
    ):
        self._draw, self._block_sizes, self._whole = draw, block_sizes, whole
        self._samples = Samples()
        self._traces: list[_Array] = []
        self._slopes: list[_Array] = []

    def drawn(
        self, count: int, going: Callable[[int], bool], quiet: Tensor | None = None
    ) -> Part:
        """What that many samples tell; those drawn before count.

        Args:
            count: number of samples.
            going: told the number of new samples after each few; whether to draw more.
            quiet: the mean of g, if this is r.
        """
        samples, told = self._samples, _told(self._block_sizes, quiet is not None)
        at_once = together(sum(self._block_sizes))
        while samples.count < count:
            width = min(at_once, count - samples.count)
            drawn = self._draw(samples.count, width)
            samples.add({"diagonal": drawn}, width)
            figures = told(drawn, drawn[0] if quiet is None else quiet)
            self._traces.append(to_host(figures["traces"]).T)
            if quiet is not None:
                self._slopes.append(to_host(figures["slopes"]).T)
            if not going(width):
                break
        return Part(
            samples.means["diagonal"],
            samples.spreads["diagonal"],
            samples.count,
            np.concatenate(self._traces),
            np.concatenate(self._slopes) if self._slopes else np.zeros((0, 0)),
            self._whole,
        )


@functools.lru_cache(maxsize=64)
def _told(
    block_sizes: tuple[int, ...], with_slopes: bool
) -> Callable[[Tensor, Tensor], dict[str, Tensor]]:
    def told(samples: Tensor, quiet: Tensor) -> dict[str, Tensor]:
        figures = {"traces": block_sums(samples, block_sizes)}
        if with_slopes:
            size = block_sums(ops.square(quiet)[None], block_sizes)
            inner = block_sums(samples * quiet, block_sizes)
            figures["slopes"] = inner / ops.where(size > 0, size, 1)
        return figures

    return compiled(told)


def summed(
    quiet: Part,
    noisy: Sequence[Part],
    num_matvecs: int,
    block_sizes: tuple[int, ...],
    shrink: bool = True,
    alike: bool = True,
) -> Moments:
    """The diagonal and the trace from both parts.

    The trace is the unbiased one in any case: a sum over many entries is what even the
    noisy part tells well.

    Args:
        quiet: the part g.
        noisy: the part r by samples of one or two kinds, or the whole of g + r; none
            at all leaves r out.
        num_matvecs: what it took, for the estimates.
        block_sizes: sizes of consecutive groups of coordinates, adding up to P.
        shrink: whether to shrink r; the diagonal is unbiased otherwise.
        alike: whether what is seen of r in some blocks tells of the others.

    Returns:
        A `Moments` without a Frobenius norm. Errors are `None` where r is left out, or
        one of the parts has a single sample.
    """
    blocks, parts = len(block_sizes), [quiet, *noisy]
    means = [part.mean for part in parts]
    seen = bool(noisy) and all(part.count != 1 for part in parts)
    whole = any(part.whole for part in noisy)
    weights = np.full((len(noisy), blocks), 1 / max(len(noisy), 1))
    adjusted, common = _Adjusted.not_at_all(blocks), np.zeros((len(parts), blocks))
    if seen:
        sums = _Sums(
            products=_products(means, block_sizes),
            noise=np.stack([part.noise(block_sizes) for part in parts], 1),
            sizes=np.array(block_sizes),
            whole=whole,
            alike=alike,
        )
        weights, common = sums.weights(), sums.relative_noise
        if shrink:
            degrees = sum(part.count - 1 for part in noisy)
            telling = np.array(block_sizes) * degrees >= _TELLING
            slopes = _slopes(noisy, weights, sums, telling)
            adjusted = sums.adjusted(weights, *slopes, telling)
    # Samples of the whole stand for g as well.
    of_quiet = np.full(blocks, float(not whole))
    rows = [
        of_quiet,
        *weights,
        *common,
        adjusted.slope,
        adjusted.slope_error,
        adjusted.kept,
        adjusted.missed,
    ]
    dtype = ops.dtype(quiet.mean)
    freedom = [max(part.count - 1, 0) for part in parts]
    squared_errors = [part.squared_error for part in parts]
    value, error = _mixed(block_sizes)(
        means,
        [part.spread for part in parts],
        array(np.stack(rows).astype(dtype)),
        array(np.array([freedom, squared_errors], dtype)),
    )
    least = min([n for n in freedom if n], default=1)
    error = error * students_factor(least + _COMMON)
    diagonal = Estimate(value, error if seen else None, num_matvecs)
    trace = _trace([quiet, *noisy], [of_quiet, *weights], num_matvecs, seen)
    return Moments(trace, None, diagonal, num_matvecs)


def _products(means: Sequence[Tensor], block_sizes: tuple[int, ...]) -> _Array:
    """`_Sums.products`: one pair after the other, which takes the memory of one."""
    count = len(means)
    products = np.zeros((count, len(block_sizes), count))
    for i, j in itertools.combinations_with_replacement(range(count), 2):
        products[i, :, j] = block_products(means[i], means[j], block_sizes)
        products[j, :, i] = products[i, :, j]
    return products


@functools.lru_cache(maxsize=64)
def _mixed(block_sizes: tuple[int, ...]) -> Callable[..., tuple[Tensor, Tensor]]:
    """Compiles the diagonal and its error from numbers for each block."""

    def mixed(
        means: list[Tensor], spreads: list[Tensor], rows: Tensor, of_parts: Tensor
    ) -> tuple[Tensor, Tensor]:
        count, degrees, squared_errors = len(means), of_parts[0], of_parts[1]
        # Noise, and what is missed, is partly the same in all entries of a block, and
        # goes partly with g: of g itself all of it does.
        sizes = _mean_squares(ops.square(means[0]), block_sizes)
        rows = ops.concatenate([rows, sizes[None]])

        def of_entries(numbers: Tensor, *parts: Tensor) -> list[Tensor]:
            of_blocks = [
                ops.take(rows[i], numbers, axis=0) for i in range(2 * count + 5)
            ]
            shares, common = of_blocks[:count], of_blocks[count : 2 * count]
            slope, slope_error, kept, missed, size = of_blocks[2 * count :]
            squares = ops.square(parts[0])
            shape = (squares + size) / 2
            shares = [kept * share for share in shares]
            shares[0] = shares[0] + (1 + slope) * (1 - kept)
            value, variance = 0.0, 0.0
            for i, (mean, spread) in enumerate(
                zip(parts[:count], parts[count:], strict=True)
            ):
                usual = common[i] * (shape if i else squares)
                moderated = degrees[i] * squared_errors[i] * spread + _COMMON * usual
                moderated = moderated / (degrees[i] + _COMMON)
                value = value + shares[i] * mean
                variance = variance + ops.square(shares[i]) * moderated
            variance = variance + missed * shape
            variance = variance + squares * ops.square((1 - kept) * slope_error)
            return [value, ops.sqrt(variance)]

        value, error = by_entries(
            of_entries, block_numbers(block_sizes), *means, *spreads
        )
        return value, error

    return compiled(mixed)


def _mean_squares(squares: Tensor, block_sizes: tuple[int, ...]) -> Tensor:
    sizes = np.maximum(np.array(block_sizes), 1)
    sums = block_sums(squares[None], block_sizes)[:, 0]
    return ops.cast(sums / ops.cast(sizes, sums.dtype), squares.dtype)


@dataclasses.dataclass(frozen=True, eq=False)
class _Adjusted:
    """How r is shrunk in each block, arrays `(blocks,)`.

    Attributes:
        slope: ρ.
        slope_error: how far that may be off.
        kept: w.
        missed: the expected squared distance that w leaves out, over `‖g‖²`.
    """

    slope: _Array
    slope_error: _Array
    kept: _Array
    missed: _Array

    @classmethod
    def not_at_all(cls, blocks: int) -> "_Adjusted":
        zero = np.zeros(blocks)
        return cls(zero, zero, np.ones(blocks), zero)


@dataclasses.dataclass(frozen=True, eq=False)
class _Sums:
    """Sums over blocks.

    Attributes:
        products: of the means of all parts with each other, g first, `(parts, blocks,
            parts)`.
        noise: squared errors of each part, `(blocks, parts)`.
        sizes: number of entries of each block.
        whole: whether the samples are those of g + r.
        alike: whether what is seen of r in some blocks tells of the others.
    """

    products: _Array
    noise: _Array
    sizes: NDArray[np.int_]
    whole: bool
    alike: bool

    @property
    def squares(self) -> _Array:
        """`‖g‖²` by block."""
        return self.products[0, :, 0]

    @property
    def known(self) -> NDArray[np.bool_]:
        """Whether there is some g in a block."""
        means = self.squares / np.maximum(self.sizes, 1)
        known: NDArray[np.bool_] = means > _NO_G**2 * means.max(initial=0)
        return known

    @property
    def relative_noise(self) -> _Array:
        """Squared errors of each part over `‖g‖²`, `(parts, blocks)`."""
        squares = self.squares
        noise: _Array = self.noise.T / np.where(squares > 0, squares, 1)
        return noise

    def weights(self) -> _Array:
        """Weights of the kinds of samples of r in each block: inverse noise."""
        known = self.noise.T[1:]
        least = known.min(axis=0)
        # Where one kind has no noise it is right, and so is the other on average.
        inverse = np.where(known > 0, least / np.where(known > 0, known, 1), 1.0)
        inverse = np.where((least == 0) & (known > 0), 0.0, inverse)
        weights: _Array = inverse / inverse.sum(axis=0)
        return weights

    def noise_of(self, weights: _Array) -> _Array:
        """The squared error of the samples' mean in each block."""
        noise: _Array = (weights**2 * self.noise.T[1:]).sum(axis=0)
        return noise

    def adjusted(
        self,
        weights: _Array,
        slope: _Array,
        slope_error: _Array,
        effective: _Array,
        telling: NDArray[np.bool_],
    ) -> _Adjusted:
        """What to keep of `r̂ − ρ g`, and what that leaves out.

        Args:
            weights: of the kinds.
            slope: ρ.
            slope_error: how far that may be off.
            effective: number of independent entries in a block, about.
            telling: whether a block has enough entries to tell of itself.
        """
        squares, noise = self.squares, self.noise_of(weights)
        quiet = self.whole * self.noise.T[0]
        column = np.concatenate([-(slope + self.whole)[None], weights])
        distance = np.einsum("kb,kbl,lb->b", column, self.products, column) - quiet
        known = self.known
        scale = np.where(known, squares, 1)
        relative = (distance - noise) / scale
        doubt = 2 * noise * (noise + 2 * np.maximum(distance - noise, 0)) / effective
        seen = known & (noise > 0)
        own = np.where(seen, relative, 0)
        variance = np.where(seen & telling, doubt / scale**2, np.inf)
        drawn, doubt_of_drawn = random_effects(own, variance)
        # What the other blocks are like is no proof where a block itself tells nothing.
        allowed = np.where(seen, np.maximum(own + np.sqrt(variance), 0), 0)
        all_squares = max(squares[seen].sum(), _TINY)
        together = (distance - noise)[seen].sum() / all_squares
        likely = _surely(together, np.sqrt(doubt[seen].sum()) / all_squares)
        left = np.maximum(drawn, np.minimum(allowed, np.maximum(likely, _LIKELY)))
        # Nor that there is little, where a block itself tells of much.
        error = np.sqrt(np.where(np.isfinite(variance), variance, 0))
        left = np.maximum(left, np.where(telling, _surely(own, error), 0))
        of_whole = _OF_THE_WHOLE * squares.sum() * self.sizes / self.sizes.sum()
        left = np.maximum(left, np.where(seen, of_whole / scale, 0))
        if self.alike:
            possible = np.minimum(allowed, max(_POSSIBLE, together))
        else:
            possible = np.maximum(own, 0) + error
        # Where a block tells nothing of itself, what its samples show may all be so.
        alone = np.where(seen & ~telling, distance / scale, 0)
        possible = np.maximum(possible, alone)
        most = np.maximum(np.maximum(drawn + doubt_of_drawn, possible), left)
        # Of a mean of the whole, ĝ is the other estimate, with its own noise.
        believed = left * squares + quiet
        total = believed + noise
        kept = np.where(total > 0, believed / np.where(total > 0, total, 1), 1.0)
        # Blocks without noise, or without g to compare with, are as the samples say.
        kept = np.where(seen, kept, 1.0)
        return _Adjusted(slope, slope_error, kept, (1 - kept) ** 2 * most)


def _surely(size: _Array, error: _Array) -> _Array:
    """At least how much a size over `‖g‖²` is, about.

    Its error counts against it, the less the smaller it is beside g.
    """
    return size - error * error / (error + 2)


def _slopes(
    noisy: Sequence[Part],
    weights: _Array,
    sums: _Sums,
    telling: NDArray[np.bool_],
) -> tuple[_Array, _Array, _Array]:
    """ρ in each block, its error, and the number of independent entries, about."""
    own = np.zeros(weights.shape[1])
    spread, degrees = np.zeros_like(own), 0
    for part, weight in zip(noisy, weights, strict=True):
        own += weight * (part.slopes.mean(axis=0) - part.whole)
        spread += weight**2 * part.slopes.var(axis=0, ddof=1) / part.count
        degrees += part.count - 1
    # Were all entries independent, the slope would have their variance over `‖g‖²`.
    noise, squares = sums.noise_of(weights), sums.squares
    seen = (noise > 0) & sums.known
    alone = np.where(seen, noise / np.where(seen, squares, 1), 0)
    share = np.where(seen, spread / np.where(seen, alone, 1), 0)
    common = share[seen].mean() if seen.any() else 0.0
    share = (degrees * share + _COMMON * common) / (degrees + _COMMON)
    variance = np.where(seen & telling, share * alone, np.inf)
    slope, error = random_effects(np.clip(own, -_STEEPEST, _STEEPEST), variance)
    effective = 1 / np.clip(share, 1e-9, 1)
    return np.where(seen, slope, 0), np.where(seen, error, 0), effective


def random_effects(values: _Array, variances: _Array) -> tuple[_Array, _Array]:
    """Numbers that are alike, seen with noise, and drawn together.

    Each is a draw from a distribution of unknown mean and variance τ², seen with a
    known variance. τ² is what they scatter more than noise explains (DerSimonian and
    Laird 1986, eq. 8), by more than two standard deviations of it, since variances that
    come from few samples scatter themselves. The mean is thought to be of size
    `_SCALE`, unless it is seen to be larger by more than two standard errors.

    Args:
        values: array `(n,)`.
        variances: array `(n,)`; infinite for what is not seen at all.

    Returns:
        Their most likely values and how far those may be off, two arrays `(n,)`.
    """
    seen = np.isfinite(variances) & (variances > 0)
    exact = variances == 0
    if not seen.any():
        return np.where(exact, values, 0.0), np.zeros_like(values)
    noise = np.where(seen, variances, 1)
    precision = np.where(seen, 1 / noise, 0)
    total, freedom = precision.sum(), seen.sum() - 1
    mean = (precision * values).sum() / total
    scatter = (precision * (values - mean) ** 2).sum()
    room = total - (precision**2).sum() / total
    more = scatter - freedom - 2 * math.sqrt(2 * freedom)
    between = max(0.0, more) / room if room > 0 else 0.0
    precision = np.where(seen, 1 / (between + noise), 0)
    mean = (precision * values).sum() / precision.sum()
    doubt = 1 / precision.sum()
    likely = _SCALE**2 / (_SCALE**2 + doubt)
    trust = max(likely, 1 - 4 * doubt / mean**2 if mean else 0.0)
    mean, doubt = trust * mean, trust * doubt
    own = np.where(seen, between / (between + noise), 0)
    drawn = mean + own * (values - mean)
    random = np.where(seen, own * noise, between)
    error = np.sqrt(random + (1 - own) ** 2 * doubt)
    return np.where(exact, values, drawn), np.where(exact, 0, error)


def _trace(
    parts: Sequence[Part], weights: Sequence[_Array], num_matvecs: int, seen: bool
) -> Estimate:
    """The trace and those of the blocks: sums of means of independent samples."""
    values = sum(w * p.traces.mean(axis=0) for p, w in zip(parts, weights, strict=True))
    errors: list[float | None] = [None] * (1 + len(values))
    if seen:
        variances, doubts = [], []
        for part, weight in zip(parts, weights, strict=True):
            if part.count:
                samples = weight * part.traces
                samples = np.column_stack([samples.sum(axis=1), samples])
                variances.append(samples.var(axis=0, ddof=1) / part.count)
                doubts.append(variances[-1] ** 2 / (part.count - 1))
        variance = np.sum(variances, axis=0)
        # Welch's degrees of freedom of the sum.
        doubt = np.sum(doubts, axis=0)
        degrees = np.where(doubt > 0, variance**2 / np.where(doubt > 0, doubt, 1), 1)
        factors = np.array([students_factor(d) for d in degrees])
        errors = (np.sqrt(variance) * factors).tolist()
    total, *by_block = [
        Estimate(value, error, num_matvecs)
        for value, error in zip(
            [float(np.sum(values)), *values.tolist()], errors, strict=True
        )
    ]
    return dataclasses.replace(total, blocks=tuple(by_block))
