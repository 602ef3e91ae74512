"""`HessianOperator` on TensorFlow, against dense Hessians by independent means.

What holds on every backend is in `test_hessian_anywhere.py`.
"""

import gc
import os
import random
import subprocess
import sys
import warnings

import cases
import keras
import numpy as np
import pytest
from keras import layers, ops

if keras.backend.backend() != "tensorflow":
    pytest.skip("TensorFlow's own", allow_module_level=True)

import reference
import tensorflow as tf
from probed_cases import probed

from keras_curvature.backend import PRODUCTS_PER_PASS
from keras_curvature.operators import HessianOperator

# In float64 the differences themselves are good to about 1e-8 of the largest entry.
RTOL = 1e-6


def operator(case, **kwargs):
    model, x, y, sample_weight, training = case
    return HessianOperator(model, x, y, sample_weight, training=training, **kwargs)


def relative_error(actual, expected):
    return np.linalg.norm(actual - expected) / np.linalg.norm(expected)


def vector(size, *shape, seed=0, dtype="float64"):
    return np.random.default_rng(seed).standard_normal((size, *shape)).astype(dtype)


def regression(*stack, samples=5, **compile_arguments):
    """A case with random inputs and targets for a stack of layers."""
    model = cases.sequential(*stack, **compile_arguments)
    x = cases._numbers(samples, *model.input_shape[1:])
    y = cases._numbers(samples, *model.output_shape[1:], seed=1)
    return cases.Case(model, x, y)


def small(**compile_arguments):
    return regression(
        layers.Input((3,)),
        layers.Dense(3, activation="tanh"),
        layers.Dense(2),
        **compile_arguments,
    )


# The table of cases


@pytest.mark.parametrize("name", cases.CASES)
def test_equals_differences_of_the_gradient(name):
    actual, expected = probed(name).dense, probed(name).differences
    assert actual.dtype == np.float64
    assert actual.shape[0] <= 150
    assert np.abs(expected).max() > 1e-3
    scale = np.abs(expected).max()
    np.testing.assert_allclose(actual, expected, rtol=0, atol=RTOL * scale)
    np.testing.assert_allclose(actual, actual.T, rtol=0, atol=1e-13 * scale)


@pytest.mark.parametrize("name", cases.CASES)
def test_leaves_no_trace(name):
    result = probed(name)
    reference.assert_same_state(result.before, result.after)


@pytest.mark.parametrize("name", cases.CASES)
def test_no_false_alarm(name):
    assert [str(w.message) for w in probed(name).warnings] == []


def test_one_graph_for_a_dense_hessian():
    for name in ("mlp_gelu", "transformer"):
        assert probed(name).traces == 1


def test_tapes_alone_agree_except_for_moments(float64):
    for name in ("mlp_gelu", "cnn_max_pool", "gru_unrolled"):
        naive = reference.hessian_by_tapes(probed(name).case)
        np.testing.assert_allclose(naive, probed(name).dense, atol=1e-10)


@pytest.mark.parametrize("name", cases.NAIVE_TENSORFLOW_IS_WRONG)
def test_tapes_alone_are_wrong_for_normalization(name, float64):
    # When this fails, TensorFlow has mended `tf.nn.moments`, and so can we.
    naive = reference.hessian_by_tapes(probed(name).case)
    assert relative_error(naive, probed(name).differences) > 0.01
    np.testing.assert_allclose(naive, naive.T, atol=1e-10)


@pytest.mark.parametrize("name", ["mlp_tanh", "cnn_max_pool", "layer_norm", "add_loss"])
def test_float32_is_close_to_float64(name):
    expected = probed(name).dense
    op = operator(cases.CASES[name]())
    assert op.dtype == np.float32
    # Unit round-off 6e-8, a few hundred operations deep.
    assert relative_error(op.to_dense(), expected) < 1e-5


def test_loss_and_gradient_are_those_of_training(float64):
    for name in ("two_outputs", "penalties", "sample_weights", "embedding_mask"):
        case, op = probed(name).case, probed(name).op
        loss, gradient = op.value_and_gradient()
        expected = case.model.evaluate(
            case.x, case.y, sample_weight=case.sample_weight, verbose=0
        )
        np.testing.assert_allclose(loss, np.ravel(expected)[0], rtol=1e-6)
        flat = reference.FlatGradient(*case)
        np.testing.assert_allclose(gradient, flat(flat.at()), rtol=1e-9, atol=1e-12)


# Forms of vectors


