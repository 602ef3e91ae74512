"""Writes figures.json: what every backend must find for the cases.

    KERAS_BACKEND=tensorflow PYTHONPATH=tests:. python tests/layerwise/figures.py

Run it again when a case is added or changed, and look at the difference: weights and
data of the cases come from NumPy, so that nothing else may move.
"""

import json
import pathlib

import cases
import numpy as np
from keras import ops

import keras_curvature as kc


def figures(name):
    """Loss, trace, norm and diagonal of the dense Hessian, in float64."""
    with cases.floatx("float64"):
        model, x, y, weight, training = cases.CASES[name]()
        op = kc.HessianOperator(model, x, y, weight, training=training)
        dense = op.to_dense()
    return {
        "loss": float(ops.convert_to_numpy(op.loss())),
        "trace": float(np.trace(dense)),
        "frobenius_norm": float(np.linalg.norm(dense)),
        "diagonal": [float(f"{h:.9g}") for h in np.diag(dense)],
    }


if __name__ == "__main__":
    path = pathlib.Path(__file__).parent / "figures.json"
    found = {name: figures(name) for name in cases.CASES}
    lines = [f"  {json.dumps(n)}: {json.dumps(f)}" for n, f in found.items()]
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n")
