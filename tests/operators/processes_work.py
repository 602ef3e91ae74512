"""What each of several PyTorch processes does: run by test_processes.py.

Arguments: number of this process, number of all, file to meet at, file for the figures.
"""

import sys

import cases
import keras
import numpy as np
import torch

import keras_curvature as kc


def figures(operator):
    """One figure of each kind, from the same seeds."""
    arguments = {"num_matvecs": 6, "seed": 1, "verbose": False}
    return {
        "loss": float(operator.loss()),
        "product": operator @ np.linspace(-1, 1, operator.shape[0], dtype="float32"),
        "exact": operator.flatten(
            kc.hessian_diagonal(operator, method="exact", verbose=False).value
        ),
        "sampled": operator.flatten(
            kc.hessian_diagonal(operator, method="layerwise", **arguments).value
        ),
        "norm": kc.hessian_frobenius_norm(operator, **arguments).value,
    }


def network():
    """A classifier and 12 samples, the same in every process."""
    keras.utils.set_random_seed(0)
    case = cases.mlp_gelu()
    rng = np.random.default_rng(0)
    x = rng.normal(size=(12, *np.shape(case.x)[1:])).astype("float32")
    return case.model, x, case.model.predict(x, verbose=0) + 0.5


def main():
    """Makes figures of a share of the rows."""
    rank, count, meeting_point, path = sys.argv[1:]
    rank, count = int(rank), int(count)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{meeting_point}", rank=rank, world_size=count
    )
    model, x, y = network()
    mine = slice(rank, None, count)
    # Batches of two in turn: as one process would take them.
    rows = np.arange(12).reshape(-1, 2)[mine].ravel()
    operator = kc.HessianOperator(
        model, x[rows], y[rows], batch_size=2, across_processes=True
    )
    np.savez(path, **figures(operator))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
