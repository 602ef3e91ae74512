"""The density of the eigenvalues against the eigenvalues themselves."""

import sys

import matrices
import numpy as np
import pytest

from keras_curvature import estimators

# The function has the name of its module.
module = sys.modules[estimators.spectral_density.__module__]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", matrices.SPECTRA)
def test_mass_and_moments(name, dtype):
    dense = matrices.named(name, dtype=dtype)
    wide = dense.astype(np.float64)
    density = estimators.spectral_density(dense, num_steps=20, num_vectors=8, seed=2)
    mass = np.trapezoid(density.density, density.grid)
    np.testing.assert_allclose(mass, 1, rtol=1e-6)
    assert density.size == 60 and np.all(density.density >= 0)
    assert all(abs(w.sum() - 1) < 1e-6 for w in density.weights)
    scale = np.abs(wide).max() + 1e-300
    for order, expected in ((1, np.trace(wide) / 60), (2, (wide**2).sum() / 60)):
        moment = density.moment(order)
        bound = 3 * moment.standard_error + 1e-5 * scale**order
        assert abs(moment.value - expected) <= bound
        # They are Hutchinson's estimates from the same number of vectors.
        power = np.linalg.matrix_power(wide, order) / 60
        variance = 2 * ((power**2).sum() - (np.diag(power) ** 2).sum())
        bound = 6 * np.sqrt(variance / 8) + 1e-5 * scale**order
        assert abs(moment.value - expected) <= bound


@pytest.mark.parametrize("name", ["network", "indefinite"])
def test_agrees_with_the_smoothed_spectrum(name):
    """All P steps and many vectors: the histogram of eigenvalues, smoothed."""
    dense = matrices.named(name, 40)
    eigenvalues = np.linalg.eigvalsh(dense)
    density = estimators.spectral_density(
        dense, num_steps=40, num_vectors=40, sigma=0.3
    )
    distances = (density.grid[:, None] - eigenvalues) / 0.3
    exact = np.exp(-(distances**2) / 2).mean(1) / (0.3 * np.sqrt(2 * np.pi))
    error = np.abs(density.density - exact)
    assert np.all(error <= 6 * density.standard_error + 1e-9)
    assert np.trapezoid(error, density.grid) < 0.15


def test_moment_errors_are_calibrated():
    dense = matrices.named("indefinite", 30)
    exact = {1: np.trace(dense) / 30, 2: (dense**2).sum() / 30}
    inside = []
    for seed in range(60):
        density = estimators.spectral_density(dense, 3, 8, seed=seed)
        for order in exact:
            moment = density.moment(order)
            error = abs(moment.value - exact[order])
            inside.append(error <= 2 * moment.standard_error)
    assert 0.89 <= np.mean(inside) <= 0.995


def test_no_ghosts():
    """Without reorthogonalisation the giant eigenvalue would appear several times."""
    dense = matrices.matrix(np.r_[[1e3], np.linspace(0, 1, 99)], dtype="float32")
    density = estimators.spectral_density(dense, num_steps=60, num_vectors=2)
    for nodes in density.nodes:
        assert len(nodes) == 60
        assert np.sum(nodes > 500) == 1
        np.testing.assert_allclose(nodes[-1], 1e3, rtol=1e-5)
        assert nodes[-2] < 1.01 and nodes[0] > -0.01


def test_ghosts_share_the_weight(monkeypatch):
    """With two vectors kept, as for a large operator: more nodes, the same density."""
    dense = matrices.matrix(np.r_[[1e3], np.linspace(0, 1, 99)], dtype="float32")
    arguments = {"num_steps": 60, "num_vectors": 4, "sigma": 0.2}
    grid = np.r_[np.linspace(-1, 2, 50), np.linspace(999, 1001, 50)]
    whole = estimators.spectral_density(dense, grid=grid, **arguments)
    monkeypatch.setattr(module, "_BASIS_NUMBERS", 0)
    streamed = estimators.spectral_density(dense, grid=grid, **arguments)
    for order in (1, 2):
        one, other = (x.moment(order).value for x in (streamed, whole))
        np.testing.assert_allclose(one, other, rtol=1e-4)
    for start in range(4):
        nodes, weights = streamed.nodes[start], streamed.weights[start]
        assert np.sum(nodes > 500) > 1, "No ghosts: the test shows nothing."
        expected = whole.weights[start][whole.nodes[start] > 500].sum()
        np.testing.assert_allclose(weights[nodes > 500].sum(), expected, rtol=1e-3)
        # A new one is on its way for a step or two, and has no weight yet.
        center = np.average(nodes[nodes > 500], weights=weights[nodes > 500])
        np.testing.assert_allclose(center, 1e3, rtol=1e-4)
    # At a width of 0.2 the ninety-nine others are a continuum to both.
    error = np.abs(streamed.density - whole.density)
    assert error.max() < 1e-2 * whole.density.max()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_breakdown_ends_the_iteration(dtype):
    """Few distinct eigenvalues: as many nodes, and exact weights, at that price."""
    dense = matrices.named("clustered", 60, dtype=dtype)
    density = estimators.spectral_density(dense, num_steps=30, num_vectors=4)
    for nodes in density.nodes:
        np.testing.assert_allclose([nodes[0], nodes[-1]], [1, 3], rtol=1e-5)
        assert len(nodes) == 2
    assert density.num_matvecs == 8
    zero = estimators.spectral_density(np.zeros((60, 60), dtype), 30, 4)
    assert zero.num_matvecs == 4 and np.isfinite(zero.density).all()
    np.testing.assert_array_equal(np.concatenate(zero.nodes), np.zeros(4))


