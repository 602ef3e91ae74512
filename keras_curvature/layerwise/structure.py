"""What is known of a model's layers: found out once, and frozen.

For a layer that is linear in its variables, `z_n = J_n W` for sample n, the diagonal of
the Hessian block of W follows from the curvature at the layer's outputs:

    diag(H_WW) = Σ_n diag(J_nᵀ M_n J_n),     M_n = ∂²L/∂z_n ∂z_nᵀ

Three things must hold, and none is assumed:

* W acts on the loss through the rule's outputs only, penalties apart;
* no use of W feeds another: z is linear in W over all its uses;
* samples do not interact, but through the statistics that BatchNormalization takes of
  the batch (see `keras_curvature.layerwise.statistics`).

The first two are read off what the loss is computed from, while nothing runs. The third
takes a product, and so does the question whether a rule describes what its layer does.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any, TypeAlias

from keras import ops, tree

from keras_curvature import backend, keras_internals
from keras_curvature.backend import Direction, Outline, Shape, Tensor
from keras_curvature.data_sets import Batch
from keras_curvature.evaluation import Evaluation
from keras_curvature.layerwise.opened import (
    Given,
    Met,
    Output,
    Place,
    Statistic,
    run_opened,
)
from keras_curvature.layerwise.rules import LayerRule, rule_for
from keras_curvature.loss import State, TrainingLoss

#: What a diagonal is differentiated by: a variable by its number, or a shift.
Name: TypeAlias = int | Place | Output | Statistic


@dataclasses.dataclass(frozen=True)
class Use:
    """A place at which variables act through a layer's linear output.

    Attributes:
        place: the place.
        layer: the layer.
        rule: its rule.
        skeleton: what the rule remembers there, `None` in place of tensors.
        output: shape and type of the linear output.
        variables: numbers of the variables that act there.
    """

    place: Place
    layer: Any
    rule: LayerRule
    skeleton: Any
    output: Shape
    variables: tuple[int, ...]

    @property
    def size(self) -> float:
        """Entries of the output for each sample; infinite if that varies."""
        return entries(self.output)

    def taps(self, met: Met) -> dict[Any, Tensor]:
        """The tensors that `paths` needs."""
        leaves = tree.flatten(met.remembered)
        taps = {
            (self.place, i): t for i, t in enumerate(leaves) if backend.is_tensor(t)
        }
        return taps | {(self.place, "output"): met.output}

    def paths(self, taps: Mapping[Any, Tensor]) -> list[Any]:
        """The paths from the output back to the variables."""
        leaves = tree.flatten(self.skeleton)
        leaves = [taps.get((self.place, i), leaf) for i, leaf in enumerate(leaves)]
        remembered = tree.pack_sequence_as(self.skeleton, leaves)
        return self.rule.paths(self.layer, remembered, taps[self.place, "output"])


@dataclasses.dataclass(frozen=True)
class Structure:
    """How the variables of a loss act on it.

    Attributes:
        loss: the loss.
        uses: the uses of all variables that are reached through layer outputs.
        direct: numbers of the variables that (also) act in other ways: those that no
            use covers, and those with penalties.
        outputs: names of the shifts at the model's outputs, in front of a final
            activation: places, or shifts of their own.
        output_shapes: shapes and types of the outputs.
        signature: the `signature` of the batch that they were found with.
        statistics: shapes and types of the statistics of the batch through which
            variables act.
        samples_interact: whether a sample feels the shifts of other samples, while
            the statistics do not move.
        chained: the same for first derivatives alone, where a use may feed another one
            of the same variable; `None` if there are no such uses.
    """

    loss: TrainingLoss
    uses: tuple[Use, ...]
    direct: tuple[int, ...]
    outputs: tuple[Place | Output, ...]
    output_shapes: tuple[Shape, ...]
    signature: tuple[Any, ...]
    statistics: Mapping[Statistic, Shape]
    samples_interact: bool = False
    chained: "Structure | None" = None

    @property
    def of_first_order(self) -> "Structure":
        """What serves first derivatives: more variables may act through outputs."""
        return self.chained or self

    def replaced(self, **changes: Any) -> "Structure":
        """One with other attributes, in that for first derivatives as well."""
        chained = self.chained and dataclasses.replace(self.chained, **changes)
        return dataclasses.replace(self, chained=chained, **changes)

    @functools.cached_property
    def layers(self) -> dict[int, tuple[Any, LayerRule]]:
        """The layers that are opened, with their rules, by number."""
        return {use.place.layer: (use.layer, use.rule) for use in self.uses}

    @functools.cached_property
    def uses_of(self) -> dict[int, list[Use]]:
        """The uses of each variable that has some, by the number of the variable."""
        uses: dict[int, list[Use]] = {}
        for use in self.uses:
            for i in use.variables:
                uses.setdefault(i, []).append(use)
        return dict(sorted(uses.items()))

    @functools.cached_property
    def numbers(self) -> dict[Name, int]:
        """A number for each name, by which random directions differ."""
        own = [name for name in self.outputs if isinstance(name, Output)]
        first = len(self.loss.variables)
        places = [use.place for use in self.uses]
        names: list[Name] = [*range(first), *places, *own, *self.statistics]
        return {name: number for number, name in enumerate(names)}

    @functools.cached_property
    def shapes(self) -> dict[Place | Output, Shape]:
        """Shape and type of every shift."""
        shapes = dict(zip(self.outputs, self.output_shapes, strict=True))
        return {use.place: use.output for use in self.uses} | shapes

    @property
    def samples_independent(self) -> bool:
        """Whether samples do not interact at all."""
        return not (self.samples_interact or self.statistics)

    @property
    def num_outputs(self) -> float:
        """Number of the model's scalar outputs per sample; infinite if it varies."""
        return sum(map(entries, self.output_shapes)) if self.outputs else math.inf

    @property
    def coverage(self) -> dict[str, str]:
        """For each variable's name how it is reached."""
        return {
            name: "layer outputs" if i in self.uses_of else "parameters"
            for i, name in enumerate(self.loss.layout.names)
        }

    def without(self, layers: set[int]) -> "Structure":
        """The same with the variables of some layers, by number, taken as direct."""
        gone = {i for u in self.uses if u.place.layer in layers for i in u.variables}
        uses = tuple(u for u in self.uses if u.place.layer not in layers)
        outputs = tuple(
            Output(number) if isinstance(name, Place) and name.layer in layers else name
            for number, name in enumerate(self.outputs)
        )
        direct = tuple(sorted({*self.direct, *gone}))
        return dataclasses.replace(
            self,
            uses=uses,
            direct=direct,
            outputs=outputs,
            chained=self.chained and self.chained.without(layers),
        )


