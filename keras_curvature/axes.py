"""Axes of variables: a diagonal in other coordinates than the entries.

A variable W that is read as a matrix has axes A for its rows and B for its columns, the
columns of two orthogonal matrices. The coordinates in these axes are `Aᵀ W B`, and a
tensor in them has the shape of W.
"""

import math
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
from keras import ops

from keras_curvature.backend import Tensor

#: A and B, one of which may be `None` for ones; or `None` for the entries themselves.
Axes: TypeAlias = tuple[Tensor | None, Tensor | None] | None


def as_matrix(shape: Sequence[int], axes: Axes) -> tuple[int, int]:
    """Rows and columns of a variable that has axes.

    Args:
        shape: of the variable.
        axes: its axes, not `None`.
    """
    size = math.prod(shape)
    left, right = axes or (None, None)
    if left is not None:
        rows = int(left.shape[0])
    else:
        rows = size // int(right.shape[0]) if right is not None else size
    return rows, size // rows


def turned(x: Tensor, axes: Axes, lead: int = 0) -> Tensor:
    """`Aᵀ X B`, in the shape of x.

    Args:
        x: tensor whose last axes are those of the variable.
        axes: its axes.
        lead: number of axes in front of them.
    """
    if axes is None:
        return x
    left, right = axes
    front, own = list(ops.shape(x)[:lead]), list(x.shape[lead:])
    matrix = ops.reshape(x, [*front, *as_matrix(own, axes)])
    if left is not None:
        matrix = ops.matmul(ops.transpose(ops.cast(left, x.dtype)), matrix)
    if right is not None:
        matrix = ops.matmul(matrix, ops.cast(right, x.dtype))
    return ops.reshape(matrix, [*front, *own])


def turned_back(x: Tensor, axes: Axes, lead: int = 0) -> Tensor:
    """`A X Bᵀ`, in the shape of x; see `turned`."""
    if axes is None:
        return x
    left, right = (None if q is None else ops.transpose(q) for q in axes)
    return turned(x, (left, right), lead)


def spread(x: Tensor, axes: Axes) -> Tensor:
    """The diagonal, in the axes, of a diagonal matrix: `(A²)ᵀ X B²`.

    Args:
        x: the entries of the matrix, shaped like the variable.
        axes: its axes.
    """
    if axes is None:
        return x
    left, right = (None if q is None else ops.square(q) for q in axes)
    return turned(x, (left, right))


def check(axes: Sequence[Any], shapes: Sequence[Sequence[int]]) -> list[Axes]:
    """Axes as the user gave them, one entry for each variable.

    Args:
        axes: list with `None` or a pair of square arrays or `None` for each variable.
        shapes: of the variables.

    Raises:
        ValueError: for another number of entries, or matrices that do not fit.
    """
    if len(axes) != len(shapes):
        raise ValueError(
            "`axes` must hold an entry for each variable: None, or a pair of matrices. "
            f"Received: {len(axes)} entries for {len(shapes)} variables"
        )
    return [
        _checked(given, tuple(shape)) for given, shape in zip(axes, shapes, strict=True)
    ]


def _checked(given: Any, shape: tuple[int, ...]) -> Axes:
    if given is None or all(side is None for side in given):
        return None
    left, right = given
    sizes = [tuple(np.shape(side)) for side in given if side is not None]
    square = all(len(s) == 2 and s[0] == s[1] for s in sizes)
    total = math.prod(s[0] for s in sizes) if square else 0
    fits = math.prod(shape) == total if len(sizes) == 2 else True
    if not (total and fits and math.prod(shape) % total == 0):
        raise ValueError(
            "The axes of a variable must be two square matrices whose sizes multiply "
            "to its number of entries, or one of them and None: one for its rows and "
            f"one for its columns. Received: shapes {sizes} for a variable of shape "
            f"{shape}"
        )
    return left, right
