"""From the diagonal that was measured to the optimizer that steps with it.

An optimizer takes curvature if it has a method `update_hessian_diagonal(diagonals)`,
which is given a list of tensors, one for each trainable variable that the optimizer was
built with. More are used where they are there: `curvature_axes()` gives the axes in
which it wants each variable's diagonal (see `keras_curvature.axes`); `statistics()`
goes into the record, `preconditioner()`, `relative_thresholds()` and
`stability_threshold()` tell what `stability` needs; and `compute_with(on_variables)`,
or else `compile_with(compiler)`, is called before the first of them.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

from keras import ops

from keras_curvature import backend
from keras_curvature.axes import Axes
from keras_curvature.backend import Tensor
from keras_curvature.keras_internals import optimizer_variables, unwrapped
from keras_curvature.operators import HessianOperator
from keras_curvature.parameters import Layout
from keras_curvature.preconditioning import number
from keras_curvature.stability import optimizer_of, rate_of


def wanted_axes(model: Any, operator: HessianOperator) -> list[Axes] | None:
    """The axes in which the optimizers want the diagonal of each variable.

    They move from step to step: to be asked for right before a delivery is measured.

    Args:
        model: the Keras model that trains.
        operator: the operator whose diagonal is delivered.

    Returns:
        Axes by variable of the operator; `None` where all want their entries.
    """
    by_variable: dict[int, Axes] = {}
    for optimizer in _takers(optimizer_of(model)):
        if hasattr(optimizer, "curvature_axes"):
            variables = optimizer_variables(optimizer) or model.trainable_variables
            axes = optimizer.curvature_axes()
            by_variable.update(zip(map(id, variables), axes, strict=True))
    axes = [by_variable.get(id(v)) for v in operator.variables]
    return axes if any(one is not None for one in axes) else None


def hand_over(model: Any, operator: HessianOperator, flat: Tensor) -> None:
    """Gives each optimizer that takes curvature its part of a diagonal.

    Everything stays on the device. Variables that the diagonal does not hold (because
    only some were asked for, or because of layers frozen since) count as flat.

    Args:
        model: the Keras model that trains.
        operator: the operator that the diagonal is of.
        flat: the diagonal, `(P,)`.
    """
    takers = _takers(optimizer_of(model))
    if not takers:
        return
    split = _splitter(operator.evaluation.loss.layout)
    parts = dict(zip(map(id, operator.variables), split(flat), strict=True))
    for optimizer in takers:
        # Part of the model's variables, inside a `MultiOptimizer`.
        variables = optimizer_variables(optimizer) or model.trainable_variables
        optimizer.update_hessian_diagonal(
            [
                parts[id(v)] if id(v) in parts else ops.zeros(v.shape, v.dtype)
                for v in variables
            ]
        )


@functools.lru_cache(maxsize=8)
def _splitter(layout: Layout) -> Callable[[Tensor], list[Tensor]]:
    """`layout.split`, compiled: a small model has many small variables."""
    return backend.compiled(layout.split)


def optimizer_figures(model: Any) -> dict[str, float]:
    """What an optimizer that takes curvature tells about its steps.

    Args:
        model: the Keras model that trains.
    """
    for optimizer in _takers(optimizer_of(model)):
        if hasattr(optimizer, "statistics"):
            return dict(optimizer.statistics())
    return {}


def takes_curvature(model: Any) -> bool:
    """Whether training depends on the curvature that is measured.

    Args:
        model: the Keras model that trains.
    """
    return bool(_takers(optimizer_of(model)))


def last_delivery(model: Any) -> int | None:
    """The step at which the optimizer took in a diagonal; `None` if it took none.

    Saved with the optimizer, so that a training that is resumed knows it too.

    Args:
        model: the Keras model that trains.
    """
    age = optimizer_figures(model).get("curvature_age", math.nan)
    return None if math.isnan(age) else steps_taken(model) - int(age)


def learning_rate(model: Any) -> float | None:
    """The learning rate; `None` if there is none, or several.

    Args:
        model: the Keras model that trains.
    """
    return rate_of(optimizer_of(model))


def steps_taken(model: Any) -> int:
    """The number of steps that the optimizer has counted; 0 without one.

    Args:
        model: the Keras model that trains.
    """
    optimizer = optimizer_of(model)
    return 0 if optimizer is None else int(number(optimizer.iterations))


def batches_per_step(model: Any) -> int:
    """The number of batches whose gradients the optimizer averages into a step.

    Args:
        model: the Keras model that trains.
    """
    return getattr(optimizer_of(model), "gradient_accumulation_steps", None) or 1


def _takers(optimizer: Any) -> list[Any]:
    """The optimizers that take curvature, also inside others."""
    takers = [
        one
        for one in unwrapped(optimizer)
        # One that was given no variables has not been built.
        if hasattr(one, "update_hessian_diagonal") and one.built
    ]
    for one in takers:
        if hasattr(one, "compute_with"):
            one.compute_with(backend.on_variables)
        elif hasattr(one, "compile_with"):
            one.compile_with(backend.compiled)
    return takers
