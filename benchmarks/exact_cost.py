"""What an exact diagonal costs, next to BackPACK on the same network and machine.

Each package is counted in its own gradients as well as in milliseconds; all are timed
in turn in one run.
"""

import time

import measure
import networks
import numpy as np
import peers

import keras_curvature as kc
from keras_curvature.layerwise import ExactDiagonal, GaussNewtonDiagonal


def run():
    """Measures the two MLPs; returns a list of rows."""
    rows = []
    for activation in ("tanh", "relu"):
        network = networks.trained(f"MLP {activation}")
        op = kc.HessianOperator(network.model, network.x, network.y)
        exact = ExactDiagonal(op.evaluation)
        gauss_newton = GaussNewtonDiagonal(op.evaluation)
        plan = exact.plan()
        functions = {
            "gradient": lambda op=op: measure.on_host(op.value_and_gradient()[1]),
            "exact": lambda exact=exact, plan=plan: measure.on_host(
                exact.compute(plan)
            ),
            "exact with its plan": lambda exact=exact: measure.on_host(
                exact.compute(exact.plan())
            ),
            "Gauss-Newton": lambda g=gauss_newton: measure.on_host(g.compute()[0]),
        }
        functions |= _backpack(network, activation)
        truth = functions["exact"]()
        seconds = measure.median_seconds(functions, rounds=15)
        for name, s in seconds.items():
            if "gradient" in name:
                continue
            own = "torch gradient" if name.startswith("BackPACK") else "gradient"
            other = functions[name]()
            rows.append(
                {
                    "network": network.name,
                    "diagonal": name,
                    "milliseconds": 1e3 * s,
                    "gradients": s / seconds[own],
                    "difference": float(
                        np.linalg.norm(other - truth) / np.linalg.norm(truth)
                    ),
                }
            )
    rows.append(_million())
    return rows


def _backpack(network, activation):
    try:
        import torch
        from backpack import backpack, extend, extensions
    except ImportError:
        return {}
    model, x, y = peers.torch_mlp(network, activation)
    plain = peers.torch_gradient(model, x, y)
    extended, x2, y2 = peers.torch_mlp(network, activation)
    extended = extend(extended)
    loss = extend(torch.nn.CrossEntropyLoss())

    def diagonal(extension, attribute):
        def compute():
            extended.zero_grad()
            with backpack(extension()):
                loss(extended(x2), y2).backward()
            parts = [getattr(p, attribute) for p in extended.parameters()]
            return peers.in_keras_order(parts)

        return compute

    return {
        "torch gradient": plain,
        "BackPACK DiagHessian": diagonal(extensions.DiagHessian, "diag_h"),
        "BackPACK DiagGGNExact": diagonal(extensions.DiagGGNExact, "diag_ggn_exact"),
    }


def _million():
    """A tanh MLP with a million parameters, compilation included."""
    network = networks.million()
    start = time.perf_counter()
    estimate = kc.hessian_diagonal(
        network.model, network.x, network.y, method="exact", verbose=False
    )
    spent = time.perf_counter() - start
    op = kc.HessianOperator(network.model, network.x, network.y)
    gradient = measure.median_seconds(
        {"gradient": lambda: measure.on_host(op.value_and_gradient()[1])}
    )["gradient"]
    return {
        "network": f"MLP tanh, {op.shape[0]:,} parameters",
        "diagonal": f"exact, first call, {estimate.num_matvecs} matvecs",
        "milliseconds": 1e3 * spent,
        "gradients": spent / gradient,
        "difference": None,
    }


if __name__ == "__main__":
    results = run()
    measure.save("exact_cost", results)
    measure.print_table("Exact diagonals", results)
