"""The training loss as a pure function, on every backend."""

import random
import warnings

import cases
import keras
import numpy as np
import pytest
from keras import layers, ops

from keras_curvature import backend
from keras_curvature.data import ProbeData
from keras_curvature.keras_internals import flat_layers
from keras_curvature.loss import FunctionLoss, State, TrainingLoss

ON_TENSORFLOW = keras.backend.backend() == "tensorflow"
only_tensorflow = pytest.mark.skipif(not ON_TENSORFLOW, reason="TensorFlow's own")


def made(case, **kwargs):
    """The loss of a case, and its one batch."""
    batch = ProbeData(case.x, case.y, case.sample_weight).first()
    kwargs.setdefault("training", case.training)
    return TrainingLoss(case.model, batch, **kwargs), batch


def value(loss, batch, state=None):
    state = loss.state() if state is None else state
    return float(ops.convert_to_numpy(loss(state, batch)))


def numbers_of(model):
    variables = [*model.variables, *model.metrics_variables]
    return [np.array(ops.convert_to_numpy(v)) for v in variables]


def halved(state):
    return State([0.5 * v for v in state.values], state.others)


@pytest.mark.parametrize("name", ["penalties", "two_outputs", "embedding_mask"])
def test_it_is_what_evaluate_reports(name):
    case = cases.CASES[name]()
    loss, batch = made(case)
    expected = case.model.evaluate(case.x, case.y, verbose=0)
    np.testing.assert_allclose(value(loss, batch), np.ravel(expected)[0], rtol=1e-6)
    result = loss(loss.state(), batch)
    assert tuple(result.shape) == ()
    assert keras.backend.standardize_dtype(result.dtype) == "float32"


@pytest.mark.parametrize("name", ["two_outputs", "batch_norm_training", "penalties"])
def test_it_depends_on_the_state_alone(name):
    case = cases.CASES[name]()
    loss, batch = made(case)
    before, rng = numbers_of(case.model), (random.getstate(), np.random.get_state())
    state = halved(loss.state())
    half = value(loss, batch, state)
    assert value(loss, batch, state) == half != value(loss, batch)
    for actual, expected in zip(numbers_of(case.model), before, strict=True):
        np.testing.assert_array_equal(actual, expected)
    assert random.getstate() == rng[0]
    np.testing.assert_array_equal(np.random.get_state()[1], rng[1][1])
    for variable in case.model.variables:
        variable.assign(ops.zeros_like(variable.value))
    assert value(loss, batch, state) == half


def test_the_state_holds_what_the_loss_reads_and_no_more():
    case = cases.batch_norm()
    loss, _ = made(case)
    norm = case.model.layers[1]
    read = {id(v) for v in loss._others}
    assert {id(norm.moving_mean), id(norm.moving_variance)} <= read
    assert not read & {id(v) for v in loss.variables}


def test_dropout_masks_move_with_the_seeds_only():
    case = cases.dropout_training()
    loss, batch = made(case)
    first = value(loss, batch)
    assert value(loss, batch) == first
    case.model(case.x, training=True)
    assert value(loss, batch) != first
    inference, _ = made(case, training=False)
    expected = case.model.evaluate(case.x, case.y, verbose=0)
    np.testing.assert_allclose(value(inference, batch), expected, rtol=1e-6)


def noisy(kind):
    """A model with noise of some kind, and what it is without."""
    still = {
        "dropout": (layers.Dropout(0.5), layers.Identity()),
        "noise": (layers.GaussianNoise(1.0), layers.Identity()),
        "nested": (
            keras.Sequential([layers.Dense(3), layers.Dropout(0.5)]),
            keras.Sequential([layers.Dense(3), layers.Identity()]),
        ),
        "recurrent": (
            layers.LSTM(3, dropout=0.5, recurrent_dropout=0.5),
            layers.LSTM(3),
        ),
        "attention": (
            SelfAttention(dropout=0.5),
            SelfAttention(dropout=0.0),
        ),
        "augmentation": (layers.RandomBrightness(0.5), layers.Identity()),
    }[kind]
    shape = {"recurrent": (4, 2), "attention": (4, 2), "augmentation": (4, 4, 3)}
    models = [
        cases.sequential(
            layers.Input(shape.get(kind, (3,))),
            layer,
            layers.Flatten(),
            layers.Dense(4),
            layers.BatchNormalization(),
            layers.Dense(2),
        )
        for layer in still
    ]
    models[1].set_weights(models[0].get_weights())
    rng = np.random.default_rng(0)
    x = rng.uniform(size=(6, *shape.get(kind, (3,)))).astype("float32")
    return *models, x, rng.normal(size=(6, 2)).astype("float32")


