"""Records, from figures that are made up, against NumPy."""

import json
import math
import types

import numpy as np
import pytest
from keras import ops

from keras_curvature import backend, record
from keras_curvature.estimators import Estimate
from keras_curvature.estimators.deflation import DeflatedMoments
from keras_curvature.estimators.moments import Moments
from keras_curvature.loss import layout_of
from keras_curvature.tensorboard import signed_log

SIZES = [6, 2, 4]
DIAGONAL = np.array(
    [1e-3, -2.0, 0.0, 5.0, 1e9, 3.0] + [-1e9, 4.0] + [1.0, -1.0, 2.0, -2.0]
)
PAIRS = np.array([[25.0, 15.0, 10.0], [15.0, 8.0, 7.0], [10.0, 7.0, 3.0]])
PARTS = np.split(DIAGONAL, np.cumsum(SIZES)[:-1])


@pytest.fixture
def operator():
    paths = ["net/conv/kernel", "net/conv/bias", "net/block/dense/kernel"]
    layout = types.SimpleNamespace(names=paths, sizes=SIZES)
    model = types.SimpleNamespace(name="net")
    loss = types.SimpleNamespace(model=model, layout=layout)
    return types.SimpleNamespace(
        sizes=SIZES, evaluation=types.SimpleNamespace(loss=loss)
    )


def moments(error=0.5):
    blocks = tuple(
        Estimate(float(p.sum()), None if error is None else (i + 1) * error, 4)
        for i, p in enumerate(PARTS)
    )
    trace = Estimate(float(DIAGONAL.sum()), error, 4, blocks)
    value = backend.array(DIAGONAL, backend.wide_float())
    return Moments(trace, None, Estimate(value, ops.zeros_like(value), 4), 4)


def deflated(values=(-7.0, 5.0, 1.0), error=2.0):
    trace = Estimate(9.0, 0.1, 12, tuple(Estimate(t, 0.1, 12) for t in (4.0, 2.0, 3.0)))
    squared = Estimate(
        100.0,
        20.0,
        12,
        tuple(Estimate(s, 1.0, 12) for s in (50.0, 30.0, 20.0)),
        Estimate(PAIRS, None if error is None else error * np.ones((3, 3)), 12),
    )
    residuals = np.array([0.3, 0.2, 0.1])
    return DeflatedMoments(trace, squared, None, 12, np.array(values), residuals)


def test_scalar_figures():
    assert record.scalar_figures(moments(), deflated()) == {
        "hessian_trace": DIAGONAL.sum(),
        "hessian_trace_standard_error": 0.5,
        "hessian_frobenius_norm": 10.0,
        "hessian_frobenius_norm_standard_error": 1.0,  # 20 / (2 · 10)
        "hessian_max_eigenvalue": 5.0,  # Not the largest in size, -7.
        "hessian_max_eigenvalue_error": 0.2,
    }


def test_no_eigenvalue_yet():
    figures = record.scalar_figures(None, deflated(values=()))
    assert figures["hessian_max_eigenvalue"] is None
    assert figures["hessian_max_eigenvalue_error"] is None
    assert figures["hessian_frobenius_norm"] == 10.0


def test_scalar_figures_of_one_kind():
    assert record.scalar_figures() == {}
    only_trace = {"hessian_trace", "hessian_trace_standard_error"}
    assert set(record.scalar_figures(moments())) == only_trace
    assert record.scalar_figures(moments(None))["hessian_trace_standard_error"] is None
    assert record.scalar_figures(None, deflated())["hessian_trace"] == 9.0


def test_variable_figures(operator):
    edges = signed_log.bin_edges()
    variables = record.variable_figures(operator, moments(), deflated(), edges)
    assert [v["path"] for v in variables] == [
        "conv/kernel",
        "conv/bias",
        "block/dense/kernel",
    ]
    assert [v["layer"] for v in variables] == ["conv", "conv", "block/dense"]
    for i, (v, h) in enumerate(zip(variables, PARTS, strict=True)):
        expected = {
            "size": h.size,
            "diagonal_mean": h.mean(),
            "diagonal_mean_abs": abs(h).mean(),
            "diagonal_max": h.max(),
            "diagonal_min": h.min(),
            "negative_share": (h < 0).mean(),
            "trace": h.sum(),
            "trace_standard_error": 0.5 * (i + 1),
            "diagonal_mean_standard_error": 0.5 * (i + 1) / h.size,
            "frobenius_share": [0.5, 0.3, 0.2][i],
            "block_share": [0.25, 0.08, 0.03][i],
            "block_share_standard_error": 0.02,
            # The first two share a layer.
            "layer_block_share": [0.4, 0.23, 0.03][i],
            "layer_block_share_standard_error": [0.04, 0.04, 0.02][i],
        }
        for key, value in expected.items():
            np.testing.assert_allclose(v[key], value, rtol=1e-12, err_msg=key)
        # Beyond the edges counts in the outermost bins.
        inside = np.clip(h, edges[0], edges[-1])
        np.testing.assert_array_equal(
            v["histogram"]["counts"], np.histogram(inside, edges)[0]
        )
    assert variables[0]["histogram"]["counts"][-1] == 1
    assert variables[1]["histogram"]["counts"][0] == 1


