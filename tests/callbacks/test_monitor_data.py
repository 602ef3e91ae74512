"""What the monitor takes as probe data, and what it says about data that won't do."""

import functools

import cases
import keras
import numpy as np
import pytest
from data_sources import tf_data
from keras import ops
from training import CHEAP, data, fit, monitor, network, only_tensorflow, steps

import keras_curvature as kc

X, Y = data(20)
WEIGHT = np.linspace(0, 2, 20).astype("float32")


class Batches(keras.utils.PyDataset):
    """Batches of five; may fail, or have no end."""

    def __init__(self, weighted=False, num=4, fails_at=()):
        super().__init__()
        self.weighted, self.num = weighted, num
        self.asked, self.fails_at = 0, fails_at

    @property
    def num_batches(self):
        return self.num

    def __getitem__(self, i):
        self.asked += 1
        if self.asked in self.fails_at:
            raise OSError(f"File {self.asked} is gone")
        rows = slice(5 * (i % 4), 5 * (i % 4) + 5)
        return (X[rows], Y[rows]) + ((WEIGHT[rows],) if self.weighted else ())


def first_record(probe_data, model=None, **arguments):
    watch = monitor(probe_data=probe_data, **{"num_matvecs": 12, **arguments})
    model = model or network()
    watch.set_model(model)
    watch.on_train_begin()
    watch.on_epoch_begin(0)
    return watch.history[0]


@functools.cache
def record_of_arrays(weighted=False):
    return first_record((X, Y) + (WEIGHT,) * weighted)


def assert_same_figures(record, expected):
    for name in ("loss", "hessian_trace", "hessian_frobenius_norm"):
        np.testing.assert_allclose(record[name], expected[name], rtol=2e-5)


@pytest.mark.parametrize(
    "form",
    [
        lambda: [X, Y],
        lambda: (ops.convert_to_tensor(X), ops.convert_to_tensor(Y)),
        lambda: (X, Y, np.ones(20)),
        lambda: tf_data(X, Y).batch(8),
        Batches,
    ],
    ids=["list", "tensors", "unit weights", "Dataset", "PyDataset"],
)
def test_forms_of_the_same_data(form):
    assert_same_figures(first_record(form()), record_of_arrays())


@pytest.mark.parametrize(
    "form",
    [
        lambda: tf_data(X, Y, WEIGHT).batch(20),
        lambda: tf_data(X[None], Y[None], WEIGHT[None]),
    ],
)
def test_sample_weights(form):
    record = first_record(form())
    assert_same_figures(record, record_of_arrays(weighted=True))
    assert abs(record["loss"] - record_of_arrays()["loss"]) > 1e-3


def test_class_weight():
    weights = {0: 0.1, 1: 3.0, 2: 1.0}
    by_class = first_record((X, Y), class_weight=weights)
    by_sample = np.array([weights[label] for label in Y])
    assert_same_figures(by_class, first_record((X, Y, by_sample)))


@pytest.mark.parametrize("name", ["two_inputs", "two_outputs"])
def test_nested_structures(name):
    model, x, y, *_ = cases.CASES[name]()
    record = first_record((x, y), model)
    loss = model.evaluate(x, y, verbose=0, return_dict=True)["loss"]
    np.testing.assert_allclose(record["loss"], loss, rtol=1e-5)
    h = kc.hessian_matrix(model, x, y)
    np.testing.assert_allclose(
        record["hessian_frobenius_norm"], np.linalg.norm(h), rtol=0.5
    )


def test_data_without_targets():
    inputs = keras.layers.Input((3,))
    outputs = keras.layers.Dense(1)(inputs)
    model = keras.Model(inputs, outputs)
    model.compile("sgd", loss=None)

    def loss_fn(model, x, y):
        return keras.ops.mean(keras.ops.square(model(x)))

    record = first_record(X, model, loss_fn=loss_fn)
    np.testing.assert_allclose(
        record["loss"], np.square(model.predict(X, verbose=0)).mean(), rtol=1e-5
    )


def test_fresh_batches():
    """One batch after the other, in a circle."""
    sources = tf_data(X, Y).batch(5).repeat(), Batches(num=None), Batches()
    arguments = {"fresh_batches": True, "update_freq": 2}
    watches = [monitor(probe_data=source, **arguments) for source in sources]
    model = network(optimizer=keras.optimizers.SGD(0.0))
    fit(model, *watches)
    parts = [slice(5 * i, 5 * i + 5) for i in range(4)]
    losses = [model.evaluate(X[rows], Y[rows], verbose=0) for rows in parts]
    losses += losses[:2]
    for watch in watches:
        found = [record["loss"] for record in watch.history]
        np.testing.assert_allclose(found, losses, rtol=1e-5)
        # PyTorch compiles nothing.
        assert watch.operator.evaluation.mean_loss.traces() <= 1


