"""Choose a learning rate from the largest eigenvalue, and watch what becomes of it.

What you learn: gradient descent on a quadratic is stable while its learning rate is
below 2 / λ. That suggests a learning rate before the first step, but λ does not stay
where it was: it rises during training, and if it gets as far as 2 / η it stays around
there. Below that edge of stability the loss falls smoothly; at the edge it falls in
jumps, but goes on falling (Cohen et al. 2021, arXiv 2103.00065). So λ₀ is a start, and
the curve of λ tells whether the learning rate is what limits it.

    θ ← θ − η ∇L(θ)          along an eigenvector v of H:  vᵀθ ← (1 − η λ) vᵀθ
    stable:  |1 − η λ| < 1   ⟺   λ < 2 / η

| symbol | meaning |
|---|---|
| θ, L | weights; loss on all 500 training samples, so that steps have no noise |
| η | learning rate |
| H, λ, v | Hessian of L; its largest eigenvalue, an eigenvector |
| λ₀ | λ before the first step |

Usage:

    python examples/edge_of_stability.py              # trains three times and prints
    python examples/edge_of_stability.py --picture    # draws the curves as well
"""

import keras
import numpy as np
import pictures
import tensorflow as tf
from sklearn.datasets import load_digits

import keras_curvature as kc

#: Learning rates in units of 1 / λ₀: at 2 the very first step is at the edge.
RATES = (0.4, 0.8, 1.6)
STEPS = 600


def load_data():
    """500 digits around 0, and their labels as one-hot vectors."""
    x, y = load_digits(return_X_y=True)
    x = x[:500].astype("float32") / 16
    return x - x.mean(0), np.eye(10, dtype="float32")[y[:500]]


def half_squares(y, prediction):
    """Half the squared distance of each sample."""
    return keras.ops.sum((y - prediction) ** 2, axis=-1) / 2


def make_model(learning_rate):
    """Four hidden layers, with the same weights each time."""
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.layers.Input((64,)),
            *(keras.layers.Dense(32, "relu", name=f"hidden{i}") for i in range(1, 5)),
            keras.layers.Dense(10, name="output"),
        ]
    )
    model.compile(keras.optimizers.SGD(learning_rate), loss=half_squares)
    return model


def largest_eigenvalue(x, y):
    """λ₀, before any step."""
    top = kc.hessian_eigenvalues(make_model(0.0), x, y, k=1, which="algebraic")
    return float(top.value[0])


def train(x, y, learning_rate):
    """Full-batch gradient descent, looked at every ten steps."""
    monitor = kc.CurvatureMonitor((x, y), update_freq=10, diagonal=None)
    # One batch that is all the data, again and again.
    data = tf.data.Dataset.from_tensors((x, y)).repeat()
    make_model(learning_rate).fit(
        data, steps_per_epoch=STEPS, shuffle=False, callbacks=[monitor], verbose=0
    )
    return monitor


def draw(monitors, path):
    """Eigenvalues against their limits, and the losses."""
    from keras_curvature import plots

    figure, (eigenvalue, loss) = pictures.new(1, 2, (10, 3.8))
    colors = (plots.BLUE, plots.ORANGE, plots.GREEN)
    for (rate, monitor), color in zip(monitors.items(), colors, strict=True):
        step = [r["step"] for r in monitor.history]
        label = f"η = {rate:.2f}, 2 / η = {2 / rate:.1f}"
        plots.plot_history(monitor, "loss", loss, color=color)
        values = [r["hessian_max_eigenvalue"] for r in monitor.history]
        eigenvalue.plot(step, values, color=color, label=label)
        eigenvalue.axhline(2 / rate, color=color, linestyle="--", linewidth=1)
    eigenvalue.set_ylim(0, 1.1 * max(2 / rate for rate in monitors))
    loss.set_yscale("log")
    pictures.dress(eigenvalue, "Largest eigenvalue λ, limits 2 / η dashed", "step")
    pictures.dress(loss, "Loss", "step", legend=False)
    pictures.save(figure, path)


def main():
    """Trains with each learning rate; prints where λ began, and where it ended."""
    arguments = pictures.arguments(__doc__, "edge_of_stability")
    x, y = load_data()
    first = largest_eigenvalue(x, y)
    print(f"  Before the first step λ₀ = {first:.2f}: stable up to η = {2 / first:.2f}")
    print("\n     η    2 / η    λ: half-way    at the end      loss   rising steps")
    monitors = {}
    for rate in (factor / first for factor in RATES):
        monitors[rate] = monitor = train(x, y, rate)
        values = [r["hessian_max_eigenvalue"] for r in monitor.history]
        losses = np.array([r["loss"] for r in monitor.history])
        print(
            f"  {rate:.2f}{2 / rate:>9.2f}{values[len(values) // 2]:>15.2f}"
            f"{values[-1]:>14.2f}{losses[-1]:>10.4f}"
            f"{np.mean(np.diff(losses) > 0):>15.0%}",
            flush=True,
        )
    if arguments.picture:
        draw(monitors, arguments.picture)


if __name__ == "__main__":
    main()
