"""The preconditioned Hessian, and where optimizers turn unstable."""

import keras
import numpy as np
import pytest
import scipy.linalg
from keras import ops

import keras_curvature as kc
from keras_curvature.preconditioning import preconditioner
from keras_curvature.stability import limit_of_gradient_descent, stability_threshold

array = keras.ops.convert_to_numpy


def trained(optimizer, epochs=3):
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [keras.Input((3,)), keras.layers.Dense(4, "tanh"), keras.layers.Dense(1)]
    )
    model.compile(optimizer, "mse")
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((32, 3)), rng.standard_normal((32, 1))
    model.fit(x, y, batch_size=8, epochs=epochs, verbose=0)
    return model, kc.HessianOperator(model, x, y)


@pytest.mark.parametrize(
    ("optimizer", "threshold"),
    [
        (keras.optimizers.SGD(0.1), 20.0),
        (keras.optimizers.SGD(0.1, momentum=0.9), 38.0),
        (keras.optimizers.SGD(0.1, momentum=0.9, nesterov=True), 38 / 2.8),
        (keras.optimizers.RMSprop(0.1), 20.0),
        (keras.optimizers.Adam(0.1, beta_1=0.9), 380.0),
        (keras.optimizers.AdamW(0.1, beta_1=0.9), 380.0),
        (keras.optimizers.Nadam(0.1), None),
        (kc.DiagonalNewton(0.1, beta_1=0.0), 20.0),
        (keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.1)), 20.0),
        (keras.optimizers.Adagrad(0.1), None),
    ],
)
def test_threshold(optimizer, threshold):
    found = stability_threshold(optimizer)
    assert found == (threshold and pytest.approx(threshold, rel=1e-6))


@pytest.mark.parametrize(
    ("optimizer", "limit"),
    [
        (keras.optimizers.SGD(0.1), 20.0),
        (keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.1)), 20.0),
        (keras.optimizers.SGD(0.1, momentum=0.9), None),
        (keras.optimizers.Adam(0.1), None),
        (kc.DiagonalNewton(0.1), None),
        (keras.optimizers.SGD(0.0), None),
        (None, None),
    ],
)
def test_two_over_learning_rate_is_the_limit_of_plain_gradient_descent(
    optimizer, limit
):
    found = limit_of_gradient_descent(optimizer)
    assert found == (limit and pytest.approx(limit, rel=1e-6))


def test_another_rule_has_no_known_threshold():
    """Neither a rule of the user's own, nor two optimizers at once."""

    class Mine(keras.optimizers.Adam):
        def update_step(self, gradient, variable, learning_rate):
            super().update_step(gradient, variable, learning_rate)

    assert stability_threshold(Mine(0.1)) is None
    two = {"a": keras.optimizers.SGD(0.1), "b": keras.optimizers.SGD(0.2)}
    several = keras.optimizers.OptimizerMap(keras.optimizers.SGD(0.1), two)
    assert stability_threshold(keras.optimizers.MultiOptimizer(several)) is None


def test_gradient_descent_with_averaged_momentum_is_stable_up_to_the_threshold():
    # On a quadratic of curvature h, just below and just above the edge.
    for factor, stable in ((0.98, True), (1.02, False)):
        beta, rate = 0.9, 0.1
        h = factor * (2 + 2 * beta) / ((1 - beta) * rate)
        x, m = 1.0, 0.0
        for _ in range(3000):
            m = beta * m + (1 - beta) * h * x
            x -= rate * m
            if abs(x) > 1e6:
                break
        assert (abs(x) < 1) == stable


def test_adam_divides_by_the_root_of_its_average_of_squares():
    model, op = trained(keras.optimizers.Adam(0.01))
    found = array(preconditioner(model.optimizer, op).diagonal)
    steps = int(model.optimizer.iterations)
    squares = [v.numpy() for v in model.optimizer._velocities]
    expected = np.concatenate(
        [np.sqrt(v / (1 - 0.999**steps)).ravel() + 1e-7 for v in squares]
    )
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_diagonal_newton_tells_what_it_divides_by():
    model, op = trained(
        kc.DiagonalNewton(1.0, beta_1=0.0, relative_radius=0.0), epochs=0
    )
    optimizer = model.optimizer
    optimizer.build(model.trainable_variables)
    optimizer.update_hessian_diagonal(kc.hessian_diagonal(op).value)
    gradient = op.split(op.value_and_gradient()[1])
    before = op.flatten([v.numpy() for v in model.trainable_variables])
    optimizer.apply(gradient, model.trainable_variables)
    moved = before - op.flatten([v.numpy() for v in model.trainable_variables])
    divided = array(op.flatten(gradient)) / array(
        preconditioner(optimizer, op).diagonal
    )
    np.testing.assert_allclose(moved, divided, rtol=1e-4, atol=1e-7)


def test_rmsprop_does_not_debias():
    model, op = trained(keras.optimizers.RMSprop(0.01))
    squares = [v.numpy() for v in model.optimizer._velocities]
    expected = np.concatenate([np.sqrt(v).ravel() + 1e-7 for v in squares])
    found = array(preconditioner(model.optimizer, op).diagonal)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize("optimizer", [keras.optimizers.SGD(0.01), "adagrad"])
