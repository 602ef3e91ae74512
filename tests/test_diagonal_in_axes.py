"""The diagonal in axes of the variables, against the dense Hessian turned."""

import functools

import keras
import numpy as np
import pytest
from diagonals import assert_close, assert_unbiased
from keras import layers, ops

import keras_curvature as kc
from keras_curvature.layerwise.rules import paths
from keras_curvature.optimizers.layer_axes import sides_of

#: Keras' layers compute partly in float32 on the other backends.
FLOAT64 = keras.backend.backend() == "tensorflow"
ROUNDING = 1e-7 if FLOAT64 else 1e-6


def _conv():
    stack = [layers.Conv2D(3, 2, activation="tanh"), layers.Flatten(), layers.Dense(2)]
    return [keras.Input((4, 4, 2)), *stack], "mse", (4, 4, 2), None


def _attention():
    inputs = keras.Input((3, 4))
    x = layers.MultiHeadAttention(2, 2)(inputs, inputs)
    return keras.Model(inputs, layers.Dense(2)(x)), "mse", (3, 4), None


class _Quartic(keras.regularizers.Regularizer):
    def __call__(self, x):
        return ops.sum(x**4)


def _embedding():
    # A penalty with another curvature for each entry.
    dense = layers.Dense(2, kernel_regularizer=_Quartic())
    stack = [layers.Embedding(7, 3), layers.Flatten(), layers.Activation("tanh"), dense]
    return [keras.Input((4,), dtype="int32"), *stack], "mse", (4,), 7


def _normalized():
    stack = [layers.Dense(3), layers.BatchNormalization(), layers.Activation("tanh")]
    return [keras.Input((4,)), *stack, layers.Dense(2)], "mse", (4,), None


MODELS = {f.__name__[1:]: f for f in (_conv, _attention, _embedding, _normalized)}


def _operator(name):
    keras.utils.set_random_seed(0)
    stack, loss, shape, words = MODELS[name]()
    model = keras.Sequential(stack) if isinstance(stack, list) else stack
    model.compile("sgd", loss)
    rng = np.random.default_rng(0)
    x = rng.standard_normal((6, *shape)) if words is None else None
    x = rng.integers(0, words, (6, *shape)) if x is None else x
    return kc.HessianOperator(
        model, x, rng.standard_normal((6, *model.outputs[0].shape[1:]))
    )


@functools.cache
def _probed(name):
    """An operator and its dense Hessian, for axes of both kinds."""
    operator = _operator(name)
    return operator, operator.to_dense()


def _random_axes(operator, one_sided):
    """Axes at random for what an optimizer would turn; and the matrix of all."""
    rng = np.random.default_rng(1)
    axes, blocks = [], []
    for variable in operator.variables:
        sides = sides_of(variable.shape)
        if sides is None:
            axes.append(None)
            blocks.append(np.eye(int(np.prod(variable.shape))))
            continue
        sizes = sides.rows, sides.columns
        pair = [np.linalg.qr(rng.standard_normal((n, n)))[0] for n in sizes]
        if one_sided:
            pair[0] = None
        axes.append(tuple(pair))
        left = np.eye(sizes[0]) if one_sided else pair[0]
        blocks.append(np.kron(left, pair[1]))
    size = sum(map(len, blocks))
    whole, start = np.zeros((size, size)), 0
    for block in blocks:
        end = start + len(block)
        whole[start:end, start:end] = block
        start = end
    return axes, whole


@pytest.mark.parametrize("one_sided", [False, True], ids=["both", "right"])
@pytest.mark.parametrize("name", MODELS)
def test_against_the_dense_hessian(name, one_sided, float64):
    operator, dense = _probed(name)
    axes, q = _random_axes(operator, one_sided)
    truth = np.diag(q.T @ dense @ q)
    exact = kc.hessian_diagonal(
        operator, method="exact", axes=axes, max_matvecs=1000
    ).value
    assert_close(operator.flatten(exact), truth)
    for method in ("layerwise", "hutchinson", "split"):
        if method == "split" and name == "normalized":
            continue
        assert_unbiased(_drawn(operator, method, axes), truth, rounding=ROUNDING)


