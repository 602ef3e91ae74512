"""The update rule against NumPy, and each way of training that Keras has."""

import warnings

import keras
import numpy as np
import pytest

from keras_curvature.optimizers import DiagonalNewton
from keras_curvature.optimizers.trust_region import newton_direction, trust_radius

# float32, sums over a few dozen terms and square roots of running averages.
RTOL = {"float32": 2e-5, "float64": 1e-11}


class Reference:
    """The formula of the class docstring for one variable, in NumPy."""

    def __init__(
        self,
        beta_1=0.9,
        beta_2=0.95,
        radius=0.1,
        relative_radius=0.3,
        beta_3=0.999,
        nu=0.5,
    ):
        self.betas, self.radii = (beta_1, beta_2, beta_3), (radius, relative_radius)
        self.nu = nu
        self.m = self.v = self.h = 0.0
        self.steps = self.updates = 0

    def deliver(self, diagonal):
        beta = self.betas[1]
        self.updates += 1
        self.h = (1 - beta) * diagonal + beta * self.h

    def direction(self, gradient, values):
        beta, _, long = self.betas
        self.steps += 1
        self.m = beta * self.m + (1 - beta) * gradient
        self.v = long * self.v + (1 - long) * gradient**2
        m = self.m / (1 - beta**self.steps)
        usual = np.sqrt(self.v / (1 - long**self.steps))
        h = self.h / (1 - self.betas[1] ** self.updates) if self.updates else 0.0
        followed = self.nu * m + (1 - self.nu) * gradient
        followed = np.clip(followed, -usual, usual)
        radius = np.hypot(self.radii[0], self.radii[1] * values)
        return followed / (np.abs(h) + usual / radius)


def built(values, **arguments):
    """An optimizer along entries, built with variables of these values; and these."""
    variables = [keras.Variable(v, name=f"v{i}") for i, v in enumerate(values)]
    optimizer = DiagonalNewton(axes=None, **arguments)
    optimizer.build(variables)
    return optimizer, variables


def quietly(function, *args, **kwargs):
    """A call without warnings: the one about missing curvature is expected."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(*args, **kwargs)


def slots(optimizer):
    return [v.numpy() for v in optimizer.variables]


# The rule


def test_quadratic_in_one_step():
    """Curvatures over six decades, two of them negative: minimum, or its mirror."""
    h = np.array([1e-3, -0.5, 1.0, 40.0, -1e3], "float32")
    start = np.array([5.0, -2.0, 0.3, 100.0, -1e-2], "float32")
    optimizer, (x,) = built([start], learning_rate=1.0, radius=None)
    optimizer.update_hessian_diagonal([h])
    optimizer.apply([h * start])
    end = (x.numpy() - start) / np.abs(start)
    np.testing.assert_allclose(end, -np.sign(h * start), 2e-6)


@pytest.mark.parametrize(
    ("beta_1", "relative_radius", "memory"),
    [
        (0.0, 0.5, {}),
        (0.9, 0.0, {}),
        (0.9, 0.5, {}),
        (0.9, 0.5, {"beta_3": 0.95, "nu": 1.0}),
        (0.5, 0.5, {"beta_3": 0.0, "nu": 0.2}),
    ],
)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_trajectory(dtype, beta_1, relative_radius, memory, request):
    """30 steps, 8 deliveries and a gradient spike, against the formula."""
    if dtype == "float64":
        request.getfixturevalue("float64")
    rng = np.random.default_rng(0)
    start = [rng.standard_normal(s) for s in ((3, 2), (4,))]
    arguments = {"beta_1": beta_1, "beta_2": 0.7, "relative_radius": relative_radius}
    arguments |= memory
    optimizer, variables = built(start, learning_rate=0.3, radius=0.2, **arguments)
    references = [Reference(radius=0.2, **arguments) for _ in start]
    for step in range(30):
        if step % 4 == 0 and step:
            diagonals = [rng.standard_normal(s.shape) for s in start]
            assert optimizer.update_hessian_diagonal(diagonals)
            for reference, diagonal in zip(references, diagonals, strict=True):
                reference.deliver(diagonal)
        gradients = [rng.standard_normal(s.shape) for s in start]
        if step == 20:
            gradients[0] *= 100
        quietly(optimizer.apply, [keras.ops.cast(g, dtype) for g in gradients])
        for i, (reference, gradient) in enumerate(
            zip(references, gradients, strict=True)
        ):
            start[i] = start[i] - 0.3 * reference.direction(gradient, start[i])
            np.testing.assert_allclose(
                variables[i].numpy(), start[i], RTOL[dtype], RTOL[dtype]
            )


def direction_of(*arrays, radius):
    """`newton_direction` of four entries."""
    *arrays, values = [keras.ops.convert_to_tensor(a, "float32") for a in arrays]
    direction = newton_direction(*arrays, trust_radius(values, radius, 0.1))
    return keras.ops.convert_to_numpy(direction)


def test_sizes_in_the_rule():
    """Negative curvature steps like positive; with none it is Adam's, of the radius."""
    curvature, values = [1e6, -1e6, 0, 0], [0, 0, 0, 10]
    direction = direction_of([2] * 4, [4] * 4, curvature, values, radius=0.5)
    np.testing.assert_allclose(
        direction, [2e-6, 2e-6, 0.25, np.hypot(0.5, 1) / 2], 1e-4
    )


