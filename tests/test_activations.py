"""Curvature by the layers' outputs, against variables that stand in their place.

The judge is a second model with the same weights, in which each linear output has a
zero variable added to it: the Hessian by those is dense, and made of ordinary products,
or of differences of the gradient.
"""

import cases
import keras
import numpy as np
import pytest
from keras import layers, ops
from probed_cases import FLOAT

import keras_curvature as kc

RTOL = 1e-9 if FLOAT == "float64" else 2e-5


@pytest.fixture(autouse=True)
def _float():
    with cases.floatx(FLOAT):
        yield


class Shift(layers.Layer):
    """Adds zeros, one for each entry of a whole batch, to the output of a layer."""

    def __init__(self, samples, of):
        super().__init__()
        self.samples, self.of = samples, of
        self.supports_masking = True

    def build(self, shape):
        self.shift = self.add_weight(
            shape=(self.samples, *shape[1:]), initializer="zeros"
        )

    def call(self, x):
        return x + self.shift

    def compute_output_shape(self, shape):
        return shape


class Plain:
    """Applies layers as they are."""

    def __init__(self):
        self.shifts = []

    def __call__(self, layer, x):
        return layer(x)


class Shifted(Plain):
    """Applies layers and adds zeros to their outputs."""

    def __init__(self, samples):
        super().__init__()
        self.samples = samples

    def __call__(self, layer, x):
        self.shifts.append(Shift(self.samples, layer))
        return self.shifts[-1](layer(x))


def mlp():
    stack = layers.Dense(4), layers.Dense(3, use_bias=False), layers.Dense(3)

    def build(at):
        inputs = layers.Input((3,))
        x = ops.tanh(at(stack[0], inputs))
        x = ops.silu(at(stack[1], x))
        return inputs, at(stack[2], x)

    x, y = cases._numbers(6, 3), cases._labels(6, 3)
    return build, x, y, cases._cross_entropy()


def cnn():
    convolution = layers.Conv2D(2, 3, strides=2)
    depthwise = layers.DepthwiseConv2D(2, depth_multiplier=2)
    normalization, dense = layers.BatchNormalization(), layers.Dense(2)
    dense.trainable = False

    def build(at):
        inputs = layers.Input((7, 7, 1))
        x = ops.tanh(at(normalization, at(convolution, inputs)))
        x = ops.softplus(at(depthwise, x))
        return inputs, at(dense, layers.GlobalMaxPooling2D()(x))

    return build, cases._numbers(3, 7, 7, 1), cases._numbers(3, 2, seed=1), "mse"


def transformer():
    embedding, normalization = layers.Embedding(5, 4), layers.LayerNormalization()
    query, key, value = (
        layers.EinsumDense("btd,dhe->bthe", (3, 2, 2)) for _ in range(3)
    )
    out, last = layers.EinsumDense("bthe,hed->btd", (3, 4)), layers.Dense(3)

    def build(at):
        inputs = layers.Input((3,), dtype="int32")
        x = at(embedding, inputs)
        h = at(normalization, x)
        scores = ops.einsum("bthe,bshe->bhts", at(query, h), at(key, h))
        h = ops.einsum("bhts,bshe->bthe", ops.softmax(scores), at(value, h))
        return inputs, at(last, x + at(out, h))

    x, y = cases._labels((3, 3), 5, seed=0), cases._labels((3, 3), 3)
    return build, x, y, cases._cross_entropy()


def shared():
    """One layer, used twice in a row."""
    dense, last = layers.Dense(3), layers.Dense(2)

    def build(at):
        inputs = layers.Input((3,))
        x = ops.tanh(at(dense, inputs))
        return inputs, at(last, ops.tanh(at(dense, x)))

    return build, cases._numbers(5, 3), cases._numbers(5, 2, seed=1), "mse"


def masked():
    embedding = layers.Embedding(5, 3, mask_zero=True)
    hidden, last = layers.Dense(4), layers.Dense(3)

    def build(at):
        inputs = layers.Input((4,), dtype="int32")
        x = layers.Activation("tanh")(at(hidden, at(embedding, inputs)))
        return inputs, at(last, x)

    x = np.array([[1, 2, 3, 4], [2, 2, 0, 0], [4, 0, 0, 0]])
    return build, x, cases._labels((3, 4), 3), cases._cross_entropy()


