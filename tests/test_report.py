"""`curvature_summary` against the dense Hessian, and what it prints."""

import cases
import keras
import matrices
import numpy as np
import pytest

import keras_curvature as kc

pytestmark = pytest.mark.usefixtures("float64")


def test_exact_figures_by_layer():
    """With products enough for every parameter, twice, nothing is random."""
    model, x, y, *_ = cases.mlp_relu()
    h = kc.hessian_matrix(model, x, y)
    *layers, total = kc.curvature_summary(
        model, x, y, num_matvecs=2 * len(h), print_fn=False
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


def test_random_figures_add_up():
    model, x, y, *_ = cases.mlp_tanh()
    h = kc.hessian_matrix(model, x, y)
    *layers, total = kc.curvature_summary(model, x, y, print_fn=False)
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


def test_the_table(capsys):
    model, x, y, *_ = cases.mlp_relu()
    lines: list = []
    arguments = {"x": x, "y": y, "num_matvecs": 2 * 59, "verbose": False}
    *layers, total = kc.curvature_summary(model, print_fn=lines.append, **arguments)
    assert capsys.readouterr().out == ""
    text = "\n".join(lines)
    for layer in layers:
        cells = f" {layer['size']:,} ", f" {layer['block_share']:.0%} │"
        assert any(all(c in line for c in cells) for line in lines)
    assert f"Trace: {total['hessian_trace']:.3g}" in text
    assert f"Between layers: {total['off_diagonal_share']:.0%} of ‖H‖²" in text
    # No line is cut on a narrow terminal.
    assert max(map(len, lines)) <= 80 and "…" not in text
    kc.curvature_summary(model, **arguments)
    assert capsys.readouterr().out.strip() == text.strip()


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
    summary = kc.curvature_summary(
        model, x, y, training=training, num_matvecs=2, print_fn=False, verbose=False
    )
    assert summary[-1]["mode"] == told
    assert summary.table().split("\n")[-1] == f" Layers ran as in {told}"


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


def test_shows_itself_once():
    model, x, y, *_ = cases.mlp_relu()
    lines = []
    printed = kc.curvature_summary(model, x, y, print_fn=lines.append)
    quiet = kc.curvature_summary(model, x, y, print_fn=False)
    assert repr(quiet) == "\n".join(lines) == printed.table()
    layers = len(printed) - 1
    assert repr(printed).startswith(f"<curvature of {layers} layers, ")
    assert isinstance(quiet[:-1], list) and quiet[-1]["name"] == "total"