@pytest.mark.parametrize("radius", [None, 0.1])
@pytest.mark.parametrize("curvature", [0.0, 2e-38, -2e-38])
def test_no_curvature_is_never_far(curvature, radius):
    """Steps stay finite, and within the radius."""
    gradient = np.array([0.0, 1e-12, 1.0, -1e12])
    direction = direction_of(
        gradient, np.abs(gradient), [curvature] * 4, [0] * 4, radius=radius
    )
    np.testing.assert_allclose(direction, np.sign(gradient) * (radius or 1), 1e-6)


@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_blind_to_the_scale_of_the_loss(scale):
    """A loss in other units makes the same steps."""
    ends = []
    for factor in (1.0, scale):
        optimizer, (x,) = built([np.ones(5)])
        rng = np.random.default_rng(1)
        for _ in range(5):
            optimizer.update_hessian_diagonal([factor * rng.standard_normal(5)])
            optimizer.apply([(factor * rng.standard_normal(5)).astype("float32")])
        ends.append(x.numpy())
    np.testing.assert_allclose(*ends, 1e-5)


def test_no_entry_moves_further_than_promised():
    """`η √(ρ² + τ² θ²)`, even if the gradient leaps and the curvature vanishes."""
    optimizer, (x,) = built([np.linspace(-9, 9, 50)], learning_rate=0.3, radius=0.2)
    rng = np.random.default_rng(2)
    for exponent in [0] * 40 + [6, 0, 12]:
        optimizer.update_hessian_diagonal([10.0**-exponent * rng.standard_normal(50)])
        before = x.numpy()
        optimizer.apply([(10.0**exponent * rng.standard_normal(50)).astype("float32")])
        promised = 0.3 * np.hypot(0.2, 0.3 * before)
        assert (np.abs(x.numpy() - before) <= 1.0001 * promised).all()


def test_any_magnitude_is_reached():
    """Minima over six decades with matching curvatures, from zero, in 300 steps."""
    goal = np.array([1e-3, 1.0, 1e3], "float32")
    optimizer, (x,) = built([np.zeros(3)])
    # Delivered again it would be the same average.
    optimizer.update_hessian_diagonal([goal**-2])
    for _ in range(300):
        optimizer.apply([(x.numpy() - goal) / goal**2])
    np.testing.assert_allclose(x.numpy(), goal, 0.01)


@pytest.mark.parametrize(
    ("beta_1", "nu"), [(0.0, 0.5), (0.9, 0.5), (0.9, 0.8), (0.9, 0.0), (0.5, 1.0)]
)
def test_stable_up_to_the_threshold(beta_1, nu):
    """On a quadratic whose entries are coupled; just beyond it, steps grow."""
    hessian = np.array([[1.0, 0.9], [0.9, 1.0]])
    for factor, stable in ((0.97, True), (1.03, False)):
        rate = 0.1
        optimizer, (x,) = built(
            [[1e-6, 1e-6]], learning_rate=rate, beta_1=beta_1, nu=nu, radius=None
        )
        scale = factor * optimizer.stability_threshold() / 1.9
        optimizer.update_hessian_diagonal([[1.0, 1.0]])
        for _ in range(400):
            before = np.abs(x.numpy()).max()
            # Clipped where it grows beyond its usual size, so only the trend counts.
            optimizer.apply([scale * hessian @ x.numpy()])
            if before < 1e-12:
                break
        assert (before < 1e-9) == stable


# The hand-over


def test_delivery_is_used_in_the_next_step():
    """Not a step later, and not averaged away when `beta_2` is 0."""
    optimizer, (x,) = built([np.zeros(1)], learning_rate=1.0, radius=None, beta_2=0.0)
    for curvature in (4.0, 2.0, 8.0):
        x.assign([1.0])
        assert optimizer.update_hessian_diagonal([[curvature]])
        optimizer.apply([keras.ops.array([1.0])])
        np.testing.assert_allclose(x.numpy(), [1 - 1 / curvature], 1e-5)