def test_forms_of_a_vector(float64):
    op, dense = probed("mlp_tanh").op, probed("mlp_tanh").dense
    v = vector(op.shape[0])
    expected = dense @ v
    product = op @ v
    assert isinstance(product, np.ndarray) and product.dtype == np.float64
    np.testing.assert_allclose(product, expected, atol=1e-12)
    product = op @ tf.constant(v)
    assert isinstance(product, tf.Tensor)
    np.testing.assert_allclose(product, expected, atol=1e-12)
    product = op @ v.astype("float32")
    np.testing.assert_allclose(product, expected, atol=1e-6)

    arrays = op.split(v)
    assert [a.shape for a in arrays] == [tuple(x.shape) for x in op.variables]
    np.testing.assert_array_equal(op.flatten(arrays), v)
    product = op @ arrays
    assert all(isinstance(p, np.ndarray) for p in product)
    np.testing.assert_allclose(op.flatten(product), expected, atol=1e-12)
    product = op @ [tf.constant(a) for a in arrays]
    assert all(isinstance(p, tf.Tensor) for p in product)
    assert [tuple(p.shape) for p in product] == op.shapes
    np.testing.assert_allclose(op.flatten(product), expected, atol=1e-12)
    mixed = op @ tuple([tf.constant(arrays[0]), *arrays[1:]])
    np.testing.assert_allclose(op.flatten(mixed), expected, atol=1e-12)
    product = op @ [tf.Variable(a) for a in arrays]
    np.testing.assert_allclose(op.flatten(product), expected, atol=1e-12)


@pytest.mark.parametrize("count", [0, 1, 3, PRODUCTS_PER_PASS, PRODUCTS_PER_PASS + 2])
def test_several_vectors_at_once(count, float64):
    op = probed("transformer").op
    block = vector(op.shape[0], count)
    products = op @ block
    assert products.shape == block.shape
    for i in range(count):
        np.testing.assert_allclose(products[:, i], op @ block[:, i], atol=1e-11)
    assert (op @ tf.constant(block)).shape == block.shape
    # Groups of any number, and single ones.
    assert op._products.traces() <= 2


def test_a_group_that_is_not_full_is_compiled_with_full_ones():
    op = HessianOperator.from_function(lambda x: tf.reduce_sum(x**3), np.ones(5))
    for count in (PRODUCTS_PER_PASS + 2, 2, PRODUCTS_PER_PASS - 1):
        np.testing.assert_allclose(op @ np.eye(5, count), 6 * np.eye(5, count))
    assert op._products.traces() == 1


def test_order_is_that_of_the_trainable_variables():
    op = probed("frozen_layer").op
    model = probed("frozen_layer").case.model
    assert op.variables == model.trainable_variables
    assert op.shapes == [tuple(v.shape) for v in model.trainable_variables]
    assert op.sizes == [int(np.prod(s)) for s in op.shapes]
    assert op.shape == (sum(op.sizes),) * 2
    assert repr(op) == "<HessianOperator 26×26 float64, 4 variables>"


def test_scipy(float64):
    from scipy.sparse.linalg import eigsh

    op, dense = probed("mlp_relu").op, probed("mlp_relu").dense
    linear = op.to_scipy()
    assert linear.shape == op.shape and linear.dtype == op.dtype
    values = eigsh(linear, k=3, return_eigenvectors=False)
    exact = np.linalg.eigvalsh(dense)
    expected = exact[np.argsort(-abs(exact))[:3]]
    np.testing.assert_allclose(np.sort(values), np.sort(expected), rtol=1e-9)
    v = vector(op.shape[0], 2)
    np.testing.assert_allclose(linear @ v, dense @ v, atol=1e-11)
    np.testing.assert_allclose(linear.T @ v[:, 0], dense @ v[:, 0], atol=1e-11)


def test_wrong_shapes_are_refused():
    op = probed("mlp_tanh").op
    with pytest.raises(ValueError, match=r"shape \(31, 31\).*Received: shape \(30,\)"):
        op @ np.zeros(30)
    with pytest.raises(ValueError, match=r"Received: shape \(31, 1, 1\)"):
        op @ np.zeros((31, 1, 1))
    with pytest.raises(ValueError, match="one array for each variable"):
        op @ [np.zeros((3, 4))]
    with pytest.raises(ValueError, match="one array for each variable"):
        op @ op.split(np.zeros(31))[::-1]


# Life of an operator


def test_follows_the_variables_without_tracing_again(float64):
    case = small()
    op = operator(case)
    v = vector(op.shape[0])
    first = op @ v
    for variable in case.model.trainable_variables:
        variable.assign(0.5 * variable)
    second = op @ v
    assert relative_error(second, first) > 0.01
    expected = reference.hessian_by_differences(case) @ v
    np.testing.assert_allclose(second, expected, atol=1e-7)
    assert op._products.traces() == 1


def test_moves_to_other_data_without_tracing_again(float64):
    case = small()
    op = operator(case)
    v = vector(op.shape[0])
    op @ v
    op.set_data(2 * case.x, case.y)
    expected = reference.hessian_by_differences(case._replace(x=2 * case.x)) @ v
    np.testing.assert_allclose(op @ v, expected, atol=1e-7)
    assert op._products.traces() == 1
    # Other numbers of samples: one more trace for all of them.
    for count in (4, 3, 2):
        op.set_data(case.x[:count], case.y[:count])
        op @ v
    assert op._products.traces() == 2


