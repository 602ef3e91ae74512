"""Signs that made the subspace themselves: unbiased, and their errors are honest."""

import matrices
import numpy as np
import pytest
from keras import ops

from keras_curvature import estimators
from keras_curvature.estimators import deflation, left_out

SIZES = (12, 18)


def spanning(dense, signs):
    """An orthonormal Q that spans the products of signs, and its products."""
    basis = np.linalg.qr(dense @ signs)[0]
    return [list(x.T) for x in (basis, signs, dense @ basis)]


def figures(dense, count, seed, block_sizes=SIZES):
    rng = np.random.default_rng(seed)
    signs = rng.choice([-1.0, 1.0], size=(len(dense), count))
    arguments = spanning(dense, signs)
    return left_out.left_out_moments(*arguments, 2 * count, block_sizes, diagonal=True)


def by_hand(dense, signs, sizes):
    """The mean of what each sign tells with a splitting of its own, from its words."""
    found, k = {"trace": 0, "norm": 0, "diagonal": 0, "rows": 0}, signs.shape[1]
    ends = np.cumsum(sizes)
    for i in range(k):
        others = np.delete(dense @ signs, i, axis=1)
        basis = np.linalg.qr(others)[0]
        outside = np.eye(len(dense)) - basis @ basis.T
        rest = outside @ dense @ outside
        known, v = dense - rest, signs[:, i]
        form = rest @ v
        seen = dense @ outside @ v
        found["trace"] += (np.trace(known) + v @ form) / k
        found["norm"] += (np.sum(known**2) + form @ form) / k
        found["diagonal"] += (np.diag(known) + v * form) / k
        # The part inside of Q is known: its mean is in the rows of K.
        entries = (known**2).sum(1) + form**2 + 2 * form * (seen - form)
        found["rows"] += np.add.reduceat(entries, np.r_[0, ends[:-1]]) / k
    return found


@pytest.mark.parametrize("name", ["network", "indefinite", "clustered"])
def test_it_is_the_mean_over_signs_that_are_left_out(name):
    dense = matrices.named(name, 30)
    rng = np.random.default_rng(3)
    signs = rng.choice([-1.0, 1.0], size=(30, 5))
    found = left_out.left_out_moments(*spanning(dense, signs), 10, SIZES, diagonal=True)
    expected = by_hand(dense, signs, SIZES)
    scale = np.abs(dense).max() ** 2
    norm = found.squared_frobenius_norm
    for value, wanted in (
        (found.trace.value, expected["trace"]),
        (norm.value, expected["norm"]),
        (ops.convert_to_numpy(found.diagonal.value), expected["diagonal"]),
        ([block.value for block in norm.blocks], expected["rows"]),
    ):
        np.testing.assert_allclose(value, wanted, rtol=1e-8, atol=1e-9 * scale)
    diagonal = ops.convert_to_numpy(found.diagonal.value)
    for block, part in zip(found.trace.blocks, np.split(diagonal, [12]), strict=True):
        np.testing.assert_allclose(block.value, part.sum(), rtol=1e-8)


@pytest.mark.parametrize(
    ("name", "least"),
    [("network", 0.93), ("rank_deficient", 0.93), ("indefinite", 0.8)],
)
def test_unbiased_and_calibrated(name, least):
    """400 times six signs: the truth within four errors of the mean, 95 % within two.

    Where no eigenvalues stand out, and signs are a fifth of the dimensions, they depend
    on each other.
    """
    dense = matrices.named(name, 30)
    pairs = matrices.squared_norms_of_pairs(dense, SIZES)
    truth = {
        "trace": np.trace(dense),
        "norm": np.sum(dense**2),
        "rows": pairs.sum(1),
        "pairs": pairs,
        "diagonal": np.diag(dense),
    }
    values, errors = ({key: [] for key in truth} for _ in range(2))
    for seed in range(400):
        found = figures(dense, 6, seed)
        norm = found.squared_frobenius_norm
        rows = [b.value for b in norm.blocks], [b.standard_error for b in norm.blocks]
        for key, value, error in (
            ("trace", found.trace.value, found.trace.standard_error),
            ("norm", norm.value, norm.standard_error),
            ("rows", *rows),
            ("pairs", norm.pairs.value, norm.pairs.standard_error),
            ("diagonal", found.diagonal.value, found.diagonal.standard_error),
        ):
            values[key].append(ops.convert_to_numpy(value))
            errors[key].append(ops.convert_to_numpy(error))
    for key, exact in truth.items():
        value, error = np.array(values[key]), np.array(errors[key])
        rounding = 1e-9 * np.abs(exact).max()
        bias = np.abs(value.mean(0) - exact)
        assert np.all(bias <= 4 * value.std(0) / 20 + rounding), key
        covered = np.mean(np.abs(value - exact) <= 2 * error + rounding, axis=0)
        assert np.mean(covered) > least and np.min(covered) > least - 0.05, (
            key,
            covered,
        )
        # And not by being boundless.
        spread = np.sqrt(np.mean(value.var(0))) + rounding
        assert np.sqrt(np.mean(error**2)) <= 5 * spread + rounding, key


