"""What holds of `HessianOperator` on every backend.

Expected numbers come from formulas, or from central differences of the operator's own
gradient, which is checked against Keras' training loss elsewhere.
"""

import contextlib
import warnings

import cases
import keras
import numpy as np
import pytest
from keras import layers, ops

import keras_curvature as kc
from keras_curvature import backend
from keras_curvature.operators import HessianOperator

#: Rounding of float32 through a few layers.
RTOL = 1e-4


def numpy_of(x):
    return np.asarray(ops.convert_to_numpy(x))


def small(**arguments):
    model = cases.sequential(
        layers.Input((3,)),
        layers.Dense(4, activation="tanh"),
        layers.Dense(2),
        **arguments,
    )
    return cases.Case(model, cases._numbers(6, 3), cases._numbers(6, 2, seed=1))


def by_differences(op, step=1e-2):
    """The dense Hessian by differences of the gradient, variable by variable."""
    columns = []
    for variable in op.variables:
        value = numpy_of(variable).copy()
        for index in np.ndindex(value.shape):
            sides = []
            for sign in (1, -1):
                moved = value.copy()
                moved[index] += sign * step
                variable.assign(moved)
                sides.append(numpy_of(op.value_and_gradient()[1]).astype("float64"))
            columns.append((sides[0] - sides[1]) / (2 * step))
        variable.assign(value)
    return np.stack(columns, axis=1)


def close(actual, expected, rtol=RTOL):
    scale = np.abs(expected).max()
    np.testing.assert_allclose(actual, expected, rtol=0, atol=rtol * scale)


def test_equals_differences_of_the_gradient():
    case = small()
    op = HessianOperator(case.model, case.x, case.y)
    # The third derivative leaves an error of the order of step².
    close(op.to_dense(), by_differences(op), 1e-3)


def test_loss_is_what_keras_evaluates():
    case = small(metrics=["mae"])
    op = HessianOperator(case.model, case.x, case.y)
    expected = case.model.evaluate(case.x, case.y, verbose=0, return_dict=True)["loss"]
    close(numpy_of(op.loss()), expected, 1e-6)
    close(numpy_of(op.value_and_gradient()[0]), expected, 1e-6)


def test_forms_of_a_vector():
    case = small()
    op = HessianOperator(case.model, case.x, case.y)
    dense = op.to_dense()
    v = np.random.default_rng(0).standard_normal(op.shape[0])
    assert (op @ v).dtype == np.float64
    close(op @ v, dense @ v)
    tensor = backend.array(v.astype("float32"))
    assert backend.is_tensor(op @ tensor)
    close(numpy_of(op @ tensor), dense @ v)
    products = op @ op.split(v)
    assert [p.shape for p in products] == op.shapes
    close(op.flatten(products), dense @ v)
    for count in (0, 1, 3, backend.PRODUCTS_PER_PASS + 2):
        block = np.random.default_rng(1).standard_normal((op.shape[0], count))
        assert (op @ block).shape == block.shape
        if count:
            close(op @ block, dense @ block)
    close(op.to_scipy() @ v, dense @ v)
    with pytest.raises(ValueError, match="Received: shape"):
        op @ v[1:]


def test_follows_the_variables_without_compiling_again():
    case = small()
    op = HessianOperator(case.model, case.x, case.y)
    v = np.ones(op.shape[0])
    first = op @ v
    traces = backend.num_traces()
    for variable in case.model.trainable_variables:
        variable.assign(0.5 * numpy_of(variable))
    second = op @ v
    assert np.abs(second - first).max() > 0.01 * np.abs(first).max()
    op.set_data(2 * case.x, case.y)
    third = op @ v
    assert backend.num_traces() == traces
    fresh = HessianOperator(case.model, 2 * case.x, case.y)
    np.testing.assert_array_equal(third, fresh @ v)


