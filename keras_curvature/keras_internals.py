"""Every private part of Keras that the package relies on, in one place.

Keras has no public way to do what is done here; each function says why. Seen in Keras
3.15.1, and the versions that setup.cfg allows. Each function has a test that names what
breaks if Keras changes, in tests/test_keras_internals.py.

Public, though little known, and therefore used directly: `scope.add_update((variable,
value))` gives a variable a value in a `keras.StatelessScope` without a cast, and
`scope.get_current_value(variable)` reads it.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import keras

_HALF_PRECISION = ("float16", "bfloat16")


def flat_layers(model_or_layer: Any, include_self: bool = False) -> list[Any]:
    """All layers inside a model or layer, those inside other layers included.

    `model.layers` lists direct children only, and a `Layer` has no such list at all;
    hence `_flatten_layers`.

    Args:
        model_or_layer: a `keras.Model` or `keras.layers.Layer`.
        include_self: whether it is listed too, first.
    """
    return list(model_or_layer._flatten_layers(include_self=include_self))


def build(model: Any, batch: tuple[Any, Any, Any]) -> None:
    """Creates the variables that a compiled model, its losses and metrics still lack.

    Nothing is run, and what is there already stays as it is. The optimizer is not
    built: it is too early for that, the user may still freeze layers.

    The public ways to the variables of losses and metrics (`fit`, `evaluate`) run the
    model; hence `_symbolic_build`, which `fit` calls first of all.

    Args:
        model: a `keras.Model`, compiled.
        batch: `(x, y, sample_weight)`; only shapes and types matter.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(losses_at_rest(model))
        stack.enter_context(replaced(model, "optimizer", None))
        stack.enter_context(strategy_scope(model))
        model._symbolic_build(data_batch=batch)


def build_optimizer(model: Any) -> None:
    """Builds the optimizer on the model's trainable variables, unless it is built.

    Args:
        model: a `keras.Model`.
    """
    optimizer = getattr(model, "optimizer", None)
    if optimizer is not None and not optimizer.built:
        with strategy_scope(model):
            optimizer.build(model.trainable_variables)


def strategy_scope(model: Any) -> contextlib.AbstractContextManager[Any]:
    """The scope in which variables for a model must be created.

    `distribute_strategy` is public, but only models on TensorFlow have it.

    Args:
        model: a `keras.Model`.
    """
    strategy = getattr(model, "distribute_strategy", None)
    return contextlib.nullcontext() if strategy is None else strategy.scope()


def compiled_loss_of(model: Any) -> object | None:
    """An object that is another one after each `model.compile`; `None` without a loss.

    `model.loss` is what the user passed, and may be the same thing twice; hence
    `_compile_loss`.

    Args:
        model: a `keras.Model`.
    """
    return getattr(model, "_compile_loss", None)


@contextlib.contextmanager
def losses_at_rest(model: Any) -> Iterator[None]:
    """A context after which `model.losses` holds what it held before.

    Every call of a model drops what its layers added by `add_loss` in the call before,
    also within a `StatelessScope`, and there is no public way to put it back; hence
    `_losses` and `_loss_ids`.

    Args:
        model: a `keras.Model`.
    """
    layers = [x for x in flat_layers(model, True) if hasattr(x, "_loss_ids")]
    kept = [(list(layer._losses), set(layer._loss_ids)) for layer in layers]
    try:
        yield
    finally:
        for layer, (losses, ids) in zip(layers, kept, strict=True):
            layer._losses[:] = losses
            layer._loss_ids = ids


def current_scope() -> keras.StatelessScope | None:
    """The `StatelessScope` at work now, if any.

    A scope that is entered hides the values of the one around it, so that giving some
    variables other values for a while must happen in the present scope. Keras has no
    public way to ask for it, but a new scope remembers it as `original_scope`.
    """
    # What was created in the scope so far is initialized when the scope itself ends.
    with keras.StatelessScope(initialize_variables=False) as nested:
        scope: keras.StatelessScope | None = nested.original_scope
    return scope


