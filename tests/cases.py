"""Named model cases, small enough for a dense Hessian (P ≤ 150).

`CASES[name]()` builds a compiled model in Keras' current float type, with data and
with parameters that depend on nothing but the case.
"""

import contextlib
from typing import Any, NamedTuple

import keras
import numpy as np
from keras import layers, ops, regularizers

CASES = {}

#: Cases in which TensorFlow's own second derivatives are wrong (`tf.nn.moments`).
NAIVE_TENSORFLOW_IS_WRONG = ("layer_norm", "group_norm", "batch_norm_training")


class Case(NamedTuple):
    """A compiled model and the data to probe it with."""

    model: keras.Model
    x: Any
    y: Any = None
    sample_weight: Any = None
    training: bool = False


def named_in(test):
    """The cases among the parameters of a test, from the name pytest gives it."""
    values = test.partition("[")[2].removesuffix("]").split("-")
    return [value for value in values if value in CASES]


@contextlib.contextmanager
def floatx(dtype):
    """A context in which Keras computes in `dtype` by default."""
    original = keras.config.floatx(), keras.config.dtype_policy()
    keras.config.set_floatx(dtype)
    # The policy of new layers does not follow `floatx` once a layer has been made.
    keras.config.set_dtype_policy(dtype)
    try:
        yield
    finally:
        keras.config.set_floatx(original[0])
        keras.config.set_dtype_policy(original[1])


def _case(function):
    CASES[function.__name__] = function
    return function


def _numbers(*shape, seed=0):
    """Standard normal numbers in Keras' float type."""
    return (
        np.random.default_rng(seed).standard_normal(shape).astype(keras.config.floatx())
    )


def _labels(count, classes, seed=1):
    return np.random.default_rng(seed).integers(0, classes, count)


def _one_hot(count, classes, seed=1):
    return np.eye(classes, dtype=keras.config.floatx())[_labels(count, classes, seed)]


def randomize(model, seed=0):
    """Gives every variable a value of its own, away from zeros, ones and symmetry."""
    rng = np.random.default_rng(seed)
    for variable in model.trainable_variables + model.non_trainable_variables:
        noise = rng.standard_normal(variable.shape)
        if "seed" in variable.path:
            continue
        if variable.name in ("gamma", "scale", "moving_variance"):
            value = np.exp(0.3 * noise)
        elif len(variable.shape) > 1:
            value = 0.6 * noise
        else:
            value = 0.3 * noise
        variable.assign(value)
    return model


def sequential(*stack, loss="mse", **compile_arguments):
    """A compiled `Sequential` model; the first of `stack` is its input."""
    model = keras.Sequential(list(stack))
    model.compile(optimizer="sgd", loss=loss, **compile_arguments)
    return randomize(model)


def functional(inputs, outputs, loss="mse", **compile_arguments):
    """A compiled functional model."""
    model = keras.Model(inputs, outputs)
    model.compile(optimizer="sgd", loss=loss, **compile_arguments)
    return randomize(model)


def _cross_entropy(sparse=True):
    if sparse:
        return keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    return keras.losses.CategoricalCrossentropy(from_logits=True)


# Dense layers and losses


@_case
def mlp_tanh():
    """Softmax and cross-entropy of probabilities."""
    model = sequential(
        layers.Input((3,)),
        layers.Dense(4, activation="tanh"),
        layers.Dense(3, activation="softmax"),
        loss="categorical_crossentropy",
    )
    return Case(model, _numbers(6, 3), _one_hot(6, 3))


@_case
def mlp_gelu():
    """Cross-entropy of logits."""
    model = sequential(
        layers.Input((3,)),
        layers.Dense(4, activation="gelu"),
        layers.Dense(4, activation="gelu"),
        layers.Dense(3),
        loss=_cross_entropy(sparse=False),
    )
    return Case(model, _numbers(6, 3), _one_hot(6, 3))


@_case
def mlp_relu():
    """Piecewise linear: Hessian and Gauss–Newton blocks agree within a layer."""
    model = sequential(
        layers.Input((3,)),
        layers.Dense(5, activation="relu"),
        layers.Dense(4, activation="relu"),
        layers.Dense(3),
        loss=_cross_entropy(),
    )
    return Case(model, _numbers(8, 3), _labels(8, 3))


@_case
def mlp_binary():
    """Sigmoid and binary cross-entropy; activations as layers of their own."""
    model = sequential(
        layers.Input((3,)),
        layers.Dense(4),
        layers.Activation("silu"),
        layers.Dense(3, use_bias=False),
        layers.LeakyReLU(),
        layers.Dense(1, activation="sigmoid"),
        loss="binary_crossentropy",
    )
    return Case(model, _numbers(6, 3), _labels(6, 2)[:, None])


