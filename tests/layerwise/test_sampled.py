"""Samples of the diagonal: groups of layers, and the control variate."""

import cases
import diagonals
import keras
import numpy as np
import pytest
from diagonals import assert_unbiased, mixing, probed
from keras import layers, ops

import keras_curvature as kc
from keras_curvature.layerwise import ExactDiagonal, LayerwiseDiagonal


@pytest.fixture
def operator(float64):
    return probed("mlp_gelu").op


def samples(operator, groups="joint", control_variate=False, count=240):
    draw = diagonals.sampler(operator, groups, control_variate)
    parts = [draw(0, i, 4) for i in range(0, count, 4)]
    return np.concatenate(parts, axis=1)


def test_samples_are_unbiased(operator):
    drawn = samples(operator, "layer")
    truth = np.diag(operator.to_dense())
    error = drawn.std(axis=1, ddof=1) / np.sqrt(drawn.shape[1])
    # 240 samples of fifty entries: 4.5 is passed once in a thousand runs.
    assert np.all(np.abs(drawn.mean(axis=1) - truth) <= 4.5 * error + 1e-12)


def test_a_group_per_layer_has_less_noise_than_a_joint_product(operator):
    truth = np.diag(operator.to_dense())[:, None]
    joint = samples(operator)
    grouped = samples(operator, "layer")
    assert np.square(grouped - truth).sum() < np.square(joint - truth).sum()


def test_one_group_of_all_layers_is_the_joint_product(operator):
    layers = {v.path.rpartition("/")[0] for v in operator.variables}
    grouped = samples(operator, [sorted(layers)], count=4)
    joint = samples(operator, count=4)
    np.testing.assert_allclose(grouped, joint, rtol=1e-9, atol=1e-12)


def test_hessian_diagonal_takes_groups(operator):
    estimate = kc.hessian_diagonal(
        operator,
        method="layerwise",
        groups="layer",
        control_variate=False,
        num_matvecs=4,
    )
    mean = samples(operator, "layer", count=4).mean(axis=1)
    np.testing.assert_allclose(operator.flatten(estimate.value), mean, rtol=1e-6)
    assert estimate.num_matvecs == 4


@pytest.mark.parametrize("groups", ["layers", [["no such layer"]], ["dense"]])
def test_unknown_groups_are_refused(operator, groups):
    with pytest.raises(ValueError, match="Received: groups="):
        LayerwiseDiagonal(operator.evaluation, groups)


# The control variate


def controllable(op):
    return op.evaluation.once(ExactDiagonal).plan().num_outputs < np.inf


#: Kinds of structure and of losses: the Gauss–Newton part by kinds of layers is tested
#: with their rules, and the curvature of the rest with samples of the whole.
CONTROLLED = [
    "mlp_tanh",
    "mlp_gelu",
    "dropout_training",
    "cnn_max_pool",
    "batch_norm_training",
    "embedding_mask",
    "transformer",
    "gru_unrolled",
    "gru_while",
    "shared_layer",
    "tied_embedding",
    "two_outputs",
    "two_inputs",
    "sample_weights",
    "penalties",
    "frozen_layer",
    "subclassed",
]


@pytest.mark.parametrize("name", CONTROLLED)
def test_control_variate_is_unbiased(name, float64):
    _, op, expected = probed(name)
    # Groups and the control variate are told apart where their products are chosen.
    groups = "layer" if name == "transformer" else "joint"
    assert_unbiased(samples(op, groups, True, 128), expected)


@pytest.mark.parametrize("name", cases.CASES)
def test_which_cases_have_a_control_variate(name, float64):
    op = probed(name).op
    apart = not diagonals.structure(op).samples_interact and controllable(op)
    assert apart == (name != "add_loss")


