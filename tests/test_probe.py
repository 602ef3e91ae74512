"""The training loss as a pure function."""

import contextlib

import cases
import keras
import numpy as np
import pytest
import reference
import tensorflow as tf
from keras import layers, ops

from keras_curvature.data import ProbeData
from keras_curvature.probe import FunctionProbe, Probe


def built(case, **kwargs):
    """A probe of a case, and its one batch."""
    batch = ProbeData(case.x, case.y, case.sample_weight).first()
    probe = Probe(case.model, training=case.training, **kwargs)
    probe.build(batch)
    return probe, batch


@pytest.mark.parametrize("name", ["penalties", "two_outputs", "embedding_mask"])
def test_loss_is_what_evaluate_reports(name):
    case = cases.CASES[name]()
    probe, batch = built(case)
    expected = case.model.evaluate(case.x, case.y, verbose=0)
    loss = probe.loss(probe.sources(), batch)
    np.testing.assert_allclose(loss, np.ravel(expected)[0], rtol=1e-6)
    assert loss.shape == () and loss.dtype == tf.float32


@pytest.mark.parametrize("name", ["two_outputs", "batch_norm_training", "penalties"])
def test_loss_depends_on_the_sources_alone(name):
    case = cases.CASES[name]()
    probe, batch = built(case)
    before = reference.state_of(case.model)
    sources = [0.5 * s for s in probe.sources()]
    halved = probe.loss(sources, batch)
    assert probe.loss(sources, batch) == halved
    reference.assert_same_state(before, reference.state_of(case.model))
    assert halved != probe.loss(probe.sources(), batch)
    for variable in probe.variables:
        variable.assign(0.5 * variable)
    assert probe.loss(probe.sources(), batch) == halved


def test_dropout_masks_move_with_the_seeds_only():
    case = cases.dropout_training()
    probe, batch = built(case)
    loss = probe.loss(probe.sources(), batch)
    assert probe.loss(probe.sources(), batch) == loss
    case.model(case.x, training=True)
    assert probe.loss(probe.sources(), batch) != loss
    inference, _ = built(case._replace(training=False))
    expected = case.model.evaluate(case.x, case.y, verbose=0)
    loss = inference.loss(inference.sources(), batch)
    np.testing.assert_allclose(loss, expected, rtol=1e-6)


def test_layers_without_the_argument_training():
    case = cases.subclassed()
    for training in (False, True):
        probe, batch = built(case._replace(training=training))
        assert np.isfinite(probe.loss(probe.sources(), batch))


def test_normalization_is_exact_only_while_the_loss_is_computed():
    class Spy(layers.Layer):
        def call(self, x):
            seen.append(tf.nn.moments)
            return x

    seen, original = [], tf.nn.moments
    model = cases.sequential(layers.Input((3,)), layers.Dense(2), Spy())
    probe, batch = built(cases.Case(model, np.ones((2, 3)), np.ones((2, 2))))
    seen.clear()
    probe.loss(probe.sources(), batch)
    assert len(seen) == 1 and seen[0] is not original
    assert tf.nn.moments is original


def test_recurrent_layers_leave_cudnn_while_the_loss_is_computed():
    class Spy(layers.GRU):
        def call(self, sequences, initial_state=None, mask=None, training=False):
            seen.append(self.use_cudnn)
            return super().call(sequences, initial_state, mask, training)

    seen = []
    model = cases.sequential(layers.Input((3, 2)), Spy(2), layers.Dense(2))
    probe, batch = built(cases.Case(model, np.ones((2, 3, 2)), np.ones((2, 2))))
    seen.clear()
    probe.loss(probe.sources(), batch)
    assert seen == [False]
    assert model.layers[0].use_cudnn == "auto"


@pytest.mark.parametrize("policy", ["mixed_float16", "bfloat16"])
def test_sources_and_layers_are_float32_at_least(policy):
    class Spy(layers.Dense):
        def call(self, x):
            seen.append((x.dtype, self.compute_dtype))
            return super().call(x)

    seen = []
    model = cases.sequential(
        layers.Input((3,)), Spy(3, dtype=policy), Spy(2, dtype=policy)
    )
    policies = [layer.dtype_policy for layer in model.layers]
    probe, batch = built(cases.Case(model, np.ones((2, 3)), np.ones((2, 2))))
    assert {s.dtype for s in probe.sources()} == {tf.float32}
    seen.clear()
    assert probe.loss(probe.sources(), batch).dtype == tf.float32
    assert seen == [(tf.float32, "float32")] * 2
    assert [layer.dtype_policy for layer in model.layers] == policies


