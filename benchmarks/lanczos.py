"""The package's Lanczos iteration next to SciPy's `eigsh`.

Dense matrices `D Fᵀ Λ F D` with prescribed eigenvalues Λ, the cosine transform F and
random signs D, so that a product is fast at any size. Three questions:

* cost: the products until an iteration is satisfied (without the k by which ours
  measures the residuals afterwards), its time, and how wrong the values are;
* stopped: how wrong they are after 12 products, where `eigsh` returns nothing;
* close: how often one of some close eigenvalues is missed by more than the tolerance,
  also if ours looked after every product and not only when its basis is full.
"""

import itertools
import time

import measure
import numpy as np
import scipy.fft
from scipy.sparse.linalg import LinearOperator, eigsh

from keras_curvature import estimators
from keras_curvature.estimators.lanczos import Lanczos

SEEDS, CLOSE_SEEDS = 3, 10
TOLERANCES = (1e-3, 1e-4, 1e-5, 1e-6)


def _outliers(size, rng):
    return np.r_[[40.0, 25, 16, 10, -4], 2 / np.arange(1, size - 4)]


def _power_law(size, rng):
    signs = np.where(np.arange(size) % 5 == 3, -1, 1)
    return signs * 10 / np.arange(1, size + 1)


def _close(size, rng):
    """Nine outliers within 2 %."""
    return np.r_[10 + 0.2 * rng.uniform(-1, 1, 9), 2 / np.arange(1, size - 8)]


def _double(size, rng):
    return np.r_[[40.0, 40, 25, 25, 16, 10, 9, 8, 7], 2 / np.arange(1, size - 8)]


class _Matrix(LinearOperator):
    """Counts its products; computes them in its own type."""

    def __init__(self, eigenvalues, dtype, seed):
        size = len(eigenvalues)
        super().__init__(np.dtype(dtype), (size, size))
        rng = np.random.default_rng(seed)
        self._signs = rng.choice([-1.0, 1.0], size)[:, None].astype(dtype)
        self._values = rng.permutation(eigenvalues)[:, None].astype(dtype)
        self.count = 0

    def _matmat(self, columns):
        self.count += columns.shape[1]
        columns = self._signs * columns.astype(self.dtype)
        inner = self._values * scipy.fft.dct(columns, axis=0, norm="ortho")
        return self._signs * scipy.fft.idct(inner, axis=0, norm="ortho")

    def _matvec(self, vector):
        return self._matmat(vector.reshape(-1, 1))[:, 0]


def _start(matrix, seed):
    return np.random.default_rng(seed).standard_normal(matrix.shape[0])


def _own(matrix, k, tolerance, seed):
    found = estimators.eigenvalues(matrix, k, tolerance, seed=seed)
    return found.values, matrix.count - k


def _scipy(matrix, k, tolerance, seed, dimension=None):
    # In float64 around products in either type, as ours.
    linear = LinearOperator(
        matrix.shape, matvec=lambda v: np.float64(matrix @ v), dtype=np.float64
    )
    values = eigsh(
        linear,
        k,
        tol=tolerance,
        ncv=dimension,
        v0=_start(matrix, seed),
        return_eigenvectors=False,
    )
    return values[np.argsort(-abs(values))], matrix.count


def _scipy_small(matrix, k, tolerance, seed):
    return _scipy(matrix, k, tolerance, seed, max(2 * k + 1, 8))


def _hasty(matrix, k, tolerance, seed):
    """Ours, looking after every product, before its first restart."""
    start = _start(matrix, seed).astype(matrix.dtype)
    lanczos = Lanczos(lambda v: matrix @ v, lambda: start, 100)
    while lanczos.size < 100:
        lanczos.extend()
        pairs = lanczos.pairs(lambda v: np.argsort(-abs(v))[:k])
        small = pairs.residuals <= np.maximum(tolerance * abs(pairs.values), 0)
        if len(small) == k and small.all():
            break
    return pairs.values, matrix.count


WAYS = {"ours": _own, "eigsh": _scipy, "eigsh, small basis": _scipy_small}


def _measured(way, spectrum, size, dtype, k, tolerance, seeds):
    products, seconds, errors = [], [], []
    for seed in range(seeds):
        values = spectrum(size, np.random.default_rng(seed))
        matrix = _Matrix(values, dtype, seed)
        start = time.perf_counter()
        found, spent = way(matrix, k, tolerance, seed)
        seconds.append(time.perf_counter() - start)
        products.append(spent)
        exact = values[np.argsort(-abs(values), kind="stable")][:k]
        errors.append(float(np.max(abs(abs(found) - abs(exact)) / abs(exact))))
    return products, seconds, errors


def _cost():
    estimators.eigenvalues(np.eye(300))  # What is compiled once is not timed.
    names = {"outliers": _outliers, "power law": _power_law}
    cases = itertools.product(
        names, (300, 3000, 30000), ("float32", "float64"), (1, 3, 6), TOLERANCES
    )
    rows = []
    for name, size, dtype, k, tolerance in cases:
        row = {
            "question": "cost",
            "spectrum": name,
            "P": size,
            "products in": dtype,
            "k": k,
            "tolerance": tolerance,
        }
        for way, function in WAYS.items():
            products, seconds, errors = _measured(
                function, names[name], size, dtype, k, tolerance, SEEDS
            )
            row[f"products, {way}"] = float(np.mean(products))
            row[f"milliseconds, {way}"] = 1e3 * float(np.median(seconds))
            row[f"relative error, {way}"] = max(errors)
        rows.append(row)
    return rows


def _stopped():
    rows = []
    for k in (1, 3, 6):
        values = _outliers(3000, None)
        found = estimators.eigenvalues(
            _Matrix(values, "float32", 0), k, progress=lambda done, _: done < 12
        )
        exact = values[np.argsort(-abs(values))][:k]
        rows.append(
            {
                "question": "stopped",
                "spectrum": "outliers",
                "k": k,
                "products, ours": float(found.num_matvecs),
                "relative error, ours": float(np.max(abs(found.values / exact - 1))),
                "relative bound, ours": float(
                    np.max(found.residual_norms / abs(found.values))
                ),
            }
        )
    return rows


def _closeness():
    ways = {**WAYS, "ours, hasty": _hasty}
    names = {"close": _close, "double": _double}
    rows = []
    for name, k, tolerance in itertools.product(names, (3, 6), (1e-2, 1e-3, 1e-5)):
        row = {"question": "close", "spectrum": name, "k": k, "tolerance": tolerance}
        for way, function in ways.items():
            products, _, errors = _measured(
                function, names[name], 300, "float64", k, tolerance, CLOSE_SEEDS
            )
            row[f"products, {way}"] = float(np.mean(products))
            row[f"missed, {way}"] = float(np.mean(np.array(errors) > tolerance))
        rows.append(row)
    return rows


def run():
    """Answers the three questions; returns a list of rows."""
    return [*_cost(), *_stopped(), *_closeness()]


if __name__ == "__main__":
    results = run()
    measure.save("lanczos", results)
    for question in ("cost", "stopped", "close"):
        rows = [row for row in results if row["question"] == question]
        measure.print_table(question, rows)
