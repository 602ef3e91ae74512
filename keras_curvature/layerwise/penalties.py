"""What acts on variables directly and not through their layers: penalties."""

import math
from collections.abc import Callable
from typing import Any

import keras
from keras import ops

from keras_curvature import backend
from keras_curvature.axes import Axes, spread, turned, turned_back
from keras_curvature.backend import Tensor
from keras_curvature.layerwise.recording import LayerRecording
from keras_curvature.parameters import epsilon_of


def penalty(recording: LayerRecording, i: int) -> Tensor:
    """The Hessian of a variable's penalty times ones: its diagonal if it is diagonal.

    Zero for a variable without one. While tracing.
    """
    value = recording.value(i)
    if i not in recording.point:
        return ops.zeros_like(value)
    return recording.product([i], [i])({i: ops.ones_like(value)})[i]


def off_diagonal(recording: LayerRecording, i: int, key: Tensor) -> Tensor:
    """Relative size of what a penalty's Hessian has off its diagonal, while tracing."""
    multiply = recording.product([i], [i])
    return _off_diagonal(lambda v: multiply({i: v})[i], recording.value(i), key, i)


def exact_penalties(recording: LayerRecording) -> list[Tensor]:
    """`exact_penalty` of each variable."""
    key = backend.array([0, 0], "int32")
    count = len(recording.structure.loss.variables)
    return [exact_penalty(recording, i, key) for i in range(count)]


def exact_penalty(recording: LayerRecording, i: int, key: Tensor) -> Tensor:
    """The diagonal of a penalty's Hessian, whether it is diagonal or not, in its axes.

    Of a variable that no rule covers only the regularizer is known to be a penalty.
    While tracing.
    """
    value, variable = recording.value(i), recording.structure.loss.variables[i]
    covered = i in recording.structure.uses_of
    if covered and i in recording.point:
        multiply = recording.product([i], [i])
    elif not covered and variable.regularizer and recording.structure.loss.is_compiled:
        regularizer = variable.regularizer
        alone = backend.record(lambda p: (regularizer(p[i]), {}), {i: value})
        multiply = alone.product([i], [i])
    else:
        return ops.zeros_like(value)
    return _exact(lambda v: multiply({i: v})[i], value, key, i, recording.axes[i])


def _off_diagonal(
    multiply: Callable[[Tensor], Tensor], value: Tensor, key: Tensor, i: int
) -> Tensor:
    """Two directions of signs give the same diagonal if there is nothing else."""
    estimates = []
    for number in range(2):
        sign_key = backend.fold_in(backend.fold_in(key, 3 + number), i)
        v = backend.signs(ops.shape(value), sign_key, value.dtype)
        estimates.append(v * multiply(v))
    scale = ops.max(ops.abs(estimates[0]))
    distance = ops.max(ops.abs(estimates[0] - estimates[1]))
    return ops.where(scale > 0, distance / ops.where(scale > 0, scale, 1), 0)


def _exact(
    multiply: Callable[[Tensor], Tensor], value: Tensor, key: Tensor, i: int, axes: Axes
) -> Tensor:
    """By ones where that is right, which is decided when it runs."""
    size = math.prod(value.shape)

    def entry(j: Any) -> list[Tensor]:
        e = ops.reshape(ops.one_hot(j, size, dtype=value.dtype), value.shape)
        return [e * turned(multiply(turned_back(e, axes)), axes)]

    def by_basis() -> Tensor:
        return backend.sum_range(entry, size, max(1, min(256, 2**20 // size)))[0]

    ones = multiply(ops.ones_like(value))
    dtype = keras.backend.standardize_dtype(value.dtype)
    off = _off_diagonal(multiply, value, key, i)
    diagonal = off <= epsilon_of(dtype) ** (2 / 3)
    return ops.cond(diagonal, lambda: spread(ones, axes), by_basis)
