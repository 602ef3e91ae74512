"""The critical sharpness, against losses whose critical rate is known."""

import math

import keras
import numpy as np
import pytest
from keras import ops
from training import data, fit, monitor, network

import keras_curvature as kc
from keras_curvature.critical import CriticalSearch

A = np.array([[4.0, 1, 0], [1, 3, -1], [0, -1, 0.5]], "float32")
AT = np.array([1.0, -2, 3], "float32")


def quadratic(offset=1.0):
    at = ops.convert_to_tensor(A)
    return kc.HessianOperator.from_function(
        lambda p: offset + ops.sum(p * ops.matmul(at, p)) / 2, AT
    )


def of(function, at=(1.0,)):
    return kc.HessianOperator.from_function(function, np.array(at, "float32"))


def test_quadratic():
    """λ_c is the Rayleigh quotient of the step."""
    g = A @ AT
    found = kc.critical_sharpness(quadratic(), tolerance=1e-3)
    expected = g @ A @ g / (g @ g)
    low, high = found.rates
    assert low <= 2 / expected <= high <= low * 1.001
    assert abs(found.value - expected) <= found.error <= 1e-3 * expected
    assert found.direction == "gradient" and found.reason is None
    # Any step: no unit of length is in it but the step's.
    step = np.array([-1.0, 0.2, 0], "float32")
    expected = step @ A @ step / -(g @ step)
    for given in (step, [step], ops.convert_to_tensor(step)):
        found = kc.critical_sharpness(quadratic(), direction=given)
        assert abs(found.value - expected) <= found.error <= 0.1 * expected
        assert found.direction == "given"


def test_search_goes_on_where_it_was():
    """Two rates beside the last one, and three that divide the interval."""
    operator, search = quadratic(), CriticalSearch()
    first, second = search.look(operator), search.look(operator)
    assert second.num_losses == 5 < first.num_losses
    assert second.rates[0] < first.rates[1] and first.rates[0] < second.rates[1]
    # A first guess elsewhere, on either side.
    for rate in (1e-4, 1e4):
        other = kc.critical_sharpness(operator, initial_rate=rate)
        assert abs(other.value - second.value) <= other.error + second.error
        assert other.num_losses > 5


@pytest.mark.parametrize(
    "function",
    [
        lambda p: p[0] + 0 * ops.log(p[0] - 0.25),  # No number beyond the wall,
        lambda p: p[0] + ops.where(p[0] < 0.25, math.inf, 0.0),  # or infinite there.
    ],
)
def test_no_number_counts_as_raised(function):
    low, high = kc.critical_sharpness(of(function), tolerance=1e-3).rates
    assert low <= 0.75 <= high <= low * 1.001


@pytest.mark.parametrize(
    ("function", "value", "reason"),
    [
        (lambda p: 1 / (1 + ops.exp(p[0])), 0.0, "by no rate tried"),
        (lambda p: 2 - p[0], 0.0, "by no rate tried"),
        (lambda p: ops.square(p[0] - 1) + 1, None, "gradient along this step is zero"),
        (lambda p: ops.log(p[0] - 2), None, "not a number"),
        (lambda p: 1e7 + ops.square(p[0]), None, "no more than its rounding"),
    ],
)
def test_nothing_to_find(function, value, reason):
    found = kc.critical_sharpness(of(function))
    assert found.value == value and reason in found.reason
    assert str(found.reason) in repr(found)
    if value == 0:
        assert found.rates[1] == math.inf and found.error > 0


def test_uphill():
    found = kc.critical_sharpness(quadratic(), direction=A @ AT)
    assert found.value == math.inf and "rises from the start" in found.reason


