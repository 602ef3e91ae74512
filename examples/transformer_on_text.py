"""Watch a transformer with LayerNorm while it learns to write like Shakespeare.

What you learn: the first weights lie where the loss is sharply curved, and 30 steps
take the largest eigenvalue to a quarter: what a warm-up waits for. Then it rises again
while the loss falls, past its first value. Where it changes so fast, the monitor's own
eigenvalue has a wide bound, and `hessian_eigenvalues` iterates until it is exact. Adam
divides each weight's gradient by its usual size, and sees a preconditioned Hessian with
a threshold of its own, which 2 / η says nothing about. At the end most of the trace
lies in the two tables at the input, of the characters and of their positions.

    λ = max vᵀ H v / vᵀ v        λ_A = λ(D^{-1/2} H D^{-1/2})
    Adam is unstable where λ_A > (2 + 2 β₁) / ((1 − β₁) η)

| symbol | meaning |
|---|---|
| H | Hessian of the loss, cross entropy of the next character, on 32 lines of text |
| λ, v | its largest eigenvalue, and directions in the space of weights |
| D | Adam's preconditioner, `√v̂ + ε` for each weight |
| λ_A | largest eigenvalue of the Hessian that Adam sees |
| η, β₁ | Adam's learning rate, 0.003, and its momentum, 0.9 |
| trace | sum of H's diagonal, here over a layer's weights |

Usage:

    python examples/transformer_on_text.py              # trains and prints
    python examples/transformer_on_text.py --picture    # draws what it saw as well
    python examples/transformer_on_text.py --text FILE  # reads another text

The text is the beginning of "Coriolanus", which lies beside this file. Another one
should have some tens of thousands of characters.
"""

import pathlib
import sys

import keras
import numpy as np
import pictures
from keras import layers

import keras_curvature as kc

EXCERPT = pathlib.Path(__file__).with_name("shakespeare.txt")
LENGTH = 32
WIDTH = 48
STEPS = 240
BATCH = 32


class Positions(layers.Layer):
    """Adds a vector for each position, learnt like the characters' own."""

    def build(self, shape):
        """Makes the table of the vectors."""
        start = keras.initializers.RandomNormal(stddev=0.02)
        self.table = self.add_weight(shape[1:], start, name="table")

    def call(self, x):
        """The sequence with its positions."""
        return x + self.table


def load_text(path):
    """Pieces of text as numbers, each with the characters that come next."""
    try:
        text = np.array(list(path.read_text(encoding="utf-8")[:200_000]))
    except (OSError, UnicodeDecodeError) as error:
        sys.exit(f"{path} cannot be read as a text in UTF-8: {error}.")
    if len(text) <= 10 * LENGTH:
        sys.exit(f"{path} has {len(text)} characters, too few to learn from.")
    characters, numbers = np.unique(text, return_inverse=True)
    starts = np.random.default_rng(0).integers(len(text) - LENGTH, size=STEPS * BATCH)
    pieces = numbers[starts[:, None] + np.arange(LENGTH + 1)].astype("int32")
    return pieces[:, :-1], pieces[:, 1:], len(characters)


def transformer(num_characters):
    """A block of attention and a network, each behind a LayerNorm."""
    keras.utils.set_random_seed(0)
    text = layers.Input((LENGTH,), dtype="int32")
    x = layers.Embedding(num_characters, WIDTH, name="characters")(text)
    x = Positions(name="positions")(x)
    normed = layers.LayerNormalization(name="norm1")(x)
    attention = layers.MultiHeadAttention(4, WIDTH // 4, name="attention")
    x += attention(normed, normed, use_causal_mask=True)
    normed = layers.LayerNormalization(name="norm2")(x)
    hidden = layers.Dense(4 * WIDTH, "gelu", name="expand")(normed)
    x += layers.Dense(WIDTH, name="contract")(hidden)
    x = layers.LayerNormalization(name="norm3")(x)
    return keras.Model(text, layers.Dense(num_characters, name="logits")(x))


def train(path):
    """Each piece of text is seen once; the probe is the first of them."""
    x, y, num_characters = load_text(path)
    model = transformer(num_characters)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(0.003), loss)
    monitor = kc.CurvatureMonitor((x[:BATCH], y[:BATCH]), update_freq=30)
    eigenvalues = []

    def look(*_, logs=None):
        if len(eigenvalues) < len(monitor.history):  # The monitor has just probed.
            top = kc.hessian_eigenvalues(
                monitor.operator,
                k=1,
                which="algebraic",
                tolerance=0.01,
                verbose=False,
            )
            eigenvalues.append(top.value[0])

    follow = keras.callbacks.LambdaCallback(
        on_epoch_begin=look, on_train_batch_end=look
    )
    model.fit(x, y, batch_size=BATCH, callbacks=[monitor, follow], verbose=0)
    return monitor.history, eigenvalues


