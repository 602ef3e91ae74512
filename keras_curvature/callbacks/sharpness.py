"""The largest eigenvalue of the Hessian that an optimizer sees, probe by probe."""

from typing import Any

from keras_curvature.critical import CriticalSearch
from keras_curvature.estimators import DominantSubspace
from keras_curvature.operators import HessianOperator
from keras_curvature.preconditioning import preconditioner
from keras_curvature.stability import optimizer_of, stability_threshold

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
        divisor = preconditioner(optimizer, operator)
        if divisor is None:
            return figures, 0
        seen, spent = divisor.seen(operator), 0
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
