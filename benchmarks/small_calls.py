"""Processor time of one call on a small network with many variables.

Where the arithmetic is little, handing over the variables and starting operations is
what a call costs. A step of training is beside them.
"""

import time

import keras
import measure
import numpy as np
from keras import layers

import keras_curvature as kc
from keras_curvature import backend
from keras_curvature.callbacks.hand_over import hand_over

#: Numbers of Dense layers; each has two variables.
DEPTHS = (6, 80)
ROUNDS, CALLS = 7, 10


def processor_seconds(function):
    """Median over rounds of the mean processor time of a call."""
    for _ in range(3):
        function()
    seconds = []
    for _ in range(ROUNDS):
        start = time.process_time()
        for _ in range(CALLS):
            function()
        seconds.append((time.process_time() - start) / CALLS)
    return float(np.median(seconds))


def row(depth):
    """The row of a network of so many layers."""
    keras.utils.set_random_seed(0)
    stack = [layers.Dense(4, activation="tanh") for _ in range(depth)]
    model = keras.Sequential([layers.Input((4,)), *stack])
    model.compile(kc.optimizers.DiagonalNewton(1e-3), "mse")
    x = np.random.default_rng(0).standard_normal((8, 4)).astype("float32")
    model.optimizer.build(model.trainable_variables)
    op = kc.HessianOperator(model, x, x)
    v = backend.array(np.ones(op.shape[0], "float32"))
    samples = kc.layerwise.LayerwiseDiagonal(op.evaluation).samples
    key = kc.estimators.seed_key(0)
    hand_over(model, op, v)
    calls = {
        "step ms": lambda: model.train_on_batch(x, x),
        "loss ms": lambda: measure.on_host(op.loss()),
        "product ms": lambda: measure.on_host(op @ v),
        "layerwise sample ms": lambda: measure.on_host(samples(key, 0, 1)),
        "hand-over ms": lambda: hand_over(model, op, v),
        "statistics ms": model.optimizer.statistics,
    }
    return {"variables": 2 * depth} | {
        name: 1e3 * processor_seconds(function) for name, function in calls.items()
    }


def run():
    """Measures the networks; returns a list of rows."""
    return [row(depth) for depth in DEPTHS]


if __name__ == "__main__":
    results = run()
    measure.save("small_calls", results)
    measure.print_table("Processor time of small calls", results)
