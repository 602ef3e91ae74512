"""What an optimizer divides the gradient by before it steps."""

import dataclasses
from typing import Any

import keras
from keras import ops

from keras_curvature import backend
from keras_curvature.axes import Axes
from keras_curvature.backend import Tensor
from keras_curvature.keras_internals import (
    optimizer_variables,
    squared_gradients,
    unwrapped,
)
from keras_curvature.operators import (
    HessianOperator,
    PreconditionedOperator,
    TurnedOperator,
    turned_rows,
)
from keras_curvature.parameters import Layout


@dataclasses.dataclass(frozen=True, eq=False)
class Preconditioner:
    """What an optimizer divides by: a diagonal D in axes Q of the variables, `Q D Qᵀ`.

    Attributes:
        diagonal: flat tensor `(P,)`, positive.
        bears: of each variable, at least 1: how much more curvature momentum lets the
            optimizer bear there than where it bears least.
        axes: of each variable, `None` for those that step along their entries.
        layout: where the variables lie.
    """

    diagonal: Tensor
    bears: list[float]
    axes: list[Axes]
    layout: Layout

    @property
    def stiffness(self) -> Tensor:
        """The diagonal times what each variable bears, `(P,)`."""
        if max(self.bears) == 1:
            return self.diagonal
        bears = backend.array(
            self.bears, keras.backend.standardize_dtype(self.diagonal.dtype)
        )
        return self.diagonal * ops.take(bears, backend.block_numbers(self.layout.sizes))

    def divide(self, gradient: Tensor) -> Tensor:
        """`Q D⁻¹ Qᵀ g` for a flat gradient."""
        (turned,) = turned_rows(gradient[None], self.layout, self.axes)
        rows = (turned / self.diagonal)[None]
        (divided,) = turned_rows(rows, self.layout, self.axes, back=True)
        return divided

    def seen(self, operator: HessianOperator) -> PreconditionedOperator:
        """The Hessian that the optimizer sees, in its axes."""
        turned = TurnedOperator(operator, self.layout, self.axes)
        return PreconditionedOperator(turned, self.stiffness)


def preconditioner(optimizer: Any, operator: HessianOperator) -> Preconditioner | None:
    """What an optimizer divides by, over the operator's variables.

    Args:
        optimizer: a Keras optimizer.
        operator: a `HessianOperator`.

    Returns:
        A `Preconditioner` on the device; `None` for an optimizer that has none, or
        none that is known, and before its first step.
    """
    optimizer = single(optimizer)
    if optimizer is None or not number_of_steps(optimizer):
        return None
    variables = optimizer_variables(optimizer)
    if hasattr(optimizer, "preconditioner"):
        parts = optimizer.preconditioner()
    else:
        parts = _of_squares(optimizer)
    if parts is None or variables is None:
        return None
    numbers = {id(v): i for i, v in enumerate(variables)}
    if not all(id(v) in numbers for v in operator.variables):
        return None
    order = [numbers[id(v)] for v in operator.variables]
    axes = _told(optimizer, "curvature_axes", [None] * len(variables))
    bears = _told(optimizer, "relative_thresholds", [1.0] * len(variables))
    diagonal = operator.flatten([parts[i] for i in order])
    return Preconditioner(
        # Entries that never had a gradient would be infinitely stiff.
        ops.maximum(diagonal, 1e-12),
        [bears[i] for i in order],
        [axes[i] for i in order],
        operator.evaluation.loss.layout,
    )


def _told(optimizer: Any, name: str, otherwise: list[Any]) -> list[Any]:
    """What a method of an optimizer says of each variable, if it has that method."""
    told: list[Any] = getattr(optimizer, name, lambda: otherwise)()
    return told


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