def test_no_preconditioner_where_none_is_known(optimizer):
    model, op = trained(optimizer)
    assert preconditioner(model.optimizer, op) is None


def test_no_preconditioner_before_the_first_step():
    model, op = trained("adam", epochs=0)
    assert preconditioner(model.optimizer, op) is None


def test_preconditioned_operator_equals_the_dense_product():
    model, op = trained("adam")
    divisor = preconditioner(model.optimizer, op)
    seen = divisor.seen(op)
    scale = array(divisor.diagonal) ** -0.5
    dense = scale[:, None] * op.to_dense() * scale
    top = kc.estimators.eigenvalues(seen, k=1, tolerance=1e-6).values[0]
    eigenvalues = np.linalg.eigvalsh(dense.astype("float64"))
    np.testing.assert_allclose(top, eigenvalues[abs(eigenvalues).argmax()], rtol=1e-4)


def test_what_an_optimizer_sees_that_steps_in_axes():
    model, op = trained(kc.DiagonalNewton(0.02, axes="layer"), epochs=8)
    optimizer = model.optimizer
    divisor = preconditioner(optimizer, op)
    # The matrix that turns the entries of each variable into its axes.
    blocks = []
    for variable, axes in zip(op.variables, optimizer.curvature_axes(), strict=True):
        left, right = (None, None) if axes is None else axes
        size = int(np.prod(variable.shape))
        rows, columns = (1, size) if axes is None else variable.shape
        a = np.eye(rows) if left is None else array(left)
        b = np.eye(columns) if right is None else array(right)
        blocks.append(np.kron(a, b))
    assert any(np.abs(block - np.eye(len(block))).max() > 0.1 for block in blocks)
    turn = scipy.linalg.block_diag(*blocks)
    dense = turn.T @ op.to_dense().astype("float64") @ turn
    factors = np.concatenate(
        [
            np.full(np.prod(v.shape), factor)
            for v, factor in zip(
                op.variables, optimizer.relative_thresholds(), strict=True
            )
        ]
    )
    np.testing.assert_allclose(np.unique(factors.round(6)), [1, 10])
    np.testing.assert_allclose(
        array(divisor.stiffness), array(divisor.diagonal) * factors, rtol=1e-5
    )
    scale = array(divisor.stiffness) ** -0.5
    eigenvalues = np.linalg.eigvalsh(scale[:, None] * dense * scale)
    top = kc.suggest_learning_rate(op, tolerance=1e-6).eigenvalue
    np.testing.assert_allclose(top, eigenvalues.max(), rtol=1e-4)
    gradient = array(op.value_and_gradient()[1])
    divided = turn @ ((turn.T @ gradient) / array(divisor.diagonal))
    found = array(divisor.divide(op.value_and_gradient()[1]))
    np.testing.assert_allclose(
        found, divided, rtol=1e-3, atol=1e-4 * abs(divided).max()
    )


@pytest.mark.parametrize("which", [0, 1], ids=["matrix", "vector"])
@pytest.mark.parametrize(("factor", "stable"), [(0.8, True), (1.25, False)])
def test_variables_of_several_memories_have_limits_of_their_own(which, factor, stable):
    """Steps on a quadratic, stiff in one of two variables, with unit curvature."""
    optimizer = kc.DiagonalNewton(0.1, beta_1=0.5, radius=None, axes="layer")
    variables = [
        keras.Variable(np.full(shape, 1e-8), name=f"v{i}")
        for i, shape in enumerate([(3, 2), (4,)])
    ]
    optimizer.build(variables)
    optimizer.update_hessian_diagonal([np.ones(v.shape) for v in variables])
    limits = [
        optimizer.stability_threshold() * f for f in optimizer.relative_thresholds()
    ]
    assert limits[0] == pytest.approx(2 * limits[1])
    x, h = variables[which], factor * limits[which]
    for _ in range(100):
        size = np.abs(x.numpy()).max()
        gradients = [ops.zeros(v.shape) for v in variables]
        gradients[which] = ops.convert_to_tensor(h * x.numpy())
        optimizer.apply(gradients, variables)
    assert (size < 1e-9) == stable


@pytest.mark.parametrize(
    "options",
    [{}, {"momentum": 0.8}, {"momentum": 0.8, "nesterov": True}],
    ids=["plain", "momentum", "nesterov"],
)
@pytest.mark.parametrize(("factor", "stable"), [(0.9, True), (1.1, False)])
def test_gradient_descent_is_stable_up_to_the_threshold(options, factor, stable):
    """Keras' own steps on a quadratic of curvature h, below and above the edge."""
    optimizer = keras.optimizers.SGD(0.1, **options)
    h = factor * stability_threshold(optimizer)
    x = keras.Variable(1.0)
    optimizer.build([x])
    for _ in range(100):
        optimizer.apply([h * x.value], [x])
    # The slowest of these moves by a factor of 0.9 or 1.2 in a step.
    assert (
        abs(float(array(x.value))) < 1e-2
        if stable
        else abs(float(array(x.value))) > 1e2
    )
