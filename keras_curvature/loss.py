"""The loss that training minimises, as a pure function.

    loss(state, batch) → scalar

`state` holds the values of *all* variables that the loss reads: those that it is
differentiated by, and the others. Nothing is read from the model inside, and nothing
is left behind in it: weights, BatchNormalization statistics, seeds, metrics and
`model.losses` are the same after a call as before. Everything else in this package is
a derivative of that function.
"""

import contextlib
import copy
import functools
import inspect
import random
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias

import keras
import numpy as np

from keras_curvature import backend, keras_internals
from keras_curvature.backend import Direction, Findings, Tensor
from keras_curvature.data_sets import Batch
from keras_curvature.parameters import Layout, epsilon_of, full_precision
from keras_curvature.selection import selected

#: How the layers of a model run, by the value of `training`.
MODES = {None: "training without noise", False: "inference", True: "training"}


class State(NamedTuple):
    """The values of all variables that a loss reads.

    Attributes:
        values: of the variables that it is differentiated by, in float32 at least.
        others: of all other variables.
    """

    values: list[Tensor]
    others: list[Tensor]


class TrainingLoss:
    """The loss that training a Keras model minimises, on one batch.

    It is what the model was compiled with: losses and their weights, sample weights,
    masks, regularizers and `add_loss`, without loss scaling. Layers that compute in
    half precision compute in float32 here, unless they are to stay in it.

    Args:
        model: a Keras model, compiled unless `loss_fn` is given. What it still lacks
            of its variables is created here.
        batch: a batch to look at the model with.
        loss_fn: function `loss_fn(model, x, y)`, or `loss_fn(model, x, y,
            sample_weight)`, that returns the scalar loss, for models whose
            `train_step` does not use the compiled one. It is the whole loss: add
            `sum(model.losses)` for regularizers.
        variables: what to differentiate by: variables, layers, or patterns of paths,
            see `selection`. Defaults to `model.trainable_variables` as they are now.
        training: how the layers run. `None`: as in training, without its noise.
            BatchNormalization takes the statistics of the batch, and is differentiated
            through them; layers that draw random numbers (Dropout, noise,
            augmentation) run as in inference. `False`: all as in inference.
            `True`: all as in training; dropout masks are the same in every call as
            long as the model's seeds do not move.
        half_precision: whether layers in bfloat16 stay so.

    Attributes:
        model: the model.
        training: as given.
        half_precision: as given.
        epsilon: rounding of what layers compute, relative; the largest there is.
        mode: the same in words, a `str`.
        takes_batch_statistics: whether BatchNormalization takes the statistics of the
            batch. The loss then depends on how samples are put into batches.
        unwrapped: names of the layers that run without the gradient checkpointing that
            they have in training, because the backend would get it wrong.
        is_compiled: whether the loss is the one that the model was compiled with.
        variables: the variables that the loss is differentiated by.
        layout: their `Layout` in a flat vector.
        findings: what is known of the gradient, variables named by number.

    Raises:
        ValueError: if the model has no loss, no variables to differentiate by, layers
            in float8, or layers in float16 that are to stay so.
    """

    def __init__(
        self,
        model: Any,
        batch: Batch,
        *,
        loss_fn: Callable[..., Any] | None = None,
        variables: Any = None,
        training: bool | None = None,
        half_precision: bool = False,
    ):
        _check(model, loss_fn)
        self.model = model
        self.training = training
        self.half_precision = half_precision
        self.mode = MODES[training]
        self.is_compiled = loss_fn is None
        self._loss_fn = loss_fn
        self._warned: set[tuple[type, str]] = set()
        self.unwrapped = [
            layer.name
            for layer in keras_internals.recomputed_layers(model)
            if not backend.RECOMPUTES
        ]
        with self._plain_calls():
            self._build(batch)
        _check_gradients(model)
        if half_precision:
            _check_range(model)
        self.variables = tuple(selected(model, variables))
        if not self.variables:
            raise ValueError(
                "There is nothing to differentiate by: the model has no trainable "
                f"variables. Received: model={model.name!r}, variables={variables!r}."
            )
        self.layout = layout_of(self.variables, half_precision)
        computed = {self.layout.dtype.name}
        if half_precision:
            computed |= {layer.compute_dtype for layer in self.layers()}
        self.epsilon = max(map(epsilon_of, computed))
        self._others: tuple[Any, ...] = ()
        self._read: Callable[[], list[Tensor]]
        self._read = functools.partial(backend.values, self.variables)
        self.findings, self._others, updated = _look(self, batch)
        self._read = backend.reading([*self.variables, *self._others])
        self.takes_batch_statistics = any(
            isinstance(layer, keras.layers.BatchNormalization)
            and id(layer.moving_mean) in updated
            for layer in self.layers()
        )

    def _build(self, batch: Batch) -> None:
        model = self.model
        # Drawing seeds while building is what training would have done a little later.
        if self._loss_fn is None:
            needed = model.loss is not None and not _has_own_loss(model)
            if batch[1] is None and needed:
                raise ValueError(
                    f"The loss that the model {model.name!r} was compiled with "
                    "needs targets. Received: y=None. Pass `y`, or a data set of "
                    "pairs `(x, y)`."
                )
            keras_internals.build(model, batch)
        elif not all(layer.built for layer in self.layers()):
            with keras_internals.losses_at_rest(model):
                model(batch[0], training=False)

    def _plain_calls(self) -> contextlib.AbstractContextManager[None]:
        """A context in which layers run without what the backend gets wrong."""
        if backend.RECOMPUTES:
            return contextlib.nullcontext()
        return keras_internals.nothing_recomputed(self.model)

    def as_in_inference(self) -> "TrainingLoss":
        """The same loss with `training=False`."""
        loss = copy.copy(self)
        loss.training, loss.mode = False, MODES[False]
        return loss

    def layers(self) -> list[Any]:
        """All layers of the model, those inside other layers included."""
        return keras_internals.flat_layers(self.model)

    def state(self) -> State:
        """The present values of all variables."""
        return _state(self._read(), self.layout)

    def __call__(self, state: State, batch: Batch) -> Tensor:
        """The scalar loss; pure, so that it may be compiled.

        Args:
            state: the values of all variables.
            batch: `(x, y, sample_weight)`.
        """
        return self.evaluate(_scope_at(self.variables, self._others, state), batch)

    def evaluate(self, scope: keras.StatelessScope, batch: Batch) -> Tensor:
        """The scalar loss with the values of variables that a scope holds."""
        x, y, sample_weight = batch
        with contextlib.ExitStack() as stack:
            stack.enter_context(_random_state_at_rest())
            stack.enter_context(_warning_once(self._warned))
            stack.enter_context(keras_internals.losses_at_rest(self.model))
            stack.enter_context(
                keras_internals.twice_differentiable_layers(
                    self.model, self.half_precision
                )
            )
            stack.enter_context(self._plain_calls())
            if self.training is None:
                stack.enter_context(_noise_at_rest(self.layers()))
            stack.enter_context(scope)
            if self._loss_fn is not None:
                extra = () if sample_weight is None else (sample_weight,)
                return _as_scalar(self._loss_fn(self.model, x, y, *extra))
            return _as_scalar(self._compiled_loss(x, y, sample_weight))

    def _compiled_loss(self, x: Any, y: Any, sample_weight: Any) -> Tensor:
        model, training = self.model, self.training is not False
        y_pred = model(x, training=training)
        given = keras_internals.compiled_loss_of(model) is not None or model.losses
        if not given and not _has_own_loss(model):
            # On JAX, Keras takes the loss for zero then.
            raise ValueError(
                f"The model {model.name!r} has no loss: it was compiled without one, "
                "and its layers add none. Compile it with `loss=`, or pass `loss_fn=`, "
                "a function `loss_fn(model, x, y)`, as for a model with a "
                "`train_step` of its own."
            )
        arguments = {"x": x, "y": y, "y_pred": y_pred, "sample_weight": sample_weight}
        if _takes_training(model.compute_loss):
            arguments["training"] = training
        loss, replicas = model.compute_loss(**arguments), backend.num_replicas()
        # Within the scope of a distribution strategy Keras divides the loss by the
        # number of replicas, because each of them would see a part of the batch.
        return loss if replicas == 1 else loss * replicas


