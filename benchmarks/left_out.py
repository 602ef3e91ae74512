"""Signs left out one by one at a first look, next to fresh ones, XDiag and averages.

Each of `tests/small_architectures.py` is trained for 10 and for 100 epochs, and its
dense Hessian looked at by the same number of products in four ways: plain averages over
random signs; Hutch++'s way, a third of the products to find a subspace, a third for the
products with it and a third for fresh signs, split on both sides; XDiag; and half of
the products for signs that are left out in turn. Relative errors are root mean squares
over seeds, told as medians over networks; and how often the truth is within two of the
errors that are told, and beyond six. Up to 1e-5 of the figure is rounding.
PyTorch needs no compilation, so `KERAS_BACKEND=torch` is the quick way to run it.

    KERAS_BACKEND=torch python benchmarks/left_out.py [NAME …]
"""

import pathlib
import sys
import warnings

sys.path.append(str(pathlib.Path(__file__).resolve().parents[1] / "tests"))

import keras
import measure
import numpy as np
import small_architectures as small
from never_worse import NAMES
from xdiag import xdiag

import keras_curvature as kc
from keras_curvature import estimators
from keras_curvature.estimators import deflation

PRODUCTS = (8, 16, 32)
SEEDS = 12
CHECKPOINTS = (10, 90)

#: Share of a figure that counts as rounding.
ROUNDING = 1e-5


def fresh(dense, products, seed):
    """A third of the products for each of the sketch, the subspace and fresh signs."""
    rng, third = np.random.default_rng(seed), products // 3
    draw = rng.choice([-1.0, 1.0], size=(len(dense), products - third))
    basis = np.linalg.qr(dense @ draw[:, :third])[0]
    signs = list(draw[:, third:].T)
    outside = deflation.outside(list(basis.T), signs)
    return deflation.deflated_moments(
        list(basis.T),
        signs,
        list((dense @ basis).T),
        [dense @ v for v in outside],
        products,
        diagonal=True,
    )


def left_out(dense, products, seed):
    """The first look of a dominant subspace."""
    subspace = estimators.DominantSubspace()
    return subspace.update(dense, products, seed, diagonal=True)


def averages(dense, products, seed):
    """Random signs alone."""
    return estimators.hutchinson_moments(dense, products, seed=seed, diagonal=True)


WAYS = {"averages": averages, "fresh signs": fresh, "left out": left_out}


def figures(found):
    """Values and told errors of what a way tells."""
    for name in ("frobenius_norm", "trace", "diagonal"):
        estimate = getattr(found, name)
        yield name, np.array(estimate.value), np.array(estimate.standard_error)


def of_matrix(dense):
    """Relative errors and calibration by way, figure and number of products."""
    exact = {
        "frobenius_norm": np.linalg.norm(dense),
        "trace": np.trace(dense),
        "diagonal": np.diag(dense),
    }
    # A trace of indefinite matrices may be next to nothing.
    scale = {name: np.linalg.norm(value) for name, value in exact.items()}
    scale["trace"] = np.sum(np.abs(np.linalg.eigvalsh(dense)))
    for products in PRODUCTS:
        found = {}
        for seed in range(SEEDS):
            for way, estimate in WAYS.items():
                for name, value, told in figures(estimate(dense, products, seed)):
                    off = np.abs(value - exact[name])
                    beyond = np.maximum(off - ROUNDING * np.abs(exact[name]), 0)
                    row = np.sum(off**2), np.mean(beyond <= 2 * told)
                    found.setdefault((way, name), []).append(
                        (*row, np.mean(beyond > 6 * told))
                    )
            off = xdiag(dense, products, seed) - exact["diagonal"]
            row = np.sum(off**2), np.nan, np.nan
            found.setdefault(("XDiag", "diagonal"), []).append(row)
        for (way, name), each in found.items():
            square, within, beyond = np.mean(each, axis=0)
            yield (way, name, products), (square**0.5 / scale[name], within, beyond)


def run(names=NAMES):
    """Measures architectures; returns a list of rows."""
    found = {}
    for name in names:
        keras.utils.set_random_seed(0)
        model, x, y, *_ = small.ARCHITECTURES[name]()
        for epochs in CHECKPOINTS:
            model.compile(keras.optimizers.Adam(1e-2), model.loss)
            model.fit(x, y, epochs=epochs, batch_size=len(y), verbose=0)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                dense = kc.HessianOperator(model, x, y).to_dense().astype("float64")
            if len(dense) > 2 * max(PRODUCTS):
                for key, row in of_matrix((dense + dense.T) / 2):
                    found.setdefault(key, []).append(row)
        print(name, flush=True)
    rows = []
    for (way, figure, products), each in found.items():
        errors, within, beyond = np.array(each).T
        rows.append(
            {
                "figure": figure,
                "way": way,
                "products": products,
                "networks": len(errors),
                "relative error": float(np.median(errors)),
                "within two": _known(within),
                "beyond six": _known(beyond),
            }
        )
    return sorted(rows, key=lambda row: (row["figure"], row["products"]))


def _known(shares):
    """The mean of shares; `None` where no errors are told."""
    return None if np.isnan(shares).any() else float(np.mean(shares))


if __name__ == "__main__":
    results = run(tuple(sys.argv[1:]) or NAMES)
    measure.save("left_out", results)
    measure.print_table("Signs left out one by one", results)