def test_one_iteration_may_end_before_another():
    """On a diagonal matrix each start vector has its own invariant subspace."""
    block = np.full((3, 3), 0.1) + 0.6 * np.eye(3)
    dense = np.kron(np.eye(2), block)
    # Eigenvalues 0.9, with the eigenvector (1, 1, 1) of each block, and 0.6.
    density = estimators.spectral_density(dense, 6, 64)
    counts = set()
    for nodes in density.nodes:
        # A node at zero would be one too many.
        np.testing.assert_allclose(
            np.abs(nodes[:, None] - [0.6, 0.9]).min(1), 0, atol=1e-12
        )
        counts.add(len(nodes))
    assert counts == {1, 2}
    assert np.isfinite(density.density).all()


def test_size_of_one_and_single_vector():
    density = estimators.spectral_density(np.array([[2.0]]), 5, 1)
    assert density.standard_error is None
    assert density.moment(1).standard_error is None
    assert density.moment(1).value == 2 and density.num_matvecs == 1


def test_reproducible():
    dense = matrices.named("network")
    one, other, third = (
        estimators.spectral_density(dense, 10, 3, seed=s) for s in (1, 1, 2)
    )
    np.testing.assert_array_equal(one.density, other.density)
    assert np.abs(one.density - third.density).max() > 0


@pytest.mark.parametrize(("products", "steps"), [(4, [1]), (20, [5]), (44, [10, 1])])
def test_the_steps_made_when_told_to_stop(products, steps):
    """Those of the first four vectors, then of the next four."""
    dense = matrices.named("network")
    density = estimators.spectral_density(
        dense, 10, 8, progress=matrices.stop_after(products)
    )
    assert density.num_matvecs == products
    assert [len(nodes) for nodes in density.nodes] == np.repeat(steps, 4).tolist()
    mass = np.trapezoid(density.density, density.grid)
    np.testing.assert_allclose(mass, 1, rtol=1e-6)
    # Gauss quadrature with m nodes is the start of the one with more.
    shorter = estimators.spectral_density(dense, steps[0], 4)
    np.testing.assert_allclose(density.nodes[0], shorter.nodes[0], atol=1e-12)


def test_progress():
    calls = []

    def progress(*done_and_total):
        calls.append(done_and_total)
        return True

    dense = matrices.named("network")
    estimators.spectral_density(dense, 3, 6, progress=progress)
    assert calls == [(4, 18), (8, 18), (12, 18), (14, 18), (16, 18), (18, 18)]


def test_own_grid_and_sigma():
    grid = np.linspace(-1, 2, 7)
    density = estimators.spectral_density(np.eye(5), grid=grid, sigma=0.5)
    np.testing.assert_array_equal(density.grid, grid)
    np.testing.assert_allclose(density.density.max(), 1 / (0.5 * np.sqrt(2 * np.pi)))


def test_arguments_are_checked():
    for arguments, message in (
        ({"num_steps": 0}, "num_steps=0"),
        ({"num_vectors": 1.5}, "num_vectors=1.5"),
        ({"sigma": 0}, "sigma=0"),
        ({"num_points": 1}, "num_points=1"),
    ):
        with pytest.raises(ValueError, match=message):
            estimators.spectral_density(np.eye(3), **arguments)
    with pytest.raises(RuntimeError, match="not finite"):
        estimators.spectral_density(np.full((3, 3), np.nan))


def test_representation():
    density = estimators.spectral_density(np.diag([1.0, 2.0]), 5, 2)
    assert repr(density) == (
        "<SpectralDensity of 2 eigenvalues in [1, 2], 2 start vectors, 4 matvecs>"
    )
