"""An operator in other coordinates than the entries of the variables."""

import contextlib
from typing import Any

from keras import ops

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
        rows = self._by_variable(turned_back, rows)
        if hasattr(self._operator, "times_rows"):
            products = self._operator.times_rows(rows)
        else:
            products = ops.transpose(self._operator @ ops.transpose(rows))
        return self._by_variable(turned, products)

    def _by_variable(self, function: Any, rows: Tensor) -> Tensor:
        count, start, parts = rows.shape[0], 0, []
        layout = self._layout
        for axes, shape, size in zip(
            self._axes, layout.shapes, layout.sizes, strict=True
        ):
            part = ops.reshape(rows[:, start : start + size], (count, *shape))
            parts.append(ops.reshape(function(part, axes, 1), (count, size)))
            start += size
        return ops.concatenate(parts, axis=1)
