"""Newton's method with the diagonal of the Hessian, as a Keras optimizer.

Knows the update rule, and nothing of how curvature is found: whoever has a diagonal
(usually `CurvatureMonitor`) hands it to `update_hessian_diagonal`.
"""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_curvature.optimizers import layer_axes
from keras_curvature.optimizers.trust_region import (
    damped_curvature,
    newton_direction,
    trust_radius,
)

#: Decay of the average of squared gradients, β₃, and share of the average of gradients
#: in a step, ν: along entries, some of which are seldom met, and where both sides of a
#: variable have axes.
ALONG_ENTRIES = 0.999, 0.5
ALONG_AXES = 0.95, 1.0

#: Decay of the averages of `G Gᵀ` and `Gᵀ G` per step, and the steps between two
#: gradients that they take in.
MOMENT_DECAY = 0.95
TAKEN_IN = 2

#: Decay of variables that have axes, per step of rate one, without curvature: Newton
#: steps would be short beside it where the loss is steep.
DECAY_ALONG_AXES = 0.01

#: The steps between two renewals of axes, and of the trust radius along them; a
#: multiple of the former.
RENEWAL = 10


@keras.saving.register_keras_serializable(package="keras_curvature")
class DiagonalNewton(keras.optimizers.Optimizer):
    """Newton's method with the diagonal of the Hessian, within a trust radius.

    Each parameter's step is its gradient divided by the size of its own curvature:
    long where the loss is flat, short where it is steep, and nowhere longer than the
    quadratic picture can be trusted.

    ```
    m ← β₁ m + (1 − β₁) g            m̂ = m / (1 − β₁ᵗ)          every step
    v ← β₃ v + (1 − β₃) g²           v̂ = v / (1 − β₃ᵗ)          every step
    ĥ ← ĥ + (1 − β₂) / (1 − β₂ᵏ) (d − ĥ)                        every delivery
    u = ν m̂ + (1 − ν) g                                         every step
    r = √(ρ² + τ² θ²)                                           every step
    θ ← θ − η clip(u, ±√v̂) / (|ĥ| + √v̂ / r)                     every step
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
    | v̂, β₃ | debiased average of squared gradients, its decay | `beta_3` |
    | u, ν | gradient that is followed, the average's share in it | `nu` |
    | r | trust radius, a length for each entry | |
    | ρ | trust radius of a parameter that is zero | `radius` |
    | τ | trust radius of a large parameter, relative to its size | `relative_radius` |

    *Curvature* is averaged with its sign, so that an unbiased estimate stays one and
    its noise cancels. The average counts deliveries, not steps; its first value is
    the first delivery. Negative curvature is used by its size: the step leads away
    from a maximum as fast as it would lead to a minimum.

    *The trust radius* r is the length of the Newton step up to which the quadratic
    picture is taken to hold, for a gradient of its usual size `√v̂`. Where Newton's
    step is shorter, it is taken, `η u / |ĥ|`; where it would be longer, what remains
    is Adam's step with a learning rate of `η r`. The radius grows with the parameter,
    so that any magnitude is reached in few steps. No entry moves by more than `η r`
    in a step, whatever its gradient. `radius=None` is the plain Newton step, which
    reaches the minimum of a separable quadratic at once and suits nothing but
    quadratics. Keras' `clipnorm` and its relatives act before all of this, on the raw
    gradient.

    *In the axes of each layer*, unless `axes=None`, all of this happens in other
    coordinates. A variable W with rows and columns becomes `Aᵀ W B`, where A and B are
    the eigenvectors of averages of `G Gᵀ` and `Gᵀ G`, G its gradient: there the Hessian
    of a layer is nearer to diagonal. g, m, v, ĥ and the step are those of `Aᵀ W B`;
    `r²` is carried over as squared lengths are, `(A²)ᵀ r² B²`. The averages take in
    every other gradient and forget at 0.95 per step; every tenth step moves the axes by
    one step of orthogonal iteration, m exactly, v and ĥ as diagonal matrices would, and
    r is that of the parameters as they are then. Where both sides have axes v forgets
    as soon, and the step follows m̂ alone, both as in SOAP: in losses that fall by
    decades a long memory of gradients holds steps back. Elsewhere, in embeddings among
    others, it is Adam's: entries that are seldom met need it. Curvature must be
    delivered in these axes, see `curvature_axes`; `CurvatureMonitor` and
    `CurvatureFeed` do. A variable is read as a matrix by the split of its shape that
    makes the sides most alike. Vectors and single rows or columns step as without axes;
    sides of more than 1 024, or more than 8 times as long as the other, keep their own.
    For a matrix of a rows and b columns both of whose sides have axes this keeps `a b +
    2 a² + 2 b²` more numbers, and takes about `5 a b (a + b)` more multiplications and
    additions a step, and every tenth step about `8 a b (a + b) + 10 (a³ + b³)`: of the
    order of a gradient of `a + b` samples.

    *Without curvature*, before the first delivery, what remains is Adam's step
    everywhere. In the axes of layers that is what most networks need, and no less than
    curvature gives them; weights with axes decay by default then. A warning tells of it
    once where no variable has axes: what is linear, or badly scaled, needs curvature.

    From AdaHessian (Yao et al., AAAI 2021, arXiv 2006.00719) comes momentum divided
    by a debiased average of the diagonal. It averages the squares of single noisy
    samples and takes the root, which turns noise into curvature, and then smooths
    over blocks of parameters; its small ε is relative to nothing. From Sophia
    (Liu et al. 2023, arXiv 2305.14342) comes the average of seldom refreshed
    diagonals, and that a Newton step needs a bound for each entry. Its bound is a
    fixed length, sharp and the same for all; entries of negative curvature step that
    far by the sign of their momentum; it does not debias. The absolute value is that
    of saddle-free Newton (Dauphin et al. 2014, arXiv 1406.2572), v̂ is Adam's, and the
    mean of gradient and momentum is quasi-hyperbolic momentum (Ma and Yarats, ICLR
    2019, arXiv 1810.06801). The axes are those of SOAP (Vyas et al. 2024, arXiv
    2409.11321), which has Adam's step in them. docs/optimizer.md compares the rule
    with others.

    ```python
    model.compile(optimizer=kc.DiagonalNewton(), loss="mse")
    model.fit(x, y)                                          # a network
    model.fit(x, y, callbacks=[kc.CurvatureFeed((x, y))])    # linear, badly scaled
    ```

    Args:
        learning_rate: a float, a `keras.optimizers.schedules.LearningRateSchedule`,
            or a callable without arguments that returns the value to use. The
            fraction of a Newton step to take. Defaults to `0.2`.
        beta_1: float in [0, 1), the decay of the average of gradients per step.
            Defaults to `0.9`.
        beta_2: float in [0, 1), the decay of the average of diagonals per delivery.
            Defaults to `0.95`.
        radius: positive float, the trust radius of a parameter that is zero, in units
            of the parameters; or `None` for plain Newton steps. Defaults to `0.1`.
        relative_radius: float, at least 0: the trust radius of a large parameter, as
            a share of its size. Defaults to `0.3`.
        axes: `"layer"` for steps along the axes of each layer, `None` for steps along
            the entries of each variable. Defaults to `"layer"`.
        beta_3: float in [0, 1), the decay of the average of squared gradients per
            step. `None`, the default: 0.999, as in Adam; 0.95 for variables both of
            whose sides have axes.
        nu: float from 0 to 1, the share of the average of gradients in a step; the
            rest is the newest gradient. `None`, the default: 0.5; 1 for variables
            both of whose sides have axes.
        weight_decay: float or `None`. Decoupled: each step takes
            `learning_rate * weight_decay` of each variable off it. Learning rates
            here are ten times Adam's, so decays are a tenth. `None`, the default: 0.01
            for variables that have axes, as long as no curvature was delivered, and
            none for others. 0 for none at all, as where a loss shall fall by decades:
            differential equations, say.
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
        learning_rate: Any = 0.2,
        beta_1: float = 0.9,
        beta_2: float = 0.95,
        radius: float | None = 0.1,
        relative_radius: float = 0.3,
        axes: str | None = "layer",
        beta_3: float | None = None,
        nu: float | None = None,
        weight_decay: float | None = None,
        clipnorm: float | None = None,
        clipvalue: float | None = None,
        global_clipnorm: float | None = None,
        use_ema: bool = False,
        ema_momentum: float = 0.99,
        ema_overwrite_frequency: int | None = None,
        loss_scale_factor: float | None = None,
        gradient_accumulation_steps: int | None = None,
        name: str = "diagonal_newton",
        **kwargs: Any,
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
        decays = (("beta_1", beta_1), ("beta_2", beta_2), ("beta_3", beta_3))
        for key, value in decays:
            if value is not None and not 0 <= value < 1:
                raise ValueError(
                    f"`{key}` must be at least 0 and below 1. Received: {key}={value}"
                )
        if nu is not None and not 0 <= nu <= 1:
            raise ValueError(f"`nu` is a share, from 0 to 1. Received: nu={nu}")
        if radius is not None and not radius > 0:
            raise ValueError(
                "`radius` must be positive, or None for plain Newton steps. "
                f"Received: radius={radius}"
            )
        if not relative_radius >= 0:
            raise ValueError(
                "`relative_radius` must be at least 0. "
                f"Received: relative_radius={relative_radius}"
            )
        if axes not in (None, "layer"):
            raise ValueError(
                '`axes` must be None, for the entries of each variable, or "layer", '
                f"for the axes of each layer. Received: axes={axes!r}"
            )
        self.axes = axes
        self.beta_1 = beta_1
        self.beta_2 = beta_2
        self.beta_3 = beta_3
        self.nu = nu
        self.radius = radius
        self.relative_radius = relative_radius
        self._sides: list[layer_axes.Sides | None] = []
        self._memories: list[tuple[float, float]] = []
        self._has_curvature = False
        self._warned = False
        self._between_steps = _BetweenSteps()

    def build(self, variables: list[Any]) -> None:
        """Creates the slots: three numbers for each parameter, and two counters.

        And for a variable with axes its trust radius, and two square matrices for each
        side that is turned.

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
        self._add_axes(variables)
        self._curvature_updates, self._curvature_step = [
            self.add_variable((), "zeros", "int", "only_first_replica", name=name)
            for name in ("curvature_updates", "curvature_step")
        ]

    def _add_axes(self, variables: list[Any]) -> None:
        """Moments and axes for each side that is turned, and the radius along them."""
        self._side_moments: list[list[Any]] = []
        self._side_vectors: list[list[Any]] = []
        self._radii: list[Any] = []
        for variable, slot in zip(variables, self._curvatures, strict=True):
            own = self.axes == "layer" and slot is not None
            sides = layer_axes.sides_of(variable.shape) if own else None
            self._sides.append(sides)
            self._memories.append(self._memory_of(sides))
            moments: list[Any] = []
            vectors: list[Any] = []
            for name, size in layer_axes.turned_sizes(sides):
                for kind, values, initial in (
                    ("moment", moments, "zeros"),
                    ("axes", vectors, "identity"),
                ):
                    path = f"{variable.path}_{name}_{kind}".replace("/", "_")
                    values.append(
                        self.add_variable(
                            (size, size), initial, variable.dtype, name=path
                        )
                    )
            self._side_moments.append(moments)
            self._side_vectors.append(vectors)
            turned = sides is not None and self.radius is not None
            self._radii.append(
                self.add_variable_from_reference(variable, "trust_radius")
                if turned
                else None
            )

    def compile_with(self, compiler: Callable[[Callable], Callable]) -> None:
        """Compiles what is computed between steps; without, each operation runs alone.

        In a loop of your own it pays off on TensorFlow and JAX, where many small
        operations take long. `CurvatureMonitor` calls `compute_with` instead.

        ```python
        optimizer.compile_with(tf.function)  # or jax.jit
        ```

        Args:
            compiler: takes a pure function of lists of tensors, and returns one that
                computes the same.
        """
        if self._between_steps.compiler is not compiler:
            self._between_steps = _BetweenSteps(compiler)

    def compute_with(
        self, on_variables: Callable[[Callable, list[Any]], Callable]
    ) -> None:
        """Leaves to a function how to compute with variables between steps.

        `CurvatureMonitor` calls this, with what the backend does best.

        Args:
            on_variables: takes a pure function `function(values, *args)`, which returns
                new values and something else, and a list of variables. It returns a
                function of `*args` that assigns the new values to the first of the
                variables, and returns the rest.
        """
        if self._between_steps.on_variables is not on_variables:
            self._between_steps = _BetweenSteps(on_variables=on_variables)

    def apply(
        self, grads: Sequence[Any], trainable_variables: Sequence[Any] | None = None
    ) -> None:
        """Takes a step, given the gradients; see `keras.optimizers.Optimizer`.

        Args:
            grads: list of gradients, aligned with the variables.
            trainable_variables: list of variables. Defaults to those that the
                optimizer was built with.
        """
        super().apply([_dense(g) for g in grads], trainable_variables)
        # Runs in Python once per trace. `fit` traces its step after `on_train_begin`,
        # where the feed makes its first delivery.
        if not (self._has_curvature or self._warned or any(self._sides)):
            self._warned = True
            warnings.warn(
                f"`{self.name}` takes its first step without curvature. Until it is "
                "given some, its steps are Adam's. Add "
                "`keras_curvature.CurvatureFeed(train_data)` to the callbacks of "
                "`fit`, or call `optimizer.update_hessian_diagonal(diagonals)`.",
                stacklevel=2,
            )

    def _memory_of(self, sides: layer_axes.Sides | None) -> tuple[float, float]:
        """β₃ and ν of a variable."""
        turned = sides is not None and sides.left and sides.right
        usual = ALONG_AXES if turned else ALONG_ENTRIES
        given = self.beta_3, self.nu
        beta_3, nu = (u if x is None else x for u, x in zip(usual, given, strict=True))
        return beta_3, nu

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        """Moves one variable.

        Args:
            gradient: its gradient.
            variable: the variable.
            learning_rate: scalar.
        """
        dtype = variable.dtype
        gradient = ops.cast(gradient, dtype)
        index = self._get_variable_index(variable)
        values = ops.convert_to_tensor(variable)
        sides = self._sides[index]
        vectors = [ops.convert_to_tensor(q) for q in self._side_vectors[index]]
        seen = gradient
        if sides is not None:
            seen = layer_axes.turned(gradient, sides, vectors)
        m, v = self._momentums[index], self._second_moments[index]
        self.assign_add(m, (seen - m) * (1 - self.beta_1))
        beta_3, nu = self._memories[index]
        self.assign_add(v, (ops.square(seen) - v) * (1 - beta_3))
        average, usual = self._debiased(m, v, beta_3, self.iterations + 1)
        slot = self._radii[index]
        kept = None if slot is None else ops.convert_to_tensor(slot)
        radius = self._radius_of(values, sides, vectors, kept, self.iterations)
        if slot is not None:
            self.assign(slot, radius)
        direction = newton_direction(
            nu * average + (1 - nu) * seen,
            usual,
            ops.convert_to_tensor(self._curvatures[index]),
            radius,
        )
        if sides is not None:
            direction = layer_axes.turned_back(direction, sides, vectors)
            self._renew(index, gradient, sides, vectors)
            if self.weight_decay is None and self._use_weight_decay(variable):
                alone = ops.equal(self._curvature_updates, 0)
                direction += DECAY_ALONG_AXES * ops.cast(alone, dtype) * values
        self.assign_sub(variable, ops.cast(learning_rate, dtype) * direction)

    def _radius_of(
        self, values: Any, sides: Any, vectors: list[Any], kept: Any, steps: Any
    ) -> Any:
        """The trust radius of one variable, along the axes that it steps in.

        Along entries that of its values; in axes as it was when they were renewed.
        """
        if kept is None:
            return trust_radius(values, self.radius, self.relative_radius)

        def new() -> Any:
            radius = trust_radius(values, self.radius, self.relative_radius)
            return ops.sqrt(layer_axes.spread(ops.square(radius), sides, vectors))

        return ops.cond(ops.equal(steps % RENEWAL, 0), new, lambda: kept)

    def _renew(self, index: int, gradient: Any, sides: Any, vectors: list[Any]) -> None:
        """Now and then takes a gradient into the moments, and follows their axes.

        Where axes move, the average of gradients moves with them, and squares and
        curvature as diagonal matrices would.
        """
        slots = [self._momentums, self._second_moments, self._curvatures]
        turned = [*self._side_vectors[index], *(slot[index] for slot in slots)]
        every = [*self._side_moments[index], *turned]
        steps = self.iterations + 1

        def followed(moments: list[Any]) -> list[Any]:
            m, v, h = (ops.convert_to_tensor(slot[index]) for slot in slots)
            new = [
                layer_axes.followed(q, moment)
                for q, moment in zip(vectors, moments, strict=True)
            ]
            moves = [
                ops.matmul(ops.transpose(old), q)
                for old, q in zip(vectors, new, strict=True)
            ]
            return [
                *new,
                layer_axes.turned(m, sides, moves),
                layer_axes.spread(v, sides, moves),
                layer_axes.spread(h, sides, moves),
            ]

        def as_they_are(slots: list[Any]) -> list[Any]:
            return [ops.convert_to_tensor(slot) for slot in slots]

        def taken() -> list[Any]:
            found = layer_axes.moments(gradient, sides)
            moments = [
                moment + (product - moment) * (1 - MOMENT_DECAY**TAKEN_IN)
                for moment, product in zip(
                    self._side_moments[index], found, strict=True
                )
            ]
            axes_due = ops.equal(steps % RENEWAL, 0)
            moved = ops.cond(
                axes_due, lambda: followed(moments), lambda: as_they_are(turned)
            )
            return [*moments, *moved]

        due = ops.equal(steps % TAKEN_IN, 0)
        values = ops.cond(due, taken, lambda: as_they_are(every))
        for slot, value in zip(every, values, strict=True):
            self.assign(slot, value)

    def _debiased(self, m: Any, v: Any, beta_3: float, steps: Any) -> tuple[Any, Any]:
        """m̂ and √v̂ of one variable, after that many steps."""
        return (
            m / _summed_weights(self.beta_1, steps, m.dtype),
            ops.sqrt(v / _summed_weights(beta_3, steps, v.dtype)),
        )

    def update_hessian_diagonal(self, diagonals: Sequence[Any]) -> bool:
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
                order, each in the axes that `curvature_axes` gives.

        Returns:
            Whether the diagonal was taken in.

        Raises:
            ValueError: if the optimizer has not been built, or for a wrong number of
                arrays or a wrong shape.
        """
        self._check_diagonals(diagonals)
        slots = self._slots_of(self._curvatures)
        finite = self._between_steps(
            self._averaged,
            [*slots, self._curvature_updates, self._curvature_step],
            self._steps(),
            [
                ops.convert_to_tensor(diagonal, slot.dtype)
                for diagonal, slot in zip(self._slots_of(diagonals), slots, strict=True)
            ],
        )
        if not bool(finite):
            warnings.warn(
                f"`{self.name}` was given a Hessian diagonal with entries that are not "
                "finite, and keeps the curvature it has. If this goes on, training "
                "has diverged, or the loss overflows in low precision: lower the "
                "learning rate, or probe in float32.",
                stacklevel=2,
            )
            return False
        self._has_curvature = True
        return True

    def _averaged(
        self, values: list[Any], steps: Any, diagonals: list[Any]
    ) -> tuple[list[Any], Any]:
        """ĥ with another delivery, k, and when it was, if it is finite. Pure.

        Args:
            values: ĥ of each variable, k, and the step of the last delivery.
            steps: the number of steps so far.
            diagonals: what is delivered.

        Returns:
            New values; and whether all of the diagonals is finite.
        """
        *curvatures, updates, last = values
        finite = ops.all(ops.stack([ops.all(ops.isfinite(d)) for d in diagonals]))
        new = []
        for average, diagonal in zip(curvatures, diagonals, strict=True):
            summed = _summed_weights(self.beta_2, updates + 1, average.dtype)
            weight = (1 - self.beta_2) / summed
            moved = average + (diagonal - average) * weight
            new.append(ops.where(finite, moved, average))
        taken = ops.cast(finite, updates.dtype)
        new += [updates + taken, ops.where(finite, ops.cast(steps, last.dtype), last)]
        return new, finite

    def _slots_of(self, entries: Sequence[Any]) -> list[Any]:
        """Of one entry for each variable, those of variables that have slots.

        Keras overwrites the others with what comes as their gradient (float8).
        """
        return [
            entry
            for entry, slot in zip(entries, self._curvatures, strict=True)
            if slot is not None
        ]

    def _check_diagonals(self, diagonals: Sequence[Any]) -> None:
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

    def curvature_axes(self) -> list[Any]:
        """The axes in which each variable's diagonal is expected now.

        Returns:
            List with an entry for each trainable variable that the optimizer was built
            with: `None` for the entries of the variable itself, or a pair of
            orthogonal matrices A and B with axes as columns, of which one may be
            `None` for ones. The variable's diagonal is that of the Hessian by
            `Aᵀ W B`, where W is the variable as a matrix. Axes move during a step:
            ask anew for each delivery.

        Raises:
            ValueError: if the optimizer has not been built.
        """
        self._state()
        found: list[Any] = []
        for sides, vectors in zip(self._sides, self._side_vectors, strict=True):
            rest = _values(vectors)
            if sides is None:
                found.append(None)
            else:
                left = rest.pop(0) if sides.left else None
                found.append((left, rest.pop(0) if sides.right else None))
        return found

    @property
    def curvature_updates(self) -> int:
        """Number of diagonals taken in so far, an integer."""
        return _number(self._curvature_updates) if self.built else 0

    def statistics(self) -> dict[str, float]:
        """What the last step was made of, read from the slots when called.

        Costs about one step's arithmetic, and nothing when not called.

        Returns:
            Dictionary of floats: `curvature_age`, steps since the last diagonal was
            taken in (`nan` if none was); `step_size`, the root mean square over all
            parameters of the step that the averaged gradient asks for, without
            weight decay; `clipped_share`, the share of entries in which the average
            exceeds the gradient's usual size; `newton_share`, the share of entries
            in which curvature weighs more than the trust radius; `negative_share`,
            the share of entries with negative curvature.

        Raises:
            ValueError: if the optimizer has not been built.
        """
        sums = ops.convert_to_numpy(
            self._between_steps(self._sums, self._state(), self._steps())
        )
        size = sum(int(np.prod(s.shape)) for s in self._slots_of(self._curvatures))
        square, clipped, newton, negative = sums.tolist()
        age = _number(self.iterations) - _number(self._curvature_step)
        return {
            "curvature_age": float(age) if self.curvature_updates else float("nan"),
            "step_size": _number(self.learning_rate) * (square / size) ** 0.5,
            "clipped_share": clipped / size,
            "newton_share": newton / size,
            "negative_share": negative / size,
        }

    def _sums(self, state: list[Any], steps: Any) -> tuple[list[Any], Any]:
        """What `statistics` averages over all entries, summed: `(4,)`. Pure."""
        sums = 0
        for average, usual, h, radius in self._ingredients(state, steps):
            rule = usual, h, radius
            counted = (
                ops.square(newton_direction(average, *rule)),
                # Shortened by rounding alone (the first step) is not clipped.
                ops.abs(average) > 1.001 * usual,
                2 * ops.abs(h) > damped_curvature(*rule),
                h < 0,
            )
            sums += ops.stack([ops.sum(ops.cast(c, "float32")) for c in counted])
        return [], sums

    def preconditioner(self) -> list[Any]:
        """What a step from here divides the gradient by.

        Returns:
            List of tensors, one for each trainable variable that the optimizer was
            built with, of its shape; ones where it does not step. Those of a variable
            that has axes are in its axes.

        Raises:
            ValueError: if the optimizer has not been built.
        """
        parts = iter(self._between_steps(self._damped, self._state(), self._steps()))
        return [
            ops.ones(variable.shape) if slot is None else next(parts)
            for variable, slot in zip(
                self._trainable_variables, self._curvatures, strict=True
            )
        ]

    def _damped(self, state: list[Any], steps: Any) -> tuple[list[Any], list[Any]]:
        """What `preconditioner` gives, for variables that have slots. Pure."""
        return [], [
            damped_curvature(usual, h, radius)
            for _, usual, h, radius in self._ingredients(state, steps)
        ]

    def _state(self) -> list[Any]:
        """All m, v, ĥ and θ, and then axes and radii; see `_ingredients`."""
        if not self.built:
            raise ValueError("The optimizer has not been built: it took no step yet.")
        every = (
            self._momentums,
            self._second_moments,
            self._curvatures,
            self._trainable_variables,
        )
        slots = [slot for entries in every for slot in self._slots_of(entries)]
        axes = [q for vectors in self._side_vectors for q in vectors]
        return [*slots, *axes, *(r for r in self._radii if r is not None)]

    def _ingredients(self, state: list[Any], steps: Any) -> list[tuple[Any, ...]]:
        """m̂, √v̂, ĥ and r of each variable that has slots, in its axes. Pure."""
        after = ops.maximum(steps, 1)
        sides, memories = self._slots_of(self._sides), self._slots_of(self._memories)
        radii = self._slots_of(self._radii)
        count = len(sides)
        m, v, h, values = (state[i * count : (i + 1) * count] for i in range(4))
        rest = iter(state[4 * count :])
        axes = [[next(rest) for _ in layer_axes.turned_sizes(own)] for own in sides]
        found = []
        for i, (own, (beta_3, _)) in enumerate(zip(sides, memories, strict=True)):
            kept = None if radii[i] is None else next(rest)
            radius = self._radius_of(values[i], own, axes[i], kept, steps)
            found.append((*self._debiased(m[i], v[i], beta_3, after), h[i], radius))
        return found

    def _steps(self) -> Any:
        """The number of steps so far: no variable where gradients are accumulated."""
        return self.iterations + 0

    def stability_threshold(self) -> float:
        """The curvature, over `preconditioner`, above which steps are unstable.

        On a quadratic: `2 (1 + β₁) / (η (ν (1 − β₁) + (1 − ν)(1 + β₁)))`, with the
        least ν of all variables; see `relative_thresholds`.

        Returns:
            A float; infinite for a learning rate of zero.
        """
        rate, gain = _number(self.learning_rate), max(self._gains())
        return 2 * (1 + self.beta_1) / (rate * gain) if rate > 0 else float("inf")

    def relative_thresholds(self) -> list[float]:
        """The `stability_threshold` of each variable, over the least of them.

        With a factor f for each, steps are unstable where the largest eigenvalue of
        `(f D)^{-1/2} H (f D)^{-1/2}` is beyond the threshold.

        Returns:
            List of floats, at least 1, in the order of the trainable variables.
        """
        gains = self._gains()
        return [max(gains) / gain for gain in gains]

    def _gains(self) -> list[float]:
        """What of a gradient that changes its sign with each step is followed.

        By variable, times `1 + β₁`. At the edge of stability gradients do so.
        """
        beta, memories = self.beta_1, self._memories or [self._memory_of(None)]
        return [nu * (1 - beta) + (1 - nu) * (1 + beta) for _, nu in memories]

    def load_own_variables(self, store: Any) -> None:
        """Restores the slots from a saved file; see `keras.optimizers.Optimizer`."""
        super().load_own_variables(store)
        self._has_curvature = self.curvature_updates > 0

    def get_config(self) -> dict[str, Any]:
        """The arguments that make an optimizer like this one, as a dictionary."""
        config = super().get_config()
        config.update(
            {
                "beta_1": self.beta_1,
                "beta_2": self.beta_2,
                "radius": self.radius,
                "relative_radius": self.relative_radius,
                "axes": self.axes,
                "beta_3": self.beta_3,
                "nu": self.nu,
            }
        )
        return config


class _BetweenSteps:
    """Calls pure functions with the values of variables, and assigns what is new.

    Each function is made when it is called first, always with the same variables.

    No dictionary of its own in the optimizer: Keras and TensorFlow track those.

    Args:
        compiler: compiles a pure function; see `compile_with`.
        on_variables: does all of it in its own way; see `compute_with`.
    """

    def __init__(
        self,
        compiler: Callable[[Callable], Callable] = lambda function: function,
        on_variables: Callable[[Callable, list[Any]], Callable] | None = None,
    ):
        self.compiler, self.on_variables = compiler, on_variables
        self._made: dict[Callable, Callable] = {}

    def __call__(self, function: Callable, variables: list[Any], *args: Any) -> Any:
        if function not in self._made:
            make = self.on_variables or self._one_by_one
            self._made[function] = make(function, variables)
        return self._made[function](*args)

    def _one_by_one(self, function: Callable, variables: list[Any]) -> Callable:
        compiled = self.compiler(function)

        def call(*args: Any) -> Any:
            new, result = compiled(_values(variables), *args)
            for variable, value in zip(variables, new, strict=False):
                variable.assign(value)
            return result

        return call


def _summed_weights(decay: float, steps: Any, dtype: Any) -> Any:
    """`1 − decayᵗ`, precise to rounding: in float32, `1 - 0.999` is not."""
    rate = np.log(decay) if decay > 0 else -np.inf
    return -ops.expm1(ops.cast(steps, dtype) * ops.cast(rate, dtype))


def _values(variables: list[Any]) -> list[Any]:
    """What variables hold, as tensors, on whatever replicas the variables are."""
    return [ops.stop_gradient(variable) for variable in variables]


def _number(scalar: Any) -> Any:
    """A scalar on the host. Adding 0 reads a variable, on whatever replicas it is."""
    return ops.convert_to_numpy(scalar + 0).item()


def _dense(gradient: Any) -> Any:
    """`IndexedSlices`, as Embedding's gradients are on TensorFlow, as a tensor.

    Rows that occur twice are added: squaring and clipping need the sum.
    """
    if hasattr(gradient, "dense_shape"):
        return ops.add(ops.zeros(gradient.dense_shape, gradient.dtype), gradient)
    return gradient
