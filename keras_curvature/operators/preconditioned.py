"""An operator seen through a diagonal preconditioner."""

import contextlib
from typing import Any

from keras import ops

from keras_curvature.backend import Tensor


class PreconditionedOperator:
    """`D^{-1/2} H D^{-1/2}` for a symmetric operator H and a positive diagonal D.

    An optimizer that steps with `−η D⁻¹ g` sees the curvature of this operator: it is
    stable where the largest eigenvalue is below `2 / η` (Cohen et al. 2022, "Adaptive
    gradient methods at the edge of stability", arXiv 2207.14484).

    Args:
        operator: symmetric, with products `A @ V` for tensors.
        diagonal: tensor `(P,)`, positive.
    """

    def __init__(self, operator: Any, diagonal: Tensor):
        self._operator = operator
        self._scale = diagonal**-0.5
        self.shape = operator.shape
        self.dtype = operator.dtype
        self.place = getattr(operator, "place", None)
        self.still = getattr(operator, "still", contextlib.nullcontext)

    def __matmul__(self, v: Tensor) -> Tensor:
        scale = self._scale if len(v.shape) == 1 else self._scale[:, None]
        return scale * (self._operator @ (scale * v))

    def times_rows(self, rows: Tensor) -> Tensor:
        """The products with the rows of a tensor `(k, P)`, as rows."""
        if not hasattr(self._operator, "times_rows"):
            return ops.transpose(self @ ops.transpose(rows))
        return self._scale * self._operator.times_rows(self._scale * rows)
