"""What the package relies on in Keras without being promised it.

Each test says what would break. A version of Keras with which all of them pass may be
let in by setup.cfg.
"""

import ast
import contextlib
import pathlib

import keras
import numpy as np
import pytest
from keras import layers, ops

from keras_curvature import keras_internals as internals

PACKAGE = pathlib.Path(internals.__file__).parent
BACKEND = keras.backend.backend()
X = np.random.default_rng(0).standard_normal((8, 3)).astype("float32")
Y = X.sum(axis=1, keepdims=True)


class Penalized(layers.Layer):
    """Adds a loss that depends on its input; has a layer inside."""

    def __init__(self):
        super().__init__()
        self.inner = layers.Dense(2)

    def call(self, x):
        self.add_loss(ops.mean(ops.square(x)))
        return self.inner(x)


def network(optimizer="sgd", rate=0.5):
    """A compiled model that has not been built."""
    keras.utils.set_random_seed(0)
    stack = [Penalized(), layers.BatchNormalization(), layers.Dropout(rate)]
    model = keras.Sequential([*stack, layers.Dense(1)])
    model.compile(optimizer, "mse", metrics=["mae"])
    return model


def array(tensor):
    return ops.convert_to_numpy(ops.cast(tensor, "float32"))


def values(variables):
    return [v.numpy() for v in variables]


def assert_same(first, second):
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a, b)


# Layers and what is built


def test_flat_layers_finds_layers_inside_layers():
    """Or the layerwise room misses them, and half-precision layers stay as they are."""
    inner = keras.Sequential([layers.Dense(2), layers.LSTM(3)])
    model = keras.Sequential([Penalized(), layers.Reshape((2, 1)), inner])
    model.build((None, 3))
    found = internals.flat_layers(model)
    for layer in (model.layers[0].inner, inner, *inner.layers, inner.layers[1].cell):
        assert sum(one is layer for one in found) == 1
    assert model not in found
    assert internals.flat_layers(model, include_self=True) == [model, *found]
    assert internals.flat_layers(layers.Dense(1)) == []


