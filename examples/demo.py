"""See the curvature of a small network's loss while three optimizers train it.

What you learn: how to watch the Hessian of the training loss during `fit`, what its
figures look like on a real model, and how to step with its diagonal. A convolutional
network learns to read scikit-learn's 8×8 digits, first with plain gradient descent,
then with Adam, then with `DiagonalNewton`, each from the same initial weights:

    SGD              θ ← θ − η g
    Adam             θ ← θ − η m̂ / √v̂
    DiagonalNewton   θ ← θ − η u / (|ĥ| + √v̂ / r)

| symbol | meaning |
|---|---|
| θ | weights |
| g, m̂, v̂ | gradient of a batch; averages of gradients and of their squares |
| H | Hessian of the loss on the probe data, the matrix of second derivatives |
| u | mean of g and m̂ |
| ĥ | average of the diagonals of H that the monitor delivers |
| r | trust radius of the step |
| η | learning rate; gradient descent is stable while H's eigenvalues are below 2/η |

Usage:

    python examples/demo.py                  # trains, prints, writes event files
    python examples/demo.py --picture        # writes docs/images/demo.png as well
"""

import argparse
import pathlib
import sys

import keras
import numpy as np
from sklearn.datasets import load_digits

import keras_curvature as kc

ROOT = pathlib.Path(__file__).resolve().parent.parent

OPTIMIZERS = {
    "SGD": lambda: keras.optimizers.SGD(0.1),
    "Adam": lambda: keras.optimizers.Adam(0.003),
    "DiagonalNewton": lambda: kc.DiagonalNewton(0.1),
}


def load_data():
    """Digits from 0 to 1, in random order: 1,437 to train on and 360 to test."""
    x, y = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(x))
    x, y = x[order].reshape(-1, 8, 8, 1).astype("float32") / 16, y[order]
    return (x[:1437], y[:1437]), (x[1437:], y[1437:])


