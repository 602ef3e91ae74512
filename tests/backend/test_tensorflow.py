"""Tapes, tracing, devices and random numbers of the TensorFlow backend."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from tensorflow.python.framework import ops as tensorflow_ops

from keras_curvature import backend
from keras_curvature.backend import tensorflow_graphs

A = np.random.default_rng(0).standard_normal((4, 4))
SYMMETRIC = A + A.T


# Tracing and placing


def test_compiled_counts_traces():
    function = backend.compiled(lambda a, b: {"sum": a + b[0]})
    assert function.traces() == 0
    for _ in range(3):
        assert function(tf.constant(1.0), [tf.constant(2.0)])["sum"] == 3.0
    assert function.traces() == 1
    # The second shape leaves the dimension open, the third needs no trace.
    for n in (2, 3, 4, 5):
        function(tf.ones(n), [tf.ones(n)])
    assert function.traces() <= 3


def test_array():
    x = tf.constant([1.0])
    assert backend.array(x) is x and backend.array(x, "float32") is x
    assert backend.array(x, "float64").dtype == tf.float64
    assert backend.array(np.ones(2), "float32").dtype == tf.float32
    assert backend.is_tensor(x)
    assert not any(backend.is_tensor(a) for a in (np.ones(2), tf.Variable(1.0), 1.0))


def test_values_and_devices():
    with tf.device("CPU:1"):
        raw, wrapped = tf.Variable([1.0]), keras.Variable([2.0])
    values = backend.values_of([raw, wrapped])
    assert [float(v[0]) for v in values] == [1.0, 2.0]
    for variable in (raw, wrapped):
        assert "CPU:1" in backend.device_of(variable)
    assert backend.device_of(3) == ""
    with backend.on_device(backend.device_of(raw)):
        assert "CPU:1" in tf.zeros(2).device
    with backend.on_device(""):
        assert "CPU:0" in tf.zeros(2).device


def test_placed():
    x = tf.constant([1.0])
    assert backend.placed(x, "") is x and backend.placed(x, x.device) is x
    for a in (x, np.ones(2), 3, tf.constant(3)):
        assert "CPU:1" in backend.placed(a, "CPU:1").device


def test_num_replicas(mirrored):
    assert backend.num_replicas() == 1
    with mirrored.scope():
        assert backend.num_replicas() == 2


# Random directions


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_random_signs(dtype):
    signs = backend.random_signs((100, 100), (1, 2), dtype)
    assert signs.dtype == dtype
    np.testing.assert_array_equal(np.unique(signs), [-1, 1])
    # 10 000 signs: the mean has a standard deviation of 0.01.
    assert abs(np.mean(signs)) < 0.06
    again = backend.random_signs((100, 100), (1, 2), dtype)
    np.testing.assert_array_equal(signs, again)
    other = backend.random_signs((100, 100), (1, 3), dtype)
    assert abs(np.mean(signs * other)) < 0.06


def test_random_signs_are_fresh_in_a_compiled_function():
    function = backend.compiled(lambda seed: backend.random_signs((64,), seed))
    draws = [function(tf.constant([0, i])).numpy() for i in range(8)]
    assert len({d.tobytes() for d in draws}) == 8
    np.testing.assert_array_equal(draws[3], backend.random_signs((64,), (0, 3)))
    assert function.traces() == 1


def test_random_directions_leave_global_states_alone():
    tf.random.set_seed(5)
    expected = tf.random.normal((3,)).numpy()
    tf.random.set_seed(5)
    backend.random_signs((3,), (0, 1))
    backend.random_normal((3,), (0, 1))
    np.testing.assert_array_equal(tf.random.normal((3,)), expected)


def test_random_normal():
    x = backend.random_normal((100, 100), (1, 2), "float64")
    assert x.dtype == tf.float64
    # Standard deviations 0.01 and 0.014.
    assert abs(np.mean(x)) < 0.06 and abs(np.mean(x * x) - 1) < 0.09


def test_folded_seeds_differ():
    seeds = {tuple(backend.fold_seed((1, 2), i).numpy()) for i in range(20)}
    assert len(seeds) == 20


# Derivatives


def test_gradient():
    table, idle = tf.Variable(tf.ones((3, 2))), tf.Variable(1.0)
    loss, (sparse, none) = backend.gradient(
        lambda: tf.reduce_sum(tf.gather(table, [0, 2, 2]) ** 2), [table, idle]
    )
    assert loss == 6.0 and none is None
    assert isinstance(sparse, tf.Tensor)
    np.testing.assert_array_equal(sparse, [[2, 2], [0, 0], [4, 4]])


@pytest.mark.parametrize("kind", [tf.constant, tf.Variable])
def test_products_are_those_of_a_quadratic(kind):
    x = kind(np.ones(4))
    tapes = backend.GradientProducts(
        lambda watch: 0.5 * tf.tensordot(x, tf.linalg.matvec(SYMMETRIC, x), 1), [x]
    )
    np.testing.assert_allclose(tapes.loss, SYMMETRIC.sum() / 2)
    np.testing.assert_allclose(tapes.gradients[0], SYMMETRIC.sum(1))
    for i in range(4):
        (product,) = tapes.product([tf.constant(np.eye(4)[i])])
        np.testing.assert_allclose(product, SYMMETRIC[i])
    v = np.array([1.0, -1.0, 1.0, 1.0])
    (product,) = tapes.product([tf.constant(v)])
    # Not the row sums of H, which a tape returns when nothing weighs the gradient.
    assert not np.allclose(v * product, SYMMETRIC.sum(1))


def test_products_with_unconnected_linear_and_sparse_sources():
    table = tf.constant(np.ones((3, 2)))
    idle, slope = tf.constant([1.0]), tf.constant(2.0, tf.float64)
    tapes = backend.GradientProducts(
        lambda watch: tf.reduce_sum(tf.gather(table, [0, 2, 2]) ** 2) + slope,
        [table, idle, slope],
    )
    assert [g is None for g in tapes.gradients] == [False, True, False]
    products = tapes.product([tf.ones_like(s) for s in (table, idle, slope)])
    np.testing.assert_array_equal(products[0], [[2, 2], [0, 0], [4, 4]])
    np.testing.assert_array_equal(products[1], [0])
    np.testing.assert_array_equal(products[2], 0)
    assert [p.dtype for p in products] == [tf.float64, tf.float32, tf.float64]


def test_sources_declared_while_the_loss_is_computed():
    x = tf.constant([1.0, 2.0])

    def loss_fn(watch):
        shift = tf.zeros(2)
        watch(shift)
        return tf.reduce_sum((x + shift) ** 3)

    tapes = backend.GradientProducts(loss_fn, [x])
    assert len(tapes.sources) == 2
    # H is the same matrix in each of the four blocks.
    products = tapes.product([tf.zeros(2), tf.ones(2)])
    for product in products:
        np.testing.assert_allclose(product, [6.0, 12.0])


def test_finite_differences_of_a_cubic():
    x = [tf.constant(np.ones(3)), tf.constant(np.float32(2.0))]

    def gradient_at(values):
        a, b = values
        return [3 * a**2, tf.cast(3 * b**2, tf.float32)]

    directions = [
        [tf.constant(np.arange(3.0)), tf.constant(1.0)],
        [tf.constant(np.zeros(3)), tf.constant(0.0)],
        [tf.constant(1e-20 * np.arange(3.0)), tf.constant(1e-20)],
    ]
    first, zero, tiny = backend.finite_difference_products(gradient_at, x, directions)
    np.testing.assert_allclose(first[0], 6 * np.arange(3.0), rtol=1e-9)
    # Steps follow the least precise dtype.
    np.testing.assert_allclose(first[1], 12.0, rtol=1e-3)
    assert [p.dtype for p in first] == [tf.float64, tf.float32]
    np.testing.assert_array_equal(zero[0], np.zeros(3))
    np.testing.assert_allclose(tiny[0], 6e-20 * np.arange(3.0), rtol=1e-9)


def test_steps_of_finite_differences_follow_the_moved_parameters():
    seen = []

    def gradient_at(values):
        seen.append(values[0].numpy())
        return [tf.zeros_like(values[0])]

    x = tf.constant(np.array([0.0] + [1000.0] * 99))
    for v in (np.eye(100)[0], np.ones(100)):
        backend.finite_difference_products(gradient_at, [x], [[tf.constant(v)]])
    up, down, dense, _ = seen
    u = 2.0**-52
    # A weight of zero by itself: the others' size does not matter.
    np.testing.assert_allclose(up[0] - down[0], 0.4 * u ** (1 / 3), rtol=1e-6)
    moved = np.linalg.norm(dense - x.numpy())
    size = 1 + np.linalg.norm(x)
    np.testing.assert_allclose(moved, 0.2 * u ** (1 / 3) * size, rtol=1e-3)


# Exact second derivatives


@pytest.mark.parametrize("keepdims", [False, True])
@pytest.mark.parametrize("axes", [[0], [-1], [0, 2]])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_exact_moments_have_the_values_of_the_original(dtype, axes, keepdims):
    x = tf.cast(np.random.default_rng(0).standard_normal((2, 3, 4)), dtype)
    expected = tf.nn.moments(x, axes, keepdims=keepdims)
    with backend.exact_second_derivatives():
        actual = tf.nn.moments(x, axes, keepdims=keepdims)
    for a, b in zip(actual, expected, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        np.testing.assert_allclose(a, b, rtol=1e-3 if dtype == "float16" else 1e-6)


def _variance_curvature():
    x = tf.constant(np.array([1.0, 2.0, 4.0]))
    tapes = backend.GradientProducts(lambda watch: tf.nn.moments(x, [0])[1], [x])
    return tapes.product([tf.constant(np.array([1.0, 0.0, 0.0]))])[0].numpy()


def test_exact_moments_have_second_derivatives():
    expected = 2 / 3 * np.array([2 / 3, -1 / 3, -1 / 3])
    with backend.exact_second_derivatives():
        np.testing.assert_allclose(_variance_curvature(), expected)
    # When this fails, TensorFlow has mended `tf.nn.moments`, and so can we.
    assert not np.allclose(_variance_curvature(), expected)


def test_moments_are_restored():
    original = tf.nn.moments
    with backend.exact_second_derivatives():
        with backend.exact_second_derivatives():
            pass
        assert tf.nn.moments is not original
    assert tf.nn.moments is original
    with pytest.raises(RuntimeError), backend.exact_second_derivatives():
        raise RuntimeError
    assert tf.nn.moments is original


# What derivatives leave out


def _errors(function, x):
    found = {}

    def traced(x):
        tapes = backend.GradientProducts(lambda watch: function(x), [x])
        found.update(backend.silent_errors(tapes.sources, tapes.gradients))
        return tapes.loss

    backend.compiled(traced)(tf.constant(x))
    return {key: [kind for kind, _ in places] for key, places in found.items()}


NONE = {"gradient": [], "second_derivative": [], "xla": []}


def test_silent_errors():
    image = np.random.default_rng(0).standard_normal((1, 4, 4, 1)).astype("float32")

    def resize(x):
        return tf.reduce_sum(tf.image.resize(x, (8, 8)) ** 2)

    def pool(x):
        return tf.reduce_sum(tf.nn.max_pool2d(x, 2, 2, "SAME") ** 2)

    assert _errors(lambda x: tf.reduce_sum(x**2), image) == NONE
    assert _errors(resize, image) == NONE | {
        "second_derivative": ["ResizeBilinearGrad"]
    }
    assert _errors(pool, image) == NONE | {"xla": ["MaxPool"]}
    assert _errors(lambda x: resize(tf.constant(image)) * x[0, 0, 0, 0], image) == NONE
    colour = np.abs(image).reshape((1, 4, 4, 1)) * np.ones(3, "float32")
    found = _errors(lambda x: tf.reduce_sum(x * tf.image.hsv_to_rgb(x)), colour)
    assert found == NONE | {"gradient": ["HSVToRGB"]}


def test_silent_errors_through_branches():
    def branch(x):
        return tf.cond(
            x[0] > 0,
            lambda: tf.reduce_sum(x * tf.stop_gradient(x)),
            lambda: tf.reduce_sum(x**2),
        )

    found = _errors(branch, np.ones(3, "float32"))
    assert found["gradient"] == ["StopGradient"]


def test_nothing_is_found_outside_of_a_trace():
    x = tf.constant([1.0])
    assert backend.silent_errors([x], [tf.stop_gradient(x)]) == NONE


def test_list_of_silent_gradients_is_complete():
    """TensorFlow's registry has no gradient operation that we do not know of."""
    registry = tensorflow_ops.gradient_registry
    silent = {name for name in registry.list() if registry.lookup(name) is None}
    known = tensorflow_graphs._STOP_SECOND_DERIVATIVES
    assert known | tensorflow_graphs._STOP_GRADIENTS <= silent
    harmless = {
        "BroadcastGradientArgs",  # Integers.
        "SparseAddGrad",  # Sums of given numbers, not used by any dense layer.
        "StopGradient",
        "TensorArrayGrad",  # Handles.
        "TensorArrayGradV2",
        "TensorArrayGradV3",
        "TensorArrayGradWithShape",
    }
    assert {name for name in silent if "Grad" in name} <= known | harmless


def test_behind_a_constant_cotangent_only_the_function_in_front_is_curved():
    """`L = g(f(x))` with `f = x²`, `g = f³`: `L' = 6x⁵`, and `g'(f) f'' = 6x⁴`."""
    x = tf.constant(2.0)

    def loss(watch):
        return backend.with_constant_cotangent(x**2) ** 3

    tapes = backend.GradientProducts(loss, [x])
    assert float(tapes.loss) == 64 and float(tapes.gradients[0]) == 6 * 32
    assert float(tapes.product([tf.constant(1.0)])[0]) == 6 * 16


@pytest.mark.parametrize("count", [1, 3])
def test_loop_over_range_traces_its_body_once(count):
    traces = []

    def body(i):
        traces.append(1)
        return tf.cast(tf.range(2) + 10 * i, tf.float64)

    loop = backend.compiled(lambda: backend.loop_over_range(body, count, "float64"))
    np.testing.assert_array_equal(loop(), [[0, 1], [10, 11], [20, 21]][:count])
    assert len(traces) == 1