class Found:
    """A model, and the diagonal that it should have by the dense matrix."""

    def __init__(self, make, training=False):
        build, self.x, self.y, loss = make()
        keras.utils.set_random_seed(0)
        self.model = cases.functional(*build(Plain()), loss=loss)
        at = Shifted(len(self.x))
        shifted = keras.Model(*build(at))
        shifted.compile(loss=loss)
        self.matrix = {
            hvp: kc.HessianOperator(
                shifted,
                self.x,
                self.y,
                variables=[shift.shift for shift in at.shifts],
                training=training,
                hvp=hvp,
            )
            for hvp in ("tape", "finite_difference")
        }
        self.shifts = at.shifts
        self.op = kc.HessianOperator(self.model, self.x, self.y, training=training)

    def expected(self, hvp="tape"):
        op = self.matrix[hvp]
        sums = {}
        for shift, part in zip(
            self.shifts, op.split(np.diag(op.to_dense())), strict=True
        ):
            # Heads and features for projections of an attention, else the last axis.
            axis = -2 if len(part.shape) == 4 and "einsum" in shift.of.path else -1
            units = part.reshape(-1, *part.shape[axis:]).sum(axis=0)
            sums[shift.of.path] = sums.get(shift.of.path, 0) + units
        return sums


def close(actual, expected, rtol=RTOL):
    assert actual.keys() == expected.keys()
    scale = max(np.abs(h).max() for h in expected.values())
    assert scale > 1e-4
    for name, h in expected.items():
        assert actual[name].shape == h.shape
        np.testing.assert_allclose(actual[name], h, rtol=0, atol=rtol * scale)


CASES = [mlp, cnn, transformer, shared, masked]


@pytest.mark.parametrize("make", CASES)
def test_exact_diagonals_are_those_of_variables_in_the_outputs_place(make):
    found = Found(make)
    estimate = kc.activation_curvature(found.op, method="exact")
    close(estimate.value, found.expected())
    assert estimate.num_matvecs == len(found.matrix["tape"].to_dense()) // len(found.x)
    assert all(np.all(e == 0) for e in estimate.standard_error.values())
    # Differences of the gradient know nothing of second derivatives.
    close(
        estimate.value,
        found.expected("finite_difference"),
        1e-6 if FLOAT == "float64" else 2e-2,
    )


@pytest.mark.parametrize("make", CASES)
def test_sampled_diagonals_are_unbiased_and_know_their_errors(make):
    found = Found(make)
    estimate = kc.activation_curvature(
        found.op, method="hutchinson", num_matvecs=96, seed=1
    )
    expected = found.expected()
    assert estimate.value.keys() == expected.keys()
    scale = max(np.abs(h).max() for h in expected.values())
    for (name, h), block in zip(expected.items(), estimate.blocks, strict=True):
        error = estimate.standard_error[name]
        assert np.all(np.abs(estimate.value[name] - h) <= 6 * error + RTOL * scale)
        assert abs(block.value - h.sum()) <= 6 * block.standard_error + RTOL * scale
    assert 0 < estimate.relative_standard_error < 1


def test_statistics_of_the_batch_move_along():
    found = Found(cnn, training=None)
    estimate = kc.activation_curvature(found.op, num_matvecs=256)
    assert estimate.relative_standard_error > 0
    for name, h in found.expected().items():
        error = estimate.standard_error[name]
        assert np.all(np.abs(estimate.value[name] - h) <= 6 * error + RTOL)
    with pytest.raises(ValueError, match="samples of a batch interact"):
        kc.activation_curvature(found.op, method="exact")


def test_batches_and_data_sets_give_what_one_batch_gives():
    build, x, y, loss = mlp()
    model = cases.functional(*build(Plain()), loss=loss)
    whole = kc.activation_curvature(model, x, y, method="exact")
    parts = kc.activation_curvature(model, x, y, method="exact", batch_size=4)
    close(parts.value, whole.value)

    class Batches(keras.utils.PyDataset):
        def __len__(self):
            return 2

        def __getitem__(self, i):
            return x[4 * i : 4 * i + 4], y[4 * i : 4 * i + 4]

    read = kc.activation_curvature(model, Batches(), method="exact")
    close(read.value, whole.value)
    sampled = kc.activation_curvature(
        model, Batches(), method="hutchinson", num_matvecs=64
    )
    for name, h in whole.value.items():
        error = sampled.standard_error[name]
        assert np.all(np.abs(sampled.value[name] - h) <= 6 * error + RTOL)


