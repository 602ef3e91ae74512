"""Whether recurrent layers gain from curvature at their own outputs, step by step.

Keras runs an LSTM or a GRU in a loop that cannot be opened; their kernels get random
signs on the parameters. Written step by step from layers that can be opened, the same
network with the same weights gets them at the outputs of its kernels in each step. Both
are looked at after training on the characters of Shakespeare: the relative error of the
whole diagonal, ‖estimate − truth‖ / ‖truth‖ (root mean square over seeds), and
processor time over that of random signs for as many products.

The truth is an unbiased estimate from `TRUTH` products, whose own noise, known from its
spread, is subtracted from the squared errors.

    KERAS_BACKEND=torch python benchmarks/recurrent.py
"""

import keras
import measure
import numpy as np
from diagonals import estimate, timed
from keras import layers, ops
from sequences import windows

import keras_curvature as kc

WIDTH, EPOCHS = 32, 6
TRUTH, SEEDS = 1024, 4
NETWORKS = [("LSTM", 16), ("LSTM", 48), ("GRU", 16), ("GRU", 48)]
METHODS = ("hutchinson", "split", "shrunk", "layerwise")


def run():
    """Measures all networks; returns a list of rows."""
    rows = []
    for kind, steps in NETWORKS:
        keras.utils.set_random_seed(0)
        x, y, count = windows(steps)
        looped, opened = looping(kind, steps, count), stepping(kind, steps, count)
        looped.fit(x, y, epochs=EPOCHS, batch_size=32, verbose=0)
        opened.set_weights(in_steps(looped.get_weights()))
        scores = [model(x[:4]) for model in (looped, opened)]
        np.testing.assert_allclose(*map(measure.on_host, scores), atol=1e-4)
        rows += of_network(f"{kind}, {steps} steps", looped, opened, x[:32], y[:32])
        print(f"{kind} with {steps} steps done", flush=True)
    return rows


def looping(kind, steps, count):
    """Keras' own layer between an embedding and the scores."""
    x = keras.Input((steps,), dtype="int32")
    layer = {"LSTM": layers.LSTM, "GRU": layers.GRU}[kind]
    h = layer(WIDTH, return_sequences=True)(layers.Embedding(count, WIDTH)(x))
    return compiled(keras.Model(x, layers.Dense(count)(h)))


def stepping(kind, steps, count):
    """The same from layers that are called in each step."""
    x = keras.Input((steps,), dtype="int32")
    e = layers.Embedding(count, WIDTH)(x)
    h = {"LSTM": lstm, "GRU": gru}[kind](e, steps)
    return compiled(keras.Model(x, layers.Dense(count)(h)))


def compiled(model):
    """The model, with its loss."""
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile("adam", loss)
    return model


def in_steps(parts):
    """Arrays of the variables of the loop, as the layers of a step have them."""
    table, kernel, of_state, bias, *scores = parts
    if bias.ndim == 1:
        return [table, kernel, bias, of_state, *scores]
    return [table, kernel, bias[0], of_state, bias[1], *scores]


def lstm(x, steps):
    """Keras' LSTM: gates for input, forgetting, candidates and output."""
    of_input = layers.Dense(4 * WIDTH)(x)
    of_state = layers.Dense(4 * WIDTH, use_bias=False)
    h = c = ops.zeros_like(x[:, 0])
    states = []
    for t in range(steps):
        i, f, g, o = ops.split(of_input[:, t] + of_state(h), 4, axis=-1)
        c = ops.sigmoid(f) * c + ops.sigmoid(i) * ops.tanh(g)
        h = ops.sigmoid(o) * ops.tanh(c)
        states.append(h)
    return ops.stack(states, axis=1)


def gru(x, steps):
    """Keras' GRU: gates for update and reset, candidates from the reset product."""
    of_input = layers.Dense(3 * WIDTH)(x)
    of_state = layers.Dense(3 * WIDTH)
    h = ops.zeros_like(x[:, 0])
    states = []
    for t in range(steps):
        z, r, g = ops.split(of_input[:, t], 3, axis=-1)
        hz, hr, hg = ops.split(of_state(h), 3, axis=-1)
        update = ops.sigmoid(z + hz)
        candidate = ops.tanh(g + ops.sigmoid(r + hr) * hg)
        h = update * h + (1 - update) * candidate
        states.append(h)
    return ops.stack(states, axis=1)


def of_network(name, looped, opened, x, y):
    """The rows of one network."""
    in_loop, by_step = (kc.HessianOperator(model, x, y) for model in (looped, opened))
    truth, noise = estimate(in_loop, "split", TRUTH, 10**6)
    noise = float(np.sum(noise**2))
    size = float(np.sqrt(np.sum(truth**2) - noise))
    truths = truth, by_step.flatten(in_steps(in_loop.split(truth)))
    rows, signs = [], {}
    ways = ("in a loop", METHODS[:-1]), ("step by step", METHODS)
    for op, truth, (way, methods) in zip((in_loop, by_step), truths, ways, strict=True):
        for method in methods:
            for products in (4, 16):
                estimate(op, method, products, 0)
                estimates, seconds = timed(op, method, products, range(1, SEEDS + 1))
                squares = [np.sum((v - truth) ** 2) - noise for v, _ in estimates]
                found = float(np.sqrt(max(np.mean(squares), 0)) / size)
                if op is in_loop and method == "hutchinson":
                    signs[products] = found, seconds
                rows.append(
                    {
                        "network": name,
                        "layer": way,
                        "estimator": method,
                        "products": products,
                        "relative error": found,
                        "over random signs": found / signs[products][0],
                        "seconds over random signs": seconds / signs[products][1],
                    }
                )
    return rows


if __name__ == "__main__":
    results = run()
    measure.save("recurrent", results)
    measure.print_table("Recurrent layers in a loop and step by step", results)
