"""Peak memory against what `batch_size="auto"` predicts from shapes, on each backend.

The network and the tasks are those of `memory.py`. *Activations* are all that the loss
computes on its way; the prediction is `ACTIVATIONS` times that, and `VECTORS` of the
parameters' size, for the largest of the tasks.
"""

import os
import subprocess
import sys

import memory

TASKS = ("gradient", "matvec", "layerwise sample", "4 samples, controlled")


def run():
    """Measures the tasks on three backends; returns a list of rows."""
    rows = []
    for backend in ("tensorflow", "jax", "torch"):
        os.environ["KERAS_BACKEND"] = backend
        output = subprocess.run(
            [sys.executable, __file__, "predict"],
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        activations, predicted = map(float, output.split()[-2:])
        base = memory._peak("nothing")
        row = {"backend": backend, "activations, MiB": round(activations / 2**20)}
        for task in TASKS:
            row[f"{task} / activations"] = (memory._peak(task) - base) / activations
        row["predicted / activations"] = predicted / activations
        rows.append(row)
        print(f"{backend} done", flush=True)
    return rows


def _predict():
    from keras_curvature.memory import ACTIVATIONS, Need

    operator = memory.operator()
    need, size = Need.of(operator.evaluation), operator.evaluation.data.largest
    per_batch = size * need.per_sample
    print(per_batch / ACTIVATIONS, need.fixed + per_batch)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        _predict()
    else:
        import measure

        results = run()
        measure.save("memory_prediction", results)
        measure.print_table("Peak memory, as a multiple of the activations", results)