class FunctionLoss:
    """Any scalar function of parameters; it ignores the batch.

    Args:
        loss_fn: function of the parameters, which are handed to it in their
            structure; or a function without arguments that reads the variables.
        parameters: any nested structure of arrays, or of variables.

    Attributes:
        variables: the arrays or variables, in the order of the flattened structure.
        layout: their `Layout` in a flat vector.
        findings: what is known of the gradient, variables named by number.
        epsilon: rounding of what the function computes, relative.

    Raises:
        ValueError: if there is no parameter, or the function neither takes parameters
            nor can read them.
    """

    def __init__(self, loss_fn: Callable[..., Any], parameters: Any):
        leaves = backend.flatten(parameters)[0] if callable(loss_fn) else []
        reads = callable(loss_fn) and _takes_nothing(loss_fn)
        if not leaves or (reads and not all(_is_variable(v) for v in leaves)):
            raise ValueError(
                "Expected a function of the parameters and a nested structure of "
                "arrays, at least one; or a function without arguments and a list of "
                f"the variables that it reads. Received: loss_fn={loss_fn!r}, "
                f"parameters={parameters!r}."
            )
        self.variables = tuple(leaves)
        self._parameters = parameters
        self._others: tuple[Any, ...] = ()
        self._function, self._reads, self._native = loss_fn, reads, None
        if not reads:
            self.variables = tuple(_as_parameter(v) for v in leaves)
        elif not all(isinstance(v, keras.Variable) for v in leaves):
            raw = [v.value if isinstance(v, keras.Variable) else v for v in leaves]
            self._native = backend.function_of_variables(loss_fn, raw)
            self.variables = tuple(raw)
        self.layout = layout_of(self.variables)
        self.epsilon = epsilon_of(self.layout.dtype.name)
        variables = self.variables if reads else ()
        self._read: Callable[[], list[Tensor]]
        self._read = functools.partial(backend.values, variables)
        self.findings, self._others, _ = _look(self, (None, None, None))
        self._read = backend.reading([*variables, *self._others])

    def state(self) -> State:
        """The present values of the parameters."""
        if self._native is not None:
            # The function reads them itself.
            return State(list(self.variables), [])
        given = () if self._reads else self.variables
        return _state([*given, *self._read()], self.layout)

    def move_to(self, parameters: Any) -> None:
        """Takes other values of the parameters, in the same structure.

        Raises:
            ValueError: for a function that reads variables, which have their values,
                or parameters of another structure, shape or type.
        """
        leaves = [_as_parameter(v) for v in backend.flatten(parameters)[0]]
        if self._reads or layout_of(leaves) != self.layout:
            raise ValueError(
                "Expected parameters with the structure, the shapes and the types of "
                "those that the operator was made with. Received: "
                f"parameters={parameters!r}. Variables are read as they are."
            )
        self.variables = tuple(leaves)

    def pack(self, arrays: Sequence[Any]) -> Any:
        """One array for each parameter, in the structure of the parameters."""
        return backend.flatten(self._parameters)[1](list(arrays))

    def __call__(self, state: State, batch: Batch) -> Tensor:
        """The scalar value of the function.

        Args:
            state: the values of the parameters.
            batch: anything.
        """
        return self.evaluate(_scope_at(self.variables, self._others, state), batch)

    def evaluate(self, scope: keras.StatelessScope, batch: Batch) -> Tensor:
        """The scalar value with the values of parameters that a scope holds."""
        del batch
        values = [scope.get_current_value(v) for v in self.variables]
        if self._native is not None:
            return _as_scalar(self._native(values))
        with _random_state_at_rest(), scope:
            if self._reads:
                return _as_scalar(self._function())
            return _as_scalar(self._function(self.pack(values)))


