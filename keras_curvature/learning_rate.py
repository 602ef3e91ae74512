"""Which learning rate the curvature suggests, for the optimizer at hand."""

import dataclasses
from collections.abc import Callable
from typing import Any

from keras_curvature import estimators
from keras_curvature.analysis import operator_for
from keras_curvature.estimators.products import ProgressFunction
from keras_curvature.operators import HessianOperator
from keras_curvature.preconditioning import number_of_steps, preconditioner, single
from keras_curvature.progress import Progress
from keras_curvature.stability import (
    divides,
    optimizer_of,
    rate_of,
    reach,
    stable_product,
)
from keras_curvature.text import number, with_error

#: A rate above this share of the limit counts as being at it.
_AT_THE_LIMIT = 0.7

#: Finds the largest eigenvalue of an operator: its value, its bound, and the products.
_Largest = Callable[[Any], tuple[float | None, float | None, int]]


@dataclasses.dataclass(frozen=True)
class LearningRate:
    """A learning rate that the curvature suggests, and what it rests on.

    Attributes:
        value: the learning rate; `None` where nothing can be said.
        reason: why it is this one, or why there is none, in plain sentences.
        limit: the learning rate at which the optimizer turns unstable at the present
            weights, from the eigenvalue and its bound together.
        eigenvalue: the largest eigenvalue of what the optimizer sees: of the Hessian,
            or of `D^{-1/2} H D^{-1/2}` where it divides gradients by a diagonal D.
        eigenvalue_bound: an eigenvalue is no farther away than this.
        num_matvecs: number of products that were spent.
    """

    value: float | None
    reason: str
    limit: float | None = None
    eigenvalue: float | None = None
    eigenvalue_bound: float | None = None
    num_matvecs: int = 0

    def __str__(self) -> str:
        shown = "none" if self.value is None else number(self.value, 2)
        return f"{shown}. {self.reason}"


def suggest_learning_rate(
    model: Any,
    x: Any = None,
    y: Any = None,
    *,
    tolerance: float = 0.01,
    num_matvecs: int | None = None,
    seed: int = 0,
    verbose: bool | str = "auto",
    **options: Any,
) -> LearningRate:
    """Suggests a learning rate for the model's optimizer, and says why.

    With λ the largest eigenvalue of what the optimizer sees, a step of `1 / λ` takes
    the stiffest direction of a quadratic to its minimum. That is what is suggested; for
    SGD with momentum β, whose steps add up, `(1 − β) / λ`. It is at most half of the
    rate at which training turns unstable, which is told beside it: `2 / λ` for gradient
    descent, `(2 + 2β) / λ` with momentum. The room between them is needed, for λ rises
    in most trainings.

    ```python
    model.compile(keras.optimizers.SGD(momentum=0.9), loss)
    suggestion = kc.suggest_learning_rate(model, x, y)
    print(suggestion)                        # the rate, and why
    model.optimizer.learning_rate = suggestion.value
    ```

    SGD can be asked before the first step. Adam, AdamW, RMSprop and `DiagonalNewton`
    divide the gradient by a diagonal D that they learn, and see `D^{-1/2} H D^{-1/2}`
    (Cohen et al. 2022, arXiv 2207.14484): they can be asked after some steps, with
    any learning rate, a small one say.

    All of this is of a quadratic, at the present weights, on the data given: take as
    much of it as you can. Somewhat beyond the limit a network need not diverge: its
    loss rises first, and it may come to a flatter place (Lewkowycz et al. 2020, arXiv
    2003.02218). A training at its limit (the edge of stability, Cohen et al. 2021,
    arXiv 2103.00065) has made λ fit its learning rate, and the limit found is then the
    rate it has. For Adam and its like the suggestion is a cautious one: D follows the
    gradients, and several times as much is often better.

    Args:
        model: a compiled Keras model, or a `HessianOperator` of one.
        x: inputs, or a data set; see `HessianOperator`.
        y: targets.
        tolerance: residual relative to the eigenvalue at which it has converged.
        num_matvecs: budget of products, about. Defaults to ten times P; some twenty
            are usual.
        seed: seed of the start vector.
        verbose: whether to show progress; `"auto"` does if it takes long.
        **options: further arguments of `HessianOperator`.

    Returns:
        A `LearningRate`: `value`, `reason`, `limit`, `eigenvalue`,
        `eigenvalue_bound`, `num_matvecs`. The value is `None` where nothing can be
        said: before the first step of Adam, for optimizers whose limit is not known,
        and where the loss curves up in no direction.

    Raises:
        ValueError: for inconsistent data, or a tolerance that is not positive.
        RuntimeError: if the products are not finite.
    """
    operator = operator_for(model, x, y, options)
    with Progress(operator.evaluation, verbose) as progress:

        def largest(seen: Any) -> tuple[float | None, float | None, int]:
            return find_largest(seen, tolerance, num_matvecs, seed, progress)

        return suggestion(operator, largest)


