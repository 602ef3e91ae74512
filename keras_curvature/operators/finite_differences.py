"""Hessian-vector products by central differences of the gradient."""

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_curvature import backend
from keras_curvature.backend import Tensor


def difference_product(
    gradient_at: Callable[[list[Tensor]], list[Tensor]],
    values: list[Tensor],
    direction: list[Tensor],
) -> list[Tensor]:
    """`Hv ≈ (g(θ + εv) − g(θ − εv)) / 2ε`.

    The displacement `ε‖v‖` is `0.2 u^{1/3} (1 + ‖θ_v‖)`, with the machine epsilon `u`
    and the norm `‖θ_v‖` of the parameters that `v` moves: about 1e-3 in float32 and
    1e-6 in float64. The power balances truncation against rounding (Nocedal and
    Wright, Numerical Optimization, section 8.1). The factor is ours: five times the
    displacement left errors of 5 to 50 % for the leading eigenvector of a transformer
    in float32.

    The relative error is about 1e-4 to 1e-3 in float32 and 1e-9 in float64. Where the
    gradient jumps (relu, max), a jump within the displacement adds a large error.

    Args:
        gradient_at: function from a list of values to the list of gradients.
        values: list of tensors, the point θ.
        direction: list of tensors, v.

    Returns:
        List of tensors shaped like `values`.
    """
    wide = backend.wide_float()
    step = 0.2 * max(_epsilon(v) for v in values) ** (1 / 3)
    length = ops.sqrt(_sum_of_squares(direction))
    length = ops.where(length > 0, length, ops.ones_like(length))
    unit = [ops.cast(v, wide) / length for v in direction]
    # The parameters' mean square where v moves them, times the number of them:
    # `1 / Σ u⁴`, from 1 for a basis vector to P for random signs.
    moved = _sum_of_squares(
        [ops.cast(x, wide) * u for x, u in zip(values, unit, strict=True)]
    )
    spread = _sum_of_squares([u * u for u in unit])
    size = ops.sqrt(moved / ops.where(spread > 0, spread, ops.ones_like(spread)))
    epsilon = ops.cast(step, wide) * (1 + size) / length

    def shifted(by: Any) -> list[Tensor]:
        return [
            x + ops.cast(by, x.dtype) * v
            for x, v in zip(values, direction, strict=True)
        ]

    up, down = gradient_at(shifted(epsilon)), gradient_at(shifted(-epsilon))
    return [
        (u - d) / ops.cast(2 * epsilon, u.dtype) for u, d in zip(up, down, strict=True)
    ]


def _epsilon(tensor: Tensor) -> float:
    """The distance from 1 to the next number."""
    return float(np.finfo(keras.backend.standardize_dtype(tensor.dtype)).eps)


def _sum_of_squares(tensors: list[Tensor]) -> Tensor:
    """Over all tensors, whose types may differ."""
    wide = backend.wide_float()
    return sum(ops.sum(ops.square(ops.cast(t, wide))) for t in tensors)
