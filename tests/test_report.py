"""`curvature_summary` against the dense Hessian, and what it prints."""

import json

import cases
import keras
import matrices
import numpy as np
import pytest

import keras_curvature as kc
from keras_curvature.progress import Progress
from keras_curvature.report import CurvatureSummary
from keras_curvature.text import number, percent

pytestmark = pytest.mark.usefixtures("module_float64")


@pytest.fixture(scope="module")
def relu(module_float64):
    """A model, and its operator, which keeps what was compiled."""
    model, x, y, *_ = cases.mlp_relu()
    return model, kc.HessianOperator(model, x, y)


@pytest.fixture(scope="module")
def tanh(module_float64):
    model, x, y, *_ = cases.mlp_tanh()
    return model, kc.HessianOperator(model, x, y)


def test_exact_figures_by_layer(relu):
    """With products enough for every parameter, twice, nothing is random."""
    model, operator = relu
    h = kc.hessian_matrix(operator)
    *layers, total = kc.curvature_summary(
        operator, num_matvecs=2 * len(h), print_fn=False
    )
    sizes = [layer.count_params() for layer in model.layers]
    pairs = matrices.squared_norms_of_pairs(h, sizes)
    diagonals = np.split(np.diag(h), np.cumsum(sizes)[:-1])
    for i, (layer, diagonal) in enumerate(zip(layers, diagonals, strict=True)):
        expected = {
            "size": sizes[i],
            "trace": diagonal.sum(),
            "trace_standard_error": 0,
            "diagonal_mean": diagonal.mean(),
            "diagonal_max": diagonal.max(),
            "frobenius_share": pairs[i].sum() / pairs.sum(),
            "block_share": pairs[i, i] / pairs.sum(),
            "block_share_standard_error": 0,
        }
        for key, value in expected.items():
            np.testing.assert_allclose(layer[key], value, rtol=1e-8, err_msg=key)
        assert layer["name"] == model.layers[i].name
        assert layer["variables"] == "kernel, bias"
    expected = {
        "hessian_trace": np.trace(h),
        "hessian_frobenius_norm": np.linalg.norm(h),
        "hessian_max_eigenvalue": np.linalg.eigvalsh(h)[-1],
        "off_diagonal_share": 1 - np.trace(pairs) / pairs.sum(),
    }
    for key, value in expected.items():
        np.testing.assert_allclose(total[key], value, rtol=1e-8, err_msg=key)
    assert total["name"] == "total" and total["size"] == len(h)


def test_random_figures_add_up(tanh):
    model, operator = tanh
    h = kc.hessian_matrix(operator)
    *layers, total = kc.curvature_summary(operator, num_matvecs=16, print_fn=False)
    sizes = [layer.count_params() for layer in model.layers]
    pairs = matrices.squared_norms_of_pairs(h, sizes)
    trace = sum(layer["trace"] for layer in layers)
    np.testing.assert_allclose(trace, total["hessian_trace"], rtol=1e-10)
    shares = sum(layer["frobenius_share"] for layer in layers)
    np.testing.assert_allclose(shares, 1, rtol=1e-10)
    for i, layer in enumerate(layers):
        error = abs(layer["block_share"] - pairs[i, i] / pairs.sum())
        assert 0 < error <= 3 * layer["block_share_standard_error"]
    blocks = sum(layer["block_share"] for layer in layers)
    np.testing.assert_allclose(blocks + total["off_diagonal_share"], 1, rtol=1e-12)


