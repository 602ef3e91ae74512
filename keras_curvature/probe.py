"""A probe: a training loss as a pure function of its variables.

Everything in this package is a derivative of `probe.loss(sources, batch)`. The
function has no side effects: weights, BatchNormalization statistics, seeds, metrics
and `model.losses` are the same after it as before, so that probing never disturbs
training.
"""

import contextlib
import inspect
import random

import keras
import numpy as np

from keras_curvature import backend

_LOW_PRECISION = ("float16", "bfloat16")


class Probe:
    """The loss that training a Keras model minimises, on one batch.

    The loss is what the model was compiled with: losses and their weights, sample
    weights, masks, regularizers and `add_loss`, without loss scaling. Layers that
    compute in half precision compute in float32 here.

    Args:
        model: a Keras model, compiled unless `loss_fn` is given.
        loss_fn: function `loss_fn(model, x, y)`, or `loss_fn(model, x, y,
            sample_weight)`, that returns the scalar loss, for models whose
            `train_step` does not use the compiled one. It is the whole loss: add
            `sum(model.losses)` for regularizers.
        variables: the Keras variables to differentiate by. Defaults to
            `model.trainable_variables`.
        training: value of the `training` argument of the layers. With `True`,
            dropout masks are the same in every call as long as the model's seeds
            do not move.

    Raises:
        ValueError: if the model has no loss, or no variables to differentiate by.
    """

    def __init__(self, model, loss_fn=None, variables=None, training=False):
        if not isinstance(model, keras.Model):
            raise ValueError(
                "`model` must be a `keras.Model`; for a function of variables use "
                "`HessianOperator.from_function(loss_fn, variables)`. Received: "
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
        for variable in variables or ():
            if not _is_keras(variable):
                raise ValueError(
                    "`variables` must be Keras variables of the model, such as "
                    "`model.layers[0].trainable_variables`. Received: an element "
                    f"of type {type(variable).__name__}."
                )
        self.model = model
        self.training = training
        self._loss_fn = loss_fn
        self._variables = variables if variables is None else list(variables)

    def build(self, batch):
        """Creates the variables that the model and its losses still lack.

        Must be called once, outside of any compiled function, before the first
        loss. A model that has been built is left alone.

        Args:
            batch: `(x, y, sample_weight)`.
        """
        # Drawing seeds while building is what training would have done a little later.
        with _losses_at_rest(self.model):
            self._build_model(batch)
        if not self.variables:
            raise ValueError(
                "There is nothing to differentiate by: the model has no trainable "
                f"variables. Received: model={self.model.name!r}, variables="
                f"{self._variables!r}."
            )

    def _build_model(self, batch):
        model = self.model
        if self._loss_fn is None:
            own_loss = type(model).compute_loss is not keras.Model.compute_loss
            if batch[1] is None and model.loss is not None and not own_loss:
                raise ValueError(
                    f"The loss that the model {model.name!r} was compiled with needs "
                    "targets. Received: y=None. Pass `y`, or a data set of pairs "
                    "`(x, y)`."
                )
            # Keras builds layers, losses and metrics here without running them, and
            # would build the optimizer, for which it is too early: the user may
            # still freeze layers.
            optimizer, model.optimizer = model.optimizer, None
            try:
                model._symbolic_build(data_batch=batch)
            finally:
                model.optimizer = optimizer
        elif not all(layer.built for layer in model._flatten_layers()):
            model(batch[0], training=False)

    @property
    def variables(self):
        """The Keras variables that the loss is differentiated by, in order."""
        if self._variables is None:
            return list(self.model.trainable_variables)
        return self._variables

    def layers(self):
        """All layers of the model, those inside other layers included."""
        return [x for x in self.model._flatten_layers() if x is not self.model]

    def sources(self):
        """The current values of the variables, float32 at least."""
        return [
            backend.array(value, _full_precision(variable.dtype))
            for variable, value in zip(
                self.variables, backend.values_of(self.variables), strict=True
            )
        ]

    @contextlib.contextmanager
    def at(self, values):
        """A context in which the sources have the given values: yields them."""
        yield values

    def loss(self, sources, batch):
        """The scalar loss; pure and traceable.

        Args:
            sources: list of tensors, the values of the variables.
            batch: `(x, y, sample_weight)`.
        """
        x, y, sample_weight = batch
        with contextlib.ExitStack() as stack:
            stack.enter_context(_random_state_at_rest())
            stack.enter_context(_losses_at_rest(self.model))
            scope = stack.enter_context(keras.StatelessScope(collect_losses=True))
            stack.enter_context(backend.exact_second_derivatives())
            stack.enter_context(_twice_differentiable_layers(self.model))
            for variable, value in zip(self.variables, sources, strict=True):
                # Unlike a state mapping, this keeps the precision of the value.
                scope.add_update((variable, value))
            if self._loss_fn is not None:
                extra = () if sample_weight is None else (sample_weight,)
                loss = self._loss_fn(self.model, x, y, *extra)
            else:
                loss = self._compiled_loss(x, y, sample_weight)
            return _as_scalar(loss)

    def _compiled_loss(self, x, y, sample_weight):
        model = self.model
        y_pred = model(x, training=self.training)
        arguments = {"x": x, "y": y, "y_pred": y_pred, "sample_weight": sample_weight}
        if _takes_training(model.compute_loss):
            arguments["training"] = self.training
        loss, replicas = model.compute_loss(**arguments), backend.num_replicas()
        # Within the scope of a distribution strategy Keras divides the loss by the
        # number of replicas, because each of them would see a part of the batch.
        return loss if replicas == 1 else loss * replicas


class FunctionProbe:
    """Any scalar function of variables, as a probe; it ignores the batch.

    Args:
        loss_fn: function without arguments that reads the variables and returns a
            scalar.
        variables: list of TensorFlow or Keras variables.
    """

    def __init__(self, loss_fn, variables):
        if isinstance(variables, (list, tuple)):
            variables = list(variables)
            valid = variables and all(hasattr(v, "assign") for v in variables)
        else:
            valid = False
        if not callable(loss_fn) or not valid:
            raise ValueError(
                "Expected a function without arguments that returns a scalar, and "
                "a list of at least one variable. Received: "
                f"loss_fn={loss_fn!r}, variables={variables!r}."
            )
        self.variables = variables
        self._loss_fn = loss_fn

    def build(self, batch):
        """Nothing to do: the variables exist."""

    def layers(self):
        """No layers are known."""
        return []

    def sources(self):
        """The variables themselves, because the function reads them itself."""
        return [getattr(v, "value", v) if _is_keras(v) else v for v in self.variables]

    @contextlib.contextmanager
    def at(self, values):
        """A context in which the variables have the given values: yields them."""
        sources = self.sources()
        originals = backend.values_of(sources)
        try:
            for source, value in zip(sources, values, strict=True):
                source.assign(value)
            yield sources
        finally:
            for source, value in zip(sources, originals, strict=True):
                source.assign(value)

    def loss(self, sources, batch):
        """The scalar value of the function at the current values."""
        del sources, batch
        with backend.exact_second_derivatives():
            return _as_scalar(self._loss_fn())


def _takes_training(compute_loss):
    """Whether it has the argument: overrides from before Keras 3.3 lack it."""
    parameters = inspect.signature(compute_loss).parameters.values()
    return any(p.name == "training" or p.kind == p.VAR_KEYWORD for p in parameters)


def _is_keras(variable):
    return isinstance(variable, keras.Variable)


def _full_precision(dtype):
    return "float32" if dtype in _LOW_PRECISION else dtype


def _as_scalar(loss):
    if loss is None:
        raise ValueError("The loss function must return a scalar. Received: None.")
    loss = backend.array(loss)
    if len(loss.shape) or "float" not in loss.dtype.name:
        raise ValueError(
            "The loss must be a scalar floating-point tensor. Received: shape "
            f"{tuple(loss.shape)}, dtype {loss.dtype.name}. Average or sum it over "
            "the samples."
        )
    return backend.array(loss, _full_precision(loss.dtype.name))


@contextlib.contextmanager
def _random_state_at_rest():
    """While tracing: layers that read Python's or NumPy's random state leave it."""
    states = random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


@contextlib.contextmanager
def _losses_at_rest(model):
    """Keeps what `model.losses` holds from the last call, which Keras would drop."""
    layers = [x for x in model._flatten_layers() if hasattr(x, "_loss_ids")]
    kept = [(list(layer._losses), set(layer._loss_ids)) for layer in layers]
    try:
        yield
    finally:
        for layer, (losses, ids) in zip(layers, kept, strict=True):
            layer._losses[:] = losses
            layer._loss_ids = ids


@contextlib.contextmanager
def _twice_differentiable_layers(model):
    """While tracing: float32 at least, and no kernels without a second derivative.

    Layers with a half-precision policy compute in float32, and recurrent layers
    leave cuDNN, whose kernels have no second derivative. Both are restored.
    """
    with contextlib.ExitStack() as stack:
        for layer in model._flatten_layers():
            if layer.compute_dtype in _LOW_PRECISION:
                stack.callback(_policy_restorer(layer))
                layer.dtype_policy = _full_precision(layer.variable_dtype)
            if getattr(layer, "use_cudnn", None):
                stack.callback(setattr, layer, "use_cudnn", layer.use_cudnn)
                layer.use_cudnn = False
        yield


def _policy_restorer(layer):
    """A function that gives a layer its present policy back."""
    policy = layer.dtype_policy
    if not isinstance(policy, keras.dtype_policies.DTypePolicyMap):
        return lambda: setattr(layer, "dtype_policy", policy)
    # Setting the policy of such a layer writes into the map it shares with others.
    path = layer.path
    original = policy[path] if path in policy else None

    def restore():
        if path in policy:
            del policy[path]
        if original is not None:
            policy[path] = original

    return restore