def test_batch_normalization_takes_its_statistics_from_what_is_given():
    """Or curvature through the statistics of a batch is left out."""
    layer = layers.BatchNormalization(momentum=0.0)
    x = ops.convert_to_tensor(X)
    expected = array(layer(x, training=True))
    seen = []

    def take(inputs, moments):
        mean = moments(inputs)[0]
        seen.append((array(inputs), array(mean)))
        # Of the entries that the mask leaves: the same average for squares.
        return mean, moments(ops.square(inputs - mean))[0]

    assert internals.takes_batch_moments(layer)
    assert not internals.takes_batch_moments(layers.LayerNormalization())
    with internals.batch_moments(layer, take):
        given = array(layer(x, training=True))
        layer(x, training=False)
        layer(x, training=True, mask=ops.convert_to_tensor(np.arange(8) < 4))
    (inputs, mean), (_, masked) = seen
    np.testing.assert_array_equal(inputs, X)
    np.testing.assert_allclose(mean, X.mean(axis=0), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(masked, X[:4].mean(axis=0), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(given, expected, rtol=1e-4, atol=1e-5)
    assert "_moments" not in vars(layer)

    class OfItsOwn(layers.BatchNormalization):
        def _moments(self, inputs, mask):
            return ops.max(inputs, axis=0), ops.ones(inputs.shape[-1])

    assert not internals.takes_batch_moments(OfItsOwn())


def test_build_creates_what_is_missing_and_runs_nothing():
    """Or the first probe lacks variables, or training is not the same after it."""
    model = network()
    internals.build(model, (X, Y, None))
    assert len(model.trainable_variables) == 6
    fresh = {v.name: v.numpy() for v in model.variables}
    np.testing.assert_array_equal(fresh["moving_mean"], 0)
    np.testing.assert_array_equal(fresh["moving_variance"], 1)
    # The loss's mean and that of the metric, sum and count each.
    metrics = [v for metric in model.metrics for v in metric.variables]
    assert len(metrics) == 4
    np.testing.assert_array_equal(values(metrics), 0)
    assert internals.compiled_loss_of(model).built
    assert model.losses == []
    assert not model.optimizer.built


def test_training_is_the_same_after_build():
    """Or a monitored run does not follow the run without monitor bit for bit."""
    # In order to build, `fit` starts reading the data once more, which draws an order,
    # and on PyTorch something from the state that Dropout draws from.
    rate = 0.0 if BACKEND == "torch" else 0.5
    ends = []
    for built_before in (True, False):
        model = network("adam", rate)
        if built_before:
            internals.build(model, (X, Y, None))
        model.fit(X, Y, batch_size=4, shuffle=False, verbose=0)
        ends.append(values(model.variables + model.optimizer.variables))
    assert_same(*ends)


def test_build_leaves_what_is_built_alone():
    """Or every new operator on a model in training would reset or replace things."""
    model = network("adam")
    model.fit(X, Y, batch_size=4, verbose=0)
    variables = model.variables + model.optimizer.variables
    before, losses = values(variables), list(model.losses)
    internals.build(model, (X, Y, None))
    after = model.variables + model.optimizer.variables
    assert list(map(id, after)) == list(map(id, variables))
    assert_same(values(after), before)
    assert all(a is b for a, b in zip(model.losses, losses, strict=True))
    model.fit(X, Y, batch_size=4, verbose=0)


def test_build_gives_the_optimizer_back_after_an_error():
    """Or a model that cannot be built has lost its optimizer."""
    model = keras.Sequential([layers.Dense(2), layers.Reshape((5,))])
    model.compile("sgd", "mse")
    optimizer = model.optimizer
    with pytest.raises(ValueError):
        internals.build(model, (X, Y, None))
    assert model.optimizer is optimizer


def test_build_optimizer_once():
    """LossScaleOptimizer adds its variables once more each time it is built."""
    model = network(keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD()))
    internals.build(model, (X, Y, None))
    internals.build_optimizer(model)
    count = len(model.optimizer.variables)
    internals.build_optimizer(model)
    assert model.optimizer.built and len(model.optimizer.variables) == count
    internals.build_optimizer(keras.Sequential([layers.Dense(1)]))


@pytest.mark.skipif(BACKEND != "tensorflow", reason="TensorFlow's own distribution")
def test_variables_are_created_in_the_scope_of_the_strategy(mirrored):
    """Or the first step on several replicas fails."""
    with mirrored.scope():
        model = network("adam")
    internals.build(model, (X, Y, None))
    internals.build_optimizer(model)
    for variable in model.trainable_variables + model.optimizer.variables:
        assert len(variable.value.values) == 2


def test_compiled_loss_is_another_one_when_compiled_anew():
    """Or the monitor goes on probing the loss that the model had before."""
    model = network()
    first = internals.compiled_loss_of(model)
    model.fit(X, Y, verbose=0)
    assert first is not None and internals.compiled_loss_of(model) is first
    model.compile(model.optimizer, model.loss)
    assert internals.compiled_loss_of(model) is not first
    assert internals.compiled_loss_of(keras.Sequential([layers.Dense(1)])) is None


def test_losses_at_rest():
    """Or `model.losses` holds what a probe left there, symbolic tensors at worst."""
    model = network()
    model(X)
    before = list(model.losses)
    assert len(before) == 1
    with contextlib.suppress(KeyError), internals.losses_at_rest(model):
        with keras.StatelessScope(collect_losses=True):
            model(2 * X)
        assert all(a is not b for a, b in zip(model.losses, before, strict=False))
        raise KeyError
    assert model.losses[0] is before[0] and len(model.losses) == 1
    # Keras still knows it for an old one.
    model(X)
    assert len(model.losses) == 1


# Scopes


def test_current_scope():
    """Or layers cannot be opened: their variables would be hidden, not held fixed."""
    assert internals.current_scope() is None
    with keras.StatelessScope() as outer:
        assert internals.current_scope() is outer
        with keras.StatelessScope() as inner:
            assert internals.current_scope() is inner
        assert internals.current_scope() is outer
    assert internals.current_scope() is None


def test_scopes_take_values_as_they_are():
    """Or a probe of a half-precision model computes with half-precision weights."""
    variable = keras.Variable(np.ones(3), dtype="float16")
    value = ops.convert_to_tensor([1.0001, 2.0, 3.0], "float32")
    with keras.StatelessScope() as scope:
        scope.add_update((variable, value))
        assert variable.value is value
        assert scope.get_current_value(variable) is value
    assert keras.backend.standardize_dtype(variable.value.dtype) == "float16"


# Masks


class Masked(layers.Layer):
    """Puts zeros where the mask says so, as a layer that is handed a mask can."""

    def __init__(self):
        super().__init__()
        self.supports_masking = True

    def call(self, x, mask=None):
        return x if mask is None else ops.where(mask[:, None], x, 0.0)


def test_mask_that_a_layer_made_is_read():
    """Or masked outputs lose their mask behind a shift, and the loss counts padding."""
    tokens = ops.convert_to_tensor([[1, 2, 0], [3, 0, 0]])
    mask = internals.mask_of(layers.Embedding(4, 2, mask_zero=True)(tokens))
    np.testing.assert_array_equal(
        ops.convert_to_numpy(mask), [[True, True, False], [True, False, False]]
    )
    assert internals.mask_of(ops.ones((2, 3))) is None


def test_mask_that_is_written_reaches_the_next_layer():
    """The same."""
    mask = ops.convert_to_tensor(np.arange(8) < 3)
    x = internals.with_mask(ops.convert_to_tensor(X), mask)
    assert internals.mask_of(x) is mask
    np.testing.assert_array_equal(array(Masked()(x))[:3], X[:3])
    np.testing.assert_array_equal(array(Masked()(x))[3:], 0)
    plain = ops.convert_to_tensor(X)
    assert internals.with_mask(plain, None) is plain
    assert internals.mask_of(plain) is None


def test_masks_while_tracing():
    """Traced tensors of JAX take no attributes."""

    def masked(x):
        x = internals.with_mask(2 * x, x[:, 0] > 0)
        return Masked()(internals.with_mask(x + 0, internals.mask_of(x)))

    if BACKEND == "tensorflow":
        import tensorflow as tf

        masked = tf.function(masked)
    elif BACKEND == "jax":
        import jax

        masked = jax.jit(masked)
    expected = np.where(X[:, :1] > 0, 2 * X, 0)
    np.testing.assert_array_equal(array(masked(ops.convert_to_tensor(X))), expected)


# Layers that are twice differentiable

ROW = np.ones((1, 2, 4), "float32")


def attention(kind, **arguments):
    if kind == "group":
        return layers.GroupQueryAttention(2, 2, 1, **arguments)
    return layers.MultiHeadAttention(2, 2, **arguments)


@pytest.mark.parametrize("kind", ["multi_head", "group"])
def test_attention_leaves_fused_kernels(kind):
    """Or its second derivatives fail on a GPU. On a CPU there is no such kernel."""
    layer = attention(kind, flash_attention=True)
    layer.build((1, 2, 4), (1, 2, 4))
    with pytest.raises(Exception, match="(?i)flash|cudnn|cuda"):
        layer(ROW, ROW)
    with internals.twice_differentiable_layers(layer):
        inside = array(layer(ROW, ROW))
    with pytest.raises(Exception, match="(?i)flash|cudnn|cuda"):
        layer(ROW, ROW)
    plain = attention(kind, flash_attention=False)
    plain.build((1, 2, 4), (1, 2, 4))
    plain.set_weights(layer.get_weights())
    np.testing.assert_allclose(inside, array(plain(ROW, ROW)), rtol=1e-5)


@pytest.mark.parametrize("kind", [layers.LSTM, layers.GRU])
@pytest.mark.parametrize("wrapped", [False, True])
def test_recurrent_layers_leave_cudnn(kind, wrapped):
    """Or their second derivatives fail on a GPU. On a CPU there is no cuDNN.

    Keras insists on that on TensorFlow alone.
    """
    layer = kind(2, use_cudnn=True)
    layer = layers.Bidirectional(layer) if wrapped else layer
    cells = [x for x in internals.flat_layers(layer, True) if isinstance(x, kind)]
    assert len(cells) == (2 if wrapped else 1)
    with internals.twice_differentiable_layers(layer):
        assert not any(cell.use_cudnn for cell in cells)
        layer(ROW)
        layer(ROW)
    assert all(cell.use_cudnn is True for cell in cells)
    if BACKEND == "tensorflow":
        with pytest.raises(ValueError, match="use_cudnn=True"):
            layer(ROW)


def in_map():
    """A layer whose policy is an entry of its own in a map shared with others."""
    policies = keras.dtype_policies.DTypePolicyMap(default_policy="float32")
    policies["mine"] = keras.DTypePolicy("mixed_bfloat16")
    return layers.Dense(2, dtype=policies, name="mine")


def by_default_of_map():
    policies = keras.dtype_policies.DTypePolicyMap(default_policy="mixed_float16")
    return layers.Dense(2, dtype=policies, name="mine")


def quantized():
    layer = layers.Dense(2, dtype="mixed_bfloat16")
    layer.build((None, 3))
    layer.quantize("int8")
    return layer


POLICIES = {
    "mixed_bfloat16": lambda: layers.Dense(2, dtype="mixed_bfloat16"),
    "mixed_float16": lambda: layers.Dense(2, dtype="mixed_float16"),
    "bfloat16": lambda: layers.Dense(2, dtype="bfloat16"),
    "map": in_map,
    "default of a map": by_default_of_map,
    "quantized": quantized,
}


@pytest.mark.parametrize("policy", POLICIES)
def test_half_precision_becomes_float32(policy):
    """Or curvature is that of a loss rounded to three digits."""
    layer = POLICIES[policy]()
    if not layer.built:
        layer.build((None, 3))
    before = layer.get_config(), layer.compute_dtype, layer.quantization_mode
    with (
        contextlib.suppress(KeyError),
        internals.twice_differentiable_layers(keras.Sequential([layer])),
    ):
        assert layer.compute_dtype == "float32"
        assert layer.quantization_mode == before[2]
        inside = layer(X)
        raise KeyError
    assert keras.backend.standardize_dtype(inside.dtype) == "float32"
    # bfloat16 has 8 digits in base 2.
    np.testing.assert_allclose(array(inside), array(layer(X)), atol=0.1)
    assert (layer.get_config(), layer.compute_dtype, layer.quantization_mode) == before


def test_full_precision_stays():
    for dtype in ("float32", "float64"):
        layer = layers.Dense(2, dtype=dtype)
        with internals.twice_differentiable_layers(layer):
            assert layer.compute_dtype == dtype


# Optimizers


def test_unwrapped():
    """Or an optimizer inside another is handed no curvature."""
    inner, other = keras.optimizers.SGD(), keras.optimizers.Adam()
    assert internals.unwrapped(None) == []
    assert internals.unwrapped(inner) == [inner]
    scaled = keras.optimizers.LossScaleOptimizer(inner)
    assert internals.unwrapped(scaled) == [inner]
    several = keras.optimizers.MultiOptimizer(
        keras.optimizers.OptimizerMap(inner, {"a": other})
    )
    assert internals.unwrapped(several) == [other, inner]
    assert internals.unwrapped(keras.optimizers.LossScaleOptimizer(several)) == [
        other,
        inner,
    ]


@pytest.mark.parametrize("scaled", [False, True])
def test_optimizer_variables(scaled):
    """Or a diagonal cannot be matched to the optimizer's variables."""
    optimizer = inner = keras.optimizers.SGD()
    if scaled:
        optimizer = keras.optimizers.LossScaleOptimizer(inner)
    assert internals.optimizer_variables(inner) is None
    model = network(optimizer)
    model.fit(X, Y, verbose=0)
    found = internals.optimizer_variables(inner)
    assert list(map(id, found)) == list(map(id, model.trainable_variables))


@pytest.mark.parametrize("kind", ["Adam", "AdamW", "RMSprop"])
def test_squared_gradients(kind):
    """Or the preconditioned eigenvalue of these optimizers is missing."""
    optimizer = getattr(keras.optimizers, kind)()
    variables = [keras.Variable(np.ones(2)), keras.Variable(np.ones(3))]
    optimizer.build(variables)
    gradients = [np.array([1.0, 2.0], "float32"), np.array([3.0, 4, 5], "float32")]
    optimizer.apply([ops.convert_to_tensor(g) for g in gradients])
    share = 1 - (optimizer.rho if kind == "RMSprop" else optimizer.beta_2)
    squares = internals.squared_gradients(optimizer)
    for square, gradient in zip(squares, gradients, strict=True):
        np.testing.assert_allclose(square.numpy(), share * gradient**2, rtol=1e-5)


def test_no_squared_gradients():
    optimizer = keras.optimizers.SGD(momentum=0.9)
    assert internals.squared_gradients(optimizer) is None
    optimizer.build([keras.Variable(np.ones(2))])
    assert internals.squared_gradients(optimizer) is None


# Attributes


@pytest.mark.parametrize("activation", ["tanh", layers.LeakyReLU(0.5), None])
def test_replaced(activation):
    """Or layers cannot be opened, or are not the same layers afterwards.

    An activation may be a layer, which PyTorch keeps apart from other attributes.
    """
    layer = layers.Dense(2, activation=activation)
    before = array(layer(X)), layer.activation, len(internals.flat_layers(layer))
    with (
        contextlib.suppress(KeyError),
        internals.replaced(layer, "activation", ops.exp),
    ):
        np.testing.assert_allclose(
            array(layer(X)), np.exp(X @ layer.kernel.numpy()), rtol=1e-5
        )
        with internals.replaced(layer, "call", lambda x: 2 * x):
            np.testing.assert_array_equal(array(layer(X)), 2 * X)
        raise KeyError
    assert layer.activation is before[1]
    assert len(internals.flat_layers(layer)) == before[2]
    assert "call" not in vars(layer)
    np.testing.assert_array_equal(array(layer(X)), before[0])


# Nothing of the kind elsewhere

#: Parts of Keras that are not private by name, but as good as.
UNDOCUMENTED = {"original_scope", "inner_optimizer", "distribute_strategy"}

#: What Keras' own guide to optimizers has subclasses use, and what is PyTorch's.
ALLOWED = {
    ("optimizers/diagonal_newton.py", "_get_variable_index"),
    ("optimizers/diagonal_newton.py", "_trainable_variables"),
    ("optimizers/diagonal_newton.py", "_use_weight_decay"),
    ("data_sets.py", "_iterator"),
}


def private(name):
    return name.startswith("_") and not name.endswith("__") or name in UNDOCUMENTED


def defined(tree):
    """Private names that a module defines: functions, attributes of its objects."""
    names = {
        node.name
        for node in ast.walk(tree)
        if isinstance(node, (ast.FunctionDef, ast.ClassDef))
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            if isinstance(node.value, ast.Name) and node.value.id in ("self", "cls"):
                names.add(node.attr)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
    return names


def foreign(source, known=()):
    """Private attributes that a module uses and does not define."""
    tree = ast.parse(source)
    own, used = defined(tree) | set(known), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            used.add(node.attr)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            if node.func.id in ("getattr", "hasattr", "setattr", "delattr"):
                name = node.args[1]
                if isinstance(name, ast.Constant):
                    used.add(name.value)
    return {name for name in used - own if private(name)}


@pytest.mark.parametrize(
    "source, found",
    [
        ("layer._layers", {"_layers"}),
        ("getattr(model, '_compile_loss', None)", {"_compile_loss"}),
        ("class A(Callback):\n def f(self): self._model", {"_model"}),
        ("scope.original_scope", {"original_scope"}),
        ("class A:\n def f(self): self._x = 1\n def g(self, a): a._x", set()),
        ("class A:\n def _f(self): self._f()", set()),
        ("x.__dict__", set()),
    ],
)
def test_private_parts_are_seen(source, found):
    assert foreign(source) == found


def test_private_parts_are_used_here_alone():
    """Whatever else is used of Keras' inside belongs into `keras_internals`."""
    sources = {
        str(path.relative_to(PACKAGE)): path.read_text()
        for path in PACKAGE.rglob("*.py")
        # The backends use private parts of their framework, and see to it themselves.
        if path.parent.name != "backend" and path.name != "keras_internals.py"
    }
    # A class may inherit from one in another module of the package.
    known = {name for source in sources.values() for name in defined(ast.parse(source))}
    used = {
        (path, name)
        for path, source in sources.items()
        for name in foreign(source, known)
    }
    assert used <= ALLOWED
