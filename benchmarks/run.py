"""Runs all benchmarks, or those named: `python benchmarks/run.py matvec_cost …`."""

import importlib
import sys

import measure

BENCHMARKS = (
    "matvec_cost",
    "diagonal_error",
    "batch_normalization",
    "exact_cost",
    "subspace_tracking",
    "lanczos",
    "spectrum_peers",
    "memory",
    "memory_prediction",
    "half_precision",
    "overhead",
    "small_calls",
    "large_models",
    "step_cost",
    "architectures",
    "sequences",
    "critical_sharpness",
    "page",
)


def main(names):
    """Runs benchmarks one after the other, saves and prints their results."""
    for name in names or BENCHMARKS:
        module = importlib.import_module(name)
        rows = list(module.run())
        measure.save(name, rows)
        measure.print_table(module.__doc__.strip().split("\n")[0], rows)


if __name__ == "__main__":
    main(sys.argv[1:])
