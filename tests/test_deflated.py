"""Diagonals from a dominant subspace, and that they are taken where they tell more."""

import keras
import numpy as np
import pytest
from keras import layers

import keras_curvature as kc
from keras_curvature.callbacks import measurement
from keras_curvature.diagonal import diagonal_moments, with_subspace
from keras_curvature.estimators import DominantSubspace, to_host


@pytest.fixture(scope="module")
def problem():
    """Trained on three classes: few eigenvalues dominate."""
    keras.utils.set_random_seed(0)
    rng = np.random.default_rng(0)
    x = rng.standard_normal((64, 6)).astype("float32")
    y = np.argmax(x[:, :3], axis=1)
    hidden = [layers.Dense(12, "tanh") for _ in range(3)]
    model = keras.Sequential([layers.Input((6,)), *hidden, layers.Dense(3)])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(0.03), loss)
    model.fit(x, y, epochs=30, verbose=0)
    return model, x, y


@pytest.fixture(scope="module")
def operator(problem):
    return kc.HessianOperator(*problem)


@pytest.fixture(scope="module")
def truth(operator):
    return np.diag(operator.to_dense()).astype("float64")


def squared_distance(moments, truth):
    return np.sum((to_host(moments.diagonal.value) - truth) ** 2)


def test_it_is_unbiased_and_its_errors_cover_the_truth(operator, truth):
    size, count, covered, beyond = len(truth), 20, 0, 0
    mean, variance = np.zeros(size), np.zeros(size)
    for seed in range(count):
        diagonal = diagonal_moments(operator, "deflated", 24, seed=seed).diagonal
        value, error = to_host(diagonal.value), to_host(diagonal.standard_error)
        mean += value / count
        variance += (value - truth) ** 2 / count**2
        covered += np.sum(np.abs(value - truth) <= 2 * error) / (count * size)
        beyond += np.sum(np.abs(value - truth) > 6 * error) / (count * size)
    assert np.abs(mean - truth).sum() <= 4 * np.sqrt(variance).sum()
    assert covered > 0.9
    assert beyond < 0.01


@pytest.mark.parametrize(("products", "times"), [(32, 4), (48, 8)])
def test_it_tells_more_than_samples_where_few_eigenvalues_dominate(
    operator, truth, products, times
):
    squares = [
        np.mean(
            [
                squared_distance(diagonal_moments(operator, m, products, seed=s), truth)
                for s in range(6)
            ]
        )
        for m in ("deflated", "hutchinson")
    ]
    assert squares[0] < squares[1] / times


def test_auto_takes_what_told_the_smaller_error(problem):
    fresh = kc.HessianOperator(*problem)
    estimate = kc.hessian_diagonal(fresh, method="auto", num_matvecs=8)
    assert not any("subspace" in way for way in estimate.ways.values())
    errors = {
        method: diagonal_moments(
            fresh, method, 20, seed=0
        ).diagonal.relative_standard_error
        for method in ("shrunk", "deflated")
    }
    chosen = diagonal_moments(fresh, "auto", 20, seed=0).diagonal
    assert chosen.relative_standard_error == min(errors.values())


def test_axes(operator):
    rng = np.random.default_rng(0)
    axes = [
        None
        if v.ndim == 1
        else tuple(np.linalg.qr(rng.standard_normal((n, n)))[0] for n in v.shape)
        for v in operator.variables
    ]
    found = kc.hessian_diagonal(operator, method="deflated", num_matvecs=60, axes=axes)
    exact = kc.hessian_diagonal(operator, method="exact", axes=axes)
    for value, error, right in zip(
        found.value, found.standard_error, exact.value, strict=True
    ):
        assert np.mean(np.abs(value - right) <= 3 * error + 1e-5) > 0.9


def test_a_tolerance_ends_it(operator):
    count = []

    def progress(done, total):
        count.append(done)
        return True

    progress.stopped = False
    moments = diagonal_moments(operator, "deflated", tolerance=0.1, progress=progress)
    found = moments.diagonal
    assert found.relative_standard_error <= 0.1
    # Of all looks, not of the last alone.
    assert 24 < found.num_matvecs == count[-1] < 1024
    for figure in (moments.trace, moments.trace.blocks[0], moments):
        assert figure.num_matvecs == count[-1]


def test_figures_of_a_subspace_are_used_where_they_are_better(operator, truth):
    samples = diagonal_moments(operator, "hutchinson", 4)
    subspace = DominantSubspace()
    for _ in range(3):
        found = subspace.update(operator, 12, 0, operator.sizes, diagonal=True)
    better = with_subspace(operator, samples, found)
    assert all("subspace" in way for way in better.diagonal.ways.values())
    assert squared_distance(better, truth) < squared_distance(samples, truth)
    exact = diagonal_moments(operator, "exact")
    assert with_subspace(operator, exact, found) is exact


@pytest.mark.parametrize("asked", ["auto", "shrunk"])
def test_a_probe_takes_it_where_any_method_will_do(problem, truth, asked, monkeypatch):
    monkeypatch.setattr("keras_curvature.diagonal.AFFORDABLE_MATVECS", 1)
    handed = []
    monkeypatch.setattr(
        measurement,
        "hand_over",
        lambda model, operator, diagonal: handed.append(to_host(diagonal)),
    )
    probe = measurement.Measurement(
        seed=0,
        num_matvecs=64,
        diagonal=asked,
        diagonal_samples=4,
        preconditioned=False,
        gradients=False,
        density_freq=0,
        histograms=False,
        per_variable=False,
    )
    operator = kc.HessianOperator(*problem)
    for step in range(3):
        figures = probe.take(problem[0], operator, 64, step)
    samples = diagonal_moments(operator, "shrunk", 4, seed=probe._seed_at(2))
    distances = [
        np.linalg.norm(x - truth) for x in (handed[-1], to_host(samples.diagonal.value))
    ]
    assert (distances[0] < distances[1] / 2) == (asked == "auto")
    assert abs(figures["hessian_trace"] - truth.sum()) <= 6 * (
        figures["hessian_trace_standard_error"] + 1e-6
    )


def test_a_summary_takes_it_where_any_method_will_do(problem, monkeypatch):
    monkeypatch.setattr(
        "keras_curvature.report.diagonal_moments",
        lambda operator, method, **_: diagonal_moments(operator, "hutchinson", 4),
    )
    auto, shrunk = (
        kc.curvature_summary(*problem, method=m, num_matvecs=60, print_fn=False)[-1]
        for m in ("auto", "shrunk")
    )
    error = "hessian_trace_standard_error"
    assert auto[error] < shrunk[error]
    assert auto["num_matvecs"] == shrunk["num_matvecs"]
