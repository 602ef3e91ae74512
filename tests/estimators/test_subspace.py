"""The dominant subspace: unbiased for any Q, precise when warm, never poisoned."""

import matrices
import numpy as np
import pytest
from keras import ops

from keras_curvature import estimators
from keras_curvature.estimators import deflation

TOLERANCE = {"float32": 1e-5, "float64": 1e-12}


def array(value):
    return ops.convert_to_numpy(value)


def deflated(dense, basis, signs, block_sizes, diagonal=False):
    """The figures from these directions, and the products with them."""
    directions = signs
    if basis.shape[1]:
        directions = np.stack(deflation.outside(list(basis.T), list(signs.T)), 1)
    products, fresh = dense @ basis, dense @ directions
    columns = [list(x.T) for x in (basis, signs, products, fresh)]
    count = basis.shape[1] + signs.shape[1]
    figures = deflation.deflated_moments(*columns, count, block_sizes, diagonal)
    return figures, products, fresh


def turned(dense, angle, seed=0):
    """The matrix in coordinates turned by about `angle`."""
    size = len(dense)
    generator = np.random.default_rng(seed).standard_normal((size, size))
    generator = angle * (generator - generator.T) / np.sqrt(2 * size)
    # Cayley's transform of a skew matrix is orthogonal.
    turn = np.linalg.solve(np.eye(size) + generator / 2, np.eye(size) - generator / 2)
    return turn @ dense @ turn.T


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", matrices.SPECTRA)
def test_prescribed_spectra(name, dtype):
    """Over several looks: never further off than its error allows, never NaN."""
    dense = matrices.named(name, dtype=dtype)
    wide = dense.astype(np.float64)
    values = np.linalg.eigvalsh(wide)
    scale = np.abs(values).max()
    sizes = (10, 20, 30)
    ends = np.cumsum(sizes)
    subspace = estimators.DominantSubspace()
    for _ in range(4):
        figures = subspace.update(dense, 12, block_sizes=sizes, diagonal=True)
        rounding = 20 * TOLERANCE[dtype] * scale
        for estimate, shares, unit in (
            (figures.trace, np.diag(wide), 60),
            (figures.squared_frobenius_norm, (wide**2).sum(1), 60 * scale),
        ):
            error = abs(estimate.value - shares.sum())
            assert error <= 4 * estimate.standard_error + rounding * unit
            total = sum(b.value for b in estimate.blocks)
            np.testing.assert_allclose(total, estimate.value, rtol=1e-10)
            for block, end, size in zip(estimate.blocks, ends, sizes, strict=True):
                error = abs(block.value - shares[end - size : end].sum())
                assert error <= 5 * block.standard_error + rounding * unit
        pairs = figures.squared_frobenius_norm.pairs
        errors = np.abs(pairs.value - matrices.squared_norms_of_pairs(wide, sizes))
        np.testing.assert_allclose(pairs.value, pairs.value.T, rtol=1e-9)
        # A single giant eigenvalue is seen by four directions only, at first.
        assert np.all(errors <= 10 * pairs.standard_error + rounding * 60 * scale)
        errors = np.abs(array(figures.diagonal.value) - np.diag(wide))
        bound = 3 * array(figures.diagonal.standard_error) + rounding
        assert np.mean(errors <= bound) > 0.9
        for value, residual in zip(
            figures.eigenvalues, figures.residual_norms, strict=True
        ):
            assert np.abs(values - value).min() <= residual + rounding
        assert np.all(np.diff(np.abs(figures.eigenvalues)) <= rounding)
        assert figures.num_matvecs == 12
        gram = array(subspace.basis).T @ array(subspace.basis)
        np.testing.assert_allclose(gram, np.eye(len(gram)), atol=TOLERANCE[dtype])


