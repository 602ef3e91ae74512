"""The largest eigenvalue of the Hessian that an optimizer sees, probe by probe."""

from typing import Any

from keras_curvature.estimators import DominantSubspace
from keras_curvature.operators import HessianOperator, PreconditionedOperator
from keras_curvature.stability import (
    optimizer_of,
    preconditioner,
    stability_threshold,
)

#: Products per look at the preconditioned Hessian, whose subspace is kept; and looks in
#: a probe, at most: one is enough unless the optimizer's diagonal has changed much.
MATVECS, LOOKS = 4, 3


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
