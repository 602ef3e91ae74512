"""A quiet part and a noisy one, made of random numbers whose truth is known."""

import numpy as np
import pytest
from keras import ops

from keras_curvature.estimators import PartSamples, exact_part, summed
from keras_curvature.estimators.shrinkage import random_effects

SIZES = (400, 300, 200, 30, 1)


class Truth:
    """Parts with samples of a given noise, relative to the size of g in each block."""

    def __init__(self, seed, noise, slope=0.2, rest=0.15):
        rng = np.random.default_rng(seed)
        self.rng = rng
        self.g = rng.exponential(size=sum(SIZES)) * np.repeat([1, 5, 0.2, 3, 1], SIZES)
        own = rest * rng.standard_normal(len(self.g))
        self.r = (slope + own) * self.g
        self.noise, self.spread = noise, self.g

    def parts(self, passes=8, kinds=((4, 1.0),)):
        g = PartSamples(self._draw(self.g, 0.3), SIZES).drawn(passes, lambda n: True)
        rest = [
            PartSamples(self._draw(self.r, self.noise * factor), SIZES).drawn(
                count, lambda n: True, g.mean
            )
            for count, factor in kinds
        ]
        return g, rest

    def _draw(self, mean, noise):
        def draw(start, width):
            signs = self.rng.standard_normal((len(mean), width)).T
            return ops.cast(mean + noise * self.spread * signs, "float32")

        return draw


def value(estimate):
    return ops.convert_to_numpy(estimate.value).astype("float64")


def error(estimate):
    return ops.convert_to_numpy(estimate.standard_error).astype("float64")


def squared_distance(truth, moments):
    return np.sum((value(moments.diagonal) - truth.g - truth.r) ** 2)


@pytest.mark.parametrize("noise", [0.01, 0.3, 3.0])
def test_shrinking_is_better_than_both_parts_and_the_first_alone(noise):
    """As good as the better one, whichever that is."""
    distances = []
    for seed in range(8):
        truth = Truth(seed, noise)
        g, rest = truth.parts()
        moments = [
            summed(g, rest, 8, SIZES),
            summed(g, rest, 8, SIZES, shrink=False),
            summed(g, [], 8, SIZES),
        ]
        distances.append([squared_distance(truth, m) for m in moments])
    shrunk, both, first = np.mean(distances, axis=0)
    assert shrunk < 1.05 * min(both, first)


def test_noise_alone_is_hardly_believed():
    """Thirty times g, it may look like a large rest in one block or another."""
    distances = []
    for seed in range(8):
        truth = Truth(seed, 30.0)
        g, rest = truth.parts()
        moments = summed(g, rest, 8, SIZES), summed(g, [], 8, SIZES)
        distances.append([squared_distance(truth, m) for m in moments])
    shrunk, first = np.mean(distances, axis=0)
    noise = 30.0**2 / 4 * np.sum(truth.spread**2)
    assert shrunk < first + noise / 1000


@pytest.mark.parametrize("noise", [1.0, 3.0, 10.0])
def test_a_rest_that_is_seen_is_kept_in_a_block_unlike_all_others(noise):
    """There it is larger than the first part, in the others much smaller."""
    distances = []
    for seed in range(8):
        truth = Truth(seed, noise, slope=0.0, rest=0.1)
        large = slice(SIZES[0], SIZES[0] + 8)
        truth.r[large] *= 80 * noise
        truth.g[large] += truth.g.max()
        g, rest = truth.parts()
        moments = [summed(g, rest, 8, SIZES, shrink) for shrink in (True, False)]
        distances.append([squared_distance(truth, m) for m in moments])
    shrunk, both = np.mean(distances, axis=0)
    assert shrunk < 1.05 * both


class TestASmallBlockWithNextToNoFirstPart:
    """What its few samples say is uncertain, but does not matter for the whole."""

    SMALL = slice(930, 931)

    def found(self, seed, shrink=True):
        truth = Truth(seed, 1.0, slope=0.0)
        truth.g[self.SMALL] *= 1e-3
        truth.r[self.SMALL] = 0.2
        truth.spread = truth.g.copy()
        truth.spread[self.SMALL] = 0.2
        g, rest = truth.parts()
        return truth, summed(g, rest, 8, SIZES, shrink)

    def test_is_believed(self):
        squares = []
        for seed in range(100):
            for shrink in (True, False):
                truth, moments = self.found(seed, shrink)
                distance = (value(moments.diagonal) - truth.g - truth.r)[self.SMALL]
                squares.append(np.sum(distance**2))
        shrunk, plain = np.mean(np.reshape(squares, (-1, 2)), axis=0)
        assert shrunk < 1.05 * plain

    def test_its_errors_cover_the_truth(self):
        covered = []
        for seed in range(100):
            truth, moments = self.found(seed)
            distance = np.abs(value(moments.diagonal) - truth.g - truth.r)
            covered.append((distance <= 2 * error(moments.diagonal))[self.SMALL])
        assert np.mean(covered) > 0.9


