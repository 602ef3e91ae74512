"""The functions users call, against dense Hessians in float64 by TensorFlow's tapes.

Which methods there are, what they give, and what the options do; standard errors,
seeds and budgets are in `test_analysis_random.py`.
"""

import functools

import cases
import keras
import numpy as np
import pytest
from keras import layers, ops

import keras_curvature as kc
from keras_curvature import analysis, backend, diagonal

if keras.backend.backend() != "tensorflow":
    # Elsewhere Keras computes in float32: see `operators/test_hessian_anywhere.py`.
    pytest.skip("figures in float64", allow_module_level=True)

import reference
import tensorflow as tf

pytestmark = pytest.mark.usefixtures("module_float64")

SCALARS = {
    kc.hessian_trace: np.trace,
    kc.hessian_frobenius_norm: np.linalg.norm,
}
FUNCTIONS = (kc.hessian_diagonal, kc.hessian_matrix, *SCALARS)


@functools.cache
def case(name):
    return cases.CASES[name]()


@functools.cache
def dense(name):
    """The Hessian, by code that is not the package's."""
    return reference.hessian_by_tapes(case(name))


@functools.cache
def operator(name):
    """One operator for all tests of a case, so that it is traced once."""
    model, x, y, weight, training = case(name)
    return kc.HessianOperator(model, x, y, weight, training=training)


def flat(arrays):
    return np.concatenate([np.ravel(a) for a in arrays])


def close(actual, desired):
    """Equal up to the rounding of float64 in sums of order one."""
    np.testing.assert_allclose(actual, desired, rtol=1e-8, atol=1e-10)


# Exact figures


@pytest.mark.parametrize(
    "name", ["mlp_tanh", "cnn_max_pool", "embedding", "two_outputs"]
)
def test_exact_figures(name):
    op, h = operator(name), dense(name)
    diagonal = kc.hessian_diagonal(op, method="exact")
    close(flat(diagonal.value), np.diag(h))
    assert not flat(diagonal.standard_error).any()
    for function, figure in SCALARS.items():
        estimate = function(op, method="exact")
        close(estimate.value, figure(h))
        assert estimate.standard_error == 0
        assert isinstance(estimate.value, float)
    close(kc.hessian_matrix(op), h)


def test_value_is_aligned_with_the_variables():
    model, x, y, *_ = case("mlp_tanh")
    diagonal = kc.hessian_diagonal(model, x, y)
    for v, value, error in zip(
        model.trainable_variables, diagonal.value, diagonal.standard_error, strict=True
    ):
        assert isinstance(value, np.ndarray) and isinstance(error, np.ndarray)
        assert value.shape == error.shape == v.shape


def test_gauss_newton_is_the_hessian_of_a_piecewise_linear_model():
    op = operator("mlp_relu")
    for _ in range(2):  # Also when the operator has been traced before.
        estimate = kc.hessian_diagonal(op, method="gauss_newton")
        close(flat(estimate.value), np.diag(dense("mlp_relu")))
        assert estimate.num_matvecs == 3


def test_gauss_newton_is_not_the_hessian_of_a_curved_model():
    estimate = kc.hessian_diagonal(operator("mlp_tanh"), method="gauss_newton")
    h = flat(estimate.value)
    assert (h > -1e-12).all()
    assert abs(h - np.diag(dense("mlp_tanh"))).max() > 1e-3


def test_same_operator_again_and_again():
    """What an exact diagonal learns while tracing must outlive the call."""
    op = operator("mlp_tanh")
    first = kc.hessian_diagonal(op, method="exact")
    second = kc.hessian_diagonal(op, method="exact")
    np.testing.assert_array_equal(flat(first.value), flat(second.value))
    assert first.num_matvecs == second.num_matvecs
    count = backend.num_traces()
    kc.hessian_diagonal(op, method="exact")
    assert backend.num_traces() == count


def test_figures_follow_the_weights():
    model, x, y, *_ = cases.mlp_relu()
    op = kc.HessianOperator(model, x, y)
    before = kc.hessian_trace(op, method="exact").value
    model.layers[0].kernel.assign(1.5 * model.layers[0].kernel)
    after = kc.hessian_trace(op, method="exact").value
    assert abs(after - before) > 1e-3
    close(after, np.trace(op.to_dense()))


# What "auto" takes


@pytest.mark.parametrize(
    "budget, cost", [({}, 3), ({"num_matvecs": 5}, 3), ({"num_matvecs": 4}, 3)]
)
def test_auto_is_exact_where_the_budget_allows(budget, cost):
    """Piecewise linear, three classes: three products give the exact diagonal.

    A smaller budget than that has its own test.
    """
    for function in (kc.hessian_diagonal, kc.hessian_trace):
        estimate = function(operator("mlp_relu"), **budget)
        assert estimate.num_matvecs == cost
        assert estimate.relative_standard_error < 1e-12