def test_average_counts_deliveries():
    """Debiased from the first on; steps in between change nothing."""
    optimizer, _ = built([np.zeros(2)], beta_2=0.9)
    first, second = np.array([4.0, -2.0]), np.array([1.0, 1.0])
    optimizer.update_hessian_diagonal([first])
    np.testing.assert_array_equal(optimizer._curvatures[0].numpy(), first)
    for _ in range(3):
        optimizer.apply([keras.ops.ones(2)])
    optimizer.update_hessian_diagonal([second])
    expected = (0.1 * 0.9 * first + 0.1 * second) / (1 - 0.9**2)
    np.testing.assert_allclose(optimizer._curvatures[0].numpy(), expected, 1e-6)
    assert optimizer.curvature_updates == 2


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_refuses_what_is_not_finite(bad):
    optimizer, _ = built([np.zeros(2), np.zeros(3)])
    optimizer.update_hessian_diagonal([np.ones(2), np.ones(3)])
    before = slots(optimizer)
    with pytest.warns(UserWarning, match="not finite"):
        taken = optimizer.update_hessian_diagonal([[5.0, 5.0], [1.0, bad, 1.0]])
    assert taken is False
    for a, b in zip(before, slots(optimizer), strict=True):
        np.testing.assert_array_equal(a, b)


def test_hand_over_errors():
    optimizer = DiagonalNewton()
    with pytest.raises(ValueError, match=r"optimizer\.build\("):
        optimizer.update_hessian_diagonal([np.zeros(2)])
    optimizer, _ = built([np.zeros(2), np.zeros((3, 1))])
    with pytest.raises(ValueError, match=r"2 trainable .* Received: 1 arrays"):
        optimizer.update_hessian_diagonal([np.zeros(2)])
    with pytest.raises(ValueError, match=r"\(3, 1\).*v1.*Received: shape \(3,\)"):
        optimizer.update_hessian_diagonal([np.zeros(2), np.zeros(3)])