MEMORY_SCRIPT = """
import gc
import conftest, cases, numpy as np, tensorflow as tf
from keras_curvature.operators import HessianOperator

def resident_bytes():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096

model = cases.sequential(
    cases.layers.Input((3,)), cases.layers.Dense(3), cases.layers.Dense(2)
)
op = HessianOperator(model, np.ones((5, 3)), np.ones((5, 2)))
v = tf.ones(op.shape[0])
sizes = []
for _ in range(3):
    for _ in range(400):
        op @ v
    gc.collect()
    sizes.append((resident_bytes(), len(gc.get_objects())))
print(*[after - before for before, after in zip(sizes[1], sizes[2])])
"""


def test_memory_stays_flat():
    # In a process of its own: what other tests leave behind moves the figures.
    if not os.path.exists("/proc/self/statm"):
        pytest.skip("The size of the process is read from Linux' /proc.")
    tests = os.path.dirname(cases.__file__)
    path = os.pathsep.join([os.path.dirname(tests), tests])
    output = subprocess.check_output(
        [sys.executable, "-c", MEMORY_SCRIPT],
        env=os.environ | {"PYTHONPATH": path},
        text=True,
    )
    growth, objects = map(int, output.split())
    # One object kept a call would be 400; allocators grow in steps of 1 MB.
    assert objects < 100
    assert growth < 2e6


def test_warns_of_no_retracing(caplog):
    case = small()
    logger = tf.get_logger()
    logger.addHandler(caplog.handler)
    try:
        for _ in range(7):
            op = operator(case)
            op @ vector(op.shape[0])
    finally:
        logger.removeHandler(caplog.handler)
    assert "retracing" not in caplog.text


def test_an_operator_is_freed():
    import weakref

    case = small()
    op = operator(case)
    op @ vector(op.shape[0])
    dead = weakref.ref(op)
    del op
    gc.collect()
    assert dead() is None


# Side effects


def _draws():
    # Keras first: it may seed its global generator from Python's.
    return [
        float(keras.random.normal(())),
        float(tf.random.normal(())),
        random.random(),
        np.random.random(),
    ]


def test_random_states_do_not_move():
    class Noise(layers.Layer):
        def call(self, x):
            return x + keras.random.normal(ops.shape(x))  # The global generator.

    case = regression(layers.Input((3,)), layers.Dense(3), Noise(), layers.Dense(2))
    keras.utils.set_random_seed(7)
    expected = _draws()
    keras.utils.set_random_seed(7)
    op = operator(case)
    op @ vector(op.shape[0])
    assert _draws() == expected


def test_a_layer_that_draws_while_traced_moves_nothing():
    class Jitter(layers.Layer):
        def call(self, x):
            return x * (1 + random.random() + np.random.random())

    op = operator(regression(layers.Input((3,)), Jitter(), layers.Dense(2)))
    states = random.getstate(), np.random.get_state()
    op @ vector(op.shape[0])
    np.testing.assert_equal((random.getstate(), np.random.get_state()), states)


def test_losses_of_the_last_call_stay():
    case = cases.penalties()
    case.model(2 * case.x)
    expected = [float(loss) for loss in case.model.losses]
    assert len(expected) == 5
    op = operator(case)
    op @ vector(op.shape[0])
    assert [float(loss) for loss in case.model.losses] == expected


def test_training_goes_on_bit_for_bit():
    def train(probe):
        keras.utils.set_random_seed(3)
        model = keras.Sequential(
            [
                layers.Input((3,)),
                layers.Dense(4),
                layers.BatchNormalization(),
                layers.Dropout(0.3),
                layers.Dense(2),
            ]
        )
        model.compile(optimizer="adam", loss="mse", metrics=["mae"])
        x, y = cases._numbers(16, 3), cases._numbers(16, 2, seed=1)
        callbacks = []
        if probe:
            op = HessianOperator(model, x[:5], y[:5], training=True)
            products = []
            callbacks.append(
                keras.callbacks.LambdaCallback(
                    on_train_batch_end=lambda batch, logs: products.append(
                        op @ np.ones(op.shape[0])
                    )
                )
            )
        history = model.fit(x, y, 4, 2, verbose=0, callbacks=callbacks)
        if probe:
            assert len(products) == 8
        return history.history, model.get_weights()

    np.testing.assert_equal(train(probe=True), train(probe=False))


def test_metrics_and_optimizer_are_left_alone():
    case = cases.two_outputs()
    case.model.compile(
        optimizer="adam",
        loss={"first": "mse", "second": "sparse_categorical_crossentropy"},
        metrics={"first": ["mae"], "second": ["accuracy"]},
    )
    case.model.fit(case.x, case.y, verbose=0)
    before = reference.state_of(case.model)
    assert any(key.startswith("metric") for key in before)
    assert any(np.any(v) for k, v in before.items() if k.startswith("metric"))
    op = operator(case)
    op.to_dense()
    op.value_and_gradient()
    reference.assert_same_state(before, reference.state_of(case.model))


