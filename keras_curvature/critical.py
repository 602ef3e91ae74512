"""Critical sharpness: curvature from a few values of the loss.

Along a step `Δ` that an optimizer would take, let `η_c` be the smallest rate at which
the loss is raised, `L(θ + η Δ) > L(θ)`. The critical sharpness is `λ_c = 2 / η_c`
(arXiv 2601.16979). For a quadratic loss and `Δ = −D⁻¹ g`, with the gradient g and a
diagonal D that the optimizer divides by,

    λ_c = ΔᵀHΔ / ΔᵀDΔ,

which is a mean of the eigenvalues of `D^{-1/2} H D^{-1/2}`, weighted by how much of the
step lies along each: at most the largest of them, and near to it where the step leads
along the sharpest directions, as it does at the edge of stability. It takes no second
derivative, so that it can be had of any model, however large, and with any kernel.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import keras
from keras import ops

from keras_curvature import backend
from keras_curvature.analysis import operator_for
from keras_curvature.backend import Tensor
from keras_curvature.loss import State
from keras_curvature.operators import HessianOperator
from keras_curvature.parameters import Layout, epsilon_of
from keras_curvature.preconditioning import (
    Preconditioner,
    preconditioner,
    single,
    steps_as,
)

#: A loss that is not raised by a rate this much above the first guess never is.
LARGEST = 2.0**30

#: Differences of losses below this many units of rounding tell nothing. What is
#: compiled for one purpose adds up in another order than what is for another.
_UNITS = 64


@dataclasses.dataclass(frozen=True)
class CriticalSharpness:
    """The sharpness that a step meets, and how it was found.

    Attributes:
        value: `λ_c`, the middle of `2 / rates`; zero if the loss was raised by no rate,
            infinite if by each, `None` if that could not be told.
        error: a bound: λ_c is no farther from `value`, if the loss is raised once
            only along the step. `None` if unknown.
        rates: `(low, high)`: the loss was not raised at the lower rate, and was at the
            higher one; infinite if at none. `None` if unknown.
        direction: `"gradient"`, `"preconditioned gradient"` or `"given"`.
        num_losses: how often the loss was computed, the gradient's apart.
        reason: why there is no bracket; `None` if there is one.
    """

    value: float | None
    error: float | None
    rates: tuple[float, float] | None
    direction: str
    num_losses: int
    reason: str | None = None

    def __repr__(self) -> str:
        """The value with its error, or why there is none."""
        along = (
            f"along the {self.direction}" if self.direction != "given" else "along Δ"
        )
        price = f"{along}, {self.num_losses} losses"
        if self.value is None or self.error is None:
            return f"{self.value} ({self.reason}; {price})"
        because = f"; {self.reason}" if self.reason else ""
        return f"{self.value:.4g} ± {self.error:.2g} ({price}{because})"


def critical_sharpness(
    model: Any,
    x: Any = None,
    y: Any = None,
    *,
    direction: Any = "gradient",
    tolerance: float = 0.1,
    initial_rate: float | None = None,
    **options: Any,
) -> CriticalSharpness:
    """The sharpness that a step of training meets, from values of the loss alone.

    `λ_c = 2 / η_c`, where η_c is the smallest rate at which a step along `direction`
    raises the loss (arXiv 2601.16979). For a quadratic loss and the gradient it is the
    curvature along the gradient, and at most the largest eigenvalue of the Hessian.

    ```python
    kc.critical_sharpness(model, x, y)
    # 41.3 ± 1.8 (along the gradient, 9 losses)
    ```

    A rate is doubled or halved until the loss is raised at one and not at its half; the
    interval between them is then divided at its geometric mean until its ends differ by
    less than `tolerance`. Rates below those that were tried are not looked at: where
    the loss is raised, falls and is raised again along the step, it is the value at one
    of these rates. A loss that is no number counts as raised.

    Args:
        model: a compiled Keras model, or a `HessianOperator`.
        x: inputs, or a data set; see `HessianOperator`.
        y: targets.
        direction: `"gradient"` for the negative gradient; `"optimizer"` for the
            negative gradient divided by what the model's optimizer divides it by, where
            that is known (Adam, AdamW, RMSprop, `DiagonalNewton`, after a step; for SGD
            it is one); or a step Δ, as a flat vector or a list of arrays shaped like
            the variables, that is added to them.
        tolerance: relative width of the interval of rates at which to stop.
        initial_rate: the rate to begin with. Defaults to the one at which a loss that
            falls steadily would be gone.
        **options: further arguments of `HessianOperator`. `hvp` has no meaning.

    Returns:
        A `CriticalSharpness`. In units of loss per squared unit of the variables along
        the gradient, and in those of the inverse learning rate for any direction.

    Raises:
        ValueError: for inconsistent data, a direction that does not fit, an optimizer
            whose preconditioner is not known, or numbers that are not positive.
    """
    if not isinstance(model, HessianOperator):
        # Nothing is differentiated twice, and nothing has to be said about that.
        options = {"hvp": "finite_difference", **options}
    operator = operator_for(model, x, y, options)
    search, scale, step = CriticalSearch(tolerance, initial_rate), None, None
    if not isinstance(direction, str):
        step = _step_of(operator, direction)
    elif direction == "optimizer":
        scale = _scale_of(operator)
    elif direction != "gradient":
        raise ValueError(
            '`direction` must be "gradient", "optimizer", or a step. Received: '
            f"direction={direction!r}."
        )
    return search.look(operator, scale, step)


def _step_of(operator: HessianOperator, step: Any) -> Tensor:
    """A step that was given, as a flat tensor."""
    flat = operator.flatten(step) if isinstance(step, (list, tuple)) else step
    with backend.on(operator.place):
        flat = backend.array(flat, operator.dtype.name)
    if tuple(flat.shape) != operator.shape[:1]:
        raise ValueError(
            "`direction` must be a flat vector with an entry for each parameter, or a "
            "list of arrays shaped like the variables. Received: shape "
            f"{tuple(flat.shape)} for {operator!r}."
        )
    return flat


def _scale_of(operator: HessianOperator) -> Preconditioner | None:
    """What the optimizer of an operator's model divides by; `None` for ones."""
    optimizer = getattr(
        getattr(operator.evaluation.loss, "model", None), "optimizer", 0
    )
    scale = preconditioner(optimizer, operator) if optimizer else None
    if scale is None and not steps_as(single(optimizer), keras.optimizers.SGD):
        raise ValueError(
            "It is not known what the optimizer divides the gradient by: it is none of "
            "SGD, Adam, AdamW, RMSprop and DiagonalNewton, has not taken a step, or "
            "does not train all of the variables. Received: direction='optimizer' with "
            f'{optimizer or "no optimizer"!r}. Use direction="gradient", or pass the '
            "step itself."
        )
    return scale