class SelfAttention(layers.Layer):
    def __init__(self, dropout):
        super().__init__()
        self.attention = layers.MultiHeadAttention(1, 2, dropout=dropout)
        # Layers that put others together may draw numbers of their own.
        self.seeds = keras.random.SeedGenerator(0)

    def build(self, shape):
        self.attention.build(shape, shape)

    def call(self, x, training=False):
        return self.attention(x, x, training=training)


@pytest.mark.parametrize(
    "kind",
    ["dropout", "noise", "nested", "recurrent", "attention", "augmentation"],
)
def test_by_default_layers_run_as_in_training_without_its_noise(kind):
    model, without_noise, x, y = noisy(kind)
    inner = flat_layers(model)
    before = [vars(layer).get("call") for layer in inner]
    loss, batch = made(cases.Case(model, x, y), training=None)
    expected, _ = made(cases.Case(without_noise, x, y), training=True)
    inference, _ = made(cases.Case(model, x, y), training=False)
    np.testing.assert_allclose(value(loss, batch), value(expected, batch), rtol=1e-5)
    assert abs(value(loss, batch) - value(inference, batch)) > 1e-3
    assert loss.takes_batch_statistics and not inference.takes_batch_statistics
    assert [vars(layer).get("call") for layer in inner] == before


def test_normalization_that_training_does_not_renew_takes_no_batch_statistics():
    class FineTuned(keras.Model):
        def __init__(self):
            super().__init__()
            self.base = keras.Sequential([layers.Dense(3), layers.BatchNormalization()])
            self.head = layers.Dense(2)

        def call(self, x, training=None):
            return self.head(self.base(x, training=False))

    frozen = cases.batch_norm()
    frozen.model.layers[1].trainable = False
    subclassed = FineTuned()
    subclassed.compile("sgd", "mse")
    for case in (frozen, frozen._replace(model=subclassed)):
        loss, batch = made(case, training=None)
        inference, _ = made(case, training=False)
        assert not loss.takes_batch_statistics
        assert value(loss, batch) == value(inference, batch)


def test_a_loss_function_decides_on_the_mode_but_not_on_noise():
    def loss_fn(model, x, y):
        return ops.mean((model(x, training=True) - y) ** 2)

    model, without_noise, x, y = noisy("dropout")
    loss, batch = made(cases.Case(model, x, y), training=None, loss_fn=loss_fn)
    expected, _ = made(cases.Case(without_noise, x, y), training=True)
    np.testing.assert_allclose(value(loss, batch), value(expected, batch), rtol=1e-5)
    assert loss.takes_batch_statistics


def test_layers_without_the_argument_training():
    case = cases.subclassed()
    for training in (None, False, True):
        assert np.isfinite(value(*made(case, training=training)))


def test_recurrent_layers_leave_cudnn_while_the_loss_is_computed():
    class Spy(layers.GRU):
        def call(self, sequences, initial_state=None, mask=None, training=False):
            seen.append(self.use_cudnn)
            return super().call(sequences, initial_state, mask, training)

    seen = []
    model = cases.sequential(layers.Input((3, 2)), Spy(2), layers.Dense(2))
    before = model.layers[0].use_cudnn
    loss, batch = made(cases.Case(model, np.ones((2, 3, 2)), np.ones((2, 2))))
    seen.clear()
    loss(loss.state(), batch)
    assert seen == [False]
    assert model.layers[0].use_cudnn == before