@pytest.mark.parametrize("hvp", ["tape", "finite_difference"])
def test_layers_frozen_later_change_nothing(hvp):
    """Which variables H is over is settled when the operator is made."""
    case = small()
    op = HessianOperator(case.model, case.x, case.y, hvp=hvp)
    before = op.to_dense()
    case.model.layers[0].trainable = False
    # Other numbers of samples and of columns: everything is compiled anew.
    op.set_data(np.concatenate([case.x, case.x]), np.concatenate([case.y, case.y]))
    close(op.to_dense(), before, 1e-5 if hvp == "tape" else 2e-2)
    assert op.value_and_gradient()[1].shape == (op.shape[0],)
    diagonal = kc.hessian_diagonal(op, method="exact")
    assert [d.shape for d in diagonal.value] == op.shapes


class Idle(layers.Layer):
    """Has a variable that nothing depends on."""

    def build(self, input_shape):
        self.idle = self.add_weight(shape=(2,), name="idle")

    def call(self, x):
        return x


@pytest.mark.parametrize(
    "ask",
    [
        lambda model, x, y: HessianOperator(model, x, y).to_dense(),
        lambda model, x, y: kc.hessian_diagonal(model, x, y, method="exact"),
        lambda model, x, y: kc.hessian_diagonal(
            model, x, y, method="layerwise", num_matvecs=2
        ),
    ],
    ids=["product", "exact diagonal", "sampled diagonal"],
)
def test_variables_without_influence_are_named_once(ask):
    model = cases.sequential(layers.Input((3,)), layers.Dense(2), Idle())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ask(model, cases._numbers(4, 3), cases._numbers(4, 2, seed=1))
    messages = [str(w.message) for w in caught if "does not depend" in str(w.message)]
    assert len(messages) == 1
    assert "idle" in messages[0] and "kernel" not in messages[0]


def test_some_variables_only():
    case = small()
    whole = HessianOperator(case.model, case.x, case.y).to_dense()
    kernel = case.model.layers[1].kernel
    op = HessianOperator(case.model, case.x, case.y, variables=[kernel])
    start = 3 * 4 + 4
    close(op.to_dense(), whole[start : start + 8, start : start + 8])


def test_chunks_equal_the_whole():
    case = small()
    whole = HessianOperator(case.model, case.x, case.y).to_dense()
    for batch_size in (1, 4):
        op = HessianOperator(case.model, case.x, case.y, batch_size=batch_size)
        close(op.to_dense(), whole)


def test_a_loss_that_is_no_mean_is_warned_of_in_chunks():
    case = small()
    case.model.compile(loss=keras.losses.MeanSquaredError(reduction="sum"))
    with pytest.warns(UserWarning, match="not a mean over samples"):
        HessianOperator(case.model, case.x, case.y, batch_size=3)


def test_loss_fn_and_variables_outside_of_the_model():
    """Values of all variables are handed over, also of those the model lacks."""
    case = small()
    scale = keras.Variable(2.0)

    def loss_fn(model, x, y):
        return scale * ops.mean(ops.square(model(x) - y))

    op = HessianOperator(case.model, case.x, case.y, loss_fn=loss_fn)
    v = np.ones(op.shape[0])
    first = op @ v
    scale.assign(6.0)
    close(op @ v, 3 * first, 1e-5)


def test_moving_averages_are_not_frozen_in():
    """Values that only a layer's rule reads belong to the state as well."""
    model = cases.sequential(
        layers.Input((3,)), layers.Dense(4), layers.BatchNormalization()
    )
    x, y = cases._numbers(6, 3), cases._numbers(6, 4, seed=1)
    op = HessianOperator(model, x, y)
    kc.hessian_diagonal(op, method="exact")
    mean = model.layers[1].moving_mean
    mean.assign(5 + numpy_of(mean))
    moved = kc.hessian_diagonal(op, method="exact")
    close(op.flatten(moved.value), np.diag(op.to_dense()))


