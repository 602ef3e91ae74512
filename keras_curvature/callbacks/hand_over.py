"""From the diagonal that was measured to the optimizer that steps with it."""

import weakref

from keras import ops

from keras_curvature import backend

#: For each optimizer its compiled functions by name, with what they were made for.
_COMPILED: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


def hand_over(model, operator, flat):
    """Gives each optimizer that takes curvature its part of a diagonal.

    Everything stays on the device, in one graph if the optimizer can (`absorb`): a
    small model has many small variables. Variables that the diagonal does not hold
    (because only some were asked for, or because of layers frozen since) count as
    flat.

    Args:
        model: the Keras model that trains.
        operator: the `HessianOperator` that the diagonal is of.
        flat: the diagonal, a flat tensor.
    """
    for optimizer in _takers(model.optimizer):
        # Part of the model's variables, inside a `MultiOptimizer`.
        variables = getattr(optimizer, "_trainable_variables", None)
        variables = variables or model.trainable_variables
        if hasattr(optimizer, "absorb"):
            optimizer.absorbed(_absorb(optimizer, operator, variables)(flat))
        else:
            optimizer.update_hessian_diagonal(_parts(operator, variables, flat))


def _absorb(optimizer, operator, variables):
    """`optimizer.absorb`, of a flat diagonal, compiled once."""
    held = weakref.ref(operator)
    return _compiled(
        optimizer,
        "absorb",
        [operator, *variables],
        lambda absorb, flat: absorb(_parts(held(), variables, flat)),
    )


def _compiled(optimizer, name, of, function):
    """A function of an optimizer's method, compiled once as long as `of` is the same.

    Eager, it would take longer than the work itself where variables are small.
    """
    functions = _COMPILED.setdefault(optimizer, {})
    made_for, compiled = functions.get(name, (None, None))
    if made_for != list(map(id, of)):
        # The optimizer must not be held by what it is the key of.
        method = weakref.WeakMethod(getattr(optimizer, name))
        compiled = backend.compiled(lambda *args: function(method(), *args))
        functions[name] = list(map(id, of)), compiled
    return compiled


def _parts(operator, variables, flat):
    """A flat diagonal as one tensor for each variable."""
    parts = dict(zip(map(id, operator.variables), operator.split(flat), strict=True))
    return [
        parts[id(v)] if id(v) in parts else ops.zeros(v.shape, v.dtype)
        for v in variables
    ]


def optimizer_figures(model):
    """What an optimizer that takes curvature tells about its steps: a dictionary."""
    for optimizer in _takers(model.optimizer):
        if hasattr(optimizer, "statistic_sums"):
            of = optimizer._trainable_variables
            sums = _compiled(optimizer, "statistic_sums", of, lambda sums: sums())
            return optimizer.statistics(sums())
        if hasattr(optimizer, "statistics"):
            return dict(optimizer.statistics())
    return {}


def learning_rate(model):
    """The learning rate, a float; `None` if there is none, or several."""
    rate = getattr(model.optimizer, "learning_rate", None)
    return None if rate is None else float(number(rate))


def step(model):
    """The number of steps taken so far, an integer."""
    return 0 if model.optimizer is None else int(number(model.optimizer.iterations))


def number(scalar):
    """A scalar on the host. Adding 0 reads a variable, on whatever replicas it is."""
    return ops.convert_to_numpy(scalar + 0)


def _takers(optimizer):
    """The optimizers that take curvature, also inside others."""
    if optimizer is None:
        return []
    inner = getattr(optimizer, "inner_optimizer", None)  # LossScaleOptimizer
    if inner is not None:
        return _takers(inner)
    several = getattr(optimizer, "optimizers", None)  # MultiOptimizer
    if several:
        return [taker for one in several for taker in _takers(one)]
    # One that was given no variables has not been built.
    takes = hasattr(optimizer, "update_hessian_diagonal") and optimizer.built
    return [optimizer] if takes else []