@pytest.mark.parametrize("name", ["network", "indefinite", "clustered"])
def test_unbiased_for_any_orthonormal_basis(name):
    """Mean over 800 signs, for a Q that has nothing to do with the matrix."""
    dense = matrices.named(name, 30)
    rng = np.random.default_rng(5)
    basis = np.linalg.qr(rng.standard_normal((30, 4)))[0]
    signs = rng.choice([-1.0, 1.0], size=(30, 800))
    figures, products, fresh = deflated(dense, basis, signs, (12, 18), True)
    assert figures.num_matvecs == 804
    np.testing.assert_allclose(products, dense @ basis, atol=1e-12)
    outside = np.eye(30) - basis @ basis.T
    np.testing.assert_allclose(fresh, dense @ outside @ signs, atol=1e-10)
    rest = outside @ dense @ outside
    square = rest @ rest
    # The derived variances of the rest, over 800 samples; 6 standard deviations.
    norm_variance = 2 * ((square**2).sum() - (np.diag(square) ** 2).sum())
    trace_variance = 2 * ((rest**2).sum() - (np.diag(rest) ** 2).sum())
    diagonal_variance = (rest**2).sum(1) - np.diag(rest) ** 2
    for estimate, expected, variance in (
        (figures.squared_frobenius_norm, (dense**2).sum(), norm_variance),
        (figures.trace, np.trace(dense), trace_variance),
        (figures.diagonal, np.diag(dense), diagonal_variance),
    ):
        bound = 6 * np.sqrt(variance / 800)
        assert np.all(np.abs(array(estimate.value) - expected) <= bound)
        # With so many samples nothing is widened.
        np.testing.assert_allclose(
            array(estimate.standard_error) ** 2, variance / 800, rtol=0.3
        )
    # By hand: what is known of the diagonal, and the mean of the samples.
    shares = np.diag(dense - rest) + (signs * (rest @ signs)).mean(1)
    np.testing.assert_allclose(array(figures.diagonal.value), shares, atol=1e-10)
    for block, part in zip(
        figures.trace.blocks, (slice(12), slice(12, 30)), strict=True
    ):
        np.testing.assert_allclose(block.value, shares[part].sum(), rtol=1e-9)
    # By hand: the norm of a block of rows is that of HW there, with the part inside of
    # Q replaced by its mean over all signs.
    inside = basis @ (basis.T @ fresh)
    mean_inside = (outside @ dense @ basis) @ basis.T
    rows = (dense**2).sum(1)
    for block, part in zip(
        figures.squared_frobenius_norm.blocks,
        (slice(12), slice(12, 30)),
        strict=True,
    ):
        sampled = (fresh[part] ** 2 - inside[part] ** 2).sum(0).mean()
        known = (products[part] ** 2).sum() + (mean_inside[:, part] ** 2).sum()
        np.testing.assert_allclose(block.value, known + sampled, rtol=1e-10)
        assert abs(block.value - rows[part].sum()) <= 6 * block.standard_error


@pytest.mark.parametrize("k", [0, 4, 12])
@pytest.mark.parametrize("name", ["network", "indefinite", "rank_deficient"])
def test_norms_of_pairs_of_blocks(name, k):
    """Unbiased for any Q, and two errors cover the truth, from four directions each."""
    sizes = (6, 9, 15)
    dense = matrices.named(name, 30)
    exact = matrices.squared_norms_of_pairs(dense, sizes)
    rng = np.random.default_rng(7)
    basis = np.linalg.qr(rng.standard_normal((30, k)))[0]
    if k:  # Half way to the dominant subspace.
        basis = np.linalg.qr(dense @ basis)[0]
    values, errors = [], []
    for _ in range(400):
        signs = rng.choice([-1.0, 1.0], size=(30, 4))
        figures, *_ = deflated(dense, basis, signs, sizes)
        pairs = figures.squared_frobenius_norm.pairs
        values.append(pairs.value)
        errors.append(pairs.standard_error)
    values, errors = np.array(values), np.array(errors)
    rounding = 1e-9 * exact.max()
    bias = np.abs(values.mean(0) - exact)
    assert np.all(bias <= 4 * values.std(0) / np.sqrt(400) + rounding)
    # 0.95 with a standard deviation of 0.01 for a single pair.
    covered = np.mean(np.abs(values - exact) <= 2 * errors + rounding, axis=0)
    assert covered.min() > 0.9, covered
    # And not by being boundless: on average at most 5 times the true deviation.
    assert np.all(errors.mean(0) <= 5 * values.std(0) + rounding)


