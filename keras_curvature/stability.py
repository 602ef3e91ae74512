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
from keras_curvature.keras_internals import (
    optimizer_variables,
    squared_gradients,
    unwrapped,
)
from keras_curvature.operators import HessianOperator


def optimizer_of(model: Any) -> Any:
    """The optimizer of a model, `None` for one that was not compiled.

    Args:
        model: a Keras model.
    """
    return getattr(model, "optimizer", None)


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


def rate_of(optimizer: Any) -> float | None:
    """The learning rate now; `None` if there is none, or several.

    Args:
        optimizer: a Keras optimizer, or `None`.
    """
    rate = getattr(optimizer, "learning_rate", None)
    return None if rate is None else float(number(rate))


def stable_product(optimizer: Any) -> float | None:
    """Learning rate times curvature, where an optimizer turns unstable on a quadratic.

    | optimizer | η h |
    |---|---|
    | SGD with momentum β | `2 + 2β` |
    | the same with Nesterov's momentum | `(2 + 2β) / (1 + 2β)` |
    | Adam, AdamW (momentum as an average, β₁) | `(2 + 2β₁) / (1 − β₁)` |
    | RMSprop without momentum | `2` |
    | DiagonalNewton | what its `stability_threshold` says |

    For those with a preconditioner, h is the curvature that they see themselves.

    Args:
        optimizer: a Keras optimizer, or `None`.

    Returns:
        A float, or `None` for an optimizer whose limit is not known.
    """
    optimizer = single(optimizer)
    if hasattr(optimizer, "stability_threshold"):
        rate = rate_of(optimizer)
        return rate * float(optimizer.stability_threshold()) if rate else None
    if _steps_as(optimizer, keras.optimizers.SGD) and optimizer.momentum < 1:
        beta = float(optimizer.momentum)
        return (2 + 2 * beta) / (1 + 2 * beta * bool(optimizer.nesterov))
    if _steps_as(optimizer, keras.optimizers.RMSprop) and not optimizer.momentum:
        return 2.0
    if _steps_as(optimizer, keras.optimizers.Adam):
        beta = float(optimizer.beta_1)
        return (2 + 2 * beta) / (1 - beta)
    return None


def reach(optimizer: Any) -> float:
    """How far a lasting gradient moves the weights in a step, in learning rates.

    `1 / (1 − β)` for SGD, whose momentum β is a sum; 1 where momentum is an average.

    Args:
        optimizer: a Keras optimizer whose `stable_product` is known.
    """
    momentum = _steps_as(single(optimizer), keras.optimizers.SGD)
    return 1 / (1 - float(single(optimizer).momentum)) if momentum else 1.0


def stability_threshold(optimizer: Any) -> float | None:
    """The curvature above which an optimizer is unstable; see `stable_product`.

    Args:
        optimizer: a Keras optimizer.

    Returns:
        A float, or `None` for an optimizer whose threshold is not known.
    """
    product, rate = stable_product(optimizer), rate_of(single(optimizer))
    return product / rate if product and rate and rate > 0 else None


def limit_of_gradient_descent(optimizer: Any) -> float | None:
    """The eigenvalue of H above which plain gradient descent is unstable, `2 / η`.

    Args:
        optimizer: a Keras optimizer.

    Returns:
        A float; `None` for any other optimizer, which has another limit or sees
        another matrix than H.
    """
    optimizer = single(optimizer)
    plain = _steps_as(optimizer, keras.optimizers.SGD) and not optimizer.momentum
    return stability_threshold(optimizer) if plain else None


def divides(optimizer: Any) -> bool:
    """Whether an optimizer divides gradients by a diagonal, once it has stepped.

    Args:
        optimizer: a Keras optimizer.
    """
    optimizer = single(optimizer)
    return hasattr(optimizer, "preconditioner") or any(
        _steps_as(optimizer, kind)
        for kind in (keras.optimizers.Adam, keras.optimizers.RMSprop)
    )


def preconditioner(optimizer: Any, operator: HessianOperator) -> Tensor | None:
    """The diagonal D that an optimizer divides by, over the operator's variables.

    Args:
        optimizer: a Keras optimizer.
        operator: a `HessianOperator`.

    Returns:
        A flat tensor `(P,)` on the device; `None` for an optimizer that has none, or
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
        weights = 1 - optimizer.beta_2 ** number_of_steps(optimizer)
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


def single(optimizer: Any) -> Any:
    """The one optimizer that steps; `None` for several."""
    optimizers = unwrapped(optimizer)
    return optimizers[0] if len(optimizers) == 1 else None
