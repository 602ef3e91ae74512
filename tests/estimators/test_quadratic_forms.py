"""Errors of a mean of few forms, from the mixed forms."""

import matrices
import numpy as np
import pytest

from keras_curvature.estimators.quadratic_forms import error_of_mean, students_factor


def forms(dense, count, seeds):
    """`vᵢᵀMvⱼ` and the mixed diagonal terms, for many draws of `count` signs."""
    rng = np.random.default_rng(0)
    v = rng.choice([-1.0, 1.0], size=(seeds, len(dense), count))
    mv = dense @ v
    shares = v * mv
    mixed = np.swapaxes(shares, 1, 2) @ shares
    return np.swapaxes(v, 1, 2) @ mv, mixed, np.swapaxes(mv, 1, 2) @ mv


@pytest.mark.parametrize("count", [2, 3, 4, 8])
@pytest.mark.parametrize("name", ["network", "indefinite"])
def test_variance_is_that_of_random_signs(name, count):
    dense = matrices.named(name)
    variance = 2 * ((dense**2).sum() - (np.diag(dense) ** 2).sum())
    values, diagonal, _ = forms(dense, count, 2000)
    degrees = (count - 1) * (1 + count / 2)
    errors = error_of_mean(values, diagonal) / students_factor(degrees)
    # 2000 squares of at least 2 degrees of freedom; one dominant eigenvalue adds
    # skewness, and the bound below by what the forms alone say a little bias.
    np.testing.assert_allclose(np.mean(errors**2), variance / count, rtol=0.2)


@pytest.mark.parametrize("count", [2, 4, 8])
def test_a_heavy_diagonal_is_on_the_safe_side(count):
    """There the variance is a small difference, and is bounded from below."""
    dense = matrices.named("clustered")
    variance = 2 * ((dense**2).sum() - (np.diag(dense) ** 2).sum())
    values, diagonal, _ = forms(dense, count, 2000)
    errors = error_of_mean(values, diagonal)
    assert np.mean(errors**2) > variance / count
    # A diagonal matrix has no variance at all: most draws say so, all without NaN.
    values, diagonal, _ = forms(np.diag(np.arange(60.0)), count, 200)
    assert np.isfinite(error_of_mean(values, diagonal)).all()


@pytest.mark.parametrize("count", [3, 4, 8])
@pytest.mark.parametrize("name", ["network", "indefinite", "rank_deficient"])
def test_two_errors_cover_the_truth(name, count):
    """For `vᵀMv` of any sign, and for squared norms, where few directions are skewed.

    One dominant eigenvalue is the worst case: a sum of squares of few numbers.
    """
    dense = matrices.named(name)
    values, diagonal, squares = forms(dense, count, 2000)
    mean = np.trace(values, axis1=1, axis2=2) / count
    error = error_of_mean(values, diagonal, squares)
    # One eigenvalue seen by three directions: 0.9.
    assert np.mean(abs(mean - np.trace(dense)) <= 2 * error) > 0.88
    mean = np.trace(squares, axis1=1, axis2=2) / count
    error = error_of_mean(squares, skewed=True)
    share = np.mean(abs(mean - (dense**2).sum()) <= 2 * error)
    assert share > 0.88


@pytest.mark.parametrize("name", ["network", "indefinite", "clustered"])
def test_two_errors_cover_a_block_of_rows(name):
    """The forms `v_aᵀ(Mv)_a` alone would have said too little in 1 case of 8."""
    dense, rows = matrices.named(name), slice(10, 30)
    v = np.random.default_rng(0).choice([-1.0, 1.0], size=(2000, 60, 4))
    mv = (dense @ v)[:, rows]
    v = v[:, rows]
    shares = v * mv
    forms = np.swapaxes(v, 1, 2) @ mv
    error = error_of_mean(
        (forms + np.swapaxes(forms, 1, 2)) / 2,
        np.swapaxes(shares, 1, 2) @ shares,
        np.swapaxes(mv, 1, 2) @ mv,
        of_rows=True,
    )
    mean = np.trace(forms, axis1=1, axis2=2) / 4
    exact = np.trace(dense[rows, rows])
    assert np.mean(abs(mean - exact) <= 2 * error) > 0.93
    # And never far off, which is what one block in 50 was.
    assert np.mean(abs(mean - exact) > 5 * error) < 0.002


def test_mixed_forms_say_more_than_the_forms_alone():
    """Nine degrees of freedom from four directions, and not three."""
    dense = matrices.named("indefinite", 100)
    values, diagonal, _ = forms(dense, 4, 2000)
    mixed = error_of_mean(values, diagonal)
    alone = np.diagonal(values, axis1=1, axis2=2).std(1, ddof=1) / 2
    spread = [np.std(e) / np.mean(e) for e in (mixed, alone)]
    assert spread[0] < 0.7 * spread[1]


def test_edges():
    assert error_of_mean(np.ones((1, 1))) is None
    np.testing.assert_array_equal(error_of_mean(np.ones((3, 0, 0))), np.zeros(3))
    assert error_of_mean(np.zeros((4, 4)), skewed=True) == 0
    assert np.isnan(error_of_mean(np.full((4, 4), np.nan), skewed=True))