def test_nothing_is_left_behind():
    model = cases.sequential(
        layers.Input((3,)),
        layers.Dense(4, activation="tanh", kernel_regularizer="l2"),
        layers.BatchNormalization(),
        layers.Dropout(0.5, seed=1),
        layers.Dense(2),
        metrics=["mae"],
    )
    x, y = cases._numbers(6, 3), cases._numbers(6, 2, seed=1)
    model.train_on_batch(x, y)
    variables = [*model.variables, *model.metrics_variables]
    before = [numpy_of(v).copy() for v in variables]
    losses, random_state = len(model.losses), np.random.get_state()[1].copy()
    op = HessianOperator(model, x, y, training=True)
    op.to_dense()
    kc.hessian_diagonal(op, method="exact")
    for variable, value in zip(variables, before, strict=True):
        np.testing.assert_array_equal(numpy_of(variable), value)
    assert len(model.losses) == losses
    np.testing.assert_array_equal(np.random.get_state()[1], random_state)
    # The same mask in every call, and another one when the model's seed has moved.
    np.testing.assert_array_equal(op.to_dense(), op.to_dense())


# Functions


def quartic(params):
    """`Σ (a b)² + Σ b⁴`, over a nested structure."""
    a, b = params["first"], params["rest"][0]
    return ops.sum((a * b) ** 2) + ops.sum(b**4)


def quartic_parameters():
    rng = np.random.default_rng(0)
    return {
        "first": rng.standard_normal(3).astype("float32"),
        "rest": [rng.standard_normal(3).astype("float32")],
    }


def test_a_function_of_nested_parameters():
    params = quartic_parameters()
    op = HessianOperator.from_function(quartic, params)
    a, b = params["first"], params["rest"][0]
    expected = np.block(
        [
            [np.diag(2 * b**2), np.diag(4 * a * b)],
            [np.diag(4 * a * b), np.diag(2 * a**2 + 12 * b**2)],
        ]
    )
    close(op.to_dense(), expected, 1e-5)
    exact = kc.hessian_diagonal(op)
    assert exact.value.keys() == params.keys()
    close(exact.value["first"], 2 * b**2, 1e-5)
    close(exact.value["rest"][0], 2 * a**2 + 12 * b**2, 1e-5)
    assert exact.relative_standard_error == 0
    sampled = kc.hessian_diagonal(op, method="hutchinson", num_matvecs=16)
    # Nothing off the diagonal blocks' diagonals but the mixed block: Σ_j≠i H_ij².
    noise = 6 * np.abs(4 * a * b) / 16**0.5
    assert np.all(np.abs(sampled.value["first"] - 2 * b**2) <= noise + 1e-4)
    close(kc.hessian_trace(op).value, np.trace(expected), 1e-5)
    top = kc.hessian_eigenvalues(op, k=1).value[0]
    values = np.linalg.eigvalsh(expected)
    close(top, values[np.abs(values).argmax()], 1e-4)


def test_other_parameters_without_compiling_again():
    params = quartic_parameters()
    op = HessianOperator.from_function(quartic, params)
    first = op @ np.ones(6)
    traces = backend.num_traces()
    op.set_parameters({"first": 2 * params["first"], "rest": [2 * params["rest"][0]]})
    close(op @ np.ones(6), 4 * first, 1e-5)
    assert backend.num_traces() == traces
    with pytest.raises(ValueError, match="the structure, the shapes and the types"):
        op.set_parameters({"first": params["first"], "rest": []})
    case = small()
    with pytest.raises(ValueError, match="present weights"):
        HessianOperator(case.model, case.x, case.y).set_parameters(params)


def test_an_exact_diagonal_in_several_pieces(monkeypatch):
    from keras_curvature.operators import basis_diagonal

    monkeypatch.setattr(basis_diagonal, "TOGETHER", 4)
    params = quartic_parameters()
    op = HessianOperator.from_function(quartic, params)
    exact = kc.hessian_diagonal(op, method="exact")
    close(exact.value["first"], 2 * params["rest"][0] ** 2, 1e-5)
    assert exact.num_matvecs == 6