@pytest.mark.parametrize("products", [4, 8])
def test_a_rest_larger_than_the_first_part_is_reckoned_with(products):
    """All blocks together show it, each of them hardly."""
    covered = []
    for seed in range(8):
        truth = Truth(seed, 12.0, slope=0.0, rest=3.0)
        g, rest = truth.parts(kinds=((products, 1.0),))
        diagonal = summed(g, rest, 8, SIZES).diagonal
        distance = np.abs(value(diagonal) - truth.g - truth.r)
        covered.append(distance <= 2 * error(diagonal))
    assert np.mean(covered) > 0.9


@pytest.mark.parametrize("alike", [True, False])
def test_a_rest_that_a_block_unlike_all_others_has(alike):
    """Noise hides it there, and the others tell nothing of it."""
    covered = []
    block = slice(SIZES[0] + SIZES[1], sum(SIZES[:3]))
    for seed in range(16):
        truth = Truth(seed, 40.0, slope=0.0, rest=0.1)
        truth.r[block] *= 120
        g, rest = truth.parts(kinds=((3, 1.0),))
        diagonal = summed(g, rest, 4, SIZES, alike=alike).diagonal
        distance = np.abs(value(diagonal) - truth.g - truth.r)
        covered.append((distance <= 2 * error(diagonal))[block])
    # Many of its samples show less than there is.
    assert np.mean(covered) < 0.75 if alike else np.mean(covered) > 0.9


def test_a_rest_that_only_a_small_block_has_is_reckoned_with():
    """Two samples of a single entry tell neither its noise nor what it is."""
    covered, small = [], slice(930, 931)
    for seed in range(200):
        truth = Truth(seed, 1.0, slope=0.0, rest=0.1)
        truth.g[small], truth.r[small] = 0.1, 2.0
        truth.spread = np.abs(truth.g)
        truth.spread[small] = 1.0
        g, rest = truth.parts(kinds=((2, 1.0),))
        diagonal = summed(g, rest, 4, SIZES).diagonal
        distance = np.abs(value(diagonal) - truth.g - truth.r)
        covered.append((distance <= 2 * error(diagonal))[small])
    assert np.mean(covered) > 0.75


class TestSamplesOfTheWhole:
    """The parts cancel: what is left has less noise than the rest has."""

    def moments(self, seed, noise, shrink=True):
        truth = Truth(seed, noise, slope=-0.9, rest=0.2)
        g, _ = truth.parts(passes=2)
        draw = truth._draw(truth.g + truth.r, noise)
        whole = PartSamples(draw, SIZES, whole=True).drawn(6, lambda n: True, g.mean)
        return truth, whole, summed(g, [whole], 8, SIZES, shrink)

    @pytest.mark.parametrize("noise", [0.01, 0.1, 0.3, 1.0, 10.0])
    def test_shrinking_them_is_better_than_their_mean(self, noise):
        distances = []
        for seed in range(8):
            truth, whole, shrunk = self.moments(seed, noise)
            mean = ops.convert_to_numpy(whole.mean).astype("float64")
            both = np.sum((mean - truth.g - truth.r) ** 2)
            distances.append([squared_distance(truth, shrunk), both])
        shrunk, both = np.mean(distances, axis=0)
        assert shrunk < 1.05 * both

    @pytest.mark.parametrize("noise", [0.1, 1.0])
    def test_errors_cover_the_truth(self, noise):
        within, beyond = [], []
        for seed in range(6):
            truth, _, found = self.moments(seed, noise)
            distance = np.abs(value(found.diagonal) - truth.g - truth.r)
            within.append(np.mean(distance <= 2 * error(found.diagonal)))
            beyond.append(np.mean(distance > 6 * error(found.diagonal)))
        assert 0.92 <= np.mean(within) <= 1
        assert np.mean(beyond) < 0.01

    def test_diagonal_and_trace_are_their_means_without_shrinking(self):
        _, whole, found = self.moments(0, 1.0, shrink=False)
        np.testing.assert_allclose(
            found.diagonal.value, ops.convert_to_numpy(whole.mean), rtol=1e-6
        )
        total = whole.traces.sum(axis=1).mean()
        assert found.trace.value == pytest.approx(total, rel=1e-6)


@pytest.mark.parametrize("shrink", [True, False])
@pytest.mark.parametrize("noise", [0.03, 0.5, 10.0])
def test_errors_cover_the_truth(noise, shrink):
    within, beyond = [], []
    for seed in range(6):
        truth = Truth(seed, noise)
        found = summed(*truth.parts(), 8, SIZES, shrink).diagonal
        distance = np.abs(value(found) - truth.g - truth.r)
        within.append(np.mean(distance <= 2 * error(found)))
        beyond.append(np.mean(distance > 6 * error(found)))
    assert 0.92 <= np.mean(within) <= 1
    assert np.mean(beyond) < 0.01


