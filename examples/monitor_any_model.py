"""Watch the curvature of any model: three lines added to a script that has `fit`.

What you learn: where the three lines go, and what the first pictures tell. The model is
a classifier of scikit-learn's breast cancer data, trained with Adam as it was before.

    H = ∇² L(θ)      trace H = Σᵢ Hᵢᵢ      ‖H‖² = Σᵢⱼ Hᵢⱼ²      λ = max vᵀ H v / vᵀ v

| symbol | meaning |
|---|---|
| θ | the model's weights |
| L | loss on the probe data, here 256 of the training samples |
| H | Hessian of L, the matrix of its second derivatives |
| trace H, ‖H‖ | its trace and its Frobenius norm |
| λ, v | its largest eigenvalue, and directions in the space of weights |

Usage:

    python examples/monitor_any_model.py              # trains and prints
    python examples/monitor_any_model.py --picture    # draws what it saw as well
"""

import keras
import numpy as np
import pictures
from sklearn.datasets import load_breast_cancer

import keras_curvature as kc  # The first line.


def load_data():
    """455 samples to train on and 114 to test, columns of mean 0 and deviation 1."""
    x, y = load_breast_cancer(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(x))
    x, y = x[order].astype("float32"), y[order].astype("float32")[:, None]
    x = (x - x[:455].mean(0)) / x[:455].std(0)
    return (x[:455], y[:455]), (x[455:], y[455:])


def train():
    """An ordinary script, and a monitor."""
    (x, y), test = load_data()
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.layers.Input((30,)),
            keras.layers.Dense(32, "relu", name="hidden1"),
            keras.layers.Dense(32, "relu", name="hidden2"),
            keras.layers.Dense(1, "sigmoid", name="benign"),
        ]
    )
    model.compile("adam", loss="binary_crossentropy", metrics=["accuracy"])
    monitor = kc.CurvatureMonitor((x[:256], y[:256]), update_freq=10)  # The second.
    history = model.fit(
        x,
        y,
        batch_size=32,
        epochs=20,
        validation_data=test,
        callbacks=[monitor],  # The third.
        verbose=0,
    )
    return monitor, history.history


def draw(monitor, path):
    """The monitor's curves, and the last diagonal by layer."""
    from keras_curvature import plots

    figure, axes = pictures.new(2, 2, (10, 6))
    figures = ("loss", "trace", "max_eigenvalue")
    plots.plot_history(monitor, figures, axes.flat[:3], color=plots.BLUE)
    plots.plot_diagonal(monitor.history[-1]["layers"], axes[1, 1])
    pictures.save(figure, path)


def main():
    """Trains, and prints the figures every four epochs."""
    arguments = pictures.arguments(__doc__, "monitor_any_model")
    monitor, history = train()
    print("  step    loss   trace of H   ‖H‖        λ ± its error bound")
    for record in monitor.history[:: len(monitor.history) // 5]:
        print(
            f"  {record['step']:>4}{record['loss']:>8.4f}"
            f"{record['hessian_trace']:>13.2f}{record['hessian_frobenius_norm']:>6.2f}"
            f"{record['hessian_max_eigenvalue']:>9.3f} "
            f"± {record['hessian_max_eigenvalue_error']:.2g}"
        )
    print(f"\n  accuracy on the test data: {history['val_accuracy'][-1]:.1%}")
    if arguments.picture:
        draw(monitor, arguments.picture)


if __name__ == "__main__":
    main()
