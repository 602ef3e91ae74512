"""What compilation, products and probes cost on networks of real size.

Each network runs on each backend in two processes of its own: products and updates,
and probes. The first step of `fit`, the first product, update and probe include their
compilation; all other figures are medians of what follows. The update of a kept
subspace with twelve products is measured in seconds of the processor, all cores
together, which other load disturbs less: in gradients, and what all but its products
takes, as a share of them.

    python benchmarks/large_models.py                     # all
    python benchmarks/large_models.py ResNet-50 jax       # one
    python benchmarks/large_models.py --products          # or --probes, alone

Rows are kept until they are measured anew, and have the date of that.
"""

import json
import os
import subprocess
import sys
import time

import measure

BACKENDS = ("tensorflow", "jax")


def images(build, size=64, samples=8):
    """A classifier of random images, as `keras.applications` makes them."""

    def made():
        import numpy as np

        model = build((size, size, 3))
        rng = np.random.default_rng(0)
        x = rng.standard_normal((samples, size, size, 3)).astype("float32")
        return model, x, rng.integers(0, 10, samples)

    return made


def resnet(shape):
    """ResNet-50, 23.6 million parameters."""
    import keras

    return keras.applications.ResNet50(
        weights=None, input_shape=shape, classes=10, classifier_activation=None
    )


def mobilenet(shape):
    """MobileNetV2, 2.2 million parameters."""
    import keras

    return keras.applications.MobileNetV2(
        weights=None, input_shape=shape, classes=10, classifier_activation=None
    )


