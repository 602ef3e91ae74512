"""A signed logarithmic scale, on which curvature fits one axis.

The entries of a Hessian's diagonal span ten decades and have both signs. With the
curvature `h` and the threshold `h0 = 1e-8`, the axis shows

    u = sign(h) · log10(1 + |h| / h0)

which is 0 at `h = 0`, linear while `|h|` is well below `h0`, and counts decades above:

| h | -1 | -1e-4 | 0 | 1e-6 | 1e-4 | 1e-2 | 1 | 100 |
|---|---|---|---|---|---|---|---|---|
| u | -8 | -4 | 0 | 2 | 4 | 6 | 8 | 10 |

Whoever holds the diagonal counts its entries between `bin_edges()`, on the device where
it lies; only the counts travel. Bins are half a decade wide, and the middle one lies
around zero.
"""

import numpy as np

THRESHOLD = 1e-8
"""Curvature below which the axis is linear: `h0` above."""

BINS_PER_DECADE = 2
DECADES = 16
NUM_BINS = 2 * BINS_PER_DECADE * DECADES + 1

DESCRIPTION = (
    "on a signed logarithmic axis, not on a linear one: "
    "`u = sign(h) log10(1 + |h| / 1e-8)`. Read 8 as a curvature of 1, 6 as 0.01, 10 as "
    "100, -8 as -1; around 0 lies what is smaller than 1e-8 in size."
)


def to_axis(curvature: np.ndarray) -> np.ndarray:
    """The place on the axis of curvature values of any shape."""
    curvature = np.asarray(curvature, "float64")
    return np.sign(curvature) * np.log10(1 + np.abs(curvature) / THRESHOLD)


def from_axis(place: np.ndarray) -> np.ndarray:
    """The curvature at places on the axis, of any shape: the inverse of `to_axis`."""
    place = np.asarray(place, "float64")
    return np.sign(place) * THRESHOLD * (10 ** np.abs(place) - 1)


def bin_edges() -> np.ndarray:
    """The curvature at the edges of the bins, in increasing order.

    The axis reaches to a curvature of about 1e8 on both sides. Count what lies beyond
    in the outermost bins: with `searchsorted` against the *inner* edges,
    `bin_edges()[1:-1]`, every number falls into one of the `NUM_BINS` bins.

    Returns:
        A float64 array of shape `(NUM_BINS + 1,)`.
    """
    half = NUM_BINS / 2 / BINS_PER_DECADE
    return from_axis(np.linspace(-half, half, NUM_BINS + 1))
