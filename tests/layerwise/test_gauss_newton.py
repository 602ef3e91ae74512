"""The Gauss–Newton diagonal against a dense matrix by Jacobians of the outputs."""

import cases
import diagonals
import keras
import numpy as np
import pytest
import tensorflow as tf
from diagonals import assert_close, assert_unbiased, operator
from keras import layers, losses, ops, regularizers

import keras_curvature as kc
from keras_curvature.layerwise import GaussNewtonDiagonal, gauss_newton
from keras_curvature.layerwise import outputs as outputs_module
from keras_curvature.layerwise.rules import paths


def dense(case, in_front=None):
    """`diag Σ_n J_nᵀ S_n J_n` by explicit Jacobians, without the package.

    Args:
        case: a case whose loss is the mean over samples of a function of the outputs.
        in_front: activation that belongs to the loss: the layer in front of it is
            asked for what it has before.
    """
    model, x, y, sample_weight, training = case
    variables = [v.value for v in model.trainable_variables]
    last = model.layers[-1]
    plain = {"activation": keras.activations.linear, "call": lambda z, mask=None: z}
    name = "activation" if hasattr(last, "activation") else "call"
    original = getattr(last, name)
    if in_front is not None:
        setattr(last, name, plain[name])
    with tf.GradientTape() as tape:
        structure = model(x, training=training)
        outputs = tf.nest.flatten(structure)
        flat = tf.concat([tf.reshape(o, (len(o), -1)) for o in outputs], axis=1)
    jacobians = tape.jacobian(flat, variables, unconnected_gradients="zero")
    if in_front is not None:
        setattr(last, name, original)

    samples, shapes = flat.shape[0], [tuple(o.shape[1:]) for o in outputs]
    with tf.GradientTape() as outer:
        outer.watch(flat)
        with tf.GradientTape() as inner:
            inner.watch(flat)
            sizes = [int(np.prod(shape)) for shape in shapes]
            parts = [
                tf.reshape(part, (samples, *shape))
                for part, shape in zip(
                    tf.split(flat, sizes, axis=1), shapes, strict=True
                )
            ]
            if in_front is not None:
                parts = [in_front(part) for part in parts]
            y_pred = tf.nest.pack_sequence_as(structure, parts)
            loss = model.compute_loss(
                x=None, y=y, y_pred=y_pred, sample_weight=sample_weight
            )
        gradient = inner.gradient(loss, flat)
    s = np.einsum("ncnd->ncd", outer.jacobian(gradient, flat).numpy())
    return np.concatenate(
        [
            np.einsum("ncp,ncd,ndp->p", j, s, j)
            for j in (np.reshape(j, (*flat.shape, -1)) for j in jacobians)
        ]
    )


def net(*last, loss, y, **kwargs):
    model = cases.sequential(
        layers.Input((3,)), layers.Dense(4, activation="tanh"), *last, loss=loss
    )
    return cases.Case(model, cases._numbers(6, 3), y, **kwargs)


def labels(classes=3):
    return cases._labels(6, classes)


def one_hot():
    return cases._one_hot(6, 3)


LOSSES = {
    "sparse from logits": lambda: (
        net(
            layers.Dense(3),
            loss=losses.SparseCategoricalCrossentropy(from_logits=True),
            y=labels(),
        ),
        None,
    ),
    "sparse of softmax": lambda: (
        net(
            layers.Dense(3, activation="softmax"),
            loss="sparse_categorical_crossentropy",
            y=labels(),
        ),
        ops.softmax,
    ),
    "categorical of softmax": lambda: (
        net(
            layers.Dense(3, activation="softmax"),
            loss="categorical_crossentropy",
            y=one_hot(),
        ),
        ops.softmax,
    ),
    "binary from logits": lambda: (
        net(
            layers.Dense(2),
            loss=losses.BinaryCrossentropy(from_logits=True),
            y=cases._labels((6, 2), 2),
        ),
        None,
    ),
    "binary of sigmoid": lambda: (
        net(
            layers.Dense(1, activation="sigmoid"),
            loss="binary_crossentropy",
            y=labels(2)[:, None],
        ),
        ops.sigmoid,
    ),
    "mse": lambda: (
        net(layers.Dense(2), loss="mse", y=cases._numbers(6, 2, seed=1)),
        None,
    ),
    "mse weighted": lambda: (
        net(
            layers.Dense(2),
            loss="mse",
            y=cases._numbers(6, 2, seed=1),
            sample_weight=np.array([0, 1, 2, 0.5, 1, 3]),
        ),
        None,
    ),
    "huber": lambda: (
        net(layers.Dense(2), loss=losses.Huber(0.8), y=cases._numbers(6, 2, seed=1)),
        None,
    ),
    "activation as a layer": lambda: (
        net(
            layers.Dense(3),
            layers.Softmax(),
            loss="sparse_categorical_crossentropy",
            y=labels(),
        ),
        ops.softmax,
    ),
    "one tensor as two outputs": lambda: (used_twice(), None),
    "separable convolution last": lambda: (separable(), None),
    "two outputs": lambda: (cases.CASES["two_outputs"]()._replace(), None),
    "an output used inside": lambda: (used_inside(), None),
    "sequence": lambda: (cases.CASES["transformer"](), None),
    "uncovered": lambda: (cases.CASES["gru_unrolled"](), None),
    "layer upon itself": lambda: (cases.CASES["shared_layer"](), None),
}


