"""The diagonal in two parts, each from samples, on every backend."""

import itertools

import cases
import keras
import numpy as np
import probed_cases
import pytest
from keras import layers, ops

import keras_curvature as kc
from keras_curvature.diagonal import diagonal_moments, is_split, sampled_method
from keras_curvature.layerwise import SplitDiagonal
from keras_curvature.layerwise.checks import find_structure
from keras_curvature.layerwise.output_roots import find_forms
from keras_curvature.layerwise.rules import rule_for
from keras_curvature.layerwise.structure import survey

#: Kinds of structure: softmax in front of the loss; positions; two losses; a penalty
#: that is no square; samples that interact; a variable that no rule covers.
SPLIT = [
    "mlp_tanh",
    "transformer",
    "two_outputs",
    "penalties",
    "batch_norm_training",
    "subclassed",
]
if not probed_cases.ON_TENSORFLOW:
    # Loops take long to trace there, and are in `test_sampled.py`.
    SPLIT.append("gru_while")


@pytest.fixture(autouse=True)
def _float():
    with cases.floatx(probed_cases.FLOAT):
        yield


def drawn(samples, count, seed=0):
    key = kc.estimators.seed_key(seed)
    rows = [samples(key, i, 4) for i in range(0, count, 4)]
    rows = [ops.convert_to_numpy(part).astype("float64") for part in rows]
    return np.concatenate(rows).T


@pytest.mark.parametrize("name", SPLIT)
def test_both_parts_are_unbiased_together(name):
    found = probed_cases.probed(name)
    parts = found.op.evaluation.once(SplitDiagonal)
    assert parts.possible
    truth = np.diag(found.dense).astype("float64")
    g = drawn(parts.gauss_newton, 96)
    for kind, samples in parts.rest.items():
        r = drawn(samples, 96)
        error = np.sqrt((g.var(axis=1, ddof=1) + r.var(axis=1, ddof=1)) / 96)
        distance = np.abs(g.mean(axis=1) + r.mean(axis=1) - truth)
        assert np.all(distance <= 6 * error + 1e-5 * np.abs(truth).max()), kind


@pytest.mark.parametrize("name", ["mlp_tanh", "two_outputs", "transformer"])
def test_the_first_part_is_that_of_the_gauss_newton_matrix(name):
    op = probed_cases.probed(name).op
    parts = op.evaluation.once(SplitDiagonal)
    exact = op.flatten(kc.hessian_diagonal(op, method="gauss_newton").value)
    g = drawn(parts.gauss_newton, 96)
    assert g.min() >= 0
    error = g.std(axis=1, ddof=1) / 96**0.5
    distance = np.abs(g.mean(axis=1) - exact)
    assert np.all(distance <= 6 * error + 1e-5 * exact.max())
    if parts.num_outputs < float("inf"):
        whole = ops.convert_to_numpy(parts.exact_gauss_newton())
        np.testing.assert_allclose(whole, exact, rtol=0, atol=1e-5 * exact.max())


@pytest.mark.parametrize(
    ("loss", "activation", "form"),
    [
        ("mse", None, "diagonal"),
        ("binary_crossentropy", "sigmoid", "diagonal"),
        ("huber", "tanh", None),
        ("categorical_crossentropy", "softmax", "softmax"),
        ("kl_divergence", "softmax", "softmax"),
        # Not convex in the outputs.
        ("cosine_similarity", None, None),
    ],
)
def test_forms_are_seen(loss, activation, form):
    model = cases.sequential(
        layers.Input((3,)),
        layers.Dense(4, activation="tanh"),
        layers.Dense(3),
        *([] if activation is None else [layers.Activation(activation)]),
        loss=loss,
    )
    op = kc.HessianOperator(model, cases._numbers(6, 3), cases._one_hot(6, 3))
    forms = find_forms(op.evaluation, survey(op.evaluation)[0])
    assert (forms and forms.forms) == (form and (form,))


