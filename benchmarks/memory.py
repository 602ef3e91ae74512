"""Peak memory of the diagonal, as a multiple of what a gradient takes.

A convolution is the hard case: its per-sample products are as large as the kernel for
every sample. Each figure comes from a process of its own; what a process without any
derivative takes is subtracted.
"""

import subprocess
import sys

import measure

TASKS = (
    "nothing",
    "gradient",
    "matvec",
    "layerwise sample",
    "gauss_newton",
    "4 samples, controlled",
)


def run():
    """Measures a wide CNN; returns a list of rows."""
    peaks = {task: _peak(task) for task in TASKS}
    base = peaks.pop("nothing")
    gradient = peaks["gradient"] - base
    return [
        {
            "task": task,
            "MiB": round((peak - base) / 2**20),
            "gradients": (peak - base) / gradient,
        }
        for task, peak in peaks.items()
    ]


def _peak(task):
    output = subprocess.run(
        [sys.executable, __file__, task], check=True, capture_output=True, text=True
    ).stdout
    return float(output.split()[-1])


def operator():
    """On a wide CNN and 64 images."""
    import keras
    import numpy as np
    from keras import layers

    import keras_curvature as kc

    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((32, 32, 3)),
            layers.Conv2D(64, 3, activation="relu", padding="same"),
            layers.Conv2D(128, 3, activation="relu", padding="same"),
            layers.MaxPooling2D(),
            layers.Conv2D(256, 3, activation="relu", padding="same"),
            layers.GlobalAveragePooling2D(),
            layers.Dense(10),
        ]
    )
    model.compile(loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((64, 32, 32, 3)), rng.integers(0, 10, 64)
    return kc.HessianOperator(model, x, y)


def _work(task):
    import numpy as np

    import keras_curvature as kc
    from keras_curvature.diagonal import diagonal_moments

    op = operator()
    if task == "gradient":
        op.value_and_gradient()
    elif task == "matvec":
        _ = op @ np.ones(op.shape[0], "float32")
    elif task == "layerwise sample":
        diagonal_moments(op, "layerwise", samples=1, control_variate=False)
    elif task == "4 samples, controlled":
        diagonal_moments(op, "layerwise", samples=4, control_variate=True)
    elif task == "gauss_newton":
        kc.hessian_diagonal(op, method="gauss_newton", verbose=False)
    print(measure.peak_bytes())


if __name__ == "__main__":
    if len(sys.argv) > 1:
        _work(sys.argv[1])
    else:
        results = run()
        measure.save("memory", results)
        measure.print_table("Peak memory", results)
