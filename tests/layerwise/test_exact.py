"""The exact diagonal against differences, its plans and their price."""

import cases
import diagonals
import keras
import numpy as np
import pytest
import tensorflow as tf
from diagonals import assert_close, mixing, operator, probed
from keras import layers, ops, regularizers

import keras_curvature as kc
from keras_curvature import backend
from keras_curvature.layerwise import exact as exact_diagonal
from keras_curvature.layerwise import gauss_newton
from keras_curvature.layerwise.rules import paths


def relu_net(classes=3, width=8):
    model = cases.sequential(
        layers.Input((4,)),
        layers.Dense(width, activation="relu"),
        layers.Dense(width, activation="relu"),
        layers.Dense(classes),
        loss=cases._cross_entropy(),
    )
    return cases.Case(model, cases._numbers(6, 4), cases._labels(6, classes))


@pytest.mark.parametrize("name", cases.CASES)
def test_equals_differences_of_the_gradient(name, float64):
    _, op, expected = probed(name)
    value, plan = diagonals.exact(op)
    assert_close(value, expected)
    assert plan.num_matvecs <= op.shape[0]
    assert set(plan.ways) == set(diagonals.structure(op).coverage)


def test_piecewise_linear_networks_are_certified(float64):
    case = relu_net()
    op = operator(case)
    value, plan = diagonals.exact(op)
    assert set(plan.ways.values()) == {"gauss_newton"}
    assert plan.num_matvecs == 3
    assert_close(value, diagonals.by_differences(case))


def test_max_pooling_is_piecewise_linear():
    plan = diagonals.exact(operator(cases.CASES["cnn_max_pool"]()))[1]
    assert set(plan.ways.values()) == {"gauss_newton"}


@pytest.mark.parametrize("activation", ["tanh", "gelu"])
def test_curved_networks_are_not_certified(activation):
    model = cases.sequential(
        layers.Input((4,)),
        layers.Dense(8, activation=activation),
        layers.Dense(8, activation="relu"),
        layers.Dense(3),
        loss=cases._cross_entropy(),
    )
    op = operator(cases.Case(model, cases._numbers(6, 4), cases._labels(6, 3)))
    ways = list(diagonals.exact(op)[1].ways.values())
    # What follows the curved activation is piecewise linear.
    assert ways == ["outputs"] * 2 + ["gauss_newton"] * 4


def test_each_way_gives_the_same(float64):
    case = relu_net()
    op, expected = operator(case), diagonals.by_differences(case)
    for way in ("outputs", "parameters", "gauss_newton"):
        assert_close(diagonals.by_way(op, way), expected)


def test_a_kernel_used_at_many_positions_goes_by_its_parameters():
    case = mixing(layers.Input((9, 1)), layers.Conv1D(2, 2, activation="tanh"))
    plan = diagonals.exact(operator(case))[1]
    assert set(plan.ways.values()) == {"parameters"}
    assert plan.num_matvecs == 6


def _gram(w):
    return ops.sum(ops.square(ops.matmul(w, ops.transpose(w))))


@pytest.mark.parametrize(
    "regularizer, way",
    [
        (regularizers.L1(0.1), "outputs"),
        (regularizers.L2(0.1), "outputs"),
        (regularizers.L1L2(0.1, 0.2), "outputs"),
        (lambda w: 0.3 * _gram(w), "parameters"),
    ],
)
def test_penalties(regularizer, way, float64):
    case = mixing(
        layers.Input((6,)),
        layers.Dense(4, kernel_regularizer=regularizer, activation="tanh"),
        layers.Dense(3, activation="tanh"),
    )
    value, plan = diagonals.exact(operator(case))
    assert_close(value, diagonals.by_differences(case))
    assert next(iter(plan.ways.values())) == way


@pytest.mark.parametrize("name", ["mlp_relu", "two_inputs", "embedding"])
def test_little_memory_gives_the_same(name, float64, monkeypatch):
    case, _, expected = probed(name)
    monkeypatch.setattr(exact_diagonal, "FOLDED_ELEMENTS", 1)
    monkeypatch.setattr(gauss_newton, "ROWS_ELEMENTS", 1)
    monkeypatch.setattr(paths, "CHUNK_ELEMENTS", 1)
    assert_close(diagonals.exact(operator(case))[0], expected)