@pytest.mark.parametrize("policy", ["mixed_float16", "bfloat16"])
def test_state_and_layers_are_float32_at_least(policy):
    class Spy(layers.Dense):
        def call(self, x):
            dtype = keras.backend.standardize_dtype(x.dtype)
            seen.append((dtype, self.compute_dtype))
            return super().call(x)

    seen = []
    model = cases.sequential(
        layers.Input((3,)), Spy(3, dtype=policy), Spy(2, dtype=policy)
    )
    policies = [layer.dtype_policy for layer in model.layers]
    loss, batch = made(cases.Case(model, np.ones((2, 3)), np.ones((2, 2))))
    dtypes = {keras.backend.standardize_dtype(v.dtype) for v in loss.state().values}
    assert dtypes == {"float32"}
    seen.clear()
    result = loss(loss.state(), batch)
    assert keras.backend.standardize_dtype(result.dtype) == "float32"
    assert seen == [("float32", "float32")] * 2
    assert [layer.dtype_policy for layer in model.layers] == policies


@only_tensorflow
def test_it_is_not_divided_among_replicas(mirrored):
    with mirrored.scope():
        case = cases.penalties()
    outside = value(*made(case))
    with mirrored.scope():
        inside = value(*made(case))
    np.testing.assert_allclose(outside, inside, rtol=1e-6)


def test_making_one_builds_no_optimizer():
    model = keras.Sequential([layers.Dense(2)])
    optimizer = keras.optimizers.Adam()
    model.compile(optimizer=optimizer, loss="mse", metrics=["mae"])
    loss, _ = made(cases.Case(model, np.ones((4, 3)), np.ones((4, 2))))
    assert loss.layout.shapes == ((3, 2), (2,))
    assert model.optimizer is optimizer and not optimizer.built
    # Freezing is still possible, which a built optimizer would refuse.
    model.add(layers.Dense(2))
    model.fit(np.ones((4, 3)), np.ones((4, 2)), verbose=0)


def test_a_model_with_its_own_loss_function_is_built():
    model = keras.Sequential([layers.Dense(2)])
    case = cases.Case(model, np.ones((4, 3)), np.ones((4, 2)))
    loss, batch = made(case, loss_fn=lambda m, x, y: ops.mean((m(x) - y) ** 2))
    assert len(loss.variables) == 2
    assert value(loss, batch) > 0
    assert model.layers[0] in loss.layers() and model not in loss.layers()


@pytest.mark.parametrize(
    "loss_fn, message",
    [
        (lambda m, x, y: (m(x) - y) ** 2, r"scalar.*shape \(2, 2\), dtype float32"),
        (lambda m, x, y: ops.convert_to_tensor(3), "dtype int"),
        (lambda m, x, y: None, "must return a scalar. Received: None"),
    ],
)
def test_losses_that_are_no_scalars(loss_fn, message):
    model = cases.sequential(layers.Input((3,)), layers.Dense(2))
    case = cases.Case(model, np.ones((2, 3)), np.ones((2, 2)))
    with pytest.raises(ValueError, match=message):
        made(case, loss_fn=loss_fn)


def test_refused_models():
    case = cases.mlp_tanh()
    batch = (case.x, case.y, None)
    with pytest.raises(ValueError, match="must be a `keras.Model`"):
        TrainingLoss(case.model.layers[0], batch)
    with pytest.raises(ValueError, match="`loss_fn` must be a function.*'mse'"):
        TrainingLoss(case.model, batch, loss_fn="mse")
    with pytest.raises(ValueError, match="needs targets.*y=None"):
        made(case._replace(y=None))
    with pytest.raises(ValueError, match="must be Keras variables"):
        TrainingLoss(case.model, batch, variables=[np.ones(3)])
    without = keras.Sequential([layers.Input((3,)), layers.Dense(3)])
    without.compile(optimizer="sgd")
    with pytest.raises(ValueError, match="has no loss.*`loss_fn="):
        made(case._replace(model=without))
    with pytest.raises(ValueError, match="not compiled"):
        TrainingLoss(keras.Sequential([layers.Dense(2)]), batch)
    rounded = cases.mlp_tanh()
    rounded.model.layers[0].quantize("float8")
    with pytest.raises(ValueError, match="float8.*inputs_scale.* and 5 other scales"):
        made(rounded)
    frozen = cases.mlp_tanh()
    frozen.model.trainable = False
    with pytest.raises(ValueError, match="nothing to differentiate by"):
        made(frozen)