def test_the_optimizer_is_not_built_too_early():
    case = small()
    case.model.optimizer.built = False
    optimizer = keras.optimizers.Adam()
    case.model.compile(optimizer=optimizer, loss="mse")
    op = operator(case)
    op @ vector(op.shape[0])
    assert case.model.optimizer is optimizer
    assert not optimizer.built


class Fragile(layers.Layer):
    """Fails while being traced."""

    broken = False

    def call(self, x):
        if self.broken:
            raise RuntimeError("broken on purpose")
        return x


@pytest.mark.parametrize("policy", ["float32", "mixed_float16"])
def test_a_failing_trace_leaves_nothing_changed(policy):
    fragile = Fragile()
    case = regression(
        layers.Input((4, 3)),
        layers.GRU(2, dtype=policy),
        layers.BatchNormalization(dtype=policy),
        fragile,
        layers.Dense(2),
    )
    op = operator(case)
    before = reference.state_of(case.model)
    fragile.broken = True
    with pytest.raises(RuntimeError, match="broken on purpose"):
        op @ vector(op.shape[0])
    reference.assert_same_state(before, reference.state_of(case.model))
    fragile.broken = False
    assert np.isfinite(op @ vector(op.shape[0])).all()


# Models of all kinds


def test_unbuilt_sequential_model():
    model = keras.Sequential([layers.Dense(3, activation="tanh"), layers.Dense(2)])
    model.compile(optimizer="adam", loss="mse", metrics=["mae"])
    case = small()
    op = HessianOperator(model, case.x, case.y)
    assert op.shape == (20, 20)
    assert not model.optimizer.built
    assert np.isfinite(op.to_dense()).all()
    model.fit(case.x, case.y, verbose=0)


def test_uncompiled_model_is_refused():
    model = keras.Sequential([layers.Input((3,)), layers.Dense(2)])
    with pytest.raises(ValueError, match="no loss yet.*model.compile.*loss_fn"):
        HessianOperator(model, np.zeros((2, 3)), np.zeros((2, 2)))
    with pytest.raises(ValueError, match="from_function.*Received: model=3"):
        HessianOperator(3, np.zeros((2, 3)))


def test_unknown_hvp_is_refused():
    case = small()
    with pytest.raises(ValueError, match="`hvp` must be.*Received: hvp='forward'"):
        operator(case, hvp="forward")


def test_model_without_trainable_variables_is_refused():
    case = small()
    case.model.trainable = False
    with pytest.raises(ValueError, match="no trainable variables"):
        operator(case)
    with pytest.raises(ValueError, match="no trainable variables"):
        operator(case, variables=[])


def test_loss_fn_for_a_model_with_its_own_train_step(float64):
    class Own(keras.Model):
        def __init__(self):
            super().__init__()
            self.dense = layers.Dense(2, kernel_regularizer="l2")

        def call(self, x, training=False):
            return self.dense(x)

        def train_step(self, data):
            raise AssertionError("not called")

    def loss_fn(model, x, y, sample_weight=None):
        error = ops.mean(ops.exp(model(x) - y), axis=-1)
        if sample_weight is not None:
            error = error * sample_weight
        return ops.mean(error) + sum(model.losses)

    model = Own()
    x, y = cases._numbers(4, 3), cases._numbers(4, 2, seed=1)
    weight = np.array([0.0, 1.0, 2.0, 3.0])
    for weights in (None, weight):
        op = HessianOperator(model, x, y, weights, loss_fn=loss_fn)
        extra = () if weights is None else (tf.constant(weights),)
        expected = reference.hessian_by_differences(
            (model, x, y), loss_fn=lambda e=extra: loss_fn(model, x, y, *e)
        )
        np.testing.assert_allclose(op.to_dense(), expected, atol=1e-7)
    assert not model.compiled


@pytest.mark.parametrize("style", ["without", "keywords", "with"])
def test_compute_loss_overrides(style, float64):
    class Without(keras.Sequential):
        def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None):
            return ops.mean(ops.exp(y_pred - y))

    class Keywords(keras.Sequential):
        def compute_loss(self, x, y, y_pred, sample_weight, **kwargs):
            assert kwargs == {"training": True}
            return ops.mean(ops.exp(y_pred - y))

    class With(keras.Sequential):
        def compute_loss(self, x, y, y_pred, sample_weight, training=True):
            assert training is True
            return ops.mean(ops.exp(y_pred - y))

    kind = {"without": Without, "keywords": Keywords, "with": With}[style]
    model = kind([layers.Input((3,)), layers.Dense(2)])
    model.compile(optimizer="sgd")
    x, y = cases._numbers(4, 3), cases._numbers(4, 2, seed=1)
    op = HessianOperator(model, x, y)
    expected = reference.hessian_by_differences(
        (model, x, y), loss_fn=lambda: tf.reduce_mean(tf.exp(model(x) - y))
    )
    np.testing.assert_allclose(op.to_dense(), expected, atol=1e-7)


