"""A failing probe never kills training; it says once what is wrong."""

import errno
import warnings

import keras
import numpy as np
import pytest
from keras import layers
from training import (
    CHEAP,
    ON_TENSORFLOW,
    assert_same,
    data,
    fit,
    monitor,
    network,
    state,
    steps,
    told,
)

import keras_curvature as kc
from keras_curvature.callbacks.failures import Failures, about_data, reason
from keras_curvature.data import ProbeData


def cube(x):
    """The cube of a tensor, by JAX, with a gradient that runs on the host."""
    import jax

    def slope(x, cotangent):
        shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
        return (jax.pure_callback(lambda x, c: 3 * x * x * c, shape, x, cotangent),)

    function = jax.custom_vjp(lambda x: x**3)
    function.defvjp(lambda x: (x**3, x), slope)
    return function(x)


def distance(x):
    """The absolute value, by PyTorch, as a distance from zero."""
    import torch

    return torch.cdist(x[..., None], x.new_zeros((1, 1)), p=1.0)[..., 0]


#: An activation of which the framework has no second derivative.
ONCE_ONLY = {
    "activation": {"tensorflow": "softsign", "jax": cube, "torch": distance}[
        keras.backend.backend()
    ]
}


@pytest.mark.parametrize(
    "argument",
    [
        {"update_freq": 0},
        {"update_freq": 2.5},
        {"update_freq": "batch"},
        {"update_freq": True},
        {"num_matvecs": -1},
        {"diagonal_samples": 0},
        {"diagonal": "magic"},
        {"on_error": "ignore"},
        {"seed": -1},
        {"seed": 0.5},
        {"log_dir": 7},
        {"batchsize": 7},
    ],
    ids=str,
)
def test_arguments_are_checked_at_once(argument):
    ((name, value),) = argument.items()
    with pytest.raises(ValueError, match=f"`{name}` .*Received: {name}={value!r}"):
        monitor(**argument)


def test_unknown_argument_names_the_known():
    with pytest.raises(ValueError, match="class_weight.*hvp.*belong in `probe_data`"):
        monitor(sample_weight=np.ones(20))


def test_nothing_to_measure():
    with pytest.raises(ValueError, match="leaves nothing to measure"):
        monitor(num_matvecs=0, diagonal=None)


def test_training_goes_on():
    expected = network(**ONCE_ONLY)
    fit(expected, epochs=2)
    watch, model = monitor(), network(**ONCE_ONLY)
    with pytest.warns(UserWarning, match="probe at step 0 failed") as caught:
        history = fit(model, watch, epochs=2)
    (message,) = told(caught)  # Of six failures.
    assert ("Softsign" in message) == ON_TENSORFLOW
    assert 'hvp="finite_difference"' in message
    assert 'on_error="raise"' in message
    assert watch.history == []
    # Columns stay as long as the others.
    assert np.isnan(history["hessian_trace"]).all()
    assert len(history["hessian_trace"]) == len(history["loss"]) == 2
    assert_same(state(model), state(expected))


def test_remedy_works():
    watch = monitor(hvp="finite_difference", num_matvecs=4)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        fit(network(**ONCE_ONLY), watch)
    assert steps(watch) == [0, 4, 8]


def test_raises_on_request():
    watch = monitor(on_error="raise")
    with pytest.raises(NotImplementedError, match="finite_difference"):
        fit(network(**ONCE_ONLY), watch)


def test_each_reason_is_told_once(monkeypatch):
    watch, model = monitor(update_freq=1), network()
    errors = iter([None, OSError("no 1"), OSError("no 2"), MemoryError("full"), None])
    look = watch._look

    def failing(step):
        error = next(errors, None)
        if error is not None:
            raise error
        return look(step)

    monkeypatch.setattr(watch, "_look", failing)
    with pytest.warns(UserWarning) as caught:
        fit(model, watch)
    first, second = told(caught)
    assert "step 1 " in first and "OSError: no 1" in first
    assert "step 3 " in second and "MemoryError: full" in second
    assert steps(watch) == [0, 4, 5, 6, 7, 8, 9, 10]