def test_auto_samples_what_is_dear(monkeypatch):
    monkeypatch.setattr(analysis, "AFFORDABLE_MATVECS", 2)
    monkeypatch.setattr(diagonal, "AFFORDABLE_MATVECS", 2)
    # Of eight, two stand for three passes: the part of three outputs is exact.
    estimate = kc.hessian_diagonal(operator("mlp_gelu"))
    assert estimate.num_matvecs == 6 + 2
    assert 0 < estimate.relative_standard_error < np.inf
    assert kc.hessian_trace(operator("mlp_gelu")).standard_error > 0
    norm = kc.hessian_frobenius_norm(operator("mlp_relu"))
    assert norm.standard_error > 0 and norm.num_matvecs == 32


def network(activation, normalized=False):
    """A classifier whose exact diagonal takes few passes if it has no curved layer."""
    keras.utils.set_random_seed(0)
    hidden = [layers.Dense(12, activation) for _ in range(2)]
    if normalized:
        hidden.insert(1, layers.BatchNormalization())
    model = keras.Sequential([layers.Input((8,)), *hidden, layers.Dense(3)])
    model.compile(
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    rng = np.random.default_rng(0)
    return kc.HessianOperator(model, rng.standard_normal((6, 8)), np.arange(6) % 3)


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (functools.partial(network, "gelu"), "Gauss-Newton part, and the rest"),
        (functools.partial(network, "relu", normalized=True), "along parameters"),
    ],
)
def test_nothing_is_certified_where_no_certificate_can_help(made, words, monkeypatch):
    """Certificates take as long to compile as all else together."""
    monkeypatch.setattr(diagonal, "AFFORDABLE_MATVECS", 16)
    monkeypatch.setattr(
        diagonal.ExactDiagonal, "plan", lambda self, seed: pytest.fail("certified")
    )
    estimate = kc.hessian_diagonal(made())
    assert all(words in way for way in estimate.ways.values())


def test_a_layer_that_only_looks_curved_does_not_cost_the_exact_diagonal(monkeypatch):
    monkeypatch.setattr(diagonal, "AFFORDABLE_MATVECS", 16)
    op = network(lambda x: ops.maximum(x, 0.1 * x))
    estimate = kc.hessian_diagonal(op)
    assert estimate.num_matvecs == 3
    close(flat(estimate.value), np.diag(op.to_dense()))


def test_auto_norm_is_exact_for_few_parameters():
    h = dense("mlp_tanh")
    estimate = kc.hessian_frobenius_norm(operator("mlp_tanh"))
    assert len(h) <= 64 and estimate.num_matvecs == len(h)
    close(estimate.value, np.linalg.norm(h))


@pytest.mark.filterwarnings("error")
def test_auto_where_samples_interact(monkeypatch):
    """No warning: nobody asked for the layers' outputs."""
    op = operator("add_loss")
    h = op.to_dense()
    close(flat(kc.hessian_diagonal(op).value), np.diag(h))  # P products: affordable.
    monkeypatch.setattr(diagonal, "AFFORDABLE_MATVECS", 2)
    sampled = kc.hessian_diagonal(op)
    assert sampled.num_matvecs == diagonal.LAYERWISE_SAMPLES
    distance = np.abs(flat(sampled.value) - np.diag(h))
    assert np.all(distance <= 6 * flat(sampled.standard_error) + 1e-6)
    # A subspace, which is everything here: samples would have an error.
    trace = kc.hessian_trace(op, num_matvecs=len(h))
    np.testing.assert_allclose(trace.value, np.trace(h), rtol=1e-6)


def test_layerwise_where_samples_interact():
    op = operator("add_loss")
    with pytest.warns(UserWarning, match="samples of a batch interact") as caught:
        estimate = kc.hessian_diagonal(op, method="layerwise", num_matvecs=4)
    assert estimate.num_matvecs == 4
    assert len(caught) == 1
    with pytest.raises(ValueError, match="training=False"):
        kc.hessian_diagonal(op, method="gauss_newton")


# Options


def weights():
    return np.array([0.0, 1.0, 2.0, 0.5, 1.0, 3.0, 1.0, 0.2])


def squared_error(model, x, y):
    return keras.ops.mean(
        keras.ops.square(model(x)[:, 0] - keras.ops.cast(y, "float64"))
    )


OPTIONS = {
    "sample_weight": lambda model: {"sample_weight": weights()},
    "class_weight": lambda model: {"class_weight": {0: 2.0, 1: 0.3, 2: 1.0}},
    "loss_fn": lambda model: {"loss_fn": squared_error},
    "variables": lambda model: {"variables": model.layers[1].trainable_variables},
    "batch_size": lambda model: {"batch_size": 4},
}


@pytest.mark.parametrize("option", OPTIONS)
def test_options_reach_the_operator(option):
    model, x, y, *_ = case("mlp_relu")
    options = OPTIONS[option](model)
    h = kc.HessianOperator(model, x, y, **options).to_dense()
    moves = {"sample_weight", "class_weight", "loss_fn"}
    if option in moves:
        assert abs(h - dense("mlp_relu")).max() > 1e-3
    assert len(h) == (24 if option == "variables" else 59)
    diagonal = kc.hessian_diagonal(model, x, y, method="exact", **options)
    assert len(diagonal.value) == (2 if option == "variables" else 6)
    close(flat(diagonal.value), np.diag(h))


