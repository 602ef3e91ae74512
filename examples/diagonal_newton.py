"""Swap in `DiagonalNewton`, and compare it with AdamW by steps and by seconds.

What you learn: how to use the optimizer (compile with it, and give `fit` a feed, which
hands it the diagonal of the Hessian), and how to judge it. Curvature makes a step
dearer, so the loss is drawn against both. The model is a logistic regression on thirty
measurements of cells in the units they come in, from thousandths to thousands: there
the diagonal of the Hessian knows what a learning rate cannot. Who standardises the
features has given AdamW that knowledge beforehand: it then gets as low as
DiagonalNewton, and in less time. docs/optimizer.md has the figures of many tasks.
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

    python examples/diagonal_newton.py              # trains eight times and prints
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
UNITS = {
    "as measured": lambda x: (x - x.mean(axis=0)).astype("float32"),
    "standardised": lambda x: ((x - x.mean(0)) / x.std(0)).astype("float32"),
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
    """The loss against steps and against seconds, in either kind of units."""
    from keras_curvature import plots

    figure, axes = pictures.new(2, 2, (10, 6.4))
    colors = dict(zip(OPTIMIZERS, (plots.ORANGE, plots.BLUE), strict=True))
    for row, units in zip(axes, UNITS, strict=True):
        for column, (axis, unit) in enumerate(
            zip(row, ("steps", "seconds"), strict=True)
        ):
            for (other, name, rate), run in runs.items():
                if other != units:
                    continue
                chosen = rate == best(runs, units, name)
                axis.plot(
                    run[:, column],
                    run[:, 2],
                    color=colors[name],
                    alpha=1 if chosen else 0.25,
                    label=f"{name}, η = {rate}" if chosen else None,
                )
            axis.set_yscale("log")
            pictures.dress(axis, f"Training loss, features {units}", unit)
    pictures.save(figure, path)


def best(runs, units, name):
    """The learning rate with which an optimizer ends at the lowest loss."""
    rates = [rate for *run, rate in runs if run == [units, name]]
    return min(rates, key=lambda rate: runs[units, name, rate][-1, 2])


def main():
    """Trains with both optimizers; prints what each learning rate led to."""
    arguments = pictures.arguments(__doc__, "diagonal_newton")
    x, y = load_breast_cancer(return_X_y=True)
    runs = {}
    head = f"{'features':<14}{'optimizer':<16}{'η':<6}{'steps':>6}{'seconds':>9}"
    print(f"  {head}{'training loss':>16}")
    for units, scaled in UNITS.items():
        for name, (optimizer, rates) in OPTIMIZERS.items():
            for rate in rates:
                run = train(scaled(x), y, optimizer(rate))
                runs[units, name, rate] = run
                steps, seconds, loss = run[-1]
                print(
                    f"  {units:<14}{name:<16}{rate:<6}{steps:>6.0f}{seconds:>9.1f}"
                    f"{loss:>16.5f}",
                    flush=True,
                )
    if arguments.picture:
        draw(runs, arguments.picture)


if __name__ == "__main__":
    main()
