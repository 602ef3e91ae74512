"""Gradient, noise scale and movement of the weights, against sums over samples."""

import keras
import numpy as np
import pytest
from keras import layers

import keras_curvature as kc
from keras_curvature.gradients import Gradients, noise_scale

#: Keras on JAX rounds inputs to float32 on their way.
CLOSE = {"rtol": 1e-6}


def linear(samples=24, seed=0, stack=(), **compile_arguments):
    """Least squares with two features: gradients are known by hand."""
    keras.utils.set_random_seed(seed)
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=(samples, 2)), rng.normal(size=(samples, 1)) + 3
    model = keras.Sequential([layers.Input((2,)), *stack, layers.Dense(1)])
    model.compile(**{"loss": "mse", "optimizer": "sgd"} | compile_arguments)
    return model, x, y


def gradients_by_sample(model, x, y):
    """Of the squared error: 2 (w·x + b − y) (x, 1), shape (samples, 3)."""
    kernel, bias = (keras.ops.convert_to_numpy(v) for v in model.trainable_variables)
    residual = 2 * (x @ kernel + bias - y)
    return residual * np.concatenate([x, np.ones((len(x), 1))], axis=1)


def by_hand(each, parts):
    """The noise scale of the definition, Σ estimated from equal parts."""
    means = each.reshape(parts, -1, each.shape[1]).mean(axis=1)
    size = len(each) // parts
    covariance = np.cov(means.T, ddof=1) * size  # Of one sample.
    mean = each.mean(axis=0)
    square = mean @ mean - np.trace(covariance) / len(each)
    return np.trace(covariance) / square


@pytest.mark.parametrize(
    "samples, batch_size, parts",
    [
        (24, None, 8),
        (25, None, 5),
        (24, 8, 12),
        (22, None, 2),
    ],
)
def test_against_the_gradients_of_samples(float64, samples, batch_size, parts):
    model, x, y = linear(samples)
    op = kc.HessianOperator(model, x, y, batch_size=batch_size)
    look = Gradients(op).look(0)
    each = gradients_by_sample(model, x, y)
    mean = each.mean(axis=0)
    np.testing.assert_allclose(
        look.squared_norms, [mean[:2] @ mean[:2], mean[2] ** 2], **CLOSE
    )
    kernel, bias = (keras.ops.convert_to_numpy(v) for v in model.trainable_variables)
    np.testing.assert_allclose(
        look.squared_weights, [(kernel**2).sum(), (bias**2).sum()], **CLOSE
    )
    assert look.squared_updates is None
    np.testing.assert_allclose(look.noise_scale, by_hand(each, parts), rtol=1e-5)


def test_noise_scale_has_no_bias():
    """Both of its parts, over many draws of 64 samples with known moments."""
    rng = np.random.default_rng(0)
    mean, deviation = np.array([0.5, -0.2, 0.1]), np.array([1.0, 2.0, 0.5])
    traces, squares = [], []
    for _ in range(4000):
        each = mean + deviation * rng.normal(size=(64, 3))
        # Unequal parts: 8, 24 and 32 samples.
        means = [part.mean(axis=0) for part in np.split(each, [8, 32])]
        weights = np.array([8, 24, 32]) / 64
        small = sum(w * m @ m for w, m in zip(weights, means, strict=True))
        big = each.mean(axis=0) @ each.mean(axis=0)
        trace = (small - big) * 64 / 2
        traces.append(trace)
        squares.append(big - trace / 64)
        found = noise_scale(small, big, 3, 64)
        assert found is None if squares[-1] <= 0 else found == trace / squares[-1]
    for values, true in ((traces, deviation @ deviation), (squares, mean @ mean)):
        error = np.std(values) / len(values) ** 0.5
        assert abs(np.mean(values) - true) < 4 * error


@pytest.mark.parametrize(
    "samples, options, stack",
    [
        (23, {}, ()),
        (24, {}, (layers.BatchNormalization,)),
        (24, {"training": True}, (lambda: layers.Dropout(0.5),)),
        (24, {"loss_fn": lambda model, x, y: keras.ops.sum((model(x) - y) ** 2)}, ()),
    ],
    ids=["prime", "batch_statistics", "noise", "sum"],
)
def test_no_noise_scale_where_parts_are_not_of_the_same_loss(samples, options, stack):
    model, x, y = linear(samples, stack=[make() for make in stack])
    gradients = Gradients(kc.HessianOperator(model, x, y, **options))
    first, second = gradients.look(0), gradients.look(1)
    assert first.noise_scale is second.noise_scale is None
    assert first.squared_norms.sum() > 0


