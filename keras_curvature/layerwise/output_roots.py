"""Random directions at the model's outputs whose covariance is S.

S is the Hessian of the loss by the outputs. With `E w wᵀ = S`, samples of the
Gauss–Newton matrix `G = Jᵀ S J` are squares, `G_ii = E (Jᵀ w)_i²`, for one backward
pass each. Two kinds of S have a root in closed form, however many outputs there are:

| form | S | a root times signs r |
|---|---|---|
| diagonal: squared errors, … | `diag(s)` | `√s ⊙ r` |
| softmax: cross-entropy | `c (diag p − p pᵀ)` by position | `√c (√p ⊙ r − p (√pᵀ r))` |

The second one is that of labels drawn from the model's own distribution p
(Gauss–Newton–Bartlett; Liu et al. 2023, arXiv 2305.14342), with signs in the place of
labels: both have covariance S, and the signs need not be drawn class by class.

Which form a loss has is not read off its name. Each output's S is multiplied with
random directions, and a form is believed if it tells what comes out.
"""

import dataclasses
import math
from typing import TypeAlias

import numpy as np
from keras import ops

from keras_curvature import backend
from keras_curvature.backend import Tensor
from keras_curvature.data_sets import Batch
from keras_curvature.evaluation import Evaluation
from keras_curvature.layerwise import gauss_newton
from keras_curvature.layerwise.opened import Output, Place
from keras_curvature.layerwise.outputs import OutputSpace
from keras_curvature.layerwise.recording import LayerRecording
from keras_curvature.layerwise.structure import Name, Structure
from keras_curvature.loss import State
from keras_curvature.parameters import full_precision

#: `"diagonal"` or `"softmax"`.
Form: TypeAlias = str

#: Relative difference between what a form tells and what S does, in float32, at most.
#: Losses that clip probabilities are off by about their epsilon, 1e-7.
TOLERANCE = 1e-3


@dataclasses.dataclass(frozen=True)
class Forms:
    """The form of S at each output of a model.

    Attributes:
        forms: in the order of `structure.outputs`.
    """

    forms: tuple[Form, ...]


def find_forms(evaluation: Evaluation, structure: Structure) -> Forms | None:
    """Finds out which forms the Hessian by the outputs has.

    Args:
        evaluation: of a `TrainingLoss`.
        structure: what is known of its layers.

    Returns:
        `None` where an output has none of the forms or has a negative curvature, where
        the loss mixes outputs with each other or with something else (see
        `gauss_newton.coupling`), or where outputs have no fixed size.
    """
    if structure.num_outputs == math.inf:
        return None

    def errors(state: State, batch: Batch, key: Tensor) -> tuple[Tensor, Tensor]:
        recording = LayerRecording(structure, state, batch, cut=True)
        return _errors(recording, key), gauss_newton.coupling(recording, key)

    key = backend.array([0, 0], "int32")
    found, coupling = map(ops.convert_to_numpy, evaluation.at_first(errors, key))
    limit = evaluation.beyond_rounding(TOLERANCE)
    if not coupling <= gauss_newton.beyond_rounding(structure):
        return None
    forms = []
    for diagonal, softmax in found:
        if diagonal <= limit:
            forms.append("diagonal")
        elif softmax <= limit:
            forms.append("softmax")
        else:
            return None
    return Forms(tuple(forms))


def _errors(recording: LayerRecording, key: Tensor) -> Tensor:
    """How far each form is from S, for each output, relatively; `(outputs, 2)`."""
    space = OutputSpace(recording)
    multiply = space.product()
    first, second = (
        recording.random(backend.normal, space.names, backend.fold_in(key, n))
        for n in range(2)
    )
    one = {name: ops.ones_like(v) for name, v in first.items()}
    s, u, w = multiply(one), multiply(first), multiply(second)
    rows = []
    for name in space.names:
        diagonal = _distance(w[name], s[name] * second[name])
        # What is below zero has no root; rounding apart.
        negative = _largest(ops.minimum(s[name], 0)) / _positive(_largest(s[name]))
        scale, p = _softmax(recording, name, first[name], u[name])
        softmax = _distance(w[name], _covariance(scale, p, second[name]))
        below = _largest(ops.minimum(scale, 0)) / _positive(_largest(scale))
        rows.append([ops.maximum(diagonal, negative), ops.maximum(softmax, below)])
    return ops.stack([ops.stack(row) for row in rows])


