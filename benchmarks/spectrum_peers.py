"""Trace, eigenvalues and density next to PyHessian and curvlinops.

The same network (the tanh MLP, same weights, same batch) and the same precision asked
for; milliseconds and the error against a reference computed in many products.
"""

import measure
import networks
import numpy as np
import peers

import keras_curvature as kc
from keras_curvature import estimators
from keras_curvature.operators import ExactDiagonal


def run():
    """Measures all packages that are installed; returns a list of rows."""
    network = networks.trained("MLP tanh")
    op = kc.HessianOperator(network.model, network.x, network.y)
    exact = ExactDiagonal(op.layer_outputs)
    trace = float(exact.compute(exact.plan()).numpy().sum())
    top = estimators.eigenvalues(op, 3, 1e-6).values
    tasks = {
        ("trace", "keras_curvature, 8 samples"): lambda seed: (
            kc.hessian_trace(op, num_matvecs=8, seed=seed).value
        ),
        ("eigenvalues", "keras_curvature"): lambda seed: (
            kc.hessian_eigenvalues(op, k=3, tolerance=1e-3, seed=seed).value
        ),
        ("density", "keras_curvature"): lambda seed: (
            kc.hessian_spectral_density(op, num_steps=30, num_vectors=4, seed=seed)
            .moment(1)
            .value
            * op.shape[0]
        ),
    }
    tasks |= _pyhessian(network)
    tasks |= _curvlinops(network)
    truth = {"trace": trace, "eigenvalues": top, "density": trace}
    functions = {key: lambda task=task: task(0) for key, task in tasks.items()}
    seconds = measure.median_seconds(functions, rounds=5, warm_up=1)
    rows = []
    for key, task in tasks.items():
        reference = truth[key[0]]
        errors = [
            np.linalg.norm(task(seed) - reference) / np.linalg.norm(reference)
            for seed in range(1, 7)
        ]
        rows.append(
            {
                "figure": key[0],
                "package": key[1],
                "milliseconds": 1e3 * seconds[key],
                "relative error": float(np.sqrt(np.mean(np.square(errors)))),
            }
        )
    return rows


def _pyhessian(network):
    try:
        import torch
        from pyhessian import hessian
    except ImportError:
        return {}
    model, x, y = peers.torch_mlp(network, "tanh")
    computer = hessian(model, torch.nn.CrossEntropyLoss(), data=(x, y), cuda=False)

    def seeded(function):
        def call(seed):
            torch.manual_seed(seed)
            return function()

        return call

    # Its density calls `torch.eig`, which PyTorch no longer has.
    return {
        ("trace", "PyHessian, its stopping rule"): seeded(
            lambda: float(np.mean(computer.trace()))
        ),
        ("eigenvalues", "PyHessian"): seeded(
            lambda: np.array(computer.eigenvalues(top_n=3)[0])
        ),
    }


def _curvlinops(network):
    try:
        import torch
        from curvlinops import HessianLinearOperator, hutchpp_trace
        from scipy.sparse.linalg import eigsh
    except ImportError:
        return {}
    model, x, y = peers.torch_mlp(network, "tanh")
    params = list(model.parameters())
    op = HessianLinearOperator(model, torch.nn.CrossEntropyLoss(), params, [(x, y)])

    def trace(seed):
        torch.manual_seed(seed)
        return float(hutchpp_trace(op, num_matvecs=30))

    def top(seed):
        rng = np.random.default_rng(seed)
        linear = op.to_scipy()
        values = eigsh(
            linear,
            k=3,
            tol=1e-3,
            v0=rng.standard_normal(linear.shape[0]).astype(np.float32),
            return_eigenvectors=False,
        )
        return np.sort(values)[::-1]

    return {
        ("trace", "curvlinops Hutch++, 30 matvecs"): trace,
        ("eigenvalues", "curvlinops + eigsh"): top,
    }


if __name__ == "__main__":
    results = run()
    measure.save("spectrum_peers", results)
    measure.print_table("Next to PyTorch's tools", results)
