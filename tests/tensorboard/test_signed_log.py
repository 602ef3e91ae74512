"""The axis of the histograms: readable, monotone, symmetric, invertible."""

import numpy as np
import pytest

from keras_curvature.tensorboard import signed_log


@pytest.mark.parametrize(
    "curvature, place",
    [(-1, -8), (-1e-4, -4), (0, 0), (1e-6, 2), (1e-4, 4), (1e-2, 6), (1, 8), (100, 10)],
)
def test_axis_is_the_documented_table(curvature, place):
    # log10(1 + |h|/h0) exceeds log10(|h|/h0) by 0.0043 at two decades above h0.
    assert signed_log.to_axis(curvature) == pytest.approx(place, abs=0.005)


def test_from_axis_is_the_inverse():
    places = np.linspace(-16, 16, 321)
    back = signed_log.to_axis(signed_log.from_axis(places))
    np.testing.assert_allclose(back, places, rtol=1e-12, atol=1e-12)


def test_bins_are_symmetric_increasing_and_hold_zero_in_the_middle():
    edges = signed_log.bin_edges()
    assert edges.shape == (signed_log.NUM_BINS + 1,)
    assert np.all(np.diff(edges) > 0)
    np.testing.assert_allclose(edges, -edges[::-1])
    middle = signed_log.NUM_BINS // 2
    assert edges[middle] < 0 < edges[middle + 1]


def test_every_number_has_a_bin_by_the_inner_edges():
    values = np.array([-1e30, -1.0, 0.0, 1e-12, 3.0, 1e30], "float32")
    bins = np.searchsorted(signed_log.bin_edges()[1:-1].astype("float32"), values)
    assert bins.min() == 0
    assert bins.max() == signed_log.NUM_BINS - 1
    assert bins[2] == bins[3] == signed_log.NUM_BINS // 2