def test_a_gradient_that_drowns_has_no_noise_scale():
    assert noise_scale(10.0, 1.0, 4, 8) is None
    assert noise_scale(float("nan"), 1.0, 4, 8) is None
    # Parts that agree to the last bit, and a bit beyond.
    assert noise_scale(1.0, 1.0 + 1e-9, 4, 8) == 0.0


def test_net_change_of_the_weights_per_step(float64):
    model, x, y = linear()
    gradients = Gradients(kc.HessianOperator(model, x, y))
    assert gradients.look(3).squared_updates is None
    kernel, bias = model.trainable_variables
    kernel.assign(kernel + np.array([[3.0], [4.0]]))
    bias.assign(bias - 2.0)
    # Five apart, over ten steps.
    np.testing.assert_allclose(
        gradients.look(13).squared_updates, [25 / 100, 4 / 100], **CLOSE
    )
    np.testing.assert_allclose(gradients.look(14).squared_updates, [0, 0])
    # Taken back, or twice at a step: no steps to divide by.
    assert gradients.look(14).squared_updates is None
    assert gradients.look(5).squared_updates is None


def test_in_the_record_of_a_training(tmp_path):
    model, x, y = linear(32)
    names = ("gradient_norm", "stability_ratio", "gradient_noise_scale")
    watch = kc.CurvatureMonitor((x, y), 4, num_matvecs=3, also_log=names)
    kernel = keras.ops.convert_to_numpy(model.trainable_variables[0])
    history = model.fit(
        x, y, batch_size=8, epochs=2, verbose=0, shuffle=False, callbacks=[watch]
    ).history
    record, op = watch.history[-1], watch.operator
    assert record["step"] == 8
    _, gradient = op.value_and_gradient()
    gradient = keras.ops.convert_to_numpy(gradient)
    norm = np.linalg.norm(gradient)
    np.testing.assert_allclose(record["gradient_norm"], norm, rtol=1e-5)
    each = gradients_by_sample(model, x, y)
    np.testing.assert_allclose(
        record["gradient_noise_scale"], by_hand(each, 8), rtol=1e-3
    )
    (layer,), variables = record["layers"], record["variables"]
    np.testing.assert_allclose(layer["gradient_norm"], norm, rtol=1e-5)
    assert sum(layer["gradient_histogram"]["counts"]) == 3
    assert "gradient_histogram" not in variables[0]
    # Biases begin at zero: there is nothing to compare their change with.
    assert watch.history[0]["update_ratio"] is None
    assert watch.history[1]["variables"][0]["update_ratio"] > 0
    weights = np.concatenate([kernel.ravel(), [0.0]])
    for step, one in zip((0, 4, 8), watch.history, strict=True):
        assert one["step"] == step
    now = np.concatenate(
        [keras.ops.convert_to_numpy(v).ravel() for v in model.trainable_variables]
    )
    moved = sum(
        r["update_ratio"] * r["layers"][0]["weight_norm"] * 4 for r in watch.history[1:]
    )
    # No shorter than the way from the first to the last.
    assert moved >= np.linalg.norm(now - weights) * (1 - 1e-5)
    assert history["gradient_norm"][-1] == record["gradient_norm"]
    ratio = record["hessian_max_eigenvalue"] / record["stability_threshold"]
    assert record["stability_ratio"] == history["stability_ratio"][-1] == ratio
    assert "gradient_norm" in history and "update_ratio" not in history


def test_left_out_on_request_and_by_the_feed():
    model, x, y = linear()
    for watch in (
        kc.CurvatureMonitor((x, y), diagonal=None, num_matvecs=1, gradients=False),
        kc.CurvatureFeed((x, y)),
    ):
        model.fit(x, y, verbose=0, callbacks=[watch])
        assert not any("gradient" in key for key in watch.history[0])
        assert "gradient_norm" not in watch.history[0]["variables"][0]


@pytest.mark.parametrize("also_log", ["gradient_norm", (1,)])
def test_logs_take_a_sequence_of_keys(also_log):
    with pytest.raises(ValueError, match="`also_log` must be a sequence.*Received"):
        kc.CurvatureMonitor((np.ones(2), np.ones(2)), also_log=also_log)


@pytest.mark.parametrize("top_layers", [-1, 2.5, "all"])
def test_top_layers_is_a_number(top_layers):
    with pytest.raises(ValueError, match="`top_layers` must be a number.*Received"):
        kc.CurvatureMonitor((np.ones(2), np.ones(2)), top_layers=top_layers)