def normalized(epochs):
    """A convolutional network with batch statistics, and data to train it on."""
    keras.utils.set_random_seed(0)
    model = cases.sequential(
        layers.Input((6, 6, 1)),
        layers.Conv2D(4, 3, use_bias=False),
        layers.BatchNormalization(),
        layers.ReLU(),
        layers.Conv2D(6, 3, use_bias=False),
        layers.BatchNormalization(),
        layers.ReLU(),
        layers.GlobalAveragePooling2D(),
        layers.Dense(3),
        loss=keras.losses.CategoricalCrossentropy(from_logits=True),
    )
    x, y = cases._numbers(24, 6, 6, 1), cases._one_hot(24, 3)
    model.fit(x, y, batch_size=24, epochs=epochs, verbose=0)
    return kc.HessianOperator(model, x, y)


@pytest.mark.parametrize("epochs", [1, 30])
def test_where_samples_meet_in_the_statistics_of_a_batch(epochs):
    """Nowhere near as noisy as random signs, and honest about it."""
    op = normalized(epochs)
    assert sampled_method(op) == "shrunk"
    truth = ops.convert_to_numpy(diagonal_moments(op, "exact").diagonal.value)
    squares, within, beyond = {"shrunk": 0.0, "hutchinson": 0.0}, [], []
    for seed, method in itertools.product(range(6), squares):
        found = diagonal_moments(op, method, 4, seed=seed).diagonal
        distance = np.abs(ops.convert_to_numpy(found.value) - truth)
        squares[method] += np.sum(distance**2)
        if method == "shrunk":
            errors = ops.convert_to_numpy(found.standard_error)
            within.append(np.mean(distance <= 2 * errors))
            beyond.append(np.mean(distance > 6 * errors))
    assert squares["shrunk"] < 0.65**2 * squares["hutchinson"]
    assert np.mean(within) > 0.9
    assert np.mean(beyond) < 0.01


def test_methods():
    op = probed_cases.probed("mlp_gelu").op
    assert sampled_method(op) == "shrunk"
    assert sampled_method(op, usual=False) == "layerwise"
    truth = np.diag(probed_cases.probed("mlp_gelu").dense)
    for method in ("shrunk", "split"):
        estimate = kc.hessian_diagonal(op, method=method, num_matvecs=16)
        # The part of three outputs is exact for two, and the rest has all others.
        assert estimate.num_matvecs == 2 + 14
        again = kc.hessian_diagonal(op, method=method, num_matvecs=16)
        np.testing.assert_array_equal(
            op.flatten(estimate.value), op.flatten(again.value)
        )
        distance = np.abs(op.flatten(estimate.value) - truth)
        assert np.all(distance <= 6 * op.flatten(estimate.standard_error) + 1e-5)
    few = kc.hessian_diagonal(op, method="shrunk", num_matvecs=2)
    assert few.standard_error is None
    precise = diagonal_moments(op, "split", tolerance=0.05).diagonal
    assert precise.relative_standard_error <= 0.05
    assert 16 <= precise.num_matvecs <= 1024


def test_the_trace():
    found = probed_cases.probed("mlp_gelu")
    trace = kc.hessian_trace(found.op, method="split", num_matvecs=32)
    distance = abs(trace.value - np.trace(found.dense))
    assert distance <= 4 * trace.standard_error
    assert len(trace.blocks) == len(found.op.variables)


def test_a_loss_that_is_not_convex_in_the_outputs():
    model = cases.sequential(
        layers.Input((3,)), layers.Dense(3), loss="cosine_similarity"
    )
    op = kc.HessianOperator(model, cases._numbers(6, 3), cases._one_hot(6, 3))
    assert not is_split(op)
    assert sampled_method(op) == "layerwise"
    with pytest.raises(ValueError, match="cannot be told from the rest"):
        kc.hessian_diagonal(op, method="shrunk")
    plain = kc.HessianOperator.from_function(lambda p: p[0] ** 2, [np.float32(1)])
    with pytest.raises(ValueError, match="needs a Keras model"):
        kc.hessian_diagonal(plain, method="split")


