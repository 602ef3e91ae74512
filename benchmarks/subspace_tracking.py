"""The Frobenius norm along a training run: a kept subspace against plain averages.

Every 20 steps a network is probed with 12 products three ways: with a subspace kept
from the last probe, with one found anew, and by a plain average over random signs. The
reference is the exact norm, one product per parameter. Each way is repeated with
different seeds, which never touch the training run.
"""

import keras
import measure
import networks
import numpy as np

import keras_curvature as kc
from keras_curvature import estimators

MATVECS = 12
PROBES = 8
SEEDS = 8


class _Compare(keras.callbacks.Callback):
    def __init__(self, network_name, x, y):
        super().__init__()
        self.rows = []
        self._name, self._x, self._y = network_name, x, y
        self._step = 0

    def on_train_begin(self, logs=None):
        self._op = kc.HessianOperator(self.model, self._x, self._y)
        self._kept = [estimators.DominantSubspace() for _ in range(SEEDS)]

    def on_train_batch_end(self, batch, logs=None):
        self._step += 1
        if self._step % 20 or self._step > 20 * PROBES:
            return
        op = self._op
        truth = estimators.exact_moments(op).frobenius_norm.value
        kept, cold, plain, inside = [], [], [], []
        for seed, subspace in enumerate(self._kept):
            norm = subspace.update(op, MATVECS, seed=(seed, 1)).frobenius_norm
            kept.append(norm.value)
            inside.append(abs(norm.value - truth) <= 2 * norm.standard_error)
            fresh = estimators.DominantSubspace()
            found = fresh.update(op, MATVECS, seed=(seed, self._step))
            cold.append(found.frobenius_norm.value)
            average = estimators.hutchinson_moments(
                op, MATVECS, seed=(seed, self._step, 2)
            )
            plain.append(average.frobenius_norm.value)
        self.rows.append(
            {
                "network": self._name,
                "step": self._step,
                "exact norm": truth,
                "kept subspace": _spread(kept, truth),
                "new subspace": _spread(cold, truth),
                "plain average": _spread(plain, truth),
                "truth within two errors": float(np.mean(inside)),
            }
        )


def _spread(values, truth):
    """Relative root mean square error over the seeds."""
    return float(np.sqrt(np.mean((np.array(values) / truth - 1) ** 2)))


def run():
    """Measures three networks; returns a list of rows, one for each probe."""
    builders = {
        "MLP tanh 64-32-32-10": lambda: networks.mlp("tanh", 32),
        "CNN gelu": networks.gelu_cnn,
        "transformer": lambda: networks.transformer(blocks=1),
    }
    rows = []
    for name, build in builders.items():
        keras.utils.set_random_seed(0)
        x, y = networks.digits()
        model = build()
        model.compile(
            "adam", loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        )
        compare = _Compare(name, x[:128], y[:128])
        model.fit(x, y, epochs=3, batch_size=32, verbose=0, callbacks=[compare])
        rows += compare.rows
        print(f"{name} done", flush=True)
    return rows


if __name__ == "__main__":
    results = run()
    measure.save("subspace_tracking", results)
    measure.print_table("Relative error of the Frobenius norm", results)