def test_keras_variables_that_a_function_reads():
    a, b = keras.Variable(-0.5), keras.Variable(2.0)
    op = HessianOperator.from_function(
        lambda: (1 - a) ** 2 + 100 * (b - a**2) ** 2, [a, b]
    )
    close(op.to_dense(), [[2 - 400 * (2.0 - 0.75), 200.0], [200.0, 200.0]], 1e-5)
    a.assign(1.0)
    b.assign(1.0)
    close(op.to_dense(), [[802.0, -400.0], [-400.0, 200.0]], 1e-5)


def test_functions_that_are_refused():
    with pytest.raises(ValueError, match="nested structure of arrays, at least one"):
        HessianOperator.from_function(lambda p: 1.0, [])
    with pytest.raises(ValueError, match="without arguments"):
        HessianOperator.from_function(lambda: 1.0, [np.ones(2, "float32")])
    with pytest.raises(ValueError, match="floating-point variables.*int32"):
        HessianOperator.from_function(lambda p: p[0][0], [np.ones(2, "int32")])
    with pytest.raises(ValueError, match=r"must be a scalar.*shape \(2,\)"):
        HessianOperator.from_function(lambda p: p[0] ** 2, [np.ones(2, "float32")])
    with pytest.raises(ValueError, match="`hvp` must be"):
        HessianOperator.from_function(quartic, quartic_parameters(), hvp="jvp")


@pytest.mark.parametrize("hvp", ["tape", "finite_difference"])
def test_gradient_checkpointing(hvp):
    """As without: also where the loss is differentiated away from the weights."""
    found, messages = [], []
    for scope in (contextlib.nullcontext(), keras.RematScope(mode="full")):
        with scope:
            case = small()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            op = HessianOperator(case.model, case.x, case.y, hvp=hvp)
        v = np.random.default_rng(0).standard_normal(op.shape[0]).astype("float32")
        found.append(op @ v)
        # Layers are opened where nothing is traced that could hide them.
        if hvp == "tape" and keras.backend.backend() == "torch":
            samples = kc.hessian_diagonal(op, method="layerwise", num_matvecs=1)
            assert all(np.isfinite(part).all() for part in samples.value)
        messages.append([m for m in map(str, caught) if "RematScope" in m])
    modes = [layer._remat_mode for layer in case.model.layers]
    assert all(mode.mode == "full" for mode in modes)  # As it was.
    close(found[1], found[0])
    kept = keras.backend.backend() == "jax"
    assert [len(m) for m in messages] == [0, 0 if kept else 1]
    fails = keras.backend.backend() == "tensorflow"
    assert kept or ("keras#21207" in messages[1][0]) == fails


@pytest.mark.parametrize("policy", ["mixed_float16", "bfloat16"])
def test_half_precision_attention_and_batch_statistics(policy):
    """As the same model in float32, rounding apart."""

    def build(policy):
        inputs = x = layers.Input((3, 4))
        x = layers.MultiHeadAttention(2, 2, dtype=policy)(x, x)
        x = layers.BatchNormalization(dtype=policy)(x)
        outputs = layers.Dense(1, dtype=policy)(layers.Flatten()(x))
        return cases.functional(inputs, outputs)

    half, full = build(policy), build("float32")
    for a, b in zip(full.weights, half.weights, strict=True):
        a.assign(ops.cast(b, "float32"))
    x, y = cases._numbers(6, 3, 4), cases._numbers(6, 1, seed=1)
    x, y = x.astype("float32"), y.astype("float32")
    v = np.random.default_rng(0).standard_normal(half.count_params()).astype("float32")
    products = []
    for model in (half, full):
        op = HessianOperator(model, x, y)
        assert op.dtype == np.float32 and "BatchNormalization over 6" in op.mode
        products.append(op @ v[: op.shape[0]])
    close(products[0], products[1], 1e-5)
    assert half.layers[1].compute_dtype == policy.removeprefix("mixed_")
