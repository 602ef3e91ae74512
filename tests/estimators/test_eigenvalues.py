"""Extreme eigenvalues against dense `eigvalsh`."""

import matrices
import numpy as np
import pytest
import scipy.sparse.linalg

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

    def progress(*done_and_total):
        calls.append(done_and_total)
        return True

    found = estimators.eigenvalues(matrices.named("network", 100), 2, progress=progress)
    assert [done for done, _ in calls][:3] == [1, 2, 3]
    assert calls[-1] == (found.num_matvecs, None)


def test_budget():
    dense = matrices.matrix(np.r_[[50.0], np.linspace(-1, 1, 199)])
    with pytest.warns(UserWarning, match="1 of 2 eigenvalues converged"):
        found = estimators.eigenvalues(dense, 2, 1e-10, max_matvecs=40)
    assert found.num_matvecs <= 40
    values = np.linalg.eigvalsh(dense)
    np.testing.assert_allclose(found.values[0], 50)
    assert found.residual_norms[0] < 50e-10 < found.residual_norms[1]
    assert np.abs(values - found.values[1]).min() <= found.residual_norms[1]
    with pytest.warns(UserWarning, match="0 of 2 eigenvalues converged"):
        found = estimators.eigenvalues(dense, 2, max_matvecs=1)
    assert len(found.values) == 1


@pytest.mark.parametrize("name", ["network", "indefinite"])
def test_as_few_products_as_scipy(name):
    """A restart that forgets too much would show, or one test too strict."""
    dense = matrices.named(name, 300)
    count = []
    linear = scipy.sparse.linalg.LinearOperator(
        dense.shape, lambda v: count.append(1) or dense @ v, dtype=np.float64
    )
    reference = scipy.sparse.linalg.eigsh(linear, 6, tol=1e-6)[0]
    found = estimators.eigenvalues(dense, 6, 1e-6)
    np.testing.assert_allclose(np.sort(found.values), reference, rtol=1e-8)
    assert found.num_matvecs <= 1.3 * len(count), (found.num_matvecs, len(count))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("which", ["magnitude", "algebraic", "both"])
@pytest.mark.parametrize("name", ["network", "indefinite", "giant"])
def test_the_best_pairs_when_told_to_stop(name, which, dtype):
    """Bounds that hold, and that shrink with what has been spent."""
    dense = matrices.named(name, 200, dtype=dtype)
    wide = dense.astype(np.float64)
    values = np.linalg.eigvalsh(wide)
    scale = np.abs(values).max()
    rounding = {"float32": 1e-5, "float64": 1e-12}[dtype] * scale
    whole = estimators.eigenvalues(dense, 4, 1e-5, which).num_matvecs
    bounds = []
    # The residuals take the last four.
    for after in (1, 3, 20, whole // 2, whole - 4):
        found = estimators.eigenvalues(
            dense, 4, 1e-5, which, True, progress=matrices.stop_after(after)
        )
        assert found.num_matvecs == after
        assert len(found.values) == min(4, after)
        vectors = found.eigenvectors
        np.testing.assert_allclose(np.linalg.norm(vectors, axis=0), 1, atol=1e-4)
        residuals = np.linalg.norm(wide @ vectors - vectors * found.values, axis=0)
        np.testing.assert_allclose(
            found.residual_norms, residuals, rtol=1e-4, atol=rounding
        )
        order = found.values if which != "magnitude" else np.abs(found.values)
        assert np.all(np.diff(order) <= 0)
        for value, bound in zip(found.values, found.residual_norms, strict=True):
            assert np.abs(values - value).min() <= bound + rounding
        bounds.append(found.residual_norms.max())
    # Almost there: the residuals of a converged pair are below 1e-5 times its value.
    assert bounds[-1] < 1e-3 * scale
    assert bounds[-1] < 0.1 * bounds[1]


def test_small_operators_are_solved_or_not():
    """They are formed as a whole, and half a matrix has no eigenvalues."""
    dense = np.diag(np.arange(10.0))
    found = estimators.eigenvalues(dense, 2, progress=matrices.stop_after(10))
    np.testing.assert_allclose(found.values, [9, 8])
    with pytest.raises(KeyboardInterrupt):
        estimators.eigenvalues(dense, 2, progress=matrices.stop_after(8))


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


def test_repr_tells_values_bounds_and_price():
    found = estimators.eigenvalues(np.diag([3.0, 2.0, 1.0]), 2)
    assert repr(found).startswith("<Eigenvalues 3 ± ")
    assert f", 2 ± {found.residual_norms[1]:.1g} (" in repr(found)
    assert repr(found).endswith(f"({found.num_matvecs} matvecs)>")