def separable():
    model = cases.sequential(layers.Input((4, 2)), layers.SeparableConv1D(2, 2))
    return cases.Case(model, cases._numbers(3, 4, 2), cases._numbers(3, 3, 2, seed=1))


def used_inside():
    """The first output, behind its activation, feeds the second."""
    inputs = layers.Input((3,))
    first = layers.Dense(3, activation="tanh")(inputs)
    second = layers.Dense(2)(first)
    model = cases.functional(inputs, [first, second], loss=["mse", "mse"])
    y = [cases._numbers(6, 3, seed=1), cases._numbers(6, 2, seed=2)]
    return cases.Case(model, cases._numbers(6, 3), y)


def used_twice():
    """One tensor as two outputs."""
    inputs = layers.Input((3,))
    output = layers.Dense(2)(layers.Dense(3, activation="tanh")(inputs))
    model = cases.functional(inputs, [output, output], loss=["mse", losses.Huber()])
    y = [cases._numbers(6, 2, seed=1), cases._numbers(6, 2, seed=2)]
    return cases.Case(model, cases._numbers(6, 3), y)


@pytest.mark.parametrize("name", LOSSES)
def test_equals_the_dense_matrix(name, float64):
    case, in_front = LOSSES[name]()
    if name == "two outputs":
        case.model.layers[-1].activation = keras.activations.linear
        case.model.compile(
            loss={
                "first": "mse",
                "second": losses.SparseCategoricalCrossentropy(from_logits=True),
            },
            loss_weights={"first": 0.3, "second": 2.0},
        )
    op = operator(case)
    gn = GaussNewtonDiagonal(op.evaluation)
    expected = dense(case, in_front)
    assert_close(gn.compute()[0], expected, rtol=1e-10)
    assert np.all(expected >= 0)
    draw = diagonals.drawing(gn.samples)
    samples = np.concatenate([draw(0, i, 4) for i in range(0, 128, 4)], axis=1)
    assert samples.min() >= 0
    assert_unbiased(samples, expected)


def test_a_use_that_feeds_another_takes_no_passes_of_its_own(float64):
    """It is no matter for first derivatives."""
    op = operator(cases.CASES["shared_layer"]())
    assert kc.hessian_diagonal(op, method="gauss_newton").num_matvecs == 2


def test_number_of_passes(float64):
    case, _ = LOSSES["mse"]()
    op = operator(case)
    estimate = kc.hessian_diagonal(op, method="gauss_newton")
    assert estimate.num_matvecs == 2
    again = kc.hessian_diagonal(op, method="gauss_newton")
    for a, b in zip(estimate.value, again.value, strict=True):
        np.testing.assert_array_equal(a, b)


def test_little_memory_gives_the_same(float64, monkeypatch):
    monkeypatch.setattr(gauss_newton, "ROWS_ELEMENTS", 1)
    monkeypatch.setattr(paths, "CHUNK_ELEMENTS", 1)
    for name in ("sparse from logits", "separable convolution last"):
        case, in_front = LOSSES[name]()
        op = operator(case)
        value = diagonals.gauss_newton(op)
        assert_close(value, dense(case, in_front), rtol=1e-10)


def test_data_sets_with_a_smaller_last_batch(float64):
    case, _ = LOSSES["sparse from logits"]()
    data = tf.data.Dataset.from_tensor_slices((case.x, case.y)).batch(4)
    op = kc.HessianOperator(case.model, data)
    value = diagonals.gauss_newton(op)
    assert_close(value, dense(case), rtol=1e-10)


def gram(w):
    return 0.3 * ops.sum(ops.square(ops.matmul(w, ops.transpose(w))))


