"""`DiagonalNewton(axes="layer")` against NumPy."""

import warnings

import keras
import numpy as np
import pytest
from keras import ops

from keras_curvature.optimizers import DiagonalNewton, layer_axes
from keras_curvature.optimizers.layer_axes import Sides

# Sums of a few dozen products, and QR of matrices whose condition is about 100. On
# PyTorch, Keras multiplies matrices of float64 in float32 (seen with 3.15.1).
RTOL = {
    "float32": 2e-4,
    "float64": 1e-5 if keras.backend.backend() == "torch" else 1e-9,
}

#: A number that float32 holds.
RATE = 0.125


@pytest.mark.parametrize(
    ("shape", "sides"),
    [
        ((), None),
        ((7,), None),
        ((7, 1), None),
        ((1, 7), None),
        ((7, 5), Sides(7, 5, True, True)),
        # A kernel of a convolution, and those of attention.
        ((3, 3, 8, 16), Sides(72, 16, True, True)),
        ((64, 4, 16), Sides(64, 64, True, True)),
        ((4, 16, 64), Sides(64, 64, True, True)),
        # A table, a long kernel, and one that is too large.
        ((1000, 6), Sides(1000, 6, False, True)),
        ((6, 49), Sides(6, 49, True, False)),
        ((1025, 1025), None),
    ],
)
def test_sides(shape, sides):
    assert layer_axes.sides_of(shape) == sides


class Reference:
    """The rule for one matrix in NumPy, in float64."""

    def __init__(self, shape):
        self.m = self.v = np.zeros(shape)
        self.h = np.zeros(shape)
        self.steps = self.updates = 0
        self.axes = [np.eye(n) for n in shape]
        self.moments = [np.zeros((n, n)) for n in shape]

    def deliver(self, diagonal):
        self.updates += 1
        weight = 0.05 / (1 - 0.95**self.updates)
        self.h = self.h + weight * (diagonal - self.h)

    def direction(self, gradient, values):
        a, b = self.axes
        seen = a.T @ gradient @ b
        self.steps += 1
        self.m = 0.9 * self.m + 0.1 * seen
        self.v = 0.95 * self.v + 0.05 * seen**2
        m = self.m / (1 - 0.9**self.steps)
        usual = np.sqrt(self.v / (1 - 0.95**self.steps))
        if self.steps % 10 == 1:
            self.radius = np.sqrt((a**2).T @ (0.01 + 0.09 * values**2) @ b**2)
        followed = np.clip(m, -usual, usual)
        direction = a @ (followed / (np.abs(self.h) + usual / self.radius)) @ b.T
        if self.steps % 2 == 0:
            for i, moment in enumerate((gradient @ gradient.T, gradient.T @ gradient)):
                self.moments[i] += (1 - 0.95**2) * (moment - self.moments[i])
        if self.steps % 10 == 0:
            self.renew()
        return direction

    def renew(self):
        moves = []
        for i, (q, moment) in enumerate(zip(self.axes, self.moments, strict=True)):
            product = moment @ q
            order = np.argsort(-np.sum(q * product, axis=0))
            product = product[:, order] / np.abs(product).max() + 1e-7 * q[:, order]
            self.axes[i] = np.linalg.qr(product)[0]
            moves.append(q.T @ self.axes[i])
        a, b = moves
        self.m = a.T @ self.m @ b
        self.v = (a**2).T @ self.v @ b**2
        self.h = (a**2).T @ self.h @ b**2


@pytest.mark.parametrize(
    ("shape", "memory"),
    [
        ((6, 4), {"beta_3": 0.95, "nu": 1.0}),
        ((40, 3), {"beta_3": 0.999, "nu": 0.5}),  # One side keeps its own axes.
        ((5,), {"beta_3": 0.999, "nu": 0.5}),
    ],
)
def test_the_memory_is_short_where_both_sides_have_axes(shape, memory):
    rng = np.random.default_rng(0)
    variables = [keras.Variable(np.ones(shape), name=f"v{i}") for i in range(2)]
    optimizers = [DiagonalNewton(RATE, axes="layer", **m) for m in (memory, {})]
    for optimizer, variable in zip(optimizers, variables, strict=True):
        optimizer.build([variable])
    for _ in range(12):
        gradient = rng.standard_normal(shape).astype("float32")
        for optimizer, variable in zip(optimizers, variables, strict=True):
            optimizer.apply([ops.convert_to_tensor(gradient)], [variable])
    expected, found = (variable.numpy() for variable in variables)
    np.testing.assert_array_equal(found, expected)
    sharpest = (optimizer.stability_threshold() for optimizer in optimizers)
    assert next(sharpest) == next(sharpest)