#: What the rest of the package asks of a loss.
Loss: TypeAlias = TrainingLoss | FunctionLoss


def layout_of(variables: Sequence[Any], half_precision: bool = False) -> Layout:
    """The `Layout` of variables or arrays, in the types that they are computed in.

    Args:
        variables: the variables or arrays.
        half_precision: whether those in half precision stay so.

    Raises:
        ValueError: for one that does not hold floating-point numbers.
    """
    names = unique_names(variables)
    dtypes = [keras.backend.standardize_dtype(v.dtype) for v in variables]
    for name, dtype in zip(names, dtypes, strict=True):
        if "float" not in dtype:
            raise ValueError(
                "A Hessian needs floating-point variables. Received: "
                f"{name} of dtype {dtype}."
            )
    return Layout(
        tuple(names),
        tuple(tuple(map(int, v.shape)) for v in variables),
        tuple(d if half_precision else full_precision(d) for d in dtypes),
    )


def unique_names(variables: Sequence[Any]) -> list[str]:
    """Paths of variables; a path that occurs again gets a number."""
    names: list[str] = []
    seen: dict[str, int] = {}
    for i, variable in enumerate(variables):
        path = getattr(variable, "path", None) or getattr(variable, "name", None)
        path = path if isinstance(path, str) else f"parameter {i}"
        seen[path] = seen.get(path, 0) + 1
        names.append(path if seen[path] == 1 else f"{path} ({seen[path]})")
    return names