def mask_of(tensor: Any) -> Any:
    """The mask that Keras keeps with a tensor, or `None`.

    It is the attribute `_keras_mask`, but JAX' tensors take no attributes, and Keras
    keeps theirs in a table of its own. A layer is handed the mask in both cases.

    Args:
        tensor: a tensor.
    """
    return _MaskReader()(tensor)


def with_mask(tensor: Any, mask: Any) -> Any:
    """The tensor, with a mask that Keras keeps with it; see `mask_of`.

    Args:
        tensor: a tensor that has no mask yet.
        mask: the mask; with `None` nothing happens.
    """
    return tensor if mask is None else _MaskWriter(mask)(tensor)


def takes_batch_moments(layer: Any) -> bool:
    """Whether a layer may take the statistics of its batch by `batch_moments`.

    Args:
        layer: a layer; true for `BatchNormalization`, and for subclasses that compute
            as it does.
    """
    kind: Any = keras.layers.BatchNormalization
    cls: Any = type(layer)
    return (
        isinstance(layer, kind)
        and cls.call is kind.call
        and cls._moments is kind._moments
    )


def batch_moments(
    layer: Any, take: Callable[[Any, Callable[[Any], Any]], Any]
) -> contextlib.AbstractContextManager[None]:
    """A context in which a BatchNormalization takes its statistics from `take`.

    It has them from its method `_moments`, in training mode alone; what stands in for
    that is handed the layer's inputs and not its variables. There is no public way to
    give it others.

    Args:
        layer: a layer that `takes_batch_moments`.
        take: function `take(inputs, moments)` that returns mean and variance of
            inputs for each channel. `moments(x)` are those that the layer itself would
            take of `x`, over the entries that its mask leaves.
    """
    original = layer._moments
    return replaced(
        layer,
        "_moments",
        lambda inputs, mask: take(inputs, lambda x: original(x, mask)),
    )


class _MaskReader(keras.layers.Layer):
    """Returns the mask of its input."""

    def __init__(self) -> None:
        super().__init__(autocast=False, name="mask_reader")

    def call(self, inputs: Any, mask: Any = None) -> Any:
        return mask

    def compute_mask(self, inputs: Any, previous_mask: Any) -> Any:
        return None


class _MaskWriter(keras.layers.Layer):
    """Returns its input, which has the mask from then on."""

    def __init__(self, mask: Any) -> None:
        super().__init__(autocast=False, name="mask_writer")
        self._mask = mask

    def call(self, inputs: Any) -> Any:
        return inputs

    def compute_mask(self, inputs: Any, previous_mask: Any) -> Any:
        return self._mask


@contextlib.contextmanager
def twice_differentiable_layers(
    model: Any, half_precision: bool = False
) -> Iterator[None]:
    """A context in which layers compute in float32 at least, twice differentiably.

    * Layers with a half-precision policy compute in float32, if they are not to stay.
    * Recurrent layers leave cuDNN, and attention layers leave fused kernels: neither
      has second derivatives. Layers read `use_cudnn` and `_flash_attention` when they
      are called; `keras.config.disable_flash_attention` is read when they are made.

    All is as it was afterwards, also after an error.

    Args:
        model: a `keras.Model`.
        half_precision: whether layers in half precision stay so.
    """
    with contextlib.ExitStack() as stack:
        for layer in flat_layers(model, True):
            if not half_precision and layer.compute_dtype in _HALF_PRECISION:
                stack.callback(_policy_restorer(layer))
                layer.dtype_policy = _full_precision(layer)
            if getattr(layer, "use_cudnn", None):
                stack.enter_context(replaced(layer, "use_cudnn", False))
            if hasattr(layer, "_flash_attention"):
                stack.enter_context(replaced(layer, "_flash_attention", False))
        yield


