"""How wrong sampled diagonals are under BatchNormalization with batch statistics.

The relative error ‖estimate − exact‖ / ‖exact‖ (root mean square over repetitions) of
the shrunk diagonal, which is the default, of samples at the layers' outputs, of random
signs on the parameters and of a dominant subspace, of the whole diagonal and of each
variable. A sample of any takes one product, or what counts as one; what it costs in
gradients is measured in the same run.
"""

import keras
import measure
import networks
import numpy as np
from diagonals import estimate
from keras import layers

from keras_curvature import HessianOperator

REPETITIONS = {1: 32, 4: 8, 16: 4}
METHODS = ("shrunk", "layerwise", "hutchinson", "deflated")


def _normalized(x, layer):
    return layers.ReLU()(layers.BatchNormalization()(layer(x)))


def mlp(width=48):
    """64-width-width-10."""
    inputs = keras.Input((64,))
    x = inputs
    for _ in range(2):
        x = _normalized(x, layers.Dense(width, use_bias=False))
    return keras.Model(inputs, layers.Dense(10)(x))


def cnn():
    """Three convolutions, pooling after the first and at the end."""
    inputs = keras.Input((64,))
    x = layers.Reshape((8, 8, 1))(inputs)
    for filters in (8, 16, 16):
        x = _normalized(x, layers.Conv2D(filters, 3, padding="same", use_bias=False))
        if filters == 8:
            x = layers.MaxPooling2D()(x)
    x = layers.GlobalAveragePooling2D()(x)
    return keras.Model(inputs, layers.Dense(10)(x))


def residual():
    """A convolution and three blocks of two, the second with stride two."""
    inputs = keras.Input((64,))
    x = layers.Reshape((8, 8, 1))(inputs)
    x = _normalized(x, layers.Conv2D(8, 3, padding="same", use_bias=False))
    for filters, strides in ((8, 1), (16, 2), (16, 1)):
        h = layers.Conv2D(filters, 3, strides, padding="same", use_bias=False)
        h = layers.Conv2D(filters, 3, padding="same", use_bias=False)(_normalized(x, h))
        if strides > 1:
            x = layers.Conv2D(filters, 1, strides, use_bias=False)(x)
            x = layers.BatchNormalization()(x)
        x = layers.ReLU()(x + layers.BatchNormalization()(h))
    x = layers.GlobalAveragePooling2D()(x)
    return keras.Model(inputs, layers.Dense(10)(x))


BUILDERS = {"MLP": mlp, "CNN": cnn, "residual CNN": residual}


def run(names=tuple(BUILDERS), samples=128, epochs=2):
    """Measures the networks; returns a list of rows."""
    rows = []
    for name in names:
        network = networks.fitted(name, BUILDERS[name], samples, epochs)
        op = HessianOperator(network.model, network.x, network.y)
        truth = _diagonal(op, "exact", None)
        timed = {"gradient": lambda op=op: measure.on_host(op.value_and_gradient()[1])}
        timed |= {
            (method, count): lambda op=op, m=method, c=count: _diagonal(op, m, c)
            for method in METHODS
            for count in REPETITIONS
            if count > 1 or method != "deflated"
        }
        seconds = measure.median_seconds(timed, rounds=5)
        gradient = seconds.pop("gradient")
        for method, count in seconds:
            squares = np.mean(
                [
                    (_diagonal(op, method, count, seed) - truth) ** 2
                    for seed in range(1, REPETITIONS[count] + 1)
                ],
                axis=0,
            )
            for variable, part in _parts(op):
                error = np.sqrt(squares[part].sum()) / np.linalg.norm(truth[part])
                rows.append(
                    {
                        "network": name,
                        "variable": variable,
                        "estimator": method,
                        "samples": count,
                        "gradients": seconds[method, count] / gradient,
                        "relative error": float(error),
                    }
                )
        print(f"{name} done", flush=True)
    return rows


def _parts(op):
    """The whole diagonal, and the part of each variable."""
    yield "all", slice(None)
    ends = np.cumsum(op.sizes)
    for number, (variable, end) in enumerate(zip(op.variables, ends, strict=True)):
        yield f"{number} {variable.name}", slice(end - op.sizes[number], end)


def _diagonal(op, method, samples, seed=0):
    return estimate(op, method, samples, seed, control_variate=False)[0]


if __name__ == "__main__":
    results = run()
    measure.save("batch_normalization", results)
    whole = [row for row in results if row["variable"] == "all"]
    measure.print_table("Error of the diagonal under BatchNormalization", whole)