def test_record_is_plain_and_small(operator):
    """Numbers that JSON takes, and one list of edges for all histograms."""
    edges = signed_log.bin_edges()
    first, second = [
        record.variable_figures(operator, moments(), deflated(), edges)
        for _ in range(2)
    ]
    assert json.loads(json.dumps(first)) == first
    layers = record.layer_figures(first)
    for other in (*first, *second, *layers):
        assert other["histogram"]["edges"] is first[0]["histogram"]["edges"]


def test_layer_figures(operator):
    edges = signed_log.bin_edges()
    variables = record.variable_figures(operator, moments(), deflated(), edges)
    conv, dense = record.layer_figures(variables)
    assert (conv["name"], dense["name"]) == ("conv", "block/dense")
    h = DIAGONAL[:8]
    expected = {
        "size": 8,
        "diagonal_mean": h.mean(),
        "diagonal_mean_abs": abs(h).mean(),
        "diagonal_max": h.max(),
        "diagonal_min": h.min(),
        "negative_share": (h < 0).mean(),
        "trace": h.sum(),
        "trace_standard_error": 1.5,
        "diagonal_mean_standard_error": 1.5 / 8,
        "frobenius_share": 0.8,
        "block_share": 0.63,
        "block_share_standard_error": 0.08,
    }
    for key, value in expected.items():
        # Rounding, where 1e9 and -1e9 cancel.
        np.testing.assert_allclose(conv[key], value, rtol=1e-7, err_msg=key)
    assert sum(conv["histogram"]["counts"]) == 8
    assert {k: v for k, v in dense.items() if k not in ("name",)} == {
        k: v
        for k, v in variables[2].items()
        if k not in ("path", "layer") and "layer_block" not in k
    }
    # What the layers' blocks leave lies between them.
    between = 1 - conv["block_share"] - dense["block_share"]
    np.testing.assert_allclose(between, 2 * (10 + 7) / 100)


def test_unknown_errors_stay_unknown(operator):
    variables = record.variable_figures(operator, moments(None))
    assert variables[0]["trace_standard_error"] is None
    assert variables[0]["diagonal_mean_standard_error"] is None
    assert "histogram" not in variables[0]
    layer = record.layer_figures(variables)[0]
    assert layer["trace_standard_error"] is None
    assert layer["diagonal_mean_standard_error"] is None
    assert "frobenius_share" not in layer and "block_share" not in layer
    variables = record.variable_figures(operator, None, deflated(error=None))
    assert variables[0]["block_share_standard_error"] is None
    layer = record.layer_figures(variables)[0]
    assert layer["block_share_standard_error"] is None
    np.testing.assert_allclose(layer["block_share"], 0.63)


def test_only_the_subspace(operator):
    variables = record.variable_figures(operator, None, deflated())
    assert variables[1]["trace"] == 2.0
    assert "diagonal_mean" not in variables[1]
    assert record.layer_figures(variables)[0]["frobenius_share"] == 0.8


def test_no_hessian_at_all(operator):
    variables = record.variable_figures(operator)
    assert variables[0] == {"path": "conv/kernel", "layer": "conv", "size": 6}
    zero = deflated()
    object.__setattr__(
        zero,
        "squared_frobenius_norm",
        Estimate(0.0, 0.0, 12, tuple(Estimate(0.0, 0.0, 12) for _ in SIZES)),
    )
    figures = record.variable_figures(operator, None, zero)
    assert [v["frobenius_share"] for v in figures] == [0.0, 0.0, 0.0]


def test_paths_of_a_real_model_and_of_a_function(operator):
    del operator.evaluation.loss.model  # A function: no model, no prefix.
    variables = record.variable_figures(operator)
    assert variables[0]["layer"] == "net/conv"
    operator.evaluation.loss.layout = layout_of([np.ones(1)])
    (figures,) = record.variable_figures(operator)
    assert figures["layer"] == figures["path"] == "parameter 0"


@pytest.mark.parametrize(
    "value, finite", [(1.0, True), (None, True), (math.nan, False)]
)
def test_is_finite(value, finite):
    assert record.is_finite({"hessian_trace": value, "loss": math.nan}) == finite
    assert record.is_finite({"hessian_trace": 1.0, "hessian_x": value}) == finite


def test_one_line():
    line = record.one_line(
        {
            "step": 40,
            "seconds": 0.123,
            "hessian_trace": 81.034,
            "hessian_trace_standard_error": 0.0,
            "hessian_frobenius_norm": 27.77,
            "hessian_frobenius_norm_standard_error": 0.2134,
            "hessian_max_eigenvalue": 0.29,
            "hessian_max_eigenvalue_error": 1.07,
            "overhead": 0.081,
        }
    )
    assert line == (
        "curvature at step 40 - trace 81.03 - norm 27.77 ± 0.21 - "
        "max eigenvalue 0.29 ± 1.1 - 0.12s - overhead 8%"
    )
    assert record.one_line({"step": 0, "seconds": 1}) == "curvature at step 0 - 1.00s"
