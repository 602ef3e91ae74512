"""Derivatives of the loss by shifts at its layers' outputs."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import keras
from keras import ops

from keras_curvature import backend
from keras_curvature.axes import Axes, turned
from keras_curvature.backend import Direction, Tensor
from keras_curvature.data_sets import Batch
from keras_curvature.layerwise.opened import (
    Given,
    Met,
    Output,
    Place,
    Statistic,
    run_opened,
)
from keras_curvature.layerwise.rules import path_in_axes, stacked_products
from keras_curvature.layerwise.structure import (
    Name,
    Structure,
    num_samples,
    signature,
)
from keras_curvature.loss import State

K = TypeVar("K")


class OpenedLoss:
    """The training loss as a pure function of its state and of shifts.

    Args:
        structure: what is known of the model's layers.
        outputs: whether the model's outputs are shifted as well.
        residual: whether the gradient counts as a constant behind the outputs. The
            second derivative is then `M − G`, the model's own curvature, in the place
            of M. G is the Gauss–Newton part, `Jᵀ S J` with the Jacobian J of the
            model's outputs and the Hessian S of the loss by them.
        cut: whether the outputs count as constants but for their shifts, whatever they
            are computed from.
    """

    def __init__(
        self,
        structure: Structure,
        outputs: bool = False,
        residual: bool = False,
        cut: bool = False,
    ):
        self.structure = structure
        self._uses = {use.place: use for use in structure.uses}
        self._outputs = structure.outputs if outputs or residual or cut else ()
        self._residual, self._cut = residual, cut

    def __call__(
        self,
        state: State,
        held: list[Tensor],
        shifts: Mapping[Any, Tensor],
        batch: Batch,
        given: Mapping[Statistic, Tensor] | None = None,
    ) -> tuple[Tensor, dict[Any, Tensor]]:
        """The loss, and what `Use.paths` and derivatives by the outputs need.

        And the statistics of the batch, as they are computed.

        Args:
            state: values of all variables.
            held: values that the opened layers compute with.
            shifts: shifts by place; none at places that are left out.
            batch: `(x, y, sample_weight)`.
            given: statistics in the place of those that are computed.
        """
        taps: dict[Any, Tensor] = {}
        given = given or {}

        def shifted(name: Place | Output, z: Tensor) -> Tensor:
            if self._cut and name in self._outputs:
                z = ops.stop_gradient(z)
            z = z + shifts[name] if name in shifts else z
            if name in self._outputs:
                z = backend.hold_cotangent(z) if self._residual else z
                taps[name] = z
            return z

        def at_place(place: Place, met: Met) -> Tensor:
            use = self._uses.get(place)
            if use is None:
                return met.output
            taps.update(use.taps(met))
            return shifted(place, met.output)

        def at_output(number: int, output: Given) -> Tensor:
            name = Output(number)
            if name not in self._outputs:
                return output.value
            return output.activation(shifted(name, output.before))

        def at_statistic(name: Statistic, computed: Tensor) -> Tensor:
            if name not in structure.statistics:
                return computed
            taps[name] = computed
            statistic = given.get(name, computed)
            return statistic + shifts[name] if name in shifts else statistic

        structure = self.structure
        loss = run_opened(
            structure.loss,
            structure.layers,
            state,
            held,
            batch,
            at_place,
            at_output if self._outputs else None,
            at_statistic if structure.statistics else None,
        )
        return loss, taps

    def zeros(self, state: State, batch: Batch) -> dict[Any, Tensor]:
        """A zero shift for every place and output, for a batch of any shape."""
        structure = self.structure
        own = [name for name in self._outputs if isinstance(name, Output)]
        names: list[Place | Output] = [*self._uses, *own]
        shapes = {name: structure.shapes[name] for name in names}
        known = all(None not in s.shape[1:] for s in shapes.values())
        if known and signature(batch) == structure.signature:
            rows = num_samples(batch)
            return {
                name: ops.zeros((rows, *s.shape[1:]), s.dtype)
                for name, s in shapes.items()
            }
        # Samples of another shape than the structure was found with: seen by running
        # the loss. Nothing is read but shapes.
        met: dict[Any, Tensor] = {}

        def at_place(place: Place, m: Met) -> Tensor:
            met[place] = m.output
            return m.output

        def at_output(number: int, given: Given) -> Tensor:
            met[Output(number)] = given.before
            return given.value

        loss, layers = structure.loss, structure.layers
        run_opened(loss, layers, state, state.values, batch, at_place, at_output)
        return {name: ops.zeros_like(met[name]) for name in shapes}


def random_like(
    draw: Callable[..., Tensor], tensors: Mapping[K, Tensor], key: Tensor
) -> dict[K, Tensor]:
    """Independent random numbers in the place of tensors.

    They are drawn as one vector: compilers take long for each draw by itself.

    Args:
        draw: the backend's `signs` or `normal`.
        tensors: what they are shaped like, by name.
        key: a key.
    """
    shapes = {name: ops.shape(tensor) for name, tensor in tensors.items()}
    # The widest: "float64" is behind "float32".
    dtype = max(keras.backend.standardize_dtype(t.dtype) for t in tensors.values())
    sizes = list(map(math.prod, shapes.values()))
    parts = backend.parts(draw((sum(sizes),), key, dtype), sizes)
    return {
        name: ops.cast(ops.reshape(part, shapes[name]), tensor.dtype)
        for part, (name, tensor) in zip(parts, tensors.items(), strict=True)
    }


class LayerRecording:
    """Loss and gradient over the joint space of shifts and of direct variables.

    A variable acts through the shifts where `paths` says so; its own entry then only
    stands for what else depends on it: penalties. Used while a function is traced.

    Where BatchNormalization takes statistics of the batch, products are those with them
    held still, in the sense of `keras_curvature.layerwise.statistics`; they are entries
    of the joint space as well.

    Args:
        structure: what is known of the model's layers.
        state: values of all variables.
        batch: `(x, y, sample_weight)`.
        outputs: whether the model's outputs are shifted as well.
        residual, cut: see `OpenedLoss`.
        axes: axes of each variable that diagonals are taken in; `None` for entries.

    Attributes:
        structure: as given.
        axes: of each variable.
        point: what is differentiated by: direct variables by number, zero shifts by
            place or statistic.
        loss, taps, product, pull_back: those of the backend's `Recording`.
    """

    def __init__(
        self,
        structure: Structure,
        state: State,
        batch: Batch,
        outputs: bool = False,
        residual: bool = False,
        axes: Sequence[Axes] | None = None,
        cut: bool = False,
    ):
        self.structure = structure
        self.axes: list[Axes] = list(axes or [None] * len(state.values))
        self._made_of = state, batch
        opened = OpenedLoss(structure, outputs, residual, cut)
        self.point: dict[Name, Tensor] = {i: state.values[i] for i in structure.direct}
        self.point |= opened.zeros(state, batch)

        def loss(
            point: Direction, given: Mapping[Statistic, Tensor] | None = None
        ) -> tuple[Tensor, dict[Any, Tensor]]:
            values = [point.get(i, value) for i, value in enumerate(state.values)]
            at = State(values, state.others)
            return opened(at, state.values, point, batch, given)

        self.point |= {
            name: ops.zeros(s.shape, s.dtype)
            for name, s in structure.statistics.items()
        }
        last = structure.outputs if outputs else ()
        recording = backend.record(loss, self.point, last)
        self.loss, self.taps = recording.loss, recording.taps
        #: Where the statistics move as they do.
        self._whole = recording
        if structure.statistics:
            given = {name: self.taps[name] for name in structure.statistics}
            slopes = {name: recording.gradient[name] for name in given}
            recording = backend.record(
                _lagrangian(lambda point: loss(point, given), slopes), self.point, last
            )
        self.product, self.pull_back = recording.product, recording.pull_back
        self._paths = {use.place: use.paths(self.taps) for use in structure.uses}

    @property
    def shifts(self) -> list[Name]:
        """The places with a shift that is not the model's output alone."""
        return [use.place for use in self.structure.uses]

    def value(self, i: int) -> Tensor:
        """The value of a variable, by number."""
        return self._made_of[0].values[i]

    def residual(self) -> "LayerRecording":
        """The same with `M − G` in the place of M; see `OpenedLoss`."""
        return LayerRecording(self.structure, *self._made_of, residual=True)

    def paths(self, i: int) -> list[tuple[Any, Place]]:
        """The paths of a variable, by number, each with its place."""
        variable = self.structure.loss.variables[i]
        return [
            (path, use.place)
            for use in self.structure.uses_of.get(i, [])
            for path in self._paths[use.place]
            if path.variable is variable
        ]

    def paths_in_axes(self, i: int) -> list[tuple[Any, Place]]:
        """`paths`, in that variable's axes."""
        axes = self.axes[i]
        if axes is None:
            return self.paths(i)
        return [(path_in_axes(path, axes), place) for path, place in self.paths(i)]

    def turned(self, i: int, x: Tensor) -> Tensor:
        """What is shaped like a variable, by number, in that variable's axes."""
        return turned(x, self.axes[i])

    @property
    def statistics(self) -> list[Statistic]:
        """The statistics of the batch."""
        return list(self.structure.statistics)

    def statistics_back(
        self, wanted: Iterable[Name]
    ) -> Callable[[Direction], dict[Name, Tensor]]:
        """The function from cotangents at the statistics to those at other names.

        With what one statistic does to those that follow.
        """
        return self._whole.pull_back(self.statistics, wanted)

    def whole_product(
        self, moved: Iterable[Name], wanted: Iterable[Name]
    ) -> Callable[[Direction], dict[Name, Tensor]]:
        """Like `product`, with statistics of the batch that move as they do."""
        return self._whole.product(moved, wanted)

    def carried(self, cotangents: Mapping[Name, Tensor]) -> list[Tensor]:
        """`Σ_n J_nᵀ v_n + v` for every variable.

        Args:
            cotangents: `v`, at places and direct variables.

        Returns:
            A list of tensors shaped like the variables.
        """
        totals = []
        for i, value in enumerate(self._made_of[0].values):
            total = cotangents[i] if i in cotangents else ops.zeros_like(value)
            for path, place in self.paths(i):
                own = path.total(cotangents[place])
                total = total + ops.cast(own, total.dtype)
            totals.append(total)
        return totals

    def random(
        self, draw: Callable[..., Tensor], names: Iterable[Name], key: Tensor
    ) -> dict[Name, Tensor]:
        """A random direction: see `random_like`."""
        return random_like(draw, {name: self.point[name] for name in names}, key)

    def diagonal(
        self, v: Mapping[Name, Tensor], u: Mapping[Name, Tensor]
    ) -> list[Tensor]:
        """`Σ_n (J_nᵀ v_n) ⊙ (J_nᵀ u_n) + v ⊙ u` for every variable, in its axes.

        Args:
            v: a direction of the joint space; zero for what it lacks.
            u: its product; may lack what `v` lacks.

        Returns:
            A list of tensors shaped like the variables.
        """
        values = self._made_of[0].values
        diagonal = []
        for i, value in enumerate(values):
            part = ops.zeros_like(value)
            if i in v:
                part = self.turned(i, v[i]) * self.turned(i, u[i])
            mine = [one for one in self.paths_in_axes(i) if one[1] in v]
            if mine:
                # A layer may compute in another type than its variables have.
                products = stacked_products(
                    [path for path, _ in mine],
                    [v[place] for _, place in mine],
                    [u[place] for _, place in mine],
                )
                part = part + ops.cast(products, part.dtype)
            diagonal.append(part)
        return diagonal


def _lagrangian(
    loss: Callable[[Direction], tuple[Tensor, dict[Any, Tensor]]],
    slopes: Mapping[Statistic, Tensor],
) -> Callable[[Direction], tuple[Tensor, dict[Any, Tensor]]]:
    """The loss, plus the statistics times the slopes of the loss by them.

    Args:
        loss: function that gives the statistics as taps.
        slopes: the derivatives by the statistics.
    """

    def lagrangian(point: Direction) -> tuple[Tensor, dict[Any, Tensor]]:
        value, taps = loss(point)
        products = [ops.sum(slope * taps[name]) for name, slope in slopes.items()]
        return value + ops.cast(sum(products), value.dtype), taps

    return lagrangian
