"""Small trainings, most on real data, each with a fixed budget and held-out data.

Small enough that a run takes a few seconds on one core: the point is not the loss that
is reached but which rule gets there first.
"""

import dataclasses
import functools
from collections.abc import Callable

import keras
import numpy as np
from keras import layers, ops
from sklearn import datasets

TEXT = (
    "https://storage.googleapis.com/download.tensorflow.org/data/shakespeare.txt",
    "shakespeare.txt",
)


@dataclasses.dataclass(frozen=True)
class Task:
    """What is learned, on what, and for how long.

    Attributes:
        title: a few words for tables.
        build: function without arguments that returns a model.
        loss: a Keras loss.
        data: function without arguments that returns `(x, y, x_held_out, y_held_out)`.
        batch: samples per step.
        steps: the budget.
        tuning_seeds: number of runs per trial, where the loss of one says little.
    """

    title: str
    build: Callable
    loss: keras.losses.Loss
    data: Callable
    batch: int
    steps: int
    tuning_seeds: int = 1


def _split(x, y, held_out, seed=0):
    """The same random part held out in every run."""
    order = np.random.default_rng(seed).permutation(len(x))
    x, y = x[order], y[order]
    return x[held_out:], y[held_out:], x[:held_out], y[:held_out]


# Digits: 1 797 images of 8×8 pixels


def _digits(shape=(64,)):
    x, y = datasets.load_digits(return_X_y=True)
    x = (x / 16).astype("float32").reshape(-1, *shape)
    return _split(x, y.astype("int32"), 397)


def _images():
    x, _, x_held_out, _ = _digits()
    return x, x, x_held_out, x_held_out


def _autoencoder():
    """64-64-32-8-32-64-64, tanh: the classical test of second-order methods."""
    widths = (64, 32, 8, 32, 64)
    return keras.Sequential(
        [keras.Input((64,)), *[layers.Dense(w, "tanh") for w in widths]]
        + [layers.Dense(64)]
    )


def _convolutions():
    return keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            layers.Conv2D(12, 3, activation="relu", padding="same"),
            layers.Conv2D(24, 3, activation="relu", padding="same", strides=2),
            layers.Flatten(),
            layers.Dense(10),
        ]
    )


# Shakespeare: characters and words


@functools.cache
def _text():
    address, name = TEXT
    path = keras.utils.get_file(name, address)
    with open(path, encoding="utf-8") as file:
        return file.read()


@functools.cache
def _characters():
    """The text as numbers of characters, and how many there are."""
    text = _text()
    numbers = {c: i for i, c in enumerate(sorted(set(text)))}
    return np.array([numbers[c] for c in text], "int32"), len(numbers)


def _windows(length, count, held_out, every):
    """Windows of characters; what follows each (`every`: after each character)."""
    characters, _ = _characters()
    edge = int(0.9 * len(characters))
    rng = np.random.default_rng(0)
    parts = []
    for low, high, size in ((0, edge, count), (edge, len(characters), held_out)):
        starts = rng.integers(low, high - length - 1, size)
        windows = characters[starts[:, None] + np.arange(length + 1)]
        parts += [windows[:, :-1], windows[:, 1:] if every else windows[:, -1]]
    return tuple(parts)


def _window_network():
    """Ten characters in, the next one out."""
    size = _characters()[1]
    return keras.Sequential(
        [
            keras.Input((10,), dtype="int32"),
            layers.Embedding(size, 16),
            layers.Flatten(),
            layers.Dense(96, "tanh"),
            layers.Dense(size),
        ]
    )


@keras.saving.register_keras_serializable(package="benchmarks")
class _Positions(layers.Layer):
    """Adds a learned vector for each position."""

    def build(self, shape):
        self.table = self.add_weight(
            shape=shape[1:], initializer="random_normal", name="positions"
        )

    def call(self, x):
        return x + self.table