@pytest.mark.parametrize("regularizer", [regularizers.L2(0.3), gram])
@pytest.mark.parametrize("lookalike", [False, True])
def test_penalties_are_included(regularizer, lookalike, float64):
    class Other(layers.Dense):
        def call(self, inputs):
            return super().call(inputs)

    kind = Other if lookalike else layers.Dense  # Without a rule, or with one.
    case = net(
        kind(2, kernel_regularizer=regularizer),
        loss="mse",
        y=cases._numbers(6, 2, seed=1),
    )
    op, kernel = operator(case), case.model.layers[-1].kernel
    with tf.GradientTape() as outer:
        with tf.GradientTape() as inner:
            penalty = regularizer(kernel.value)
        gradient = inner.gradient(penalty, kernel.value)
    hessian = outer.jacobian(gradient, kernel.value).numpy().reshape(8, 8)
    expected = dense(case)
    expected[16:24] += np.diag(hessian)
    assert_close(diagonals.gauss_newton(op), expected, rtol=1e-10)


def test_loss_without_the_outputs_of_the_model(float64):
    case, _ = LOSSES["mse"]()
    first = case.model.layers[0]

    def loss_fn(model, x, y):
        return ops.mean(ops.square(first(x)))

    op = operator(case, loss_fn=loss_fn, variables=list(first.variables))
    with pytest.raises(ValueError, match="does not call the model"):
        diagonals.gauss_newton(op)
    assert_close(diagonals.exact(op)[0], np.diag(op.to_dense()))


def test_interacting_samples_are_refused():
    op = diagonals.probed("batch_norm_training").op
    with pytest.raises(ValueError, match="samples .* interact"):
        kc.hessian_diagonal(op, method="gauss_newton")


# Sequences: one small block of S for each position


def words(loss="sparse_categorical_crossentropy", activation="softmax"):
    """Three words of four features, five classes each."""
    model = cases.sequential(
        layers.Input((3, 4)),
        layers.Dense(4, activation="tanh"),
        layers.Dense(5, activation=activation),
        loss=loss,
    )
    y = np.arange(18).reshape(6, 3) % 5
    return cases.Case(model, cases._numbers(6, 3, 4), y)


def connected_words():
    """Their sum counts: one convex function of all positions."""

    def loss(y, outputs):
        return ops.mean(ops.square(ops.sum(outputs, axis=1)), axis=-1)

    return words(loss, "linear")


@pytest.mark.parametrize("interact", [False, True])
def test_blocks_of_positions(interact, float64):
    case = connected_words() if interact else words()
    op = operator(case)
    gn = GaussNewtonDiagonal(op.evaluation)
    assert gn._positions_interact() == interact
    draw = diagonals.drawing(gn.samples)
    samples = np.concatenate([draw(0, i, 4) for i in range(0, 256, 4)], axis=1)
    assert samples.min() >= 0
    assert_unbiased(samples, np.asarray(gn.compute()[0]))


def test_an_output_hessian_too_large_for_memory_is_refused(float64, monkeypatch):
    monkeypatch.setattr(outputs_module, "HESSIAN_ELEMENTS", 6 * 3 * 5 * 5)
    diagonals.drawing(GaussNewtonDiagonal(operator(words()).evaluation).samples)(
        0, 0, 1
    )
    connected = GaussNewtonDiagonal(operator(connected_words()).evaluation)
    with pytest.raises(ValueError, match="too large.*1,350 numbers"):
        diagonals.drawing(connected.samples)(0, 0, 1)


def test_the_limit_of_passes_is_that_of_the_call(float64):
    """Not the one of an earlier call: neither after a success nor after a refusal."""
    gn = GaussNewtonDiagonal(operator(words()).evaluation)
    for _ in range(2):
        assert gn.compute(max_matvecs=100)[1] == 15
        with pytest.raises(ValueError, match="takes 15 backward passes"):
            gn.compute(max_matvecs=1)


def test_too_many_backward_passes_are_refused(float64):
    with pytest.raises(ValueError, match="takes 15 backward passes.*num_matvecs"):
        kc.hessian_diagonal(*words()[:3], method="gauss_newton", max_matvecs=14)


def test_layers_of_several_types(float64):
    """Without a curved activation nothing is left to samples beside the exact part."""
    model = cases.sequential(
        layers.Input((3,)),
        layers.Dense(3, activation="relu"),
        layers.Dense(2, activation="relu", dtype="float32"),
        layers.Dense(2),
    )
    op = kc.HessianOperator(model, cases._numbers(4, 3), cases._numbers(4, 2, seed=1))
    expected = np.diag(op.to_dense())
    diagonal = kc.hessian_diagonal(
        op, method="layerwise", num_matvecs=2, control_variate=True
    )
    np.testing.assert_allclose(
        op.flatten(diagonal.value), expected, rtol=0, atol=1e-6 * expected.max()
    )