def entries(shape: Shape) -> float:
    """Entries for each sample; infinite if their number varies."""
    sizes = [math.inf if n is None else n for n in shape.shape[1:]]
    return math.prod(sizes) if shape.shape else math.inf


def signature(batch: Batch) -> tuple[Any, ...]:
    """The shapes of the arrays in a batch, apart from the number of samples."""
    return tuple(None if t is None else tuple(t.shape[1:]) for t in tree.flatten(batch))


def num_samples(batch: Batch) -> Any:
    """The number of samples in a batch; a tensor while tracing, where it varies."""
    return ops.shape(next(t for t in tree.flatten(batch) if t is not None))[0]


def rules_for(
    loss: TrainingLoss, every: bool = False
) -> dict[int, tuple[Any, LayerRule]]:
    """The layers that a rule covers and that hold a variable of the loss; or all."""
    asked = {id(v) for v in loss.variables}
    layers = keras_internals.flat_layers(loss.model, include_self=True)
    found = [(layer, rule_for(layer)) for layer in layers]
    return {
        number: (layer, rule)
        for number, (layer, rule) in enumerate(found)
        if rule and (every or any(id(v) in asked for v in rule.variables(layer)))
    }


def survey(evaluation: Evaluation) -> tuple[Structure, list[Any]]:
    """What can be known of a model's layers without running it.

    Args:
        evaluation: of a `TrainingLoss`.

    Returns:
        What is known, and the layers whose rules are wrong, which are left out of it:
        their paths depend on the very variables that they should be linear in.

    Raises:
        ValueError: for the loss of a plain function.
    """
    found = _Survey(evaluation)
    return found.structure(), found.not_linear()