def test_finite_differences_give_the_figures():
    model, x, y, *_ = case("mlp_tanh")
    h = dense("mlp_tanh")
    options = {"hvp": "finite_difference", "seed": 3, "num_matvecs": 64}
    diagonal = kc.hessian_diagonal(model, x, y, **options)
    same = kc.hessian_diagonal(model, x, y, method="hutchinson", seed=3, num_matvecs=64)
    assert len(h) <= 64  # The budget allows the exact diagonal, from products alone.
    np.testing.assert_allclose(flat(diagonal.value), np.diag(h), atol=1e-7)
    by_signs = kc.hessian_diagonal(model, x, y, method="hutchinson", **options)
    np.testing.assert_allclose(flat(by_signs.value), flat(same.value), atol=1e-6)


def test_data_set():
    model, x, y, *_ = case("mlp_relu")
    batches = tf.data.Dataset.from_tensor_slices((x, y)).batch(4)
    h = dense("mlp_relu")
    close(flat(kc.hessian_diagonal(model, batches).value), np.diag(h))
    close(kc.hessian_trace(model, batches, method="exact").value, np.trace(h))
    norm = kc.hessian_frobenius_norm(model, batches)
    np.testing.assert_allclose(norm.value, np.linalg.norm(h), rtol=1e-6)


# Any function of variables


@pytest.fixture(scope="module")
def function_operator():
    a = tf.Variable([1.0, 2.0], dtype="float64")
    b = tf.Variable(0.5, dtype="float64")
    return kc.HessianOperator.from_function(lambda: a[0] ** 2 * a[1] * b + b**3, [a, b])


def test_operator_of_a_function(function_operator):
    op = function_operator
    h = np.array([[2, 1, 4], [1, 0, 1], [4, 1, 3.0]])
    close(kc.hessian_matrix(op), h)
    diagonal = kc.hessian_diagonal(op)
    close(diagonal.value[0], [2, 0])
    close(diagonal.value[1], 3)
    assert [d.shape for d in diagonal.value] == [(2,), ()]
    for function, figure in SCALARS.items():
        close(function(op).value, figure(h))
        for method in ("exact", "deflated", "hutchinson"):
            estimate = function(op, method=method, num_matvecs=16)
            error = estimate.standard_error
            assert abs(estimate.value - figure(h)) <= 4 * error + 1e-9
    close(diagonal.num_matvecs, 3)


def test_function_has_no_layers(function_operator):
    with pytest.warns(UserWarning, match="no Keras model to open"):
        kc.hessian_diagonal(function_operator, method="layerwise", num_matvecs=2)
    with pytest.raises(ValueError, match="Layer outputs need a Keras model"):
        kc.hessian_diagonal(function_operator, method="gauss_newton")


# Errors


@pytest.mark.parametrize(
    "function, methods",
    [
        (
            kc.hessian_diagonal,
            "'auto', 'exact', 'shrunk', 'split', 'layerwise', 'hutchinson'",
        ),
        (kc.hessian_trace, "'auto', 'exact', 'split', 'layerwise', 'deflated'"),
        (kc.hessian_frobenius_norm, "'auto', 'exact', 'deflated', 'hutchinson'"),
    ],
)
def test_unknown_method(function, methods):
    with pytest.raises(ValueError, match=f"{methods}.*Received: method='magic'"):
        function(operator("mlp_relu"), method="magic")


@pytest.mark.parametrize(
    "function, method, alternative",
    [
        (kc.hessian_diagonal, "exact", "layerwise"),
        (kc.hessian_trace, "exact", "layerwise"),
        (kc.hessian_frobenius_norm, "exact", "deflated"),
    ],
)
def test_exact_figures_have_a_limit(function, method, alternative):
    with pytest.raises(ValueError, match=f"max_matvecs=2.*{alternative}"):
        function(operator("mlp_tanh"), method=method, max_matvecs=2)


def test_matrix_has_a_limit():
    with pytest.raises(ValueError, match=r"59 parameters.*GiB.*max_parameters=58"):
        kc.hessian_matrix(operator("mlp_relu"), max_parameters=58)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_operator_brings_its_data(function):
    op, x = operator("mlp_relu"), case("mlp_relu").x
    with pytest.raises(ValueError, match="brings its data and options along"):
        function(op, x)
    with pytest.raises(ValueError, match=r"options \['batch_size'\]"):
        function(op, batch_size=2)


def test_model_without_a_loss():
    model = keras.Sequential([keras.layers.Input((2,)), keras.layers.Dense(1)])
    with pytest.raises(ValueError, match="no loss yet"):
        kc.hessian_trace(model, np.ones((2, 2)), np.ones(2))


@pytest.mark.parametrize("function", FUNCTIONS)
def test_unknown_option(function):
    model, x, y, *_ = case("mlp_relu")
    with pytest.raises(TypeError, match="num_matvec'"):
        function(model, x, y, num_matvec=3)