def test_loss_is_not_divided_among_replicas(mirrored):
    losses = []
    for scope in (contextlib.nullcontext, mirrored.scope):
        with mirrored.scope():
            case = cases.penalties()
        with scope():
            probe, batch = built(case)
            losses.append(float(probe.loss(probe.sources(), batch)))
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-6)


def test_building_builds_no_optimizer():
    model = keras.Sequential([layers.Dense(2)])
    optimizer = keras.optimizers.Adam()
    model.compile(optimizer=optimizer, loss="mse", metrics=["mae"])
    probe = Probe(model)
    probe.build(ProbeData(np.ones((4, 3)), np.ones((4, 2))).first())
    assert [tuple(v.shape) for v in probe.variables] == [(3, 2), (2,)]
    assert model.optimizer is optimizer and not optimizer.built
    # Freezing is still possible, which a built optimizer would refuse.
    model.add(layers.Dense(2))
    model.fit(np.ones((4, 3)), np.ones((4, 2)), verbose=0)


def test_building_a_model_with_its_own_loss_function():
    model = keras.Sequential([layers.Dense(2)])
    probe = Probe(model, loss_fn=lambda model, x, y: ops.mean((model(x) - y) ** 2))
    batch = ProbeData(np.ones((4, 3)), np.ones((4, 2))).first()
    probe.build(batch)
    assert len(probe.variables) == 2
    assert probe.loss(probe.sources(), batch) > 0
    assert model.layers[0] in probe.layers() and model not in probe.layers()


@pytest.mark.parametrize(
    "loss_fn, message",
    [
        (lambda m, x, y: (m(x) - y) ** 2, r"scalar.*shape \(2, 2\), dtype float32"),
        (lambda m, x, y: tf.constant(3), "dtype int32"),
        (lambda m, x, y: None, "must return a scalar. Received: None"),
    ],
)
def test_losses_that_are_no_scalars(loss_fn, message):
    model = cases.sequential(layers.Input((3,)), layers.Dense(2))
    case = cases.Case(model, np.ones((2, 3)), np.ones((2, 2)))
    probe, batch = built(case, loss_fn=loss_fn)
    with pytest.raises(ValueError, match=message):
        probe.loss(probe.sources(), batch)


def test_refused_models():
    case = cases.mlp_tanh()
    with pytest.raises(ValueError, match="must be a `keras.Model`"):
        Probe(case.model.layers[0])
    with pytest.raises(ValueError, match="`loss_fn` must be a function.*'mse'"):
        Probe(case.model, loss_fn="mse")
    with pytest.raises(ValueError, match="needs targets.*y=None"):
        built(case._replace(y=None))
    with pytest.raises(ValueError, match="must be Keras variables"):
        Probe(case.model, variables=[v.value for v in case.model.variables])
    without = keras.Sequential([layers.Input((3,)), layers.Dense(3)])
    without.compile(optimizer="sgd")
    probe, batch = built(case._replace(model=without))
    with pytest.raises(ValueError, match="No loss to compute"):
        probe.loss(probe.sources(), batch)
    with pytest.raises(ValueError, match="not compiled"):
        Probe(keras.Sequential([layers.Dense(2)]))


def test_a_model_that_needs_no_targets():
    model = keras.Sequential([layers.Input((3,)), cases.VarianceLoss()])
    model.compile(optimizer="sgd")
    probe, batch = built(cases.Case(model, cases._numbers(4, 3)))
    expected = 0.5 * np.sum(cases._numbers(4, 3).mean(0) ** 2)
    np.testing.assert_allclose(probe.loss(probe.sources(), batch), expected, rtol=1e-5)


def test_function_probe():
    x, y = tf.Variable([1.0, 2.0]), keras.Variable(3.0)
    probe = FunctionProbe(lambda: tf.reduce_sum(x**2) * y, [x, y])
    assert probe.loss(probe.sources(), None) == 15.0
    assert all(isinstance(s, tf.Variable) for s in probe.sources())
    assert probe.layers() == []
    with probe.at([tf.constant([0.0, 1.0]), tf.constant(2.0)]) as sources:
        assert probe.loss(sources, None) == 2.0
    assert probe.loss(probe.sources(), None) == 15.0
    with pytest.raises(RuntimeError), probe.at([tf.zeros(2), tf.zeros(())]):
        raise RuntimeError
    assert probe.loss(probe.sources(), None) == 15.0


@pytest.mark.parametrize(
    "variables",
    [[], tf.Variable([1.0]), [tf.constant(1.0)], cases],
    ids=["none", "bare", "constant", "other"],
)
def test_function_probe_needs_a_list_of_variables(variables):
    with pytest.raises(ValueError, match="a list of at least one variable"):
        FunctionProbe(lambda: tf.constant(1.0), variables)
