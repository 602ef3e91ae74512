"""Looks at the dominant subspace of a Hessian, until a figure is precise enough."""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

from keras_curvature import estimators
from keras_curvature.estimators import DeflatedMoments
from keras_curvature.operators import HessianOperator, TurnedOperator
from keras_curvature.progress import Progress

#: Products of the first look, where a precision is asked for.
_FIRST = 24


def deflated(
    operator: HessianOperator | TurnedOperator,
    judged: str,
    num_matvecs: int | None,
    tolerance: float | None,
    seed: int,
    block_sizes: list[int],
    progress: Progress | None = None,
) -> DeflatedMoments:
    """Figures from a dominant subspace, which is refined as long as need be.

    Args:
        operator: a `HessianOperator`, in other axes perhaps.
        judged: the figure that is wanted: `"trace"`, `"frobenius_norm"` or
            `"diagonal"`. The diagonal is not estimated for others.
        num_matvecs: the budget.
        tolerance: its relative standard error at which to stop.
        seed: seed of the random signs.
        block_sizes: sizes of the variables.
        progress: when it says stop, what is known by then is returned.

    Returns:
        The figures of the last look, with the products of all of them.
    """
    budget = estimators.check_budget(num_matvecs, tolerance)
    first = budget if tolerance is None else min(_FIRST, budget)
    diagonal = judged == "diagonal"
    looks = _looks(operator, first, budget, seed, block_sizes, progress, diagonal)
    for figures, spent in looks:  # noqa: B007
        error = getattr(figures, judged).relative_standard_error
        if tolerance is not None and error is not None and error <= tolerance:
            break
    found: DeflatedMoments = _with_products(figures, spent)
    return found


def _with_products(figures: Any, spent: int) -> Any:
    """Figures, and the estimates that they hold, that took so many products."""
    if isinstance(figures, tuple):
        return tuple(_with_products(each, spent) for each in figures)
    if not dataclasses.is_dataclass(figures) or isinstance(figures, type):
        return figures
    held = {
        field.name: _with_products(getattr(figures, field.name), spent)
        for field in dataclasses.fields(figures)
    }
    return dataclasses.replace(figures, **held | {"num_matvecs": spent})


def _looks(
    operator: HessianOperator | TurnedOperator,
    first: int,
    budget: int,
    seed: int,
    block_sizes: list[int],
    progress: Progress | None = None,
    diagonal: bool = False,
) -> Iterator[tuple[DeflatedMoments, int]]:
    """Looks at an operator, each from the subspace that the last one found.

    Each takes twice the products of the last.

    Args:
        operator: a `HessianOperator`, in other axes perhaps.
        first: products of the first look.
        budget: products of all of them.
        seed: seed of the random signs.
        block_sizes: sizes of the variables.
        progress: when it says stop there are no further looks.
        diagonal: whether they estimate the diagonal too.

    Yields:
        `DeflatedMoments`, and the products spent so far.
    """
    subspace, spent, width = estimators.DominantSubspace(), 0, first
    while not spent or (width >= 2 and not _stopped(progress)):
        told = functools.partial(_told, progress, spent, budget)
        try:
            figures = subspace.update(
                operator, width, seed, block_sizes, diagonal, progress=told
            )
        except KeyboardInterrupt:
            if not (spent and _stopped(progress)):
                raise
            return
        spent += figures.num_matvecs
        yield figures, spent
        if figures.num_matvecs < width:
            return  # Stopped, or exact.
        width = min(2 * width, budget - spent)


def _stopped(progress: Progress | None) -> bool:
    return progress is not None and progress.stopped


def _told(
    progress: Progress | None, before: int, budget: int, done: int, _: int | None
) -> bool:
    """Tells of products after others."""
    return progress is None or progress(before + done, budget)