def test_norms_of_pairs_of_blocks_exactly():
    """Where Q spans all, and where it holds all that is not zero."""
    sizes = (6, 9, 15)
    dense = matrices.named("indefinite", 30)
    figures = estimators.DominantSubspace().update(dense, 30, block_sizes=sizes)
    pairs = figures.squared_frobenius_norm.pairs
    exact = matrices.squared_norms_of_pairs(dense, sizes)
    np.testing.assert_allclose(pairs.value, exact, rtol=1e-12)
    assert not pairs.standard_error.any()
    np.testing.assert_allclose(figures.frobenius_norm.pairs.value, np.sqrt(exact))
    dense = matrices.named("rank_deficient", 30)
    subspace = estimators.DominantSubspace()
    for _ in range(2):
        figures = subspace.update(dense, 12, block_sizes=sizes)
    pairs = figures.squared_frobenius_norm.pairs
    exact = matrices.squared_norms_of_pairs(dense, sizes)
    np.testing.assert_allclose(pairs.value, exact, rtol=1e-10)
    # Without blocks there are none, and a single direction makes no pair.
    assert subspace.update(dense, 12).squared_frobenius_norm.pairs is None
    one = estimators.DominantSubspace().update(dense, 1, block_sizes=sizes)
    assert one.squared_frobenius_norm.pairs is None
    two = estimators.DominantSubspace().update(dense, 2, block_sizes=sizes)
    assert two.squared_frobenius_norm.pairs.standard_error is None


def test_a_biased_basis_would_show():
    """A Q that knows the signs gives a wrong norm: draws must be fresh."""
    dense = matrices.named("indefinite", 30)
    operator = matrices.Recorded(dense)
    subspace = estimators.DominantSubspace(4)
    for _ in range(5):
        subspace.update(operator, 12, seed=0)
    # Of the later looks, which take four directions of Q first.
    fresh = np.concatenate(
        [look[:, 4:] for look in np.split(operator.columns, 5, axis=1)[1:]], 1
    )
    normed = fresh / np.linalg.norm(fresh, axis=0)
    gram = np.abs(normed.T @ normed) - np.eye(normed.shape[1])
    assert gram.max() < 0.9, "Signs were drawn twice."


def test_warm_accuracy_on_a_network_like_spectrum():
    """12 products each: at most 2 % from the third look on, where averages give 9 %."""
    dense = matrices.named("network", 300)
    exact = np.linalg.norm(dense)
    plain, warm = [], []
    for seed in range(12):
        norm = estimators.hutchinson_moments(dense, 12, seed=seed).frobenius_norm
        plain.append(norm.value / exact - 1)
        subspace = estimators.DominantSubspace()
        looks = [subspace.update(dense, 12, seed=seed) for _ in range(4)]
        warm.append([f.frobenius_norm.value / exact - 1 for f in looks])
        assert abs(looks[3].eigenvalues[0] / 40 - 1) < 1e-6
    warm = np.sqrt(np.mean(np.square(warm), axis=0))
    assert warm[2] < 0.02 and warm[3] < 0.002
    assert np.sqrt(np.mean(np.square(plain))) > 10 * warm[2]


def test_follows_a_turning_subspace():
    dense = matrices.named("network", 200)
    exact, errors, inside = np.linalg.norm(dense), [], []
    course = [turned(dense, 0.2 * step) for step in range(10)]
    for seed in range(6):
        subspace = estimators.DominantSubspace()
        for now in course:
            figures = subspace.update(now, 12, seed=seed)
            norm = figures.frobenius_norm
            errors.append(norm.value / exact - 1)
            inside.append(abs(norm.value - exact) <= 2 * norm.standard_error)
    errors = np.reshape(errors, (6, 10))[:, 4:]
    assert np.sqrt(np.mean(errors**2)) < 0.02
    assert np.mean(inside) > 0.85


def test_recovers_when_everything_changes():
    subspace = estimators.DominantSubspace()
    for _ in range(3):
        subspace.update(matrices.named("network", 100, seed=1), 12)
    other = 100 * matrices.named("network", 100, seed=2)
    for _ in range(4):
        figures = subspace.update(other, 12)
    np.testing.assert_allclose(
        figures.frobenius_norm.value, np.linalg.norm(other), rtol=0.02
    )


def test_errors_are_calibrated():
    """Few fresh directions, a spectrum that four of them may miss: still about 95 %."""
    spectra = [
        np.r_[np.geomspace(30, 3, 9), 1 / np.arange(1, 92)],  # one large too many
        matrices.SPECTRA["network"](100),
        np.linspace(-5, 5, 100),
    ]
    for number, eigenvalues in enumerate(spectra):
        dense = matrices.matrix(eigenvalues, seed=number)
        norm, trace = np.linalg.norm(dense), np.trace(dense)
        inside = []
        for seed in range(25):
            subspace = estimators.DominantSubspace()
            for look in range(4):
                figures = subspace.update(dense, 12, seed=seed)
                if look:
                    for estimate, exact in (
                        (figures.frobenius_norm, norm),
                        (figures.trace, trace),
                    ):
                        error = abs(estimate.value - exact)
                        inside.append(error <= 2 * estimate.standard_error)
        # 150 dependent cases.
        assert np.mean(inside) > 0.88, (number, np.mean(inside))