@pytest.mark.parametrize("dead", [1e-16, 1e-7, 1e-4])
def test_a_part_that_vanishes_tells_nothing_of_other_blocks(dead):
    """A layer behind one that is dead has a g of rounding, and any r over it."""
    truth, start = Truth(0, 1.0), sum(SIZES[:-1])
    truth.g[:start] *= dead
    truth.r[:start] = 1e-3
    truth.spread = np.full_like(truth.g, 1e-3)
    rounded = truth.g.copy()
    truth.spread[:start] = 0.3 * truth.g[:start]
    g = PartSamples(truth._draw(rounded, 1.0), SIZES).drawn(8, lambda n: True)
    truth.spread = np.full_like(truth.g, 1e-3)
    rest = PartSamples(truth._draw(truth.r, 1.0), SIZES).drawn(
        2, lambda n: True, g.mean
    )
    found = value(summed(g, [rest], 8, SIZES).diagonal)
    assert np.abs(found - truth.g - truth.r).max() < 0.02 * truth.g[-1]


def test_without_shrinking_there_is_no_bias():
    truth = Truth(0, 2.0)
    found = [value(summed(*truth.parts(), 8, SIZES, False).diagonal) for _ in range(64)]
    deviation = np.std(found, axis=0, ddof=1) / 8
    distance = np.abs(np.mean(found, axis=0) - truth.g - truth.r)
    assert np.all(distance <= 6 * deviation)


def test_the_trace_is_that_of_both_parts():
    truth = Truth(0, 1.0)
    g, rest = truth.parts(passes=32, kinds=((32, 1.0),))
    shrunk, both = summed(g, rest, 8, SIZES), summed(g, rest, 8, SIZES, shrink=False)
    assert shrunk.trace.value == both.trace.value
    total = np.sum(truth.g + truth.r)
    assert abs(both.trace.value - total) <= 4 * both.trace.standard_error
    blocks = [block.value for block in both.trace.blocks]
    np.testing.assert_allclose(np.sum(blocks), both.trace.value, rtol=1e-6)
    assert len(blocks) == len(SIZES)


def test_the_quieter_kind_of_samples_counts_for_more():
    distances = []
    for seed in range(8):
        truth = Truth(seed, 0.5)
        g, rest = truth.parts(kinds=((4, 1.0), (4, 20.0)))
        moments = [summed(g, part, 8, SIZES, False) for part in (rest, rest[:1])]
        distances.append([squared_distance(truth, m) for m in moments])
    both, quieter = np.mean(distances, axis=0)
    assert both < 1.2 * quieter


def test_what_is_exact_stays_so():
    truth = Truth(0, 0.0)
    g = exact_part(ops.cast(truth.g, "float32"), SIZES)
    _, rest = truth.parts()
    found = summed(g, rest, 8, SIZES).diagonal
    np.testing.assert_allclose(value(found), truth.g + truth.r, rtol=1e-4)
    assert error(found).max() <= 1e-4 * truth.g.max()


def test_errors_need_two_samples_of_each_part():
    truth = Truth(0, 1.0)
    for g, rest in (truth.parts(passes=1), truth.parts(kinds=((1, 1.0),))):
        assert summed(g, rest, 2, SIZES).diagonal.standard_error is None
    g, _ = truth.parts()
    alone = summed(g, [], 2, SIZES)
    assert alone.diagonal.standard_error is None
    assert alone.trace.standard_error is None
    np.testing.assert_array_equal(value(alone.diagonal), ops.convert_to_numpy(g.mean))


def test_random_effects():
    """Equal numbers are averaged, different ones left, and unseen ones drawn along."""
    values = np.array([1.1, 0.9, 1.0, 7.0])
    drawn, doubt = random_effects(values, np.array([0.01, 0.01, 0.01, np.inf]))
    np.testing.assert_allclose(drawn, 1.0, atol=0.04)
    np.testing.assert_allclose(doubt, (0.01 / 3) ** 0.5, rtol=0.05)
    apart = np.array([1.0, 5.0, -3.0, 9.0])
    drawn, doubt = random_effects(apart, np.full(4, 1e-4))
    np.testing.assert_allclose(drawn, apart, atol=1e-3)
    np.testing.assert_allclose(doubt, 0.01, rtol=0.01)
    # What is not seen is thought to be small.
    drawn, doubt = random_effects(np.array([3.0, -1.0]), np.array([100.0, 100.0]))
    np.testing.assert_allclose(drawn, 0.0, atol=0.01)
    np.testing.assert_allclose(doubt, 0.3, rtol=0.01)
    drawn, doubt = random_effects(np.array([3.0]), np.array([0.0]))
    assert drawn[0] == 3.0
    assert doubt[0] == 0.0