def _softmax(
    recording: LayerRecording, name: Name, v: Tensor, u: Tensor
) -> tuple[Tensor, Tensor]:
    """The probabilities p, and the c for which `vᵀ S v = c vᵀ (diag p − p pᵀ) v`."""
    p = ops.softmax(recording.taps[name], axis=-1)
    unit = ops.sum(v * _covariance(ops.ones_like(p[..., :1]), p, v), -1, keepdims=True)
    # Of a position that is certain already, or masked, nothing is left.
    tiny = float(np.finfo(full_precision(ops.dtype(p))).tiny) ** 0.5
    sure = unit > tiny
    scale = ops.sum(v * u, -1, keepdims=True) / ops.where(sure, unit, 1)
    return ops.where(sure, scale, 0), p


def _covariance(scale: Tensor, p: Tensor, v: Tensor) -> Tensor:
    """`c (diag p − p pᵀ) v`."""
    return scale * (p * v - p * ops.sum(p * v, axis=-1, keepdims=True))


def _distance(x: Tensor, y: Tensor) -> Tensor:
    return _largest(x - y) / _positive(_largest(x))


def _largest(x: Tensor) -> Tensor:
    return ops.cast(ops.max(ops.abs(x)), "float32")


def _positive(x: Tensor) -> Tensor:
    return ops.where(x > 0, x, 1)


class Roots:
    """Draws of `w` with covariance S, at a recorded model's outputs; while tracing.

    Args:
        recording: a `LayerRecording` with outputs.
        forms: the forms of S.
    """

    def __init__(self, recording: LayerRecording, forms: Forms):
        space = OutputSpace(recording)
        self._recording, self._names = recording, space.names
        multiply = space.product()
        self._roots: dict[Place | Output, tuple[Tensor, Tensor | None]] = {}
        # One product serves all: what the loss does not mix, a joint one does not.
        v = {
            name: ops.ones_like(recording.point[name])
            if form == "diagonal"
            else _alternating(recording.point[name])
            for name, form in zip(self._names, forms.forms, strict=True)
        }
        products = multiply(v)
        for name, form in zip(self._names, forms.forms, strict=True):
            u = products[name]
            if form == "diagonal":
                self._roots[name] = ops.sqrt(ops.maximum(u, 0)), None
            else:
                scale, p = _softmax(recording, name, v[name], u)
                self._roots[name] = ops.sqrt(ops.maximum(scale, 0)), p

    def __call__(self, key: Tensor) -> dict[Name, Tensor]:
        """A direction at the outputs.

        Args:
            key: a key.
        """
        signs = self._recording.random(backend.signs, self._names, key)
        drawn: dict[Name, Tensor] = {}
        for name, (root, p) in self._roots.items():
            r = signs[name]
            if p is None:
                drawn[name] = root * r
            else:
                half = ops.sqrt(p)
                along = ops.sum(half * r, axis=-1, keepdims=True)
                drawn[name] = root * (half * r - p * along)
        return drawn


def _alternating(x: Tensor) -> Tensor:
    """Entries `1, −1, 2, −2, …` along the last axis, which tell c at any p."""
    count = x.shape[-1]
    numbers = np.arange(count)
    row = (1 - 2 * (numbers % 2)) * (1 + numbers // 2) / (1 + count // 2)
    return ops.broadcast_to(ops.cast(row, x.dtype), ops.shape(x))
