"""The diagonal of the Hessian by the layers' outputs themselves.

A layer's linear output for sample n is `z_n`, and `∂²L/∂z_n²` says how much the loss
feels noise there, as rounding makes it. For a unit c of a layer

    h_c = Σ_n Σ_t ∂²L/∂z_ntc²

over all samples n, all positions t (the pixels of an image, the steps of a sequence)
and all uses of the layer. With random signs e at the outputs of all layers `e ⊙ M e`
has the diagonal of M for its mean, and one product serves all layers. Where samples do
not interact and a sample has few outputs, products with the unit vectors, for all
samples at once, give it exactly.
"""

import math
from typing import Any

import numpy as np
from keras import ops

from keras_curvature import backend
from keras_curvature.backend import Direction, Tensor
from keras_curvature.data_sets import Batch
from keras_curvature.evaluation import Evaluation
from keras_curvature.layerwise.checks import find_outputs
from keras_curvature.layerwise.exact import folded
from keras_curvature.layerwise.opened import Place
from keras_curvature.layerwise.recording import OpenedLoss, random_like
from keras_curvature.layerwise.sampled import Draw, Samples
from keras_curvature.layerwise.structure import Use
from keras_curvature.loss import State, unique_names


class ActivationDiagonal:
    """The diagonal by the linear outputs of all layers that have a rule.

    Args:
        evaluation: of a `TrainingLoss`.

    Attributes:
        shapes: the shape of each layer's units, by the name of the layer. That is its
            path; with a number behind it for a layer with several linear outputs.
        num_matvecs: products that the exact diagonal takes; infinite where it is not
            to be had because samples interact or outputs have no fixed size.
        samples_interact: whether samples interact.
        samples: `Samples` of the diagonal, an entry for each unit of all layers.
    """

    def __init__(self, evaluation: Evaluation):
        self._structure = evaluation.once(find_outputs)
        self._names, self.shapes = _named(self._structure.uses)
        self._axes = {use.place: _unit_axes(use) for use in self._structure.uses}
        self._dtype = evaluation.loss.layout.dtype.name
        self.samples_interact = self._structure.samples_interact
        self.num_matvecs: float = sum(use.size for use in self._structure.uses)
        if self.samples_interact:
            self.num_matvecs = math.inf
        self.samples = Samples(evaluation, self._prepared, self._joined)
        self._exact = evaluation.mean_of(self._by_basis)

    @property
    def sizes(self) -> list[int]:
        """Number of units of each layer."""
        return [math.prod(shape) for shape in self.shapes.values()]

    def exact(self) -> Tensor:
        """The exact diagonal, `(K,)`; right where `num_matvecs` is finite."""
        diagonal: Tensor = self._exact()
        return diagonal

    def by_layer(self, flat: np.ndarray[Any, Any]) -> dict[str, np.ndarray[Any, Any]]:
        """A vector `(K,)` as a dictionary of arrays, by the name of the layer."""
        parts = np.split(flat, np.cumsum(self.sizes)[:-1])
        return {
            name: part.reshape(shape)
            for (name, shape), part in zip(self.shapes.items(), parts, strict=True)
        }

    # While tracing

    def _record(
        self, state: State, batch: Batch
    ) -> tuple[backend.Recording, dict[Any, Tensor]]:
        """The loss as a function of all shifts. Statistics of the batch move along."""
        opened = OpenedLoss(self._structure)
        point = opened.zeros(state, batch)

        def loss(point: Direction) -> tuple[Tensor, dict[Any, Tensor]]:
            return opened(state, state.values, point, batch)

        return backend.record(loss, point), point

    def _prepared(self, state: State, batch: Batch) -> tuple[Tensor, Draw]:
        recording, point = self._record(state, batch)
        multiply = recording.product(list(point), list(point))

        def draw(key: Tensor) -> dict[Any, Tensor]:
            v = random_like(backend.signs, point, key)
            u = multiply(v)
            return {place: v[place] * u[place] for place in point}

        return recording.loss, draw

    def _by_basis(self, state: State, batch: Batch) -> tuple[Tensor, Tensor]:
        recording, point = self._record(state, batch)
        fold = folded(point.values())
        diagonals = {
            place: self._at(recording, place, shift, fold)
            for place, shift in point.items()
        }
        return recording.loss, self._joined(diagonals)

    def _at(
        self, recording: backend.Recording, place: Place, shift: Tensor, fold: int
    ) -> Tensor:
        """`Σ_n ∂²L/∂z_nj²` for each entry j of a sample's output, `(1, …)`."""
        multiply = recording.product([place], [place])
        size = math.prod(shift.shape[1:])

        def entry(j: Any) -> list[Tensor]:
            e = ops.one_hot(j, size, dtype=shift.dtype)
            e = ops.reshape(e, (1, *shift.shape[1:]))
            u = multiply({place: ops.broadcast_to(e, ops.shape(shift))})[place]
            return [e * ops.sum(u, axis=0, keepdims=True)]

        diagonal: Tensor = backend.sum_range(entry, size, fold)[0]
        return diagonal

    def _joined(self, diagonals: dict[Any, Tensor]) -> Tensor:
        """Diagonals by place, summed over all but the units and over uses, `(K,)`."""
        sums: dict[str, Tensor] = {}
        for place, name in self._names.items():
            diagonal = ops.cast(diagonals[place], self._dtype)
            kept = self._axes[place]
            rest = tuple(i for i in range(len(diagonal.shape)) if i not in kept)
            part = ops.reshape(ops.sum(diagonal, axis=rest), (-1,))
            sums[name] = sums[name] + part if name in sums else part
        return ops.concatenate([sums[name] for name in self.shapes])


def _unit_axes(use: Use) -> tuple[int, ...]:
    """The axes of an output along which its units lie; of fixed size."""
    rank = len(use.output.shape)
    return use.rule.unit_axes(use.layer, rank) or (rank - 1,)


def _named(
    uses: tuple[Use, ...],
) -> tuple[dict[Place, str], dict[str, tuple[int, ...]]]:
    """The name of the layer at each place, and the shape of the units by name."""
    layers = {use.place.layer: use.layer for use in uses}
    paths = dict(zip(layers, unique_names(list(layers.values())), strict=True))
    # Outputs of a layer that have the same units in each call are one.
    kinds: dict[int, list[tuple[int, tuple[Any, ...]]]] = {n: [] for n in layers}
    found = {}
    for use in uses:
        units = tuple(use.output.shape[axis] for axis in _unit_axes(use))
        kind = use.place.output, units
        mine = kinds[use.place.layer]
        if kind not in mine:
            mine.append(kind)
        found[use.place] = kind
    names: dict[Place, str] = {}
    shapes: dict[str, tuple[Any, ...]] = {}
    for place, kind in found.items():
        mine, name = kinds[place.layer], paths[place.layer]
        if len(mine) > 1:
            name = f"{name}:{mine.index(kind)}"
        names[place], shapes[name] = name, kind[1]
    return names, shapes