def test_interrupt_is_no_failure(monkeypatch):
    watch = monitor()

    def interrupted(step):
        raise KeyboardInterrupt

    monkeypatch.setattr(watch, "_look", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fit(network(), watch)


@pytest.mark.parametrize(
    "figures",
    [
        {"diagonal": "layerwise", "diagonal_samples": 12, "num_matvecs": 0},
        {"diagonal": "hutchinson", "diagonal_samples": 12, "num_matvecs": 0},
        {"spectral_density": True},
    ],
)
def test_interrupt_in_the_middle_of_a_figure_ends_training(figures, monkeypatch):
    """What could be known by then is not what Ctrl-C asks for while `fit` runs."""
    compute, passes = ProbeData.mean, []

    def interrupted(*arguments, **more):
        passes.append(1)
        if len(passes) == 7:
            raise KeyboardInterrupt
        return compute(*arguments, **more)

    monkeypatch.setattr(ProbeData, "mean", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fit(network(layers.Dense(3)), monitor(**figures))
    assert len(passes) == 7


@pytest.mark.parametrize("method", ["write", "close"])
def test_full_disk(method, tmp_path, monkeypatch):
    watch = monitor(log_dir=tmp_path)

    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(watch._writer, method, fail)
    with pytest.warns(UserWarning, match="No space left on device") as caught:
        history = fit(network(), watch)
    assert len(told(caught)) == 1
    assert steps(watch) == [0, 4, 8]  # The figures are there all the same.
    assert np.isfinite(history["hessian_trace"]).all()


def test_diverged_training(tmp_path):
    """Weights that are not numbers, from the third step or so on."""
    x, y = data()
    optimizer = kc.DiagonalNewton(1e20, radius=None)
    model = network(optimizer=optimizer)
    watch = kc.CurvatureMonitor((x, y), 2, tmp_path, num_matvecs=6)
    with pytest.warns(UserWarning) as caught:
        history = fit(model, watch)
    assert steps(watch) == list(range(0, 11, 2))
    assert not np.isfinite(history["hessian_trace"][-1])
    assert not np.isfinite(watch.history[-1]["loss"])
    messages = told(caught)
    assert sum("curvature at step" in t and "not finite" in t for t in messages) == 1
    assert all("failed" not in t for t in messages)
    # What the optimizer has of the curvature was measured before.
    assert all(
        np.isfinite(keras.ops.convert_to_numpy(v)).all() for v in optimizer._curvatures
    )
    # And the monitor recovers with the weights.
    model.set_weights(network().get_weights())
    watch.probe()
    assert np.isfinite(watch.history[-1]["hessian_frobenius_norm"])


def test_variables_without_influence():
    """A warning of the operator, once, not a failure."""
    inputs = layers.Input((3,))
    layers.Dense(2, name="unused")(inputs)
    model = network(layers.Dense(3))
    model.spare = layers.Dense(2, name="spare")
    model.spare.build((None, 3))
    watch = monitor()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(model, watch)
    assert steps(watch) == [0, 4, 8]
    assert [message for message in told(caught) if "failed" in message] == []


def test_large_probe_out_of_memory():
    """Not about the data's form: training goes on, and the first probe tells."""

    class ResourceExhaustedError(Exception):
        message = "OOM when allocating tensor with shape[1000,1000]"

    def loss_fn(model, x, y):
        raise ResourceExhaustedError

    watch = kc.CurvatureMonitor(data(), 4, loss_fn=loss_fn, **CHEAP)
    with pytest.warns(UserWarning, match="OOM when allocating") as caught:
        fit(network(), watch)
    assert len(told(caught)) == 1
    assert watch.history == []


def test_reason_is_one_line():
    error = ValueError("Exception in Dense.call().\n\n\x1b[1mtoo wide\x1b[0m\n\n • x")
    assert reason(error) == "Exception in Dense.call(). too wide • x"
    assert len(reason(ValueError("x" * 10_000))) == 2000
    assert about_data(error) and not about_data(OSError())


def test_failures_differ_by_words_not_by_numbers():
    failures = Failures("warn")
    with pytest.warns(UserWarning) as caught:
        for text in ("at 0x7f3a, 12 rows", "at 0x89bc, 13 rows", "other"):
            with failures.survived(lambda: "It"):
                raise OSError(text)
    assert [message[:40] for message in told(caught)] == [
        "It failed and training goes on without i"
    ] * 2


def test_keras_model_stays_usable():
    """After a failed probe nothing of a layer is left changed."""
    model = network(**ONCE_ONLY)
    before = [(layer.dtype_policy.name, layer.built) for layer in model.layers]
    with pytest.warns(UserWarning):
        fit(model, monitor())
    assert [(x.dtype_policy.name, x.built) for x in model.layers] == before
    assert keras.ops.shape(model(data()[0])) == (40, 3)
