"""From the monitor to the optimizer that steps with the diagonal."""

import functools
import warnings

import keras
import numpy as np
import pytest
from training import BATCH, BATCHES, assert_same, data, fit, monitor, network, steps

import keras_curvature as kc

X, Y = data()
BACKEND = keras.backend.backend()


def watch_exactly(update_freq=1, **arguments):
    """Of a piecewise linear network the Gauss–Newton diagonal is the whole one."""
    return monitor(
        probe_data=(X, Y),
        update_freq=update_freq,
        **{"diagonal": "gauss_newton", "num_matvecs": 0, **arguments},
    )


@pytest.fixture(autouse=True)
def no_warning():
    """Such as that the optimizer steps without curvature."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield


def newton(**arguments):
    """The optimizer that holds the last diagonal as it was delivered, by entries."""
    return kc.DiagonalNewton(0.05, beta_2=0.0, axes=None, **arguments)


def held(optimizer):
    return [v.numpy() for v in optimizer._curvatures]


class Taking(keras.optimizers.SGD):
    """Any optimizer that takes curvature: it keeps what it is handed."""

    def __init__(self, **arguments):
        super().__init__(**arguments)
        self.taken = []

    def update_hessian_diagonal(self, diagonals):
        assert all(keras.ops.is_tensor(d) for d in diagonals)  # Not on the host.
        self.taken.append([keras.ops.convert_to_numpy(d) for d in diagonals])


@functools.cache
def of_another_model():
    """An operator that no monitor has seen, compiled once for all tests."""
    return kc.HessianOperator(network(), X, Y)


def exact(model):
    """The diagonal at the weights of a model from `network`."""
    operator = of_another_model()
    for variable, weight in zip(operator.variables, model.get_weights(), strict=True):
        variable.assign(weight)
    return kc.hessian_diagonal(operator, method="exact").value


def assert_close(first, second, rtol=1e-4, atol=1e-6):
    for a, b in zip(first, second, strict=True):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=atol)


def trained(watch, **arguments):
    """A model after an epoch, its monitor, and what it held before the first step."""
    seen = []

    class See(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch, logs=None):
            if not batch:
                optimizer = self.model.optimizer
                seen.append((optimizer.curvature_updates, held(optimizer)))

    model = network(optimizer=newton(), **arguments)
    fit(model, watch, See())
    (first,) = seen
    return model, watch, first


@pytest.fixture(scope="module")
def by_each_step():
    return trained(watch_exactly(diagonal="exact"))


@pytest.fixture(scope="module")
def by_the_first_step():
    return trained(watch_exactly(1000))


def test_diagonal_arrives(by_each_step):
    model, watch, _ = by_each_step
    optimizer = model.optimizer
    assert optimizer.curvature_updates == len(watch.history) == BATCHES + 1
    assert_close(held(optimizer), exact(model))
    figures = watch.history[-1]["optimizer"]
    assert figures["curvature_age"] == 0 and figures["step_size"] > 0
    assert all(isinstance(v, float) for v in figures.values())
    if BACKEND == "jax":
        # Weights committed to a device would have all functions compiled once more.
        assert not any(v.value.committed for v in model.variables)


def test_first_step_has_curvature(by_each_step, by_the_first_step):
    """Delivered before the first step, at the initial weights."""
    expected = exact(network())
    for *_, (updates, diagonal) in (by_each_step, by_the_first_step):
        assert updates == 1
        assert_close(diagonal, expected)


@pytest.mark.parametrize(
    "per_execution",
    [
        1,
        pytest.param(
            5,
            marks=pytest.mark.skipif(
                BACKEND == "torch", reason="Keras takes one step at a time on PyTorch"
            ),
        ),
    ],
)
def test_curvature_counts_in_the_very_next_step(
    per_execution, by_each_step, by_the_first_step
):
    """The same as a loop by hand that measures and steps, with no delay."""
    by_hand = network(optimizer=newton())
    by_hand.optimizer.build(by_hand.trainable_variables)
    for i in range(BATCHES):
        if i % per_execution == 0:
            by_hand.optimizer.update_hessian_diagonal(exact(by_hand))
        rows = slice(BATCH * i, BATCH * i + BATCH)
        by_hand.train_on_batch(X[rows], Y[rows])
    if per_execution == 1:
        model, *_ = by_each_step
    else:
        model, *_ = trained(watch_exactly(5), steps_per_execution=per_execution)
    # Rounding, over ten steps.
    assert_close(model.get_weights(), by_hand.get_weights(), rtol=1e-4, atol=1e-5)
    late, *_ = by_the_first_step
    assert not np.allclose(late.get_weights()[0], model.get_weights()[0], atol=1e-4)


def test_inside_a_loss_scale_optimizer():
    """mixed_float16: compile wraps the optimizer, probes compute in float32."""
    policy = keras.config.dtype_policy()
    keras.config.set_dtype_policy("mixed_float16")
    try:
        optimizer = newton()
        model = network(optimizer=optimizer)
        assert isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer)
        watch = watch_exactly(5)
        fit(model, watch)
    finally:
        keras.config.set_dtype_policy(policy)
    assert steps(watch) == [0, 5, 10]
    assert optimizer.curvature_updates == 3
    assert watch.history[-1]["learning_rate"] == pytest.approx(0.05)
    assert_close(held(optimizer), exact(model))  # In float32.


def test_inside_a_multi_optimizer():
    """Only a part of the variables belongs to it."""
    inner = newton()
    optimizer = keras.optimizers.MultiOptimizer(
        keras.optimizers.OptimizerMap(
            keras.optimizers.SGD(), {".*/hidden/.*": inner, "nowhere": newton()}
        )
    )
    model, watch = network(optimizer=optimizer), watch_exactly(5)
    fit(model, watch)
    assert steps(watch) == [0, 5, 10]
    assert watch.history[0]["learning_rate"] is None
    assert_close(held(inner), exact(model)[:2])


def test_part_of_the_variables_was_asked_for():
    model = network(optimizer=Taking())
    kernels = [layer.kernel for layer in model.layers]
    fit(model, watch_exactly(5, variables=kernels))
    expected = exact(model)
    for i in (1, 3):
        expected[i] = np.zeros_like(expected[i])
    assert_close(model.optimizer.taken[-1], expected)


def test_any_optimizer_that_takes_curvature():
    model, watch = network(optimizer=Taking()), watch_exactly(5)
    fit(model, watch)
    taken = model.optimizer.taken
    assert len(taken) == 3
    assert [d.shape for d in taken[0]] == [(3, 4), (4,), (4, 3), (3,)]
    assert_close(taken[-1], exact(model))
    assert watch.history[-1]["optimizer"] == {}


def test_gradient_accumulation():
    """Probes count batches, steps count updates."""
    optimizer = newton(gradient_accumulation_steps=2)
    model, watch = network(optimizer=optimizer), watch_exactly(4)
    fit(model, watch)
    assert steps(watch) == [0, 2, 4]
    assert optimizer.curvature_updates == 3


def test_no_diagonal_no_delivery():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, watch = network(optimizer=newton()), monitor(diagonal=None)
        watch.set_model(model)
        watch.probe(0)
    assert model.optimizer.curvature_updates == 0


# Another model, or the same one in another state


def test_compiled_anew():
    """Another loss and another optimizer, at a step that was seen before."""
    model, watch = network(optimizer=newton()), watch_exactly(5)
    for _ in range(2):
        fit(model, watch)
    # A training that goes on needs no new probe at the same step.
    assert steps(watch) == [0, 5, 10, 15, 20]
    before, first = watch.operator, watch.history[-1]["loss"]
    model.compile(Taking(), model.loss, loss_weights=[40.0])
    fit(model, watch)
    assert watch.operator is not before
    assert steps(watch) == [0, 5, 10, 15, 20, 0, 5, 10]
    np.testing.assert_allclose(watch.history[5]["loss"], 40 * first, rtol=1e-5)
    assert len(model.optimizer.taken) == 3


def test_layers_frozen_and_thawed():
    model, watch = network(optimizer=Taking()), watch_exactly(5)
    hidden = model.layers[0]
    counts = []
    for trainable in (True, False, True):
        hidden.trainable = trainable
        model.compile(Taking(), model.loss)
        fit(model, watch)
        taken = model.optimizer.taken
        counts.append((len(watch.history[-1]["variables"]), *map(len, taken)))
    assert counts == [(4, 4, 4, 4), (2, 2, 2, 2), (4, 4, 4, 4)]


def test_another_model():
    watch = watch_exactly(5)
    first, second = network(optimizer=Taking()), network(optimizer=Taking())
    fit(first, watch)
    fit(second, watch)
    assert steps(watch) == [0, 5, 10, 0, 5, 10]
    for one, other in zip(first.optimizer.taken, second.optimizer.taken, strict=True):
        assert_same(one, other)


# Two devices


@pytest.mark.skipif(BACKEND != "tensorflow", reason="TensorFlow's own distribution")
def test_mirrored_strategy(mirrored):
    """Two replicas: the same figures and weights as on one, up to rounding."""
    import tensorflow as tf

    def train(strategy):
        with strategy.scope():
            model = network(optimizer=newton(), activation="tanh")
        watch = watch_exactly(5, num_matvecs=12)
        fit(model, watch, epochs=2)
        return model, watch

    alone, one = train(tf.distribute.get_strategy())
    model, both = train(mirrored)
    assert model.distribute_strategy.num_replicas_in_sync == 2
    assert steps(both) == steps(one) == [0, 5, 10, 15, 20]
    for first, second in zip(one.history, both.history, strict=True):
        for name in ("loss", "hessian_trace", "hessian_frobenius_norm"):
            np.testing.assert_allclose(first[name], second[name], rtol=2e-2)
    np.testing.assert_allclose(
        one.history[0]["hessian_trace"], both.history[0]["hessian_trace"], rtol=1e-5
    )
    assert model.optimizer.curvature_updates == 5
    assert_close(alone.get_weights(), model.get_weights(), rtol=1e-2, atol=1e-3)
    slots = [np.asarray(v.value.values[1]) for v in model.optimizer._curvatures]
    assert_close(held(model.optimizer), slots)  # On both replicas.
