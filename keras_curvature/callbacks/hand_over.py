"""From the diagonal that was measured to the optimizer that steps with it."""

from keras import ops


def hand_over(model, operator, flat):
    """Gives each optimizer that takes curvature its part of a diagonal.

    Everything stays on the device. Variables that the diagonal does not hold (because
    only some were asked for, or because of layers frozen since) count as flat.

    Args:
        model: the Keras model that trains.
        operator: the `HessianOperator` that the diagonal is of.
        flat: the diagonal, a flat tensor.
    """
    takers = _takers(model.optimizer)
    if not takers:
        return
    parts = dict(zip(map(id, operator.variables), operator.split(flat), strict=True))
    for optimizer in takers:
        # Part of the model's variables, inside a `MultiOptimizer`.
        variables = getattr(optimizer, "_trainable_variables", None)
        optimizer.update_hessian_diagonal(
            [
                parts[id(v)] if id(v) in parts else ops.zeros(v.shape, v.dtype)
                for v in variables or model.trainable_variables
            ]
        )


def optimizer_figures(model):
    """What an optimizer that takes curvature tells about its steps: a dictionary."""
    for optimizer in _takers(model.optimizer):
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
