"""Curvature at the layers' outputs, on every backend and every case.

Each backend's own dense Hessian is the judge here; that is compared with differences of
the gradient, and with the figures of the other backends.
"""

import json
import pathlib

import cases
import keras
import numpy as np
import probed_cases
import pytest
from keras import layers, ops
from probed_cases import FLOAT

import keras_curvature as kc
from keras_curvature.layerwise import (
    ExactDiagonal,
    GaussNewtonDiagonal,
    LayerwiseDiagonal,
    find_structure,
)
from keras_curvature.layerwise.rules import rule_for

RTOL = 1e-9 if FLOAT == "float64" else 2e-5

#: Figures of each case, made on TensorFlow in float64 by `python -m figures`.
FIGURES = json.loads((pathlib.Path(__file__).parent / "figures.json").read_text())


def numpy_of(x):
    return np.asarray(ops.convert_to_numpy(x))


def probed(name):
    """A case's operator and its dense Hessian."""
    found = probed_cases.probed(name)
    return found.op, found.dense.astype("float64")


def close(actual, expected, rtol=RTOL):
    """Relative to the largest entry."""
    scale = np.abs(expected).max()
    assert scale > 1e-4
    np.testing.assert_allclose(actual, expected, rtol=0, atol=rtol * scale)


@pytest.fixture(autouse=True)
def _float():
    with cases.floatx(FLOAT):
        yield


@pytest.mark.parametrize(
    # Dropout's masks are the backend's own.
    "name",
    [n for n in cases.CASES if n != "dropout_training"],
)
def test_the_same_weights_and_data_give_the_same_figures(name):
    op, dense = probed(name)
    expected = FIGURES[name]
    np.testing.assert_allclose(numpy_of(op.loss()), expected["loss"], rtol=1e-5)
    norm = expected["frobenius_norm"]
    assert abs(np.linalg.norm(dense) - norm) <= 1e-5 * norm
    # The trace is a sum of terms of both signs, no larger than the norm altogether.
    assert abs(np.trace(dense) - expected["trace"]) <= 1e-5 * norm * len(dense) ** 0.5
    close(np.diag(dense), expected["diagonal"], 1e-5)
    close(dense, dense.T)


@pytest.mark.parametrize("name", cases.CASES)
def test_the_exact_diagonal_is_that_of_the_matrix(name):
    op, dense = probed(name)
    exact = op.evaluation.once(ExactDiagonal)
    plan = exact.plan()
    close(numpy_of(exact.compute(plan)), np.diag(dense))
    assert plan.num_matvecs <= len(dense)


#: Kinds of structure; the noise of the others is no other.
SAMPLED = [
    "mlp_gelu",
    "cnn_depthwise",
    "batch_norm_training",
    "embedding_mask",
    "transformer",
    "gru_unrolled",
    "shared_layer",
    "tied_embedding",
    "two_outputs",
    "penalties",
    "subclassed",
]
if probed_cases.ON_TENSORFLOW:
    # Those of all cases are in `test_structure.py` there.
    SAMPLED = ["mlp_gelu"]


@pytest.mark.parametrize("name", SAMPLED)
def test_samples_are_unbiased(name):
    op, dense = probed(name)
    samples = LayerwiseDiagonal(op.evaluation).samples
    key = kc.estimators.seed_key(0)
    drawn = np.concatenate([numpy_of(samples(key, i, 4)) for i in range(0, 96, 4)])
    drawn = drawn.astype("float64")
    error = drawn.std(axis=0, ddof=1) / len(drawn) ** 0.5
    distance = np.abs(drawn.mean(axis=0) - np.diag(dense))
    # Six standard errors, and rounding.
    assert np.all(distance <= 6 * error + RTOL * np.abs(np.diag(dense)).max())
    # A sample is a function of key and number alone.
    np.testing.assert_allclose(
        numpy_of(samples(key, 5, 1))[0], drawn[5], rtol=1e-4, atol=1e-5
    )


def test_the_control_variate_is_unbiased():
    op, dense = probed("mlp_gelu")
    estimate = kc.hessian_diagonal(
        op, method="layerwise", num_matvecs=32, control_variate=True
    )
    distance = np.abs(op.flatten(estimate.value) - np.diag(dense))
    error = op.flatten(estimate.standard_error)
    assert np.all(distance <= 6 * error + 1e-4 * np.abs(np.diag(dense)).max())


def test_batch_normalization_couples_samples_through_its_statistics():
    def found(op):
        structure = op.evaluation.once(find_structure)
        assert not structure.samples_interact
        return [name.moment for name in structure.statistics]

    assert found(probed("batch_norm_training")[0]) == ["mean", "variance"]
    assert found(probed("batch_norm")[0]) == []
    model, x, y, *_ = cases.batch_norm_training()
    assert found(kc.HessianOperator(model, x[:1], y[:1], training=True))


