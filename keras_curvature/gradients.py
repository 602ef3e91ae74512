"""What the gradient on the probe data tells, and how far the weights move.

A probe multiplies by the Hessian a dozen times or more; the gradient costs half a
product. The *simple noise scale* (McCandlish et al. 2018, arXiv 1812.06162, section 2.2
and appendix A.1) is

    B = tr(Σ) / |G|²

in samples: Σ is the covariance of the gradients of single samples, G their mean. Steps
of batches much smaller than B are mostly noise, and of much larger ones hardly better.
Of K parts with n_k of the N samples, parts with gradients g_k and a mean ḡ,

    Σ_k (n_k / N) E|g_k|² = |G|² + tr(Σ) K / N        E|ḡ|² = |G|² + tr(Σ) / N

which gives both without bias. It takes a loss that is a mean over samples, and whether
this one is, is seen: the parts' mean is compared with the gradient of the whole.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
from keras import ops

from keras_curvature import backend
from keras_curvature.backend import Tensor
from keras_curvature.evaluation import Evaluation, of_values

#: How far the gradient of the parts may be from that of the whole: what float32 does,
#: relative to the gradient and to the gradients that it is the mean of.
_RELATIVE, _ROUNDING = 1e-3, 1e-5


@dataclasses.dataclass(frozen=True)
class GradientLook:
    """The gradient at one step.

    Attributes:
        gradient: flat tensor `(P,)`, on the device.
        squared_norms: of each variable's part of the gradient, `(V,)`.
        squared_weights: of each variable, `(V,)`.
        squared_updates: of each variable's net change since the look before, divided
            by the number of steps, `(V,)`; `None` at the first look, or at the step of
            the one before.
        noise_scale: the simple noise scale, in samples; `None` where the parts of the
            data don't tell it.
    """

    gradient: Tensor
    squared_norms: np.ndarray
    squared_weights: np.ndarray
    squared_updates: np.ndarray | None
    noise_scale: float | None


class Gradients:
    """Looks at the gradient again and again, and remembers the weights in between.

    Args:
        operator: the `HessianOperator` on the probe data.
    """

    def __init__(self, operator: Any):
        self._operator = operator
        self._before: tuple[int, Tensor] | None = None
        self._parts: Evaluation | None = None
        self._mean_of_parts: Callable[..., Any] | None = None
        self._separable = True

    def look(self, step: int) -> GradientLook:
        """The gradient and the weights as they are now.

        Args:
            step: the number of steps taken so far.
        """
        operator = self._operator
        layout = operator.evaluation.loss.layout
        loss, gradient = operator.value_and_gradient()
        with backend.on(operator.place):
            values = operator.evaluation.state().values
            weights = _joiner(layout)(values)
            steps, before = 0, weights
            if self._before is not None:
                steps, before = step - self._before[0], self._before[1]
            measure = _squares(tuple(layout.sizes))
            norms, sizes, moved = ops.convert_to_numpy(
                measure(gradient, weights, before)
            ).astype("float64")
        self._before = step, weights
        return GradientLook(
            gradient,
            norms,
            sizes,
            moved / steps**2 if steps > 0 else None,
            self._noise_scale(loss, gradient),
        )

    def _noise_scale(self, loss: Tensor, gradient: Tensor) -> float | None:
        data = self._operator.evaluation.data
        parts = data.in_equal_parts(8) if self._separable else None
        if parts is None:
            return None
        if self._parts is None:
            whole = self._operator.evaluation
            self._parts = Evaluation(whole.loss, parts, whole.jit_compile)
            self._mean_of_parts = self._parts.mean_of(self._part)
            # Samples that meet in the statistics of a batch show in the losses
            # already, which compile sooner than gradients.
            losses = (
                float(ops.convert_to_numpy(mean))
                for mean in (loss, self._parts.mean_loss())
            )
            if not math.isclose(*losses, rel_tol=whole.beyond_rounding(_RELATIVE)):
                self._separable = False
                return None
        self._parts.data = parts
        assert self._mean_of_parts is not None  # noqa: S101
        with backend.on(self._operator.place):
            mean, square = self._mean_of_parts()
            found = _compare(gradient, mean, square)
            norm, apart, square = ops.convert_to_numpy(found).astype("float64")
        relative, rounding = map(self._parts.beyond_rounding, (_RELATIVE, _ROUNDING))
        if not apart**0.5 <= relative * norm**0.5 + rounding * square**0.5:
            # No mean over samples, or noise of the layers: other parts, another loss.
            self._separable = False
            return None
        return noise_scale(square, norm, parts.num_batches, parts.num_samples)

    def _part(self, state: Any, batch: Any) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        loss = self._operator.evaluation.loss
        at = of_values(loss, state.others, batch)
        value, _, gradient = backend.gradient(at, dict(enumerate(state.values)))
        flat = loss.layout.joined(list(gradient.values()))
        return value, (flat, ops.sum(ops.square(flat)))


def noise_scale(
    mean_square: float, square_of_mean: float, num_parts: int, num_samples: int
) -> float | None:
    """`tr(Σ) / |G|²` from the gradients of parts.

    Args:
        mean_square: the mean of the parts' squared norms, weighted by their sizes.
        square_of_mean: the squared norm of their mean.
        num_parts: how many parts there are.
        num_samples: samples in all of them.

    Returns:
        A number of samples. `None` where the gradient drowns in its noise, so that its
        estimated square is not positive: the scale is beyond what these samples show.
    """
    trace = (mean_square - square_of_mean) * num_samples / (num_parts - 1)
    square = square_of_mean - trace / num_samples
    if not (square > 0 and math.isfinite(trace)):
        return None
    return max(trace, 0.0) / square


@functools.lru_cache(maxsize=8)
def _joiner(layout: Any) -> Callable[[list[Tensor]], Tensor]:
    """`layout.joined`, compiled."""
    return backend.compiled(layout.joined)


@functools.lru_cache(maxsize=8)
def _squares(sizes: tuple[int, ...]) -> Callable[..., Tensor]:
    """Compiled: squared norms of the blocks of gradient, weights and change."""

    def measure(gradient: Tensor, weights: Tensor, before: Tensor) -> Tensor:
        return ops.concatenate(
            [
                backend.over_blocks("sum", ops.square(flat)[None], sizes)
                for flat in (gradient, weights, weights - before)
            ]
        )

    return backend.compiled(measure)


@backend.compiled
def _compare(whole: Tensor, mean: Tensor, square: Tensor) -> Tensor:
    """Squared norms: of a gradient, of its distance from another, and a third one."""
    return ops.stack(
        [ops.sum(ops.square(whole)), ops.sum(ops.square(whole - mean)), square]
    )