def test_stateful_rnn(float64):
    gru = layers.GRU(2, stateful=True)
    inputs = layers.Input(batch_shape=(3, 4, 2))
    model = cases.functional(inputs, layers.Dense(2)(gru(inputs)))
    case = cases.Case(model, cases._numbers(3, 4, 2), cases._numbers(3, 2, seed=1))
    state = cases._numbers(3, 2, seed=4)
    gru.states[0].assign(state)
    hessian = operator(case).to_dense()
    np.testing.assert_array_equal(gru.states[0].numpy(), state)

    def loss_fn():
        gru.states[0].assign(state)
        return reference.loss(*case)

    expected = reference.hessian_by_differences(case, loss_fn=loss_fn)
    np.testing.assert_allclose(hessian, expected, atol=1e-8)


def test_some_variables_only(float64):
    case, dense = probed("frozen_layer").case, probed("frozen_layer").dense
    model = case.model
    op = operator(case, variables=model.layers[-1].trainable_variables)
    np.testing.assert_allclose(op.to_dense(), dense[16:, 16:], atol=1e-12)
    frozen = operator(case, variables=model.layers[1].variables)
    assert frozen.shape == (20, 20)
    assert np.abs(frozen.to_dense()).max() > 0
    with pytest.raises(ValueError, match="must be Keras variables.*ResourceVariable"):
        operator(case, variables=[tf.Variable(1.0)])


def test_class_weights_are_those_of_fit(float64):
    class_weight = {0: 0.5, 2: 3.0}
    for name in ("mlp_tanh", "mlp_relu"):
        case = probed(name).case
        op = operator(case, class_weight=class_weight)
        expected = case.model.fit(
            case.x, case.y, len(case.x), class_weight=class_weight, verbose=0
        ).history["loss"][0]
        # `fit` reports the loss before its step, which we take back.
        cases.randomize(case.model)
        np.testing.assert_allclose(op.value_and_gradient()[0], expected, rtol=1e-6)
        labels = case.y if case.y.ndim == 1 else case.y.argmax(-1)
        weight = np.array([class_weight.get(int(label), 1.0) for label in labels])
        weighted = reference.hessian_by_differences(case._replace(sample_weight=weight))
        np.testing.assert_allclose(op.to_dense(), weighted, atol=1e-8)


def test_variables_without_influence_are_named_once(float64):
    class Unused(layers.Layer):
        def build(self, input_shape):
            self.idle = self.add_weight(shape=(2,), name="idle")
            self.slope = self.add_weight(shape=(), name="slope")

        def call(self, x):
            return x

    class Model(keras.Sequential):
        def compute_loss(self, x, y, y_pred, sample_weight, training=True):
            # Linear in `slope`: a gradient, but no curvature.
            loss = super().compute_loss(x, y, y_pred, sample_weight)
            return loss + self.layers[1].slope

    model = Model([layers.Input((3,)), layers.Dense(2), Unused()])
    model.compile(optimizer="sgd", loss="mse")
    x, y = cases._numbers(4, 3), cases._numbers(4, 2, seed=1)
    for hvp in ("tape", "finite_difference"):
        with pytest.warns(UserWarning, match="does not depend") as caught:
            op = HessianOperator(model, x, y, hvp=hvp)
            dense = op.to_dense()
            op @ np.ones(op.shape[0])
            op.value_and_gradient()
        assert len(caught) == 1
        message = str(caught[0].message)
        assert "idle" in message and "slope" not in message
        assert np.all(dense[8:] == 0) and np.all(dense[:, 8:] == 0)
        assert np.all(np.diag(dense)[:8] > 0)


def test_a_loss_without_any_variable_is_zero_and_named():
    x = tf.Variable([1.0, 2.0])
    with pytest.warns(UserWarning, match="does not depend on these variables"):
        op = HessianOperator.from_function(lambda: tf.constant(1.0), [x])
        np.testing.assert_array_equal(op.to_dense(), np.zeros((2, 2)))


# Precision


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16", "bfloat16"])
def test_half_precision_models_are_computed_in_float32(policy):
    def build(policy, other=policy):
        return regression(
            layers.Input((4, 3)),
            layers.Dense(3, activation="tanh", dtype=policy),
            layers.LayerNormalization(dtype=policy),
            # A while loop is slow to trace: once is enough.
            layers.GRU(2, dtype=policy)
            if "mixed_float16" in (policy, other)
            else layers.Flatten(),
            layers.Dense(2, dtype=policy),
        )

    case, full = build(policy), build("float32")
    for a, b in zip(full.model.variables, case.model.variables, strict=True):
        if "seed" not in a.path:
            a.assign(ops.cast(b, "float32"))
    before = reference.state_of(case.model)
    op = operator(case)
    assert op.dtype == np.float32
    # As float32 through and through: only the order of sums may differ.
    v = vector(op.shape[0], dtype="float32")
    assert relative_error(op @ v, operator(full) @ v) < 1e-6
    reference.assert_same_state(before, reference.state_of(case.model))


