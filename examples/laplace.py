"""Know what a network does not know: Laplace's approximation from the diagonal.

What you learn: how the diagonal of the Hessian turns a trained network into a
distribution over networks. Along a stiff direction the data have settled a weight;
along a flat one it could be anything the prior allows. Predictions of networks drawn
from that distribution agree where there are data and differ where there are none.

    p(θ | data) ≈ N(θ*, diag σ²)        1 / σᵢ² = N hᵢ + τ

| symbol | meaning |
|---|---|
| θ* | weights of the trained network |
| N | number of training samples |
| h | exact Gauss–Newton diagonal of the mean loss, which is never negative |
| τ | precision of the prior: the smaller, the less sure |
| σ | deviation of a weight |

The network reads the digits 0 to 4; what does it say about 5 to 9, which it has never
seen, and how right is it about 0 to 4 in noise? Held-out data say how small τ may be:
there the mean log likelihood must stay above −0.1. (MacKay 1992, "A practical Bayesian
framework for backpropagation networks".)

Usage:

    python examples/laplace.py              # trains, samples and prints
    python examples/laplace.py --picture    # draws the uncertainties as well
"""

import keras
import numpy as np
import pictures
from sklearn.datasets import load_digits

import keras_curvature as kc

PRIORS = (1, 3, 10, 30, 100, 300)
NETWORKS = 30

#: Deviations of noise added to the test images, whose pixels go from 0 to 1.
NOISES = (0, 0.1, 0.2, 0.3, 0.4, 0.5)


def load_data():
    """Digits 0 to 4 to train on, to choose with and to test with, and 5 to 9."""
    x, y = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(x))
    x, y = x[order].astype("float32") / 16, y[order]
    known, strange = (x[y < 5], y[y < 5]), (x[y >= 5], y[y >= 5])
    parts = slice(0, 400), slice(400, 650), slice(650, None)
    return *((known[0][part], known[1][part]) for part in parts), strange


def train(x, y):
    """A network of one hidden layer, fitted closely."""
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.layers.Input((64,)),
            keras.layers.Dense(64, "relu", name="hidden"),
            keras.layers.Dense(5, name="logits"),
        ]
    )
    model.compile(
        keras.optimizers.Adam(0.01),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    model.fit(x, y, batch_size=64, epochs=40, verbose=0)
    return model


def probabilities(model, x):
    """Of the classes, by the trained network alone."""
    return keras.ops.convert_to_numpy(keras.ops.softmax(model(x)))


def laplace(model, precisions, x):
    """Mean of the probabilities over networks drawn around the trained one.

    Args:
        model: the trained network.
        precisions: `1 / σ²`, an array for each variable.
        x: inputs `(n, 64)`.
    """
    weights = model.get_weights()
    generator = np.random.default_rng(0)
    total = 0
    for _ in range(NETWORKS):
        model.set_weights(
            [
                w + generator.standard_normal(w.shape) / np.sqrt(p)
                for w, p in zip(weights, precisions, strict=True)
            ]
        )
        total = total + probabilities(model, x)
    model.set_weights(weights)
    return total / NETWORKS


def log_likelihood(p, y):
    """Mean logarithm of the probability of what is true."""
    return np.mean(np.log(p[np.arange(len(y)), y] + 1e-12))


def in_noise(predict, x, y):
    """The log likelihood of noisy images, for each amount of noise."""
    noise = np.random.default_rng(1).standard_normal(x.shape).astype("float32")
    return [log_likelihood(predict(x + scale * noise), y) for scale in NOISES]


def draw(confidences, likelihoods, path):
    """How sure the predictions are of digits never seen, and how right in noise."""
    from keras_curvature import plots

    figure, (sure, right) = pictures.new(1, 2, (10, 3.6))
    bins = np.linspace(0.2, 1, 17)
    colors = (plots.ORANGE, plots.BLUE)
    for name, color in zip(confidences, colors, strict=True):
        style = {"bins": bins, "color": color, "histtype": "step", "linewidth": 1.6}
        sure.hist(confidences[name], label=name, **style)
        right.plot(NOISES, likelihoods[name], "o-", color=color, label=name)
    pictures.dress(
        sure,
        "Digits 5 to 9, never seen: how sure of 0 to 4?",
        "probability of the likeliest class",
        "images",
    )
    sure.legend(frameon=False, fontsize=9, loc="upper left")
    pictures.dress(
        right,
        "Digits 0 to 4 in noise: log likelihood of the truth",
        "deviation of the noise",
    )
    pictures.save(figure, path)


def main():
    """Trains, finds the diagonal and the prior; prints how sure both are."""
    arguments = pictures.arguments(__doc__, "laplace")
    (x, y), held_out, test, strange = load_data()
    model = train(x, y)
    diagonal = kc.hessian_diagonal(model, x, y, method="gauss_newton")
    print(f"  {diagonal.num_matvecs} products for the exact Gauss–Newton diagonal")

    def predictor(prior):
        precisions = [len(x) * h + prior for h in diagonal.value]
        return lambda images: laplace(model, precisions, images)

    for prior in PRIORS:
        held_out_likelihood = log_likelihood(predictor(prior)(held_out[0]), held_out[1])
        if held_out_likelihood > -0.1:
            break
    print(f"  τ = {prior}: log likelihood {held_out_likelihood:.3f} of held-out data\n")
    print("                     mean confidence in     log likelihood")
    print("                      0 to 4    5 to 9    clean   in noise")
    confidences, likelihoods = {}, {}
    for name, predict in (
        ("Trained network", lambda images: probabilities(model, images)),
        ("Laplace", predictor(prior)),
    ):
        confidences[name] = predict(strange[0]).max(1)
        likelihoods[name] = in_noise(predict, *test)
        print(
            f"  {name:<18}{predict(test[0]).max(1).mean():>8.1%}"
            f"{confidences[name].mean():>10.1%}"
            f"{likelihoods[name][0]:>9.3f}{likelihoods[name][-1]:>11.3f}"
        )
    if arguments.picture:
        draw(confidences, likelihoods, arguments.picture)


if __name__ == "__main__":
    main()