@_case
def dropout_training():
    """Training mode: a mask that is the same in each call."""
    model = sequential(
        layers.Input((3,)),
        layers.Dense(6, activation="tanh"),
        layers.Dropout(0.5, seed=3),
        layers.Dense(2),
    )
    return Case(model, _numbers(5, 3), _numbers(5, 2, seed=1), training=True)


# Convolutions


@_case
def cnn_max_pool():
    """Convolution, max-pooling, dense."""
    model = sequential(
        layers.Input((6, 6, 1)),
        layers.Conv2D(2, 3, padding="same", activation="relu"),
        layers.MaxPooling2D(),
        layers.Flatten(),
        layers.Dense(3),
        loss=_cross_entropy(),
    )
    return Case(model, _numbers(4, 6, 6, 1), _labels(4, 3))


@_case
def cnn_strides_dilation():
    """Strides, dilation, average and global pooling, one dimension causal."""
    inputs = layers.Input((7, 7, 2))
    x = layers.Conv2D(2, 3, strides=2, activation="tanh")(inputs)
    x = layers.Conv2D(2, 2, padding="same", dilation_rate=2, activation="softplus")(x)
    x = layers.AveragePooling2D(2, strides=1)(x)
    x = layers.Reshape((4, 2))(x)
    x = layers.Conv1D(2, 2, padding="causal", activation="gelu")(x)
    x = layers.GlobalAveragePooling1D()(x)
    return Case(
        functional(inputs, layers.Dense(2)(x), _cross_entropy()),
        _numbers(4, 7, 7, 2),
        _labels(4, 2),
    )


@_case
def cnn_depthwise():
    """Depthwise, separable, transposed and grouped convolution."""
    inputs = layers.Input((5, 5, 2))
    x = layers.DepthwiseConv2D(2, activation="tanh")(inputs)
    x = layers.SeparableConv2D(2, 2, activation="tanh")(x)
    x = layers.Conv2DTranspose(2, 2, strides=2, activation="tanh")(x)
    x = layers.Conv2D(2, 2, groups=2, activation="tanh")(x)
    x = layers.GlobalMaxPooling2D()(x)
    return Case(
        functional(inputs, layers.Dense(2)(x)),
        _numbers(3, 5, 5, 2),
        _numbers(3, 2, seed=1),
    )


# Normalization


@_case
def layer_norm():
    """Two blocks of dense, LayerNormalization and tanh."""
    model = sequential(
        layers.Input((3,)),
        layers.Dense(4),
        layers.LayerNormalization(),
        layers.Activation("tanh"),
        layers.Dense(4),
        layers.LayerNormalization(center=False),
        layers.Dense(2),
    )
    return Case(model, _numbers(5, 3), _numbers(5, 2, seed=1))


@_case
def group_norm():
    """Convolution and GroupNormalization."""
    model = sequential(
        layers.Input((3, 3, 1)),
        layers.Conv2D(4, 2),
        layers.GroupNormalization(2),
        layers.Activation("tanh"),
        layers.Flatten(),
        layers.Dense(2),
    )
    return Case(model, _numbers(4, 3, 3, 1), _numbers(4, 2, seed=1))


@_case
def rms_norm():
    """RMSNormalization and UnitNormalization."""
    model = sequential(
        layers.Input((3,)),
        layers.Dense(4),
        layers.RMSNormalization(),
        layers.Dense(3, activation="tanh"),
        layers.UnitNormalization(),
        layers.Dense(2),
    )
    return Case(model, _numbers(5, 3), _numbers(5, 2, seed=1))


def _batch_norm_model():
    return sequential(
        layers.Input((3,)),
        layers.Dense(4),
        layers.BatchNormalization(),
        layers.Activation("tanh"),
        layers.Dense(2),
    )


@_case
def batch_norm():
    """Inference mode: moving statistics."""
    return Case(_batch_norm_model(), _numbers(5, 3), _numbers(5, 2, seed=1))


@_case
def batch_norm_training():
    """Training mode: the statistics of the batch, samples interact."""
    return Case(
        _batch_norm_model(), _numbers(5, 3), _numbers(5, 2, seed=1), training=True
    )


# Sequences