def test_fresh_batches_go_on_after_an_error():
    batches = Batches(num=None, fails_at=(3,))
    watch = monitor(probe_data=batches, fresh_batches=True, update_freq=2)
    with pytest.warns(UserWarning, match="OSError: File 3 is gone"):
        fit(network(), watch)
    assert steps(watch) == [0, 2, 6, 8, 10]


# Data that won't do: said when the monitor is made, or before the first step


def test_fresh_batches_need_a_data_set():
    with pytest.raises(ValueError, match="needs a data set to take it from"):
        monitor(fresh_batches=True)


@pytest.mark.parametrize("probe_data", [(), (X, Y, WEIGHT, 1)])
def test_wrong_number_of_parts(probe_data):
    message = rf"`probe_data` must be \(x, y\).*tuple of length {len(probe_data)}"
    with pytest.raises(ValueError, match=message):
        monitor(probe_data=probe_data)


@pytest.mark.parametrize(
    "probe_data, told",
    [
        ((X[:, :2], Y), "expected axis -1 of input shape to have value 3"),
        ((X, Y[:7]), "same number of samples"),
        ((X,), "needs targets"),
        (X, "needs targets"),
        pytest.param(
            (X, Y + 3), "label value of 5", marks=only_tensorflow, id="out of range"
        ),
        ((X, np.ones((20, 7))), "shape"),
        ((X, Y, np.ones(3)), "same number of samples"),
        ((["a"] * 20, Y), "Convert lists of numbers"),
        (((x, y) for x, y in zip(X, Y, strict=True)), "A generator can be read only"),
        (Batches(num=None), "never ends"),
        (lambda: tf_data(X, Y), "must be batched"),
    ],
)
def test_data_that_does_not_fit(probe_data, told):
    model = network()
    probe_data = probe_data() if callable(probe_data) else probe_data
    before = [ops.convert_to_numpy(v) for v in model.variables]
    with pytest.raises(ValueError, match=told) as caught:
        fit(model, monitor(probe_data=probe_data))
    message = str(caught.value)
    assert message.startswith("CurvatureMonitor cannot probe the model 'sequential")
    assert "\x1b" not in message and "\n" not in message and len(message) < 1000
    for v, value in zip(model.variables, before, strict=True):
        # Not a step was taken.
        np.testing.assert_array_equal(ops.convert_to_numpy(v), value)


def test_data_that_does_not_fit_twice():
    """The same monitor complains again, and does not go on with nothing."""
    watch, model = monitor(probe_data=(X[:, :2], Y)), network()
    for _ in range(2):
        with pytest.raises(ValueError, match="cannot probe"):
            fit(model, watch)
    watch, model = monitor(), network()
    fit(model, watch)
    watch._probe_data = (X[:, :2], Y)
    model.compile("sgd", model.loss)
    for _ in range(2):
        with pytest.raises(ValueError, match="cannot probe"):
            fit(model, watch)


def squared_error(model, x, y):
    return ops.mean(ops.square(model(x)[:, 0] - ops.cast(y, "float32")))


def tensorflow_step(model, data):
    import tensorflow as tf

    with tf.GradientTape() as tape:
        loss = squared_error(model, *data)
    weights = model.trainable_variables
    model.optimizer.apply(tape.gradient(loss, weights), weights)
    return {"loss": loss}


def jax_step(model, state, data):
    import jax

    weights, others, slots, metrics = state

    def loss_at(weights):
        pairs = zip(model.trainable_variables, weights, strict=True)
        with keras.StatelessScope(pairs):
            return squared_error(model, *data)

    loss, gradients = jax.value_and_grad(loss_at)(weights)
    weights, slots = model.optimizer.stateless_apply(slots, gradients, weights)
    return {"loss": loss}, (weights, others, slots, metrics)


def torch_step(model, data):
    model.zero_grad()
    loss = squared_error(model, *data)
    loss.backward()
    weights = model.trainable_weights
    model.optimizer.apply([w.value.grad for w in weights], weights)
    return {"loss": loss.detach()}


def test_model_without_a_loss_of_its_own():
    class Custom(keras.Model):
        """A regression with a `train_step` of its own."""

        def __init__(self):
            super().__init__()
            self.dense = keras.layers.Dense(1)

        def call(self, x):
            return self.dense(x)

        train_step = globals()[f"{keras.backend.backend()}_step"]

    model = Custom()
    model.compile("sgd")
    with pytest.raises(ValueError, match="loss"):
        fit(model, kc.CurvatureMonitor((X, Y), **CHEAP))
    watch = kc.CurvatureMonitor((X, Y), 5, loss_fn=squared_error, num_matvecs=4)
    fit(model, watch)
    assert steps(watch) == [0, 5, 10]
    # ∂² of the mean square by weights and bias: 2 mean(xᵢ²) and 2.
    trace = 2 * np.square(X).mean(axis=0).sum() + 2
    np.testing.assert_allclose(watch.history[-1]["hessian_trace"], trace, rtol=1e-4)
