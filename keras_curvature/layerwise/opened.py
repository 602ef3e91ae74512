"""The training loss, opened at the outputs of its layers.

    loss(state, held, shifts, batch) → (loss, taps)

A *place* is an output of a layer that is linear in the layer's variables, in one call
of the layer. There a *shift* (zero) is added, and the layer computes with *held*
values of its variables, which are arguments of their own: what reaches the loss through
the places is told apart from what the variables do elsewhere (penalties, other uses).
*Taps* are tensors that were met on the way.

Where BatchNormalization takes *statistics* of the batch, others may be given to it.
"""

import contextlib
import functools
import inspect
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import keras
from keras import ops, tree

from keras_curvature import backend, keras_internals
from keras_curvature.backend import Tensor
from keras_curvature.data_sets import Batch
from keras_curvature.layerwise.rules import LayerRule
from keras_curvature.loss import State, TrainingLoss


class Place(NamedTuple):
    """An output of a layer that is linear in the layer's variables.

    Attributes:
        layer: number of the layer, in the order of the rules.
        call: number of the call of that layer.
        output: number of the linear output in that call.
    """

    layer: int
    call: int
    output: int


class Output(NamedTuple):
    """An output of the model that has a shift of its own.

    Attributes:
        number: its number, in the order in which the model gives outputs.
    """

    number: int


class Statistic(NamedTuple):
    """A statistic that BatchNormalization takes of a batch, a number for each channel.

    Attributes:
        layer: number of the layer, among all layers of the loss.
        call: number of the call of that layer.
        moment: `"mean"`, or `"variance"`: the mean square of the distance from the
            mean that the layer goes on with.
    """

    layer: int
    call: int
    moment: str


class Met(NamedTuple):
    """What is met at a place.

    Attributes:
        received: all tensors among the layer's arguments.
        remembered: what the rule wants for its paths; not only tensors.
        output: the linear output, before the shift.
        reassigned: ids of variables of the layer that had been given another value
            than the state's before the call (spectral normalization).
    """

    received: list[Tensor]
    remembered: Any
    output: Tensor
    reassigned: set[int]


class Given(NamedTuple):
    """An output of the model, as it is given.

    Attributes:
        value: the output, after its final activation.
        before: the input of its final activation, if that is a layer of its own.
        activation: that layer, as a function; the identity if there is none.
        places: the places of the layer that returned it, in their order.
        alone: whether it is given once only.
    """

    value: Tensor
    before: Tensor
    activation: Callable[[Tensor], Tensor]
    places: list[Place]
    alone: bool


#: At a place: takes what is met there, returns the tensor to go on with.
AtPlace = Callable[[Place, Met], Tensor]
#: At an output of the model: takes its number, returns the tensor to go on with.
AtOutput = Callable[[int, Given], Tensor]
#: At a statistic: takes it as computed, returns the one to go on with.
AtStatistic = Callable[[Statistic, Tensor], Tensor]


def run_opened(
    loss: TrainingLoss,
    layers: Mapping[int, tuple[Any, LayerRule]],
    state: State,
    held: list[Tensor],
    batch: Batch,
    at_place: AtPlace,
    at_output: AtOutput | None = None,
    at_statistic: AtStatistic | None = None,
) -> Tensor:
    """The loss, with something done at every place, and perhaps at every output.

    Args:
        loss: the loss.
        layers: the layers to open and their rules, by number.
        state: values of all variables.
        held: values of the loss's variables that the opened layers compute with.
        batch: `(x, y, sample_weight)`.
        at_place: what is done at the places. A layer that runs in the body of a loop,
            whose tensors cannot leave it, is left alone.
        at_output: what is done at the outputs.
        at_statistic: what is done at the statistics of the batch.
    """
    values = {
        id(v): (value, h)
        for v, value, h in zip(loss.variables, state.values, held, strict=True)
    }
    trace = backend.current_trace()
    returned: list[tuple[Tensor, list[Place]]] = []
    activated: list[tuple[Tensor, Tensor, Callable[[Tensor], Tensor]]] = []
    with contextlib.ExitStack() as stack:
        for number, (layer, rule) in layers.items():
            call = _opened(layer, rule, number, values, trace, at_place, returned)
            stack.enter_context(keras_internals.replaced(layer, "call", call))
        if at_statistic is not None:
            for number, layer in enumerate(loss.layers()):
                if keras_internals.takes_batch_moments(layer):
                    stack.enter_context(_taking(layer, number, trace, at_statistic))
        if at_output is not None:
            for layer in loss.layers():
                if type(layer) in _ACTIVATIONS:
                    call = _noted(layer.call, activated)
                    stack.enter_context(keras_internals.replaced(layer, "call", call))
            call = _giving(loss.model.call, trace, returned, activated, at_output)
            stack.enter_context(keras_internals.replaced(loss.model, "call", call))
        return loss(state, batch)


#: Layers that only apply an activation to their input.
_ACTIVATIONS = (keras.layers.Activation, keras.layers.Softmax)


