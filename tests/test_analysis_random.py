"""Random estimates of the functions users call: errors, seeds, budgets, blocks."""

import functools
import random
import signal

import cases
import keras
import matrices
import numpy as np
import pytest

import keras_curvature as kc
from keras_curvature import diagonal

if keras.backend.backend() != "tensorflow":
    # Elsewhere Keras computes in float32: see `operators/test_hessian_anywhere.py`.
    pytest.skip("figures in float64", allow_module_level=True)

import tensorflow as tf

pytestmark = pytest.mark.usefixtures("module_float64")


@pytest.fixture(autouse=True)
def without_control_variate(monkeypatch):
    """Of the last layer it leaves nothing that could be random."""
    monkeypatch.setattr(diagonal, "CONTROL_PASSES", 0)


#: Every random way to a figure.
WAYS = [
    (kc.hessian_diagonal, "layerwise"),
    (kc.hessian_diagonal, "hutchinson"),
    (kc.hessian_diagonal, "gauss_newton"),
    (kc.hessian_trace, "layerwise"),
    (kc.hessian_trace, "hutchinson"),
    (kc.hessian_trace, "deflated"),
    (kc.hessian_frobenius_norm, "hutchinson"),
    (kc.hessian_frobenius_norm, "deflated"),
]


@functools.cache
def operator():
    model, x, y, *_ = cases.mlp_tanh()
    return kc.HessianOperator(model, x, y)


@functools.cache
def dense():
    return operator().to_dense()


def truth(function, method=None):
    if method == "gauss_newton":
        return kc.hessian_diagonal(operator(), method="gauss_newton").value
    return {
        kc.hessian_diagonal: lambda h: operator().split(np.diag(h)),
        kc.hessian_trace: np.trace,
        kc.hessian_frobenius_norm: np.linalg.norm,
    }[function](dense())


def flat(value):
    if isinstance(value, list):
        return np.concatenate([np.ravel(a) for a in value])
    return np.array([value])


SCALARS = {kc.hessian_trace: np.trace, kc.hessian_frobenius_norm: np.linalg.norm}


def ids(way):
    return getattr(way, "__name__", way)


@pytest.mark.parametrize("function, method", WAYS, ids=ids)
def test_standard_errors_are_calibrated(function, method):
    """Over seeds, the errors made are as large as the standard errors said.

    `R = sqrt(mean error² / mean standard error²)` is 1 for errors that are right on
    average. 60 independent seeds know the numerator to sqrt(2/60) = 18 % in the worst
    case (one Gaussian entry), so R to 9 %, three times of which is 27 %; the
    denominator, with 16 samples each, adds little. Errors of `"deflated"` are widened
    on purpose, such that two of them cover 95 %: R may be well below 1 there.
    """
    errors, promised, covered = [], [], []
    for seed in range(60):
        estimate = function(operator(), method=method, num_matvecs=16, seed=seed)
        assert estimate.num_matvecs == 16
        error = flat(estimate.value) - flat(truth(function, method))
        errors.append(error)
        promised.append(flat(estimate.standard_error))
        covered.append(abs(error) <= 2 * promised[-1] + 1e-12)
    ratio = np.sqrt(np.mean(np.square(errors)) / np.mean(np.square(promised)))
    assert (0.3 if method == "deflated" else 0.73) < ratio < 1.27
    # The share covered, 95 % but for few samples, less three deviations of 60 draws.
    assert np.mean(covered) > 0.95 - 3 * np.sqrt(0.95 * 0.05 / 60) - 0.02
    # No bias: the mean error over the seeds is within 3.5 of its own deviations (and
    # a norm's bias, of second order, a tenth of its standard error).
    bias = np.mean(errors, axis=0)
    limit = 3.5 / np.sqrt(60) + 0.1 * (function is kc.hessian_frobenius_norm)
    assert (abs(bias) <= limit * np.sqrt(np.mean(np.square(promised), 0)) + 1e-9).all()