class CriticalSearch:
    """Finds the critical sharpness, from look to look beginning where it was.

    Args:
        tolerance: relative width of the interval of rates at which to stop.
        initial_rate: the rate to begin with at the first look; `None` for a guess.

    Raises:
        ValueError: for numbers that are not positive.
    """

    def __init__(self, tolerance: float = 0.1, initial_rate: float | None = None):
        for name, value in ("tolerance", tolerance), ("initial_rate", initial_rate):
            if value is not None and not 0 < value < math.inf:
                raise ValueError(
                    f"`{name}` must be a positive number. Received: {name}={value!r}."
                )
        self._tolerance = tolerance
        self._guess = initial_rate

    def look(
        self,
        operator: HessianOperator,
        scale: Preconditioner | None = None,
        step: Tensor | None = None,
    ) -> CriticalSharpness:
        """The critical sharpness at the present weights.

        Args:
            operator: a `HessianOperator`.
            scale: what the gradient is divided by; `None` for ones.
            step: the step Δ, `(P,)`, in place of the negative gradient.
        """
        direction = "gradient" if scale is None else "preconditioned gradient"
        direction = direction if step is None else "given"
        with operator.still(), backend.on(operator.place):
            loss, gradient = operator.value_and_gradient()
            if step is None:
                step = -gradient if scale is None else -scale.divide(gradient)
            line = _Line(operator, step, loss.dtype)
            start, fall = _float(loss), -_float(ops.sum(gradient * step))
            value, error, rates, reason = self._search(line, start, fall)
        return CriticalSharpness(
            value, error, rates, direction, line.num_losses, reason
        )

    def _search(
        self, line: "_Line", start: float, fall: float
    ) -> tuple[float | None, float | None, tuple[float, float] | None, str | None]:
        """What `CriticalSharpness` holds, from the loss and how fast it falls."""
        if not (math.isfinite(start) and math.isfinite(fall)):
            return None, None, None, "the loss or its gradient is not a number"
        if fall < 0:
            return math.inf, None, None, "the loss rises from the start along this step"
        if fall == 0:
            return None, None, None, "the gradient along this step is zero"
        # Where the loss would be gone if it fell on; of a quadratic one that stays
        # above zero, a quarter of the critical rate at least.
        scale = abs(start) or 1.0
        most = scale / fall
        # Up to here the loss cannot be seen to fall.
        least = _UNITS * line.epsilon * most
        low, high, rate = 0.0, math.inf, self._guess or most
        while high == math.inf or low == 0.0:
            if line(rate) > start:
                high, rate = rate, rate / 2
            else:
                low, rate = rate, rate * 2
            if low >= LARGEST * most:
                self._guess = low
                return 0.0, 2 / low, (low, high), "the loss is raised by no rate tried"
            if low == 0.0 and high < least:
                break
        # A parabola that is back at its start there has fallen by a quarter of this.
        if high * fall / 4 < _UNITS * line.epsilon * scale:
            self._guess = None
            return None, None, None, "the loss falls by no more than its rounding"
        while high > low * (1 + self._tolerance):
            rate = math.sqrt(low * high)
            if not low < rate < high:
                break  # No number lies between.
            if line(rate) > start:
                high = rate
            else:
                low = rate
        # So that the next look finds it between this rate and twice this rate.
        self._guess = math.sqrt(low * high / 2)
        bounds = 2 / high, 2 / low
        return sum(bounds) / 2, (bounds[1] - bounds[0]) / 2, (low, high), None