def find_largest(
    seen: Any,
    tolerance: float,
    num_matvecs: int | None,
    seed: int,
    progress: ProgressFunction,
) -> tuple[float | None, float | None, int]:
    """The largest eigenvalue of an operator, its bound, and the number of products."""
    found = estimators.eigenvalues(
        seen, 1, tolerance, "algebraic", False, seed, num_matvecs, progress
    )
    return float(found.values[0]), float(found.residual_norms[0]), found.num_matvecs


def suggestion(operator: HessianOperator, largest: _Largest) -> LearningRate:
    """What the largest eigenvalue suggests for the optimizer of an operator's model.

    Args:
        operator: a `HessianOperator`.
        largest: finds the largest eigenvalue of the operator, or of what the optimizer
            sees of it: its value, `None` if it is not known, its bound, and the
            products that it took.
    """
    optimizer = optimizer_of(getattr(operator.evaluation.loss, "model", None))
    one = single(optimizer)
    if optimizer is None:
        return LearningRate(None, "There is no optimizer: compile the model with one.")
    if one is None:
        return LearningRate(None, "There are several optimizers, with a rate each.")
    name, product = type(one).__name__, stable_product(one)
    if product is None:
        return LearningRate(None, f"It is not known where {name} turns unstable.")
    seen: Any = operator
    matrix = "the Hessian"
    if divides(one):
        divisor = preconditioner(one, operator)
        if divisor is None and number_of_steps(one):
            return LearningRate(None, f"It is not known what {name} divides by here.")
        if divisor is None:
            return LearningRate(
                None,
                f"{name} divides gradients by what it learns of their size in its "
                "first steps: train for some steps, and ask again.",
            )
        seen = divisor.seen(operator)
        matrix = f"the Hessian as {name} sees it, divided by its averages"
    value, bound, spent = largest(seen)
    unknown = "The largest eigenvalue is not known yet: more products are needed."
    if value is None or bound is None:
        return LearningRate(None, unknown, num_matvecs=spent)
    if value + bound <= 0:
        return LearningRate(
            None,
            "The loss curves up in no direction here, which sets no limit.",
            None,
            value,
            bound,
            spent,
        )
    if bound >= value:
        return LearningRate(None, unknown, None, value, bound, spent)
    # Both on the side of caution: the eigenvalue may be larger by its bound.
    limit, gain = product / (value + bound), reach(one)
    suggested = 1 / (gain * (value + bound))
    steps = "a step of 1 / λ takes"
    if gain > 1:
        steps = f"steps of 1 / ({gain:.3g} λ), which momentum adds up, take"
    reason = (
        f"λ = {with_error(value, bound)} is the largest eigenvalue of {matrix}: {steps}"
        " its direction to the minimum. "
        f"{name} turns unstable at {product:.3g} / λ = {number(limit)}."
    )
    rate = rate_of(one)
    if rate:
        reason += (
            f" The rate now, {rate:.3g}, is at {number(100 * rate / limit, 2)}% of "
            "the limit"
        )
        # At the edge of stability it is λ that has followed the rate.
        reason += (
            ", to which λ has come, as it does in many trainings."
            if rate > _AT_THE_LIMIT * limit
            else "."
        )
    return LearningRate(suggested, reason, limit, value, bound, spent)