@pytest.mark.parametrize("function, method", WAYS, ids=ids)
def test_seed_decides_everything(function, method):
    def run(seed, num_matvecs=6):
        estimate = function(
            operator(), method=method, num_matvecs=num_matvecs, seed=seed
        )
        return flat(estimate.value), flat(estimate.standard_error)

    first, again, other = run(1), run(1), run(2)
    np.testing.assert_array_equal(first, again)
    assert (first[0] != other[0]).all()


@pytest.mark.parametrize("function, method", WAYS, ids=ids)
def test_random_state_is_left_alone(function, method):
    def draws():
        return (
            random.random(),
            np.random.random(),
            float(tf.random.uniform(())),
            float(keras.random.uniform(())),
        )

    keras.utils.set_random_seed(7)
    expected = draws()
    keras.utils.set_random_seed(7)
    function(operator(), method=method, num_matvecs=6)
    assert draws() == expected


@pytest.mark.parametrize("function, method", WAYS, ids=ids)
def test_tolerance_is_reached(function, method):
    estimate = function(operator(), method=method, tolerance=0.25)
    assert estimate.relative_standard_error <= 0.25
    assert estimate.num_matvecs < 1024
    finer = function(operator(), method=method, tolerance=0.12)
    assert finer.relative_standard_error <= 0.12
    assert finer.num_matvecs >= estimate.num_matvecs


@pytest.mark.parametrize("function, method", WAYS, ids=ids)
def test_budget_ends_a_tolerance(function, method):
    estimate = function(
        operator(), method=method, tolerance=1e-9, num_matvecs=20, seed=1
    )
    assert estimate.num_matvecs <= 20
    assert estimate.relative_standard_error > 1e-9


@pytest.mark.parametrize("function, method", WAYS, ids=ids)
def test_budget_and_tolerance_are_checked(function, method):
    for num_matvecs in (0, -1, 2.5):
        with pytest.raises(ValueError, match=f"Received: num_matvecs={num_matvecs}"):
            function(operator(), method=method, num_matvecs=num_matvecs)
    with pytest.raises(ValueError, match="Received: tolerance=0"):
        function(operator(), method=method, tolerance=0)
    with pytest.raises(ValueError, match="seed"):
        function(operator(), method=method, num_matvecs=2, seed=-1)


def test_one_sample_has_no_error():
    for method in ("layerwise", "hutchinson"):
        estimate = kc.hessian_diagonal(operator(), method=method, num_matvecs=1)
        assert estimate.standard_error is None
        assert np.isfinite(flat(estimate.value)).all()


@pytest.mark.parametrize(
    "method", ["exact", "layerwise", "hutchinson", "deflated", "auto"]
)
def test_blocks_of_the_trace_add_up(method):
    op = operator()
    estimate = kc.hessian_trace(op, method=method)
    blocks = [b.value for b in estimate.blocks]
    np.testing.assert_allclose(sum(blocks), estimate.value, rtol=1e-10)
    assert len(blocks) == len(op.variables)
    if method == "exact":
        expected = [d.sum() for d in truth(kc.hessian_diagonal)]
        np.testing.assert_allclose(blocks, expected, atol=1e-10)


@pytest.mark.parametrize("method", ["exact", "hutchinson", "deflated", "auto"])
def test_blocks_of_the_norm_add_up(method):
    op = operator()
    estimate = kc.hessian_frobenius_norm(op, method=method)
    squares = [b.value**2 for b in estimate.blocks]
    np.testing.assert_allclose(sum(squares), estimate.value**2, rtol=1e-10)
    if method == "exact":
        ends = np.cumsum(op.sizes)
        expected = [
            np.linalg.norm(dense()[end - size : end]) ** 2
            for end, size in zip(ends, op.sizes, strict=True)
        ]
        np.testing.assert_allclose(squares, expected, rtol=1e-9)


