"""Prune a network by its diagonal: Optimal Brain Damage against magnitudes.

What you learn: which weights a network can do without. The usual choice takes the
smallest weights; but a small weight on a stiff direction matters more than a large one
on a flat direction. A Taylor expansion of the loss at a minimum, where the gradient is
zero, tells what setting one weight to zero costs (LeCun, Denker, Solla 1989).
The picture is that of small changes: with nine weights in ten gone, it no longer holds.

    L(θ + δ) − L(θ) ≈ ½ Σᵢ hᵢ δᵢ²          δᵢ = −θᵢ   ⟹   sᵢ = hᵢ θᵢ² / 2

| symbol | meaning |
|---|---|
| θ, δ | weights of the trained network, a change of them |
| L | loss on the training data |
| h | diagonal of the Hessian of L, here exact |
| s | saliency: the smallest ones are pruned first |
| abs θ | magnitude, the other order of pruning |

Usage:

    python examples/pruning.py              # trains, prunes and prints
    python examples/pruning.py --picture    # draws the curves as well
"""

import keras
import numpy as np
import pictures
from sklearn.datasets import load_digits

import keras_curvature as kc

#: Shares of the kernels' weights that are pruned.
SHARES = (0, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


def load_data():
    """Digits from 0 to 1: 1,437 to train on and 360 to test."""
    x, y = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(x))
    x, y = x[order].astype("float32") / 16, y[order]
    return (x[:1437], y[:1437]), (x[1437:], y[1437:])


def train(x, y):
    """A network of two hidden layers, trained until its gradient is small."""
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.layers.Input((64,)),
            keras.layers.Dense(48, "relu", name="hidden1"),
            keras.layers.Dense(48, "relu", name="hidden2"),
            keras.layers.Dense(10, name="logits"),
        ]
    )
    model.compile(
        keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(0.01, 900)),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    model.fit(x, y, batch_size=64, epochs=40, verbose=0)
    return model


def prune(model, scores, share):
    """Sets the share of all kernels' weights with the lowest scores to zero."""
    limit = np.quantile(np.concatenate([s.ravel() for s in scores]), share)
    for kernel, score in zip(kernels(model), scores, strict=True):
        kernel.assign(np.where(score <= limit, 0, kernel.numpy()) if share else kernel)


def kernels(model):
    """What is pruned: all but the biases."""
    return [v for v in model.trainable_variables if v.name == "kernel"]


def losses_after_pruning(model, scores, data):
    """Loss and accuracy for each share, with the weights put back at the end."""
    weights = model.get_weights()
    results = []
    for share in SHARES:
        prune(model, scores, share)
        results.append(model.evaluate(*data, batch_size=2048, verbose=0))
        model.set_weights(weights)
    return np.array(results)


def draw(results, path):
    """Loss and accuracy against the share that was pruned."""
    from keras_curvature import plots

    figure, axes = pictures.new(1, 2, (10, 3.6))
    for (name, values), color in zip(
        results.items(), (plots.BLUE, plots.ORANGE), strict=True
    ):
        for axis, column in zip(axes, values.T, strict=True):
            axis.plot(SHARES, column, "o-", color=color, label=name, markersize=4)
    axes[0].set_yscale("log")
    pictures.dress(axes[0], "Loss on the test data", "share of weights pruned")
    pictures.dress(axes[1], "Accuracy on the test data", "share of weights pruned")
    pictures.save(figure, path)


def main():
    """Trains once, prunes both ways, prints what is left."""
    arguments = pictures.arguments(__doc__, "pruning")
    (x, y), test = load_data()
    model = train(x, y)
    diagonal = kc.hessian_diagonal(
        model, x, y, method="exact", variables=kernels(model)
    )
    print(
        f"  exact diagonal of {sum(h.size for h in diagonal.value):,} weights from "
        f"{diagonal.num_matvecs} products"
    )
    magnitudes = [np.abs(kernel.numpy()) for kernel in kernels(model)]
    saliencies = [h * m**2 / 2 for h, m in zip(diagonal.value, magnitudes, strict=True)]
    results = {
        "saliency h θ² / 2": losses_after_pruning(model, saliencies, test),
        "magnitude |θ|": losses_after_pruning(model, magnitudes, test),
    }
    by_saliency, by_magnitude = results.values()
    print("\n  test loss and accuracy   by saliency        by magnitude")
    for share, one, other in zip(SHARES, by_saliency, by_magnitude, strict=True):
        print(
            f"  {share:>12.0%} pruned{one[0]:>14.3f}{one[1]:>7.1%}"
            f"{other[0]:>14.3f}{other[1]:>7.1%}"
        )
    if arguments.picture:
        draw(results, arguments.picture)


if __name__ == "__main__":
    main()
