"""What an optimizer divides the gradient by before it steps."""

from typing import Any

import keras
from keras import ops

from keras_curvature import backend
from keras_curvature.backend import Tensor
from keras_curvature.keras_internals import (
    optimizer_variables,
    squared_gradients,
    unwrapped,
)
from keras_curvature.operators import HessianOperator


def preconditioner(optimizer: Any, operator: HessianOperator) -> Tensor | None:
    """The diagonal D that an optimizer divides by, over the operator's variables.

    Args:
        optimizer: a Keras optimizer.
        operator: a `HessianOperator`.

    Returns:
        A flat tensor `(P,)` on the device; `None` for an optimizer that has none, or
        none that is known, and before its first step. One that steps in axes of its
        variables divides by no diagonal.
    """
    optimizer = single(optimizer)
    if optimizer is None or not number_of_steps(optimizer):
        return None
    variables = optimizer_variables(optimizer)
    if _has_axes(optimizer):
        return None
    if hasattr(optimizer, "preconditioner"):
        parts = optimizer.preconditioner()
    else:
        parts = _of_squares(optimizer)
    if parts is None or variables is None:
        return None
    by_variable = dict(zip(map(id, variables), parts, strict=False))
    if not all(id(v) in by_variable for v in operator.variables):
        return None
    flat = operator.flatten([by_variable[id(v)] for v in operator.variables])
    # Entries that never had a gradient would be infinitely stiff.
    return ops.maximum(flat, 1e-12)


def _has_axes(optimizer: Any) -> bool:
    """Whether an optimizer steps in other axes than the entries of its variables."""
    axes = optimizer.curvature_axes() if hasattr(optimizer, "curvature_axes") else []
    return any(one is not None for one in axes)


def _of_squares(optimizer: Any) -> list[Tensor] | None:
    """D of an optimizer that averages squared gradients."""
    squares = squared_gradients(optimizer)
    if not squares:
        return None
    if steps_as(optimizer, keras.optimizers.Adam) and not optimizer.amsgrad:
        weights = 1 - optimizer.beta_2 ** number_of_steps(optimizer)
    elif steps_as(optimizer, keras.optimizers.RMSprop) and not optimizer.centered:
        weights = 1.0
    else:
        return None
    numbers = [backend.array(x, "float32") for x in (weights, optimizer.epsilon)]
    roots: list[Tensor] = _roots(backend.values(squares), *numbers)
    return roots


@backend.compiled
def _roots(squares: list[Tensor], weights: Tensor, epsilon: Tensor) -> list[Tensor]:
    """Roots of debiased averages."""
    return [
        ops.sqrt(v / ops.cast(weights, v.dtype)) + ops.cast(epsilon, v.dtype)
        for v in squares
    ]


def number(scalar: Any) -> Any:
    """A scalar on the host. Adding 0 reads a variable, on whatever replicas it is.

    Args:
        scalar: a variable, a tensor or a number.
    """
    return ops.convert_to_numpy(scalar + 0)


def number_of_steps(optimizer: Any) -> int:
    """The steps that an optimizer has taken.

    Args:
        optimizer: a Keras optimizer.
    """
    return int(number(optimizer.iterations))


def steps_as(optimizer: Any, kind: Any) -> bool:
    """Whether it steps by the rule of this class of Keras'.

    On PyTorch, an optimizer is made of a subclass of the class that was asked for.
    """
    return (
        isinstance(optimizer, kind) and type(optimizer).update_step is kind.update_step
    )


def single(optimizer: Any) -> Any:
    """The one optimizer that steps; `None` for several."""
    optimizers = unwrapped(optimizer)
    return optimizers[0] if len(optimizers) == 1 else None