def draw(history, eigenvalues, path):
    """Loss and eigenvalues over the steps, and the trace by layer."""
    from keras_curvature import plots

    figure, axes = pictures.new(2, 2, (10.5, 6.4))
    plots.plot_history(history, "loss", axes[0, 0], color=plots.BLUE)
    step = [record["step"] for record in history]
    axes[0, 1].plot(step, eigenvalues, color=plots.BLUE)
    axes[0, 1].set_ylim(0)
    pictures.dress(axes[0, 1], "Largest eigenvalue λ", "step", legend=False)

    # Adam has no preconditioner before its first step.
    key = "hessian_preconditioned_max_eigenvalue"
    # None where it was not found in time, which leaves a gap.
    seen = np.array([record[key] for record in history[1:]], float)
    bound = np.array([record[f"{key}_error"] for record in history[1:]])
    limits = [record["stability_threshold"] for record in history]
    axes[1, 0].plot(step[1:], seen, color=plots.ORANGE, label="λ_A ± its bound")
    band = {"color": plots.ORANGE, "alpha": 0.2, "linewidth": 0}
    axes[1, 0].fill_between(step[1:], seen - bound, seen + bound, **band)
    axes[1, 0].plot(step, limits, "--", color=plots.GREY, label="unstable above")
    axes[1, 0].set_ylim(0)
    pictures.dress(axes[1, 0], "Largest eigenvalue that Adam sees", "step")

    last = history[-1]["layers"][::-1]
    axes[1, 1].barh(
        [layer["name"] for layer in last],
        [layer["trace"] for layer in last],
        xerr=[2 * layer["trace_standard_error"] for layer in last],
        color=plots.BLUE,
        ecolor=plots.GREY,
    )
    title = "Trace by layer at the end"
    pictures.dress(axes[1, 1], title, "trace, ± 2 standard errors", legend=False)
    pictures.save(figure, path)


def main():
    """Trains, and prints eigenvalues over the steps and the trace by layer."""
    text = {"type": pathlib.Path, "default": EXCERPT, "metavar": "FILE"}
    text["help"] = "a text to learn, in UTF-8 (default: an excerpt of Shakespeare's)"
    arguments = pictures.arguments(__doc__, "transformer_on_text", text=text)
    history, eigenvalues = train(arguments.text)
    print("  step    loss         λ   λ_A / threshold")
    for record, eigenvalue in zip(history, eigenvalues, strict=True):
        seen = record.get("hessian_preconditioned_max_eigenvalue")
        share = f"{seen / record['stability_threshold']:.0%}" if seen else "-"
        print(
            f"  {record['step']:>4}{record['loss']:>8.3f}{eigenvalue:>10.1f}{share:>18}"
        )
    print("\n  layer                     weights   trace ± standard error")
    for layer in history[-1]["layers"]:
        print(
            f"  {layer['name']:<26}{layer['size']:>7,}{layer['trace']:>8.1f} "
            f"± {layer['trace_standard_error']:.1f}"
        )
    if arguments.picture:
        draw(history, eigenvalues, arguments.picture)


if __name__ == "__main__":
    main()