def test_earlier_spreads_widen_the_errors():
    """Four fresh directions weigh as much as the past, in the logarithm."""
    dense = matrices.named("indefinite")
    subspace = estimators.DominantSubspace()
    subspace.update(dense, 12)
    state = subspace.get_state()
    figures = []
    for spread in (None, 1e-3, 1e3):
        subspace.set_state({**state, "spread": spread})
        figures.append(subspace.update(dense, 12, block_sizes=(20, 40)))
    plain, calm, wild = (f.squared_frobenius_norm for f in figures)
    assert plain.value == calm.value == wild.value
    # A calm past takes nothing away.
    assert calm.standard_error == plain.standard_error
    spread = 2 * plain.relative_standard_error
    factor = np.sqrt(1e3 / spread)
    np.testing.assert_allclose(wild.standard_error, factor * plain.standard_error)
    for one, other in zip(wild.blocks, plain.blocks, strict=True):
        np.testing.assert_allclose(one.standard_error, factor * other.standard_error)
    np.testing.assert_allclose(subspace.get_state()["spread"], np.sqrt(1e3 * spread))


@pytest.mark.parametrize("num_matvecs", [1, 2, 4, 30, 100])
def test_any_number_of_products(num_matvecs):
    operator = matrices.Recorded(matrices.named("network", 30))
    subspace = estimators.DominantSubspace()
    for _ in range(3):
        operator.directions.clear()
        figures = subspace.update(operator, num_matvecs, diagonal=True)
        assert figures.num_matvecs == operator.columns.shape[1] == min(num_matvecs, 30)
        norm, exact = figures.frobenius_norm, np.linalg.norm(operator.dense)
        if num_matvecs == 1:
            assert norm.standard_error is None
            assert figures.trace.standard_error is None
            assert figures.diagonal.standard_error is None
        elif num_matvecs >= 30:
            assert norm.standard_error == figures.trace.standard_error == 0
            np.testing.assert_allclose(norm.value, exact, rtol=1e-12)
            np.testing.assert_allclose(
                array(figures.diagonal.value), np.diag(operator.dense), atol=1e-12
            )
            assert not array(figures.diagonal.standard_error).any()
            assert not figures.residual_norms.any()
        else:
            assert abs(norm.value - exact) < 5 * norm.standard_error


@pytest.mark.parametrize("k", [1, 50])
def test_a_given_number_of_directions(k):
    dense = matrices.named("network")
    subspace = estimators.DominantSubspace(k)
    for _ in range(6):
        figures = subspace.update(dense, 12)
    assert len(figures.eigenvalues) == min(k, 8)
    np.testing.assert_allclose(figures.eigenvalues[0], 40, rtol=1e-2)


def test_operators_smaller_than_k():
    subspace = estimators.DominantSubspace(8)
    for _ in range(2):
        figures = subspace.update(np.diag([3.0, -4.0]), 12)
        assert figures.frobenius_norm.value == 5 and figures.num_matvecs == 2
        np.testing.assert_allclose(figures.eigenvalues, [-4, 3])
    # Another size: the basis does not fit, and is found anew.
    figures = subspace.update(matrices.named("network"), 12)
    assert np.isfinite(figures.trace.standard_error)


def test_undefined_products_do_not_poison_the_basis():
    dense = matrices.named("network")
    subspace = estimators.DominantSubspace()
    subspace.update(dense, 12)
    before = array(subspace.basis)
    for broken in (dense * np.nan, dense + 1e300):
        figures = subspace.update(broken, 12, block_sizes=(30, 30))
        assert not np.isfinite(figures.frobenius_norm.value)
        assert np.isnan(figures.eigenvalues).all()
        np.testing.assert_array_equal(array(subspace.basis), before)
    figures = subspace.update(dense, 12)
    assert np.isfinite(figures.frobenius_norm.standard_error)
    # From the first look on, too.
    cold = estimators.DominantSubspace()
    assert np.isnan(cold.update(dense * np.nan, 12).trace.value)
    assert np.isfinite(cold.update(dense, 12).trace.value)