def _look(loss: Loss, batch: Batch) -> tuple[Findings, tuple[Any, ...], set[int]]:
    """What is known of the gradient, and of other variables.

    Traced once, when the loss is made, with the other variables as they are.

    Returns:
        The findings; the other variables that the loss reads; and the ids of the
        variables that it would update.
    """
    read: list[Any] = []
    updated: set[int] = set()

    def of_point(point: Direction) -> tuple[Tensor, dict[Any, Tensor]]:
        scope = _NotingScope(collect_losses=True)
        _give(scope, loss.variables, list(point.values()))
        scope.updated.clear()
        value = loss.evaluate(scope, batch)
        read[:] = scope.read.values()
        updated.update(scope.updated)
        return value, {}

    with backend.twice_differentiable():
        findings = backend.examine(of_point, dict(enumerate(loss.state().values)))
    return findings, tuple(read), updated


def _state(read: Sequence[Tensor], layout: Layout) -> State:
    """The state that was read: first what the loss is differentiated by."""
    count = len(layout.dtypes)
    of_variables = zip(read[:count], layout.dtypes, strict=True)
    return State([backend.array(*one) for one in of_variables], list(read[count:]))


class _NotingScope(keras.StatelessScope):  # type: ignore[misc]
    """A scope that notes which variables are read that it has no value for.

    And the ids of those that are given one.
    """

    def __init__(self, **arguments: Any):
        super().__init__(**arguments)
        self.read: dict[int, Any] = {}
        self.updated: set[int] = set()

    def add_update(self, update: tuple[Any, Any]) -> None:
        """Gives a variable a value."""
        self.updated.add(id(update[0]))
        super().add_update(update)

    def get_current_value(self, variable: Any) -> Any:
        """The value of a variable, or `None`."""
        value = super().get_current_value(variable)
        if value is None:
            self.read.setdefault(id(variable), variable)
        return value


def _scope_at(
    variables: Sequence[Any], others: Sequence[Any], state: State
) -> keras.StatelessScope:
    """A scope in which variables have the values of a state."""
    scope = keras.StatelessScope(collect_losses=True)
    _give(scope, variables, state.values)
    _give(scope, others, state.others)
    return scope


def _give(
    scope: keras.StatelessScope, variables: Sequence[Any], values: Sequence[Tensor]
) -> None:
    for variable, value in zip(variables, values, strict=True):
        # Unlike a mapping handed to the scope, this keeps the precision of a value.
        scope.add_update((variable, value))


def _check(model: Any, loss_fn: Any) -> None:
    if not isinstance(model, keras.Model):
        raise ValueError(
            "`model` must be a `keras.Model`; for a function of parameters use "
            "`HessianOperator.from_function(loss_fn, parameters)`. Received: "
            f"model={model!r} of type {type(model).__name__}."
        )
    if loss_fn is None and not model.compiled:
        raise ValueError(
            "The model has no loss yet. Call `model.compile(loss=...)` first, "
            "or pass `loss_fn=`, a function `loss_fn(model, x, y)`. Received: "
            f"the model {model.name!r}, not compiled."
        )
    if loss_fn is not None and not callable(loss_fn):
        raise ValueError(
            "`loss_fn` must be a function `loss_fn(model, x, y)` that returns "
            f"the scalar loss. Received: loss_fn={loss_fn!r}."
        )


def _check_gradients(model: Any) -> None:
    overwritten = [
        v.path
        for v in model.trainable_variables
        if getattr(v, "overwrite_with_gradient", False)
    ]
    if overwritten:
        raise ValueError(
            f"The model {model.name!r} trains in float8: its layers round gradients, "
            "and hand over new scales in the place of some, so that there is nothing "
            f"to differentiate once more. Received: {overwritten[0]!r} and "
            f"{len(overwritten) - 1} other scales. Probe a model in another type."
        )


