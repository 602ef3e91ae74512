"""The share of the time that a monitor with `max_overhead=0.05` takes.

500 steps of training on digits in batches of 256, after 500 others in which everything
is compiled and the pace settles. The share is probe time over all time between the
first and the last step.
"""

import time

import keras
import measure
import networks

import keras_curvature as kc

STEPS = 500


class _Timed(keras.callbacks.Callback):
    """Times the steps, the monitor's part of them included."""

    def on_train_begin(self, logs=None):
        self.start = time.perf_counter()

    def on_train_end(self, logs=None):
        self.seconds = time.perf_counter() - self.start


def run():
    """Measures three networks; returns a list of rows."""
    rows = []
    for name in ("MLP tanh", "CNN relu", "transformer"):
        keras.utils.set_random_seed(0)
        build, samples = networks.BUILDERS[name]
        x, y = networks.digits()
        model = build()
        model.compile(
            "adam", loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        )
        monitor = kc.CurvatureMonitor(
            (x[:samples], y[:samples]), update_freq=5, max_overhead=0.05
        )
        timed = _Timed()
        arguments = {"batch_size": 256, "verbose": 0, "callbacks": [timed, monitor]}
        x, y = x[:1792], y[:1792]
        epochs = round(STEPS / 7)
        model.fit(x, y, epochs=epochs, **arguments)
        before = len(monitor.history)
        model.fit(x, y, epochs=epochs, **arguments)
        probes = monitor.history[before:]
        rows.append(
            {
                "network": name,
                "steps": epochs * 7,
                "probes": len(probes),
                "matvecs per probe": probes[-1]["num_matvecs"],
                "share": sum(p["seconds"] for p in probes) / timed.seconds,
            }
        )
    return rows


if __name__ == "__main__":
    results = run()
    measure.save("overhead", results)
    measure.print_table("Share of the time", results)
