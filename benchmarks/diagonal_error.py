"""How wrong the estimated diagonal is for what it costs.

The relative error of the whole diagonal, ‖estimate − exact‖ / ‖exact‖ (root mean
square over repetitions), against cost in gradients measured in the same run. All
estimators but XDiag average independent samples, so that error² × cost tells which one
is better at equal cost.
"""

import measure
import networks
import numpy as np
from xdiag import xdiag

from keras_curvature import HessianOperator
from keras_curvature.diagonal import diagonal_moments

REPETITIONS = 16


def run(names=tuple(networks.BUILDERS)):
    """Measures the networks; returns a list of rows."""
    rows = []
    for name in names:
        network = networks.trained(name)
        op = HessianOperator(network.model, network.x, network.y)
        truth = _diagonal(op, method="exact")
        estimators_by_name = {
            ("layerwise, joint", 1): lambda seed, op=op: _layerwise(op, 1, seed),
            ("layerwise, joint", 8): lambda seed, op=op: _layerwise(op, 8, seed),
            ("layerwise, per layer", 1): lambda seed, op=op: _layerwise(
                op, 1, seed, "layer"
            ),
            ("controlled, joint", 1): lambda seed, op=op: _layerwise(
                op, 1, seed, control_variate=True
            ),
            ("controlled, joint", 8): lambda seed, op=op: _layerwise(
                op, 8, seed, control_variate=True
            ),
            ("controlled, per layer", 8): lambda seed, op=op: _layerwise(
                op, 8, seed, "layer", True
            ),
            ("Hutchinson", 1): lambda seed, op=op: _hutchinson(op, 1, seed),
            ("Hutchinson", 64): lambda seed, op=op: _hutchinson(op, 64, seed),
            ("XDiag", 64): lambda seed, op=op: xdiag(op, 64, seed),
        }
        errors = {
            key: _error(estimate, truth) for key, estimate in estimators_by_name.items()
        }
        timed = {"gradient": lambda op=op: measure.on_host(op.value_and_gradient()[1])}
        timed |= {k: lambda f=f: f(0) for k, f in estimators_by_name.items()}
        seconds = measure.median_seconds(timed, rounds=9)
        gradient = seconds.pop("gradient")
        best = errors["layerwise, joint", 1] ** 2 * seconds["layerwise, joint", 1]
        for key, error in errors.items():
            rows.append(
                {
                    "network": name,
                    "estimator": key[0],
                    "samples": key[1],
                    "gradients": seconds[key] / gradient,
                    "relative error": error,
                    "error at equal cost": (error**2 * seconds[key] / best) ** 0.5,
                }
            )
        print(f"{name} done", flush=True)
    return rows


def _layerwise(op, samples, seed, groups="joint", control_variate=False):
    return _diagonal(
        op,
        method="layerwise",
        samples=samples,
        seed=seed,
        groups=groups,
        control_variate=control_variate,
    )


def _hutchinson(op, samples, seed):
    return _diagonal(op, method="hutchinson", num_matvecs=samples, seed=seed)


def _diagonal(op, **arguments):
    return measure.on_host(diagonal_moments(op, **arguments).diagonal.value)


def _error(estimate, truth):
    squares = [
        np.sum((estimate(seed) - truth) ** 2) for seed in range(1, REPETITIONS + 1)
    ]
    return float(np.sqrt(np.mean(squares)) / np.linalg.norm(truth))


if __name__ == "__main__":
    results = run()
    measure.save("diagonal_error", results)
    measure.print_table("Error of the diagonal against cost", results)