def test_a_model_that_needs_no_targets():
    model = keras.Sequential([layers.Input((3,)), cases.VarianceLoss()])
    model.compile(optimizer="sgd")
    loss, batch = made(cases.Case(model, cases._numbers(4, 3)))
    expected = 0.5 * np.sum(cases._numbers(4, 3).mean(0) ** 2)
    np.testing.assert_allclose(value(loss, batch), expected, rtol=1e-5)


def test_what_is_known_of_the_gradient():
    """By number; nothing has to run for it."""
    params = [np.ones(2, "float32"), np.ones((), "float32"), np.ones(3, "float32")]
    loss = FunctionLoss(lambda p: ops.sum(p[0]) * 2.0 + p[2][0] ** 2, params)
    assert loss.findings.unconnected == {1}
    assert loss.layout.names == ("parameter 0", "parameter 1", "parameter 2")


def test_a_function_of_parameters_moves_with_them():
    loss = FunctionLoss(lambda p: ops.sum(p["a"] ** 2), {"a": np.ones(2, "float32")})
    batch = (None, None, None)
    assert value(loss, batch) == 2.0
    loss.move_to({"a": np.array([1.0, 2.0], "float32")})
    assert value(loss, batch) == 5.0
    packed = loss.pack([np.zeros(2)])
    np.testing.assert_array_equal(packed["a"], [0, 0])


def test_keras_variables_that_a_function_reads_are_handed_over():
    x, y = keras.Variable([1.0, 2.0]), keras.Variable(3.0)
    loss = FunctionLoss(lambda: ops.sum(x**2) * y, [x])
    batch = (None, None, None)
    assert value(loss, batch) == 15.0
    assert [id(v) for v in loss._others] == [id(y)]
    state = loss.state()
    y.assign(0.0)
    assert value(loss, batch, state) == 15.0
    assert value(loss, batch) == 0.0


@only_tensorflow
def test_variables_of_tensorflow():
    import tensorflow as tf

    x, y = tf.Variable([1.0, 2.0]), keras.Variable(3.0)
    loss = FunctionLoss(lambda: tf.reduce_sum(x**2) * y, [x, y])
    batch = (None, None, None)
    assert value(loss, batch) == 15.0
    moved = State([tf.constant([0.0, 1.0]), tf.constant(2.0)], [])
    assert value(loss, batch, moved) == 2.0
    assert value(loss, batch) == 15.0


@pytest.mark.parametrize("parameters", [[], [1.0, "a"]], ids=["none", "no numbers"])
def test_parameters_that_are_refused(parameters):
    with pytest.raises((ValueError, TypeError)):
        FunctionLoss(lambda p: ops.sum(backend.array(1.0)), parameters)


def test_what_keras_warns_of_is_told_once():
    """Keras says in each trace that the inputs are not nested as the model's."""
    inputs = {name: layers.Input((3,), name=name) for name in ("a", "b")}
    outputs = layers.Dense(1)(layers.Add()(list(inputs.values())))
    model = cases.functional(inputs, outputs)
    x, y = [cases._numbers(4, 3), cases._numbers(4, 3, seed=1)], np.ones((4, 1))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        shown = warnings.showwarning
        loss, batch = made(cases.Case(model, x, y))
        told = [str(w.message) for w in caught if w.category is UserWarning]
        assert any("structure of `inputs`" in text for text in told)
        value(loss, batch)
        value(loss, batch)
        again = [str(w.message) for w in caught if w.category is UserWarning]
        assert again == told and warnings.showwarning is shown
        # Another loss tells its user once more.
        made(cases.Case(model, x, y))
        again = [str(w.message) for w in caught if w.category is UserWarning]
        assert len(again) > len(told)