def _transformer():
    """One causal block with LayerNorm before attention and before the dense layers."""
    size, width = _characters()[1], 32
    inputs = keras.Input((16,), dtype="int32")
    x = _Positions()(layers.Embedding(size, width)(inputs))
    z = layers.LayerNormalization()(x)
    x = x + layers.MultiHeadAttention(2, width // 2)(z, z, use_causal_mask=True)
    z = layers.LayerNormalization()(x)
    x = x + layers.Dense(width)(layers.Dense(4 * width, "gelu")(z))
    return keras.Model(inputs, layers.Dense(size)(layers.LayerNormalization()(x)))


def _recurrent():
    """A GRU over twelve characters, unrolled."""
    size = _characters()[1]
    return keras.Sequential(
        [
            keras.Input((12,), dtype="int32"),
            layers.Embedding(size, 16),
            layers.GRU(48, unroll=True),
            layers.Dense(size),
        ]
    )


def _words(vocabulary):
    """The text as numbers of its most frequent words, −1 for all others."""
    words = "".join(c if c.isalpha() else " " for c in _text().lower()).split()
    names, counts = np.unique(words, return_counts=True)
    kept = names[np.argsort(-counts, kind="stable")[:vocabulary]]
    number = {name: i for i, name in enumerate(kept)}
    return np.array([number.get(word, -1) for word in words])


@functools.cache
def _pairs(vocabulary=1000, distance=5):
    """How often two words of the text are near each other: `(word, word), log count`.

    Frequencies of words are as skewed as in any text: the most frequent word is in
    hundreds of times as many pairs as the least frequent ones.
    """
    numbers, near = _words(vocabulary), []
    for shift in range(1, distance + 1):
        first, second = numbers[:-shift], numbers[shift:]
        known = (first >= 0) & (second >= 0)
        near.append(first[known] * vocabulary + second[known])
    pairs, counts = np.unique(np.concatenate(near), return_counts=True)
    pairs, counts = pairs[counts >= 2], counts[counts >= 2]
    x = np.stack([pairs // vocabulary, pairs % vocabulary], 1).astype("int32")
    return _split(x, np.log(counts).astype("float32")[:, None], 8000)


def _factorisation():
    """Log count of a pair of words ≈ product of two vectors plus two numbers."""
    inputs = keras.Input((2,), dtype="int32")
    sides = []
    for i in range(2):
        word = inputs[:, i]
        sides.append((layers.Embedding(1000, 6)(word), layers.Embedding(1000, 1)(word)))
    (u, a), (v, b) = sides
    return keras.Model(inputs, layers.Dot(1)([u, v]) + a + b)


def _three_words(vocabulary=1000):
    """Two words of the text, and the next one. A few words are most of all answers."""
    numbers = _words(vocabulary)
    triples = np.stack([numbers[:-2], numbers[1:-1], numbers[2:]], 1)
    triples = triples[np.all(triples >= 0, axis=1)].astype("int32")
    return _split(triples[:, :2], triples[:, 2], 4096)


def _next_word():
    return keras.Sequential(
        [
            keras.Input((2,), dtype="int32"),
            layers.Embedding(1000, 24),
            layers.Flatten(),
            layers.Dense(64, "tanh"),
            layers.Dense(1000),
        ]
    )


# A differential equation: −Δu = f in a square, u = 0 on its boundary


@keras.saving.register_keras_serializable(package="benchmarks")
class _WithDerivatives(layers.Layer):
    """A dense layer of `(u, u_x, u_y, Δu)` along the second axis, with tanh or not.

    Derivatives by the coordinates go forward with the values, so that the loss is an
    ordinary function of the weights.
    """

    def __init__(self, units, activation=True, **kwargs):
        super().__init__(**kwargs)
        self.dense = layers.Dense(units, use_bias=False)
        self.activation = activation

    def build(self, shape):
        self.dense.build(shape)
        self.bias = self.add_weight((self.dense.units,), "zeros", name="bias")

    def call(self, x):
        z = self.dense(x)
        value, first, laplacian = z[:, :1] + self.bias, z[:, 1:3], z[:, 3:]
        if self.activation:
            value = ops.tanh(value)
            slope = 1 - ops.square(value)
            squares = ops.sum(ops.square(first), axis=1, keepdims=True)
            laplacian = slope * laplacian - 2 * value * slope * squares
            first = slope * first
        return ops.concatenate([value, first, laplacian], axis=1)


def _poisson_network():
    """The residual inside, ten times the value on the boundary: both shall be zero."""
    inputs = keras.Input((4,))  # Coordinates, f, and 1 on the boundary.
    point, f, boundary = inputs[:, :2], inputs[:, 2:3], inputs[:, 3:]
    one, zero = ops.ones_like(f), ops.zeros_like(f)
    along = [ops.concatenate(pair, axis=1) for pair in ((one, zero), (zero, one))]
    x = ops.stack([point, *along, ops.zeros_like(point)], axis=1)
    for _ in range(3):
        x = _WithDerivatives(32)(x)
    x = _WithDerivatives(1, activation=False)(x)
    value, laplacian = x[:, 0], x[:, 3]
    return keras.Model(inputs, boundary * 10 * value + (1 - boundary) * (laplacian + f))


def _poisson(count=4000, held_out=1000):
    """Random points of the square, a fifth of them on its boundary."""
    rng = np.random.default_rng(0)
    points = rng.random((count + held_out, 2))
    boundary = rng.random(len(points)) < 0.2
    side = rng.integers(2, size=len(points))
    points[boundary, side[boundary]] = rng.integers(2, size=boundary.sum())
    # u = sin(πx) sin(2πy)
    f = 5 * np.pi**2 * np.sin(np.pi * points[:, 0]) * np.sin(2 * np.pi * points[:, 1])
    x = np.column_stack([points, np.where(boundary, 0, f), boundary]).astype("float32")
    y = np.zeros((len(x), 1), "float32")
    return x[held_out:], y[held_out:], x[:held_out], y[:held_out]


# The value of the states of a pendulum under a simple rule


def _pendulum(count=6000, held_out=1500):
    """States, the next states, and rewards of a pendulum that is swung up by hand."""
    rng = np.random.default_rng(0)
    angle, speed = rng.uniform(-np.pi, np.pi, 200), rng.uniform(-4, 4, 200)
    rows, rewards = [], []
    while len(rows) * 200 < count + held_out:
        now = np.stack([np.cos(angle), np.sin(angle), speed / 4], 1)
        # Energy is pumped in, with noise: torque along the motion.
        torque = 2 * np.sign(speed) * (np.cos(angle) < 0.9) + rng.normal(0, 0.5, 200)
        rewards.append(-(angle**2) - 0.1 * speed**2 - 0.001 * torque**2)
        speed = np.clip(speed + 0.05 * (15 * np.sin(angle) + 3 * torque), -8, 8)
        angle = (angle + 0.05 * speed + np.pi) % (2 * np.pi) - np.pi
        after = np.stack([np.cos(angle), np.sin(angle), speed / 4], 1)
        rows.append(np.concatenate([now, after], 1))
    x = np.concatenate(rows).astype("float32")
    y = 0.1 * np.concatenate(rewards).astype("float32")[:, None]
    return _split(x, y, held_out)


def _value_network():
    """Difference of the values now and after, which is the reward: `V − 0.95 V'`.

    The value after is a target and not differentiated.
    """
    inputs = keras.Input((6,))
    value = keras.Sequential(
        [
            keras.Input((3,)),
            layers.Dense(64, "relu"),
            layers.Dense(64, "relu"),
            layers.Dense(1),
        ]
    )
    target = ops.stop_gradient(value(inputs[:, 3:]))
    return keras.Model(inputs, value(inputs[:, :3]) - 0.95 * target)


# Minutes and not seconds: images with BatchNormalization


def _large_digits():
    """The digits, twice as large on each side."""
    x, y, x_held_out, y_held_out = _digits((8, 8, 1))
    large = [ops.image.resize(images, (16, 16)) for images in (x, x_held_out)]
    x, x_held_out = (ops.convert_to_numpy(images) for images in large)
    return x, y, x_held_out, y_held_out


def _residual_network(widths=(16, 32, 64)):
    """Three stages of two blocks each, as ResNets have them."""
    inputs = keras.Input((16, 16, 1))

    def normalized(x, width, strides=1):
        x = layers.Conv2D(width, 3, strides, padding="same", use_bias=False)(x)
        # With Keras' momentum the averages would be what is compared: they lag behind
        # by a hundred steps of four hundred.
        return layers.BatchNormalization(momentum=0.9)(x)

    x = layers.ReLU()(normalized(inputs, widths[0]))
    for width in widths:
        for block in range(2):
            strides = 2 if block == 0 and width != widths[0] else 1
            z = layers.ReLU()(normalized(x, width, strides))
            z = normalized(z, width)
            if strides > 1:
                x = layers.Conv2D(width, 1, strides, use_bias=False)(x)
            x = layers.ReLU()(x + z)
    return keras.Model(inputs, layers.Dense(10)(layers.GlobalAveragePooling2D()(x)))


# Linear models


def _diabetes():
    """Ten features in units that differ by up to six decades, 442 patients."""
    x, y = datasets.load_diabetes(return_X_y=True)
    x = x / x.std(0) * np.logspace(-3, 3, 10)[np.random.default_rng(0).permutation(10)]
    y = (y - y.mean()) / y.std()
    return _split(x.astype("float32"), y.astype("float32")[:, None], 142)


def _cancer():
    """Thirty features in the units they come in, 569 patients."""
    x, y = datasets.load_breast_cancer(return_X_y=True)
    x = (x - x.mean(0)).astype("float32")
    return _split(x, y.astype("float32")[:, None], 169)


def _linear(features):
    return keras.Sequential(
        [keras.Input((features,)), layers.Dense(1, kernel_initializer="zeros")]
    )


_CLASSES = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
_BINARY = keras.losses.BinaryCrossentropy(from_logits=True)
_SQUARES = keras.losses.MeanSquaredError()

#: By name. Letters order them in tables.
TASKS = {
    "autoencoder": Task("deep autoencoder", _autoencoder, _BINARY, _images, 128, 1000),
    "cnn": Task(
        "convolutional classifier",
        _convolutions,
        _CLASSES,
        lambda: _digits((8, 8, 1)),
        64,
        400,
        tuning_seeds=3,
    ),
    "window": Task(
        "character model, windowed MLP",
        _window_network,
        _CLASSES,
        lambda: _windows(10, 200_000, 4096, False),
        128,
        1000,
    ),
    "transformer": Task(
        "character model, transformer",
        _transformer,
        _CLASSES,
        lambda: _windows(16, 100_000, 512, True),
        16,
        600,
    ),
    "gru": Task(
        "character model, GRU",
        _recurrent,
        _CLASSES,
        lambda: _windows(12, 200_000, 2048, False),
        64,
        500,
    ),
    "regression": Task(
        "badly scaled regression",
        lambda: _linear(10),
        _SQUARES,
        _diabetes,
        64,
        400,
    ),
    "logistic": Task(
        "logistic regression", lambda: _linear(30), _BINARY, _cancer, 64, 400
    ),
    "factorisation": Task(
        "word-pair factorisation", _factorisation, _SQUARES, _pairs, 512, 800
    ),
    "full_batch": Task(
        "deep autoencoder, full batch", _autoencoder, _BINARY, _images, 1400, 400
    ),
    "next_word": Task(
        "next word, Zipf's law", _next_word, _CLASSES, _three_words, 128, 800
    ),
    "poisson": Task(
        "Poisson equation", _poisson_network, _SQUARES, _poisson, 256, 1000
    ),
    "value": Task(
        "values of a pendulum", _value_network, _SQUARES, _pendulum, 128, 800
    ),
    "residual": Task(
        "residual network, BatchNormalization",
        _residual_network,
        _CLASSES,
        _large_digits,
        64,
        400,
    ),
}

#: Two of the tasks with batches of several sizes, up to that of all their
#: data; what the task has itself keeps its name.
SWEPT = {
    name if batch == TASKS[name].batch else f"{name}_{batch}": dataclasses.replace(
        TASKS[name], title=f"{TASKS[name].title}, batches of {batch}", batch=batch
    )
    for name, batches in (
        ("autoencoder", (32, 128, 512, 1400)),
        ("value", (32, 128, 1024, 6000)),
    )
    for batch in batches
}

EVERY = SWEPT | TASKS
