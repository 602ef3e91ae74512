"""What `CurvatureMonitor` accepts, and what it says about the rest."""

import inspect
import os

import numpy as np

from keras_curvature.diagonal import METHODS
from keras_curvature.operators import HessianOperator

_DIAGONALS = (*METHODS, None)

#: Further arguments of `HessianOperator` that the monitor passes on.
_OPTIONS = [
    p.name
    for p in inspect.signature(HessianOperator).parameters.values()
    if p.kind == p.KEYWORD_ONLY
]


def check_arguments(
    *,
    update_freq,
    log_dir,
    seed,
    num_matvecs,
    diagonal,
    diagonal_samples,
    spectral_density,
    sharpness,
    top_layers,
    also_log,
    max_overhead,
    on_error,
    verbose,
    options,
):
    """Refuses arguments of the monitor that make no sense.

    Raises:
        ValueError: naming the argument, what it must be and what was received.
    """
    check(
        update_freq in ("auto", "epoch") or is_count(update_freq, 1),
        'must be a positive number of batches, "auto" or "epoch"',
        update_freq=update_freq,
    )
    check(
        is_count(num_matvecs, 0),
        "must be a number of products, or 0 for no norm and no eigenvalue",
        num_matvecs=num_matvecs,
    )
    check(
        is_count(diagonal_samples, 1),
        "must be a positive number of samples",
        diagonal_samples=diagonal_samples,
    )
    check(
        diagonal in _DIAGONALS,
        f"must be one of {', '.join(map(repr, _DIAGONALS))}",
        diagonal=diagonal,
    )
    check(
        isinstance(spectral_density, bool) or is_count(spectral_density, 0),
        "must be True for one at every probe, n for one at every n-th, or False",
        spectral_density=spectral_density,
    )
    check(
        sharpness in (None, "critical"),
        'must be "critical" or None',
        sharpness=sharpness,
    )
    check(
        top_layers is None or is_count(top_layers, 0),
        "must be a number of layers, or None for all",
        top_layers=top_layers,
    )
    check(
        not isinstance(also_log, str) and all(isinstance(k, str) for k in also_log),
        "must be a sequence of keys of the record",
        also_log=also_log,
    )
    check(
        num_matvecs or diagonal is not None or spectral_density or sharpness,
        "leaves nothing to measure together with num_matvecs=0",
        diagonal=diagonal,
    )
    check(
        max_overhead is None or 0 < max_overhead < 1,
        "must be a share of the time between 0 and 1, such as 0.05",
        max_overhead=max_overhead,
    )
    check(
        max_overhead is None or not options.get("across_processes"),
        "must be None with across_processes=True: by the clock, processes would "
        "probe at different steps",
        max_overhead=max_overhead,
    )
    check(on_error in ("warn", "raise"), 'must be "warn" or "raise"', on_error=on_error)
    check(verbose in (0, 1, "auto"), 'must be 0, 1 or "auto"', verbose=verbose)
    check(is_count(seed, 0), "must be a non-negative integer", seed=seed)
    check(
        log_dir is None or isinstance(log_dir, (str, os.PathLike)),
        "must be a path, or None",
        log_dir=log_dir,
    )
    for name, value in options.items():
        check(
            name in _OPTIONS,
            f"is no argument of CurvatureMonitor. Further ones are "
            f"{', '.join(_OPTIONS)}; weights of samples belong in `probe_data`",
            **{name: value},
        )


def unpacked(data):
    """Probe data as `(x, y, sample_weight)`, or the first one or two of them.

    Raises:
        ValueError: for a tuple of another length.
    """
    if not isinstance(data, (tuple, list)):
        return (data,)
    check(
        1 <= len(data) <= 3,
        "must be (x, y), (x, y, sample_weight), or a data set",
        probe_data=f"a {type(data).__name__} of length {len(data)}",
    )
    return tuple(data)


def is_count(value, least):
    """Whether a value is an integer, and not below the least one."""
    return (
        isinstance(value, (int, np.integer))
        and not isinstance(value, bool)
        and value >= least
    )


def check(condition, demand, **argument):
    """Refuses an argument, named by keyword, that does not meet a demand.

    Raises:
        ValueError: saying what it must be and what was received.
    """
    if not condition:
        (name, value), *_ = argument.items()
        raise ValueError(f"`{name}` {demand}. Received: {name}={value!r}.")
