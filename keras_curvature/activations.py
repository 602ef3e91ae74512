"""Curvature by the layers' outputs: which activations tolerate rounding."""

import dataclasses
import math
from typing import Any

from keras import ops

from keras_curvature import estimators
from keras_curvature.analysis import operator_for
from keras_curvature.diagonal import (
    AFFORDABLE_MATVECS,
    LAYERWISE_SAMPLES,
    MAX_MATVECS,
    check_affordable,
    check_choice,
)
from keras_curvature.estimators import Estimate, Moments
from keras_curvature.layerwise import ActivationDiagonal
from keras_curvature.loss import TrainingLoss
from keras_curvature.operators import HessianOperator
from keras_curvature.progress import Progress

#: Keeps the draws apart from those of other estimators.
_PURPOSE = 5


def activation_curvature(
    model: Any,
    x: Any = None,
    y: Any = None,
    *,
    method: str = "auto",
    num_matvecs: int | None = None,
    tolerance: float | None = None,
    seed: int = 0,
    max_matvecs: int = MAX_MATVECS,
    verbose: bool | str = "auto",
    **options: Any,
) -> Estimate:
    """The diagonal of the Hessian of the loss by the layers' outputs, unit by unit.

    For a unit c of a layer, that is a unit of `Dense` or a channel of a convolution,

        h_c = Σ_n Σ_t ∂²L/∂z_ntc²

    summed over the samples n, over the positions t (pixels, steps of a sequence) and
    over all uses of the layer. L is the training loss, a mean over the samples, and so
    h_c is the mean over the samples of what one sample's own loss has for a sum over t.
    z is the layer's *linear output*, in front of its activation. A unit that a relu
    has cut off counts nothing.

    Noise of variance σ_c² in all entries of unit c raises the loss by `½ Σ_c h_c σ_c²`
    to second order. Rounding to steps of Δ has `σ² = Δ² / 12`: layers with large sums
    need the finer steps (Dong et al. 2020, "HAWQ-V2", arXiv 1911.03852, choose bits for
    weights and activations so).

    ```python
    estimate = kc.activation_curvature(model, x, y)
    for layer, h in estimate.value.items():
        print(layer, h.sum())
    ```

    All layers with a `LayerRule` are looked at, whether they are trained or not. A
    layer within a loop (`RNN`) has no outputs that could be reached.

    | `method` | what it does | price in products |
    |---|---|---|
    | `"exact"` | products with the unit vectors of a sample's outputs | one per entry |
    | `"hutchinson"` | random signs at all outputs at once | `num_matvecs` |

    Args:
        model: a compiled Keras model, or a `HessianOperator` of one.
        x: inputs, or a data set; see `HessianOperator`.
        y: targets.
        method: see the table. `"auto"` is exact where that takes no more products
            than `num_matvecs` allows, or 64 without it.
        num_matvecs: number of products of the random method. Defaults to 8, or to
            1024 with a tolerance. Each draws signs for every sample and position, so
            that sums over many of them are precise after a few.
        tolerance: relative standard error `‖errors‖ / ‖diagonal‖` at which to stop.
        seed: seed of the random signs.
        max_matvecs: an exact diagonal that takes more products is refused.
        verbose: whether to show progress; `"auto"` does if it takes long.
        **options: further arguments of `HessianOperator`. `variables` makes no
            difference.

    Returns:
        An `Estimate` whose value and standard error are dictionaries of NumPy arrays
        by the path of the layer, in units of loss per squared unit of the output. An
        array is shaped like the layer's units: `(units,)`, or `(heads, features)`
        for the projections of an attention. A layer with several linear outputs, such
        as `SeparableConv2D`, has an entry for each, `path:0`, `path:1`. Its `blocks`
        are the sums of the layers' entries, each with its own standard error.

    Raises:
        ValueError: for an unknown method, a model without layers that have a rule, a
            plain function, `hvp="finite_difference"`, or an exact diagonal beyond
            `max_matvecs` or where the samples of a batch interact.
    """
    check_choice(method, ("auto", "exact", "hutchinson"))
    operator = operator_for(model, x, y, options)
    _check(operator)
    with operator.still(), Progress(operator.evaluation, verbose) as progress:
        diagonal = operator.evaluation.once(ActivationDiagonal)
        if not diagonal.shapes:
            raise ValueError(
                "No layer of the model has a rule, so that there are no outputs to "
                f"look at. Received: {operator!r}. Write a `LayerRule` for a layer "
                "of your own, and register it with `register_layer_rule`."
            )
        budget = AFFORDABLE_MATVECS if num_matvecs is None else num_matvecs
        if method == "exact" or (method == "auto" and diagonal.num_matvecs <= budget):
            moments = _exact(operator, diagonal, max_matvecs, progress)
        else:
            if num_matvecs is None and tolerance is None:
                num_matvecs = LAYERWISE_SAMPLES
            key = estimators.seed_key(seed, _PURPOSE)
            moments = estimators.sampled_moments(
                lambda start, width: diagonal.samples(key, start, width),
                num_matvecs,
                tolerance,
                diagonal.sizes,
                progress,
                operator.place,
            )
    found: Any = moments.diagonal
    error = found.standard_error
    result: Estimate = dataclasses.replace(
        found,
        value=diagonal.by_layer(ops.convert_to_numpy(found.value)),
        standard_error=None
        if error is None
        else diagonal.by_layer(ops.convert_to_numpy(error)),
        blocks=moments.trace.blocks,
    )
    return result


def _check(operator: HessianOperator) -> None:
    """Refuses what has no layers to open."""
    if operator.hvp != "tape":
        raise ValueError(
            "Curvature by the layers' outputs needs second derivatives of the model's "
            f'operations. Received: an operator with hvp={operator.hvp!r}; use "tape".'
        )
    if not isinstance(operator.evaluation.loss, TrainingLoss):
        raise ValueError(
            "Curvature by the layers' outputs needs a Keras model. Received: the "
            f"operator of a plain function, {operator!r}. Make the outputs parameters "
            "of the function, and use `hessian_diagonal`."
        )


def _exact(
    operator: HessianOperator,
    diagonal: ActivationDiagonal,
    max_matvecs: int,
    progress: Progress,
) -> Moments:
    """The diagonal from products with unit vectors."""
    cost = diagonal.num_matvecs
    if diagonal.samples_interact:
        raise ValueError(
            "The samples of a batch interact (BatchNormalization with statistics of "
            "the batch, or a layer that mixes it), and one product does not tell them "
            'apart. Received: method="exact". Use method="hutchinson", or '
            "training=False for the model as it predicts."
        )
    if cost == math.inf:
        raise ValueError(
            "The outputs of some layers have no fixed size. Received: "
            'method="exact". Use method="hutchinson", or pad the sequences.'
        )
    check_affordable(int(cost), max_matvecs, 'method="hutchinson"')
    progress.announce(int(cost))
    return estimators.moments_of_diagonal(
        diagonal.exact(), int(cost), diagonal.sizes, operator.place
    )
