"""What only the TensorFlow backend must do: see `test_contract` for the rest."""

import threading

import keras
import numpy as np
import pytest

if keras.backend.backend() != "tensorflow":
    pytest.skip("TensorFlow's own", allow_module_level=True)

import tensorflow as tf
from tensorflow.python.framework import ops as tensorflow_ops

from keras_curvature import backend
from keras_curvature.backend import tensorflow_graphs


def hessian_product(function, x, v):
    """`H v` of a scalar function of one tensor or variable."""
    recording = backend.record(lambda p: (function(p["x"]), {}), {"x": x})
    return recording.product(["x"], ["x"])({"x": v})["x"]


# Compiled functions


def test_compiled_counts_traces():
    function = backend.compiled(lambda a, b: {"sum": a + b[0]})
    before = backend.num_traces()
    assert function.traces() == 0
    for _ in range(3):
        assert function(tf.constant(1.0), [tf.constant(2.0)])["sum"] == 3.0
    assert function.traces() == 1 and backend.num_traces() == before + 1
    # The second shape leaves the dimension open, the third needs no trace.
    for n in (2, 3, 4, 5):
        function(tf.ones(n), [tf.ones(n)])
    assert function.traces() <= 3


def test_calls_after_the_first_go_past_tf_function(monkeypatch):
    """To look at hundreds of arguments would take longer than to compute.

    What the short cut rests on is `ConcreteFunction._call_flat` and
    `EagerTensor._shape_tuple`.
    """
    runs = backend.compiled(lambda xs: sum(xs))
    xs = [tf.ones((2,))] * 3
    expected = runs(xs)

    def refused(*args, **kwargs):
        raise AssertionError("A call that went through tf.function.")

    monkeypatch.setattr(type(tf.function(len)), "__call__", refused)
    np.testing.assert_array_equal(runs(xs), expected)
    # Tapes see it as they see any function.
    with tf.GradientTape() as tape:
        tape.watch(xs[0])
        y = runs([xs[0], xs[0], tf.ones((2,))])
    np.testing.assert_array_equal(tape.gradient(y, xs[0]), [2.0, 2.0])
    with pytest.raises(AssertionError, match="went through"):
        runs([tf.Variable([1.0, 2.0])] * 3)