def survey_outputs(evaluation: Evaluation) -> tuple[Structure, list[Any]]:
    """The layers' outputs for their own sake, whatever the variables do elsewhere.

    Frozen layers count, and so do uses that feed each other. Nothing is known of how
    samples meet in the structure: it has no statistics.

    Args:
        evaluation: of a `TrainingLoss`.

    Returns:
        What is known, and the layers that are left out of it: whose outputs have no
        row for each sample, or that compute with other values than the variables'.

    Raises:
        ValueError: for the loss of a plain function.
    """
    return _Survey(evaluation, every=True).outputs()


class _Survey:
    """Runs the loss once in the abstract, and asks what came from what.

    Args:
        evaluation: of a `TrainingLoss`.
        every: whether layers are opened that hold no variable of the loss.
    """

    def __init__(self, evaluation: Evaluation, every: bool = False):
        loss = evaluation.loss
        if not isinstance(loss, TrainingLoss):
            raise ValueError(
                "Layer outputs need a Keras model. Received: the Hessian of a plain "
                f"function, {loss!r}. Use an exact method or Hutchinson's."
            )
        self._loss = loss
        self._layers = rules_for(loss, every)
        self._number = {id(v): i for i, v in enumerate(loss.variables)}
        self._met: dict[Place, Met] = {}
        self._given: list[Given] = []
        self._uses: dict[Place, Use] = {}
        self._taken: dict[Statistic, Tensor] = {}
        state, batch = evaluation.state(), evaluation.data.first()
        self._evaluation = evaluation
        outline = evaluation.outline(self._run, state.values)
        self._signature = signature(batch)
        self._samples = num_samples(batch)
        count = len(state.values)
        arguments = len(tree.flatten((state, batch, state.values)))
        # Positions among the flattened arguments of `_run`.
        self._held_at = [arguments - count + i for i in range(count)]
        self._batch_at = frozenset(range(len(tree.flatten(state)), arguments - count))
        # The variables, held or not.
        self._moving = frozenset((*range(count), *self._held_at))
        self._origins = outline.origins
        self._complete(outline)

    def _run(self, state: State, batch: Batch, held: list[Tensor]) -> Any:
        """Traced in the abstract: the loss, and what is met at places and outputs."""
        self._met, self._given, self._uses, self._taken = {}, [], {}, {}

        def at_place(place: Place, met: Met) -> Tensor:
            self._met[place] = met
            return met.output

        def at_output(number: int, given: Given) -> Tensor:
            self._given.append(given)
            return given.value

        def at_statistic(name: Statistic, value: Tensor) -> Tensor:
            self._taken[name] = value
            return value

        loss = run_opened(
            self._loss,
            self._layers,
            state,
            held,
            batch,
            at_place,
            at_output,
            at_statistic,
        )
        met = self._met.values()
        inputs = []
        for place, m in self._met.items():
            layer, rule = self._layers[place.layer]
            paths = rule.paths(layer, m.remembered, m.output)
            inputs.append([p.inputs for p in paths if p.inputs is not None])
            mine = {id(v) for v in rule.variables(layer)}
            self._uses[place] = Use(
                place,
                layer,
                rule,
                tree.map_structure(
                    lambda t: None if backend.is_tensor(t) else t, m.remembered
                ),
                Shape((), ""),  # Filled in below, when the trace is complete.
                # What the layer was not asked for (frozen by itself) is no constant.
                tuple(
                    self._number[id(p.variable)]
                    for p in paths
                    if id(p.variable) in mine and id(p.variable) in self._number
                ),
            )
        return {
            "loss": loss,
            "received": [m.received for m in met],
            "inputs": inputs,
            "places": [m.output for m in met],
            "values": [g.value for g in self._given],
            "before": [g.before for g in self._given],
            "statistics": list(self._taken.values()),
        }

    def _complete(self, outline: Outline) -> None:
        for place, shape in zip(self._met, outline.shapes["places"], strict=True):
            self._uses[place] = dataclasses.replace(self._uses[place], output=shape)
        self._shapes = outline.shapes["before"]
        taken = zip(
            self._taken,
            outline.shapes["statistics"],
            outline.origins["statistics"],
            strict=True,
        )
        # Those of constants (of the model's inputs, for instance) do not move.
        self._statistics = {
            name: shape for name, shape, origin in taken if origin & self._moving
        }

    def structure(self) -> Structure:
        """What was found."""
        fed, unsound = self._fed(), self._unsound()
        found = self._without(unsound | fed | self._entangled(unsound | fed))
        if fed <= unsound:
            return found
        chained = self._without(unsound | self._entangled(unsound))
        return dataclasses.replace(found, chained=chained)

    def _without(self, unsound: set[int]) -> Structure:
        """What was found, with some variables taken as direct."""
        dropped = {
            number
            for number, (layer, rule) in self._layers.items()
            if any(self._number.get(id(v)) in unsound for v in rule.variables(layer))
        }
        uses = tuple(u for place, u in self._uses.items() if place.layer not in dropped)
        covered = {i for use in uses for i in use.variables}
        acting = self._acting_directly()
        direct = tuple(
            i
            for i in range(len(self._loss.variables))
            if (i in acting or i not in covered)
            and i not in self._loss.findings.unconnected
        )
        outputs = tuple(
            self._output(number, given, dropped)
            for number, given in enumerate(self._given)
        )
        shapes = tuple(
            self._uses[name].output if isinstance(name, Place) else shape
            for name, shape in zip(outputs, self._shapes, strict=True)
        )
        return Structure(
            self._loss,
            uses,
            direct,
            outputs,
            shapes,
            self._signature,
            self._statistics,
        )

    def outputs(self) -> tuple[Structure, list[Any]]:
        """See `survey_outputs`."""
        uses, left_out = [], list[Any]()
        for use, met, _, output in self._rows():
            if self._rows_are_samples(use, output) and not met.reassigned:
                uses.append(use)
            elif use.layer not in left_out:
                left_out.append(use.layer)
        structure = Structure(self._loss, tuple(uses), (), (), (), self._signature, {})
        return structure, left_out

    def _rows_are_samples(self, use: Use, origin: frozenset[int]) -> bool:
        """Whether an output has a row for each sample.

        It has not if it is computed from constants alone (an embedding of the
        positions), or if its rows are something else.
        """
        from_samples = origin & self._batch_at or use.rule.rows_are_samples
        return bool(from_samples) and (
            not use.output.shape
            or use.output.shape[0] is None
            or use.output.shape[0] == self._samples
        )

    def not_linear(self) -> list[Any]:
        """Layers whose paths depend on a variable that nothing they received does."""
        return [
            use.layer
            for use, received, inputs in zip(
                self._uses.values(),
                self._origins["received"],
                self._origins["inputs"],
                strict=True,
            )
            if any(
                self._held_at[i] in frozenset[int]().union(*inputs)
                and self._held_at[i] not in frozenset[int]().union(*received)
                for i in use.variables
            )
        ]

    def _acting_directly(self) -> set[int]:
        """Variables that reach the loss in other ways than through the places."""
        return {i for i in range(len(self._held_at)) if i in self._origins["loss"]}

    def _unsound(self) -> set[int]:
        """Variables that act through no output of which a rule could tell how."""
        found = {i for use in self._uses.values() for i in use.variables}
        asked = {
            self._number[id(v)]
            for layer, rule in self._layers.values()
            for v in rule.variables(layer)
            if id(v) in self._number
        }
        # A table for the way back of an embedding that is used forwards alone.
        unsound = asked - found - self._loss.findings.unconnected
        acting = self._acting_directly()
        for use, met, reached, output in self._rows():
            rows_are_samples = self._rows_are_samples(use, output)
            for i in use.variables:
                reassigned = id(self._loss.variables[i]) in met.reassigned
                moved = i in acting and i in reached
                if moved or reassigned or not rows_are_samples:
                    unsound.add(i)
        return unsound

    def _fed(self) -> set[int]:
        """Variables of which one use feeds another.

        The inputs of the latter move with the variable, which adds a second-order term
        that the formula lacks.
        """
        return {
            i
            for use, _, reached, _ in self._rows()
            for i in use.variables
            if self._held_at[i] in reached
        }

    def _rows(self) -> list[tuple[Use, Met, frozenset[int], frozenset[int]]]:
        """Each use with what reached it, and what its output is computed from."""
        return [
            (use, met, frozenset[int]().union(*received, *inputs), output)
            for use, met, received, inputs, output in zip(
                self._uses.values(),
                self._met.values(),
                self._origins["received"],
                self._origins["inputs"],
                self._origins["places"],
                strict=True,
            )
        ]

    def _entangled(self, unsound: set[int]) -> set[int]:
        """Those whose direct effect on the loss is more than a penalty.

        A penalty's gradient depends on the variable only. Anything else that reaches a
        variable directly also depends on what its layers give out.

        Args:
            unsound: variables that are taken as direct in any case.
        """
        found = {i for use in self._uses.values() for i in use.variables}
        variables = sorted((self._acting_directly() & found) - unsound)
        if not variables:
            return set()

        def gradient(state: State, batch: Batch, held: list[Tensor]) -> list[Tensor]:
            def loss(point: Direction) -> tuple[Tensor, dict[Any, Tensor]]:
                values = [point.get(i, v) for i, v in enumerate(state.values)]
                return run_opened(
                    self._loss,
                    self._layers,
                    State(values, state.others),
                    held,
                    batch,
                    lambda place, met: met.output,
                ), {}

            point = {i: state.values[i] for i in variables}
            return list(backend.gradient(loss, point)[2].values())

        values = self._loss.state().values
        origins = self._evaluation.outline(gradient, values).origins
        return {
            i
            for i, origin in zip(variables, origins, strict=True)
            if self._held_at[i] in origin
        }

    def _output(self, number: int, given: Given, dropped: set[int]) -> Place | Output:
        """The shift at an output: the layer's own if it leads there and only there."""
        place = given.places[-1] if given.places else None
        if place is None or place.layer in dropped or not given.alone:
            return Output(number)
        # Of several shifts in one layer the last one, if nothing follows it.
        if len(given.places) > 1 and self._met[place].output is not given.value:
            return Output(number)
        layer = place.layer
        held = {
            self._held_at[i]
            for p, use in self._uses.items()
            if p.layer == layer
            for i in use.variables
        }
        returned = [bool(g.places) and g.places[-1].layer == layer for g in self._given]
        calls = {p.call for p in self._uses if p.layer == layer}
        elsewhere = [
            origin
            for origin, mine in zip(self._origins["values"], returned, strict=True)
            if not mine
        ]
        for p, received in zip(self._uses, self._origins["received"], strict=True):
            if p.layer != layer:
                elsewhere += received
        leads_elsewhere = any(origin & held for origin in elsewhere)
        if leads_elsewhere or len(calls) != sum(returned):
            return Output(number)
        return place
