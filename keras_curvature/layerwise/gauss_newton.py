"""The Gauss–Newton part of the Hessian, over the layers' outputs.

With `f` the model's outputs (in front of a final activation) and `S_n` the
Hessian of the loss by the outputs of sample n, the Gauss–Newton matrix is
`G = Σ_n (∂f_n/∂θ)ᵀ S_n (∂f_n/∂θ)`: what remains of H when the model's own curvature
is left out. For a model that is piecewise linear between a layer and its outputs
(relu, max-pooling, residual sums), both agree within that layer.
"""

import math
from collections.abc import Sequence
from typing import Any

from keras import ops

from keras_curvature import backend
from keras_curvature.backend import Tensor
from keras_curvature.layerwise.opened import Place
from keras_curvature.layerwise.outputs import UNKNOWN_SIZE, OutputSpace, flat_samples
from keras_curvature.layerwise.recording import LayerRecording
from keras_curvature.layerwise.rules import stacked_products
from keras_curvature.layerwise.structure import Name, Structure

#: Bound for the elements of all outputs' rows at the layers (64 MiB in float32);
#: beyond it, they are computed a few at a time.
ROWS_ELEMENTS = 2**24


def diagonal(recording: LayerRecording, variables: list[int]) -> dict[int, Tensor]:
    """The exact diagonal of the Gauss–Newton matrix, in the variables' axes.

    `Σ_n Σ_c (J_nᵀ a_nc) ⊙ (J_nᵀ b_nc)` with the rows `a_c = ∂f_c/∂z` and
    `b_c = Σ_d S_cd ∂f_d/∂z`: no matrix has to be factorized.

    Args:
        recording: a `LayerRecording` with outputs.
        variables: numbers of the variables to return it for; all act through layer
            outputs.

    Returns:
        Dictionary from the number of a variable to a tensor of its shape.
    """
    if not variables:
        return {}
    space = OutputSpace(recording)
    paths = {i: recording.paths_in_axes(i) for i in variables}
    wanted = sorted({place for uses in paths.values() for _, place in uses})
    shifts = {place: recording.point[place] for place in wanted}
    # One use at one position, along entries: products of rows may be summed before
    # they are multiplied by the inputs.
    pointwise = {
        i: uses[0]
        for i, uses in paths.items()
        if len(uses) == 1
        and recording.axes[i] is None
        and shifts[uses[0][1]].shape[0]
        and uses[0][0].pointwise(shifts[uses[0][1]].shape)
    }
    others = [i for i in variables if i not in pointwise]
    summed = sorted({place for _, place in pointwise.values()})
    multiply, back = space.product(), space.back(list(wanted))

    def of_others(a: Any, b: Any) -> list[Tensor]:
        return [
            stacked_products(
                [path for path, _ in paths[i]],
                [a[place] for _, place in paths[i]],
                [b[place] for _, place in paths[i]],
            )
            for i in others
        ]

    def row(c: Any) -> Tensor:
        carried = back(space.basis(c))
        return ops.concatenate([flat_samples(carried[p]) for p in wanted], axis=1)

    def few_rows(c: Any) -> list[Tensor]:
        e = space.basis(c)
        a, b = back(e), back(multiply(e))
        return [a[place] * b[place] for place in summed] + of_others(a, b)

    elements = sum(
        math.prod(n or UNKNOWN_SIZE for n in z.shape) for z in shifts.values()
    )
    if space.count * elements <= ROWS_ELEMENTS:
        rows = backend.map_range(row, space.count)
        weighted = ops.einsum("ncd,dnz->cnz", space.hessian(), rows)
        parts = _parted(shifts, ops.sum(rows * weighted, axis=0))
        sums = [parts[place] for place in summed]
        if others:
            sums += backend.sum_range(
                lambda c: of_others(
                    _parted(shifts, rows[c]), _parted(shifts, weighted[c])
                ),
                space.count,
                1,
            )
    else:
        # `b_c` by a second backward pass.
        fold = max(1, min(256, ROWS_ELEMENTS // (4 * elements)))
        sums = backend.sum_range(few_rows, space.count, 1 if others else fold)
    diagonals = dict(zip(others, sums[len(summed) :], strict=True))
    for i, (path, place) in pointwise.items():
        own = sums[summed.index(place)]
        diagonals[i] = path.products(own, ops.ones_like(own))
    return diagonals


def _parted(shifts: dict[Place, Tensor], flat: Tensor) -> dict[Place, Tensor]:
    """Rows of several shifts side by side, apart again and each in its own type."""
    rows = ops.shape(flat)[0]
    parts = backend.parts(flat, [math.prod(s.shape[1:]) for s in shifts.values()])
    return {
        place: ops.cast(ops.reshape(part, (rows, *shift.shape[1:])), shift.dtype)
        for part, (place, shift) in zip(parts, shifts.items(), strict=True)
    }


def departure(recording: LayerRecording, key: Tensor) -> tuple[list[Tensor], Tensor]:
    """How far M is from its Gauss–Newton part, at each place.

    For random `v`, `(M − G) v` vanishes with probability one only if the rows of
    `M − G` do. This certifies what a list of layer types could only guess.

    Args:
        recording: a `LayerRecording` with outputs.
        key: key of the direction.

    Returns:
        For each place the relative size of `(M − G) v` there, and the noise of samples
        of the diagonal drawn with `M − G` over that with M: a ratio of variances,
        infinite where M has none.
    """
    probed = recording.shifts
    # Normal numbers, so that no finite set of directions can hide a part.
    v = recording.random(backend.normal, probed, backend.fold_in(key, 0))
    w = recording.random(backend.normal, probed, backend.fold_in(key, 1))
    product = recording.product(probed, probed)(v)
    residual = recording.residual().product(probed, probed)(v)
    # With w independent of v, all entries of the matrices count, the diagonal too.
    # Variables and layers may differ in their types.
    left, whole = (
        sum(
            ops.cast(ops.sum(ops.square(d)), backend.wide_float())
            for d in recording.diagonal(w, u)
        )
        for u in (residual, product)
    )
    noise = ops.where(whole > 0, left / ops.where(whole > 0, whole, 1), float("inf"))
    return [_relative(residual[name], product[name]) for name in probed], noise


def beyond_rounding(structure: Structure) -> float:
    """The relative size from which a departure or a coupling is more than rounding.

    Rounding is orders below, a curved activation orders above.
    """
    size: float = structure.loss.epsilon ** (2 / 3)
    return size


def coupling(recording: LayerRecording, key: Tensor) -> Tensor:
    """How far the loss is from a function of the outputs plus one of the rest.

    Then `M = Jᵀ S J + R` has no other mixed terms, which all that tells G from
    R relies on. A loss that multiplies an output with something else has them. No
    derivative of what comes before the outputs is needed to see that.

    Args:
        recording: a `LayerRecording` with outputs that are cut off.
        key: key of the directions.

    Returns:
        How far a random move of all the rest changes the slopes by the outputs while
        these stay, relative to what a move of the outputs does; a scalar.
    """
    outputs = recording.structure.outputs
    probed: list[Name] = [*recording.structure.direct, *recording.shifts]
    rest = [name for name in dict.fromkeys(probed) if name not in outputs]
    if not rest:
        return ops.zeros((), backend.wide_float())

    def changed(names: Sequence[Name], number: int) -> dict[Name, Tensor]:
        own = backend.fold_in(key, number)
        move = recording.random(backend.normal, names, own)
        return recording.product(names, outputs)(move)

    by_outputs, by_rest = changed(outputs, 2), changed(rest, 3)
    distances = [_relative(by_rest[name], by_outputs[name]) for name in outputs]
    return ops.max(ops.stack(distances))


def _relative(difference: Tensor, *terms: Tensor) -> Tensor:
    """The largest entry of a difference, relative to those of its terms."""
    scale = ops.max(ops.stack([ops.max(ops.abs(t)) for t in terms]))
    size = ops.max(ops.abs(difference))
    relative = size / ops.where(scale > 0, scale, 1)
    relative = ops.where(scale > 0, relative, ops.cast(size > 0, size.dtype))
    return ops.cast(relative, backend.wide_float())
