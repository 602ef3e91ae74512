"""Averages over random signs: unbiased, with the right errors, reproducible."""

import matrices
import numpy as np
import pytest

from keras_curvature import estimators

FIGURES = {
    "trace": lambda *a, **b: estimators.hutchinson_moments(*a, **b).trace,
    "squared norm": lambda *a, **b: (
        estimators.hutchinson_moments(*a, **b).squared_frobenius_norm
    ),
    "diagonal": estimators.hutchinson_diagonal,
}


def truth(figure, dense):
    """The figure, and the variance of one sample of it."""
    dense = dense.astype(np.float64)
    square = dense @ dense
    diagonal = np.diag(dense)
    if figure == "trace":
        return diagonal.sum(), 2 * ((dense**2).sum() - (diagonal**2).sum())
    if figure == "squared norm":
        variance = 2 * ((square**2).sum() - (np.diag(square) ** 2).sum())
        return (dense**2).sum(), variance
    return diagonal, (dense**2).sum(1) - diagonal**2


def rounding(figure, dense):
    """Rounding errors: the unit round-off times the size of what is summed."""
    size = np.abs(dense).sum() if figure != "squared norm" else (dense**2).sum()
    return 10 * np.finfo(dense.dtype).eps * float(size) + 1e-300


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", matrices.SPECTRA)
@pytest.mark.parametrize("figure", FIGURES)
def test_within_six_standard_deviations(figure, name, dtype):
    dense = matrices.named(name, dtype=dtype)
    estimate = FIGURES[figure](dense, num_matvecs=50, seed=1)
    expected, variance = truth(figure, dense)
    bound = 6 * np.sqrt(np.maximum(variance, 0) / 50) + rounding(figure, dense)
    assert estimate.num_matvecs == 50
    assert np.all(np.abs(np.asarray(estimate.value) - expected) <= bound)


@pytest.mark.parametrize("figure", FIGURES)
def test_errors_are_calibrated(figure):
    """The truth lies within two standard errors in about 95 % of all cases.

    With 120 seeds a share of 0.95 has a standard deviation of 0.02; three of them are
    allowed. That the standard error itself comes from 24 samples takes 0.01 off.
    """
    dense = matrices.named("indefinite", 30)
    expected, variance = truth(figure, dense)
    inside, errors = [], []
    for seed in range(120):
        estimate = FIGURES[figure](dense, num_matvecs=24, seed=seed)
        error = np.asarray(estimate.standard_error)
        inside.append(np.abs(np.asarray(estimate.value) - expected) <= 2 * error)
        errors.append(error**2)
    assert 0.88 <= np.mean(inside) <= 0.998
    # And the squared errors are unbiased: 6 standard deviations of their mean, for
    # samples with a kurtosis of at most 9.
    np.testing.assert_allclose(
        np.mean(errors, axis=0), variance / 24, rtol=6 * np.sqrt(8 / (120 * 24))
    )


def test_the_diagonal_with_the_others_equals_the_diagonal_alone():
    dense = matrices.named("network")
    moments = estimators.hutchinson_moments(dense, 11, seed=3, diagonal=True)
    alone = estimators.hutchinson_diagonal(dense, 11, seed=3)
    assert moments.num_matvecs == 11
    for one, other in zip(
        (moments.diagonal.value, moments.diagonal.standard_error),
        (alone.value, alone.standard_error),
        strict=True,
    ):
        np.testing.assert_allclose(one, other, rtol=1e-12)
    np.testing.assert_allclose(
        moments.frobenius_norm.value**2, moments.squared_frobenius_norm.value
    )


def test_only_what_is_judged_must_be_precise():
    """A trace of zero never is; the norm is after a while."""
    dense = matrices.matrix(np.r_[np.arange(1.0, 31), -np.arange(1.0, 31)])
    judged = estimators.hutchinson_moments(
        dense, 400, tolerance=0.1, judged=("squared norm",)
    )
    assert judged.num_matvecs < 200
    assert judged.squared_frobenius_norm.relative_standard_error <= 0.1
    assert estimators.hutchinson_moments(dense, 400, tolerance=0.1).num_matvecs == 400


def test_the_figures_follow_from_the_directions():
    """By hand, from the directions that were multiplied: no row sums, no other v."""
    dense = matrices.named("indefinite", 20)
    operator = matrices.Recorded(dense)
    moments = estimators.hutchinson_moments(operator, 9, diagonal=True)
    v = operator.columns
    assert v.shape == (20, 9)
    av = dense @ v
    for estimate, samples in (
        (moments.trace, (v * av).sum(0)),
        (moments.squared_frobenius_norm, (av**2).sum(0)),
        (moments.diagonal, v * av),
    ):
        np.testing.assert_allclose(estimate.value, samples.mean(-1), rtol=1e-12)
        np.testing.assert_allclose(
            estimate.standard_error, samples.std(-1, ddof=1) / 3, rtol=1e-10
        )


