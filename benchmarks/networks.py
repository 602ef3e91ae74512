"""The networks that all benchmarks measure: small, real, trained for a while.

All are trained on scikit-learn's digits (1 797 images of 8×8 pixels), so that nothing
has to be downloaded and the dense Hessian is within reach.
"""

import dataclasses
from typing import Any

import keras
import numpy as np
from keras import layers
from sklearn.datasets import load_digits


@dataclasses.dataclass(frozen=True)
class Network:
    """A trained model and the batch that it is probed on."""

    name: str
    model: Any
    x: np.ndarray
    y: np.ndarray


def mlp(activation, width=128):
    """64-width-width-10."""
    return keras.Sequential(
        [
            keras.Input((64,)),
            layers.Dense(width, activation),
            layers.Dense(width, activation),
            layers.Dense(10),
        ]
    )


def cnn():
    """Two convolutions with pooling between them, relu, and a dense layer."""
    return keras.Sequential(
        [
            keras.Input((64,)),
            layers.Reshape((8, 8, 1)),
            layers.Conv2D(8, 3, activation="relu", padding="same"),
            layers.MaxPooling2D(),
            layers.Conv2D(16, 3, activation="relu", padding="same"),
            layers.Flatten(),
            layers.Dense(10),
        ]
    )


def gelu_cnn():
    """Two convolutions and global pooling, gelu."""
    return keras.Sequential(
        [
            keras.Input((64,)),
            layers.Reshape((8, 8, 1)),
            layers.Conv2D(8, 3, activation="gelu", padding="same"),
            layers.Conv2D(16, 3, strides=2, activation="gelu", padding="same"),
            layers.GlobalAveragePooling2D(),
            layers.Dense(10),
        ]
    )


def transformer(width=16, blocks=2):
    """The rows of an image as eight tokens; LayerNorm, attention, gelu."""
    inputs = keras.Input((64,))
    h = layers.Reshape((8, 8))(inputs)
    h = layers.Dense(width)(h)
    positions = layers.Embedding(8, width)(np.arange(8)[None])
    h = h + positions
    for _ in range(blocks):
        a = layers.LayerNormalization()(h)
        h = h + layers.MultiHeadAttention(2, width // 2)(a, a)
        f = layers.Dense(2 * width, "gelu")(layers.LayerNormalization()(h))
        h = h + layers.Dense(width)(f)
    h = layers.GlobalAveragePooling1D()(layers.LayerNormalization()(h))
    return keras.Model(inputs, layers.Dense(10)(h))


BUILDERS = {
    "MLP tanh": (lambda: mlp("tanh"), 256),
    "MLP relu": (lambda: mlp("relu"), 256),
    "CNN relu": (cnn, 128),
    "CNN gelu": (gelu_cnn, 128),
    "transformer": (transformer, 64),
}


def digits():
    """Images as rows of 64 numbers in [0, 1], and their labels."""
    data = load_digits()
    return (data.data / 16).astype("float32"), data.target


def million():
    """An untrained tanh MLP with about a million parameters."""
    keras.utils.set_random_seed(0)
    x, y = digits()
    model = mlp("tanh", width=930)
    model.compile(loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    return Network("MLP tanh, 1M", model, x[:256], y[:256])


def trained(name, epochs=5, seed=0):
    """The network of a name in `BUILDERS`, after some epochs of Adam."""
    return fitted(name, *BUILDERS[name], epochs, seed)


def fitted(name, build, samples, epochs=5, seed=0):
    """A `Network` after some epochs of Adam.

    Args:
        name: what to call it.
        build: makes the model.
        samples: size of the batch that it is probed on.
        epochs: number of epochs.
        seed: seed of weights and batches.
    """
    keras.utils.set_random_seed(seed)
    x, y = digits()
    model = build()
    model.compile(
        "adam", loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    )
    model.fit(x, y, epochs=epochs, batch_size=32, verbose=0)
    return Network(name, model, x[:samples], y[:samples])
