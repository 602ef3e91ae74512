"""Eight small trainings on real data, each with a fixed budget and held-out data.

Small enough that a run takes a few seconds on one core: the point is not the loss that
is reached but which rule gets there first.
"""

import dataclasses
import functools
from collections.abc import Callable

import keras
import numpy as np
from keras import layers
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


@functools.cache
def _pairs(vocabulary=1000, distance=5):
    """How often two words of the text are near each other: `(word, word), log count`.

    Frequencies of words are as skewed as in any text: the most frequent word is in
    hundreds of times as many pairs as the least frequent ones.
    """
    words = "".join(c if c.isalpha() else " " for c in _text().lower()).split()
    names, counts = np.unique(words, return_counts=True)
    kept = names[np.argsort(-counts, kind="stable")[:vocabulary]]
    number = {name: i for i, name in enumerate(kept)}
    numbers = np.array([number.get(word, -1) for word in words])
    near = []
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
}