def test_compiled_functions_may_return_other_structures_for_other_types():
    function = backend.compiled(lambda x: [x] * (x.dtype.size // 4))
    for _ in range(2):
        for dtype, count in (("float32", 1), ("float64", 2)):
            assert function(tf.constant(3.0, dtype)) == [3.0] * count


def test_what_vectorizes_but_does_not_run_is_looped():
    """The gradient of a grouped convolution, which a CPU lacks in float64."""
    kernel = np.random.default_rng(0).standard_normal((3, 3, 2, 4))

    def product(x, v):
        def loss(x):
            return tf.reduce_sum(keras.ops.conv(x, kernel, padding="same") ** 3)

        return hessian_product(loss, x, v)

    def products(x):
        return backend.map_range(lambda i: product(x, x * tf.cast(i + 1, x.dtype)), 2)

    x = tf.random.stateless_normal((1, 4, 4, 4), (0, 1), dtype="float64")
    function = backend.compiled(products)
    with pytest.raises(tf.errors.InvalidArgumentError):
        tf.function(products)(x)
    once = backend.compiled(product)(x, x)
    for _ in range(2):
        np.testing.assert_allclose(function(x), tf.stack([once, 2 * once]))
    assert function.traces() == 1


def test_functions_that_fail_by_themselves_are_not_tried_again():
    tries = []

    @backend.compiled
    def function(x):
        tries.append(1)
        tf.debugging.assert_positive(x)
        return x

    with pytest.raises(tf.errors.InvalidArgumentError):
        function(-tf.ones(2))
    assert len(tries) == 1


@pytest.mark.parametrize("count", [1, 3])
def test_loop_range_traces_its_body_once(count):
    traces = []

    def body(i):
        traces.append(1)
        return tf.cast(tf.range(2) + 10 * i, tf.float64)

    loop = backend.compiled(lambda: backend.loop_range(body, count))
    np.testing.assert_array_equal(loop(), [[0, 1], [10, 11], [20, 21]][:count])
    assert len(traces) == 1


def test_loops_run_as_often_as_there_are_rows():
    @tf.function(input_signature=[tf.TensorSpec((None, 2))])
    def doubled(x):
        return backend.loop_range(lambda i: 2 * x[i], tf.shape(x)[0])

    for rows in (1, 3):
        np.testing.assert_array_equal(
            doubled(tf.ones((rows, 2))), 2 * np.ones((rows, 2))
        )
    once = tf.function(lambda x: backend.loop_range(lambda i: 2 * i, tf.shape(x)[0]))
    np.testing.assert_array_equal(once(tf.ones(1)), [0])
    eager = backend.loop_range(lambda i: i + 1, tf.constant(3))
    np.testing.assert_array_equal(eager, [1, 2, 3])


# Places


def test_float64_is_there():
    assert backend.wide_float() == "float64"


def test_variables_have_devices():
    with tf.device("CPU:1"):
        raw, wrapped = tf.Variable([1.0]), keras.Variable([2.0])
    assert [float(v[0]) for v in backend.values([raw, wrapped])] == [1.0, 2.0]
    for variable in (raw, wrapped):
        assert "CPU:1" in backend.place_of(variable)
    assert backend.place_of(3) is None
    with backend.on(backend.place_of(raw)):
        assert "CPU:1" in tf.zeros(2).device
    with backend.on(None):
        assert "CPU:0" in tf.zeros(2).device


def test_placed():
    x = tf.constant([1.0])
    assert backend.placed(x, None) is x and backend.placed(x, x.device) is x
    place = backend.place_of(_variable_on("CPU:1"))
    for a in (x, np.ones(2), 3, tf.constant(3)):
        assert "CPU:1" in backend.placed(a, place).device


def _variable_on(device):
    with tf.device(device):
        return tf.Variable(1.0)


def test_num_replicas(mirrored):
    with mirrored.scope():
        assert backend.num_replicas() == 2


def test_draws_leave_global_states_alone():
    key = backend.array([0, 1], "int32")
    tf.random.set_seed(5)
    expected = tf.random.normal((3,)).numpy()
    tf.random.set_seed(5)
    backend.signs((3,), key, "float32")
    backend.normal((3,), backend.fold_in(key, 1), "float32")
    np.testing.assert_array_equal(tf.random.normal((3,)), expected)


# Variables


def test_products_by_variables():
    """`L = Σ x³`, with what the tape returns for a gather: a sparse gradient."""
    x = tf.Variable(np.arange(6.0).reshape(3, 2))
    v = tf.ones((3, 2), tf.float64)
    for run in (hessian_product, backend.compiled(hessian_product)):
        product = run(lambda x: tf.reduce_sum(tf.gather(x, [0, 2, 2]) ** 3), x, v)
        np.testing.assert_allclose(product, [[0, 6], [0, 0], [48, 60]])


def test_variables_may_be_arguments_of_compiled_functions():
    """They stay what they are, so that the function that reads them is seen."""
    x = tf.Variable([1.0, 2.0])
    function = backend.function_of_variables(lambda: x[0] ** 2 * x[1], [x])

    @backend.compiled
    def hessian(state):
        def loss(point):
            return function(list(point.values())), {}

        product = backend.record(loss, dict(enumerate(state))).product([0], [0])
        return backend.loop_range(lambda i: product({0: tf.one_hot(i, 2)})[0], 2)

    np.testing.assert_allclose(hessian([x]), [[4, 2], [2, 0]])
    x.assign([3.0, 5.0])
    np.testing.assert_allclose(hessian([x]), [[10, 6], [6, 0]])
    assert hessian.traces() == 1
    graph = tf.function(lambda: function([x])).get_concrete_function().graph
    assert "AssignVariableOp" not in {op.type for op in graph.get_operations()}


def test_a_variable_is_restored_if_its_function_fails():
    x = tf.Variable([1.0, 2.0])

    def fails():
        if x[0] > 1:
            raise ZeroDivisionError
        return x[0]

    function = backend.function_of_variables(fails, [x])
    assert function([x]) == 1
    with pytest.raises(ZeroDivisionError):
        function([tf.constant([3.0, 4.0])])
    np.testing.assert_array_equal(x, [1, 2])


def test_functions_of_variables_with_sparse_and_absent_gradients():
    table, idle = tf.Variable(tf.ones((3, 2))), tf.Variable(2.0)
    function = backend.function_of_variables(
        lambda: tf.reduce_sum(tf.gather(table, [0, 2, 2]) ** 2), [table, idle]
    )
    point = {"table": 3 * tf.ones((3, 2)), "idle": tf.constant(7.0)}
    loss, _, gradient = backend.gradient(
        lambda p: (2 * function([p["table"], p["idle"]]), {}), point
    )
    assert loss == 2 * 6 * 9
    np.testing.assert_array_equal(gradient["table"], [[12, 12], [0, 0], [24, 24]])
    np.testing.assert_array_equal(gradient["idle"], 0)


def test_products_in_loops_know_their_shapes():
    """TensorFlow does not look out of the loop's body, where sizes come from."""
    shapes = []

    @tf.function(input_signature=[tf.TensorSpec((None, 2))])
    def products(x):
        def loss(point):
            return tf.reduce_sum(tf.transpose(point["x"]) ** 3), {}

        product = backend.record(loss, {"x": x}).product(["x"], ["x"])

        def body(i):
            found = product({"x": x * tf.cast(i, "float32")})["x"]
            shapes.append(found.shape.as_list())
            return found

        return backend.loop_range(body, 2)

    products(tf.ones((3, 2)))
    assert shapes == [[None, 2]]


# Second derivatives that are missing


def test_the_operation_is_named():
    x = tf.constant([1.0, 2.0])
    for run in (hessian_product, backend.compiled(hessian_product)):
        with pytest.raises(backend.NotTwiceDifferentiable, match="SoftsignGrad"):
            run(lambda x: tf.reduce_sum(tf.nn.softsign(x)), x, x)


def test_other_lookup_errors_pass():
    """Those of the user's own second derivative, for instance."""

    @tf.custom_gradient
    def slope(x):
        return 2 * x, lambda g: {}["missing"]

    @tf.custom_gradient
    def square(x):
        return x**2, lambda g: g * slope(x)

    with pytest.raises(KeyError, match="missing"):
        hessian_product(square, tf.constant(3.0), tf.constant(1.0))


# Second derivatives that are right within `twice_differentiable`


@pytest.mark.parametrize("keepdims", [False, True])
@pytest.mark.parametrize("axes", [[0], [-1], [0, 2]])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_exact_moments_have_the_values_of_the_original(dtype, axes, keepdims):
    x = tf.cast(np.random.default_rng(0).standard_normal((2, 3, 4)), dtype)
    expected = tf.nn.moments(x, axes, keepdims=keepdims)
    with backend.twice_differentiable():
        actual = tf.nn.moments(x, axes, keepdims=keepdims)
    for a, b in zip(actual, expected, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        np.testing.assert_allclose(a, b, rtol=1e-3 if dtype == "float16" else 1e-6)


def test_exact_moments_have_second_derivatives():
    x, v = (tf.constant(np.array(a)) for a in ([1.0, 2.0, 4.0], [1.0, 0.0, 0.0]))
    expected = 2 / 3 * np.array([2 / 3, -1 / 3, -1 / 3])

    def product():
        return hessian_product(lambda x: tf.nn.moments(x, [0])[1], x, v)

    with backend.twice_differentiable():
        np.testing.assert_allclose(product(), expected)
    # When this fails, TensorFlow has mended `tf.nn.moments`, and so can we.
    assert not np.allclose(product(), expected)


@pytest.mark.parametrize(
    "arguments",
    [{}, {"logits_time_major": False}, {"blank_index": -1}, {"blank_index": 1}],
    ids=str,
)
@pytest.mark.parametrize("sparse", [False, True])
def test_ctc_loss_has_the_values_of_the_original(sparse, arguments):
    labels = tf.constant([[2, 3, 3], [3, 2, 0]])
    if sparse:
        labels = tf.sparse.from_dense(labels)
        arguments = {"blank_index": 0} | arguments
    x = tf.constant(np.random.default_rng(0).standard_normal((6, 6, 5)), tf.float32)
    x = x[:, :2] if arguments.get("logits_time_major", True) else x[:2]
    lengths = None if sparse else tf.constant([3, 2]), tf.constant([6, 4])
    expected = tf.nn.ctc_loss(labels, x, *lengths, **arguments)
    with backend.twice_differentiable():
        actual = tf.nn.ctc_loss(labels, x, *lengths, **arguments)
    np.testing.assert_allclose(actual, expected, rtol=1e-5)


def test_ctc_loss_of_sequences_that_vary_in_length():
    x = tf.constant(np.random.default_rng(0).standard_normal((6, 2, 5)), tf.float32)
    case = tf.constant([[2, 3, 3], [3, 2, 0]]), x, [3, 2], [6, 4]

    def loss(labels, x, label_lengths, lengths):
        return tf.nn.ctc_loss(labels, x, label_lengths, lengths, blank_index=0)

    ints = tf.TensorSpec((None, None), tf.int32), tf.TensorSpec((None,), tf.int32)
    signature = [ints[0], tf.TensorSpec((None, None, 5)), ints[1], ints[1]]
    with backend.twice_differentiable():
        actual = tf.function(loss, input_signature=signature)(*case)
    np.testing.assert_allclose(actual, loss(*case), rtol=1e-5)


@pytest.fixture
def tensor_float_32():
    """TF32 is on, as it is by default."""
    tf.config.experimental.enable_tensor_float_32_execution(True)
    yield tf.config.experimental.tensor_float_32_execution_enabled
    tf.config.experimental.enable_tensor_float_32_execution(True)


def test_what_is_changed_is_restored(tensor_float_32):
    def changed():
        slices = (
            vars(tf.IndexedSlices).get(name) for name in ("__mul__", "__truediv__")
        )
        return [tf.nn.moments, tf.nn.ctc_loss, *slices]

    originals = changed()
    with backend.twice_differentiable():
        with backend.twice_differentiable():
            pass
        assert all(a is not b for a, b in zip(changed(), originals, strict=True))
        assert not tensor_float_32()
    assert changed() == originals and tensor_float_32()
    with pytest.raises(RuntimeError), backend.twice_differentiable():
        raise RuntimeError
    assert changed() == originals and tensor_float_32()
    tf.config.experimental.enable_tensor_float_32_execution(False)
    with backend.twice_differentiable():
        pass
    assert not tensor_float_32()


def test_threads_may_overlap(tensor_float_32):
    """The first one to enter leaves before the second one does."""
    original, inside, leave = tf.nn.moments, threading.Event(), threading.Event()

    def other():
        with backend.twice_differentiable():
            inside.set()
            leave.wait(10)

    thread = threading.Thread(target=other)
    with backend.twice_differentiable():
        thread.start()
        assert inside.wait(10)
    assert tf.nn.moments is not original and not tensor_float_32()
    leave.set()
    thread.join(10)
    assert tf.nn.moments is original and tensor_float_32()


def test_replicas_enter_while_their_caller_is_inside(mirrored):
    def one_replica():
        with backend.twice_differentiable():
            context = tf.distribute.get_replica_context()
            # Threads of replicas take turns at collective operations alone.
            return context.all_reduce("SUM", tf.ones(2))

    with backend.twice_differentiable():
        total = mirrored.run(one_replica)
    for part in mirrored.experimental_local_results(total):
        np.testing.assert_array_equal(part, [2, 2])


# What derivatives leave out


def caveats(function, x):
    """Pairs of kinds and operations."""
    findings = backend.examine(lambda p: (function(p["x"]), {}), {"x": x})
    return [caveat[:2] for caveat in findings.caveats]


def test_silent_errors():
    image = tf.constant(
        np.random.default_rng(0).standard_normal((1, 4, 4, 1)).astype("float32")
    )

    def resize(x):
        return tf.reduce_sum(tf.image.resize(x, (8, 8)) ** 2)

    def pool(x):
        return tf.reduce_sum(tf.nn.max_pool2d(x, 2, 2, "SAME") ** 2)

    assert caveats(lambda x: tf.reduce_sum(x**2), image) == []
    assert caveats(resize, image) == [("second_derivative", "ResizeBilinearGrad")]
    assert caveats(resize, tf.Variable(image)) == caveats(resize, image)
    assert caveats(pool, image) == [("xla", "MaxPool")]
    # Only what lies between the point and the gradient counts.
    assert caveats(lambda x: resize(image) * x[0, 0, 0, 0], image) == []
    findings = backend.examine(
        lambda p: (tf.reduce_sum(p["x"] ** 2), {"stopped": tf.stop_gradient(p["x"])}),
        {"x": image},
    )
    assert findings.caveats == ()
    colour = tf.abs(image) * tf.ones(3)
    found = caveats(lambda x: tf.reduce_sum(x * tf.image.hsv_to_rgb(x)), colour)
    assert found == [("gradient", "HSVToRGB")]


def test_stopped_gradients_are_found_unless_they_are_harmless():
    x = tf.constant([1.0, 2.0])
    stopped = [("gradient", "StopGradient")]
    assert caveats(lambda x: tf.reduce_sum(x * tf.stop_gradient(x)), x) == stopped
    assert caveats(tf.reduce_logsumexp, x) == []
    assert caveats(lambda x: tf.reduce_sum(x * tf.stop_gradient(tf.sign(x))), x) == []
    held = caveats(lambda x: tf.reduce_sum(backend.hold_cotangent(x**2) ** 3), x)
    assert held == []


def test_caveats_have_the_names_of_operations():
    def function(point):
        with tf.name_scope("my_layer"):
            return tf.reduce_sum(point["x"] * tf.stop_gradient(point["x"])), {}

    (caveat,) = backend.examine(function, {"x": tf.constant([1.0])}).caveats
    assert caveat == backend.Caveat("gradient", "StopGradient", "my_layer/StopGradient")


@pytest.mark.parametrize("kind", ["branch", "loop", "call"])
def test_bodies_of_branches_loops_and_calls_are_read(kind):
    def inside(body, x):
        if kind == "branch":
            return tf.reduce_sum(tf.cond(x[0] > 0, lambda: body(x), lambda: x))
        if kind == "call":
            return tf.reduce_sum(tf.function(body)(x))
        _, y = tf.while_loop(lambda i, y: i < 2, lambda i, y: (i + 1, body(y)), (0, x))
        return tf.reduce_sum(y)

    def harmless(x):
        held = tf.reduce_sum(backend.hold_cotangent(x**2))
        return x * tf.reduce_logsumexp(x) * held

    def stopped(x):
        return x * tf.stop_gradient(x)

    x = tf.ones(3)
    assert caveats(lambda x: inside(harmless, x), x) == []
    found = caveats(lambda x: inside(stopped, x), x)
    assert set(found) == {("gradient", "StopGradient")}


def test_list_of_silent_gradients_is_complete():
    """TensorFlow's registry has no gradient operation that we do not know of."""
    registry = tensorflow_ops.gradient_registry
    silent = {name for name in registry.list() if registry.lookup(name) is None}
    known = tensorflow_graphs.STOP_SECOND_DERIVATIVES
    assert known | tensorflow_graphs.STOP_GRADIENTS <= silent
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


# Outlines


def test_outline_runs_nothing():
    ran = []

    def function(x):
        return tf.numpy_function(lambda x: ran.append(1) or x, [x], tf.float32) * x

    def known(x):
        y = function(x)
        y.set_shape(x.shape)
        return y

    outline = backend.outline(known, tf.ones(2))
    assert outline == (backend.Shape((2,), "float32"), frozenset({0}))
    assert not ran


def test_outline_in_a_trace_knows_what_varies():
    outlines = []

    @tf.function(input_signature=[tf.TensorSpec((None, 2))])
    def function(x):
        other = x + 1
        outlines.append(backend.outline(lambda a: [a @ tf.transpose(other), x], x))
        return x

    function(tf.ones((3, 2)))
    ((product, outer), origins) = outlines[0]
    assert product.shape == (None, None) and outer.shape == (None, 2)
    # What is captured is no argument, even if it has the same value.
    assert origins == [frozenset({0}), frozenset()]


def test_shapes_that_vary_are_no_origins():
    outlines = []

    def shaped_like(x, y):
        zeros = tf.zeros_like(x) + keras.ops.ones(keras.ops.shape(x))
        count = tf.size(x) * tf.rank(x)
        return [zeros * y, tf.cast(count, tf.float32) * y, zeros * x]

    @tf.function(input_signature=[tf.TensorSpec((None, 2))])
    def function(x):
        outlines.append(backend.outline(shaped_like, x, tf.constant(2.0)))
        return x

    function(tf.ones((3, 2)))
    assert outlines[0].origins == [frozenset({1}), frozenset({1}), frozenset({0})]


def test_outline_captures_variables():
    x = tf.Variable([1.0, 2.0])
    outline = backend.outline(lambda a: [x * a, x, tf.gather(x, [0])], tf.constant(1.0))
    assert [shape.shape for shape in outline.shapes] == [(2,), (2,), (1,)]
    assert outline.origins == [frozenset({0}), frozenset(), frozenset()]


def test_graphs_run_as_they_are_written():
    """Without a GPU, and TensorFlow does with others what it did before."""

    def left_as_written():
        options = tf.config.optimizer.get_experimental_options()
        return options.get("disable_meta_optimizer", False)

    assert not left_as_written()
    with backend.twice_differentiable():
        assert left_as_written()
        with backend.twice_differentiable():
            assert left_as_written()
        assert left_as_written()
    assert not left_as_written()
    tf.config.optimizer.set_experimental_options({"disable_meta_optimizer": True})
    try:
        with backend.twice_differentiable():
            assert left_as_written()
        assert left_as_written()
    finally:
        tf.config.optimizer.set_experimental_options({"disable_meta_optimizer": False})
