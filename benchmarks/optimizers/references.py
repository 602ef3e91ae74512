"""Update rules of others, written from their papers.

AdaHessian and Sophia take the Hessian's diagonal as `DiagonalNewton` does, so that a
rule can be told from the estimator that feeds it. SOAP takes a variable for a matrix as
`DiagonalNewton(axes="layer")` does, so that a rule can be told from its axes.
"""

import keras
from keras import ops

from keras_curvature.optimizers import layer_axes


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


class SOAP(keras.optimizers.Optimizer):
    """Adam in the eigenvectors of averages of `G Gᵀ` and `Gᵀ G`.

    Vyas et al. 2024, arXiv 2409.11321, Algorithm 3: the average of gradients stays in
    the variable's own entries, that of squares in the axes. Axes are eigenvectors at
    the first step, which moves nothing, and follow by `Q ← QR(L Q)` every ten steps.
    Decays are those of the authors' code; vectors step as Adam does.

    Args:
        beta: decay of all averages.
        refresh: steps between two renewals of the axes.
    """

    def __init__(self, learning_rate=3e-3, beta=0.95, refresh=10, **kwargs):
        super().__init__(learning_rate, **kwargs)
        self.beta, self.refresh = beta, refresh

    def build(self, variables):
        """Averages for each variable, and for each side that is turned."""
        if self.built:
            return
        super().build(variables)
        self._momentums, self._squares = self.add_optimizer_variables(
            variables, ["momentum", "square"]
        )
        self._sides = [layer_axes.sides_of(v.shape) for v in variables]
        self._moments, self._axes = [], []
        for sides in self._sides:
            sizes = [size for _, size in layer_axes.turned_sizes(sides)]
            for slots, start in ((self._moments, "zeros"), (self._axes, "identity")):
                slots.append(
                    [
                        self.add_variable((n, n), start, "float32", name="axes")
                        for n in sizes
                    ]
                )

    def update_step(self, gradient, variable, learning_rate):
        """Moves one variable, and renews its axes."""
        i = self._get_variable_index(variable)
        sides, momentum, square = self._sides[i], self._momentums[i], self._squares[i]
        axes = [ops.convert_to_tensor(q) for q in self._axes[i]]

        def turned(x):
            return x if sides is None else layer_axes.turned(x, sides, axes)

        begun = ops.cast(self.iterations > 0, gradient.dtype)
        rate = (1 - self.beta) * begun
        self.assign_add(momentum, rate * (gradient - momentum))
        self.assign_add(square, rate * (ops.square(turned(gradient)) - square))
        known = 1 - ops.power(self.beta, ops.cast(self.iterations, gradient.dtype))
        known = ops.where(begun > 0, known, 1)
        step = turned(momentum / known) / (ops.sqrt(square / known) + 1e-8)
        if sides is not None:
            step = layer_axes.turned_back(step, sides, axes)
            self._renew(gradient, i)
        self.assign_sub(variable, learning_rate * begun * step)

    def _renew(self, gradient, i):
        new = layer_axes.moments(gradient, self._sides[i])
        slots = zip(self._moments[i], self._axes[i], new, strict=True)
        for moment, axes, outer in slots:
            self.assign_add(moment, (1 - self.beta) * (outer - moment))
            now = [ops.convert_to_tensor(x) for x in (moment, axes)]
            self.assign(axes, self._followed(*now))

    def _followed(self, moment, axes):
        # `layer_axes.followed` orders axes by their size: squares would have to follow.
        return ops.cond(
            ops.equal(self.iterations, 0),
            lambda: ops.flip(ops.linalg.eigh(moment)[1], axis=1),
            lambda: ops.cond(
                ops.equal(self.iterations % self.refresh, 0),
                lambda: ops.qr(ops.matmul(moment, axes))[0],
                lambda: axes,
            ),
        )


class NorMuon(keras.optimizers.Muon):
    """Muon, whose step has the same size for each unit of a layer on average.

    Li et al. 2025, arXiv 2510.05491, Algorithm 1: the orthogonal matrix is divided by
    the root of a running mean of its squares by unit, and scaled to a root mean square
    of 0.2. A unit is a column of a kernel here.

    Args:
        beta: decay of the running mean.
    """

    def __init__(self, *args, beta=0.95, **kwargs):
        super().__init__(*args, **kwargs)
        self.beta = beta

    def build(self, variables):
        """A mean for each unit beside Muon's averages."""
        if self.built:
            return
        super().build(variables)
        self._by_unit = {
            self._get_variable_index(v): self.add_variable(
                (v.shape[1],), "zeros", v.dtype, name="by_unit"
            )
            for v in variables
            if not self._should_use_adamw(v)
        }

    def _muon_update_step(self, gradient, variable, lr, m):
        self.assign_add(m, gradient + m * (self.momentum - 1))
        moved = gradient + self.momentum * m if self.nesterov else m
        matrix = self.zeropower_via_newtonschulz5(moved, self.ns_steps)
        mean = self._by_unit[self._get_variable_index(variable)]
        now = ops.mean(ops.square(matrix), axis=0)
        self.assign_add(mean, (1 - self.beta) * (now - mean))
        matrix = matrix / (ops.sqrt(mean) + 1e-8)
        size = ops.sqrt(ops.mean(ops.square(matrix)))
        self.assign_sub(variable, lr * self.rms_rate * matrix / (size + 1e-8))
