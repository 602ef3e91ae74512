"""Newton's method with the diagonal of the Hessian, as a Keras optimizer.

Knows the update rule, and nothing of how curvature is found: whoever has a diagonal
(usually `CurvatureMonitor`) hands it to `update_hessian_diagonal`.
"""

import warnings

import keras
import numpy as np
from keras import ops

#: Decay of the average of squared gradients: Adam's default, a memory of 1 000 steps.
GRADIENT_DECAY = 0.999

#: The length, in units of the parameters, in which curvature and gradient compare.
#: Networks are initialised so that Adam's steps of this length are long but sane.
UNIT_STEP = 0.01


@keras.saving.register_keras_serializable(package="keras_curvature")
class DiagonalNewton(keras.optimizers.Optimizer):
    """Newton's method with the diagonal of the Hessian.

    Each parameter's step is its averaged gradient divided by the size of its own
    curvature: long where the loss is flat, short where it is steep.

    ```
    m ← β₁ m + (1 − β₁) g            m̂ = m / (1 − β₁ᵗ)          every step
    v ← β₃ v + (1 − β₃) g²           v̂ = v / (1 − β₃ᵗ)          every step
    ĥ ← ĥ + (1 − β₂) / (1 − β₂ᵏ) (d − ĥ)                        every delivery
    θ ← θ − η clip(m̂, ±c √v̂) / (|ĥ| + λ (mean|ĥ| + √v̂ / ρ))     every step
    ```

    | symbol | meaning | argument |
    |---|---|---|
    | θ, g | a variable and its gradient, after Keras' own clipping | |
    | t | number of steps so far, this one included | `iterations` |
    | d | the Hessian's diagonal as delivered | `update_hessian_diagonal` |
    | k | number of deliveries so far, with this one | `curvature_updates` |
    | η | learning rate; 1 is a full Newton step | `learning_rate` |
    | m̂, β₁ | debiased average of gradients, its decay per step | `beta_1` |
    | ĥ, β₂ | debiased average of diagonals, its decay per delivery | `beta_2` |
    | v̂, β₃ | debiased average of squared gradients, its decay | 0.999 |
    | λ | damping, relative to the variable's own scales | `damping` |
    | ρ | the length in which curvature and gradient compare | 0.01 |
    | c | clip of the step | `step_clip` |

    *Curvature* is averaged with its sign, so that an unbiased estimate stays one and
    its noise cancels. The average counts deliveries, not steps; its first value is
    the first delivery. Negative curvature is used by its size: the step leads away
    from a maximum as fast as it would lead to a minimum.

    *Damping* keeps Newton's steps where the quadratic picture is good, and has two
    scales. One is the variable's mean absolute curvature: entries with next to none
    count as having a fraction λ of it. But a whole variable can have little
    curvature (early layers of a deep network), and its Newton step is then far
    longer than the picture holds. So the other is the curvature `√v̂ / ρ` at which a
    gradient of its usual size asks for a step of ρ. The step is the shorter, roughly,
    of Newton's, `η m̂ / |ĥ|`, and Adam's with a learning rate of `η ρ / λ`.
    `damping=0` is the plain Newton step, which reaches the minimum of a separable
    quadratic at once and suits nothing but quadratics.

    *The clip* holds back spikes, entry by entry, in terms of the gradient's usual
    size, so that it is blind to scale and never binds in the first step or while
    gradients shrink. No entry can move by more than `η c ρ / λ` in a step. Keras'
    `clipnorm` and its relatives act before all of this, on the raw gradient.

    *Without curvature*, before the first delivery or where ĥ is zero all over a
    variable, what remains is Adam: with the defaults, of learning rate 0.01.
    A gradient alone has no scale to tell a step's length from, but it has a sign
    and a usual size. A warning tells of it once.

    From AdaHessian (Yao et al., AAAI 2021, arXiv 2006.00719) comes momentum divided
    by a debiased average of the diagonal. It averages the squares of single noisy
    samples and takes the root, which turns noise into curvature, and then smooths
    over blocks of parameters; its small ε is relative to nothing. From Sophia
    (Liu et al. 2023, arXiv 2305.14342) comes the average of seldom refreshed
    diagonals, and that a Newton step needs a bound for each entry. Its bound is a
    fixed length, sharp and the same for all; entries of negative curvature step that
    far by the sign of their momentum; it does not debias. The absolute value is that
    of saddle-free Newton (Dauphin et al. 2014, arXiv 1406.2572), and v̂ is Adam's.

    ```python
    model.compile(optimizer=kc.DiagonalNewton(), loss="mse")
    model.fit(x, y, callbacks=[kc.CurvatureMonitor((x_probe, y_probe), update_freq=10)])
    ```

    Args:
        learning_rate: a float, a `keras.optimizers.schedules.LearningRateSchedule`,
            or a callable without arguments that returns the value to use. The
            fraction of a Newton step to take. Defaults to `0.1`.
        beta_1: float in [0, 1), the decay of the average of gradients per step.
            Defaults to `0.9`.
        beta_2: float in [0, 1), the decay of the average of diagonals per delivery.
            Defaults to `0.9`.
        damping: float, at least 0. More damping makes shorter steps, more like
            Adam's; 0 makes plain Newton steps. Defaults to `0.1`.
        step_clip: positive float, the longest step in units of the step that a
            gradient of the usual size would cause; or `None`. Defaults to `1.0`.
        weight_decay: float or `None`. Decoupled: each step takes
            `learning_rate * weight_decay` of each variable off it. Learning rates
            here are larger than Adam's, so decays are smaller.
        clipnorm: float or `None`: upper limit for the norm of each gradient.
        clipvalue: float or `None`: upper limit for each entry of the gradients.
        global_clipnorm: float or `None`: upper limit for the norm of all gradients.
        use_ema: whether to average the weights. Defaults to `False`.
        ema_momentum: float in [0, 1], the decay of that average.
            Defaults to `0.99`.
        ema_overwrite_frequency: integer or `None`: after how many steps the average
            overwrites the weights; `None`: at the end of `fit`.
        loss_scale_factor: float or `None`: factor on the loss against underflow.
        gradient_accumulation_steps: integer or `None`: number of batches whose
            gradients are averaged into one step.
        name: string, the optimizer's name.
        **kwargs: further arguments of `keras.optimizers.Optimizer`.

    Raises:
        ValueError: for an argument out of its range.
    """

    def __init__(
        self,
        learning_rate=0.1,
        beta_1=0.9,
        beta_2=0.9,
        damping=0.1,
        step_clip=1.0,
        weight_decay=None,
        clipnorm=None,
        clipvalue=None,
        global_clipnorm=None,
        use_ema=False,
        ema_momentum=0.99,
        ema_overwrite_frequency=None,
        loss_scale_factor=None,
        gradient_accumulation_steps=None,
        name="diagonal_newton",
        **kwargs,
    ):
        super().__init__(
            learning_rate=learning_rate,
            weight_decay=weight_decay,
            clipnorm=clipnorm,
            clipvalue=clipvalue,
            global_clipnorm=global_clipnorm,
            use_ema=use_ema,
            ema_momentum=ema_momentum,
            ema_overwrite_frequency=ema_overwrite_frequency,
            loss_scale_factor=loss_scale_factor,
            gradient_accumulation_steps=gradient_accumulation_steps,
            name=name,
            **kwargs,
        )
        for key, value in (("beta_1", beta_1), ("beta_2", beta_2)):
            if not 0 <= value < 1:
                raise ValueError(
                    f"`{key}` must be at least 0 and below 1. Received: {key}={value}"
                )
        if not damping >= 0:
            raise ValueError(
                f"`damping` must be at least 0. Received: damping={damping}"
            )
        if step_clip is not None and not step_clip > 0:
            raise ValueError(
                "`step_clip` must be positive, or None for no clip. "
                f"Received: step_clip={step_clip}"
            )
        self.beta_1 = beta_1
        self.beta_2 = beta_2
        self.damping = damping
        self.step_clip = step_clip
        self._has_curvature = False
        self._warned = False

    def build(self, variables):
        """Creates the slots: three numbers for each parameter, and two counters.

        Args:
            variables: list of the model's trainable variables.
        """
        if self.built:
            return
        super().build(variables)
        self._momentums, self._second_moments, self._curvatures = (
            self.add_optimizer_variables(
                variables, ["momentum", "second_moment", "curvature"]
            )
        )
        self._curvature_updates, self._curvature_step = [
            self.add_variable((), "zeros", "int", "only_first_replica", name=name)
            for name in ("curvature_updates", "curvature_step")
        ]

    def apply(self, grads, trainable_variables=None):
        """Takes a step, given the gradients; see `keras.optimizers.Optimizer`.

        Args:
            grads: list of gradients, aligned with the variables.
            trainable_variables: list of variables. Defaults to those that the
                optimizer was built with.
        """
        # Runs in Python once per trace. `fit` traces its step after `on_train_begin`,
        # where the monitor makes its first delivery.
        if not (self._has_curvature or self._warned):
            self._warned = True
            warnings.warn(
                f"`{self.name}` takes its first step without curvature. Until it is "
                "given some, its steps are Adam's. Add "
                "`keras_curvature.CurvatureMonitor(probe_data=...)` to the callbacks "
                "of `fit`, or call `optimizer.update_hessian_diagonal(diagonals)`.",
                stacklevel=2,
            )
        super().apply([_dense(g) for g in grads], trainable_variables)

    def update_step(self, gradient, variable, learning_rate):
        """Moves one variable.

        Args:
            gradient: its gradient.
            variable: the variable.
            learning_rate: scalar.
        """
        dtype = variable.dtype
        gradient = ops.cast(gradient, dtype)
        index = self._get_variable_index(variable)
        m, v = self._momentums[index], self._second_moments[index]
        self.assign_add(m, (gradient - m) * (1 - self.beta_1))
        self.assign_add(v, (ops.square(gradient) - v) * (1 - GRADIENT_DECAY))
        direction = newton_direction(
            *self._debiased(index, self.iterations + 1), self.damping, self.step_clip
        )
        self.assign_sub(variable, ops.cast(learning_rate, dtype) * direction)

    def _debiased(self, index, steps):
        """m̂, √v̂ and ĥ of one variable, after that many steps."""
        m, v = self._momentums[index], self._second_moments[index]
        v_hat = v / _summed_weights(GRADIENT_DECAY, steps, v.dtype)
        return (
            m / _summed_weights(self.beta_1, steps, m.dtype),
            ops.sqrt(v_hat),
            ops.convert_to_tensor(self._curvatures[index]),
        )

    def update_hessian_diagonal(self, diagonals):
        """Takes in a new diagonal of the Hessian, for the steps from the next one on.

        Call it between steps, from Python: a callback's `on_train_batch_end`, or a
        training loop. Everything stays on the device but the one question whether
        all entries are finite. If they are not, the diagonal is refused as a whole,
        the average of the earlier ones is kept, and a warning is given.

        ```python
        optimizer.build(model.trainable_variables)
        optimizer.update_hessian_diagonal(kc.hessian_diagonal(model, x, y).value)
        ```

        Args:
            diagonals: list of tensors or arrays, one for each trainable variable
                that the optimizer was built with, of the same shape and in the same
                order.

        Returns:
            Whether the diagonal was taken in.

        Raises:
            ValueError: if the optimizer has not been built, or for a wrong number of
                arrays or a wrong shape.
        """
        self._check_diagonals(diagonals)
        pairs = [
            (slot, ops.cast(ops.convert_to_tensor(diagonal), slot.dtype))
            for slot, diagonal in zip(self._curvatures, diagonals, strict=True)
            if slot is not None
        ]
        finite = ops.all(ops.stack([ops.all(ops.isfinite(d)) for _, d in pairs]))
        if not bool(finite):
            warnings.warn(
                f"`{self.name}` was given a Hessian diagonal with entries that are not "
                "finite, and keeps the curvature it has. If this goes on, training "
                "has diverged, or the loss overflows in low precision: lower the "
                "learning rate, or probe in float32.",
                stacklevel=2,
            )
            return False
        updates = self.curvature_updates + 1
        weight = (1 - self.beta_2) / (1 - self.beta_2**updates)
        for slot, diagonal in pairs:
            slot.assign_add((diagonal - slot) * weight)
        self._curvature_updates.assign(updates)
        self._curvature_step.assign(self.iterations)
        self._has_curvature = True
        return True

    def _check_diagonals(self, diagonals):
        if not self.built:
            raise ValueError(
                "The optimizer does not know its variables yet. Call "
                "`optimizer.build(model.trainable_variables)` before "
                "`update_hessian_diagonal`."
            )
        variables = self._trainable_variables
        if len(diagonals) != len(variables):
            raise ValueError(
                "`diagonals` must hold one array for each of the "
                f"{len(variables)} trainable variables that the optimizer was built "
                "with. If layers were added, frozen or unfrozen since, compile the "
                f"model again. Received: {len(diagonals)} arrays"
            )
        for variable, diagonal in zip(variables, diagonals, strict=True):
            expected, received = tuple(variable.shape), tuple(np.shape(diagonal))
            if expected != received:
                raise ValueError(
                    "`diagonals` must have the shapes of the trainable variables, in "
                    "the order of `model.trainable_variables`. "
                    f"Expected {expected} for `{getattr(variable, 'path', variable)}`. "
                    f"Received: shape {received}"
                )

    @property
    def curvature_updates(self):
        """Number of diagonals taken in so far, an integer."""
        return _number(self._curvature_updates) if self.built else 0

    def statistics(self):
        """What the last step was made of, read from the slots when called.

        Costs about one step's arithmetic, and nothing when not called.

        Returns:
            Dictionary of floats: `curvature_age`, steps since the last diagonal was
            taken in (`nan` if none was); `step_size`, the root mean square over all
            parameters of the last step's change, without weight decay;
            `clipped_share`, the share of entries whose step was clipped;
            `negative_share`, the share of entries with negative curvature.

        Raises:
            ValueError: if the optimizer has not been built.
        """
        if not self.built:
            raise ValueError("The optimizer has not been built: it took no step yet.")
        taken = ops.maximum(self.iterations, 1)
        sums, size = 0, 0
        for index, slot in enumerate(self._momentums):
            if slot is None:
                continue
            m_hat, usual, h = self._debiased(index, taken)
            direction = newton_direction(m_hat, usual, h, self.damping, self.step_clip)
            clip = np.inf if self.step_clip is None else self.step_clip
            counted = (
                ops.square(direction),
                # Shortened by rounding alone (the first step, with c = 1) is not
                # clipped.
                ops.abs(m_hat) > 1.001 * clip * usual,
                h < 0,
            )
            sums += ops.stack([ops.sum(ops.cast(c, "float32")) for c in counted])
            size += int(np.prod(slot.shape))
        square, clipped, negative = ops.convert_to_numpy(sums) / size
        age = _number(self.iterations) - _number(self._curvature_step)
        return {
            "curvature_age": float(age) if self.curvature_updates else float("nan"),
            "step_size": _number(self.learning_rate) * float(square) ** 0.5,
            "clipped_share": float(clipped),
            "negative_share": float(negative),
        }

    def preconditioner(self):
        """What the last step divided the averaged gradient by.

        Returns:
            List of tensors, one for each trainable variable that the optimizer was
            built with, of its shape.

        Raises:
            ValueError: if the optimizer has not been built.
        """
        if not self.built:
            raise ValueError("The optimizer has not been built: it took no step yet.")
        taken = ops.maximum(self.iterations, 1)
        parts = []
        for index in range(len(self._momentums)):
            _, usual, curvature = self._debiased(index, taken)
            parts.append(damped_curvature(usual, curvature, self.damping))
        return parts

    def load_own_variables(self, store):
        """Restores the slots from a saved file; see `keras.optimizers.Optimizer`."""
        super().load_own_variables(store)
        self._has_curvature = self.curvature_updates > 0

    def get_config(self):
        """The arguments that make an optimizer like this one, as a dictionary."""
        config = super().get_config()
        config.update(
            {
                "beta_1": self.beta_1,
                "beta_2": self.beta_2,
                "damping": self.damping,
                "step_clip": self.step_clip,
            }
        )
        return config


