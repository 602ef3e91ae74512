"""Every rule, in odd shapes, against differences and against the layer itself."""

import diagonals
import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import ops

from keras_curvature.layerwise.rules import paths as paths_module
from keras_curvature.layerwise.rules import rule_for


def opened(name):
    """The paths of a layer with their outputs, recorded by a tape."""
    layer, shape, x = diagonals.layer_and_input(name)
    # Builds the layer, and gives each variable numbers of its own.
    diagonals.mixing(shape, layer, x=x)
    rule, noted = rule_for(layer), []

    def shift(z, remembered):
        noted.append((remembered, z))
        return z

    with tf.GradientTape(persistent=True) as tape:
        tape.watch([v.value for v in layer.trainable_variables])
        rule.call(layer, layer.call, shift, ops.convert_to_tensor(x))
    found = [
        (path, z)
        for remembered, z in noted
        for path in rule.paths(layer, remembered, z)
    ]
    assert {id(p.variable) for p, _ in found} == {
        id(v) for v in layer.trainable_variables
    }
    return tape, found


def directions(z, seed):
    rng = np.random.default_rng(seed)
    return ops.convert_to_tensor(rng.standard_normal(z.shape), z.dtype)


def by_the_tape(tape, path, z, v):
    """`J_nᵀ v_n`, one sample after the other."""
    samples = []
    for n in range(z.shape[0]):
        mask = np.zeros((z.shape[0],) + (1,) * (len(z.shape) - 1))
        mask[n] = 1
        g = tape.gradient(z, path.variable.value, output_gradients=v * mask)
        samples.append(tf.convert_to_tensor(g).numpy())
    return np.stack(samples)


@pytest.mark.parametrize("name", diagonals.LAYERS)
def test_paths_are_the_derivatives_of_the_layer(name, float64, monkeypatch):
    tape, found = opened(name)
    for path, z in found:
        v, u = directions(z, 0), directions(z, 1)
        jv, ju = by_the_tape(tape, path, z, v), by_the_tape(tape, path, z, u)
        np.testing.assert_allclose(path.per_sample(path.inputs, v), jv, atol=1e-12)
        np.testing.assert_allclose(path.total(v), np.sum(jv, axis=0), atol=1e-12)
        expected = np.sum(jv * ju, axis=0)
        np.testing.assert_allclose(path.products(v, u), expected, atol=1e-12)
        with monkeypatch.context() as patch:
            # One sample a chunk, or as few as possible.
            patch.setattr(paths_module, "CHUNK_ELEMENTS", 1)
            np.testing.assert_allclose(path.products(v, u), expected, atol=1e-12)
            np.testing.assert_allclose(path.total(v), np.sum(jv, axis=0), atol=1e-12)
            stacked = paths_module.stacked_products([path, path], [v, u], [u, v])
            np.testing.assert_allclose(stacked, np.sum((jv + ju) ** 2, 0), atol=1e-12)


@pytest.mark.parametrize("name", diagonals.LAYERS)
def test_basis_products_are_products_with_a_unit_vector(name, float64):
    tape, found = opened(name)
    for path, z in found:
        u, size = directions(z, 1), int(np.prod(z.shape[1:]))
        for j in range(0, size, max(1, size // 7)):
            e = np.zeros((1, size))
            e[0, j] = 1
            e = ops.convert_to_tensor(e.reshape(1, *z.shape[1:]))
            everywhere = ops.broadcast_to(e, z.shape)
            np.testing.assert_allclose(
                path.basis_product(e, u), path.products(everywhere, u), atol=1e-12
            )
        if path.pointwise(z.shape):
            v = directions(z, 0)
            np.testing.assert_allclose(
                path.products(v * u, ops.ones_like(v)), path.products(v, u), atol=1e-12
            )


@pytest.mark.parametrize("name", diagonals.LAYERS)
def test_the_output_basis_is_exact(name, float64):
    layer, shape, x = diagonals.layer_and_input(name)
    case = diagonals.mixing(shape, layer, x=x)
    op = diagonals.operator(case)
    expected = diagonals.by_differences(case)
    diagonals.assert_close(diagonals.by_way(op, "outputs"), expected)


@pytest.mark.parametrize(
    "make, shape",
    [
        (lambda **k: keras.layers.Conv1D(3, 2, strides=2, padding="same", **k), (2, 7)),
        (lambda **k: keras.layers.Conv2D(3, 2, strides=2, **k), (2, 5, 8)),
        (lambda **k: keras.layers.Conv2DTranspose(3, 2, strides=2, **k), (2, 2, 3)),
        (lambda **k: keras.layers.SeparableConv2D(3, 2, **k), (2, 4, 5)),
    ],
)
def test_channels_first_in_float32(make, shape, monkeypatch):
    # TensorFlow has no float64 kernels for them on a CPU, and others on some.
    try:
        tf.nn.conv2d(tf.zeros((1, 1, 2, 2)), tf.zeros((1, 1, 1, 1)), 1, "VALID", "NCHW")
    except tf.errors.UnimplementedError:
        pytest.skip("TensorFlow has no kernel for channels first on this CPU.")
    layer = make(data_format="channels_first")
    monkeypatch.setitem(diagonals.LAYERS, "channels first", (shape, lambda: layer))
    tape, found = opened("channels first")
    for path, z in found:
        v, u = directions(z, 0), directions(z, 1)
        jv, ju = by_the_tape(tape, path, z, v), by_the_tape(tape, path, z, u)
        np.testing.assert_allclose(path.per_sample(path.inputs, v), jv, atol=1e-4)
        np.testing.assert_allclose(path.products(v, u), np.sum(jv * ju, 0), atol=1e-4)