def test_a_shared_map_of_policies_is_restored():
    policies = keras.dtype_policies.DTypePolicyMap(
        default_policy="mixed_float16",
        policy_map={"seq/b": keras.dtype_policies.DTypePolicy("mixed_bfloat16")},
    )
    model = keras.Sequential(
        [
            layers.Input((3,)),
            layers.Dense(3, dtype=policies, name="a"),
            layers.Dense(3, dtype=policies, name="b"),
            layers.Dense(2),
        ],
        name="seq",
    )
    model.compile(optimizer="sgd", loss="mse")
    config = policies.get_config()
    op = HessianOperator(model, cases._numbers(3, 3), cases._numbers(3, 2))
    op @ vector(op.shape[0])
    assert policies.get_config() == config
    assert [layer.compute_dtype for layer in model.layers] == [
        "float16",
        "bfloat16",
        "float32",
    ]
    assert model.layers[0].dtype_policy is policies


def test_variables_of_different_dtypes():
    with cases.floatx("float64"):
        exact = small()
    case = regression(
        layers.Input((3,)),
        layers.Dense(3, activation="tanh", dtype="float64"),
        layers.Dense(2, dtype="float32"),
    )
    op, expected = operator(case), operator(exact).to_dense()
    assert op.dtype == np.float64
    assert relative_error(op.to_dense(), expected) < 1e-5
    arrays = op.split(tf.constant(vector(op.shape[0])))
    assert all(a.dtype == tf.float64 for a in arrays)
    op = operator(case, hvp="finite_difference")
    assert relative_error(op.to_dense(), expected) < 1e-2


# Central differences of the gradient


@pytest.mark.parametrize("name", ["mlp_relu", "layer_norm", "penalties"])
def test_finite_differences(name, float64):
    case, expected = probed(name).case, probed(name).dense
    before = reference.state_of(case.model)
    op = operator(case, hvp="finite_difference")
    # Documented: about 1e-9 in float64.
    assert relative_error(op.to_dense(), expected) < 1e-8
    reference.assert_same_state(before, reference.state_of(case.model))
    with cases.floatx("float32"):
        op = operator(cases.CASES[name](), hvp="finite_difference")
        # Documented: 1e-4 to 1e-3 in float32.
        assert relative_error(op.to_dense(), expected) < 1e-3
        v = np.random.default_rng(0).choice([-1.0, 1.0], op.shape[0])
        assert relative_error(op @ v, expected @ v) < 1e-3
        zero = op @ np.zeros(op.shape[0], "float32")
        np.testing.assert_array_equal(zero, 0)


def test_missing_second_derivative_is_explained(float64):
    case = regression(
        layers.Input((3,)), layers.Dense(3, activation="softsign"), layers.Dense(2)
    )
    op = operator(case)
    with pytest.raises(
        NotImplementedError, match='SoftsignGrad.*hvp="finite_difference"'
    ):
        op @ np.ones(op.shape[0])
    op = operator(case, hvp="finite_difference")
    expected = reference.hessian_by_differences(case)
    assert relative_error(op.to_dense(), expected) < 1e-7


def test_a_users_own_key_error_stays_one():
    x = tf.Variable([1.0])
    with pytest.raises(KeyError, match="missing"):
        HessianOperator.from_function(lambda: {}["missing"] * x[0], [x])


# What TensorFlow leaves out in silence