@pytest.mark.parametrize("after", [0, 4, 8])
def test_an_interrupted_update_changes_nothing(after):
    """A real interruption, in the middle of any product."""

    class Broken(matrices.Recorded):
        def __matmul__(self, directions):
            if sum(d.shape[1] for d in self.directions) >= after:
                raise KeyboardInterrupt
            return super().__matmul__(directions)

    dense = matrices.named("network")
    subspace, other = estimators.DominantSubspace(), estimators.DominantSubspace()
    for looks in range(2):
        with pytest.raises(KeyboardInterrupt):
            subspace.update(Broken(dense), 12)
        one, two = (s.update(dense, 12) for s in (subspace, other))
        assert one.trace.value == two.trace.value, looks
        assert one.frobenius_norm.standard_error == two.frobenius_norm.standard_error


def test_an_update_returns_what_is_known_when_told_to_stop():
    """A warm Q and fewer fresh signs; or, from the first look, plain averages."""
    dense = matrices.named("network")
    exact = np.linalg.norm(dense)

    def update(subspace, after):
        return subspace.update(
            dense, 24, block_sizes=(20, 40), progress=matrices.stop_after(after)
        )

    def seen(warm):
        subspace = estimators.DominantSubspace()
        if warm:
            subspace.update(dense, 24)
        return subspace

    for warm, after in (
        (False, 4),  # Half of the sketch.
        (False, 12),
        (False, 20),  # 12 for the sketch, 8 of 12 for Q: averages over the 12.
        (True, 20),  # 16 for Q, 4 of 8 fresh ones.
    ):
        subspace = seen(warm)
        before = subspace.basis
        figures = update(subspace, after)
        assert figures.num_matvecs == figures.trace.num_matvecs == after
        norm = figures.frobenius_norm
        assert 0 < norm.standard_error < exact
        assert abs(norm.value - exact) <= 4 * norm.standard_error
        assert len(norm.blocks) == 2 and norm.pairs.value.shape == (2, 2)
        # The next one goes on.
        assert subspace.basis is not before
        if warm:  # Otherwise as with fewer signs from the start.
            assert norm.standard_error < 0.02 * exact
        assert np.isfinite(subspace.update(dense, 24).trace.standard_error)
    for after in (4, 16):  # No fresh direction is done.
        subspace = seen(True)
        state = subspace.get_state()
        with pytest.raises(KeyboardInterrupt):
            update(subspace, after)
        np.testing.assert_equal(subspace.get_state(), state)


def test_state_continues_bit_for_bit():
    dense = matrices.named("network", dtype="float32")
    subspace = estimators.DominantSubspace()
    for _ in range(2):
        subspace.update(dense, 12)
    resumed = estimators.DominantSubspace()
    resumed.set_state(subspace.get_state())
    for _ in range(2):
        one, other = subspace.update(dense, 12), resumed.update(dense, 12)
        assert repr(one.frobenius_norm) == repr(other.frobenius_norm)
        assert one.trace.value == other.trace.value
        np.testing.assert_array_equal(array(subspace.basis), array(resumed.basis))
    empty = estimators.DominantSubspace()
    resumed.set_state(empty.get_state())
    assert resumed.basis is None


def test_a_damaged_state_is_mended_or_refused():
    subspace = estimators.DominantSubspace()
    subspace.update(matrices.named("network"), 12)
    state = subspace.get_state()
    skewed = {**state, "basis": state["basis"] + 0.1}
    subspace.set_state(skewed)
    gram = subspace.basis.T @ subspace.basis
    np.testing.assert_allclose(gram, np.eye(8), atol=1e-12)
    subspace.set_state({**state, "basis": np.full((60, 8), np.nan)})
    assert subspace.basis is None
    with pytest.raises(ValueError, match='"spread".*Received'):
        subspace.set_state({"basis": None, "draws": 0})
    with pytest.raises(ValueError, match=r"\(P, k\) with k ≤ P.*\(3, 4\)"):
        subspace.set_state({**state, "basis": np.zeros((3, 4))})


def test_arguments_are_checked():
    with pytest.raises(ValueError, match="k=0"):
        estimators.DominantSubspace(0)
    subspace = estimators.DominantSubspace()
    with pytest.raises(ValueError, match="num_matvecs=0"):
        subspace.update(np.eye(3), 0)
    with pytest.raises(ValueError, match="add up to P = 3"):
        subspace.update(np.eye(3), 2, block_sizes=(1, 1))
