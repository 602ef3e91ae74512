"""Extreme eigenvalues against dense `eigvalsh`."""

import matrices
import numpy as np
import pytest

from keras_curvature import estimators


def expected(values, k, which):
    values = np.sort(values)
    if which == "magnitude":
        return values[np.argsort(-np.abs(values), kind="stable")][:k]
    if which == "algebraic":
        return values[::-1][:k]
    return np.r_[values[::-1][: k - k // 2], values[: k // 2][::-1]]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("which", ["magnitude", "algebraic", "both"])
@pytest.mark.parametrize("size", [20, 100])
@pytest.mark.parametrize("name", ["network", "indefinite", "rank_deficient", "giant"])
def test_equal_to_dense(name, size, which, dtype):
    dense = matrices.named(name, size, dtype=dtype)
    values = np.linalg.eigvalsh(dense.astype(np.float64))
    tolerance = {"float32": 1e-5, "float64": 1e-8}[dtype]
    found = estimators.eigenvalues(
        dense, 5, tolerance, which=which, eigenvectors=True, seed=4
    )
    scale = np.abs(values).max()
    reference = expected(values, 5, which)
    if which == "magnitude":  # Equal magnitudes come in any order.
        np.testing.assert_allclose(
            np.abs(found.values), np.abs(reference), atol=tolerance * scale
        )
    else:
        np.testing.assert_allclose(found.values, reference, atol=tolerance * scale)
    vectors = found.eigenvectors
    np.testing.assert_allclose(vectors.T @ vectors, np.eye(5), atol=1e-6)
    residuals = np.linalg.norm(dense @ vectors - vectors * found.values, axis=0)
    np.testing.assert_allclose(found.residual_norms, residuals, atol=1e-5 * scale)
    for value, residual in zip(found.values, found.residual_norms, strict=True):
        assert np.abs(values - value).min() <= residual + 1e-6 * scale


@pytest.mark.parametrize("size", [10, 100])
def test_zero_identity_and_few_distinct(size):
    found = estimators.eigenvalues(np.zeros((size, size)), 3, eigenvectors=True)
    np.testing.assert_array_equal(found.values, np.zeros(3))
    np.testing.assert_array_equal(found.residual_norms, np.zeros(3))
    assert found.eigenvectors.shape == (size, 3)
    found = estimators.eigenvalues(np.eye(size), 3)
    np.testing.assert_allclose(found.values, np.ones(3), rtol=1e-12)
    clustered = matrices.named("clustered", size)
    np.testing.assert_allclose(
        estimators.eigenvalues(clustered, 3).values, np.full(3, 3.0), rtol=1e-10
    )


def test_reproducible_and_counted():
    operator = matrices.Recorded(matrices.named("network", 100))
    one = estimators.eigenvalues(operator, 3, seed=7)
    assert one.num_matvecs == operator.columns.shape[1]
    assert one.eigenvectors is None
    other = estimators.eigenvalues(operator, 3, seed=7)
    np.testing.assert_array_equal(one.values, other.values)


def test_smaller_than_k():
    found = estimators.eigenvalues(np.diag([1.0, -2.0]), 6)
    np.testing.assert_allclose(found.values, [-2, 1])


def test_progress():
    calls = []
    estimators.eigenvalues(
        matrices.named("network", 100), 2, progress=lambda *x: calls.append(x)
    )
    assert [done for done, _ in calls][:3] == [1, 2, 3]
    assert all(total is None for _, total in calls)


def test_budget():
    dense = matrices.matrix(np.linspace(-1, 1, 200))
    with pytest.raises(RuntimeError, match="No eigenvalue converged.*max_matvecs=20"):
        estimators.eigenvalues(dense, 2, 1e-12, max_matvecs=20)
    dense = matrices.matrix(np.r_[[50.0], np.linspace(-1, 1, 199)])
    with pytest.warns(UserWarning, match="1 of 2 eigenvalues converged"):
        found = estimators.eigenvalues(dense, 2, 1e-10, max_matvecs=40)
    np.testing.assert_allclose(found.values, [50])
    assert found.num_matvecs < 45


def test_arguments_are_checked():
    with pytest.raises(ValueError, match="which='smallest'"):
        estimators.eigenvalues(np.eye(3), which="smallest")
    with pytest.raises(ValueError, match="k=0"):
        estimators.eigenvalues(np.eye(3), 0)
    with pytest.raises(ValueError, match="tolerance=0"):
        estimators.eigenvalues(np.eye(3), tolerance=0)
    for size in (3, 100):
        with pytest.raises(RuntimeError, match="not finite"):
            estimators.eigenvalues(np.full((size, size), np.nan))