def test_the_table(relu, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    _, operator = relu
    lines: list = []
    arguments = {"num_matvecs": 2 * 59, "verbose": False}
    *layers, total = kc.curvature_summary(operator, print_fn=lines.append, **arguments)
    assert capsys.readouterr().out == ""
    text = "\n".join(lines)
    for layer in layers:
        cells = f" {layer['size']:,} ", f" {percent(layer['frobenius_share'])} "
        assert any(all(c in line for c in cells) for line in lines)
    assert f"Trace: {number(total['hessian_trace'])}" in text
    assert f"Between layers: {percent(total['off_diagonal_share'])} of ‖H‖²" in text
    # Its eigenvalue is the table's own, at no further cost.
    rate = total["suggested_learning_rate"]
    assert f"Learning rate suggested: {number(rate, 2)}. λ = " in text
    bound = total["hessian_max_eigenvalue"] + total["hessian_max_eigenvalue_error"]
    np.testing.assert_allclose(rate, 1 / bound, rtol=1e-12)
    assert total["num_matvecs"] <= 2 * 59 + 64
    json.dumps([*layers, total])  # Plain numbers and text.
    # No line is cut on a narrow terminal.
    assert max(map(len, lines)) <= 80 and "…" not in text
    kc.curvature_summary(operator, **arguments)
    assert capsys.readouterr().out.strip() == text.strip()


def test_top_puts_layers_together_in_the_table_alone(relu):
    model, operator = relu
    options = {"print_fn": False, "num_matvecs": 2, "verbose": False}
    summary = kc.curvature_summary(operator, top=1, **options)
    assert len(summary) == len(model.layers) + 1 == 4
    assert "2 more layers" in summary.table()
    assert "more layers" not in CurvatureSummary(summary, False, top=None).table()
    for top in (0, -1, 1.5):
        with pytest.raises(ValueError, match=f"Received: top={top}"):
            kc.curvature_summary(operator, top=top)


def test_a_learning_rate_for_an_optimizer_that_divides():
    """From products of its own, with what the optimizer sees."""
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    model.compile(keras.optimizers.Adam(0.01), "mse")
    x, y = np.random.default_rng(0).standard_normal((2, 8, 2))
    model.fit(x, y[:, :1], epochs=3, verbose=0)
    operator = kc.HessianOperator(model, x, y[:, :1])
    alone = kc.suggest_learning_rate(operator)
    # Of a linear model and a squared error it is the whole diagonal.
    options = {"method": "gauss_newton", "print_fn": False}
    summary = kc.curvature_summary(operator, **options)
    found = summary[-1]["suggested_learning_rate"]
    np.testing.assert_allclose(found, alone.value, rtol=1e-6)
    assert "Adam turns unstable at 38 / λ" in " ".join(summary.table().split())
    model.optimizer = None
    summary = kc.curvature_summary(operator, **options)
    assert summary[-1]["learning_rate_reason"] is None
    assert "Learning rate" not in summary.table()


def test_one_bar_counts_all_products(tanh, monkeypatch):
    _, operator = tanh
    told = []
    call = Progress.__call__

    def listening(self, done, total):
        go_on = call(self, done, total)
        told.append((self._done, self._total))
        return go_on

    monkeypatch.setattr(Progress, "__call__", listening)
    method = {"method": "layerwise", "num_matvecs": 16}
    kc.curvature_summary(operator, print_fn=False, verbose=False, **method)
    done, totals = zip(*told, strict=True)
    assert list(done) == sorted(done) and set(totals) == {20} and done[-1] == 20


@pytest.mark.parametrize(
    ("training", "told"),
    [
        (None, "training without noise, BatchNormalization over 5 samples"),
        (True, "training, BatchNormalization over 5 samples"),
        (False, "inference"),
    ],
)
def test_the_table_says_how_the_layers_ran(training, told):
    model, x, y, *_ = cases.batch_norm()
    options = {"method": "hutchinson", "num_matvecs": 2, "print_fn": False}
    summary = kc.curvature_summary(model, x, y, training=training, **options)
    assert summary[-1]["mode"] == told
    assert f"\n Layers ran as in {told}" in summary.table()


def test_a_loss_without_curvature():
    """A linear model with a linear loss: H is zero, and no figure undefined."""
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    model.compile(loss=lambda y, p: keras.ops.mean(p - y, axis=-1))
    *layers, total = kc.curvature_summary(
        model, np.ones((4, 2)), np.ones((4, 1)), print_fn=False
    )
    assert total["hessian_frobenius_norm"] == total["hessian_trace"] == 0
    assert all(
        value == value
        for figures in (*layers, total)
        for value in figures.values()
        if isinstance(value, float)
    )


def test_shows_itself_once(relu):
    _, operator = relu
    lines = []
    printed = kc.curvature_summary(operator, print_fn=lines.append)
    quiet = kc.curvature_summary(operator, print_fn=False)
    assert repr(quiet) == "\n".join(lines) == printed.table()
    layers = len(printed) - 1
    assert repr(printed).startswith(f"<curvature of {layers} layers, ")
    assert isinstance(quiet[:-1], list) and quiet[-1]["name"] == "total"
