"""What a product and a sample of the diagonal cost, in gradients."""

import measure
import networks
from keras import ops

from keras_curvature import HessianOperator
from keras_curvature.diagonal import diagonal_moments


def run():
    """Measures three networks; returns a list of rows."""
    rows = []
    for name in ("MLP tanh", "CNN relu", "transformer"):
        network = networks.trained(name, epochs=1)
        op = HessianOperator(network.model, network.x, network.y)
        one = op.value_and_gradient()[1]
        four = ops.stack([one] * 4, axis=1)
        seconds = measure.median_seconds(
            {
                "gradient": lambda op=op: measure.on_host(op.value_and_gradient()[1]),
                "matvec": lambda op=op, one=one: measure.on_host(op @ one),
                "4 matvecs": lambda op=op, four=four: measure.on_host(op @ four),
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


def _samples(op, count):
    moments = diagonal_moments(op, "layerwise", samples=count, control_variate=False)
    return measure.on_host(moments.diagonal.value)


if __name__ == "__main__":
    results = run()
    measure.save("matvec_cost", results)
    measure.print_table("Cost in gradients", results)
