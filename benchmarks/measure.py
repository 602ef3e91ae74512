"""Timing side by side, and where the results go."""

import importlib.metadata
import json
import os
import pathlib
import platform
import resource
import time

import keras
import numpy as np
from keras import ops

RESULTS = pathlib.Path(__file__).parent / "results"

_PACKAGES = (
    "tensorflow",
    "jax",
    "keras",
    "numpy",
    "torch",
    "backpack-for-pytorch",
    "curvlinops-for-pytorch",
    "pyhessian",
)


def median_seconds(functions, rounds=15, warm_up=2):
    """Median seconds of several functions: a dictionary; see `all_seconds`."""
    seconds = all_seconds(functions, rounds, warm_up)
    return {name: float(np.median(times)) for name, times in seconds.items()}


def all_seconds(functions, rounds, warm_up):
    """Seconds of several functions, measured in turn so that load is shared.

    Args:
        functions: dictionary from name to a function without arguments that returns
            when its work is done.
        rounds: how often each is timed.
        warm_up: how often each is run before that (compilation).

    Returns:
        Dictionary from name to a list of seconds.
    """
    for function in functions.values():
        for _ in range(warm_up):
            function()
    seconds = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def on_host(tensor):
    """A tensor as a NumPy array: what waits until it is computed."""
    return ops.convert_to_numpy(tensor)


def peak_bytes():
    """The largest memory that this process has taken."""
    # On Linux in KiB.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def environment():
    """What the figures depend on besides the code."""
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "backend": keras.backend.backend(),
        "packages": versions,
        "date": time.strftime("%Y-%m-%d"),
    }


def save(name, results):
    """Writes results with their environment to `results/<name>.json`."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    content = {"environment": environment(), "results": results}
    path.write_text(json.dumps(content, indent=2) + "\n")


def print_table(title, rows):
    """Prints dictionaries as a table; a row need not have all of its columns."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    cells = [[_cell(row.get(c)) for c in columns] for row in rows]
    widths = [max(map(len, col)) for col in zip(columns, *cells, strict=True)]
    print(f"\n{title}")
    for line in ([*columns], *cells):
        print("  ".join(c.rjust(w) for c, w in zip(line, widths, strict=True)))


def _cell(value):
    if value is None:
        return "-"
    return f"{value:.3g}" if isinstance(value, float) else str(value)