def vision_transformer(shape, width=192, blocks=6, patch=8):
    """A ViT of tiny's width: patches, positions, pre-normalized blocks."""
    import keras
    import numpy as np
    from keras import layers

    inputs = keras.Input(shape)
    h = layers.Conv2D(width, patch, strides=patch)(inputs)
    h = layers.Reshape((-1, width))(h)
    h = h + layers.Embedding(h.shape[1], width)(np.arange(h.shape[1])[None])
    for _ in range(blocks):
        a = layers.LayerNormalization()(h)
        h = h + layers.MultiHeadAttention(3, width // 3)(a, a)
        f = layers.Dense(4 * width, "gelu")(layers.LayerNormalization()(h))
        h = h + layers.Dense(width)(f)
    h = layers.GlobalAveragePooling1D()(layers.LayerNormalization()(h))
    return keras.Model(inputs, layers.Dense(10)(h))


def gpt2():
    """GPT-2 small, 124 million parameters, on one sequence of 64 tokens."""
    import keras_hub
    import numpy as np

    backbone = keras_hub.models.GPT2Backbone(
        vocabulary_size=50257,
        num_layers=12,
        num_heads=12,
        hidden_dim=768,
        intermediate_dim=3072,
        max_sequence_length=1024,
        dropout=0,
    )
    model = keras_hub.models.GPT2CausalLM(backbone=backbone)
    tokens = np.random.default_rng(0).integers(0, 50257, (1, 65))
    x = {"token_ids": tokens[:, :-1], "padding_mask": np.ones((1, 64), "bool")}
    return model, x, tokens[:, 1:]


NETWORKS = {
    "ResNet-50": images(resnet),
    "MobileNetV2": images(mobilenet),
    "ViT, 6 blocks": images(vision_transformer),
    "GPT-2 small": gpt2,
}


def run(networks=tuple(NETWORKS), backends=BACKENDS, options=()):
    """Measures networks on backends, and yields their rows.

    A process that the machine's memory does not allow is a row that says so.
    """
    for network in networks:
        for backend in backends:
            row = {
                "network": network,
                "backend": backend,
                "date": time.strftime("%Y-%m-%d"),
            }
            for part in ("--products", "--probes"):
                if part in options or not options:
                    row |= _apart(part, network, backend)
            print(row, flush=True)
            yield row


def _apart(part, network, backend):
    """A part of a row, from a process of its own."""
    done = subprocess.run(
        [sys.executable, __file__, "--work", part, network],
        env={**os.environ, "KERAS_BACKEND": backend},
        stdout=subprocess.PIPE,
        text=True,
    )
    if done.returncode:
        return {f"{part[2:]} ended with": done.returncode}
    return json.loads(done.stdout.splitlines()[-1])


def before():
    """The rows that were measured before; what is measured anew takes their places."""
    path = measure.RESULTS / "large_models.json"
    return json.loads(path.read_text())["results"] if path.exists() else []


def work(part, network):
    """Measures one network in this process; returns a part of a row."""
    import keras

    keras.utils.set_random_seed(0)
    model, x, y = NETWORKS[network]()
    model.compile(
        keras.optimizers.SGD(1e-3),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    fit = {"x": x, "y": y, "batch_size": len(y), "verbose": 0}
    row = {
        "parameters": model.count_params(),
        "first step s": _seconds(lambda: model.fit(**fit)),
    }
    return row | (_probes(model, fit) if part == "--probes" else _products(model, x, y))


def _products(model, x, y):
    """What products and updates cost."""
    import keras_curvature as kc

    op, row = kc.HessianOperator(model, x, y), {}
    row["first gradient s"] = _seconds(
        lambda: measure.on_host(op.value_and_gradient()[1])
    )
    direction = op.value_and_gradient()[1]
    row["first product s"] = _seconds(lambda: measure.on_host(op @ direction))
    seconds = measure.median_seconds(
        {
            "gradient": lambda: measure.on_host(op.value_and_gradient()[1]),
            "product": lambda: measure.on_host(op @ direction),
        },
        rounds=7,
        warm_up=1,
    )
    row["gradient s"] = seconds["gradient"]
    row["product / gradient"] = seconds["product"] / seconds["gradient"]
    row["peak GiB"] = measure.peak_bytes() / 2**30
    return row | _updates(op)


class _Timed:
    """An operator that adds up the processor's seconds of its products."""

    def __init__(self, operator):
        self._operator, self.seconds = operator, 0.0
        self.shape, self.dtype = operator.shape, operator.dtype
        self.place, self.still = operator.place, operator.still

    def times_rows(self, rows):
        start = time.process_time()
        products = self._operator.times_rows(rows)
        measure.on_host(products[:1, :1])
        self.seconds += time.process_time() - start
        return products


def _updates(op, num_matvecs=12, rounds=3):
    """What updates of a kept subspace cost."""
    from keras_curvature.estimators import DominantSubspace

    subspace, timed = DominantSubspace(), _Timed(op)
    gradients, updates, shares = [], [], []
    first = _seconds(lambda: subspace.update(timed, num_matvecs, 0, op.sizes))
    for _ in range(rounds):
        start = time.process_time()
        measure.on_host(op.value_and_gradient()[1])
        between, timed.seconds = time.process_time(), 0.0
        subspace.update(timed, num_matvecs, 0, op.sizes)
        spent = time.process_time() - between
        gradients.append(between - start)
        updates.append(spent)
        shares.append(spent / timed.seconds - 1)

    def median(numbers):
        return sorted(numbers)[len(numbers) // 2]

    return {
        "first update s": first,
        "gradient CPU s": median(gradients),
        "update / gradient": median(updates) / median(gradients),
        "all but products / products": median(shares),
        "peak GiB with updates": measure.peak_bytes() / 2**30,
    }


def _probes(model, fit):
    """What probes of the default monitor cost, and the memory they need."""
    import keras_curvature as kc

    x, y = fit["x"], fit["y"]
    monitor = kc.CurvatureMonitor((x, y), update_freq=1, on_error="raise")
    model.fit(**fit, callbacks=[monitor])
    model.fit(**fit, callbacks=[monitor], epochs=3)
    probes = [record["seconds"] for record in monitor.history]
    steady = sorted(probes[2:])[len(probes[2:]) // 2]
    products = monitor.history[-1]["num_matvecs"]
    peak = measure.peak_bytes() / 2**30
    op = monitor.operator
    direction = op.value_and_gradient()[1]
    product = measure.median_seconds(
        {"product": lambda: measure.on_host(op @ direction)}, rounds=5, warm_up=1
    )["product"]
    return {
        "first probe s": probes[0],
        "probe / its products": steady / (products * product),
        "peak GiB with probes": peak,
    }


def _seconds(function):
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


if __name__ == "__main__":
    if sys.argv[1:2] == ["--work"]:
        print(json.dumps(work(*sys.argv[2:])))
    else:
        chosen = [a for a in sys.argv[1:] if a in NETWORKS] or tuple(NETWORKS)
        backends = [a for a in sys.argv[1:] if a in BACKENDS] or BACKENDS
        options = [a for a in sys.argv[1:] if a in ("--products", "--probes")]
        known = {(row["network"], row["backend"]): row for row in before()}
        for row in run(chosen, backends, options):
            key = row["network"], row["backend"]
            # Of a part of it, the rest of the row stays.
            known[key] = known.get(key, {}) | row if options else row
            measure.save("large_models", list(known.values()))
        measure.print_table("Networks of real size", list(known.values()))
