"""`batch_size="auto"`: what is predicted, and what happens where it did not fit."""

import keras
import numpy as np
import pytest
from keras import layers, ops
from training import ON_JAX, ON_TENSORFLOW, data, monitor, network, told

import keras_curvature as kc
from keras_curvature import backend, memory
from keras_curvature.data import ProbeData

array = ops.convert_to_numpy


def out_of_memory():
    """What the framework raises."""
    if ON_TENSORFLOW:
        import tensorflow as tf

        return tf.errors.ResourceExhaustedError(None, None, "OOM when allocating")
    if ON_JAX:
        import jax

        return jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")
    import torch

    return torch.OutOfMemoryError("CUDA out of memory.")


def room_for(samples, monkeypatch):
    """Makes the free memory just enough for that many samples of `network`."""
    need = memory.Need.of(kc.HessianOperator(network(), *data()).evaluation)
    free = (need.fixed + (samples + 0.5) * need.per_sample) / memory.SHARE
    monkeypatch.setattr(backend, "free_memory", lambda place: int(free))


def sizes(operator):
    return [size for _, size in operator.evaluation.data]


class Short:
    """A compiled function that has memory for so many samples."""

    def __init__(self, compiled, most):
        self._compiled, self._most, self.sizes = compiled, most, []
        self.traces = compiled.traces

    def __call__(self, state, batch, *args):
        self.sizes.append(len(batch[0]))
        if len(batch[0]) > self._most:
            raise out_of_memory()
        return self._compiled(state, batch, *args)


def test_parts_of_data():
    x = np.arange(10.0)
    whole = ProbeData(x)
    parts = whole.in_parts(4)
    assert [size for _, size in parts] == [4, 4, 2]
    assert parts.num_batches == 3 and parts.largest == 4 and parts.at_once == 4
    assert whole.num_batches == 1 and whole.largest == 10
    # As equal as can be: no last one of a single sample.
    assert [size for _, size in whole.in_parts(9)] == [5, 5]
    assert [size for _, size in whole.in_parts(10)] == [10]
    again = np.concatenate([array(batch[0]) for batch, _ in parts])
    np.testing.assert_array_equal(again, x)
    # Batches that were given are split further, and are not joined.
    given = ProbeData(x, batch_size=6).in_parts(5)
    assert [size for _, size in given] == [3, 3, 4]
    assert array(whole.in_parts(3).mean(lambda b: ops.mean(b[0]))) == x.mean()
    assert whole.in_parts(2).moved_to(None).largest == 2


def test_need_is_read_from_shapes():
    """Two layers of four and three units, with what the loss makes of them."""
    need = memory.Need.of(kc.HessianOperator(network(), *data()).evaluation)
    assert need.fixed == memory.VECTORS * 31 * 4
    # The outputs of both layers at least, and no more than thirty of their size.
    outputs = memory.ACTIVATIONS * (4 + 3) * 4
    assert outputs <= need.per_sample <= 30 * outputs
    # The parameters are not counted with the samples.
    wide = network(layers.Dense(3, kernel_regularizer="l2"))
    other = memory.Need.of(kc.HessianOperator(wide, *data()).evaluation)
    assert other.per_sample < need.per_sample
    assert memory.Need(0, 100, None).fitting() is None
    assert memory.Need(1000, 100, 4000).fitting() == 10
    assert memory.Need(1000, 100, 100).fitting() == 1
    assert memory.Need(2**31, 2**20, 2**33).told(ProbeData(np.ones(64))) == (
        "about 2.1 GiB of 8 GiB that are free, for 64 samples at once"
    )


def test_as_many_as_fit(monkeypatch, recwarn):
    model, (x, y) = network(activation="tanh"), data()
    whole = kc.HessianOperator(model, x, y, batch_size="auto")
    assert sizes(whole) == [40] and whole.need.fitting() > 40
    room_for(16, monkeypatch)
    parts = kc.HessianOperator(model, x, y, batch_size="auto")
    assert sizes(parts) == [14, 14, 12]
    v = np.random.default_rng(0).standard_normal(31).astype("float32")
    # Rounding of float32.
    np.testing.assert_allclose(parts @ v, whole @ v, rtol=1e-4, atol=1e-6)
    parts.set_data(x[:20], y[:20])
    assert sizes(parts) == [10, 10]
    assert told(recwarn) == []


@pytest.mark.parametrize("kind", ["statistics", "sum"])
def test_what_would_differ_stays_whole(kind, monkeypatch):
    if kind == "statistics":
        stack = layers.Dense(4), layers.BatchNormalization(), layers.Dense(3)
        model = network(*stack)
    else:
        loss = keras.losses.SparseCategoricalCrossentropy(
            from_logits=True, reduction="sum"
        )
        model = network(loss=loss)
    monkeypatch.setattr(backend, "free_memory", lambda place: 1)
    with pytest.warns(UserWarning, match="stays as it is.*for 40 samples at once"):
        operator = kc.HessianOperator(model, *data(), batch_size="auto")
    assert sizes(operator) == [40] and not operator.evaluation.adapts
    operator._loss_and_gradient.compiled = Short(
        operator._loss_and_gradient.compiled, 30
    )
    with pytest.raises(type(out_of_memory())):
        operator.value_and_gradient()


def test_halved_where_the_memory_runs_out():
    model, (x, y) = network(activation="tanh"), data()
    operator = kc.HessianOperator(model, x, y, batch_size="auto")
    expected = operator @ np.ones(31, "float32")
    short = operator._products.compiled = Short(operator._products.compiled, 11)
    with pytest.warns(UserWarning, match="memory ran out.*: 10 samples at once"):
        found = operator @ np.ones(31, "float32")
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)
    assert short.sizes == [40, 20, 10, 10, 10, 10]
    # Remembered, and nothing is said again.
    short.sizes.clear()
    _ = operator @ np.ones(31, "float32")
    assert short.sizes == [10] * 4
    operator.set_data(x[:20], y[:20])
    assert sizes(operator) == [10, 10]
    # What does not fit as a single sample does not fit.
    operator._products.compiled = Short(short._compiled, 0)
    with pytest.raises(type(out_of_memory())):
        _ = operator @ np.ones(31, "float32")


def test_not_halved_unless_asked_for():
    operator = kc.HessianOperator(network(), *data())
    operator._loss_and_gradient.compiled = Short(
        operator._loss_and_gradient.compiled, 30
    )
    with pytest.raises(type(out_of_memory())):
        operator.value_and_gradient()


def test_monitor_says_what_it_will_need(monkeypatch, capsys):
    room_for(7, monkeypatch)
    watch = monitor(batch_size="auto", verbose=1)
    watch.set_model(network())
    watch.probe(0)
    line, *_ = capsys.readouterr().out.splitlines()
    assert "; memory: about 0 MiB of 0 MiB that are free, for 7 samples" in line
    assert sizes(watch.operator) == [7, 7, 6]
    with pytest.raises(ValueError, match="`batch_size` is the number of samples"):
        kc.HessianOperator(network(), *data(), batch_size="much")
