"""Samples of the diagonal from signs at the layers' outputs."""

import cases
import diagonals
import keras
import numpy as np
import pytest
import reference
import tensorflow as tf
from diagonals import assert_unbiased, mixing, operator, probed, samples_of
from keras import layers, ops

import keras_curvature as kc
from keras_curvature import backend


def small(**kwargs):
    return mixing(
        layers.Input((3,)),
        layers.Dense(3, activation="tanh"),
        layers.Dense(2),
        samples=6,
        **kwargs,
    )


@pytest.mark.parametrize("name", cases.CASES)
def test_unbiased(name, float64):
    _, op, expected = probed(name)
    assert diagonals.structure(op).samples_interact == (name == "add_loss")
    if name != "add_loss":
        assert_unbiased(samples_of(op, 256), expected)


def test_a_sample_depends_on_seed_and_index_alone(float64):
    op = operator(small())
    draw = diagonals.sampler(op)
    together = np.asarray(draw(3, 0, 4))
    for index in range(4):
        alone = np.asarray(draw(3, index, 1))[:, 0]
        np.testing.assert_allclose(alone, together[:, index], rtol=1e-12, atol=1e-14)
    np.testing.assert_array_equal(draw(3, 0, 4), together)
    # Not the same as those of another seed, and different from each other.
    other = np.asarray(draw(4, 0, 4))
    distinct = np.unique(np.concatenate([together, other], axis=1), axis=1)
    assert distinct.shape[1] == 8


def test_batches_of_a_data_set_get_signs_of_their_own(float64):
    case = small()
    # The same batch twice: with the same signs the noise would not shrink.
    one = operator(case)
    twice = operator(
        case._replace(x=np.concatenate([case.x] * 2), y=np.concatenate([case.y] * 2)),
        batch_size=len(case.x),
    )
    truth = diagonals.by_differences(case)
    noise, halved = samples_of(one, 128), samples_of(twice, 128)
    assert_unbiased(noise, truth)
    assert_unbiased(halved, truth)
    ratio = np.var(halved, axis=1).sum() / np.var(noise, axis=1).sum()
    # Half the variance, known to about a fifth from 128 samples.
    assert 0.35 < ratio < 0.7


def test_batches_of_several_sizes(float64):
    case = small()
    expected = diagonals.by_differences(case)
    data = tf.data.Dataset.from_tensor_slices((case.x, case.y)).batch(4)
    assert_unbiased(samples_of(kc.HessianOperator(case.model, data), 128), expected)


@pytest.mark.parametrize("control_variate", [False, True])
def test_standard_errors_are_calibrated(control_variate, float64):
    _, op, expected = probed("mlp_gelu")
    inside = []
    for seed in range(16):
        estimate = kc.hessian_diagonal(
            op,
            method="layerwise",
            num_matvecs=16,
            seed=seed,
            control_variate=control_variate,
        )
        assert estimate.num_matvecs == 16
        value, error = op.flatten(estimate.value), op.flatten(estimate.standard_error)
        distance = np.abs(value - expected)
        # Of the last layer nothing is left to the signs by a control variate.
        noisy = error > 1e-12
        assert np.all(distance[~noisy] <= 1e-7 * np.abs(expected).max())
        inside.append(distance[noisy] <= 2 * error[noisy])
    # Student's t with 15 degrees of freedom: 93.6 %; skewness costs a little.
    assert 0.88 < np.mean(inside) < 0.98


def test_a_tolerance_is_reached(float64):
    _, op, expected = probed("mlp_gelu")
    estimate = kc.hessian_diagonal(op, method="layerwise", tolerance=0.2)
    value, error = op.flatten(estimate.value), op.flatten(estimate.standard_error)
    assert np.linalg.norm(error) <= 0.2 * np.linalg.norm(value)
    assert np.linalg.norm(value - expected) <= 0.5 * np.linalg.norm(expected)


# Samples that interact


@keras.saving.register_keras_serializable(package="layer outputs")
class MixesTheBatch(layers.Layer):
    """Adds something of other samples to each: by their mean, or a neighbour."""

    def __init__(self, how, size=0.5, **kwargs):
        super().__init__(**kwargs)
        self.how, self.size = how, size

    def call(self, x):
        if self.how == "mean":
            return x - self.size * ops.mean(x, axis=0, keepdims=True)
        return x + self.size * ops.roll(x, self.how, axis=0)


def mixed(how, samples=6, **kwargs):
    return mixing(
        layers.Input((3,)),
        layers.Dense(3, activation="tanh"),
        MixesTheBatch(how, **kwargs),
        layers.Dense(2),
        samples=samples,
    )


@pytest.mark.parametrize("how", ["mean", 1, 2, 3])
@pytest.mark.parametrize("samples", [2, 4, 8])
def test_a_layer_that_mixes_the_batch_is_noticed(how, samples):
    if how == "mean" or how % samples:
        op = operator(mixed(how, samples))
        assert diagonals.structure(op).samples_interact


def test_weak_mixing_in_a_large_batch_is_noticed():
    # Of a bias of a thousandth: the rows' own part is 1, others' together 0.001.
    op = operator(mixed("mean", samples=512, size=1e-3))
    assert diagonals.structure(op).samples_interact


