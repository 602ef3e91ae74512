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

from keras_curvature import HessianOperator, estimators
from keras_curvature.operators import ExactDiagonal, LayerwiseDiagonal

REPETITIONS = 16


def run(names=tuple(networks.BUILDERS)):
    """Measures the networks; returns a list of rows."""
    rows = []
    for name in names:
        network = networks.trained(name)
        op = HessianOperator(network.model, network.x, network.y)
        exact = ExactDiagonal(op.layer_outputs)
        truth = exact.compute(exact.plan()).numpy()
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
        timed = {"gradient": lambda op=op: op.value_and_gradient()[1].numpy()}
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
    sampler = LayerwiseDiagonal(op.layer_outputs, groups, control_variate)
    moments = estimators.sampled_moments(sampler, samples, seed=seed)
    return moments.diagonal.value.numpy()


def _hutchinson(op, samples, seed):
    return estimators.hutchinson_diagonal(op, samples, seed=seed).value.numpy()


def _error(estimate, truth):
    squares = [
        np.sum((estimate(seed) - truth) ** 2) for seed in range(1, REPETITIONS + 1)
    ]
    return float(np.sqrt(np.mean(squares)) / np.linalg.norm(truth))


if __name__ == "__main__":
    results = run()
    measure.save("diagonal_error", results)
    measure.print_table("Error of the diagonal against cost", results)
