"""How rules are found, registered, and found out if they are wrong."""

import cases
import diagonals
import keras
import numpy as np
import pytest
from keras import layers, ops

import keras_curvature as kc
from keras_curvature.layerwise.rules import Elementwise, LayerRule, rule, rule_for


class Scale(layers.Layer):
    """Multiplies by a vector; its first argument has a name of its own."""

    def build(self, input_shape):
        self.scale = self.add_weight(shape=input_shape[-1:], name="scale")

    def call(self, x, twice=False):
        return x * self.scale * (2 if twice else 1)


class ScaleRule(LayerRule):
    def paths(self, layer, inputs, z):
        factor = inputs if inputs.shape == z.shape else None
        return [Elementwise(layer.scale, factor, lambda v: v)]


@pytest.fixture
def scale_rule(monkeypatch):
    monkeypatch.setattr(rule, "_RULES", dict(rule._RULES))
    assert rule_for(Scale()) is None
    assert kc.register_layer_rule(Scale)(ScaleRule) is ScaleRule


def scaled(call=lambda layer, x: layer(x)):
    inputs = layers.Input((3,))
    outputs = call(Scale(), layers.Dense(3, activation="tanh")(inputs))
    model = cases.functional(inputs, outputs, loss=diagonals.mixing_loss)
    return cases.Case(model, cases._numbers(4, 3), cases._numbers(4, 3, seed=1))


def check(case, way):
    op = diagonals.operator(case)
    value, _ = diagonals.exact(op)
    diagonals.assert_close(value, diagonals.by_differences(case))
    assert diagonals.structure(op).coverage[case.model.layers[-1].scale.path] == way
    return op


def test_a_layer_without_a_rule_is_a_parameter(float64):
    check(scaled(), "parameters")


@pytest.mark.parametrize(
    "call", [lambda layer, x: layer(x), lambda layer, x: layer(x=x)]
)
def test_a_registered_rule_is_used(scale_rule, float64, call):
    check(scaled(call), "layer outputs")


def test_a_wrong_rule_is_found_out(scale_rule, float64):
    # Times two, of which the rule knows nothing.
    case = scaled(lambda layer, x: layer(x, twice=True))
    with pytest.warns(UserWarning, match="layer rules say.*scale"):
        op = check(case, "parameters")
    assert "layer outputs" in diagonals.structure(op).coverage.values()


def test_a_rule_for_a_layer_that_is_not_linear_is_found_out(scale_rule, float64):
    class Square(Scale):
        def call(self, x):
            return x * ops.square(self.scale)

    class SquareRule(ScaleRule):
        def call(self, layer, call, shift, inputs):
            return shift(call(inputs), 2 * inputs * layer.scale)

    kc.register_layer_rule(Square)(SquareRule)
    inputs = layers.Input((3,))
    outputs = Square()(layers.Dense(3)(inputs))
    model = cases.functional(inputs, outputs, loss=diagonals.mixing_loss)
    case = cases.Case(model, cases._numbers(4, 3), cases._numbers(4, 3, seed=1))
    with pytest.warns(UserWarning, match="layer rules say"):
        check(case, "parameters")


def test_bias_that_keras_adds_along_another_axis_is_found_out(float64):
    # Keras adds a bias of shape (2, 1, 1) along the last axis if that has two entries.
    layer = layers.EinsumDense("bi...,io->bo...", (2, 2, 2), bias_axes="o")
    case = diagonals.mixing(layers.Input((3, 2, 2)), layer)
    op = diagonals.operator(case)
    with pytest.warns(UserWarning, match="einsum_dense.*error in Keras"):
        value, _ = diagonals.exact(op)
    diagonals.assert_close(value, diagonals.by_differences(case))
    assert set(diagonals.structure(op).coverage.values()) == {"parameters"}


def test_a_rule_serves_subclasses_that_inherit_the_call():
    class Named(layers.Dense):
        pass

    class Other(layers.Dense):
        def call(self, inputs):
            return super().call(inputs) ** 2

    assert isinstance(rule_for(Named(2)), type(rule_for(layers.Dense(2))))
    assert rule_for(Other(2)) is None
    assert rule_for(layers.ReLU()) is None


def test_adapters_are_not_linear_in_their_parts():
    for layer, size in [
        (layers.Dense(3), (None, 3)),
        (layers.EinsumDense("bi,io->bo", 3), (None, 3)),
        (layers.Embedding(5, 3), (None,)),
        (layers.Conv1D(3, 2), (None, 4, 3)),
    ]:
        layer.build(size)
        assert rule_for(layer) is not None
        layer.enable_lora(2)
        assert rule_for(layer) is None


def test_einsum_without_a_role_for_each_index_has_no_rule():
    layer = layers.EinsumDense("bti,io->bo", 3)
    layer.build((None, 4, 2))
    assert rule_for(layer) is None


def test_rule_without_paths_says_so():
    with pytest.raises(NotImplementedError):
        LayerRule().paths(None, None, None)


def test_lora_and_plain_layers_together():
    case = diagonals.mixing(layers.Input((3,)), layers.Dense(3), layers.Dense(2))
    case.model.layers[0].enable_lora(2)
    cases.randomize(case.model)
    op = diagonals.operator(case)
    value, plan = diagonals.exact(op)
    # float32: LoRA's own variables ignore the float type.
    diagonals.assert_close(value, np.diag(op.to_dense()), rtol=1e-5)
    ways = {path.split("/")[-1]: way for path, way in plan.ways.items()}
    assert ways["lora_kernel_a"] == ways["lora_kernel_b"] == "parameters"
    assert "layer outputs" in diagonals.structure(op).coverage.values()
    assert isinstance(case.model, keras.Model)