def _drawn(operator, method, axes, num_matvecs=8, seeds=48):
    """Estimates of several seeds, side by side."""
    return np.stack(
        [
            operator.flatten(
                kc.hessian_diagonal(
                    operator,
                    method=method,
                    axes=axes,
                    num_matvecs=num_matvecs,
                    seed=seed,
                ).value
            )
            for seed in range(seeds)
        ],
        axis=1,
    )


def _gauss_newton(name):
    """The dense Gauss–Newton matrix of a mean squared error, by differences.

    With the curvature of penalties, as `method="gauss_newton"` has it.
    """
    operator = _probed(name)[0]
    model, (x, _, _) = operator.evaluation.loss.model, operator.evaluation.data.first()
    columns, length = [], 1e-5 if FLOAT64 else 1e-2
    for variable in operator.variables:
        value = variable.numpy()
        for k in range(value.size):
            moved = []
            for step in (length, -length):
                flat = value.copy().ravel()
                flat[k] += step
                variable.assign(flat.reshape(value.shape))
                moved.append(ops.convert_to_numpy(model(x)).ravel())
            variable.assign(value)
            columns.append((moved[0] - moved[1]) / (2 * length))
    jacobian = np.stack(columns, axis=1).astype("float64")
    matrix = 2 / len(jacobian) * jacobian.T @ jacobian
    penalties = [
        12 * v.numpy().ravel() ** 2 if v.regularizer else np.zeros(v.numpy().size)
        for v in operator.variables
    ]
    return matrix + np.diag(np.concatenate(penalties))


@pytest.mark.parametrize("one_sided", [False, True], ids=["both", "right"])
@pytest.mark.parametrize("name", [m for m in MODELS if m != "normalized"])
def test_gauss_newton_against_the_dense_matrix(name, one_sided, float64):
    """Exactly, by samples, and as the first of two parts."""
    operator = _probed(name)[0]
    axes, q = _random_axes(operator, one_sided)
    truth = np.diag(q.T @ _gauss_newton(name) @ q)
    rtol = 1e-6 if FLOAT64 else 1e-3  # Of the differences.
    exact = kc.hessian_diagonal(operator, method="gauss_newton", axes=axes).value
    assert_close(operator.flatten(exact), truth, rtol)
    assert_unbiased(_drawn(operator, "gauss_newton", axes), truth, rounding=rtol)
    # Of a single product there is the first part alone.
    assert_unbiased(_drawn(operator, "shrunk", axes, 1, 64), truth, rounding=rtol)


def test_the_short_way_is_the_long_way(float64, monkeypatch):
    """Factors that are turned, and contributions of samples that are."""
    operator = _probed("attention")[0]
    axes, _ = _random_axes(operator, False)

    def taken():
        diagonal = kc.hessian_diagonal(
            operator, method="layerwise", axes=axes, num_matvecs=1
        )
        return operator.flatten(diagonal.value)

    short = taken()
    monkeypatch.setattr(
        paths.OuterProduct, "in_axes", lambda path, axes: paths.InAxes(path, axes)
    )
    operator = _operator("attention")
    assert_close(taken(), short)


@pytest.mark.parametrize(
    "wrong",
    [
        [],
        [None, None, (np.eye(3), np.eye(2))],
        [(np.ones((4, 3)), None), None, None, None],
        [(np.eye(5), None), None, None, None],
    ],
)
def test_axes_that_do_not_fit(wrong):
    model = keras.Sequential([keras.Input((4,)), layers.Dense(3), layers.Dense(2)])
    model.compile("sgd", "mse")
    with pytest.raises(ValueError, match="axes.*Received: "):
        kc.hessian_diagonal(model, np.ones((2, 4)), np.ones((2, 2)), axes=wrong)


def test_the_best_method_in_axes():
    """That of entries, but for the plans that are known for these alone."""
    operator = _operator("attention")
    axes, _ = _random_axes(operator, False)
    estimate = kc.hessian_diagonal(operator, axes=axes, num_matvecs=8)
    assert all("Gauss-Newton part" in way for way in estimate.ways.values())
    # Groups are known to samples at the layers' outputs alone.
    grouped = kc.hessian_diagonal(operator, axes=axes, num_matvecs=8, groups="layer")
    assert set(grouped.ways.values()) == {"sampled along layer outputs"}
    few = kc.hessian_diagonal(operator, axes=axes, num_matvecs=operator.shape[0])
    assert few.standard_error is not None
    assert set(few.ways.values()) == {"exact, by parameters"}