def recomputed_layers(model: Any) -> list[Any]:
    """The layers of a model, itself included, that were made in a `RematScope`.

    Keras keeps the scope's mode as `_remat_mode`.

    Args:
        model: a `keras.Model`.
    """
    return [
        layer
        for layer in flat_layers(model, True)
        if getattr(layer, "_remat_mode", None) is not None
    ]


@contextlib.contextmanager
def nothing_recomputed(model: Any) -> Iterator[None]:
    """A context in which layers run without gradient checkpointing.

    Args:
        model: a `keras.Model`.
    """
    with contextlib.ExitStack() as stack:
        for layer in recomputed_layers(model):
            stack.enter_context(replaced(layer, "_remat_mode", None))
        yield


def _full_precision(layer: Any) -> str:
    """The layer's policy, but for what is half precision: float32 there."""
    dtype: str = layer.variable_dtype
    dtype = "float32" if dtype in _HALF_PRECISION else dtype
    policy = layer.dtype_policy
    if isinstance(policy, keras.dtype_policies.DTypePolicyMap) and layer.path:
        policy = policy[layer.path]
    quantized, separator, _ = policy.name.rpartition("_from_")
    return str(quantized + separator + dtype)


def _policy_restorer(layer: Any) -> Callable[[], None]:
    """A function that gives a layer its present policy back."""
    policy, path = layer.dtype_policy, layer.path
    if not isinstance(policy, keras.dtype_policies.DTypePolicyMap) or not path:
        return lambda: setattr(layer, "dtype_policy", policy)
    # Setting the policy of such a layer writes into the map it shares with others.
    original = policy[path] if path in policy else None

    def restore() -> None:
        if path in policy:
            del policy[path]
        if original is not None:
            policy[path] = original

    return restore


def unwrapped(optimizer: Any) -> list[Any]:
    """The optimizers that step, out of those that wrap them.

    `LossScaleOptimizer` has an `inner_optimizer` and `MultiOptimizer` has `optimizers`;
    both are public, but neither says that it is a wrapper.

    Args:
        optimizer: a Keras optimizer, or `None`.
    """
    if optimizer is None:
        return []
    inner = getattr(optimizer, "inner_optimizer", None)
    if inner is not None:
        return unwrapped(inner)
    several = getattr(optimizer, "optimizers", None)
    if several is None:
        return [optimizer]
    return [one for wrapped in several for one in unwrapped(wrapped)]


def optimizer_variables(optimizer: Any) -> list[Any] | None:
    """The trainable variables that an optimizer was built with; `None` before.

    `optimizer.variables` are its own slots; hence `_trainable_variables`.

    Args:
        optimizer: a Keras optimizer.
    """
    if not optimizer.built:
        return None
    variables = getattr(optimizer, "_trainable_variables", None)
    return None if variables is None else list(variables)


def squared_gradients(optimizer: Any) -> list[Any] | None:
    """The averages of squared gradients that Adam and its relatives keep, or `None`.

    One variable for each trainable one, in the order of `optimizer_variables`. In
    `optimizer.variables` they could only be told from other slots by their names;
    hence `_velocities`.

    Args:
        optimizer: a Keras optimizer.
    """
    squares = getattr(optimizer, "_velocities", None)
    return list(squares) if squares else None


@contextlib.contextmanager
def replaced(obj: Any, name: str, value: Any) -> Iterator[None]:
    """A context in which the attribute `name` of an object is `value`.

    Writes to the instance's dictionary, past Keras' (and PyTorch's) tracking of
    attributes, so that the object is the same with the same contents afterwards.

    Args:
        obj: a layer, a model.
        name: an attribute, present or not, that is no property.
        value: what it is meanwhile.
    """
    missing = object()
    original = obj.__dict__.get(name, missing)
    obj.__dict__[name] = value
    try:
        yield
    finally:
        if original is missing:
            del obj.__dict__[name]
        else:
            obj.__dict__[name] = original