@_case
def embedding():
    """Embedding with repeated and unused tokens: sparse gradients."""
    model = sequential(
        layers.Input((3,), dtype="int32"),
        layers.Embedding(6, 3),
        layers.Flatten(),
        layers.Dense(4, activation="tanh"),
        layers.Dense(3),
        loss=_cross_entropy(),
    )
    return Case(model, _labels((5, 3), 5, seed=0), _labels(5, 3))


@_case
def embedding_mask():
    """`mask_zero`, carried through to a masked loss over the steps."""
    model = sequential(
        layers.Input((4,), dtype="int32"),
        layers.Embedding(5, 3, mask_zero=True),
        layers.Dense(4, activation="tanh"),
        layers.Dense(3),
        loss=_cross_entropy(),
    )
    x = np.array([[1, 2, 3, 4], [2, 2, 0, 0], [4, 0, 0, 0]])
    return Case(model, x, _labels((3, 4), 3))


@_case
def transformer():
    """One pre-norm block: attention, residuals, LayerNormalization."""
    inputs = layers.Input((3,), dtype="int32")
    x = layers.Embedding(5, 4)(inputs)
    h = layers.LayerNormalization()(x)
    x = x + layers.MultiHeadAttention(2, 1)(h, h, use_causal_mask=True)
    h = layers.LayerNormalization()(x)
    h = layers.Dense(4)(layers.Dense(3, activation="gelu")(h))
    model = functional(inputs, layers.Dense(3)(x + h), _cross_entropy())
    return Case(model, _labels((3, 3), 5, seed=0), _labels((3, 3), 3))


@_case
def einsum_dense():
    """EinsumDense on sequences, with a bias over one axis."""
    model = sequential(
        layers.Input((3, 2)),
        layers.EinsumDense(
            "btd,dhe->bthe", (None, 2, 2), activation="tanh", bias_axes="he"
        ),
        layers.EinsumDense("bthe,hed->btd", (None, 3), bias_axes="d"),
        layers.Dense(2),
    )
    return Case(model, _numbers(3, 3, 2), _numbers(3, 3, 2, seed=1))


@_case
def gru_unrolled():
    """A GRU without a loop in the graph."""
    model = sequential(
        layers.Input((3, 2)), layers.GRU(2, unroll=True), layers.Dense(2)
    )
    return Case(model, _numbers(3, 3, 2), _numbers(3, 2, seed=1))


@_case
def gru_while():
    """A GRU as a while loop."""
    model = sequential(layers.Input((3, 2)), layers.GRU(2), layers.Dense(2))
    return Case(model, _numbers(3, 3, 2), _numbers(3, 2, seed=1))


@_case
def lstm_while():
    """An LSTM as a while loop, a prediction at each step."""
    model = sequential(
        layers.Input((3, 2)), layers.LSTM(2, return_sequences=True), layers.Dense(2)
    )
    return Case(model, _numbers(3, 3, 2), _numbers(3, 3, 2, seed=1))


# Shared variables


@_case
def shared_layer():
    """One layer used twice in a row."""
    inputs = layers.Input((3,))
    shared = layers.Dense(3, activation="tanh")
    outputs = layers.Dense(2)(shared(shared(inputs)))
    return Case(functional(inputs, outputs), _numbers(5, 3), _numbers(5, 2, seed=1))


@keras.saving.register_keras_serializable(package="cases")
class TiedModel(keras.Model):
    """Multiplies by the transposed embedding matrix at the end."""

    def __init__(self):
        super().__init__()
        self.embedding = layers.Embedding(5, 3)
        self.dense = layers.Dense(3, activation="tanh")

    def call(self, x):
        hidden = self.dense(self.embedding(x))
        return ops.matmul(hidden, ops.transpose(self.embedding.embeddings))


@_case
def tied_embedding():
    """One variable through two kinds of use."""
    model = TiedModel()
    model.compile(optimizer="sgd", loss=_cross_entropy())
    x = _labels((4, 2), 5, seed=0)
    model(x)
    return Case(randomize(model), x, _labels((4, 2), 5))


# Batches of other lengths than the first


class Lengths(keras.utils.PyDataset):
    """Two batches of sequences, the second one longer by a position."""

    def __len__(self):
        return 2

    def __getitem__(self, i):
        return _numbers(4, 3 + i, 2, seed=i), _numbers(4, 2, seed=1)


def of_any_length():
    """A model for `Lengths`."""
    inputs = layers.Input((None, 2))
    hidden = layers.Dense(3, activation="tanh")(inputs)
    outputs = layers.Dense(2)(layers.GlobalAveragePooling1D()(hidden))
    return functional(inputs, outputs)


# Several inputs and outputs, losses and penalties


