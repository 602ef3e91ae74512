"""The default of sampled diagonals against random signs, on every small architecture.

Each of `tests/small_architectures.py` is trained on its data, and looked at before,
meanwhile and after. Before, its weights are large and random: the network is sure of
what is wrong. The truth is the dense Hessian; errors are root mean squares over seeds,
of the whole diagonal and of the variable for which the default does worst, and over
those of random signs on the parameters for as many products, which the dense Hessian
tells; from 32 products on, over XDiag's too. Costs are in processor time. How often
the truth is within two of the errors that are told, and how often beyond six, counts
entries; up to a thousandth of the truth is rounding.
PyTorch needs no compilation, so `KERAS_BACKEND=torch` is the quick way to run it.

    KERAS_BACKEND=torch python benchmarks/never_worse.py [NAME …]
"""

import pathlib
import sys
import warnings

sys.path.append(str(pathlib.Path(__file__).resolve().parents[1] / "tests"))

import keras
import measure
import numpy as np
import small_architectures as small
from diagonals import timed

import keras_curvature as kc
from keras_curvature.diagonal import diagonal_moments, sampled_method

#: Products, and seeds.
COMPARED = [(4, 8), (16, 4), (32, 4)]

#: Products from which XDiag is a rival.
XDIAG = 32

#: After how many more epochs each model is looked at.
CHECKPOINTS = (0, 10, 90)

#: All whose dense Hessian does not take long.
NAMES = tuple(name for name in small.ARCHITECTURES if name != "resnet")

#: Variables whose share of the squared diagonal is less are of no account.
SMALL = 1e-4

#: Share of an entry that counts as rounding.
ROUNDING = 1e-3


def run(names=NAMES):
    """Measures architectures; returns a list of rows."""
    rows = []
    for name in names:
        keras.utils.set_random_seed(0)
        model, x, y, *_ = small.ARCHITECTURES[name]()
        epochs = 0
        for more in CHECKPOINTS:
            epochs += more
            if more:
                model.compile(keras.optimizers.Adam(1e-2), model.loss)
                model.fit(x, y, epochs=more, batch_size=len(y), verbose=0)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                op = kc.HessianOperator(model, x, y)
                rows += of_operator(name, epochs, op)
        if names == NAMES:
            measure.save("never_worse", rows)
        measure.print_table(name, [r for r in rows if r["architecture"] == name])
    return rows


def of_operator(name, epochs, op):
    """The rows of one model."""
    dense = op.to_dense().astype("float64")
    truth = np.diag(dense)
    noise = np.sum(dense**2, axis=0) - truth**2
    rows = []
    for products, seeds in COMPARED:
        method = default(op, products)
        ours, our_seconds, told = errors(op, method, products, seeds, truth)
        _, their_seconds, _ = errors(op, "hutchinson", products, 2, truth)
        rival = None
        if XDIAG <= products < len(truth):
            rival, *_ = errors(op, "XDiag", products, seeds, truth)
        parts = [np.sum(n) / products for n in op.split(noise)]
        theirs = np.sqrt([sum(parts), *parts])
        size = op.split(truth)
        counted = [np.sum(s**2) > SMALL * np.sum(truth**2) for s in size]
        by_variable = ours[1:][counted] / np.maximum(theirs[1:][counted], 1e-12)
        rows.append(
            {
                "architecture": name,
                "epochs": epochs,
                "default": method,
                "products": products,
                "relative error": float(ours[0] / np.linalg.norm(truth)),
                "ratio of errors": float(ours[0] / max(theirs[0], 1e-12)),
                "of the worst variable": float(by_variable.max()),
                "variables worse": int(np.sum(by_variable > 1.05)),
                "variables": int(np.sum(counted)),
                "ratio of seconds": our_seconds / their_seconds,
                "over XDiag": float(ours[0] / rival[0]) if rival is not None else None,
                **told,
            }
        )
    return rows


def default(op, products):
    """What `method="auto"` stands for."""
    found = diagonal_moments(op, "auto", products).diagonal
    if found.relative_standard_error == 0:
        return "exact"
    if "subspace" in next(iter(found.ways.values())):
        return "deflated"
    return sampled_method(op)


def errors(op, method, products, seeds, truth):
    """Root mean squared errors, in all and by variable, seconds, and calibration."""
    squares, ratios, told = [], [], []
    estimates, seconds = timed(op, method, products, range(seeds))
    for value, error in estimates:
        distance = op.split((value - truth) ** 2)
        parts = [float(np.sum(d)) for d in distance]
        squares.append([sum(parts), *parts])
        if error is not None:
            beyond = np.maximum(np.abs(value - truth) - ROUNDING * np.abs(truth), 0)
            ratios.append(beyond / np.maximum(error, 1e-30))
            told.append(np.sum(error**2))
    rms = np.sqrt(np.mean(squares, axis=0))
    calibration = {}
    if told and rms[0]:
        calibration = {
            "told over true error": float(np.sqrt(np.mean(told)) / rms[0]),
            "within two": float(np.mean(np.array(ratios) <= 2)),
            "beyond six": float(np.mean(np.array(ratios) > 6)),
        }
    return rms, seconds, calibration


if __name__ == "__main__":
    results = run(tuple(sys.argv[1:]) or NAMES)
    measure.print_table("The default against random signs", results)