def test_batches_of_other_lengths_than_the_first():
    model = cases.of_any_length()
    sampled = kc.activation_curvature(
        model, cases.Lengths(), method="hutchinson", num_matvecs=128
    )
    by_batch = [
        kc.activation_curvature(model, *cases.Lengths()[i], method="exact").value
        for i in range(2)
    ]
    for name, error in sampled.standard_error.items():
        mean = np.mean([value[name] for value in by_batch], axis=0)
        assert np.all(np.abs(sampled.value[name] - mean) <= 6 * error + RTOL)


def test_noise_in_the_outputs_costs_what_the_diagonal_says():
    """`½ Σ h σ²`, tried with noise in the shifts of the other model."""
    found = Found(mlp)
    estimate = kc.activation_curvature(found.op)
    # Few outputs: exact by itself.
    assert estimate.relative_standard_error == 0 and estimate.num_matvecs == 10
    told = 0.5 * sum(h.sum() for h in estimate.value.values()) * 1e-4
    op, rng = found.matrix["tape"], np.random.default_rng(0)
    rises = []
    for _ in range(200):
        noise = [1e-2 * rng.standard_normal(shape) for shape in op.shapes]
        # Both signs: the gradient is no part of it.
        losses = []
        for sign in (-1, 0, 1):
            for variable, part in zip(op.variables, noise, strict=True):
                variable.assign(sign * part)
            losses.append(float(op.loss()))
        rises.append((losses[0] + losses[2]) / 2 - losses[1])
    rises = np.array(rises)
    error = rises.std(ddof=1) / len(rises) ** 0.5
    assert abs(rises.mean() - told) <= 4 * error + 0.01 * abs(told)


def test_layers_with_several_outputs_have_an_entry_for_each():
    model = cases.sequential(
        layers.Input((5, 5, 2)),
        layers.SeparableConv2D(3, 2, name="both"),
        layers.Flatten(),
        layers.Dense(2, name="last"),
    )
    x, y = cases._numbers(3, 5, 5, 2), cases._numbers(3, 2, seed=1)
    value = kc.activation_curvature(model, x, y).value
    shapes = {name.rpartition("/")[2]: h.shape for name, h in value.items()}
    assert shapes == {"both:0": (2,), "both:1": (3,), "last": (2,)}


def test_channels_may_come_first():
    model = cases.sequential(
        layers.Input((4, 3)), layers.BatchNormalization(axis=1), layers.Flatten()
    )
    x, y = cases._numbers(3, 4, 3), cases._numbers(3, 12, seed=1)
    (h,) = kc.activation_curvature(model, x, y, training=False).value.values()
    # A mean of squares over 12 outputs and 3 samples, 9 of which are a channel's.
    np.testing.assert_allclose(h, [9 * 2 / 36] * 4, rtol=1e-5)


def test_what_has_no_outputs_is_refused():
    x, y = cases._numbers(3, 3), cases._numbers(3, 3, seed=1)
    plain = kc.HessianOperator.from_function(lambda p: ops.sum(p**2), np.ones(2))
    with pytest.raises(ValueError, match="needs a Keras model. Received"):
        kc.activation_curvature(plain)
    model = cases.sequential(layers.Input((3,)), layers.PReLU())
    with pytest.raises(ValueError, match="No layer of the model has a rule"):
        kc.activation_curvature(model, x, y)
    model = cases.sequential(layers.Input((3,)), layers.Dense(3))
    with pytest.raises(ValueError, match="Received: an operator with hvp"):
        kc.activation_curvature(model, x, y, hvp="finite_difference")
    with pytest.raises(ValueError, match="more than max_matvecs=2"):
        kc.activation_curvature(model, x, y, method="exact", max_matvecs=2)
    with pytest.raises(ValueError, match="`method` must be one of"):
        kc.activation_curvature(model, x, y, method="layerwise")


def test_layers_whose_rows_are_no_samples_are_named():
    inputs = layers.Input((3, 2))
    rows = layers.Dense(2, name="rows")(ops.reshape(inputs, (-1, 2)))
    outputs = layers.Dense(2, name="last")(ops.reshape(ops.tanh(rows), (-1, 6)))
    model = cases.functional(inputs, outputs)
    x, y = cases._numbers(4, 3, 2), cases._numbers(4, 2, seed=1)
    with pytest.warns(UserWarning, match="left out: .*: rows."):
        value = kc.activation_curvature(model, x, y).value
    assert list(value) == ["last"]
