"""The share of the time that a monitor with `max_overhead=0.05` takes.

Small networks on digits in batches of 256, and networks of real size on 8 images of
64x64. Once everything is compiled and the pace has settled, after three probes, the
share is the time of the probes over all time, in whole cycles of a probe and training:
from the start of one probe to the start of another.
"""

import sys
import time

import keras
import large_models
import measure
import networks
import numpy as np

import keras_curvature as kc

#: Probes that the pace takes to settle, and those that are looked at.
SETTLING, PROBES = 3, 4

#: Steps at most, whatever the number of probes.
STEPS = 20_000


class _Watch(keras.callbacks.Callback):
    """Notes when each probe ends, and ends training after enough of them."""

    def __init__(self, monitor):
        super().__init__()
        self.monitor, self.ends, self.steps = monitor, [], 0

    def on_train_batch_end(self, batch, logs=None):
        """The monitor, which comes before, may have probed."""
        self.steps += 1
        while len(self.ends) < len(self.monitor.history):
            self.ends.append(time.perf_counter())
        if len(self.ends) > SETTLING + PROBES:
            self.model.stop_training = True


def digits(name):
    """A small network, its training data, a batch size and the probe data."""
    build, samples = networks.BUILDERS[name]
    x, y = networks.digits()
    return build(), x[:1792], y[:1792], 256, samples


def of_real_size(name):
    """The same of a network of real size."""
    model, x, y = large_models.NETWORKS[name]()
    samples = len(y)
    x, y = (np.concatenate([data] * 64) for data in (x, y))
    return model, x, y, samples, samples


CASES = {
    "MLP tanh": digits,
    "CNN relu": digits,
    "transformer": digits,
    "MobileNetV2": of_real_size,
    "ViT, 6 blocks": of_real_size,
    "ResNet-50": of_real_size,
}


def run(names=tuple(CASES)):
    """Measures networks; yields their rows."""
    for name in names:
        keras.utils.set_random_seed(0)
        model, x, y, batch_size, samples = CASES[name](name)
        model.compile(
            "adam", loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        )
        monitor = kc.CurvatureMonitor(
            (x[:samples], y[:samples]), update_freq=5, max_overhead=0.05
        )
        watch = _Watch(monitor)
        model.fit(
            x,
            y,
            batch_size=batch_size,
            epochs=STEPS * batch_size // len(y),
            verbose=0,
            callbacks=[monitor, watch],
        )
        probes = monitor.history[SETTLING:]
        seconds = [probe["seconds"] for probe in probes]
        starts = np.subtract(watch.ends[SETTLING:], seconds)
        yield {
            "network": name,
            "steps": watch.steps,
            "probes": PROBES,
            "matvecs per probe": probes[-1]["num_matvecs"],
            "probe s": float(np.median(seconds)),
            "share": float(sum(seconds[:-1]) / (starts[-1] - starts[0])),
        }


if __name__ == "__main__":
    results = []
    for row in run(sys.argv[1:] or tuple(CASES)):
        print(row, flush=True)
        results.append(row)
    measure.save("overhead", results)
    measure.print_table("Share of the time", results)