def _warnings_of(make):
    """What is said while an operator is made and used."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        op = make()
        op @ np.ones(op.shape[0])
        op.to_dense()
    return [str(w.message) for w in caught]


def test_bilinear_resize_is_named():
    case = regression(
        layers.Input((3, 3, 1)),
        layers.Conv2D(1, 2, activation="tanh"),
        layers.UpSampling2D(2, interpolation="bilinear", name="grow"),
        layers.Flatten(),
        layers.Dense(1),
        samples=3,
    )
    (message,) = _warnings_of(lambda: operator(case))
    assert "ResizeBilinearGrad in layer 'grow'" in message
    assert 'hvp="finite_difference"' in message
    assert _warnings_of(lambda: operator(case, hvp="finite_difference")) == []
    difference = operator(case, hvp="finite_difference")
    # The documented remedy is right, and the warning is not for nothing. The kernel
    # of the gradient computes in float32 even for float64, which sets the accuracy.
    expected = reference.hessian_by_differences(case, step=1e-2)
    assert relative_error(difference.to_dense(), expected) < 1e-2
    with pytest.warns(UserWarning, match="ResizeBilinearGrad"):
        op = operator(case)
    assert relative_error(op.to_dense(), expected) > 0.1


def test_resizing_the_data_is_no_alarm():
    case = regression(
        layers.Input((3, 3, 1)),
        layers.UpSampling2D(2, interpolation="bilinear"),
        layers.Flatten(),
        layers.Dense(1),
        samples=3,
    )
    assert _warnings_of(lambda: operator(case)) == []


def _gate(function, name="gate"):
    class Gate(layers.Layer):
        def call(self, x):
            return function(x)

    return regression(
        layers.Input((3,)), layers.Dense(3), Gate(name=name), layers.Dense(2)
    )


def test_stop_gradient_is_named():
    case = _gate(lambda x: x * ops.stop_gradient(x))
    (message,) = _warnings_of(lambda: operator(case))
    assert "StopGradient in layer 'gate'" in message
    assert "held fixed" in message


def test_stop_gradient_inside_a_loop_is_named():
    def loop(x):
        return ops.fori_loop(0, 2, lambda i, z: z * ops.stop_gradient(z), x)

    (message,) = _warnings_of(lambda: operator(_gate(loop)))
    assert "StopGradient" in message


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x + ops.logsumexp(x, axis=-1, keepdims=True),
        lambda x: x * ops.stop_gradient(ops.one_hot(ops.argmax(x, -1), 3)),
        lambda x: x * ops.stop_gradient(ops.sign(x)),
        lambda x: x * ops.stop_gradient(ops.convert_to_tensor([1.0, 2.0, 3.0])),
        lambda x: ops.fori_loop(
            0, 2, lambda i, z: z + ops.logsumexp(z, -1, keepdims=True), x
        ),
        lambda x: ops.log_softmax(x) + ops.softmax(x),
        lambda x: (x, ops.sum(ops.stop_gradient(x)))[0],
    ],
    ids=["logsumexp", "argmax", "sign", "constant", "loop", "softmax", "unused"],
)
def test_harmless_stops_are_no_alarm(function):
    assert _warnings_of(lambda: operator(_gate(function))) == []


def test_stop_gradient_in_a_function_of_variables():
    x, target = tf.Variable([1.0, 2.0]), tf.Variable([3.0, 4.0])

    def loss(stopped):
        return tf.reduce_sum((x - tf.stop_gradient(stopped)) ** 2)

    def of(stopped):
        return HessianOperator.from_function(lambda: loss(stopped()), [x])

    assert _warnings_of(lambda: of(lambda: target)) == []
    (message,) = _warnings_of(lambda: of(lambda: x * x))
    assert "StopGradient (" in message


def test_xla_agrees_without_max_pooling():
    case = cases.mlp_gelu()
    op = operator(case, jit_compile=True)
    assert relative_error(op.to_dense(), probed("mlp_gelu").dense) < 1e-5
    assert _warnings_of(lambda: operator(case, jit_compile=True)) == []


def test_xla_with_max_pooling_is_warned_of():
    case = cases.cnn_max_pool()
    (message,) = _warnings_of(lambda: operator(case, jit_compile=True))
    assert "XLA" in message and "jit_compile=False" in message
    assert "MaxPool in layer 'max_pooling2d" in message


# Batches


def test_chunks_equal_the_whole(float64):
    case, dense = probed("mlp_relu").case, probed("mlp_relu").dense
    for batch_size in (1, 3, 100):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            op = operator(case, batch_size=batch_size)
        np.testing.assert_allclose(op.to_dense(), dense, atol=1e-12)
        assert op.evaluation.data.num_batches == -(-8 // batch_size)
        assert op._products.traces() <= 2


def test_chunks_with_weights_and_penalties_equal_the_whole(float64):
    for name in ("sample_weights", "penalties", "two_outputs"):
        case, dense = probed(name).case, probed(name).dense
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            op = operator(case, batch_size=2)
        v = vector(op.shape[0])
        np.testing.assert_allclose(op @ v, dense @ v, atol=1e-12)


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_chunks_of_a_loss_that_is_no_mean(batch_size, float64):
    case = small(loss=keras.losses.MeanSquaredError(reduction="sum"))
    with pytest.warns(UserWarning, match="not a mean over samples"):
        operator(case, batch_size=batch_size)
    with pytest.warns(UserWarning, match="not a mean over samples"):
        operator(probed("add_loss").case, batch_size=batch_size)
    if batch_size < 3:
        with pytest.warns(UserWarning, match="not a mean over samples"):
            operator(probed("embedding_mask").case, batch_size=batch_size)


def test_data_sets_are_weighted_by_size(float64):
    case, dense = probed("mlp_relu").case, probed("mlp_relu").dense

    class Batches(keras.utils.PyDataset):
        def __len__(self):
            return 3

        def __getitem__(self, i):
            return case.x[3 * i : 3 * i + 3], case.y[3 * i : 3 * i + 3]

    batched = tf.data.Dataset.from_tensor_slices((case.x, case.y)).batch(3)
    unknown = batched.filter(lambda x, y: True)
    assert int(unknown.cardinality()) == tf.data.UNKNOWN_CARDINALITY
    done = []
    for data in (batched, unknown, Batches()):
        op = HessianOperator(case.model, data)
        op.evaluation.on_batch = lambda *args: done.append(args)
        v = vector(op.shape[0])
        np.testing.assert_allclose(op @ v, dense @ v, atol=1e-12)
        assert op._products.traces() <= 2
    assert set(done) == {(1, 3), (2, 3), (3, 3)}


def test_data_sets_that_move_are_read_once():
    case = small()
    scale = tf.Variable(1.0)
    data = tf.data.Dataset.from_tensors((case.x, case.y)).map(
        lambda x, y: (scale * x, y)
    )
    op = HessianOperator(case.model, data)
    v = np.ones(op.shape[0])
    first = op @ v
    scale.assign(2.0)
    np.testing.assert_array_equal(op @ v, first)
    with pytest.warns(UserWarning, match="gives other batches than when"):
        op.set_data(data)
    assert relative_error(op @ v, first) > 0.1


# Any function of variables


def test_polynomial():
    x = tf.Variable([1.0, 2.0])
    op = HessianOperator.from_function(lambda: x[0] ** 2 * x[1], [x])
    np.testing.assert_allclose(op.to_dense(), [[4.0, 2.0], [2.0, 0.0]], rtol=1e-6)
    x.assign([2.0, 1.0])
    np.testing.assert_allclose(op.to_dense(), [[2.0, 4.0], [4.0, 0.0]], rtol=1e-6)
    assert repr(op) == "<HessianOperator 2×2 float32, 1 variables>"
    np.testing.assert_allclose(op.value_and_gradient()[0], 4.0)
    np.testing.assert_allclose(op.value_and_gradient()[1], [4.0, 4.0])


def _rosenbrock(a, b):
    return (1 - a) ** 2 + 100 * (b - a**2) ** 2


@pytest.mark.parametrize("hvp", ["tape", "finite_difference"])
@pytest.mark.parametrize("kind", ["tensorflow", "keras"])
def test_rosenbrock(kind, hvp, float64):
    make = {
        "tensorflow": lambda v: tf.Variable(v, dtype=tf.float64),
        "keras": lambda v: keras.Variable(v, dtype="float64"),
    }[kind]
    a, b = make(-0.5), make(2.0)  # Scalars.
    op = HessianOperator.from_function(lambda: _rosenbrock(a, b), [a, b], hvp=hvp)
    expected = [[2 - 400 * (2.0 - 3 * 0.25), 200.0], [200.0, 200.0]]
    np.testing.assert_allclose(op.to_dense(), expected, rtol=1e-7)
    assert (float(a), float(b)) == (-0.5, 2.0)
    assert op.shapes == [(), ()]
    product = op @ [np.float64(1.0), np.float64(0.0)]
    np.testing.assert_allclose(product, [expected[0][0], 200.0], rtol=1e-7)


def test_function_with_a_keras_model_inside(float64):
    case = probed("layer_norm").case
    raw = [v.value for v in case.model.trainable_variables]
    op = HessianOperator.from_function(
        lambda: tf.reduce_mean((case.model(case.x) - case.y) ** 2), raw
    )
    np.testing.assert_allclose(op.to_dense(), probed("layer_norm").dense, atol=1e-9)


def test_functions_that_are_refused():
    x, n = tf.Variable([1.0, 2.0]), tf.Variable([1, 2])
    with pytest.raises(ValueError, match="at least one"):
        HessianOperator.from_function(lambda: 1.0, [])
    with pytest.raises(ValueError, match="function without arguments"):
        HessianOperator.from_function(3.0, [x])
    with pytest.raises(ValueError, match="floating-point variables.*int32"):
        HessianOperator.from_function(lambda: x[0], [n])
    with pytest.raises(ValueError, match=r"must be a scalar.*shape \(2,\)"):
        HessianOperator.from_function(lambda: x**2, [x])


# Devices and distribution


def test_work_stays_on_the_device_of_the_model():
    with tf.device("CPU:1"):
        case = small()
    assert all("CPU:1" in v.value.device for v in case.model.variables)
    op = operator(case, batch_size=2)
    assert "CPU:1" in op.place
    for batch, _ in op.evaluation.data:
        assert all("CPU:1" in a.device for a in batch[:2])
    v = tf.constant(vector(op.shape[0], dtype="float32"))
    assert "CPU:0" in v.device
    assert "CPU:1" in (op @ v).device
    assert all("CPU:1" in r.device for r in op.value_and_gradient())
    data = tf.data.Dataset.from_tensor_slices((case.x, case.y)).batch(2)
    on_data = HessianOperator(case.model, data)
    product = on_data @ v
    assert "CPU:1" in product.device
    np.testing.assert_allclose(product, op @ v, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("inside", [False, True])
def test_mirrored_model(mirrored, inside):
    expected = operator(small()).to_dense()
    with mirrored.scope():
        case = small()
    if inside:
        with mirrored.scope():
            dense = operator(case).to_dense()
    else:
        dense = operator(case).to_dense()
    assert relative_error(dense, expected) < 1e-6
    difference = operator(case, hvp="finite_difference").to_dense()
    assert relative_error(difference, expected) < 1e-2
