"""Where an optimizer turns unstable, and the curvature that it sees itself.

Gradient descent with step size η is unstable along directions of curvature above
`2 / η`; networks are trained up to that edge (Cohen et al. 2021, arXiv 2103.00065).
An optimizer that divides the gradient by a diagonal D sees `D^{-1/2} H D^{-1/2}`
instead, and its edge depends on its momentum (Cohen et al. 2022, arXiv 2207.14484).
"""

from typing import Any

import keras

from keras_curvature.preconditioning import number, single, steps_as


def optimizer_of(model: Any) -> Any:
    """The optimizer of a model, `None` for one that was not compiled.

    Args:
        model: a Keras model.
    """
    return getattr(model, "optimizer", None)


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
    if steps_as(optimizer, keras.optimizers.SGD) and optimizer.momentum < 1:
        beta = float(optimizer.momentum)
        return (2 + 2 * beta) / (1 + 2 * beta * bool(optimizer.nesterov))
    if steps_as(optimizer, keras.optimizers.RMSprop) and not optimizer.momentum:
        return 2.0
    if steps_as(optimizer, keras.optimizers.Adam):
        beta = float(optimizer.beta_1)
        return (2 + 2 * beta) / (1 - beta)
    return None


def reach(optimizer: Any) -> float:
    """How far a lasting gradient moves the weights in a step, in learning rates.

    `1 / (1 − β)` for SGD, whose momentum β is a sum; 1 where momentum is an average.

    Args:
        optimizer: a Keras optimizer whose `stable_product` is known.
    """
    momentum = steps_as(single(optimizer), keras.optimizers.SGD)
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
    plain = steps_as(optimizer, keras.optimizers.SGD) and not optimizer.momentum
    return stability_threshold(optimizer) if plain else None


def divides(optimizer: Any) -> bool:
    """Whether an optimizer divides gradients by a diagonal, once it has stepped.

    Args:
        optimizer: a Keras optimizer.
    """
    optimizer = single(optimizer)
    return hasattr(optimizer, "preconditioner") or any(
        steps_as(optimizer, kind)
        for kind in (keras.optimizers.Adam, keras.optimizers.RMSprop)
    )