def test_memory_for_basis_vectors_is_bounded(monkeypatch):
    folds = []
    original = exact_diagonal.backend.sum_range

    def noted(function, count, at_once):
        folds.append(at_once)
        return original(function, count, at_once)

    monkeypatch.setattr(exact_diagonal.backend, "sum_range", noted)
    monkeypatch.setattr(exact_diagonal, "FOLDED_ELEMENTS", 2000)
    case = mixing(layers.Input((5,)), layers.Dense(4), samples=10)
    diagonals.by_way(operator(case), "outputs")
    # 10 samples of 4 outputs, for each basis vector.
    assert folds == [2000 // (1 + 40)]

    folds.clear()
    inputs = layers.Input((2, 5))
    shared = layers.Dense(4)
    outputs = layers.Add()([shared(inputs[:, 0]), shared(inputs[:, 1])])
    model = cases.functional(inputs, outputs)
    x, y = cases._numbers(10, 2, 5), cases._numbers(10, 4)
    diagonals.by_way(operator(cases.Case(model, x, y)), "outputs")
    # Both uses, and a kernel of 20 for each sample.
    assert folds == [2000 // (200 + 2 * 40)] * 2


def test_chunks_and_data_sets_give_the_mean_over_batches(float64):
    case = mixing(layers.Input((3,)), layers.Dense(2), samples=6)
    expected = diagonals.by_differences(case)
    chunked = operator(case, batch_size=2)
    assert_close(diagonals.exact(chunked)[0], expected)
    data = tf.data.Dataset.from_tensor_slices((case.x, case.y)).batch(4)
    streamed = kc.HessianOperator(case.model, data)
    assert_close(diagonals.exact(streamed)[0], expected)


def test_sequences_of_varying_length(float64):
    inputs = layers.Input((None, 2))
    hidden = layers.Dense(3, activation="tanh")(inputs)
    outputs = layers.Dense(2)(layers.GlobalAveragePooling1D()(hidden))
    model = cases.functional(inputs, outputs)
    batches = [
        (cases._numbers(4, steps, 2, seed=steps), cases._numbers(4, 2, seed=1))
        for steps in (3, 4)
    ]
    data = tf.data.Dataset.from_generator(
        lambda: iter(batches),
        output_signature=(
            tf.TensorSpec((None, None, 2), "float64"),
            tf.TensorSpec((None, 2), "float64"),
        ),
    ).apply(tf.data.experimental.assert_cardinality(2))
    op = kc.HessianOperator(model, data)
    expected = np.mean(
        [diagonals.by_differences(cases.Case(model, x, y)) for x, y in batches], axis=0
    )
    assert_close(diagonals.exact(op)[0], expected)


def test_variables_of_equal_path(float64):
    def block():
        inputs = layers.Input((3,))
        return keras.Model(inputs, layers.Dense(3, name="proj")(inputs))

    inputs = layers.Input((3,))
    hidden = layers.Activation("tanh")(block()(inputs))
    model = cases.functional(inputs, block()(hidden), loss=diagonals.mixing_loss)
    assert len({v.path for v in model.trainable_variables}) == 2
    case = cases.Case(model, cases._numbers(4, 3), cases._numbers(4, 3, seed=1))
    op = operator(case)
    value, plan = diagonals.exact(op)
    assert_close(value, diagonals.by_differences(case))
    assert list(plan.ways) == [
        "proj/kernel",
        "proj/bias",
        "proj/kernel (2)",
        "proj/bias (2)",
    ]
    diagonals.assert_unbiased(diagonals.samples_of(op, 64), value)


def test_several_plans_and_diagonals_of_one_operator(float64):
    case, op, expected = probed("mlp_relu")
    first, plan = diagonals.exact(op)
    traces = backend.num_traces()
    second, again = diagonals.exact(op)
    np.testing.assert_array_equal(first, second)
    assert plan == again
    assert backend.num_traces() == traces


# For users


def test_number_of_products_and_errors_of_zero(float64):
    case = relu_net()
    estimate = kc.hessian_diagonal(case.model, case.x, case.y, method="exact")
    assert estimate.num_matvecs == 3
    assert all(np.all(error == 0) for error in estimate.standard_error)
    flat = np.concatenate([np.ravel(v) for v in estimate.value])
    assert_close(flat, diagonals.by_differences(case))


def test_refuses_what_takes_too_many_products():
    op = probed("mlp_gelu").op
    cost = diagonals.exact(op)[1].num_matvecs
    with pytest.raises(ValueError, match=rf'takes {cost} .*max_matvecs=2.*"layerwise"'):
        kc.hessian_diagonal(op, method="exact", max_matvecs=2)
    kc.hessian_diagonal(op, method="exact", max_matvecs=cost)


def test_interacting_samples_go_by_the_parameter_basis(float64):
    _, op, expected = probed("add_loss")
    value, plan = diagonals.exact(op)
    assert set(plan.ways.values()) == {"parameters"}
    assert plan.num_matvecs == op.shape[0]
    assert_close(value, expected)
    arrays = kc.hessian_diagonal(op, method="exact").value
    assert_close(op.flatten(arrays), expected)
