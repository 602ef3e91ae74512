"""Trace, eigenvalues and density next to PyHessian and curvlinops.

The same network (a tanh MLP, same weights, same batch) in one run, small enough for the
reference to be all eigenvalues of the dense Hessian. Every task runs once to warm up,
then with several seeds; the runs that are timed are those whose error is told. Time is
that of the processor, on one thread, which other work on the machine disturbs little.
"""

import os
import time

# Before TensorFlow starts.
os.environ.update(TF_NUM_INTRAOP_THREADS="1", TF_NUM_INTEROP_THREADS="1")

import measure
import networks
import numpy as np
import peers

import keras_curvature as kc

RUNS = 5
TOP = 3
STEPS, VECTORS = 30, 4


def run():
    """Measures all packages that are installed; returns a list of rows."""
    network = networks.fitted(
        "MLP tanh 64-32-32-10", lambda: networks.mlp("tanh", 32), 256
    )
    op = kc.HessianOperator(network.model, network.x, network.y)
    spectrum = np.linalg.eigvalsh(kc.hessian_matrix(op).astype(np.float64))
    density = _Density(spectrum)
    truth = {
        "trace": spectrum.sum(),
        "eigenvalues": spectrum[np.argsort(-abs(spectrum))[:TOP]],
        "density": density.exact,
    }
    tasks = _own(op, density) | _pyhessian(network, density)
    tasks |= _curvlinops(network, density)
    broken = {}
    for key, task in tasks.items():
        try:
            task(0)
        except RuntimeError as error:  # PyHessian calls `torch.eig`, which is gone.
            broken[key] = f"torch.eig: {str(error).split('. ')[0]}"
    seconds, errors = ({key: [] for key in tasks} for _ in range(2))
    for seed in range(1, RUNS + 1):  # In turn, so that load is shared.
        for key in tasks.keys() - broken.keys():
            start = time.process_time()
            value = tasks[key](seed)
            seconds[key].append(time.process_time() - start)
            errors[key].append(_relative_error(value, truth[key[0]]))
    rows = []
    for key in tasks:
        row = {"figure": key[0], "package": key[1]}
        measured = key not in broken
        row["CPU milliseconds"] = 1e3 * np.median(seconds[key]) if measured else None
        row["relative error"] = _mean(errors[key]) if measured else None
        row["cannot run"] = broken.get(key)
        rows.append(row)
    return rows


def _relative_error(value, reference):
    """In the norm of the figure; in that of L1 for a density."""
    order = 1 if np.size(reference) > TOP else 2
    distance, size = (
        np.linalg.norm(np.atleast_1d(x), order) for x in (value - reference, reference)
    )
    return distance / size


def _mean(errors):
    return float(np.sqrt(np.mean(np.square(errors))))


class _Density:
    """Smooths all nodes and weights in the same way, and the exact spectrum."""

    def __init__(self, spectrum):
        width = spectrum[-1] - spectrum[0]
        self.sigma = 0.01 * width
        # Six points to a sigma, so that the sum of differences is the integral.
        self.grid = np.arange(
            spectrum[0] - 0.1 * width, spectrum[-1] + 0.1 * width, self.sigma / 6
        )
        self.exact = self(spectrum, np.full(len(spectrum), 1 / len(spectrum)))

    def __call__(self, nodes, weights):
        distances = (self.grid[:, None] - np.asarray(nodes)) / self.sigma
        return np.exp(-(distances**2) / 2) @ np.asarray(weights)


def _own(op, density):
    def smoothed(seed):
        found = kc.hessian_spectral_density(
            op, num_steps=STEPS, num_vectors=VECTORS, seed=seed
        )
        pairs = zip(found.nodes, found.weights, strict=True)
        return np.mean([density(x, w) for x, w in pairs], axis=0)

    def trace(method, num_matvecs):
        return lambda seed: (
            kc.hessian_trace(
                op, method=method, num_matvecs=num_matvecs, seed=seed, verbose=False
            ).value
        )

    own = "keras_curvature"
    return {
        ("trace", f"{own}, 8 samples by layer"): trace("layerwise", 8),
        ("trace", f"{own}, 30 matvecs deflated"): trace("deflated", 30),
        ("eigenvalues", own): lambda seed: (
            kc.hessian_eigenvalues(op, k=TOP, tolerance=1e-3, seed=seed).value
        ),
        ("density", own): smoothed,
    }


def _pyhessian(network, density):
    try:
        import torch
        from pyhessian import hessian
    except ImportError:
        return {}
    torch.set_num_threads(1)
    model, x, y = peers.torch_mlp(network, "tanh")
    computer = hessian(model, torch.nn.CrossEntropyLoss(), data=(x, y), cuda=False)

    def seeded(function):
        def call(seed):
            torch.manual_seed(seed)
            return function()

        return call

    def smoothed():
        pairs = zip(*computer.density(iter=STEPS, n_v=VECTORS), strict=True)
        return np.mean([density(x, w) for x, w in pairs], axis=0)

    return {
        ("trace", "PyHessian, its stopping rule"): seeded(
            lambda: float(np.mean(computer.trace()))
        ),
        ("eigenvalues", "PyHessian"): seeded(
            lambda: np.array(computer.eigenvalues(top_n=TOP)[0])
        ),
        ("density", "PyHessian"): seeded(smoothed),
    }


def _curvlinops(network, density):
    try:
        import torch
        from curvlinops import HessianLinearOperator, hutchpp_trace
        from curvlinops.papyan2020traces.spectrum import fast_lanczos
        from scipy.sparse.linalg import eigsh
    except ImportError:
        return {}
    torch.set_num_threads(1)
    model, x, y = peers.torch_mlp(network, "tanh")
    params = list(model.parameters())
    op = HessianLinearOperator(model, torch.nn.CrossEntropyLoss(), params, [(x, y)])

    def trace(seed):
        torch.manual_seed(seed)
        return float(hutchpp_trace(op, num_matvecs=30))

    def top(seed):
        rng = np.random.default_rng(seed)
        linear = op.to_scipy()
        start = rng.standard_normal(linear.shape[0]).astype(np.float32)
        values = eigsh(linear, k=TOP, tol=1e-3, v0=start, return_eigenvectors=False)
        return values[np.argsort(-abs(values))]

    def smoothed(seed):
        torch.manual_seed(seed)
        each = []
        for _ in range(VECTORS):
            nodes, vectors = fast_lanczos(op, STEPS)
            each.append(density(nodes.numpy(), vectors[0].numpy() ** 2))
        return np.mean(each, axis=0)

    return {
        ("trace", "curvlinops Hutch++, 30 matvecs"): trace,
        ("eigenvalues", "curvlinops + eigsh"): top,
        ("density", "curvlinops"): smoothed,
    }


if __name__ == "__main__":
    results = run()
    measure.save("spectrum_peers", results)
    measure.print_table("Next to PyTorch's tools", results)
