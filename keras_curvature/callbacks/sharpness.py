"""Where an optimizer turns unstable, and the curvature that it sees itself.

Gradient descent with step size η is unstable along directions of curvature above
`2 / η`; networks are trained up to that edge (Cohen et al. 2021, arXiv 2103.00065).
An optimizer that divides the gradient by a diagonal D sees `D^{-1/2} H D^{-1/2}`
instead, and its edge depends on its momentum (Cohen et al. 2022, arXiv 2207.14484).
"""

from typing import Any

import keras
from keras import ops

from keras_curvature import backend
from keras_curvature.backend import Tensor
from keras_curvature.callbacks.hand_over import number, optimizer_of
from keras_curvature.estimators import DominantSubspace
from keras_curvature.keras_internals import (
    optimizer_variables,
    squared_gradients,
    unwrapped,
)
from keras_curvature.operators import HessianOperator, PreconditionedOperator

#: Products per look at the preconditioned Hessian, whose subspace is kept; and looks in
#: a probe, at most: one is enough unless the optimizer's diagonal has changed much.
MATVECS, LOOKS = 4, 3

#: An eigenvalue has converged when its bound is no more than this share of it.
CONVERGED = 0.25


class Sharpness:
    """Follows the largest eigenvalue of the Hessian that an optimizer sees.

    Args:
        seed: seed of the random directions.
    """

    def __init__(self, seed: int):
        self._seed = seed
        self._subspace = DominantSubspace()

    def look(
        self, model: Any, operator: HessianOperator
    ) -> tuple[dict[str, float | None], int]:
        """The figures for a record, and the number of products spent on them.

        Args:
            model: the Keras model that trains.
            operator: the `HessianOperator` on the probe data.
        """
        optimizer = optimizer_of(model)
        threshold = stability_threshold(optimizer)
        figures: dict[str, float | None] = {}
        if threshold is not None:
            figures["stability_threshold"] = threshold
        diagonal = preconditioner(optimizer, operator)
        if diagonal is None:
            return figures, 0
        seen, spent = PreconditionedOperator(operator, diagonal), 0
        key = "hessian_preconditioned_max_eigenvalue"
        for _ in range(LOOKS):
            found = self._subspace.update(seen, MATVECS, (self._seed, 3))
            spent += found.num_matvecs
            if not len(found.eigenvalues):
                continue
            top = found.eigenvalues.argmax()
            value, bound = found.eigenvalues[top], float(found.residual_norms[top])
            # What lies within its bound of zero, or below, is something else as yet.
            figures[key] = float(value) if bound < value else None
            figures[f"{key}_error"] = bound
            if figures[key] is not None:
                break
        return figures, spent


def stability_threshold(optimizer: Any) -> float | None:
    """The curvature above which an optimizer is unstable on a quadratic.

    | optimizer | threshold |
    |---|---|
    | SGD with momentum β | `(2 + 2β) / η` |
    | Adam, AdamW (momentum as an average, β₁) | `(2 + 2β₁) / ((1 − β₁) η)` |
    | RMSprop without momentum | `2 / η` |
    | DiagonalNewton | what its `stability_threshold` says |

    Args:
        optimizer: a Keras optimizer.

    Returns:
        A float, or `None` for an optimizer whose threshold is not known.
    """
    optimizer = _single(optimizer)
    rate = getattr(optimizer, "learning_rate", None)
    rate = None if rate is None else float(number(rate))
    if rate is None or not rate > 0:
        return None
    if hasattr(optimizer, "stability_threshold"):
        return float(optimizer.stability_threshold())
    if _steps_as(optimizer, keras.optimizers.SGD) and not optimizer.nesterov:
        return (2 + 2 * optimizer.momentum) / rate
    if _steps_as(optimizer, keras.optimizers.RMSprop) and not optimizer.momentum:
        return 2 / rate
    if _steps_as(optimizer, keras.optimizers.Adam):
        beta = optimizer.beta_1
        return (2 + 2 * beta) / ((1 - beta) * rate)
    return None


def stability_ratio(record: dict[str, Any]) -> float | None:
    """How near an optimizer is to where it turns unstable, from a record.

    Args:
        record: one with the figures of this module, and of the Hessian itself.

    Returns:
        The largest eigenvalue that the optimizer sees over its threshold. `None` where
        one of them is not known, or the eigenvalue's bound is not yet below a quarter
        of it.
    """
    threshold = record.get("stability_threshold")
    seen = "hessian_preconditioned_max_eigenvalue"
    if f"{seen}_error" not in record:
        seen = "hessian_max_eigenvalue"
    value, bound = record.get(seen), record.get(f"{seen}_error")
    if threshold is None or value is None or bound is None:
        return None
    return value / threshold if bound <= CONVERGED * value else None


def limit_of_gradient_descent(optimizer: Any) -> float | None:
    """The eigenvalue of H above which plain gradient descent is unstable, `2 / η`.

    Args:
        optimizer: a Keras optimizer.

    Returns:
        A float; `None` for any other optimizer, which has another limit or sees
        another matrix than H.
    """
    optimizer = _single(optimizer)
    plain = _steps_as(optimizer, keras.optimizers.SGD) and not optimizer.momentum
    return stability_threshold(optimizer) if plain else None


def preconditioner(optimizer: Any, operator: HessianOperator) -> Tensor | None:
    """The diagonal D that an optimizer divides by, over the operator's variables.

    Args:
        optimizer: a Keras optimizer.
        operator: a `HessianOperator`.

    Returns:
        A flat tensor `(P,)` on the device; `None` for an optimizer that has none, or
        none that is known, and before its first step.
    """
    optimizer = _single(optimizer)
    if optimizer is None or not number(optimizer.iterations):
        return None
    variables = optimizer_variables(optimizer)
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


def _of_squares(optimizer: Any) -> list[Tensor] | None:
    """D of an optimizer that averages squared gradients."""
    squares = squared_gradients(optimizer)
    if not squares:
        return None
    if _steps_as(optimizer, keras.optimizers.Adam) and not optimizer.amsgrad:
        weights = 1 - optimizer.beta_2 ** int(number(optimizer.iterations))
    elif _steps_as(optimizer, keras.optimizers.RMSprop) and not optimizer.centered:
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


def _steps_as(optimizer: Any, kind: Any) -> bool:
    """Whether it steps by the rule of this class of Keras'.

    On PyTorch, an optimizer is made of a subclass of the class that was asked for.
    """
    return (
        isinstance(optimizer, kind) and type(optimizer).update_step is kind.update_step
    )


def _single(optimizer: Any) -> Any:
    """The one optimizer that steps; `None` for several."""
    optimizers = unwrapped(optimizer)
    return optimizers[0] if len(optimizers) == 1 else None
