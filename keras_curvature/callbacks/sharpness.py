"""Where an optimizer turns unstable, and the curvature that it sees itself.

Gradient descent with step size η is unstable along directions of curvature above
`2 / η`; networks are trained up to that edge (Cohen et al. 2021, arXiv 2103.00065).
An optimizer that divides the gradient by a diagonal D sees `D^{-1/2} H D^{-1/2}`
instead, and its edge depends on its momentum (Cohen et al. 2022, arXiv 2207.14484).
"""

from typing import Any

import keras

from keras_curvature.callbacks.hand_over import number, optimizer_of
from keras_curvature.critical import CriticalSearch
from keras_curvature.estimators import DominantSubspace
from keras_curvature.operators import HessianOperator, PreconditionedOperator
from keras_curvature.preconditioning import preconditioner, single, steps_as

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


def critical_figures(
    search: CriticalSearch, model: Any, operator: HessianOperator
) -> dict[str, float | str | None]:
    """The sharpness that a step of the optimizer would meet, for a record.

    Args:
        search: goes on from where it was at the last probe.
        model: the Keras model that trains.
        operator: the `HessianOperator` on the probe data.
    """
    optimizer = optimizer_of(model)
    found = search.look(operator, preconditioner(optimizer, operator))
    figures: dict[str, float | str | None] = {
        "critical_sharpness": found.value,
        "critical_sharpness_error": found.error,
        "critical_sharpness_direction": found.direction,
    }
    threshold = stability_threshold(optimizer)
    if threshold is not None:
        figures["stability_threshold"] = threshold
    return figures


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
    optimizer = single(optimizer)
    rate = getattr(optimizer, "learning_rate", None)
    rate = None if rate is None else float(number(rate))
    if rate is None or not rate > 0:
        return None
    if hasattr(optimizer, "stability_threshold"):
        return float(optimizer.stability_threshold())
    if steps_as(optimizer, keras.optimizers.SGD) and not optimizer.nesterov:
        return (2 + 2 * optimizer.momentum) / rate
    if steps_as(optimizer, keras.optimizers.RMSprop) and not optimizer.momentum:
        return 2 / rate
    if steps_as(optimizer, keras.optimizers.Adam):
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
    optimizer = single(optimizer)
    plain = steps_as(optimizer, keras.optimizers.SGD) and not optimizer.momentum
    return stability_threshold(optimizer) if plain else None
