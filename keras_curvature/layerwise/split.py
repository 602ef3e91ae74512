"""The diagonal in two parts: Gauss–Newton, and the rest.

    H = G + R,    G = Jᵀ S J,    R = Σ_c (∂L/∂f_c) ∂²f_c

with the model's outputs f, their Jacobian J and the Hessian S of the loss by them. G is
most of H once a model fits its data at all, and has by far the less noise: a sample of
its diagonal is a *square*, for one backward pass (see `output_roots`), and its relative
error is about `√(2 / samples)` whatever the model. R has samples from random signs like
H itself, along the layers' outputs or along the parameters, for the price of a product;
which of the two is the quieter depends on the layer: the first in networks whose layers
are used once, the second where a layer is used at many positions, so that every pair of
them adds noise.
"""

import dataclasses
import functools

from keras import ops

from keras_curvature import backend
from keras_curvature.axes import Axes
from keras_curvature.backend import Tensor
from keras_curvature.data_sets import Batch
from keras_curvature.evaluation import Evaluation
from keras_curvature.layerwise.checks import checked, find_structure
from keras_curvature.layerwise.gauss_newton_diagonal import by_outputs
from keras_curvature.layerwise.opened import Place
from keras_curvature.layerwise.output_roots import Forms, Roots, find_forms
from keras_curvature.layerwise.penalties import exact_penalties
from keras_curvature.layerwise.recording import LayerRecording
from keras_curvature.layerwise.sampled import Draw, Samples
from keras_curvature.layerwise.structure import Name, Structure, survey
from keras_curvature.loss import State


class SplitDiagonal:
    """Samples of both parts of the diagonal.

    Penalties on the variables count to the first part, with their full curvature.

    Args:
        evaluation: of a `TrainingLoss`.

    Attributes:
        possible: whether the parts can be told from each other. Nothing else may be
            asked for where they cannot.
        alike: whether what is seen of the second part in some variables tells of the
            others. Where samples interact, as in statistics of the batch, it is many
            times the first part in some layers, and less than it in others.
        num_outputs: scalar outputs for each sample: the backward passes of the exact
            first part. Infinite where it is not to be had from the layers alone.
        gauss_newton: `Samples` of the first part.
        rest: `Samples` of the second part by the kind of their directions,
            `"layers"` or `"parameters"`.
    """

    def __init__(self, evaluation: Evaluation):
        surveyed, not_linear = evaluation.once(survey)
        if surveyed.statistics:
            # Samples meet between the layers, whatever else is found out about them.
            alone = checked(evaluation, _outputs_alone(surveyed), not_linear)
            self.alike, structure = False, alone
        else:
            found = evaluation.once(find_structure)
            alone = _outputs_alone(found)
            self.alike = found.samples_independent
            structure = found if self.alike else alone
        opened = structure.of_first_order
        forms = find_forms(evaluation, opened)
        self.possible = forms is not None
        if forms is None:
            return
        kinds: dict[str, Structure] = {}
        if structure is not alone:
            kinds["layers"] = structure
        if structure is alone or _regularized(structure, alone):
            kinds["parameters"] = alone
        covered = len(opened.uses_of) + len(evaluation.loss.findings.unconnected)
        self.num_outputs = (
            opened.num_outputs
            if covered == len(evaluation.loss.variables)
            else float("inf")
        )
        self.gauss_newton = Samples(
            evaluation, functools.partial(_of_gauss_newton, opened, forms)
        )
        self.rest = {
            kind: Samples(evaluation, functools.partial(_of_rest, one))
            for kind, one in kinds.items()
        }
        self._exact = evaluation.mean_of(functools.partial(by_outputs, opened, ()))

    def exact_gauss_newton(self, axes: list[Axes] | None = None) -> Tensor:
        """The first part exactly, `(P,)`, for `num_outputs` backward passes.

        Args:
            axes: of each variable, that the diagonal is taken in.
        """
        return self._exact(axes)


def _outputs_alone(found: Structure) -> Structure:
    """The same with the layers alone that give the outputs.

    These stay open: without them the outputs might be others, behind an activation,
    and so might be the two parts.
    """
    last = {o.layer for o in found.outputs if isinstance(o, Place)}
    alone = dataclasses.replace(found, chained=None, statistics={})
    return alone.without(set(found.layers) - last)


def _of_gauss_newton(
    structure: Structure,
    forms: Forms,
    state: State,
    batch: Batch,
    axes: list[Axes] | None = None,
) -> tuple[Tensor, Draw]:
    recording = LayerRecording(structure, state, batch, outputs=True, axes=axes)
    roots, wanted = Roots(recording, forms), _moved(recording)
    back = recording.pull_back(structure.outputs, wanted)
    penalties = exact_penalties(recording)

    def draw(key: Tensor) -> list[Tensor]:
        g = back(roots(key))
        parts = recording.diagonal(g, g)
        return [part + p for part, p in zip(parts, penalties, strict=True)]

    return recording.loss, draw


def _of_rest(
    structure: Structure, state: State, batch: Batch, axes: list[Axes] | None = None
) -> tuple[Tensor, Draw]:
    recording = LayerRecording(structure, state, batch, residual=True, axes=axes)
    moved = _moved(recording)
    multiply = recording.product(moved, moved)
    # What stands for a penalty and nothing else does not move; of others it is known.
    penalties = [
        ops.zeros_like(p) if i in structure.uses_of else p
        for i, p in enumerate(exact_penalties(recording))
    ]

    def draw(key: Tensor) -> list[Tensor]:
        v = recording.random(backend.signs, moved, key)
        parts = recording.diagonal(v, multiply(v))
        return [part - p for part, p in zip(parts, penalties, strict=True)]

    return recording.loss, draw


def _moved(recording: LayerRecording) -> list[Name]:
    """All shifts, and the variables that are reached through none."""
    structure = recording.structure
    free = [i for i in structure.direct if i not in structure.uses_of]
    return [*free, *recording.shifts]


def _regularized(structure: Structure, alone: Structure) -> bool:
    """Whether what penalizes variables is known without the layers: regularizers."""
    closed = set(structure.uses_of) - set(alone.uses_of)
    variables = structure.loss.variables
    return structure.loss.is_compiled and all(
        variables[i].regularizer for i in closed & set(structure.direct)
    )
