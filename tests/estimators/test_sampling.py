"""The loop behind all averages: when it stops, what it keeps, what it leaves alone."""

import random

import keras
import matrices
import numpy as np
import pytest
from keras import ops

from keras_curvature import backend, estimators
from keras_curvature.estimators import sampling
from keras_curvature.estimators.products import GROUP


def trace(dense, *arguments, **more):
    return estimators.hutchinson_moments(
        dense, *arguments, judged=("trace",), **more
    ).trace


def diagonal(dense, *arguments, **more):
    return estimators.hutchinson_moments(
        dense, *arguments, judged=("diagonal",), diagonal=True, **more
    ).diagonal


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
    estimate = diagonal(dense, tolerance=0.05)
    norms = [
        np.linalg.norm(ops.convert_to_numpy(x))
        for x in (estimate.standard_error, estimate.value)
    ]
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
    estimate = diagonal(dense, 101)
    expected = np.sqrt(((dense - np.diag(np.diag(dense))) ** 2).sum(1) / 101)
    # Known to 1/sqrt(200) each; rounding adds 3000 · 2^-23 to a spread of 1.
    np.testing.assert_allclose(
        ops.convert_to_numpy(estimate.standard_error), expected, rtol=6 * 0.07
    )


def test_what_is_known_when_told_to_stop():
    dense = matrices.named("network")
    for products, spent in ((8, 8), (5, 8), (0, GROUP)):
        stopped = trace(dense, 100, progress=matrices.stop_after(products))
        expected = trace(dense, spent)
        assert stopped.num_matvecs == spent
        assert stopped.value == expected.value
        assert stopped.standard_error == expected.standard_error > 0


def test_progress():
    calls = []

    def progress(*done_and_total):
        calls.append(done_and_total)
        return True

    dense = matrices.named("network", 10)
    trace(dense, 10, progress=progress)
    estimators.exact_moments(dense, progress=progress)
    assert calls == 2 * [(4, 10), (8, 10), (10, 10)]


def test_global_random_state_is_left_alone():
    """Neither written nor read: Python's, NumPy's, Keras' and the framework's."""
    dense = matrices.named("network", 80)

    def figures():
        return (
            trace(dense, 6).value,
            estimators.DominantSubspace().update(dense, 12).trace.value,
            estimators.eigenvalues(dense, 2).values[0],
            estimators.spectral_density(dense, 5, 2).moment(1).value,
        )

    def draws():
        own = [random.random(), np.random.rand(), float(keras.random.uniform(()))]
        if keras.backend.backend() == "tensorflow":
            import tensorflow as tf

            own.append(float(tf.random.uniform(())))
        elif keras.backend.backend() == "torch":
            import torch

            own.append(float(torch.rand(())))
        return own

    keras.utils.set_random_seed(1)
    expected = draws()
    keras.utils.set_random_seed(1)
    one = figures()
    assert draws() == expected
    keras.utils.set_random_seed(2)
    assert figures() == one


@pytest.mark.skipif(
    keras.backend.backend() == "torch", reason="PyTorch compiles nothing"
)
def test_nothing_is_compiled_again():
    dense = matrices.named("network", 70)
    subspace = estimators.DominantSubspace()

    def figures(seed):
        diagonal(dense, 16 + seed * 4, tolerance=1e-9, seed=seed)
        subspace.update(dense, 12, seed=seed)
        estimators.spectral_density(dense, 5, 2, seed=seed)
        estimators.eigenvalues(dense, 2, seed=seed)

    before = backend.num_traces()
    figures(0)
    subspace.update(dense, 12)  # The first one had to find the subspace.
    made = backend.num_traces()
    assert made > before
    for seed in range(1, 3):
        figures(seed)
    assert backend.num_traces() == made


def test_samples_of_the_diagonal():
    """Means and errors by hand, whatever the grouping; blocks add up."""
    rng = np.random.default_rng(0)
    samples = rng.standard_normal((10, 200)) + np.arange(10.0)[:, None]

    def draw(start, width):
        return backend.array(samples.T[start : start + width], "float64")

    moments = estimators.sampled_moments(draw, 7, block_sizes=(4, 6))
    assert moments.num_matvecs == 7 and moments.squared_frobenius_norm is None
    for estimate, parts in (
        (moments.diagonal, samples[:, :7]),
        (moments.trace, samples[:, :7].sum(0)),
        (moments.trace.blocks[0], samples[:4, :7].sum(0)),
        (moments.trace.blocks[1], samples[4:, :7].sum(0)),
    ):
        np.testing.assert_allclose(
            ops.convert_to_numpy(estimate.value), parts.mean(-1), rtol=1e-12
        )
        np.testing.assert_allclose(
            ops.convert_to_numpy(estimate.standard_error),
            parts.std(-1, ddof=1) / 7**0.5,
            rtol=1e-10,
        )
    stopped = estimators.sampled_moments(draw, 200, progress=matrices.stop_after(5))
    assert stopped.num_matvecs == 8
    precise = estimators.sampled_moments(draw, 200, tolerance=0.05)
    assert 16 <= precise.num_matvecs < 200
    assert precise.diagonal.relative_standard_error <= 0.05
    with pytest.raises(ValueError, match="add up to P = 10"):
        estimators.sampled_moments(draw, 7, block_sizes=(4, 4))


def test_moments_of_a_known_diagonal():
    diagonal = backend.array(np.arange(10.0))
    moments = estimators.moments_of_diagonal(diagonal, 3, (4, 6))
    assert moments.trace.value == 45 and moments.trace.standard_error == 0
    assert [b.value for b in moments.trace.blocks] == [6, 39]
    assert moments.diagonal.relative_standard_error == 0
    assert moments.num_matvecs == moments.trace.num_matvecs == 3
    with pytest.raises(ValueError, match="add up to P = 10"):
        estimators.moments_of_diagonal(diagonal, 3, (4, 4))


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
