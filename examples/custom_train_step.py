"""Watch a model that has its own `train_step`: a variational autoencoder.

What you learn: a model without a compiled loss is watched by saying what its loss is,
`loss_fn(model, x, y)`. The noise in it is the same at every probe, so that the curves
show the model and not the noise. Everything else is as usual.

    L(θ) = mean over x of  ‖x − D(z)‖² / 2 s²  +  KL(N(μ, σ²) ‖ N(0, 1))
    z = μ + σ ε        (μ, log σ²) = E(x)

| symbol | meaning |
|---|---|
| x | an 8×8 digit, from 0 to 1 |
| E, D | encoder and decoder, with the weights θ |
| z, μ, σ | its two latent numbers, their mean and deviation |
| ε | standard normal noise |
| s | deviation of the pixels, 0.2 |
| KL | Kullback–Leibler divergence, `Σ (μ² + σ² − log σ² − 1) / 2` |

Usage:

    python examples/custom_train_step.py              # trains and prints
    python examples/custom_train_step.py --picture    # draws curves and digits as well
"""

import keras
import numpy as np
import pictures
import tensorflow as tf
from keras import ops
from sklearn.datasets import load_digits

import keras_curvature as kc


class Autoencoder(keras.Model):
    """A variational autoencoder with two latent numbers."""

    def __init__(self):
        super().__init__()
        self.encoder = keras.Sequential(
            [
                keras.layers.Input((64,)),
                keras.layers.Dense(64, "elu", name="hidden"),
                keras.layers.Dense(4, name="latent"),
            ],
            name="encoder",
        )
        self.decoder = keras.Sequential(
            [
                keras.layers.Input((2,)),
                keras.layers.Dense(64, "elu", name="hidden"),
                keras.layers.Dense(64, "sigmoid", name="pixels"),
            ],
            name="decoder",
        )

    def call(self, x):
        """Means and log variances of the latent numbers."""
        mean, log_variance = ops.split(self.encoder(x), 2, axis=-1)
        return mean, log_variance

    def loss_of(self, x, noise):
        """L for given noise."""
        mean, log_variance = self(x)
        image = self.decoder(mean + ops.exp(log_variance / 2) * noise)
        misfit = ops.sum((x - image) ** 2, axis=-1) / (2 * 0.2**2)
        divergence = mean**2 + ops.exp(log_variance) - log_variance - 1
        return ops.mean(misfit + ops.sum(divergence, axis=-1) / 2)

    def train_step(self, x):
        """A step with noise of its own."""
        with tf.GradientTape() as tape:
            loss = self.loss_of(x, keras.random.normal((ops.shape(x)[0], 2)))
        gradients = tape.gradient(loss, self.trainable_variables)
        self.optimizer.apply(gradients, self.trainable_variables)
        return {"loss": loss}


def loss_fn(model, x, y=None):
    """The same loss, with the same noise at every probe."""
    return model.loss_of(x, keras.random.normal((ops.shape(x)[0], 2), seed=0))


def train(x):
    """Trains with a monitor that is told the loss."""
    keras.utils.set_random_seed(0)
    model = Autoencoder()
    model.compile(keras.optimizers.Adam(0.01))
    monitor = kc.CurvatureMonitor((x[:256],), update_freq=28, loss_fn=loss_fn)
    model.fit(x, batch_size=64, epochs=40, callbacks=[monitor], verbose=0)
    return model, monitor


def draw(model, monitor, path):
    """Curves, the diagonal by layer, and digits from a grid of latent numbers."""
    from keras_curvature import plots

    figure, axes = pictures.new(2, 2, (10, 6.4))
    names = ("loss", "max_eigenvalue")
    plots.plot_history(monitor, names, axes[0], color=plots.BLUE)
    plots.plot_diagonal(monitor.history[-1]["layers"], axes[1, 0])
    latent = np.linspace(-2, 2, 8, dtype="float32")
    z = np.stack(np.meshgrid(latent, latent[::-1]), -1).reshape(-1, 2)
    images = ops.convert_to_numpy(model.decoder(z)).reshape(8, 8, 8, 8)
    images = np.pad(images, ((0, 0), (0, 0), (1, 1), (1, 1)))
    axes[1, 1].imshow(
        images.transpose(0, 2, 1, 3).reshape(80, 80),
        cmap="gray_r",
        extent=(-2.2, 2.2, -2.2, 2.2),
    )
    axes[1, 1].set_title("Digits decoded from z", fontsize=10.5, loc="left")
    axes[1, 1].set_xlabel("z₁")
    axes[1, 1].set_ylabel("z₂")
    pictures.save(figure, path)


def main():
    """Trains; prints how loss and curvature went, and the curvature by layer."""
    arguments = pictures.arguments(__doc__, "custom_train_step")
    x = (load_digits().data / 16).astype("float32")
    model, monitor = train(x)
    print("  step     loss        trace of H        λ")
    for record in monitor.history[:: len(monitor.history) // 5]:
        error = record["hessian_trace_standard_error"]
        print(
            f"  {record['step']:>4}{record['loss']:>9.2f}"
            f"{record['hessian_trace']:>10,.0f} ± {error:<7,.0f}"
            f"{record['hessian_max_eigenvalue']:>8,.0f}"
        )
    print("\n  layer           mean diagonal   negative")
    for layer in monitor.history[-1]["layers"]:
        print(
            f"  {layer['name']:<16}{layer['diagonal_mean']:>13.2f}"
            f"{layer['negative_share']:>11.0%}"
        )
    if arguments.picture:
        draw(model, monitor, arguments.picture)


if __name__ == "__main__":
    main()
