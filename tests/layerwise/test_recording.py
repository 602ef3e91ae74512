"""Which layers are opened, and what becomes of those that cannot be."""

import cases
import diagonals
import keras
import numpy as np
import pytest
from diagonals import assert_close, assert_unbiased, operator, samples_of
from keras import layers, ops

import keras_curvature as kc
from keras_curvature.layerwise.recording import LayerRecording
from keras_curvature.layerwise.rules import rule_for
from keras_curvature.loss import unique_names


def functional(inputs, outputs, samples=4, x=None):
    model = cases.functional(inputs, outputs, loss=diagonals.mixing_loss)
    if x is None:
        x = cases._numbers(samples, *model.input_shape[1:])
    return cases.Case(model, x, 0.5 * cases._numbers(*model(x).shape, seed=1))


def parallel():
    inputs = layers.Input((2, 3))
    shared = layers.Dense(3, activation="tanh")
    first, second = shared(inputs[:, 0]), shared(inputs[:, 1])
    return functional(inputs, layers.Dense(2)(first * second))


def chained():
    inputs = layers.Input((3,))
    shared = layers.Dense(3, activation="tanh")
    return functional(inputs, layers.Dense(2)(shared(shared(inputs))))


def tied():
    """A table that also is the matrix at the end, with a loss linear in its output."""
    case = cases.CASES["tied_embedding"]()
    case.model.compile(loss=lambda y, p: ops.sum(p, axis=-1))
    return case


def nested():
    inner_inputs = layers.Input((3,))
    inner = keras.Model(
        inner_inputs, layers.Dense(3, activation="tanh")(inner_inputs), name="inner"
    )
    block = keras.Sequential([layers.Dense(3), layers.LayerNormalization()])
    inputs = layers.Input((3,))
    return functional(inputs, layers.Dense(2)(block(inner(inputs))))


def prelu():
    inputs = layers.Input((4, 2))
    hidden = layers.Conv1D(2, 2, activation=layers.PReLU(shared_axes=[1]))(inputs)
    return functional(inputs, layers.Dense(2, activation="tanh")(hidden))


def spectral():
    inputs = layers.Input((3,))
    hidden = layers.SpectralNormalization(layers.Dense(3, activation="tanh"))(inputs)
    case = functional(inputs, layers.Dense(2)(hidden))
    return case._replace(training=True)


def positions():
    # As many positions as samples.
    inputs = layers.Input((4, 2))
    x = layers.Dense(2, activation="tanh")(cases.Positions(4)(inputs))
    return functional(inputs, layers.Dense(2)(layers.Flatten()(x)))


def rows_of_positions():
    """A reshape makes rows of the positions; they meet again later."""
    inputs = layers.Input((3, 2))
    rows = ops.reshape(inputs, (-1, 2))
    rows = layers.Dense(2, activation="tanh")(rows)
    return functional(inputs, layers.Dense(2)(ops.reshape(rows, (-1, 6))))


def time_distributed():
    inputs = layers.Input((3, 2))
    hidden = layers.TimeDistributed(layers.Dense(2, activation="tanh"))(inputs)
    return functional(inputs, layers.Dense(2)(layers.Flatten()(hidden)))


@keras.saving.register_keras_serializable(package="recording")
class KernelTwice(keras.Model):
    """Multiplies by the kernel of a layer, then applies the layer."""

    def __init__(self):
        super().__init__()
        self.dense = layers.Dense(3)

    def build(self, input_shape):
        self.dense.build(input_shape)

    def call(self, x):
        return self.dense(ops.matmul(x, self.dense.kernel))


def kernel_before_its_layer():
    """With a loss that is linear in the output, so that only the chain is curved."""
    model = KernelTwice()
    model.compile(loss=lambda y, p: ops.sum(y * p, axis=-1))
    x = cases._numbers(4, 3)
    model(x)
    return cases.Case(cases.randomize(model), x, cases._numbers(4, 3, seed=1))


