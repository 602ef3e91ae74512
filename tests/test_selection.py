"""Patterns, layers and variables in `variables=`, wherever it can be passed."""

import keras
import numpy as np
import pytest
from keras import layers
from training import data, fit, monitor, network

import keras_curvature as kc
from keras_curvature import analysis
from keras_curvature.preconditioning import preconditioner
from keras_curvature.selection import selected

array = keras.ops.convert_to_numpy


def attentive(late=False):
    """Two blocks of attention; built late, paths begin with the model's name."""

    class Blocks(keras.Model):
        def __init__(self):
            super().__init__(name="blocks")
            self.attention = [
                layers.MultiHeadAttention(1, 2, name=f"attention_{i}") for i in range(2)
            ]
            self.out = layers.Dense(1, name="out")

        def call(self, x):
            for attention in self.attention:
                x = x + attention(x, x)
            return self.out(x)

    if late:
        model = Blocks()
    else:
        inputs = x = layers.Input((3, 2))
        for i in range(2):
            x = x + layers.MultiHeadAttention(1, 2, name=f"attention_{i}")(x, x)
        model = keras.Model(inputs, layers.Dense(1, name="out")(x), name="blocks")
    model.compile(loss="mse")
    return model


def names(model, variables):
    paths = [v.path.removeprefix("blocks/") for v in selected(model, variables)]
    assert len(set(paths)) == len(paths)
    return paths


@pytest.mark.parametrize("late", [False, True])
def test_patterns(late):
    model = attentive(late)
    model(np.ones((1, 3, 2)))
    assert any(v.path.startswith("blocks/") for v in model.weights) == late
    every = names(model, None)
    assert names(model, "*") == every and len(every) == 18
    first = [name for name in every if name.startswith("attention_0/")]
    # Whether or not there is something in front.
    for pattern in ("attention_0/*", "*/attention_0/*", "blocks/attention_0/*"):
        assert names(model, pattern) == first
    assert names(model, "*/kernel") == [n for n in every if n.endswith("/kernel")]
    assert names(model, ["out/kernel"]) == ["out/kernel"]
    # Capitals count, as they do in paths.
    with pytest.raises(ValueError, match="no trainable variable"):
        selected(model, "OUT/*")


def test_mixed_selection_keeps_its_order_and_takes_each_once():
    model = attentive()
    out = model.get_layer("out")
    mixed = [out.bias, "attention_1/*", out, "*/bias"]
    found = names(model, mixed)
    assert found[0] == "out/bias" and found[9] == "out/kernel"
    assert names(model, out) == ["out/kernel", "out/bias"]
    assert names(model, out.bias) == ["out/bias"]
    assert names(model, model) == names(model, None)


def test_refused_selections():
    model = attentive()
    with pytest.raises(ValueError, match=r"Received: 'atention_0'.*'attention_0/"):
        selected(model, ["atention_0"])
    with pytest.raises(ValueError, match=r"nearest are 'attention_0/\w+/\*'"):
        selected(model, "attention_0")
    with pytest.raises(ValueError, match="layer has no trainable.*'flat', without"):
        selected(model, layers.Flatten(name="flat"))
    with pytest.raises(ValueError, match="must be Keras variables.*type float"):
        selected(model, 1.0)
    model.get_layer("out").trainable = False
    with pytest.raises(ValueError, match="only others.*'out/.'.*themselves"):
        selected(model, "out/*")
    with pytest.raises(ValueError, match="layer has no trainable.*'out', frozen"):
        selected(model, model.get_layer("out"))
    model.trainable = False
    with pytest.raises(ValueError, match="no trainable variables.*'nowhere'"):
        selected(model, "nowhere")


def test_operator_of_a_part():
    """The block of the whole Hessian."""
    model, x, y = network(activation="tanh"), *data(8)
    whole = kc.HessianOperator(model, x, y).to_dense()
    op = kc.HessianOperator(model, x, y, variables="hidden/*")
    assert op.shape == (16, 16) and len(op.variables) == 2
    # Rounding of float32; entries are of order one tenth.
    np.testing.assert_allclose(op.to_dense(), whole[:16, :16], atol=1e-6)


@pytest.mark.parametrize(
    "function",
    [
        kc.curvature_summary,
        kc.hessian_diagonal,
        kc.hessian_eigenvalues,
        kc.hessian_frobenius_norm,
        kc.hessian_matrix,
        kc.hessian_spectral_density,
        kc.hessian_trace,
    ],
)
def test_functions_take_it_too(function, monkeypatch):
    class Seen(Exception):
        pass

    class Operator:
        def __init__(self, *data, variables):
            raise Seen(variables)

    monkeypatch.setattr(analysis, "HessianOperator", Operator)
    with pytest.raises(Seen, match=r"^hidden/\*$"):
        function(network(), *data(8), variables="hidden/*")


def test_monitor_of_a_part():
    """The optimizer takes the part that was measured, and the rest for flat."""
    optimizer = kc.DiagonalNewton(0.05, beta_2=0.0)
    model = network(optimizer=optimizer)
    watch = monitor(
        diagonal="hutchinson",
        diagonal_samples=1,
        num_matvecs=0,
        variables=["hidden/*"],
        update_freq=10,
    )
    fit(model, watch)
    assert len(watch.history) == 2
    for record in watch.history:
        assert [layer["name"] for layer in record["layers"]] == ["hidden"]
        assert np.isfinite(record["hessian_trace"])
    assert [np.any(array(h)) for h in optimizer._curvatures] == [
        True,
        True,
        False,
        False,
    ]
    whole = array(
        preconditioner(optimizer, kc.HessianOperator(model, *data(8))).diagonal
    )
    part = array(preconditioner(optimizer, watch.operator).diagonal)
    np.testing.assert_array_equal(part, whole[:16])


def test_adapters_alone():
    """LoRA: what was adapted is frozen; a pattern finds the adapters."""
    model = network()
    model.get_layer("hidden").enable_lora(1)
    x, y = data(8)
    op = kc.HessianOperator(model, x, y, variables="*/lora_kernel_*")
    assert [tuple(v.shape) for v in op.variables] == [(3, 1), (1, 4)]
    whole = kc.HessianOperator(model, x, y)
    mine = set(map(id, op.variables))
    at = [i for i, v in enumerate(whole.variables) if id(v) in mine]
    starts = np.cumsum([0, *whole.sizes])
    rows = np.concatenate([np.arange(starts[i], starts[i + 1]) for i in at])
    dense = whole.to_dense()
    np.testing.assert_allclose(op.to_dense(), dense[np.ix_(rows, rows)], atol=1e-6)
    assert np.abs(op.to_dense()).max() > 0


def test_a_model_that_is_not_built_yet():
    model = network(built=False)
    x, y = data(8)
    op = kc.HessianOperator(model, x, y, variables="*hidden/kernel")
    assert op.shape == (12, 12)