def test_interacting_samples_fall_back_and_stay_unbiased(float64):
    _, op, expected = probed("add_loss")
    assert diagonals.structure(op).samples_interact
    with pytest.warns(UserWarning, match="samples of a batch interact"):
        estimate = kc.hessian_diagonal(op, method="layerwise", num_matvecs=256)
    value, error = op.flatten(estimate.value), op.flatten(estimate.standard_error)
    assert np.all(np.abs(value - expected) <= 6 * error + 1e-7)


def test_one_sample_does_not_decide(float64):
    # A single sample is put beside itself, for the next data set may have more.
    case = mixed("mean")
    op = operator(case._replace(x=case.x[:1], y=case.y[:1]))
    assert diagonals.structure(op).samples_interact
    case = small()
    op = operator(case._replace(x=case.x[:1], y=case.y[:1]))
    assert not diagonals.structure(op).samples_interact


# The model is left alone


def state(model):
    contents = {
        id(layer): {
            name: value
            for name, value in vars(layer).items()
            if name in ("call", "activation")
        }
        for layer in model._flatten_layers()
    }
    return contents, reference.state_of(model)


def assert_same(before, model):
    contents, rest = state(model)
    assert contents.keys() == before[0].keys()
    for key, attributes in contents.items():
        assert attributes.keys() == before[0][key].keys()
        assert all(attributes[n] is before[0][key][n] for n in attributes)
    reference.assert_same_state(before[1], rest)


def separable():
    return mixing(
        layers.Input((4, 4, 1)),
        layers.SeparableConv2D(2, 2, activation="tanh"),
        layers.BatchNormalization(),
    )


@pytest.mark.parametrize(
    "make", [separable, cases.CASES["penalties"], cases.CASES["embedding_mask"]]
)
def test_the_model_is_untouched(make):
    case = make()
    before = state(case.model)
    diagonals.sampler(operator(case))(0, 0, 1)
    assert_same(before, case.model)
    weights = case.model.get_weights()
    case.model.fit(case.x, case.y, verbose=0)
    assert any(
        np.any(a != b) for a, b in zip(weights, case.model.get_weights(), strict=True)
    )


class Fails(layers.Layer):
    def call(self, x):
        if getattr(self, "failing", False):
            raise RuntimeError("in the middle")
        return x


def test_the_model_is_untouched_after_an_error():
    inputs = layers.Input((3,))
    hidden = layers.Dense(3, activation="tanh")(inputs)
    outputs = layers.Dense(2)(layers.LayerNormalization()(Fails()(hidden)))
    model = cases.functional(inputs, outputs)
    x, y = cases._numbers(4, 3), cases._numbers(4, 2)
    op = kc.HessianOperator(model, x, y)
    before = state(model)
    fails = next(layer for layer in model.layers if isinstance(layer, Fails))
    fails.failing = True
    for diagonal in (
        lambda: diagonals.sampler(op)(0, 0, 1),
        lambda: kc.hessian_diagonal(op, method="exact"),
    ):
        with pytest.raises(Exception, match="in the middle"):
            diagonal()
        assert_same(before, model)
    fails.failing = False
    expected = np.diag(op.to_dense())
    diagonals.assert_close(diagonals.exact(op)[0], expected, rtol=1e-5)


def test_attributes_of_an_instance_come_back():
    case = small()
    dense = case.model.layers[0]
    own = dense.call
    dense.__dict__["call"] = own
    activation = dense.activation
    diagonals.sampler(operator(case))(0, 0, 1)
    assert dense.__dict__["call"] is own
    assert dense.activation is activation


# Compiled once


def test_compiled_once():
    case = small()
    op = operator(case)
    # The control variate is chosen by the weights, which move here.
    options = {"method": "layerwise", "num_matvecs": 2, "control_variate": False}
    kc.hessian_diagonal(op, **options)
    traces = backend.num_traces()
    for step in range(3):
        kc.hessian_diagonal(op, seed=step, **options)
        case.model.layers[0].bias.assign_add(np.ones(3))
        op.set_data(case.x + step, case.y)
    assert backend.num_traces() == traces


def test_no_growth_over_1000_probes():
    op = operator(small())
    draw = diagonals.sampler(op)

    def resident():
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * 4096

    for index in range(200):
        draw(0, index, 1)
    before = resident()
    for index in range(1000):
        draw(0, index, 1)
    # Allocators move in steps of a megabyte; a leaked graph is larger by far.
    assert resident() - before < 8e6


def test_with_xla():
    case = mixing(layers.Input((3,)), layers.Dense(2, activation="gelu"))
    op, plain = operator(case, jit_compile=True), operator(case)
    expected = np.diag(plain.to_dense())
    np.testing.assert_allclose(
        diagonals.sampler(op)(0, 0, 2),
        diagonals.sampler(plain)(0, 0, 2),
        atol=1e-4 * np.abs(expected).max(),
    )
    diagonals.assert_close(diagonals.exact(op)[0], expected, rtol=1e-5)


def test_needs_a_model():
    v = keras.Variable(np.ones(2))
    op = kc.HessianOperator.from_function(lambda: ops.sum(v.value**2), [v])
    with pytest.raises(ValueError, match="need a Keras model"):
        diagonals.structure(op)
