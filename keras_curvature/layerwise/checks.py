"""What only numbers tell of a model's layers: two questions, asked once."""

import functools
import warnings
from typing import Any

from keras import ops, tree

from keras_curvature import backend
from keras_curvature.backend import Direction, Tensor
from keras_curvature.data_sets import Batch
from keras_curvature.evaluation import Evaluation
from keras_curvature.layerwise.opened import Met, Place, run_opened
from keras_curvature.layerwise.recording import (
    LayerRecording,
    OpenedLoss,
    random_like,
)
from keras_curvature.layerwise.structure import Structure, survey, survey_outputs
from keras_curvature.loss import State

#: Relative size of the leak between samples beyond which they count as interacting.
LEAK = 1e-4

#: Relative error of a layer's Jacobian beyond which its rule is not believed.
TOLERANCE = 1e-3

#: Samples that each Jacobian is compared for.
_SAMPLES = 2


def find_structure(evaluation: Evaluation) -> Structure:
    """Finds out how the variables of a model act on its loss.

    Args:
        evaluation: of a `TrainingLoss`.

    Returns:
        A `Structure` whose rules hold.

    Raises:
        ValueError: for the loss of a plain function.
    """
    return checked(evaluation, *evaluation.once(survey))


def checked(
    evaluation: Evaluation, structure: Structure, not_linear: list[Any]
) -> Structure:
    """A surveyed structure whose rules hold, and whether its samples interact.

    Args:
        evaluation: of a `TrainingLoss`.
        structure: what was surveyed, or a part of it.
        not_linear: layers that the survey left out of it.
    """
    opened = structure.of_first_order
    if not opened.uses:
        _warn(not_linear)
        return structure

    def check(state: State, batch: Batch, key: Tensor) -> tuple[Tensor, Tensor]:
        errors = jacobian_errors(opened, state, batch, key)
        return _leak_of_any(opened, state, batch, key), errors

    leaked, errors = evaluation.at_first(check, backend.array([0, 0], "int32"))
    errors = ops.convert_to_numpy(errors)
    limit = evaluation.beyond_rounding(TOLERANCE)
    wrong = {n for n, e in zip(opened.layers, errors, strict=True) if e > limit}
    _warn([*not_linear, *(opened.layers[number][0] for number in sorted(wrong))])
    interact = _interact(evaluation, leaked)
    return structure.without(wrong).replaced(samples_interact=interact)


def find_outputs(evaluation: Evaluation) -> Structure:
    """Finds out at which outputs of a model's layers curvature can be had.

    Args:
        evaluation: of a `TrainingLoss`.

    Returns:
        A `Structure` of all uses of layers with a rule, without statistics: where they
        couple samples it says that samples interact.

    Raises:
        ValueError: for the loss of a plain function.
    """
    structure, left_out = survey_outputs(evaluation)
    if left_out:
        warnings.warn(
            "The outputs of these layers are left out: they have no row for each "
            "sample, or are computed from other values than the layer's variables: "
            f"{', '.join(layer.path for layer in left_out)}.",
            stacklevel=4,
        )
    if not structure.uses:
        return structure

    check = functools.partial(_leak_of_any, structure)
    leaked = evaluation.at_first(check, backend.array([0, 0], "int32"))
    return structure.replaced(samples_interact=_interact(evaluation, leaked))


def _leak_of_any(
    structure: Structure, state: State, batch: Batch, key: Tensor
) -> Tensor:
    """`leak`, of a single sample as well."""
    if tree.flatten(batch)[0].shape[0] == 1:
        # A sample beside itself, to tell whether it would feel another one.
        batch = tree.map_structure(_twice, batch)
    return leak(structure, state, batch, key)


def _interact(evaluation: Evaluation, leaked: Tensor) -> bool:
    """Whether samples interact, by their leak.

    Independent ones leak an exact zero, but for sums over the batch that cancel; real
    interaction is orders above.
    """
    return bool(ops.convert_to_numpy(leaked) > evaluation.beyond_rounding(LEAK))


def _warn(layers: list[Any]) -> None:
    """Names the layers whose rules do not hold."""
    if layers:
        warnings.warn(
            "The output of these layers does not depend on their variables as "
            "their layer rules say; they are taken as ordinary parameters: "
            f"{', '.join(layer.path for layer in layers)}. For layers of Keras, "
            "this is an error in Keras: look whether a bias along another axis "
            "than the last one has as many entries as the last axis.",
            stacklevel=4,
        )


