"""Averages over random signs: unbiased, with the right errors, reproducible."""

import matrices
import numpy as np
import pytest
from keras import ops

from keras_curvature import estimators
from keras_curvature.estimators import moments as module

FIGURES = {
    "trace": lambda moments: moments.trace,
    "squared norm": lambda moments: moments.squared_frobenius_norm,
    "diagonal": lambda moments: moments.diagonal,
}


def array(value):
    return ops.convert_to_numpy(value)


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
def test_within_six_standard_deviations(name, dtype):
    dense = matrices.named(name, dtype=dtype)
    moments = estimators.hutchinson_moments(dense, 50, seed=1, diagonal=True)
    assert moments.num_matvecs == 50
    for figure, select in FIGURES.items():
        estimate = select(moments)
        expected, variance = truth(figure, dense)
        bound = 6 * np.sqrt(np.maximum(variance, 0) / 50) + rounding(figure, dense)
        assert estimate.num_matvecs == 50
        assert np.all(np.abs(array(estimate.value) - expected) <= bound)


@pytest.fixture(scope="module")
def many_seeds():
    """120 times 24 products with a matrix without outliers."""
    dense = matrices.named("indefinite", 30)
    return dense, [
        estimators.hutchinson_moments(dense, 24, seed=seed, diagonal=True)
        for seed in range(120)
    ]


@pytest.mark.parametrize("figure", FIGURES)
def test_errors_are_calibrated(figure, many_seeds):
    """The truth lies within two standard errors in about 95 % of all cases.

    With 120 seeds a share of 0.95 has a standard deviation of 0.02; three of them are
    allowed. That the standard error itself comes from 24 samples takes 0.01 off.
    """
    dense, runs = many_seeds
    expected, variance = truth(figure, dense)
    estimates = [FIGURES[figure](moments) for moments in runs]
    values, errors = (
        np.array([array(getattr(e, name)) for e in estimates])
        for name in ("value", "standard_error")
    )
    assert 0.88 <= np.mean(np.abs(values - expected) <= 2 * errors) <= 0.998
    # And the squared errors are unbiased: 6 standard deviations of their mean, for
    # samples with a kurtosis of at most 9.
    np.testing.assert_allclose(
        np.mean(errors**2, axis=0), variance / 24, rtol=6 * np.sqrt(8 / (120 * 24))
    )


def test_the_error_of_the_norm_is_its_spread_over_many_seeds(many_seeds):
    """The delta method."""
    norms = [moments.frobenius_norm for moments in many_seeds[1]]
    spread = np.std([n.value for n in norms])
    # The spread of 120 numbers is known to 1/sqrt(240): 6.5 %, times 4.
    np.testing.assert_allclose(
        np.mean([n.standard_error for n in norms]), spread, rtol=0.26
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
        np.testing.assert_allclose(array(estimate.value), samples.mean(-1), rtol=1e-12)
        np.testing.assert_allclose(
            array(estimate.standard_error), samples.std(-1, ddof=1) / 3, rtol=1e-10
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


def test_one_sample_has_no_standard_error():
    moments = estimators.hutchinson_moments(
        matrices.named("network"), 1, block_sizes=(20, 40), diagonal=True
    )
    for select in FIGURES.values():
        assert select(moments).standard_error is None
        assert select(moments).relative_standard_error is None
    assert [b.standard_error for b in moments.trace.blocks] == [None, None]


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
    np.testing.assert_allclose(
        array(moments.diagonal.value),
        np.diag(wide),
        rtol=0,
        atol=rounding("diagonal", dense),
    )
    assert not array(moments.diagonal.standard_error).any()


def test_exact_figures_are_had_or_not():
    dense = matrices.named("network", 10)
    for products, known in ((10, True), (8, False)):
        stop = matrices.stop_after(products)
        if known:
            moments = estimators.exact_moments(dense, progress=stop)
            np.testing.assert_allclose(moments.trace.value, np.trace(dense))
        else:
            with pytest.raises(KeyboardInterrupt):
                estimators.exact_moments(dense, progress=stop)


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


@pytest.mark.parametrize(
    ("squared", "error", "root", "its_error"),
    [
        (9.0, 3.0, 3.0, 0.5),
        (9.0, None, 3.0, None),
        # Without a value there is no slope; nothing turns into NaN.
        (0.0, 4.0, 0.0, 2.0),
        (-1.0, 4.0, 0.0, 2.0),
        (0.0, 0.0, 0.0, 0.0),
    ],
)
def test_the_root_of_a_squared_norm(squared, error, root, its_error):
    def both(squared, error):
        return estimators.Estimate(np.full((2, 2), squared), error, 3)

    pairs = both(squared, None if error is None else np.full((2, 2), error))
    block = estimators.Estimate(squared, error, 3)
    whole = estimators.Estimate(squared, error, 3, (block,), pairs)
    norm = module.Moments(whole, whole, None, 3).frobenius_norm
    for estimate in (norm, *norm.blocks, norm.pairs):
        np.testing.assert_array_equal(estimate.value, root)
        if its_error is None:
            assert estimate.standard_error is None
        else:
            np.testing.assert_array_equal(estimate.standard_error, its_error)
