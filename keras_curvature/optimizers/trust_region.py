"""Newton's step with a diagonal, within a trust radius for each entry.

The update rule of `DiagonalNewton` as functions of tensors.
"""

from keras import ops


def trust_radius(values, radius, relative_radius):
    """The trust radius r of each entry: `√(ρ² + τ² θ²)`; `None` without one.

    Args:
        values: tensor, the variable's values θ.
        radius: float ρ > 0, or `None`.
        relative_radius: float τ ≥ 0.
    """
    if radius is None:
        return None
    return ops.sqrt(radius**2 + ops.square(relative_radius * values))


def newton_direction(gradient, usual, curvature, radius):
    """The update rule: where one variable goes, before the learning rate.

    Args:
        gradient: tensor, the gradient that is followed, u.
        usual: tensor, the gradient's usual size √v̂, entry by entry.
        curvature: tensor, the debiased average of diagonals, ĥ; all zero while there
            is none.
        radius: tensor, the trust radius r, or `None`.

    Returns:
        Tensor: `clip(u, ±√v̂) / (|ĥ| + √v̂ / r)`.
    """
    damped = damped_curvature(usual, curvature, radius)
    clipped = ops.clip(gradient, -usual, usual)
    return clipped / ops.where(damped > 0, damped, 1)


def damped_curvature(usual, curvature, radius):
    """What the update rule divides by: `|ĥ| + √v̂ / r`.

    Args:
        usual: tensor, the gradient's usual size √v̂, entry by entry.
        curvature: tensor, the debiased average of diagonals, ĥ.
        radius: tensor, the trust radius r, or `None`.

    Returns:
        Tensor, zero only where there is neither curvature nor gradient.
    """
    size = ops.abs(curvature)
    if radius is not None:
        return size + usual / radius
    # Where there is no curvature to speak of, a step of length 1 instead.
    return ops.where(size > 1e-12 * usual, size, usual)
