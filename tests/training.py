"""A small training, for tests of callbacks: 40 samples in ten batches an epoch."""

import keras
import numpy as np
import pytest
from keras import layers

import keras_curvature as kc

ON_TENSORFLOW = keras.backend.backend() == "tensorflow"
ON_JAX = keras.backend.backend() == "jax"
ON_TORCH = keras.backend.backend() == "torch"

#: Mark for what only some frameworks have.
only_tensorflow = pytest.mark.skipif(not ON_TENSORFLOW, reason="TensorFlow's own")
several_steps = pytest.mark.skipif(
    ON_TORCH, reason="On PyTorch, Keras knows no more than one step in an execution."
)

BATCH = 4
BATCHES = 10

#: Arguments of the cheapest monitor there is.
CHEAP = {
    "diagonal": None,
    "num_matvecs": 1,
    "preconditioned": False,
    "gradients": False,
}


def data(samples=BATCH * BATCHES, seed=0):
    """Three features and three classes that follow from them."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((samples, 3)).astype("float32")
    return x, (x @ rng.standard_normal((3, 3))).argmax(axis=1)


def network(
    *stack, optimizer="sgd", built=True, activation="relu", **compile_arguments
):
    """A compiled classifier with 31 weights, or of given layers; always the same."""
    keras.utils.set_random_seed(0)
    stack = stack or (layers.Dense(4, activation, name="hidden"), layers.Dense(3))
    model = keras.Sequential([layers.Input((3,))] * built + list(stack))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(**{"optimizer": optimizer, "loss": loss} | compile_arguments)
    return model


def monitor(**arguments):
    """A cheap monitor on the first half of the data."""
    x, y = data()
    arguments = {"probe_data": (x[:20], y[:20]), "update_freq": 4} | CHEAP | arguments
    return kc.CurvatureMonitor(**arguments)


def fit(model, *callbacks, **arguments):
    """Trains without noise; returns the history."""
    x, y = data()
    arguments = {"batch_size": BATCH, "shuffle": False, "verbose": 0} | arguments
    return model.fit(x, y, callbacks=list(callbacks), **arguments).history


def steps(callback):
    """The steps at which a monitor probed."""
    return [record["step"] for record in callback.history]


def state(model):
    """All numbers of a model and its optimizer."""
    return [
        keras.ops.convert_to_numpy(v)
        for v in model.variables + model.optimizer.variables
    ]


def told(caught):
    """The messages among recorded warnings; NumPy also deprecates what Keras does."""
    return [str(w.message) for w in caught if w.category is UserWarning]


def assert_same(first, second):
    """Equal bit for bit."""
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a, b)