@pytest.mark.parametrize("dtype", RTOL)
def test_trajectory(dtype, request):
    """Gradients and deliveries at random, over several renewals of the axes."""
    if dtype == "float64":
        request.getfixturevalue("float64")
    rng = np.random.default_rng(0)
    start = rng.standard_normal((6, 4))
    variable = keras.Variable(start, dtype=dtype, name="kernel")
    optimizer = DiagonalNewton(RATE, axes="layer")
    optimizer.build([variable])
    reference, values = Reference((6, 4)), start.astype(dtype).astype("float64")
    scales = np.outer(np.logspace(-1, 1, 6), [1, 2, 3, 4])
    for step in range(35):
        if step % 5 == 0:
            diagonal = rng.standard_normal((6, 4)) * 10
            optimizer.update_hessian_diagonal([diagonal.astype(dtype)])
            reference.deliver(diagonal)
        gradient = (rng.standard_normal((6, 4)) * scales).astype(dtype)
        optimizer.apply([ops.convert_to_tensor(gradient, dtype)], [variable])
        values = values - RATE * reference.direction(gradient.astype("float64"), values)
        np.testing.assert_allclose(
            ops.convert_to_numpy(variable.value), values, RTOL[dtype], RTOL[dtype]
        )
    ((left, right),) = optimizer.curvature_axes()
    for found, wanted in zip((left, right), reference.axes, strict=True):
        # The sign of an axis is free, and nothing depends on it.
        overlap = np.abs(ops.convert_to_numpy(found).T @ wanted)
        np.testing.assert_allclose(overlap, np.eye(len(wanted)), atol=10 * RTOL[dtype])


def test_finds_the_axes_of_a_loss():
    """Newton's method in one delivery, where the Hessian is diagonal in the axes."""
    rng = np.random.default_rng(1)
    a, b = (np.linalg.qr(rng.standard_normal((n, n)))[0] for n in (5, 4))
    curvature = np.outer(np.logspace(0, 3, 5), np.logspace(0, 1, 4))
    target = rng.standard_normal((5, 4))
    variable = keras.Variable(np.zeros((5, 4)), dtype="float64", name="kernel")

    def gradient():
        off = a.T @ (ops.convert_to_numpy(variable.value) - target) @ b
        return a @ (curvature * off) @ b.T

    optimizer = DiagonalNewton(1e-9, axes="layer", radius=None)
    optimizer.build([variable])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(200):
            # Gradients of all sizes, whose moments have the axes of the loss.
            noise = a @ (curvature * rng.standard_normal((5, 4))) @ b.T
            optimizer.apply([ops.convert_to_tensor(noise)], [variable])
    left, right = (ops.convert_to_numpy(q) for q in optimizer.curvature_axes()[0])
    # With a memory of twenty gradients the stiffest axes are known well.
    assert abs(left[:, 0] @ a[:, -1]) > 0.99
    np.testing.assert_allclose(left.T @ left, np.eye(5), atol=1e-5)
    np.testing.assert_allclose(right.T @ right, np.eye(4), atol=1e-5)


@pytest.mark.parametrize("bad", [0.0, np.nan])
def test_axes_stay_where_there_is_nothing_to_go_by(bad):
    variable = keras.Variable(np.ones((3, 3)), name="kernel")
    optimizer = DiagonalNewton(axes="layer")
    optimizer.build([variable])
    optimizer.update_hessian_diagonal([np.ones((3, 3))])
    for _ in range(10):
        optimizer.apply([ops.full((3, 3), bad)], [variable])
    for q in optimizer.curvature_axes()[0]:
        np.testing.assert_allclose(ops.convert_to_numpy(q), np.eye(3))


def test_vectors_step_as_without_axes():
    """A bias, and a kernel with a single output."""
    ends = []
    for axes in (None, "layer"):
        variables = [
            keras.Variable(np.ones(s), name=f"v{s[0]}") for s in [(3,), (4, 1)]
        ]
        optimizer = DiagonalNewton(axes=axes)
        optimizer.build(variables)
        rng = np.random.default_rng(0)
        optimizer.update_hessian_diagonal([rng.random(v.shape) for v in variables])
        for _ in range(12):
            optimizer.apply(
                [
                    ops.convert_to_tensor(rng.standard_normal(v.shape), "float32")
                    for v in variables
                ],
                variables,
            )
        assert len(optimizer.variables) == 2 + 3 * 2 + 2
        ends.append([ops.convert_to_numpy(v.value) for v in variables])
    for a, b in zip(*ends, strict=True):
        np.testing.assert_array_equal(a, b)
