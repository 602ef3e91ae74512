"""Curvature through the statistics that BatchNormalization takes of a batch."""

import functools

import cases
import diagonals
import keras
import numpy as np
import pytest
import tensorflow as tf
from diagonals import assert_close, assert_unbiased, operator
from keras import layers, ops

import keras_curvature as kc
from keras_curvature.layerwise import ExactDiagonal, Plan, SplitDiagonal

BatchNorm = layers.BatchNormalization


def training(*stack, shape=(3,), samples=6, x=None):
    """A case of a stack of layers in training mode."""
    x = cases._numbers(samples, *shape) if x is None else x
    model = cases.sequential(layers.Input(shape, dtype=x.dtype), *stack)
    y = cases._numbers(*model(x).shape, seed=1)
    return cases.Case(model, x, y, training=True)


def tanh():
    return layers.Activation("tanh")


def in_sequence():
    """The statistics of the second layer feel those of the first."""
    return training(
        layers.Dense(4),
        BatchNorm(),
        tanh(),
        layers.Dense(3, use_bias=False),
        BatchNorm(center=False, scale=False),
        tanh(),
        layers.Dense(2),
    )


def convolutional():
    return training(
        layers.Conv2D(2, 2),
        BatchNorm(epsilon=0.1),
        tanh(),
        layers.Conv2D(2, 2),
        BatchNorm(),
        layers.Activation("gelu"),
        layers.GlobalAveragePooling2D(),
        layers.Dense(2),
        shape=(4, 4, 1),
        samples=4,
    )


def residual():
    """What is normalized also goes past the normalization."""
    inputs = layers.Input((3,))
    x = layers.Dense(3)(inputs)
    x = x + layers.Dense(3)(tanh()(BatchNorm()(x)))
    x = layers.Dense(2)(tanh()(BatchNorm()(x)))
    model = cases.functional(inputs, x)
    x, y = cases._numbers(6, 3), cases._numbers(6, 2, seed=1)
    return cases.Case(model, x, y, training=True)


def masked():
    return training(
        layers.Embedding(5, 3, mask_zero=True),
        layers.Dense(2),
        BatchNorm(),
        tanh(),
        layers.Dense(2),
        shape=(4,),
        x=np.array([[1, 2, 3, 4], [2, 2, 0, 0], [4, 0, 0, 0], [3, 1, 1, 0]], "int32"),
    )


def channels_first():
    """One layer that is called twice, each time with statistics of its own."""
    inputs = layers.Input((2, 3))
    shared = layers.Dense(3), BatchNorm(axis=1)
    a, b = (shared[1](shared[0](x)) for x in (inputs, ops.square(inputs)))
    model = cases.functional(inputs, layers.Dense(2)(ops.tanh(a) * b))
    x, y = cases._numbers(4, 2, 3), cases._numbers(4, 2, 2, seed=1)
    return cases.Case(model, x, y, training=True)


def uncovered():
    """A layer without a rule, a penalty, and an output that is normalized."""
    return training(
        layers.Dense(3, kernel_regularizer=keras.regularizers.L2(0.1)),
        layers.PReLU(),
        BatchNorm(synchronized=True),
        tanh(),
        layers.Dense(2, kernel_regularizer=keras.regularizers.L2(0.1)),
        BatchNorm(beta_regularizer=keras.regularizers.L2(0.1)),
    )


NETWORKS = [
    in_sequence,
    convolutional,
    residual,
    masked,
    channels_first,
    uncovered,
    cases.CASES["batch_norm_training"],
]


@functools.cache
def probed(make):
    """A case, its operator, and its diagonal by differences of the gradient."""
    with cases.floatx("float64"):
        case = make()
        return case, operator(case), diagonals.by_differences(case)


@pytest.fixture(autouse=True)
def _float(module_float64):
    pass


def samples(op, groups="joint", control_variate=False, count=128):
    draw = diagonals.sampler(op, groups, control_variate)
    return np.concatenate([draw(0, i, 4) for i in range(0, count, 4)], axis=1)


@pytest.mark.parametrize("make", NETWORKS)
def test_all_parts_together_are_the_diagonal(make):
    """The sum over all directions at outputs and statistics: nothing is random."""
    _, op, expected = probed(make)
    structure = diagonals.structure(op)
    assert structure.statistics and not structure.samples_interact
    names = structure.loss.layout.names
    covered = [i in structure.uses_of for i in range(len(names))]
    assert np.mean(covered) > 0.8
    ways = [("parameters", "outputs")[c] for c in covered]
    plan = Plan(dict(zip(names, ways, strict=True)), 0)
    exact = ExactDiagonal(op.evaluation).compute(plan)
    assert_close(np.asarray(exact), expected)


def test_the_parameter_basis_has_the_statistics_inside():
    """With its layers closed, one network is like another."""
    _, op, expected = probed(in_sequence)
    assert_close(diagonals.by_way(op, "parameters"), expected)


@pytest.mark.parametrize("make", NETWORKS)
def test_samples_are_unbiased(make):
    _, op, expected = probed(make)
    assert_unbiased(samples(op), expected)


@pytest.mark.parametrize("control_variate", [False, True])
def test_groups_and_the_control_variate_are_unbiased(control_variate):
    _, op, expected = probed(in_sequence)
    assert_unbiased(samples(op, "layer", control_variate), expected)