def leak(structure: Structure, state: State, batch: Batch, key: Tensor) -> Tensor:
    """How much of a shift in some samples is felt in the others, relatively.

    Products along directions that vanish for half of the samples: if the samples are
    independent, so do the products there.
    """
    recording = LayerRecording(structure, state, batch)
    places = recording.shifts
    signs = recording.random(backend.signs, places, key)
    rows = ops.shape(signs[places[0]])[0]
    multiply = recording.product(places, places)
    wide, order = backend.wide_float(), shuffled(rows, key)

    def felt(number: Any) -> Tensor:
        half = half_of(order, number)
        masks = {
            name: ops.cast(
                ops.reshape(half, (-1,) + (1,) * (len(s.shape) - 1)), s.dtype
            )
            for name, s in signs.items()
        }
        # Half of it common to all samples: what couples them through a mean grows
        # weaker with their number along independent directions only.
        u = multiply({k: masks[k] * (s + s[:1]) for k, s in signs.items()})
        sums = [
            [
                ops.cast(ops.sum(part), wide)
                for part in (ops.square(u[k]), ops.square(u[k]) * (1 - masks[k]))
            ]
            for k in places
        ]
        total, leaks = sum(whole for whole, _ in sums), []
        for whole, leaked in sums:
            # Each layer by itself, but for those of no account.
            scale = ops.maximum(whole, 1e-12 * total)
            # Keras takes maxima in float32 on PyTorch.
            leaks.append(leaked / ops.maximum(scale, 1e-30))
        return ops.max(ops.stack(leaks))

    return ops.sqrt(ops.max(backend.loop_range(felt, 2)))


def shuffled(count: Any, key: Tensor) -> Tensor:
    """The numbers below a count in random order."""
    return ops.argsort(backend.normal((count,), backend.fold_in(key, 1), "float32"))


def half_of(order: Tensor, number: Any) -> Tensor:
    """Ones for half of the entries and zeros for the others, as integers.

    Masks number 0 and 1 together tell any two of four samples apart, and almost all
    pairs of more: the order of the samples, which may have a meaning (pairs in
    neighbouring places, or in the two halves of the batch), is `shuffled`.
    """
    return order // (number + 1) % 2


def jacobian_errors(
    structure: Structure, state: State, batch: Batch, key: Tensor
) -> Tensor:
    """How far the rules of layers are from what the layers do.

    A rule that leaves out a factor, or a layer that does not do what its configuration
    says, would make curvature wrong without a sign of it. So each rule's
    `Σ_n J_nᵀ v_n`, for random `v`, is compared with the derivative of the layer. Every
    layer is cut off from the others, so that a single gradient compares all.

    Returns:
        The largest relative error for each layer of `structure.layers`, a vector.
    """
    uses = {use.place: use for use in structure.uses}
    shifts = OpenedLoss(structure).zeros(state, batch)
    # Sums of signs may agree by luck, those of normal numbers do not.
    random = random_like(
        backend.normal,
        {place: shifts[place][:_SAMPLES] for place in uses},
        backend.fold_in(key, 2),
    )

    def pairing(point: Direction) -> tuple[Tensor, dict[int, Tensor]]:
        held = [point.get(i, value) for i, value in enumerate(state.values)]
        pairings: list[Tensor] = []
        carried: dict[int, Tensor] = {}

        def at_place(place: Place, met: Met) -> Tensor:
            use, z = uses.get(place), met.output[:_SAMPLES]
            if use is not None:
                v = random[place]
                pairings.append(ops.cast(ops.sum(v * z), backend.wide_float()))
                for path in use.paths(use.taps(met)):
                    i = next(
                        (
                            i
                            for i in use.variables
                            if structure.loss.variables[i] is path.variable
                        ),
                        None,
                    )
                    if i is not None:
                        inputs = path.inputs
                        inputs = None if inputs is None else inputs[:_SAMPLES]
                        part = ops.sum(path.per_sample(inputs, v), axis=0)
                        part = ops.cast(part, state.values[i].dtype)
                        carried[i] = carried[i] + part if i in carried else part
            return ops.stop_gradient(met.output)

        run_opened(structure.loss, structure.layers, state, held, batch, at_place)
        return sum(pairings), carried

    point = {i: state.values[i] for i in structure.uses_of}
    _, carried, actual = backend.gradient(pairing, point)
    errors = {number: ops.zeros((), "float32") for number in structure.layers}
    for i, uses_of_it in structure.uses_of.items():
        scale = ops.maximum(_largest(actual[i]), _largest(carried[i]))
        distance = _largest(actual[i] - carried[i])
        error = ops.where(scale > 0, distance / ops.where(scale > 0, scale, 1), 0)
        for number in {use.place.layer for use in uses_of_it}:
            errors[number] = ops.maximum(errors[number], ops.cast(error, "float32"))
    return ops.stack(list(errors.values()))


def _largest(x: Tensor) -> Tensor:
    return ops.max(ops.abs(x))


def _twice(x: Tensor | None) -> Tensor | None:
    return None if x is None else ops.concatenate([x, x])