class _Line:
    """The loss along a step, as a function of the rate; infinite where it is no number.

    Args:
        operator: a `HessianOperator`, held still.
        step: flat tensor.
        dtype: type of the loss.

    Attributes:
        epsilon: rounding of the loss, relative.
        num_losses: how often it was computed.
    """

    def __init__(self, operator: HessianOperator, step: Tensor, dtype: Any):
        self._evaluation = operator.evaluation
        self._step = step
        self.epsilon = max(
            epsilon_of(keras.backend.standardize_dtype(dtype)),
            self._evaluation.loss.epsilon,
        )
        self.num_losses = 0

    def __call__(self, rate: float) -> float:
        evaluation = self._evaluation
        state, step = evaluation.state(), self._step
        dtype = keras.backend.standardize_dtype(step.dtype)
        along = _along(evaluation.loss.layout)
        moved = along(state.values, step, backend.array(rate, dtype))
        self.num_losses += 1
        loss = _float(evaluation.loss_at(State(moved, state.others)))
        return math.inf if math.isnan(loss) else loss


@functools.lru_cache(maxsize=8)
def _along(layout: Layout) -> Callable[[list[Tensor], Tensor, Tensor], list[Tensor]]:
    """Values of variables, moved along a flat step at a rate; compiled."""

    def along(values: list[Tensor], step: Tensor, rate: Tensor) -> list[Tensor]:
        parts = layout.parted(rate * step).values()
        return [value + part for value, part in zip(values, parts, strict=True)]

    return backend.compiled(along)


def _float(scalar: Tensor) -> float:
    return float(ops.convert_to_numpy(scalar))