def test_an_output_that_another_one_is_computed_from():
    """It is moved where it is given alone, so that S is that of both outputs."""
    x = keras.Input((3,))
    first = layers.Dense(2)(x)
    model = keras.Model(x, [first, layers.Dense(2)(ops.tanh(first))])
    cases.randomize(model)
    model.compile("sgd", ["mse", "mse"])
    targets = [cases._numbers(6, 2, seed=n) for n in range(2)]
    op = kc.HessianOperator(model, cases._numbers(6, 3), targets)
    truth = np.diag(op.to_dense())
    # A curvature that is diagonal by layer leaves no noise.
    estimate = kc.hessian_diagonal(op, method="split", num_matvecs=16)
    np.testing.assert_allclose(op.flatten(estimate.value), truth, atol=1e-5)


def test_layers_that_are_known_by_name():
    """A table of positions has a row for each sample, though it sees none."""
    keras_hub = pytest.importorskip("keras_hub")
    inputs = layers.Input((4, 3))
    position = keras_hub.layers.PositionEmbedding(6)
    assert rule_for(position) is not None
    hidden = layers.Dense(3, activation="tanh")(inputs + position(inputs))
    model = cases.functional(inputs, layers.Dense(2)(hidden))
    op = kc.HessianOperator(model, cases._numbers(5, 4, 3), cases._numbers(5, 4, 2))
    coverage = op.evaluation.once(find_structure).of_first_order.coverage
    assert set(coverage.values()) == {"layer outputs"}
    diagonal = op.flatten(kc.hessian_diagonal(op, method="exact").value)
    expected = np.diag(op.to_dense())
    np.testing.assert_allclose(
        diagonal, expected, rtol=0, atol=2e-5 * np.abs(expected).max()
    )


def test_a_small_budget():
    """One sample has no error, but no bias either."""
    found = probed_cases.probed("mlp_gelu")
    few = [
        kc.hessian_trace(found.op, method="split", num_matvecs=2, seed=seed)
        for seed in range(48)
    ]
    assert {one.standard_error for one in few} == {None}
    values = np.array([one.value for one in few])
    error = values.std(ddof=1) / 48**0.5
    assert abs(values.mean() - np.trace(found.dense)) <= 4 * error + 1e-5


@pytest.mark.parametrize(
    ("method", "kernel", "head"),
    [
        ("exact", "exact, by parameters", "exact, by layer outputs"),
        ("hutchinson", "sampled along parameters", "sampled along parameters"),
        ("gauss_newton", "Gauss-Newton, sampled", "Gauss-Newton, sampled"),
        ("layerwise", "sampled along parameters", "sampled along layer outputs"),
    ],
)
def test_the_estimate_tells_how_each_variable_was_had(method, kernel, head):
    case = probed_cases.probed("shared_layer")
    estimate = kc.hessian_diagonal(
        case.op, method=method, num_matvecs=4, control_variate=False, verbose=False
    )
    assert list(estimate.ways) == list(case.op.evaluation.loss.layout.names)
    assert [*estimate.ways.values()][::2] == [kernel, head]


def test_the_estimate_tells_the_kind_of_the_rest():
    op = probed_cases.probed("mlp_tanh").op
    for method in ("split", "shrunk"):
        estimate = kc.hessian_diagonal(op, method=method, num_matvecs=4, verbose=False)
        assert set(estimate.ways.values()) == {
            "Gauss-Newton part, and the rest sampled along layer outputs"
        }


def test_gauss_newton_samples_of_twenty_thousand_classes():
    """A Hessian by the outputs of that size has 26 GB for sixteen samples."""
    rng = np.random.default_rng(0)
    model = keras.Sequential(
        [layers.Input((8,)), layers.Dense(8, "tanh"), layers.Dense(20_000)]
    )
    model.compile(loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    x = rng.standard_normal((16, 8)).astype("float32")
    y = rng.integers(0, 20_000, 16)
    found = kc.hessian_diagonal(model, x, y, method="gauss_newton", num_matvecs=8)
    assert found.relative_standard_error < 0.2
    # Of the scores' biases it is the mean of p (1 − p).
    p = ops.convert_to_numpy(ops.softmax(model(x)))
    assert abs(found.value[-1].sum() - np.mean(np.sum(p * (1 - p), axis=1))) < 0.01
