"""What a product and a sample of the diagonal cost, in gradients."""

import measure
import networks
import numpy as np

from keras_curvature import HessianOperator
from keras_curvature.operators import LayerwiseDiagonal


def run():
    """Measures three networks; returns a list of rows."""
    rows = []
    for name in ("MLP tanh", "CNN relu", "transformer"):
        network = networks.trained(name, epochs=1)
        op = HessianOperator(network.model, network.x, network.y)
        v = op.value_and_gradient()[1]
        block = np.stack([v] * 4, axis=1)
        one, four = _tensor(v), _tensor(block)
        seconds = measure.median_seconds(
            {
                "gradient": lambda op=op: op.value_and_gradient()[1].numpy(),
                "matvec": lambda op=op, one=one: (op @ one).numpy(),
                "4 matvecs": lambda op=op, four=four: (op @ four).numpy(),
                "layerwise sample": lambda op=op: _samples(op, 1),
                "4 layerwise samples": lambda op=op: _samples(op, 4),
            },
            rounds=40,
        )
        gradient = seconds.pop("gradient")
        row = {
            "network": name,
            "parameters": op.shape[0],
            "gradient ms": 1e3 * gradient,
        }
        rows.append(row | {k: s / gradient for k, s in seconds.items()})
    return rows


def _tensor(x):
    from keras import ops

    return ops.convert_to_tensor(x)


def _samples(op, count):
    return LayerwiseDiagonal(op.layer_outputs).diagonal_samples(0, 0, count).numpy()


if __name__ == "__main__":
    results = run()
    measure.save("matvec_cost", results)
    measure.print_table("Cost in gradients", results)