@pytest.mark.parametrize("fits", [False, True])
def test_what_the_control_variate_does_to_the_noise_is_known_beforehand(fits, float64):
    """Where a model fits its data the residual is small, and M is almost G."""
    model = cases.sequential(
        layers.Input((3,)),
        layers.Dense(6, activation="tanh"),
        layers.Dense(6, activation="tanh"),
        layers.Dense(2),
        loss="mse",
    )
    x = cases._numbers(5, 3)
    residual = (1e-3 if fits else 10.0) * cases._numbers(5, 2, seed=1)
    case = cases.Case(model, x, np.asarray(model(x)) + residual)
    op = diagonals.operator(case)
    truth = np.diag(op.to_dense())[:, None]
    plain, controlled = (
        np.square(samples(op, control_variate=c, count=128) - truth).sum()
        for c in (False, True)
    )
    told = ExactDiagonal(op.evaluation).plan().noise_without
    assert (controlled / plain < 0.1) == fits == (told < 0.1)
    if fits:
        estimate = kc.hessian_diagonal(op, method="layerwise", num_matvecs=8)
        mean = samples(op, control_variate=True, count=8).mean(axis=1)
        np.testing.assert_allclose(op.flatten(estimate.value), mean, rtol=1e-6)


def test_piecewise_linear_networks_have_no_noise_left(float64):
    case = mixing(
        layers.Input((3,)), layers.Dense(4, activation="relu"), layers.Dense(2)
    )
    op = diagonals.operator(case)
    drawn = samples(op, control_variate=True, count=4)
    truth = np.diag(op.to_dense())
    np.testing.assert_allclose(drawn, np.stack([truth] * 4, axis=1), atol=1e-12)


@pytest.mark.parametrize("mixed", [False, True])
def test_a_loss_that_mixes_outputs_with_something_else(mixed, float64):
    """Their mixed derivative is part of the diagonal, and no part of G or M - G."""
    case = mixing(
        layers.Input((3,)), layers.Dense(3, activation="tanh"), layers.Dense(2)
    )
    hidden = case.model.layers[0]

    def loss_fn(model, x, y):
        loss = ops.mean(ops.square(model(x) - y))
        inside = ops.mean(ops.square(hidden(x)), axis=1)
        factor = 5.0 * ops.sum(model(x), axis=1) if mixed else 5.0
        return loss + ops.mean(inside * factor)

    op = diagonals.operator(case, loss_fn=loss_fn)
    assert controllable(op) != mixed
    truth = np.diag(op.to_dense())
    estimate = kc.hessian_diagonal(op, method="layerwise", num_matvecs=64)
    distance = np.abs(op.flatten(estimate.value) - truth)
    assert np.all(distance <= 6 * op.flatten(estimate.standard_error) + 1e-9)
    if mixed:
        with pytest.raises(ValueError, match="Received: control_variate=True"):
            kc.hessian_diagonal(op, method="layerwise", control_variate=True)
        # What the refusal is for: nothing else tells that the mean would be wrong.
        with pytest.raises(AssertionError):
            assert_unbiased(samples(op, control_variate=True, count=1024), truth)


class Autoencoder(keras.Model):
    """Its outputs are parts of one layer's; the loss goes on with another layer."""

    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = layers.Dense(4), layers.Dense(3)

    def call(self, x):
        return ops.split(self.encoder(x), 2, axis=-1)

    def loss_of(self, x, y=None):
        mean, spread = self(x)
        noise = keras.random.normal((ops.shape(x)[0], 2), seed=0)
        image = ops.tanh(self.decoder(mean + ops.exp(spread) * noise))
        return ops.mean(ops.square(x - image)) + ops.mean(ops.square(spread))


def test_layers_that_are_used_after_the_outputs_of_the_model(float64):
    """Shifts of outputs are made before theirs, and open shapes reach the loop."""
    model, x = Autoencoder(), cases._numbers(5, 3)
    model.loss_of(x)
    model.compile()
    op = kc.HessianOperator(model, x, loss_fn=lambda m, x, y: m.loss_of(x))
    truth = np.diag(op.to_dense())
    np.testing.assert_allclose(diagonals.exact(op)[0], truth, rtol=1e-6, atol=1e-9)
    assert not controllable(op)
    assert set(diagonals.structure(op).coverage.values()) == {"layer outputs"}
    assert_unbiased(samples(op, count=256), truth)