def test_along_what_the_optimizer_would_do():
    model, (x, y) = network(optimizer=keras.optimizers.Adam(0.01)), data()
    fit(model)
    before = [np.array(w) for w in model.get_weights()]
    operator = kc.HessianOperator(model, x, y)
    found = kc.critical_sharpness(operator, direction="optimizer", tolerance=0.01)
    assert found.direction == "preconditioned gradient"
    optimizer = model.optimizer
    beta, steps = optimizer.beta_2, int(ops.convert_to_numpy(optimizer.iterations))
    squares = np.concatenate(
        [np.ravel(ops.convert_to_numpy(v)) for v in optimizer._velocities]
    )
    scale = np.sqrt(squares / (1 - beta**steps)) + optimizer.epsilon
    loss, gradient = (ops.convert_to_numpy(t) for t in operator.value_and_gradient())
    by_hand = []
    for rate in found.rates:
        step = operator.split((-rate * gradient / scale).astype("float32"))
        model.set_weights([w + s for w, s in zip(before, step, strict=True)])
        by_hand.append(ops.convert_to_numpy(operator.loss()) > loss)
    model.set_weights(before)
    assert by_hand == [False, True]
    # Nothing has moved, and momentum is left out.
    again = kc.critical_sharpness(operator, direction=-gradient / scale)
    assert abs(again.value - found.value) <= again.error + found.error


def test_batches_and_options():
    """The mean over batches is the loss that is looked at."""
    model, (x, y) = network(), data()
    whole = kc.critical_sharpness(model, x, y, direction="optimizer")
    parts = kc.critical_sharpness(model, x, y, batch_size=16)
    assert whole.direction == parts.direction == "gradient"
    assert abs(whole.value - parts.value) <= whole.error + parts.error
    alone = kc.critical_sharpness(model, x, y, variables="hidden/*")
    assert alone.value != whole.value


def test_refused():
    operator = quadratic()
    with pytest.raises(ValueError, match="`direction` must be \"gradient\".*'Adam'"):
        kc.critical_sharpness(operator, direction="Adam")
    with pytest.raises(ValueError, match=r"entry for each parameter.*shape \(2,\)"):
        kc.critical_sharpness(operator, direction=np.ones(2))
    with pytest.raises(ValueError, match="`tolerance` must be a positive.*=0"):
        kc.critical_sharpness(operator, tolerance=0)
    with pytest.raises(ValueError, match="`initial_rate` must be a positive.*=-1"):
        kc.critical_sharpness(operator, initial_rate=-1)
    with pytest.raises(ValueError, match="not known what the optimizer divides"):
        kc.critical_sharpness(operator, direction="optimizer")
    model = network(optimizer="adam")
    with pytest.raises(ValueError, match="not known.*has not taken a step"):
        kc.critical_sharpness(model, *data(), direction="optimizer")


def test_monitor():
    """The figures of a record and of the logs; training is not disturbed."""
    alone, watched = network(optimizer="adam"), network(optimizer="adam")
    watch = monitor(diagonal=None, num_matvecs=0, sharpness="critical", update_freq=5)
    fit(alone)
    history = fit(watched, watch)
    for a, b in zip(alone.get_weights(), watched.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
    assert len(watch.history) == 3
    first, *others = watch.history
    assert first["critical_sharpness_direction"] == "gradient"
    for record in others:
        assert record["critical_sharpness_direction"] == "preconditioned gradient"
        assert record["critical_sharpness"] > record["critical_sharpness_error"] > 0
        assert record["stability_threshold"] == pytest.approx(38_000, rel=1e-3)
        assert record["num_matvecs"] == 0 and record["overhead"] >= 0
        assert "hessian_trace" not in record
    assert history["critical_sharpness"] == [others[-1]["critical_sharpness"]]
    assert "hessian_trace" not in history
    x, y = data()
    direct = kc.critical_sharpness(watched, x[:20], y[:20], direction="optimizer")
    last = others[-1]
    apart = abs(direct.value - last["critical_sharpness"])
    assert apart <= direct.error + last["critical_sharpness_error"]
    with pytest.raises(ValueError, match="`sharpness` must be \"critical\".*'flat'"):
        monitor(sharpness="flat")


def test_a_loss_without_second_derivatives():
    """Nothing is said, because nothing is differentiated twice."""
    model = network(activation="softsign")
    x, y = data()
    found = kc.critical_sharpness(model, x, y)
    expected = kc.HessianOperator(model, x, y, hvp="finite_difference")
    g = ops.convert_to_numpy(expected.value_and_gradient()[1])
    # The loss is no quadratic up to there: the curvature by order of magnitude.
    assert found.value == pytest.approx(g @ (expected @ g) / (g @ g), rel=1)