@_case
def two_outputs():
    """Two outputs with their own losses, loss weights and metrics."""
    inputs = layers.Input((3,))
    hidden = layers.Dense(3, activation="tanh")(inputs)
    first = layers.Dense(2, name="first")(hidden)
    second = layers.Dense(3, activation="softmax", name="second")(hidden)
    model = functional(
        inputs,
        {"first": first, "second": second},
        loss={"first": "mse", "second": "sparse_categorical_crossentropy"},
        loss_weights={"first": 0.3, "second": 2.0},
        metrics={"second": ["accuracy"]},
    )
    y = {"first": _numbers(5, 2, seed=1), "second": _labels(5, 3)}
    return Case(model, _numbers(5, 3), y)


@_case
def two_inputs():
    """Two inputs through one shared layer, and a product of both."""
    a, b = layers.Input((3,), name="a"), layers.Input((3,), name="b")
    shared = layers.Dense(3, activation="tanh")
    x = layers.Concatenate()([shared(a), shared(b), layers.Multiply()([a, b])])
    model = functional({"a": a, "b": b}, layers.Dense(2)(x))
    x = {"a": _numbers(5, 3), "b": _numbers(5, 3, seed=2)}
    return Case(model, x, _numbers(5, 2, seed=1))


@_case
def sample_weights():
    """Weighted samples, one with weight zero."""
    case = mlp_gelu()
    weight = np.array([0.0, 1.0, 2.0, 0.5, 1.0, 3.0], dtype=keras.config.floatx())
    return case._replace(sample_weight=weight)


@_case
def penalties():
    """Weight and activity regularizers of all kinds."""
    model = sequential(
        layers.Input((3,)),
        layers.Dense(
            4,
            activation="tanh",
            kernel_regularizer=regularizers.L1L2(0.1, 0.2),
            bias_regularizer=regularizers.L2(0.3),
            activity_regularizer=regularizers.L2(0.1),
        ),
        layers.Dense(2, kernel_regularizer=regularizers.L1(0.1)),
        layers.ActivityRegularization(l1=0.1),
    )
    return Case(model, _numbers(5, 3), _numbers(5, 2, seed=1))


@keras.saving.register_keras_serializable(package="cases")
class VarianceLoss(layers.Layer):
    """Adds a loss that couples the samples, and a scaled identity."""

    def build(self, input_shape):
        self.scale = self.add_weight(shape=(), initializer="ones", name="scale")

    def call(self, x):
        self.add_loss(0.5 * ops.sum(ops.square(ops.mean(x, axis=0))))
        return self.scale * x


@_case
def add_loss():
    """A custom layer with a scalar variable and `add_loss`."""
    model = sequential(
        layers.Input((3,)),
        layers.Dense(3, activation="tanh"),
        VarianceLoss(),
        layers.Dense(2),
    )
    return Case(model, _numbers(5, 3), _numbers(5, 2, seed=1))


@_case
def frozen_layer():
    """A layer in the middle that is not trained."""
    model = sequential(
        layers.Input((3,)),
        layers.Dense(4, activation="tanh"),
        layers.Dense(4, activation="tanh", trainable=False),
        layers.Dense(2),
    )
    return Case(model, _numbers(5, 3), _numbers(5, 2, seed=1))


@keras.saving.register_keras_serializable(package="cases")
class SubclassedModel(keras.Model):
    """A residual model with a variable of its own."""

    def __init__(self):
        super().__init__()
        self.first = layers.Dense(3, activation="tanh")
        self.norm = layers.LayerNormalization()
        self.last = layers.Dense(2)

    def build(self, input_shape):
        self.mix = self.add_weight(shape=(3,), initializer="ones", name="mix")
        self.first.build(input_shape)
        self.norm.build(input_shape)
        self.last.build(input_shape)
        self.built = True

    def call(self, x):
        return self.last(self.norm(x + self.mix * self.first(x)))


@_case
def subclassed():
    """A subclassed model."""
    model = SubclassedModel()
    model.compile(optimizer="sgd", loss="mse")
    x = _numbers(5, 3)
    model(x)
    return Case(randomize(model), x, _numbers(5, 2, seed=1))


class Positions(layers.Layer):
    """Adds an embedding of the positions, which is computed from constants alone."""

    def __init__(self, length, **kwargs):
        super().__init__(**kwargs)
        self.length = length
        self.table = layers.Embedding(length, 2)

    def build(self, input_shape):
        self.table.build(())

    def call(self, x):
        return x + self.table(ops.arange(self.length))