def test_signs_that_are_not_left_out_would_be_seen():
    """What they are blind to is missing, if Q spans them all."""
    dense = matrices.named("clustered", 30)
    biased, errors = [], []
    for seed in range(60):
        signs = np.random.default_rng(seed).choice([-1.0, 1.0], size=(30, 6))
        basis, _, products = spanning(dense, signs)
        fresh = deflation.outside(basis, list(signs.T))
        fresh = [dense @ x for x in fresh]
        found = deflation.deflated_moments(
            basis, list(signs.T), products, fresh, 12, SIZES
        )
        biased.append(found.squared_frobenius_norm.value - np.sum(dense**2))
        other = figures(dense, 6, seed).squared_frobenius_norm
        errors.append(other.value - np.sum(dense**2))
    deviation = np.std(errors) / np.sqrt(60)
    assert abs(np.mean(errors)) < 4 * deviation < abs(np.mean(biased)) / 2


@pytest.mark.parametrize(("name", "most"), [("network", 0.7), ("indefinite", 1)])
def test_less_noise_than_fresh_signs(name, most):
    """From the same number of products, a third of them for Q and a third for signs."""
    dense = matrices.named(name, 60)
    squares = []
    for seed in range(40):
        rng = np.random.default_rng(seed)
        signs = rng.choice([-1.0, 1.0], size=(60, 16))
        basis, _, products = spanning(dense, signs[:, :8])
        fresh = [dense @ x for x in deflation.outside(basis, list(signs[:, 8:].T))]
        other = deflation.deflated_moments(
            basis, list(signs[:, 8:].T), products, fresh, 24, diagonal=True
        )
        ours = figures(dense, 12, seed, None)
        squares.append(
            [
                [
                    (x.trace.value - np.trace(dense)) ** 2,
                    (x.squared_frobenius_norm.value - np.sum(dense**2)) ** 2,
                    np.sum(
                        (ops.convert_to_numpy(x.diagonal.value) - np.diag(dense)) ** 2
                    ),
                ]
                for x in (ours, other)
            ]
        )
    ours, other = np.sqrt(np.mean(squares, axis=0))
    assert np.all(ours < most * other), ours / other


@pytest.mark.parametrize("rank", [0, 1, 3])
def test_a_low_rank_is_known_exactly(rank):
    """Where most products are combinations of others, or nothing at all."""
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.standard_normal((40, 3)))[0][:, :rank]
    dense = basis @ np.diag([5.0, -3.0, 1.0][:rank]) @ basis.T
    subspace = estimators.DominantSubspace()
    found = subspace.update(dense, 12, block_sizes=(15, 25), diagonal=True)
    norm = found.squared_frobenius_norm
    np.testing.assert_allclose(norm.value, np.sum(dense**2), atol=1e-12)
    np.testing.assert_allclose(found.trace.value, np.trace(dense), atol=1e-12)
    np.testing.assert_allclose(
        norm.pairs.value, matrices.squared_norms_of_pairs(dense, (15, 25)), atol=1e-12
    )
    np.testing.assert_allclose(
        ops.convert_to_numpy(found.diagonal.value), np.diag(dense), atol=1e-12
    )
    # The next one goes on from there.
    norm = subspace.update(dense, 12).squared_frobenius_norm
    np.testing.assert_allclose(norm.value, np.sum(dense**2), atol=1e-12)
    assert np.isfinite(norm.standard_error)


def test_many_signs():
    """More of them than meet each other."""
    dense = matrices.named("network", 120)
    found = figures(dense, left_out._MEETING + 10, 0, (50, 70))
    norm, pairs = found.squared_frobenius_norm, found.squared_frobenius_norm.pairs
    assert abs(norm.value - np.sum(dense**2)) <= 4 * norm.standard_error
    error = np.abs(pairs.value - matrices.squared_norms_of_pairs(dense, (50, 70)))
    assert np.all(error <= 6 * pairs.standard_error)


@pytest.mark.parametrize("rank", [0, 3])
def test_an_interruption_leaves_averages(rank):
    """In the middle of the second half; Q holds what the first half was."""
    dense = matrices.matrix(np.r_[[5.0, -3, 1][:rank], np.zeros(40 - rank)])
    found = estimators.DominantSubspace().update(
        dense, 12, progress=matrices.stop_after(8)
    )
    plain = estimators.DominantSubspace().update(
        dense, 12, progress=matrices.stop_after(6)
    )
    assert found.num_matvecs > plain.num_matvecs
    for name in ("trace", "frobenius_norm"):
        one, other = getattr(found, name), getattr(plain, name)
        np.testing.assert_allclose(one.value, other.value, rtol=1e-6, atol=1e-12)