class AddsLosses(layers.Dense):
    """Has a loss and a variable of its own within a call that a rule covers."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.inner = layers.Dense(2)

    def build(self, input_shape):
        super().build(input_shape)
        self.inner.build(input_shape)

    def call(self, inputs):
        self.add_loss(ops.mean(ops.square(self.inner(inputs)) * inputs[:, :2]))
        return super().call(inputs)


class AddsLossesRule(type(rule_for(layers.Dense(2)))):
    pass


def losses_inside():
    kc.register_layer_rule(AddsLosses)(AddsLossesRule)
    inputs = layers.Input((3,))
    hidden = AddsLosses(3, activation="tanh")(inputs)
    return functional(inputs, layers.Dense(2)(hidden))


LAYERS, PARAMETERS = "layer outputs", "parameters"

#: Case, and the ways of its variables in the order of the model.
STRUCTURES = [
    (parallel, [LAYERS] * 4),
    (chained, [PARAMETERS] * 2 + [LAYERS] * 2),
    (tied, [PARAMETERS] + [LAYERS] * 2),
    (kernel_before_its_layer, [PARAMETERS] * 2),
    (nested, [LAYERS] * 8),
    (prelu, [LAYERS] * 2 + [PARAMETERS] + [LAYERS] * 2),
    (spectral, [PARAMETERS] * 2 + [LAYERS] * 2),
    (positions, [PARAMETERS] + [LAYERS] * 4),
    (rows_of_positions, [PARAMETERS] * 2 + [LAYERS] * 2),
    (time_distributed, [LAYERS] * 4),
    (losses_inside, [LAYERS] * 6),
]


@pytest.mark.parametrize(
    "make, ways", STRUCTURES, ids=[make.__name__ for make, _ in STRUCTURES]
)
def test_structures(make, ways, float64):
    case = make()
    op = operator(case)
    if make is spectral:
        # Training assigns to the kernel: the differences would start elsewhere.
        expected = np.diag(op.to_dense())
    else:
        expected = diagonals.by_differences(case)
    value, _ = diagonals.exact(op)
    assert_close(value, expected)
    if not diagonals.structure(op).samples_interact:
        assert_unbiased(samples_of(op, 64, width=1), expected)
    coverage = diagonals.structure(op).coverage
    assert list(coverage) == [v.path for v in case.model.trainable_variables]
    assert list(coverage.values()) == ways


@pytest.mark.parametrize(
    "name, parameters",
    [
        ("gru_while", 3),
        ("gru_unrolled", 3),
        ("lstm_while", 3),
        ("add_loss", 1),
        ("subclassed", 1),
        ("frozen_layer", 0),
        ("transformer", 0),
        ("cnn_depthwise", 0),
    ],
)
def test_variables_that_no_rule_covers(name, parameters):
    structure = diagonals.structure(diagonals.probed(name).op)
    assert structure.samples_interact == (name == "add_loss")
    assert list(structure.coverage.values()).count(PARAMETERS) == parameters


def test_some_of_the_variables(float64):
    case = cases.CASES["frozen_layer"]()
    first, frozen, last = case.model.layers
    full = diagonals.by_differences(case)
    # A bias alone, a kernel whose bias is left out, and a frozen kernel.
    first.bias.trainable = False
    chosen = [first.kernel, last.bias, first.bias]
    op = operator(case, variables=chosen)
    value, _ = diagonals.exact(op)
    assert_close(value[:12], full[:12])
    assert_close(value[12:14], full[-2:])
    assert_close(value[14:], full[12:16])
    assert_unbiased(samples_of(op, 64, width=1), value)
    assert diagonals.structure(op).coverage[first.bias.path] == PARAMETERS

    op = operator(case, variables=[frozen.kernel])
    dense = np.diag(op.to_dense())
    assert_close(diagonals.exact(op)[0], dense)


@pytest.mark.parametrize("outputs", [False, True])
@pytest.mark.parametrize(
    "name", ["embedding_mask", "two_outputs", "penalties", "add_loss", "cnn_depthwise"]
)
def test_shifts_leave_the_loss_as_it_is(name, outputs, float64):
    _, op, _ = diagonals.probed(name)

    structure = diagonals.structure(op)
    value = op.evaluation.mean_of(
        lambda s, b: (LayerRecording(structure, s, b, outputs).loss,) * 2
    )()
    np.testing.assert_allclose(value, op.loss(), rtol=1e-14)


def test_masks_of_shifted_outputs_are_kept(float64):
    # The last layer has no rule, so that its output gets a shift of its own.
    model = cases.sequential(
        layers.Input((3,), dtype="int32"),
        layers.Embedding(4, 2, mask_zero=True),
        layers.Activation("tanh"),
    )
    x = np.array([[1, 2, 0], [3, 0, 0]])
    op = operator(cases.Case(model, x, cases._numbers(2, 3, 2)))

    structure = diagonals.structure(op)
    value = op.evaluation.mean_of(
        lambda s, b: (LayerRecording(structure, s, b, True).loss,) * 2
    )()
    np.testing.assert_allclose(value, op.loss(), rtol=1e-14)


def test_names_are_unique():
    variables = [keras.Variable(np.ones(1), name=n) for n in ("a", "b", "a", "a")]
    assert unique_names(variables) == ["a", "b", "a (2)", "a (3)"]
