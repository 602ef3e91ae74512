"""AdaHessian's and Sophia's update rules, as their code has them.

Both take the Hessian's diagonal as `DiagonalNewton` does, so that a rule can be told
from the estimator that feeds it.
"""

import keras
from keras import ops


class _WithCurvature(keras.optimizers.Optimizer):
    """Slots for an average of gradients and one of curvature, and a counter."""

    def build(self, variables):
        if self.built:
            return
        super().build(variables)
        self._momentums, self._curvatures = self.add_optimizer_variables(
            variables, ["momentum", "curvature"]
        )
        self._deliveries = self.add_variable((), "zeros", "float32", name="deliveries")

    def update_hessian_diagonal(self, diagonals):
        """Takes in a new diagonal."""
        self.absorb(diagonals)

    def absorbed(self, finite):
        """Nothing is refused."""

    def _moved(self, gradient, variable, decay):
        """The average of gradients, this one included, and the variable's index."""
        index = self._get_variable_index(variable)
        momentum = self._momentums[index]
        self.assign_add(momentum, (gradient - momentum) * (1 - decay))
        return momentum, index


class AdaHessian(_WithCurvature):
    """`θ ← θ − η m̂ / (v̂^(k/2) + ε)` with v the average of squared diagonals.

    Yao et al., AAAI 2021, arXiv 2006.00719, Algorithm 1. The diagonal's size is
    averaged over a convolution kernel's positions first. Decays and ε are the defaults
    of the authors' code.

    Args:
        power: k, the Hessian power.
    """

    def __init__(self, learning_rate=0.15, power=1.0, **kwargs):
        super().__init__(learning_rate, **kwargs)
        self.power = power

    def absorb(self, diagonals):
        """Averages the squares; debiased by the number of deliveries."""
        self._deliveries.assign_add(1)
        for slot, diagonal in zip(self._curvatures, diagonals, strict=True):
            size = ops.abs(diagonal)
            if len(size.shape) == 4:
                mean = ops.mean(size, axis=(0, 1), keepdims=True)
                size = ops.broadcast_to(mean, size.shape)
            slot.assign_add((ops.square(size) - slot) * (1 - 0.999))

    def update_step(self, gradient, variable, learning_rate):
        """Moves one variable."""
        momentum, index = self._moved(gradient, variable, 0.9)
        step = ops.cast(self.iterations + 1, "float32")
        v = self._curvatures[index] / (1 - 0.999**self._deliveries)
        mean = momentum / (1 - 0.9**step)
        damped = ops.power(v, self.power / 2) + 1e-4
        self.assign_sub(variable, learning_rate * mean / damped)


class Sophia(_WithCurvature):
    """`θ ← θ − η clip(m / max(γ h, ε), ±1)` with h the average of diagonals.

    Liu et al. 2023, arXiv 2305.14342, Algorithm 3 (Sophia-H). Decays and ε are the
    paper's.

    Args:
        gamma: γ.
    """

    def __init__(self, learning_rate=1e-3, gamma=0.01, **kwargs):
        super().__init__(learning_rate, **kwargs)
        self.gamma = gamma

    def absorb(self, diagonals):
        """Averages with the sign, from zero, without debiasing."""
        for slot, diagonal in zip(self._curvatures, diagonals, strict=True):
            slot.assign_add((diagonal - slot) * (1 - 0.99))

    def update_step(self, gradient, variable, learning_rate):
        """Moves one variable."""
        momentum, index = self._moved(gradient, variable, 0.96)
        curvature = ops.maximum(self.gamma * self._curvatures[index], 1e-12)
        direction = ops.clip(momentum / curvature, -1, 1)
        self.assign_sub(variable, learning_rate * direction)
