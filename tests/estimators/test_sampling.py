"""The loop behind all averages: when it stops, what it keeps, what it leaves alone."""

import random

import matrices
import numpy as np
import pytest
import tensorflow as tf

from keras_curvature import estimators
from keras_curvature.estimators import diagonal, sampling
from keras_curvature.estimators.products import GROUP, _draw


def trace(dense, *arguments, **more):
    return estimators.hutchinson_moments(
        dense, *arguments, judged=("trace",), **more
    ).trace


def test_stops_at_the_tolerance():
    dense = matrices.named("indefinite", 30) + 5 * np.eye(30)
    estimate = trace(dense, 1000, tolerance=0.01)
    assert estimate.relative_standard_error <= 0.01
    assert sampling.MINIMUM_SAMPLES < estimate.num_matvecs < 1000
    before = trace(dense, estimate.num_matvecs - GROUP)
    assert before.relative_standard_error > 0.01


def test_stops_at_the_budget():
    dense = matrices.named("indefinite")
    estimate = trace(dense, 10, tolerance=1e-9)
    assert estimate.num_matvecs == 10
    assert trace(dense).num_matvecs == sampling.DEFAULT_MATVECS


def test_the_tolerance_is_judged_by_the_whole_diagonal():
    dense = matrices.named("indefinite", 30) + 5 * np.eye(30)
    estimate = estimators.hutchinson_diagonal(dense, tolerance=0.05)
    norms = [np.linalg.norm(x) for x in (estimate.standard_error, estimate.value)]
    assert norms[0] / norms[1] <= 0.05


def test_does_not_stop_by_luck():
    """`vᵀAv` takes two values: the first n samples agree with probability 2^(1−n).

    A rule that trusts two samples stops at once for half of these seeds.
    """
    dense = np.array([[1.0, 0.9], [0.9, 1.0]])
    for seed in range(16):
        estimate = trace(dense, 64, tolerance=0.05, seed=seed)
        assert estimate.num_matvecs >= sampling.MINIMUM_SAMPLES
        assert estimate.standard_error > 0


def test_errors_at_a_random_stop_are_calibrated():
    dense = matrices.named("indefinite", 30) + 2 * np.eye(30)
    inside = []
    for seed in range(100):
        estimate = trace(dense, tolerance=0.1, seed=seed)
        error = abs(estimate.value - np.trace(dense))
        inside.append(error <= 2 * estimate.standard_error)
    # Stopping where the error looks small costs a little: 0.92 ± 0.027.
    assert np.mean(inside) > 0.84


def test_moments_survive_a_mean_that_dwarfs_the_spread():
    """In float32 a sum of squares would leave nothing of a spread of 1 at 3000."""
    rng = np.random.default_rng(0)
    off = rng.standard_normal((30, 30))
    dense = (3000 * np.eye(30) + (off + off.T) / 8).astype("float32")
    estimate = estimators.hutchinson_diagonal(dense, 101)
    expected = np.sqrt(((dense - np.diag(np.diag(dense))) ** 2).sum(1) / 101)
    # Known to 1/sqrt(200) each; rounding adds 3000 · 2^-23 to a spread of 1.
    np.testing.assert_allclose(estimate.standard_error, expected, rtol=6 * 0.07)


def test_an_interruption_returns_what_is_known():
    dense = matrices.named("network")
    estimate = trace(matrices.Interrupted(dense, 8), 100)
    expected = trace(dense, 8)
    assert estimate.num_matvecs == 8
    np.testing.assert_allclose(estimate.value, expected.value, rtol=1e-12)
    np.testing.assert_allclose(
        estimate.standard_error, expected.standard_error, rtol=1e-12
    )
    with pytest.raises(KeyboardInterrupt):
        trace(matrices.Interrupted(dense, 0), 100)
    with pytest.raises(KeyboardInterrupt):
        estimators.exact_moments(matrices.Interrupted(dense, 8))


def test_progress():
    calls = []
    dense = matrices.named("network", 10)
    trace(dense, 10, progress=lambda *x: calls.append(x))
    assert calls == [(4, 10), (8, 10), (10, 10)]
    calls.clear()
    estimators.exact_moments(dense, progress=lambda *x: calls.append(x))
    assert calls == [(4, 10), (8, 10), (10, 10)]


def test_global_random_state_is_left_alone():
    def state():
        return random.getstate(), np.random.get_state()[1].tolist()

    dense = matrices.named("network")
    random.seed(1)
    np.random.seed(1)
    tf.random.set_seed(1)
    before, expected = state(), tf.random.uniform((3,)).numpy()
    tf.random.set_seed(1)
    results = [trace(dense, 6).value]
    estimators.DominantSubspace().update(dense, 12)
    estimators.eigenvalues(matrices.named("network", 80), 2)
    estimators.spectral_density(dense, 5, 2)
    assert state() == before
    np.testing.assert_array_equal(tf.random.uniform((3,)), expected)
    # And it is not read either.
    random.seed(2)
    np.random.seed(2)
    tf.random.set_seed(2)
    results.append(trace(dense, 6).value)
    assert results[0] == results[1]


def test_nothing_is_traced_again():
    compiled = [
        diagonal._moments,
        sampling._merge,
        sampling._norms,
        _draw("signs", GROUP, "float64"),
    ]
    dense = matrices.named("network", 40)
    estimators.hutchinson_diagonal(dense, 8, tolerance=1e-9, seed=0)
    before = [c.traces() for c in compiled]
    for seed in range(1, 4):
        estimators.hutchinson_diagonal(dense, 12 + seed * 4, tolerance=1e-9, seed=seed)
    assert [c.traces() for c in compiled] == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_matvecs": 0}, "num_matvecs=0"),
        ({"num_matvecs": 2.5}, "num_matvecs=2.5"),
        ({"tolerance": 0}, "tolerance=0"),
        ({"tolerance": float("nan")}, "tolerance=nan"),
        ({"seed": -1}, "seed=-1"),
        ({"seed": None}, "seed=None"),
        ({"seed": True}, "seed=True"),
        ({"block_sizes": (3, 4)}, r"add up to P = 10.*\(3, 4\)"),
        ({"block_sizes": ()}, "add up to P = 10"),
        ({"block_sizes": (11, -1)}, "add up to P = 10"),
    ],
)
def test_arguments_are_checked(arguments, message):
    with pytest.raises(ValueError, match=message):
        trace(np.eye(10), **arguments)