def test_noise_is_still_in_a_layer_with_a_rule_of_its_user():
    class Noisy(layers.Dense):
        def __init__(self, units):
            super().__init__(units)
            self.seeds = keras.random.SeedGenerator(0)

        def call(self, x, training=False):
            z = super().call(x)
            return z + keras.random.normal(z.shape, seed=self.seeds) * int(training)

    kc.register_layer_rule(Noisy)(type(rule_for(layers.Dense(1))))
    keras.utils.set_random_seed(0)
    stack = Noisy(4), layers.Activation("tanh"), layers.Dense(2)
    model = cases.sequential(layers.Input((3,)), *stack)
    op = kc.HessianOperator(model, *[cases._numbers(5, n, seed=n) for n in (3, 2)])
    structure = op.evaluation.once(find_structure)
    assert len(structure.uses) == 2
    exact = kc.hessian_diagonal(op, method="exact", verbose=False).value
    expected = np.diag(op.to_dense())
    np.testing.assert_allclose(op.flatten(exact), expected, rtol=1e-4, atol=1e-6)


def test_gauss_newton():
    """Equal to the Hessian where the model is piecewise linear; never negative."""
    op, dense = probed("mlp_relu")
    gauss_newton = op.evaluation.once(GaussNewtonDiagonal)
    value, passes = gauss_newton.compute()
    close(numpy_of(value), np.diag(dense), 1e-5)
    assert passes == 3
    with pytest.raises(ValueError, match="takes 3 backward passes"):
        gauss_newton.compute(max_matvecs=1)
    sampled = kc.hessian_diagonal(op, method="gauss_newton", num_matvecs=64)
    value, error = op.flatten(sampled.value), op.flatten(sampled.standard_error)
    assert value.min() >= 0
    assert np.all(np.abs(value - np.diag(dense)) <= 6 * error + 1e-5 * value.max())


def test_a_layer_that_is_called_on_a_constant():
    # As many positions as samples: their number tells nothing.
    inputs = layers.Input((4, 2))
    x = layers.Dense(2, activation="tanh")(cases.Positions(4)(inputs))
    model = cases.functional(inputs, layers.Dense(2)(layers.Flatten()(x)))
    x, y = cases._numbers(4, 4, 2), cases._numbers(4, 2, seed=1)
    op = kc.HessianOperator(model, x, y)
    coverage = op.evaluation.once(find_structure).coverage
    assert list(coverage.values()).count("parameters") == 1
    diagonal = kc.hessian_diagonal(op, method="exact")
    close(op.flatten(diagonal.value), np.diag(op.to_dense()))


@pytest.mark.parametrize("tied", [False, True])
def test_a_table_that_is_used_in_reverse(tied):
    """In both ways with a table for each; only in reverse with one."""
    table = layers.ReversibleEmbedding(5, 3, tie_weights=tied, mask_zero=True)
    x, inputs = cases._numbers(3, 4, 3), layers.Input((4, 3))
    if not tied:
        x = np.array([[1, 2, 3, 4], [2, 2, 0, 0], [4, 0, 0, 0]])
        inputs = layers.Input((4,), dtype="int32")
    hidden = inputs if tied else table(inputs)
    outputs = table(layers.Dense(3, activation="tanh")(hidden), reverse=True)
    model = cases.functional(inputs, outputs, cases._cross_entropy())
    op = kc.HessianOperator(model, x, cases._labels((3, 4), 5))
    coverage = op.evaluation.once(find_structure).coverage
    assert set(coverage.values()) == {"layer outputs"}
    diagonal = kc.hessian_diagonal(op, method="exact")
    close(op.flatten(diagonal.value), np.diag(op.to_dense()))


def test_batches_of_other_lengths_than_the_first():
    model = cases.of_any_length()
    op = kc.HessianOperator(model, cases.Lengths())
    dense = op.to_dense()
    diagonal = kc.hessian_diagonal(op, method="exact")
    close(op.flatten(diagonal.value), np.diag(dense))
    by_batch = [
        kc.HessianOperator(model, *cases.Lengths()[i]).to_dense() for i in range(2)
    ]
    close(dense, np.mean(by_batch, axis=0))
    sampled = kc.hessian_diagonal(
        op, method="layerwise", num_matvecs=64, control_variate=False
    )
    distance = np.abs(op.flatten(sampled.value) - np.diag(dense))
    assert np.all(distance <= 6 * op.flatten(sampled.standard_error) + 1e-5)