@pytest.mark.parametrize("method", ["exact", "deflated"])
def test_norms_of_pairs_of_variables(method):
    """Each block of H, and with them what lies in no variable's own."""
    op = operator()
    exact = matrices.squared_norms_of_pairs(dense(), op.sizes)
    estimate = kc.hessian_frobenius_norm(op, method=method)
    pairs = estimate.pairs
    if method == "exact":
        np.testing.assert_allclose(pairs.value, np.sqrt(exact), rtol=1e-9)
        assert not pairs.standard_error.any()
    else:
        error = abs(pairs.value - np.sqrt(exact))
        assert (error <= 4 * pairs.standard_error + 1e-9).all()
        assert pairs.standard_error.max() < 0.1 * estimate.value
    hutchinson = kc.hessian_frobenius_norm(op, method="hutchinson", num_matvecs=8)
    assert hutchinson.pairs is None


# Ctrl-C


@pytest.mark.parametrize("whole_data", [False, True])
@pytest.mark.parametrize(
    "function, arguments, after",
    [
        (kc.hessian_trace, {"method": "hutchinson", "num_matvecs": 64}, 9),
        (kc.hessian_trace, {"method": "deflated", "num_matvecs": 64}, 9),
        (kc.hessian_frobenius_norm, {"method": "hutchinson", "num_matvecs": 64}, 9),
        (kc.hessian_frobenius_norm, {"method": "deflated", "num_matvecs": 28}, 6),
        (kc.hessian_frobenius_norm, {"method": "deflated", "tolerance": 1e-9}, 8),
        (kc.hessian_eigenvalues, {"k": 2, "tolerance": 1e-12}, 9),
        (kc.hessian_spectral_density, {"num_vectors": 4}, 5),
    ],
)
def test_an_interruption_returns_what_is_known(
    function, arguments, after, whole_data, monkeypatch
):
    """Ctrl-C during a product: it is finished, and what is known by then counts."""
    model = cases.sequential(
        keras.layers.Input((3,)),
        keras.layers.Dense(6, activation="gelu"),
        keras.layers.Dense(6, activation="gelu"),
        keras.layers.Dense(3),
        loss="mse",
    )
    x, y = cases._numbers(6, 3), cases._numbers(6, 3, seed=1)
    h = kc.hessian_matrix(model, x, y)
    assert len(h) > 64
    op = kc.HessianOperator(model, x, y, batch_size=2 if whole_data else None)
    compute, passes = op._products, []

    def interrupted(*arguments):
        passes.append(1)
        if len(passes) == after:
            signal.raise_signal(signal.SIGINT)
        return compute(*arguments)

    monkeypatch.setattr(op, "_products", interrupted)
    found = function(op, seed=1, **arguments)
    assert 0 < found.num_matvecs <= 4 * after
    if function in SCALARS:
        error = abs(found.value - SCALARS[function](h))
        assert 0 < found.standard_error and error <= 4 * found.standard_error
    elif function is kc.hessian_eigenvalues:
        for value, bound in zip(found.value, found.standard_error, strict=True):
            assert 0 < abs(np.linalg.eigvalsh(h) - value).min() <= bound
    else:
        moment = found.moment(1)
        error = abs(moment.value - np.trace(h) / len(h))
        assert error <= 4 * moment.standard_error


def test_a_second_interruption_is_raised(monkeypatch):
    op = operator()

    def interrupted(rows, count):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(op, "_products", interrupted)
    with pytest.raises(KeyboardInterrupt):
        kc.hessian_trace(op, method="hutchinson")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


# What is shown meanwhile


def test_short_computations_show_nothing(capsys):
    kc.hessian_trace(operator(), method="hutchinson", num_matvecs=8)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("function, method", WAYS, ids=ids)
def test_progress_on_request(function, method, capsys):
    function(operator(), method=method, num_matvecs=12, verbose=True)
    output = capsys.readouterr().out
    assert "12/12" in output and "/matvec" in output
    assert operator().evaluation.on_batch is None


def test_progress_is_checked():
    with pytest.raises(ValueError, match="Received: verbose='loud'"):
        kc.hessian_trace(operator(), verbose="loud")
