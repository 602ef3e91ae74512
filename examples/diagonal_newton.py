"""Swap in `DiagonalNewton`, and compare it with AdamW by steps and by seconds.

What you learn: how to use the optimizer (compile with it, and give `fit` a feed, which
hands it the diagonal of the Hessian), and how to judge it. Curvature makes a step
dearer, so the loss is drawn against both. The model is a logistic regression on thirty
measurements of cells in the units they come in, from thousandths to thousands: there
the diagonal of the Hessian knows what a learning rate cannot. Where all units are
alike the gain is smaller; docs/optimizer.md has the figures of eight tasks.
Each optimizer has two learning rates; the better one is drawn boldly.

    AdamW            θ ← θ − η (m̂ / (√v̂ + ε) + w θ)
    DiagonalNewton   θ ← θ − η clip(u, ±√v̂) / (|ĥ| + √v̂ / r),   r = √(ρ² + τ² θ²)

| symbol | meaning |
|---|---|
| θ, η | weights, learning rate |
| m̂, v̂ | averages of gradients and of their squares |
| ε, w | AdamW's small number, its weight decay |
| u | mean of the gradient and m̂ |
| ĥ | average of the diagonals of the Hessian that the feed measures |
| r | trust radius: beyond it, Newton's step gives way to Adam's |
| ρ, τ | what the radius is made of |

Usage:

    python examples/diagonal_newton.py              # trains four times and prints
    python examples/diagonal_newton.py --picture    # draws the losses as well
"""

import time

import keras
import numpy as np
import pictures
from sklearn.datasets import load_breast_cancer

import keras_curvature as kc

EPOCHS = 40
OPTIMIZERS = {
    "AdamW": (keras.optimizers.AdamW, (0.03, 0.1)),
    "DiagonalNewton": (kc.DiagonalNewton, (0.2, 0.6)),
}


class Clock(keras.callbacks.Callback):
    """Notes steps, seconds and training loss after each epoch.

    The seconds are those of `fit` with all its compilation and probes, but without
    the evaluations made here.
    """

    def __init__(self, x, y):
        super().__init__()
        self.data = x, y
        self.records = []

    def on_train_begin(self, logs=None):
        """Starts the clock."""
        self.seconds, self.started = 0.0, time.perf_counter()

    def on_epoch_end(self, epoch, logs=None):
        """Stops it for an evaluation, every four epochs."""
        if epoch % 4 != 3:
            return
        self.seconds += time.perf_counter() - self.started
        loss = self.model.evaluate(*self.data, batch_size=2048, verbose=0)
        steps = int(self.model.optimizer.iterations)
        self.records.append((steps, self.seconds, loss))
        self.started = time.perf_counter()


def train(x, y, optimizer):
    """Trains a model from the same weights each time; returns steps, time, loss."""
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [keras.layers.Input((30,)), keras.layers.Dense(1, kernel_initializer="zeros")]
    )
    model.compile(optimizer, loss=keras.losses.BinaryCrossentropy(from_logits=True))
    callbacks = [Clock(x, y)]
    if isinstance(optimizer, kc.DiagonalNewton):
        # All that is needed: the feed finds the optimizer by itself.
        callbacks.append(kc.CurvatureFeed((x, y)))
    model.fit(x, y, batch_size=64, epochs=EPOCHS, callbacks=callbacks, verbose=0)
    return np.array(callbacks[0].records)


def draw(runs, path):
    """The loss against steps and against seconds."""
    from keras_curvature import plots

    figure, axes = pictures.new(1, 2, (10, 3.6))
    colors = dict(zip(OPTIMIZERS, (plots.ORANGE, plots.BLUE), strict=True))
    for column, (axis, unit) in enumerate(zip(axes, ("steps", "seconds"), strict=True)):
        for (name, rate), run in runs.items():
            chosen = rate == best(runs, name)
            axis.plot(
                run[:, column],
                run[:, 2],
                color=colors[name],
                alpha=1 if chosen else 0.25,
                label=f"{name}, η = {rate}" if chosen else None,
            )
        axis.set_yscale("log")
        pictures.dress(axis, f"Loss on the training data against {unit}", unit)
    pictures.save(figure, path)


def best(runs, name):
    """The learning rate with which an optimizer ends at the lowest loss."""
    rates = [rate for other, rate in runs if other == name]
    return min(rates, key=lambda rate: runs[name, rate][-1, 2])


def main():
    """Trains with both optimizers; prints what each learning rate led to."""
    arguments = pictures.arguments(__doc__, "diagonal_newton")
    x, y = load_breast_cancer(return_X_y=True)
    x = (x - x.mean(axis=0)).astype("float32")
    runs = {}
    print(f"  {'optimizer':<18}{'η':<8}{'steps':>6}{'seconds':>9}{'training loss':>16}")
    for name, (optimizer, rates) in OPTIMIZERS.items():
        for rate in rates:
            runs[name, rate] = run = train(x, y, optimizer(rate))
            steps, seconds, loss = run[-1]
            print(
                f"  {name:<18}{rate:<8}{steps:>6.0f}{seconds:>9.1f}{loss:>16.5f}",
                flush=True,
            )
    if arguments.picture:
        draw(runs, arguments.picture)


if __name__ == "__main__":
    main()