def test_one_warning_without_curvature():
    """It names the feed; none if curvature came before the first step."""
    optimizer, (x,) = built([np.zeros(2)])
    with pytest.warns(UserWarning, match="CurvatureFeed"):
        optimizer.apply([keras.ops.array([3.0, -4.0])])
    # Adam's first step, of learning rate `η ρ`.
    rate = DiagonalNewton().learning_rate * 0.1
    np.testing.assert_allclose(x.numpy(), [-rate, rate], 1e-5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.apply([keras.ops.array([3.0, -4.0])])
        optimizer, _ = built([np.zeros(2)])
        optimizer.update_hessian_diagonal([np.ones(2)])
        optimizer.apply([keras.ops.array([3.0, -4.0])])


def test_no_gradients_at_all():
    """As where a `MultiOptimizer` has no variables for it: a step of nothing."""
    optimizer = DiagonalNewton()
    quietly(optimizer.apply, [])
    assert not optimizer.built


def test_statistics():
    """One entry of four clipped, two of negative curvature."""
    optimizer, _ = built(
        [np.zeros(3), np.zeros(1)], learning_rate=0.2, beta_1=0.0, relative_radius=0.0
    )
    with pytest.raises(ValueError, match="built"):
        DiagonalNewton().statistics()
    quietly(optimizer.apply, [keras.ops.ones(3), keras.ops.ones(1)])
    figures = optimizer.statistics()
    assert np.isnan(figures.pop("curvature_age"))
    assert figures.pop("step_size") == pytest.approx(0.2 * 0.1)
    shares = {"clipped_share": 0.0, "newton_share": 0.0, "negative_share": 0.0}
    assert figures == shares

    optimizer.update_hessian_diagonal([[100.0, -200.0, 3.0], [-1.0]])
    before = np.zeros(4), 0.0
    for gradient in ([1.0, 1.0, 1.0], [1.0, 1.0, 5.0]):
        before = np.concatenate([v.numpy() for v in optimizer._trainable_variables])
        optimizer.apply([keras.ops.array(gradient), keras.ops.ones(1)])
    moved = before - np.concatenate([v.numpy() for v in optimizer._trainable_variables])
    figures = optimizer.statistics()
    assert figures["curvature_age"] == 2
    assert figures["clipped_share"] == 0.25
    assert figures["newton_share"] == 0.5
    assert figures["negative_share"] == 0.5
    # The figure is computed from the slots, the change from two nearby float32.
    assert figures["step_size"] == pytest.approx(np.sqrt(np.mean(moved**2)), 1e-4)


def native_compiler():
    """What the docstring of `compile_with` recommends for this backend."""
    backend = keras.backend.backend()
    if backend == "tensorflow":
        import tensorflow as tf

        return tf.function
    if backend == "jax":
        import jax

        return jax.jit
    pytest.skip("PyTorch runs functions as they are")


def test_compiled_between_steps():
    """Each function once, however often it is called; what it gives is the same."""
    native, traces = native_compiler(), []

    def compiler(function):
        def traced(*args):
            traces.append(function.__name__)
            return function(*args)

        return native(traced)

    def trained(*compilers):
        rng = np.random.default_rng(4)
        optimizer, _ = built([rng.standard_normal(s) for s in ((3, 2), (4,))])
        told = []
        for _ in range(3):
            for one in compilers:
                optimizer.compile_with(one)
            arrays = [[rng.standard_normal(s) for s in ((3, 2), (4,))] for _ in "dg"]
            optimizer.update_hessian_diagonal(arrays[0])
            optimizer.apply([keras.ops.cast(g, "float32") for g in arrays[1]])
            told.append(list(optimizer.statistics().values()))
            told.extend(np.array(p) for p in optimizer.preconditioner())
        return slots(optimizer) + told

    # Compilers fuse products and sums, which rounds once less.
    for a, b in zip(trained(compiler), trained(), strict=True):
        np.testing.assert_allclose(a, b, 1e-5, 1e-7)
    assert sorted(traces) == ["_averaged", "_damped", "_sums"]


def test_what_is_not_finite_is_refused_when_compiled():
    optimizer, _ = built([np.zeros(2)])
    optimizer.compile_with(native_compiler())
    optimizer.update_hessian_diagonal([np.ones(2)])
    before = slots(optimizer)
    with pytest.warns(UserWarning, match="not finite"):
        assert not optimizer.update_hessian_diagonal([[5.0, np.nan]])
    for a, b in zip(before, slots(optimizer), strict=True):
        np.testing.assert_array_equal(a, b)


def test_variables_that_keras_overwrites_have_no_slots():
    """As the scales of float8 training: their "gradient" is their next value."""
    scale = keras.Variable(np.ones(2), name="scale")
    scale.overwrite_with_gradient = True
    x = keras.Variable(np.ones(3), name="x")
    optimizer = DiagonalNewton(1.0, beta_1=0.0, radius=None)
    optimizer.build([scale, x])
    optimizer.update_hessian_diagonal([np.full(2, 9.0), np.full(3, 4.0)])
    optimizer.apply([keras.ops.full((2,), 7.0), keras.ops.ones(3)])
    np.testing.assert_allclose(scale.numpy(), [7.0] * 2)
    np.testing.assert_allclose(x.numpy(), [0.75] * 3)
    ones, curvature = optimizer.preconditioner()
    np.testing.assert_allclose(ones, [1.0] * 2)
    np.testing.assert_allclose(curvature, [4.0] * 3)
    assert optimizer.statistics()["newton_share"] == 1.0


def test_builds_once():
    """A monitor and `fit` may both build it."""
    optimizer, variables = built([np.zeros(2)])
    before = optimizer.variables
    optimizer.build(variables)
    # Iterations, learning rate, three slots, two counters.
    assert len(before) == 7
    assert [id(v) for v in optimizer.variables] == [id(v) for v in before]


# Arguments


def test_config_round_trip():
    arguments = {
        "learning_rate": 0.25,
        "beta_1": 0.8,
        "beta_2": 0.7,
        "radius": None,
        "relative_radius": 0.2,
        "axes": "layer",
        "beta_3": 0.99,
        "nu": 0.7,
        "weight_decay": 0.01,
        "clipnorm": 2.0,
        "clipvalue": None,
        "global_clipnorm": None,
        "use_ema": True,
        "ema_momentum": 0.9,
        "ema_overwrite_frequency": 5,
        "loss_scale_factor": 4.0,
        "gradient_accumulation_steps": 3,
        "name": "mine",
    }
    optimizer = DiagonalNewton(**arguments)
    assert optimizer.get_config() == arguments
    again = keras.saving.deserialize_keras_object(
        keras.saving.serialize_keras_object(optimizer)
    )
    assert isinstance(again, DiagonalNewton)
    assert again.get_config() == arguments


def test_defaults_survive_the_config():
    optimizer = DiagonalNewton.from_config(DiagonalNewton().get_config())
    assert optimizer.get_config() == DiagonalNewton().get_config()


@pytest.mark.parametrize(
    "argument",
    [
        {"beta_1": 1.0},
        {"beta_2": -0.1},
        {"beta_3": 1.0},
        {"nu": -0.1},
        {"nu": 1.1},
        {"nu": float("nan")},
        {"radius": 0.0},
        {"radius": float("nan")},
        {"relative_radius": -0.1},
        {"axes": "layers"},
    ],
)
def test_argument_errors(argument):
    with pytest.raises(ValueError, match=f"{next(iter(argument))}.*Received: "):
        DiagonalNewton(**argument)
