"""How wrong the diagonal of a language model is for what it costs.

Two blocks of KerasHub's GPT-2, Llama and BERT, 64 units and 48 positions, trained on
the characters of Shakespeare: the relative error of the whole diagonal, ‖estimate −
truth‖ / ‖truth‖ (root mean square over seeds), against processor time in gradients.

The truth has 10^5 entries and takes as many products. It is replaced by an unbiased
estimate from `TRUTH` products, whose own noise, known from its spread, is subtracted
from the squared errors. PyTorch needs no compilation, so `KERAS_BACKEND=torch` is the
quick way to run it.
"""

import sys
import time

import keras
import measure
import numpy as np
from diagonals import estimate, timed
from keras import layers

import keras_curvature as kc

URL = "https://storage.googleapis.com/download.tensorflow.org/data/shakespeare.txt"
POSITIONS, WIDTH, WINDOWS = 48, 64, 2048

#: Products of the estimate that others are compared with.
TRUTH = 256

#: Method and number of products, and how many seeds.
ESTIMATORS = [
    (("hutchinson", 4), 3),
    (("layerwise", 4), 3),
    (("split", 4), 3),
    (("shrunk", 1), 4),
    (("shrunk", 4), 4),
    (("hutchinson", 16), 1),
    (("layerwise", 16), 1),
    (("split", 16), 2),
    (("shrunk", 16), 2),
    (("XDiag", 32), 1),
]

#: After how many more epochs each model is looked at.
CHECKPOINTS = {"GPT-2": (1, 5), "Llama": (6,), "BERT": (6,)}


def run(kinds=tuple(CHECKPOINTS)):
    """Measures the models after each checkpoint; returns a list of rows."""
    rows = []
    for kind in kinds:
        keras.utils.set_random_seed(0)
        model, x, y = built(kind)
        epochs = 0
        for more in CHECKPOINTS[kind]:
            model.fit(x, y, epochs=more, batch_size=32, verbose=0)
            epochs += more
            rows += _of_model(kind, epochs, model, x[:32], y[:32])
            print(f"{kind} after {epochs} epochs done", flush=True)
    return rows


def built(kind):
    """A compiled model, and windows of text with their next (or missing) characters."""
    import keras_hub

    x, y, count = windows(POSITIONS)
    common = {"num_layers": 2, "hidden_dim": WIDTH}
    tokens = keras.Input((POSITIONS,), dtype="int32")
    inputs = {"token_ids": tokens, "padding_mask": keras.ops.ones_like(tokens)}
    if kind == "GPT-2":
        backbone = keras_hub.models.GPT2Backbone(
            vocabulary_size=count,
            num_heads=4,
            intermediate_dim=4 * WIDTH,
            max_sequence_length=POSITIONS,
            dropout=0.0,
            **common,
        )
    elif kind == "Llama":
        backbone = keras_hub.models.LlamaBackbone(
            vocabulary_size=count,
            num_query_heads=4,
            num_key_value_heads=2,
            intermediate_dim=2 * WIDTH,
            **common,
        )
    else:
        backbone = keras_hub.models.BertBackbone(
            vocabulary_size=count + 1,
            num_heads=4,
            intermediate_dim=4 * WIDTH,
            max_sequence_length=POSITIONS,
            dropout=0.0,
            **common,
        )
        inputs["segment_ids"] = keras.ops.zeros_like(tokens)
        # A quarter of the characters is hidden.
        hidden = np.random.default_rng(1).random(x.shape) < 0.25
        y, x = x, np.where(hidden, count, x).astype("int32")
    hidden = backbone(inputs)
    if isinstance(hidden, dict):
        hidden = hidden["sequence_output"]
    model = keras.Model(tokens, layers.Dense(count)(hidden))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile("adam", loss=loss)
    return model, x, y


def windows(positions):
    """Windows of text, the characters that follow, and how many there are."""
    path = keras.utils.get_file("shakespeare.txt", URL)
    text = np.frombuffer(open(path, "rb").read(), "uint8")
    characters, ids = np.unique(text, return_inverse=True)
    rng = np.random.default_rng(0)
    starts = rng.integers(0, len(ids) - positions - 1, WINDOWS)
    places = starts[:, None] + np.arange(positions)
    x, y = (ids[p].astype("int32") for p in (places, places + 1))
    return x, y, len(characters)


def _of_model(kind, epochs, model, x, y):
    op = kc.HessianOperator(model, x, y)
    truth, noise = estimate(op, "split", TRUTH, seed=10**6)
    noise = float(np.sum(noise**2))
    size = float(np.sqrt(np.sum(truth**2) - noise))
    gradient = _seconds(lambda: measure.on_host(op.value_and_gradient()[1]), 5)
    rows, plain = [], {}
    for (method, products), seeds in ESTIMATORS:
        estimate(op, method, products, 0)
        estimates, seconds = timed(op, method, products, range(1, seeds + 1))
        squares = [np.sum((value - truth) ** 2) - noise for value, _ in estimates]
        told = [np.sum(error**2) for _, error in estimates if error is not None]
        found = float(np.sqrt(max(np.mean(squares), 0)) / size)
        if method == "hutchinson":
            plain[products] = found
        rows.append(
            {
                "model": kind,
                "epochs": epochs,
                "estimator": method,
                "products": products,
                "gradients": seconds / gradient,
                "relative error": found,
                "error that it tells": float(np.sqrt(np.mean(told)) / size)
                if told
                else None,
                "over random signs": found / plain[products]
                if products in plain
                else None,
            }
        )
    return rows


def _seconds(function, rounds):
    """Processor time, which other work on the machine does not change."""
    function()
    start = time.process_time()
    for _ in range(rounds):
        function()
    return (time.process_time() - start) / rounds


if __name__ == "__main__":
    results = run(tuple(sys.argv[1:]) or tuple(CHECKPOINTS))
    measure.save("sequences", results)
    measure.print_table("Error of the diagonal against cost", results)