def _check_range(model: Any) -> None:
    """Refuses float16, in which second derivatives leave the range of numbers."""
    narrow = [
        layer.name
        for layer in keras_internals.flat_layers(model, True)
        if "float16" in (layer.compute_dtype, layer.variable_dtype)
    ]
    if narrow:
        raise ValueError(
            "Curvature cannot stay in float16: without a scaled loss its second "
            "derivatives are too small for it, with one too large. "
            f"Received: half_precision=True and {len(narrow)} layers in float16, such "
            f"as {narrow[0]!r}. Leave `half_precision` off, so that they compute in "
            "float32, or take the model in bfloat16."
        )


def _has_own_loss(model: Any) -> bool:
    """Whether a model computes its loss in another way than Keras does."""
    return type(model).compute_loss is not keras.Model.compute_loss


def _takes_training(compute_loss: Callable[..., Any]) -> bool:
    """Whether it has the argument: overrides from before Keras 3.3 lack it."""
    parameters = inspect.signature(compute_loss).parameters.values()
    return any(p.name == "training" or p.kind == p.VAR_KEYWORD for p in parameters)


def _takes_nothing(function: Callable[..., Any]) -> bool:
    """Whether a function can be called without arguments."""
    try:
        inspect.signature(function).bind()
    except TypeError:
        return False
    except ValueError:  # A builtin that does not tell.
        return False
    return True


def _is_variable(x: Any) -> bool:
    return isinstance(x, keras.Variable) or hasattr(x, "assign")


def _as_parameter(x: Any) -> Any:
    """A parameter's present value, as a tensor."""
    return backend.values([x])[0] if _is_variable(x) else backend.array(x)


def _as_scalar(loss: Any) -> Tensor:
    if loss is None:
        raise ValueError("The loss function must return a scalar. Received: None.")
    loss = backend.array(loss)
    dtype = keras.backend.standardize_dtype(loss.dtype)
    if len(loss.shape) or "float" not in dtype:
        raise ValueError(
            "The loss must be a scalar floating-point tensor. Received: shape "
            f"{tuple(loss.shape)}, dtype {dtype}. Average or sum it over the samples."
        )
    return backend.array(loss, full_precision(dtype))


@contextlib.contextmanager
def _noise_at_rest(layers: Sequence[Any]) -> Iterator[None]:
    """A context in which layers that draw random numbers run as in inference.

    Noise is what a layer with a `keras.random.SeedGenerator` does in training only. A
    layer that puts others with weights together is not meant: it passes on what mode
    the others run in, and each of them is looked at by itself.
    """
    with contextlib.ExitStack() as stack:
        for layer in layers:
            if _draws(layer) and not any(
                inner.weights for inner in keras_internals.flat_layers(layer)
            ):
                call = _as_in_inference(layer.call)
                stack.enter_context(keras_internals.replaced(layer, "call", call))
        yield


def _draws(layer: Any) -> bool:
    generator = keras.random.SeedGenerator
    return any(isinstance(value, generator) for value in vars(layer).values())


def _as_in_inference(call: Callable[..., Any]) -> Callable[..., Any]:
    """A layer's `call` with `training=False`, if it takes that."""
    signature = inspect.signature(call)
    if "training" not in signature.parameters:
        return call

    @functools.wraps(call)
    def still(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        bound.arguments["training"] = False
        return call(*bound.args, **bound.kwargs)

    return still


@contextlib.contextmanager
def _random_state_at_rest() -> Iterator[None]:
    """Layers and losses that read a global random state leave it.

    They draw the same numbers each time, as long as nobody else draws.
    """
    states = random.getstate(), np.random.get_state()
    try:
        with backend.random_state_at_rest():
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


@contextlib.contextmanager
def _warning_once(warned: set[tuple[type, str]]) -> Iterator[None]:
    """Layers and losses warn each time that they are traced: once is enough.

    Not by `warnings.catch_warnings`, after which Python forgets what it has warned of
    anywhere, so that everything is warned of again.

    Args:
        warned: category and text of the warnings so far; is added to.
    """
    original = warnings.showwarning

    def show(message: Any, category: type[Warning], *where: Any, **line: Any) -> None:
        if (category, str(message)) not in warned:
            warned.add((category, str(message)))
            original(message, category, *where, **line)

    warnings.showwarning = show  # type: ignore[assignment]
    try:
        yield
    finally:
        warnings.showwarning = original