def test_directions_are_fair_signs_and_fresh_each_time():
    """Not frozen when traced, not always −1, not correlated (peers had all three)."""
    operator = matrices.Recorded(np.eye(64))
    for seed in range(4):
        estimators.hutchinson_moments(operator, 50, seed=seed)
    v = operator.columns
    assert set(np.unique(v)) == {-1.0, 1.0}
    # Sums of n fair signs have a standard deviation of sqrt(n).
    assert abs(v.sum()) < 6 * np.sqrt(v.size)
    gram = v.T @ v - 64 * np.eye(v.shape[1])
    assert np.abs(gram).max() < 64, "Two draws are the same, up to the sign."
    assert abs(gram.sum()) < 6 * np.sqrt(gram.size * 64 * 2)


def test_draws_depend_on_seed_and_number_only():
    def draws(num_matvecs, seed):
        operator = matrices.Recorded(np.eye(10))
        estimators.hutchinson_moments(operator, num_matvecs, seed=seed)
        return operator.columns

    np.testing.assert_array_equal(draws(7, 5), draws(12, 5)[:, :7])
    assert (draws(7, 5) != draws(7, 6)).any()
    assert (draws(7, (5, 1)) != draws(7, (5, 2))).any()
    np.testing.assert_array_equal(draws(3, (5, 2)), draws(3, (5, 2)))
    # Beyond 32 bits too.
    assert (draws(7, 2**40) != draws(7, 2**41)).any()


@pytest.mark.parametrize("figure", FIGURES)
def test_one_sample_has_no_standard_error(figure):
    estimate = FIGURES[figure](matrices.named("network"), 1)
    assert estimate.standard_error is None
    assert estimate.relative_standard_error is None


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", matrices.SPECTRA)
def test_exact_figures(name, dtype):
    dense = matrices.named(name, 21, dtype=dtype)
    sizes = (4, 17)
    wide = dense.astype(np.float64)
    rows = (wide**2).sum(1)
    moments = estimators.exact_moments(dense, sizes)
    for estimate, figure, shares in (
        (moments.trace, "trace", np.diag(wide)),
        (moments.squared_frobenius_norm, "squared norm", rows),
    ):
        bound = rounding(figure, dense)
        assert estimate.standard_error == 0 and estimate.num_matvecs == 21
        np.testing.assert_allclose(estimate.value, shares.sum(), rtol=0, atol=bound)
        np.testing.assert_allclose(
            [b.value for b in estimate.blocks],
            [shares[:4].sum(), shares[4:].sum()],
            rtol=0,
            atol=bound,
        )
    pairs = moments.squared_frobenius_norm.pairs
    np.testing.assert_allclose(
        pairs.value,
        matrices.squared_norms_of_pairs(wide, sizes),
        rtol=0,
        atol=rounding("squared norm", dense),
    )
    assert not pairs.standard_error.any() and pairs.num_matvecs == 21
    for estimate in (moments.diagonal, estimators.exact_diagonal(dense)):
        np.testing.assert_allclose(
            estimate.value, np.diag(wide), rtol=0, atol=rounding("diagonal", dense)
        )
        assert not np.any(estimate.standard_error)


def test_blocks_add_up_exactly():
    dense = matrices.named("network", dtype="float32")
    sizes = (7, 13, 1, 39)
    moments = estimators.hutchinson_moments(dense, 13, block_sizes=sizes)
    ends = np.cumsum(sizes)
    for estimate, shares in (
        (moments.trace, np.diag(dense)),
        (moments.squared_frobenius_norm, (dense**2).sum(1)),
    ):
        # In float64 from the blocks' sums on.
        total = sum(b.value for b in estimate.blocks)
        np.testing.assert_allclose(total, estimate.value, rtol=1e-12)
        for block, end, size in zip(estimate.blocks, ends, sizes, strict=True):
            expected = shares[end - size : end].sum()
            assert abs(block.value - expected) < 6 * block.standard_error + 1e-3


def test_the_delta_method():
    """The error of the norm is the spread of norms over many seeds."""
    dense = matrices.named("indefinite", 30)
    norms = [
        estimators.frobenius_norm_of_squared(
            FIGURES["squared norm"](dense, 24, seed=seed)
        )
        for seed in range(80)
    ]
    spread = np.std([n.value for n in norms])
    # The spread of 80 numbers is known to 1/sqrt(160): 8 %, times 4.
    np.testing.assert_allclose(
        np.mean([n.standard_error for n in norms]), spread, rtol=0.32
    )
    root = estimators.frobenius_norm_of_squared(estimators.Estimate(0.0, 4.0, 3))
    assert (root.value, root.standard_error) == (0.0, 2.0)
    root = estimators.frobenius_norm_of_squared(estimators.Estimate(9.0, None, 1))
    assert (root.value, root.standard_error) == (3.0, None)
    # Entry by entry, where one may be below zero, and nothing turns into NaN.
    pairs = estimators.Estimate(
        np.array([[9.0, -1.0], [0.0, 4.0]]), np.array([[3.0, 4.0], [0.0, 0.0]]), 3
    )
    root = estimators.frobenius_norm_of_squared(
        estimators.Estimate(12.0, 1.0, 3, pairs=pairs)
    ).pairs
    np.testing.assert_array_equal(root.value, [[3, 0], [0, 2]])
    np.testing.assert_array_equal(root.standard_error, [[0.5, 2], [0, 0]])