def make_model(optimizer):
    """A small convolutional network, with the same weights each time."""
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.layers.Input((8, 8, 1)),
            keras.layers.Conv2D(16, 3, padding="same", activation="relu", name="conv1"),
            keras.layers.MaxPooling2D(),
            keras.layers.Conv2D(32, 3, padding="same", activation="relu", name="conv2"),
            keras.layers.Flatten(),
            keras.layers.Dense(10, name="logits"),
        ]
    )
    model.compile(
        optimizer=optimizer,
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    return model


def train(optimizer, log_dir, epochs, update_freq=6):
    """Trains with a monitor; returns the monitor and Keras' history."""
    (x, y), test = load_data()
    model = make_model(optimizer)
    monitor = kc.CurvatureMonitor(
        probe_data=(x[:256], y[:256]), update_freq=update_freq, log_dir=log_dir
    )
    history = model.fit(
        x,
        y,
        batch_size=64,
        epochs=epochs,
        validation_data=test,
        callbacks=[monitor],
        verbose=0,
    )
    return monitor, history.history


# What is printed


def sparkline(values, width):
    """A curve of one line, from its own lowest value to its highest."""
    places = np.linspace(0, len(values) - 1, min(width, len(values)))
    values = np.interp(places, np.arange(len(values)), values)
    low, high = values.min(), values.max()
    levels = (values - low) / (high - low) if high > low else np.zeros_like(values)
    return "".join("▁▂▃▄▅▆▇█"[round(7 * level)] for level in levels)


def print_run(name, monitor, history):
    """One line about a run, and its largest eigenvalue as a curve."""
    last = monitor.history[-1]
    eigenvalues = [r["hessian_max_eigenvalue"] for r in monitor.history]
    bound = last["hessian_max_eigenvalue_error"]
    last_eigenvalue = f"{eigenvalues[-1]:.1f} ± {bound:.1f}"
    print(
        f"  {name:<16}{history['val_accuracy'][-1]:>8.1%}{last['loss']:>9.4f}"
        f"{figure(last, 'trace'):>15}{figure(last, 'frobenius_norm'):>15}"
        f"{last_eigenvalue:>14} {sparkline(eigenvalues, 16)}",
        flush=True,
    )


def figure(record, name):
    """A figure and its standard error, in as many digits as the error leaves."""
    value = record[f"hessian_{name}"]
    error = record[f"hessian_{name}_standard_error"]
    return f"{value:.2f} ± {error:.2f}" if error else f"{value:.2f} (exact)"


def print_layers(record):
    """Where the curvature sits: one line per layer."""
    print("  layer       weights   mean diagonal   largest   negative   share of ‖H‖²")
    for layer in record["layers"]:
        print(
            f"  {layer['name']:<9}{layer['size']:>10,}{layer['diagonal_mean']:>16.2e}"
            f"{layer['diagonal_max']:>10.2f}{layer['negative_share']:>11.1%}"
            f"{layer['frobenius_share']:>16.1%}"
        )


# The picture


def draw(monitors, path):
    """Loss, Frobenius norm, largest eigenvalue and the layers' diagonals."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    colors = dict(zip(monitors, ("#0072B2", "#E69F00", "#009E73"), strict=True))
    picture, axes = pyplot.subplots(2, 2, figsize=(10, 6.2), layout="constrained")
    (loss, norm), (eigenvalue, layers) = axes
    for name, monitor in monitors.items():
        records, color = monitor.history, colors[name]
        step = [r["step"] for r in records]
        loss.plot(step, [r["loss"] for r in records], color=color, label=name)
        for axis, key, error_key, factor in (
            (norm, "frobenius_norm", "frobenius_norm_standard_error", 2),
            (eigenvalue, "max_eigenvalue", "max_eigenvalue_error", 1),
        ):
            value = np.array([r[f"hessian_{key}"] for r in records])
            error = factor * np.array([r[f"hessian_{error_key}"] for r in records])
            axis.plot(step, value, color=color)
            band = {"color": color, "alpha": 0.2, "linewidth": 0}
            axis.fill_between(step, value - error, value + error, **band)
    records = monitors["SGD"].history
    step = [r["step"] for r in records]
    limit = [2 / r["learning_rate"] for r in records]
    label = "2 / learning rate of SGD"
    eigenvalue.plot(step, limit, "--", color=colors["SGD"], label=label)
    for i, layer in enumerate(records[0]["layers"]):
        mean = [r["layers"][i]["diagonal_mean_abs"] for r in records]
        color = ("#0072B2", "#56B4E9", "#808080")[i]
        layers.plot(step, mean, color=color, label=layer["name"])
    for axis, title in (
        (loss, "Loss on the probe data"),
        (norm, "Frobenius norm of the Hessian, ± 2 standard errors"),
        (eigenvalue, "Largest eigenvalue of the Hessian, ± its error bound"),
        (layers, "Mean absolute diagonal of the Hessian by layer, SGD"),
    ):
        axis.set_title(title, fontsize=10.5, loc="left")
        axis.set_xlabel("step")
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_xlim(0, step[-1])
        if axis in (loss, layers):
            axis.set_yscale("log")
        else:
            axis.set_ylim(0, None)
        if axis is not norm:
            axis.legend(frameon=False, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.savefig(path, dpi=110)
    pyplot.close(picture)


def forget(directory):
    """Removes the event files of an earlier demo, which would mix with the new ones."""
    for old in directory.glob("**/events.out.tfevents.*"):
        old.unlink()


def main():
    """Trains three times, prints what happened, and where to see more of it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--log-dir", type=pathlib.Path, default=ROOT / "logs" / "demo")
    parser.add_argument(
        "--picture",
        type=pathlib.Path,
        nargs="?",
        const=ROOT / "docs" / "images" / "demo.png",
        help="writes the curves as an image",
    )
    arguments = parser.parse_args()

    weights = make_model("sgd").count_params()
    print(
        f"""
keras_curvature {kc.__version__}: the curvature of a digit classifier's loss

A convolutional network with {weights:,} weights learns to read 1,437 images for
{arguments.epochs} epochs, three times over. Every 6 steps a probe looks at the
Hessian H of its loss on 256 of them. The figures are those after the last step; the
curve is the largest eigenvalue from the first step to the last.

  {"optimizer":<16}{"accuracy":>8}{"loss":>9}{"trace of H":>15}{"norm of H":>15}  \
largest eigenvalue of H""",
        flush=True,
    )
    monitors = {}
    for name, make_optimizer in OPTIMIZERS.items():
        log_dir = arguments.log_dir / name
        forget(log_dir)
        run = train(make_optimizer(), log_dir, arguments.epochs)
        monitors[name] = run[0]
        print_run(name, *run)

    sgd = monitors["SGD"].history
    eigenvalues = [r["hessian_max_eigenvalue"] for r in sgd]
    print(
        f"""
Gradient descent is stable while the largest eigenvalue is below 2 / learning rate,
which is {2 / sgd[-1]["learning_rate"]:.0f} for SGD here. It began at \
{eigenvalues[0]:.1f}, rose to {max(eigenvalues):.1f}, and ended at \
{eigenvalues[-1]:.1f}.

Where the curvature sits after DiagonalNewton:
"""
    )
    print_layers(monitors["DiagonalNewton"].history[-1])
    if arguments.picture:
        draw(monitors, arguments.picture)
        print(f"\nThe curves are in {arguments.picture}.")
    print(
        "\nTo see it all in a browser, start this and open http://localhost:6006\n\n"
        f"  {shown(pathlib.Path(sys.executable).with_name('tensorboard'))} "
        f"--logdir {shown(arguments.log_dir)}\n"
    )


def shown(path):
    """A path as short as it can be typed here."""
    here = pathlib.Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path


if __name__ == "__main__":
    main()
