"""The suggested learning rate, by training with it, and what it says of itself."""

import keras
import numpy as np
import pytest

import keras_curvature as kc
from keras_curvature.learning_rate import suggestion
from keras_curvature.text import number

RNG = np.random.default_rng(0)
X = RNG.standard_normal((64, 4)).astype("float32") * [1.0, 0.7, 0.5, 0.3]
W = RNG.standard_normal((4, 1)).astype("float32")
PROBLEMS = {"linear": X @ W, "tanh": np.sin(2 * X @ W)}
STEPS = 40


def model_of(problem, optimizer):
    keras.utils.set_random_seed(0)
    hidden = [keras.layers.Dense(16, "tanh")] if problem == "tanh" else []
    model = keras.Sequential([keras.Input((4,)), *hidden, keras.layers.Dense(1)])
    model.compile(optimizer, "mse")
    return model


def train(model, problem, steps=STEPS):
    """Losses before each step, of all data at once: such steps have no noise."""
    losses = []
    for _ in range(steps):
        model.reset_metrics()
        losses.append(float(model.train_on_batch(X, PROBLEMS[problem])))
    return losses


@pytest.mark.parametrize("momentum", [{}, {"momentum": 0.8}], ids=["plain", "momentum"])
@pytest.mark.parametrize("problem", PROBLEMS)
def test_gradient_descent_is_stable_with_it_and_not_with_three_times_as_much(
    problem, momentum
):
    model = model_of(problem, keras.optimizers.SGD(**momentum))
    suggested = kc.suggest_learning_rate(model, X, PROBLEMS[problem]).value
    weights, losses = model.get_weights(), {}
    for factor in (0.3, 1, 3):
        model.set_weights(weights)
        for variable in model.optimizer.variables:  # Momentum among them.
            variable.assign(0 * variable)
        model.optimizer.learning_rate = factor * suggested
        losses[factor] = train(model, problem)
    first, last = losses[1][0], losses[1][-1]
    assert max(losses[1]) == first and last < 0.8 * first
    assert last <= losses[0.3][-1]
    if not momentum:
        # Beyond the limit the loss rises: of a quadratic without end, while a network
        # may fall into a flatter place.
        assert np.diff(losses[1]).max() <= 0 < np.diff(losses[3]).max()
        assert not (problem == "linear" and losses[3][-1] < 1e3 * first)


@pytest.mark.parametrize("options", [{}, {"momentum": 0.8, "nesterov": True}])
def test_the_limit_is_where_it_says(options):
    model = model_of("linear", keras.optimizers.SGD(**options))
    limit = kc.suggest_learning_rate(model, X, PROBLEMS["linear"]).limit
    model.optimizer.learning_rate = 1.1 * limit
    losses = train(model, "linear", 60)
    assert losses[-1] > 10 * losses[0]


@pytest.mark.parametrize(
    ("optimizer", "product"),
    [
        (keras.optimizers.SGD(0.01), 2),
        (keras.optimizers.SGD(0.01, momentum=0.9), 3.8),
        (keras.optimizers.SGD(0.0), 2),
    ],
)
def test_it_is_a_newton_step_along_the_stiffest_direction(optimizer, product):
    model, y = model_of("linear", optimizer), PROBLEMS["linear"]
    exact = np.linalg.eigvalsh(kc.hessian_matrix(model, X, y))[-1]
    found = kc.suggest_learning_rate(model, X, y)
    np.testing.assert_allclose(found.eigenvalue, exact, rtol=1e-5)
    np.testing.assert_allclose(found.limit, product / exact, rtol=1e-4)
    beta = optimizer.momentum
    np.testing.assert_allclose(found.value, (1 - beta) / exact, rtol=1e-4)
    assert found.value <= found.limit / 2
    assert 0 <= found.eigenvalue_bound < 1e-4 * exact and found.num_matvecs == 5
    assert str(found).startswith(f"{number(found.value, 2)}. λ = {number(exact)}")
    assert f"SGD turns unstable at {product} / λ = " in found.reason
    assert ("rate now, 0.01," in found.reason) == (optimizer.learning_rate > 0)


@pytest.mark.parametrize("make", [keras.optimizers.Adam, keras.optimizers.RMSprop])
def test_optimizers_that_divide_are_asked_once_they_have_stepped(make):
    model, y = model_of("linear", make(0.01)), PROBLEMS["linear"]
    before = kc.suggest_learning_rate(model, X, y)
    assert before.value is None and before.num_matvecs == 0
    assert "train for some steps, and ask again" in before.reason
    train(model, "linear", 20)
    after = kc.suggest_learning_rate(model, X, y)
    diagonal = np.concatenate(
        [
            np.sqrt(v / (1 - 0.999**20 if make is keras.optimizers.Adam else 1)).ravel()
            for v in map(keras.ops.convert_to_numpy, model.optimizer._velocities)
        ]
    )
    scale = (diagonal + 1e-7) ** -0.5
    seen = scale[:, None] * kc.hessian_matrix(model, X, y) * scale
    exact = np.linalg.eigvalsh(seen)[-1]
    product = 38 if make is keras.optimizers.Adam else 2
    np.testing.assert_allclose(after.limit, product / exact, rtol=1e-3)
    np.testing.assert_allclose(after.value, 1 / exact, rtol=1e-3)


def test_at_the_edge_of_stability_the_rate_is_the_limit():
    model, y = model_of("linear", keras.optimizers.SGD(0.01)), PROBLEMS["linear"]
    limit = kc.suggest_learning_rate(model, X, y).limit
    model.optimizer.learning_rate = 0.95 * limit
    reason = kc.suggest_learning_rate(model, X, y).reason
    assert "is at 95% of the limit, to which λ has come" in reason


def test_nothing_is_said_where_nothing_is_known():
    y = PROBLEMS["linear"]
    for optimizer, reason in (
        (keras.optimizers.Adagrad(0.1), "not known where Adagrad turns unstable"),
        (keras.optimizers.SGD(0.1, momentum=1.0), "not known where SGD"),
        (None, "no optimizer"),
    ):
        model = model_of("linear", "sgd")
        operator = kc.HessianOperator(model, X, y)
        model.optimizer = optimizer
        found = kc.suggest_learning_rate(operator)
        assert found.value is None and reason in found.reason
        assert str(found).startswith("none. ")
    function = kc.HessianOperator.from_function(
        lambda p: keras.ops.sum(p**2), np.ones(3, "float32")
    )
    assert "no optimizer" in kc.suggest_learning_rate(function).reason


def test_what_an_optimizer_divides_by_may_not_be_known():
    model = model_of("linear", keras.optimizers.Adam(0.01, amsgrad=True))
    train(model, "linear", 2)
    found = kc.suggest_learning_rate(model, X, PROBLEMS["linear"])
    assert found.value is None and "not known what Adam divides by" in found.reason


def test_a_loss_that_curves_up_nowhere_sets_no_limit():
    model = model_of("linear", "sgd")
    model.compile("sgd", lambda y, p: -keras.ops.mean((y - p) ** 2, axis=-1))
    found = kc.suggest_learning_rate(model, X, PROBLEMS["linear"])
    assert found.value is None and "in no direction" in found.reason
    assert found.eigenvalue <= 0


def test_an_eigenvalue_within_its_bound_of_zero_is_not_known():
    model = model_of("linear", "sgd")
    operator = kc.HessianOperator(model, X, PROBLEMS["linear"])
    for found in ((2.0, 3.0, 7), (None, None, 7)):
        told = suggestion(operator, lambda seen, found=found: found)
        assert told.value is None and told.num_matvecs == 7
        assert "not known yet" in told.reason