def _opened(
    layer: Any,
    rule: LayerRule,
    number: int,
    values: Mapping[int, tuple[Tensor, Tensor]],
    trace: Any,
    at_place: AtPlace,
    returned: list[tuple[Tensor, list[Place]]],
) -> Callable[..., Any]:
    """The `call` of an opened layer."""
    original, calls = layer.call, itertools.count()

    def run(x: Any, *args: Any, **kwargs: Any) -> Any:
        return original(x, *args, **kwargs)

    @functools.wraps(original)
    def call(*args: Any, **kwargs: Any) -> Any:
        if backend.current_trace() != trace:
            return original(*args, **kwargs)
        inputs, rest, others = bound_call(original, args, kwargs)
        received = [t for t in tree.flatten((args, kwargs)) if backend.is_tensor(t)]
        places: list[Place] = []
        this_call = next(calls)

        def shift(z: Tensor, remembered: Any) -> Tensor:
            places.append(Place(number, this_call, len(places)))
            return at_place(places[-1], Met(received, remembered, z, reassigned))

        with _held(rule.variables(layer), values) as reassigned:
            result = rule.call(layer, run, shift, inputs, *rest, **others)
        returned.append((result, places))
        return result

    return call


@contextlib.contextmanager
def _held(
    variables: list[Any], values: Mapping[int, tuple[Tensor, Tensor]]
) -> Iterator[set[int]]:
    """A context in which variables have the held values; see `Met.reassigned`."""
    # Changed within the loss's own scope: a nested one would hide the values of all
    # other variables, and forget losses and updates.
    scope: Any = keras_internals.current_scope()
    mine = [v for v in variables if id(v) in values]
    before = [(v, scope.get_current_value(v)) for v in mine]
    for variable in mine:
        scope.add_update((variable, values[id(variable)][1]))
    try:
        yield {id(v) for v, value in before if value is not values[id(v)][0]}
    finally:
        for variable, value in before:
            scope.add_update((variable, value))


@contextlib.contextmanager
def _taking(
    layer: Any, number: int, trace: Any, at_statistic: AtStatistic
) -> Iterator[None]:
    """A context in which something is done at the statistics that a layer takes."""
    original, calls, taken = layer.call, itertools.count(), list[Tensor]()

    @functools.wraps(original)
    def call(*args: Any, **kwargs: Any) -> Any:
        taken.clear()
        return original(*args, **kwargs)

    def take(x: Tensor, moments: Callable[[Tensor], Any]) -> Any:
        if backend.current_trace() != trace:
            return moments(x)
        # A rule may run its layer more than once in a call.
        if not taken:
            name = Statistic(number, next(calls), "mean")
            mean = at_statistic(name, moments(x)[0])
            distance = x - _along(layer.axis, mean, x)
            variance = moments(ops.square(distance))[0]
            name = name._replace(moment="variance")
            taken.extend([mean, at_statistic(name, variance)])
        return taken

    with (
        keras_internals.replaced(layer, "call", call),
        keras_internals.batch_moments(layer, take),
    ):
        yield


def _along(axis: int, channels: Tensor, x: Tensor) -> Tensor:
    """A number for each channel, shaped to be broadcast against `x`."""
    shape = [1] * len(x.shape)
    shape[axis] = x.shape[axis]
    return ops.reshape(channels, shape)


def _noted(
    original: Callable[..., Any],
    activated: list[tuple[Tensor, Tensor, Callable[[Tensor], Tensor]]],
) -> Callable[..., Any]:
    """The `call` of an activation layer whose outputs and inputs are noted."""

    def call(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        z, rest, others = bound_call(original, args, kwargs)
        activated.append((result, z, lambda z: original(z, *rest, **others)))
        return result

    return call


def _giving(
    original: Callable[..., Any],
    trace: Any,
    returned: list[tuple[Tensor, list[Place]]],
    activated: list[tuple[Tensor, Tensor, Callable[[Tensor], Tensor]]],
    at_output: AtOutput,
) -> Callable[..., Any]:
    """The `call` of a model with something done at its outputs."""
    count = itertools.count()

    def given(y: Tensor, everything: list[Any]) -> Given:
        places = next((p for result, p in returned if result is y), [])
        before, activation = next(
            ((z, f) for result, z, f in activated if result is y), (y, lambda z: z)
        )
        alone = sum(other is y for other in everything) == 1
        return Given(y, before, activation, places, alone)

    def call(*args: Any, **kwargs: Any) -> Any:
        outputs = original(*args, **kwargs)
        if backend.current_trace() != trace:
            return outputs
        everything = tree.flatten(outputs)

        def changed(y: Any) -> Any:
            if not is_float(y):
                return y
            result = at_output(next(count), given(y, everything))
            if result is y:
                return y
            return keras_internals.with_mask(result, keras_internals.mask_of(y))

        return tree.map_structure(changed, outputs)

    return call


def bound_call(
    call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """The arguments of a layer: the first one, other positional ones, by keyword."""
    if args:
        return args[0], args[1:], kwargs
    name = next(iter(inspect.signature(call).parameters))
    return kwargs[name], (), {k: v for k, v in kwargs.items() if k != name}


def is_float(x: Any) -> bool:
    """Whether it is a tensor of floating-point numbers."""
    if not backend.is_tensor(x):
        return False
    return "float" in keras.backend.standardize_dtype(x.dtype)