def test_standard_errors_are_calibrated():
    _, op, expected = probed(in_sequence)
    drawn = samples(op, count=320).reshape(len(expected), 20, 16)
    error = drawn.std(axis=2, ddof=1) / 4
    distance = np.abs(drawn.mean(axis=2) - expected[:, None])
    inside = distance <= 2 * error + 1e-7 * np.abs(expected).max()
    # Student's t with 15 degrees of freedom: 93.6 %, more with heavy tails.
    assert 0.88 < np.mean(inside) < 0.99
    assert np.mean(distance > 6 * error + 1e-7 * np.abs(expected).max()) < 0.01


def test_a_product_of_their_own_takes_noise_out():
    _, op, expected = probed(in_sequence)
    joint, apart = (
        np.square(samples(op, groups) - expected[:, None]).sum()
        for groups in ("joint", "layer")
    )
    assert apart < joint


def test_each_batch_has_statistics_of_its_own():
    case = in_sequence()
    data = tf.data.Dataset.from_tensor_slices((case.x, case.y)).batch(4)
    op = kc.HessianOperator(case.model, data, training=True)
    truth = np.diag(op.to_dense())
    exact = diagonals.by_way(op, "outputs")
    assert_close(exact, truth)
    assert_unbiased(samples(op), truth)
    one = diagonals.by_way(operator(case), "outputs")
    assert np.abs(one - truth).max() > 0.01 * np.abs(truth).max()


# When there are none, or they are not all


class MixesTheBatch(layers.Layer):
    def call(self, x):
        return x + 0.5 * ops.roll(x, 1, axis=0)


class OfItsOwn(BatchNorm):
    """Takes its statistics in a way of its own."""

    def _moments(self, inputs, mask):
        mean = ops.mean(inputs, axis=0)
        return mean, ops.mean(ops.abs(inputs - mean), axis=0)


@pytest.mark.parametrize(
    "stack", [[BatchNorm, MixesTheBatch], [OfItsOwn], [MixesTheBatch]]
)
def test_what_else_mixes_the_batch_is_noticed(stack):
    middle = [make() for make in stack]
    case = training(layers.Dense(3), *middle, tanh(), layers.Dense(2))
    op = operator(case)
    assert diagonals.structure(op).samples_interact
    with pytest.warns(UserWarning, match="samples of a batch interact"):
        kc.hessian_diagonal(op, method="layerwise", num_matvecs=1)


def frozen():
    case = in_sequence()
    for layer in case.model.layers:
        if isinstance(layer, BatchNorm):
            layer.trainable = False
    return case


def of_the_inputs():
    """Its statistics do not move with any variable."""
    return training(BatchNorm(), layers.Dense(3), tanh(), layers.Dense(2))


@pytest.mark.parametrize(
    "make", [frozen, of_the_inputs, lambda: in_sequence()._replace(training=False)]
)
def test_statistics_that_do_not_move_change_nothing(make):
    op = operator(make())
    structure = diagonals.structure(op)
    assert structure.samples_independent
    kc.hessian_diagonal(op, method="gauss_newton")
    assert_close(diagonals.exact(op)[0], np.diag(op.to_dense()))


def test_the_model_is_untouched():
    case = in_sequence()
    before = [dict(vars(layer)) for layer in case.model.layers]
    values = [v.numpy() for v in case.model.variables]
    samples(operator(case), count=4)
    for layer, attributes in zip(case.model.layers, before, strict=True):
        assert vars(layer).keys() == attributes.keys()
        assert "_moments" not in vars(layer) and "call" not in vars(layer)
    for variable, value in zip(case.model.variables, values, strict=True):
        np.testing.assert_array_equal(variable, value)


@pytest.mark.parametrize("make", NETWORKS)
def test_both_parts_are_unbiased_together(make):
    _, op, expected = probed(make)
    parts = op.evaluation.once(SplitDiagonal)
    assert parts.possible and not parts.alike
    pair = parts.gauss_newton, parts.rest["parameters"]
    drawn = [diagonals.drawing(one)(0, 0, 128) for one in pair]
    assert_unbiased(sum(drawn), expected)


def test_gauss_newton_by_samples_alone():
    """The exact diagonal would need the statistics as well."""
    case, op, _ = probed(in_sequence)
    with pytest.raises(ValueError, match="samples .* interact.*num_matvecs"):
        kc.hessian_diagonal(op, method="gauss_newton")
    found = kc.hessian_diagonal(op, method="gauss_newton", num_matvecs=512)
    values = [v.value for v in case.model.trainable_variables]
    with tf.GradientTape() as tape:
        outputs = tf.reshape(case.model(case.x, training=True), [-1])
    jacobian = tape.jacobian(outputs, values, unconnected_gradients="zero")
    rows = [np.reshape(j, (len(outputs), -1)) for j in jacobian]
    # Mean squared errors: S is twice the unit matrix over the number of outputs.
    truth = 2 / len(outputs) * np.sum(np.concatenate(rows, axis=1) ** 2, axis=0)
    distance = np.abs(op.flatten(found.value) - truth)
    errors = op.flatten(found.standard_error)
    assert np.all(distance <= 6 * errors + 1e-9)
    assert np.mean(errors) < 0.1 * np.mean(truth)


def test_hessian_diagonal_goes_by_layer_outputs():
    _, op, expected = probed(in_sequence)
    exact = kc.hessian_diagonal(op)
    assert exact.num_matvecs < len(expected)
    assert_close(op.flatten(exact.value), expected)
    sampled = kc.hessian_diagonal(op, method="layerwise", num_matvecs=4)
    np.testing.assert_allclose(
        op.flatten(sampled.value), samples(op, count=4).mean(axis=1), rtol=1e-6
    )
