"""Find out which layer tolerates rounding, from the diagonal of the Hessian.

What you learn: how much the loss rises when the weights of one layer are stored in few
bits, before trying it. Rounding errors that are zero on average and independent of each
other leave of the loss's Taylor expansion only the diagonal; so the prediction is exact
for small errors, and one diagonal predicts every layer at every number of bits.

    E[L(θ + δ)] − L(θ) ≈ ½ Σᵢ hᵢ E[δᵢ²]        E[δᵢ²] = (θᵢ − a)(b − θᵢ)

| symbol | meaning |
|---|---|
| θ, L | weights of the trained network, loss on the training data |
| h | diagonal of the Hessian of L, here exact |
| a, b | the two values on the grid on either side of θᵢ |
| δ | error of rounding to a or b at random, so that its mean is zero |
| E | mean over ways to round, 32 of them where it is measured |

Usage:

    python examples/quantisation.py              # trains, rounds and prints
    python examples/quantisation.py --picture    # draws the comparison as well
"""

import keras
import numpy as np
import pictures
from sklearn.datasets import load_digits

import keras_curvature as kc

BITS = (3, 4, 5, 6)
ROUNDINGS = 32


def train():
    """A small convolutional network, and the data it was trained on."""
    x, y = load_digits(return_X_y=True)
    x = x.reshape(-1, 8, 8, 1).astype("float32") / 16
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.layers.Input((8, 8, 1)),
            keras.layers.Conv2D(16, 3, padding="same", activation="relu", name="conv1"),
            keras.layers.MaxPooling2D(),
            keras.layers.Conv2D(32, 3, padding="same", activation="relu", name="conv2"),
            keras.layers.Flatten(),
            keras.layers.Dense(32, "relu", name="hidden"),
            keras.layers.Dense(10, name="logits"),
        ]
    )
    model.compile(
        keras.optimizers.Adam(0.003),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    model.fit(x, y, batch_size=64, epochs=8, verbose=0)
    return model, x, y


def grid(weights, bits):
    """The values below each weight that `bits` bits can hold, and their distance."""
    largest = np.abs(weights).max()
    distance = 2 * largest / (2**bits - 1)
    below = -largest + distance * np.floor((weights + largest) / distance)
    return below, distance


def predicted_increase(weights, diagonal, bits):
    """½ Σ h E[δ²]."""
    below, distance = grid(weights, bits)
    return np.sum(diagonal * (weights - below) * (below + distance - weights)) / 2


def measured_increase(operator, i, bits):
    """The mean increase of the loss over some ways to round the i-th kernel.

    The gradient's part of it, gᵀδ, is zero on average, and much of the noise that a
    few ways to round leave. It is known, so it is taken off.
    """
    kernel = operator.variables[i]
    weights = kernel.numpy()
    below, distance = grid(weights, bits)
    loss, gradient = operator.value_and_gradient()
    slope = keras.ops.convert_to_numpy(operator.split(gradient)[i])
    generator = np.random.default_rng(0)
    increases = []
    for _ in range(ROUNDINGS):
        up = generator.random(weights.shape) < (weights - below) / distance
        rounded = below + distance * up
        kernel.assign(rounded)
        first_order = np.sum(slope * (rounded - weights))
        increases.append(float(operator.loss()) - float(loss) - first_order)
    kernel.assign(weights)
    return np.mean(increases)


def draw(results, path):
    """Increase by layer and bits, and prediction against measurement."""
    from keras_curvature import plots

    figure, (curves, scatter) = pictures.new(1, 2, (10, 3.8))
    colors = (plots.BLUE, plots.ORANGE, plots.GREEN, plots.GREY)
    for (name, values), color in zip(results.items(), colors, strict=True):
        predicted, measured = np.transpose(values)
        curves.plot(BITS, predicted, "--", color=color)
        curves.plot(BITS, measured, "o-", color=color, label=name, markersize=4)
        scatter.loglog(predicted, measured, "o", color=color, label=name, markersize=5)
    limits = np.array(scatter.get_xlim())
    scatter.plot(limits, limits, color="black", linewidth=1, label="equal")
    curves.set_yscale("log")
    curves.set_xticks(BITS)
    pictures.dress(
        curves, "Increase of the loss: measured, predicted (dashed)", "bits per weight"
    )
    pictures.dress(
        scatter, "Each layer at each number of bits", "predicted", "measured"
    )
    pictures.save(figure, path)


def main():
    """Trains, predicts, measures; prints both by layer and number of bits."""
    arguments = pictures.arguments(__doc__, "quantisation")
    model, x, y = train()
    kernels = [v for v in model.trainable_variables if v.name == "kernel"]
    operator = kc.HessianOperator(model, x, y, variables=kernels)
    diagonal = kc.hessian_diagonal(operator, method="exact")
    results = {}
    print("  increase of the loss, predicted / measured, with so many bits per weight")
    print(f"  {'layer':<8}" + "".join(f"{bits:>20}" for bits in BITS))
    for i, (kernel, h) in enumerate(zip(kernels, diagonal.value, strict=True)):
        name = kernel.path.split("/")[-2]
        results[name] = [
            (
                predicted_increase(kernel.numpy(), h, bits),
                measured_increase(operator, i, bits),
            )
            for bits in BITS
        ]
        pairs = "".join(f"{p:>10.5f} /{m:>8.5f}" for p, m in results[name])
        print(f"  {name:<8}{pairs}", flush=True)
    pairs = np.concatenate(list(results.values()))
    pairs = pairs[(pairs > 0).all(1)]
    correlation = np.corrcoef(np.log(pairs.T))[0, 1]
    print(f"\n  correlation of logarithms: {correlation:.3f}")
    if arguments.picture:
        draw(results, arguments.picture)


if __name__ == "__main__":
    main()
