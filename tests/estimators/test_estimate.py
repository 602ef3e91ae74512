"""`Estimate`: what it says about itself."""

import math

import numpy as np
import pytest

from keras_curvature import backend
from keras_curvature.estimators import Estimate


@pytest.mark.parametrize(
    ("estimate", "text"),
    [
        (Estimate(12.3456, 0.42, 32), "12.35 ± 0.42 (32 matvecs)"),
        (Estimate(-1234.5, 56.7, 1), "-1234 ± 57 (1 matvec)"),
        (Estimate(1.5e12, 2e10, 8), "1.500e+12 ± 2.0e+10 (8 matvecs)"),
        (Estimate(3e-9, 1e-10, 8), "3.00e-09 ± 1.0e-10 (8 matvecs)"),
        (Estimate(2.0, 0.0, 50), "2 (exact, 50 matvecs)"),
        (Estimate(2.0, None, 1), "2 (no standard error from one sample, 1 matvec)"),
        (Estimate(math.nan, math.nan, 4), "nan ± nan (4 matvecs)"),
    ],
)
def test_a_scalar_shows_value_error_and_price(estimate, text):
    assert repr(estimate) == text


@pytest.mark.parametrize(
    ("error", "quality"),
    [
        ([0.3, 0.4], "relative standard error 0.1"),
        ([0.0, 0.0], "exact"),
        (None, "no standard error from one sample"),
    ],
)
@pytest.mark.parametrize("form", ["tensor", "array", "list", "nested"])
def test_arrays_are_summarised(error, quality, form):
    make = {
        "tensor": lambda x: backend.array(x, "float32"),
        "array": np.array,
        "list": lambda x: [np.array(x[:1]), np.array([x[1:]]), np.zeros((0, 2))],
        "nested": lambda x: {"a": np.array(x[:1]), "b": [np.array(x[1:])]},
    }[form]
    estimate = Estimate(make([3.0, -4.0]), None if error is None else make(error), 7)
    expected = f"2 entries in [-4, 3], mean -0.5 ({quality}, 7 matvecs)"
    assert repr(estimate) == expected


def test_relative_standard_error():
    assert Estimate(-4.0, 1.0, 2).relative_standard_error == 0.25
    assert Estimate(0.0, 0.0, 2).relative_standard_error == 0
    assert Estimate(0.0, 1.0, 2).relative_standard_error == math.inf
    assert Estimate(1.0, None, 1).relative_standard_error is None
    arrays = Estimate([np.array([3.0]), np.array([4.0])], [np.ones(1), np.zeros(1)], 2)
    np.testing.assert_allclose(arrays.relative_standard_error, 0.2)


def test_no_entries():
    assert repr(Estimate([], [], 3)) == "no entries (3 matvecs)"


def test_errors_of_the_single_arrays():
    values, errors = [np.ones(4), np.array([3.0, 4.0])], [np.ones(4), np.zeros(2)]
    assert Estimate(values, errors, 8).relative_standard_errors == [1.0, 0.0]
    assert Estimate(values, None, 1).relative_standard_errors is None
