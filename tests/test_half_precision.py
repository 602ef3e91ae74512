"""Models that stay in bfloat16 while they are probed."""

import functools

import keras
import numpy as np
import pytest
from keras import layers, ops

import keras_curvature as kc
from keras_curvature.loss import TrainingLoss

#: A step is good to 2⁻⁸; some dozens of them, and sums of terms that cancel, as those
#: of BatchNormalization do.
ROUNDING = 32 * 2**-8

POLICIES = ("bfloat16", "mixed_bfloat16")


def _attention():
    inputs = keras.Input((6,), dtype="int32")
    h = layers.Embedding(11, 8)(inputs)
    a = layers.LayerNormalization()(h)
    h = h + layers.MultiHeadAttention(2, 4)(a, a, use_causal_mask=True)
    h = layers.Dense(8, "gelu")(layers.LayerNormalization()(h))
    model = keras.Model(inputs, layers.Dense(11, name="words")(h))
    rng = np.random.default_rng(0)
    return model, rng.integers(0, 11, (8, 6)), rng.integers(0, 11, (8, 6))


def _normalized():
    stack = [layers.Conv2D(4, 3), layers.BatchNormalization(), layers.ReLU()]
    stack += [layers.Flatten(), layers.Dense(5)]
    model = keras.Sequential([keras.Input((6, 6, 2)), *stack])
    rng = np.random.default_rng(0)
    x = rng.standard_normal((16, 6, 6, 2)).astype("float32")
    return model, x, rng.integers(0, 5, 16)


MODELS = {f.__name__[1:]: f for f in (_attention, _normalized)}


@functools.cache
def made(name, policy):
    """A compiled model, its inputs and its targets."""
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(policy)
    try:
        keras.utils.set_random_seed(0)
        model, x, y = MODELS[name]()
    finally:
        keras.config.set_dtype_policy(before)
    model.compile(
        "sgd",
        keras.losses.SparseCategoricalCrossentropy(from_logits=True, dtype="float32"),
    )
    return model, x, y


@functools.cache
def operators(name, policy):
    """In float32, and in the model's own types."""
    return tuple(
        kc.HessianOperator(*made(name, policy), half_precision=half)
        for half in (False, True)
    )


def distance(x, y):
    x, y = (np.asarray(ops.convert_to_numpy(a), "float64") for a in (x, y))
    return np.linalg.norm(x - y) / np.linalg.norm(y)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", MODELS)
def test_products(name, policy):
    """Off by rounding in bfloat16, which is more than in float32."""
    full, half = operators(name, policy)
    direction = np.random.default_rng(0).standard_normal(full.shape[0])
    direction = direction.astype("float32")
    first, second = half @ direction, full @ direction
    assert second.dtype == first.dtype == "float32"
    assert 1e-4 < distance(first, second) < ROUNDING
    gradients = [op.value_and_gradient()[1] for op in (half, full)]
    assert 1e-4 < distance(*gradients) < ROUNDING


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("attention", "layerwise"),
        ("attention", "shrunk"),
        ("attention", "hutchinson"),
        ("normalized", "hutchinson"),
    ],
)
def test_diagonals(name, method, policy):
    """The same random directions."""
    full, half = operators(name, policy)
    found = [
        op.flatten(kc.hessian_diagonal(op, method=method, num_matvecs=4).value)
        for op in (half, full)
    ]
    assert distance(*found) < ROUNDING


def test_the_gauss_newton_diagonal():
    """By samples, whose directions depend on rounding: within their noise."""
    full, half = operators("attention", "bfloat16")
    exact = full.flatten(kc.hessian_diagonal(full, method="gauss_newton").value)
    drawn = kc.hessian_diagonal(half, method="gauss_newton", num_matvecs=64)
    error = half.flatten(drawn.standard_error)
    z = (half.flatten(drawn.value) - exact) / np.maximum(error, 1e-6 * exact.max())
    assert np.mean(np.abs(z) < 3) > 0.95


def test_variables_and_layers_stay_as_they_are():
    """No copy in float32, within and without."""
    model, x, y = made("attention", "bfloat16")
    loss = TrainingLoss(model, (ops.array(x), ops.array(y), None), half_precision=True)
    assert {keras.backend.standardize_dtype(v.dtype) for v in loss.state().values} == {
        "bfloat16"
    }
    seen = []
    words = model.get_layer("words")
    original = words.call
    words.call = lambda z, **kwargs: seen.append(z.dtype) or original(z, **kwargs)
    try:
        loss(loss.state(), (ops.array(x), ops.array(y), None))
    finally:
        words.call = original
    assert set(map(keras.backend.standardize_dtype, seen)) == {"bfloat16"}
    assert {layer.compute_dtype for layer in model.layers} == {"bfloat16"}


def test_the_monitor_takes_it():
    model, x, y = made("attention", "bfloat16")
    records = []
    for half in (False, True):
        monitor = kc.CurvatureMonitor(
            (x, y), 1, half_precision=half, num_matvecs=4, on_error="raise", verbose=0
        )
        monitor.set_model(model)
        monitor.probe(0)
        records.append(monitor.history[-1])
    for name in ("hessian_frobenius_norm", "hessian_max_eigenvalue"):
        full, half = (record[name] for record in records)
        assert half != full
        np.testing.assert_allclose(half, full, rtol=ROUNDING)


@pytest.mark.parametrize(
    ("policy", "options", "message"),
    [
        ("mixed_float16", {}, "float16.*Received: half_precision=True and .* layers"),
        ("bfloat16", {"hvp": "finite_difference"}, "rounding.*Received: hvp="),
    ],
)
def test_refused(policy, options, message):
    with pytest.raises(ValueError, match=message):
        kc.HessianOperator(*made("normalized", policy), half_precision=True, **options)
