"""An operator in other coordinates than the entries of the variables."""

import contextlib
from typing import Any

from keras import ops

from keras_curvature import backend
from keras_curvature.axes import Axes, turned, turned_back
from keras_curvature.backend import Tensor
from keras_curvature.parameters import Layout


class TurnedOperator:
    """`Qᵀ H Q` for a symmetric operator H, with axes Q for each variable.

    Args:
        operator: symmetric, with products `A @ V` for tensors.
        layout: where its variables lie.
        axes: of each variable; see `keras_curvature.axes`.
    """

    def __init__(self, operator: Any, layout: Layout, axes: list[Axes]):
        self._operator, self._layout, self._axes = operator, layout, axes
        self.shape = operator.shape
        self.dtype = operator.dtype
        self.place = getattr(operator, "place", None)
        self.still = getattr(operator, "still", contextlib.nullcontext)

    def __matmul__(self, v: Tensor) -> Tensor:
        if len(v.shape) == 1:
            return self.times_rows(v[None])[0]
        return ops.transpose(self.times_rows(ops.transpose(v)))

    def times_rows(self, rows: Tensor) -> Tensor:
        """The products with the rows of a tensor `(k, P)`, as rows."""
        rows = turned_rows(rows, self._layout, self._axes, back=True)
        if hasattr(self._operator, "times_rows"):
            products = self._operator.times_rows(rows)
        else:
            products = ops.transpose(self._operator @ ops.transpose(rows))
        return turned_rows(products, self._layout, self._axes)


def turned_rows(
    rows: Tensor, layout: Layout, axes: list[Axes], back: bool = False
) -> Tensor:
    """Flat vectors in the axes of the variables, or from there back in their entries.

    Args:
        rows: tensor `(k, P)`, a vector a row.
        layout: where the variables lie.
        axes: of each variable.
        back: whether they are in the axes already.
    """
    if all(own is None for own in axes):
        return rows
    function = turned_back if back else turned
    count, found = rows.shape[0], []
    parts = backend.parts(rows, layout.sizes)
    for part, own, shape in zip(parts, axes, layout.shapes, strict=True):
        own_axes = function(ops.reshape(part, (count, *shape)), own, 1)
        found.append(ops.reshape(own_axes, part.shape))
    return ops.concatenate(found, axis=1)