def newton_direction(gradient, usual, curvature, damping, step_clip):
    """The update rule: where one variable goes, before the learning rate.

    Args:
        gradient: tensor, the debiased average of gradients, m̂.
        usual: tensor, the gradient's usual size √v̂, entry by entry.
        curvature: tensor, the debiased average of diagonals, ĥ; all zero while there
            is none.
        damping: float λ ≥ 0.
        step_clip: float c > 0, or `None`.

    Returns:
        Tensor: `clip(m̂, ±c √v̂) / (|ĥ| + λ (mean|ĥ| + √v̂ / ρ))`.
    """
    if step_clip is not None:
        gradient = ops.clip(gradient, -step_clip * usual, step_clip * usual)
    damped = damped_curvature(usual, curvature, damping)
    return gradient / ops.where(damped > 0, damped, 1)


def damped_curvature(usual, curvature, damping):
    """What the update rule divides by: `|ĥ| + λ (mean|ĥ| + √v̂ / ρ)`.

    Args:
        usual: tensor, the gradient's usual size √v̂, entry by entry.
        curvature: tensor, the debiased average of diagonals, ĥ.
        damping: float λ ≥ 0.

    Returns:
        Tensor, zero only where there is neither curvature nor gradient.
    """
    size = ops.abs(curvature)
    uncurved = usual / UNIT_STEP
    damped = size + damping * (ops.mean(size) + uncurved)
    # No curvature to speak of, which needs damping=0: Adam's step instead.
    return ops.where(damped > 1e-12 * uncurved, damped, uncurved)


def _summed_weights(decay, steps, dtype):
    """`1 − decayᵗ`, precise to rounding: in float32, `1 - 0.999` is not."""
    rate = np.log(decay) if decay > 0 else -np.inf
    return -ops.expm1(ops.cast(steps, dtype) * ops.cast(rate, dtype))


def _number(scalar):
    """A scalar on the host. Adding 0 reads a variable, on whatever replicas it is."""
    return ops.convert_to_numpy(scalar + 0).item()


def _dense(gradient):
    """`IndexedSlices`, as Embedding's gradients are on TensorFlow, as a tensor.

    Rows that occur twice are added: squaring and clipping need the sum.
    """
    if hasattr(gradient, "indices"):
        return ops.add(ops.zeros(gradient.dense_shape, gradient.dtype), gradient)
    return gradient
